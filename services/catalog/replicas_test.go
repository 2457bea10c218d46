package catalog

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"testing"
	"time"

	"github.com/cloudevents/sdk-go/v2/event"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/store/storetest"
)

// shared is an outbox for several replicas.
type shared struct {
	mu sync.Mutex
	outbox
}

func (s *shared) Publish(ctx context.Context, events ...event.Event) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.outbox.Publish(ctx, events...)
}

// once checks that no event was sent twice, and returns how many of each kind were.
func (s *shared) once(t *testing.T) map[string]int {
	t.Helper()
	ids, kinds := map[string]int{}, map[string]int{}
	for _, ev := range s.events {
		if ids[ev.ID()]++; ids[ev.ID()] > 1 {
			t.Errorf("%s about %s was sent %d times", ev.Type(), ev.Subject(), ids[ev.ID()])
		}
		kinds[ev.Type()[len(contracts.TypePrefix):]]++
	}
	s.events = nil
	return kinds
}

// TestTwoReplicas: whatever two replicas do at the same time, on events and on
// timers, is done once.
func TestTwoReplicas(t *testing.T) {
	const images, tags = 40, 20
	url := storetest.URL(t)
	out := &shared{}
	f := &fixture{t: t, db: storetest.OpenURL(t, url), out: &out.outbox, now: start}
	var replicas []*Service
	for range 2 {
		s, err := New(t.Context(), DefaultConfig(), storetest.OpenURL(t, url), out, slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		replicas = append(replicas, s)
	}
	both := func(what string, work func(s *Service, replica int) error) map[string]int {
		t.Helper()
		var group sync.WaitGroup
		for i, s := range replicas {
			group.Go(func() {
				if err := work(s, i); err != nil {
					t.Errorf("%s: %v", what, err)
				}
			})
		}
		group.Wait()
		if err := replicas[0].send(t.Context()); err != nil {
			t.Fatal(err)
		}
		return out.once(t)
	}
	expect := func(what string, got map[string]int, want map[string]int) {
		t.Helper()
		if fmt.Sprint(got) != fmt.Sprint(want) {
			t.Errorf("%s: sent %v, want %v", what, got, want)
		}
	}

	// Each image's events come in order, by one replica or the other; each
	// repository has two images, one by either.
	streams := make([][][]event.Event, 2)
	for i := range images {
		im := img(fmt.Sprint("team/app-", i/2), fmt.Sprint("image-", i))
		streams[i%2] = append(streams[i%2], []event.Event{
			f.assembled(im, contracts.Inventory{Packages: npmPackages("lodash", "express")}),
			f.attested(im, 1, vuln("CVE-1", "lodash", "1.0.0", "high", "2.0.0")),
		})
	}
	got := both("events", func(s *Service, replica int) error {
		for _, events := range streams[replica] {
			for _, ev := range events {
				if _, err := s.Handle(context.Background(), ev); err != nil {
					return err
				}
			}
		}
		return nil
	})
	// The second image of a repository changes the problem of the first.
	if got["finding.opened.v1"] != images/2 || got["finding.closed.v1"] != 0 {
		t.Errorf("sent %v, want %d opened", got, images/2)
	}

	// A redelivery during a rebalance: both are given the same.
	snapshot := f.published(1, 2, about("lodash"))
	expect("snapshot", both("snapshot", func(s *Service, _ int) error {
		_, err := s.Handle(context.Background(), snapshot)
		return err
	}), map[string]int{})
	expect("rematch", both("rematch", func(s *Service, _ int) error {
		for range 3 {
			if err := s.Rematch(context.Background(), f.now); err != nil {
				return err
			}
		}
		return nil
	}), map[string]int{"image.rematch.v1": images})

	// Statements near their end.
	f.now = f.now.Add(6 * 24 * time.Hour)
	expect("refresh", both("refresh", func(s *Service, _ int) error {
		return s.Rematch(context.Background(), f.now)
	}), map[string]int{"image.rematch.v1": images})

	// Deadlines: pushed again twice, then failed.
	for i := range tags {
		if _, err := replicas[0].Handle(context.Background(), f.pushed("late", fmt.Sprint("v", i), "")); err != nil {
			t.Fatal(err)
		}
	}
	out.once(t)
	for _, want := range []map[string]int{{"image.pushed.v1": tags}, {"image.pushed.v1": tags}, {"image.failed.v1": tags}} {
		f.now = f.now.Add(7 * time.Hour)
		expect("deadlines", both("deadlines", func(s *Service, _ int) error {
			return s.CheckDeadlines(context.Background(), f.now)
		}), want)
	}

	// The daily cleaning.
	expect("clean up", both("clean up", func(s *Service, _ int) error {
		return s.CleanUp(context.Background(), f.now)
	}), map[string]int{})
}
