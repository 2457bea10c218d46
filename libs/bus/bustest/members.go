package bustest

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cloudevents/sdk-go/v2/event"
	"github.com/segmentio/kafka-go"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/bus"
)

// staleCommit shows what the bus builds on: a member whose partitions have been
// given away cannot move the group's offsets.
func staleCommit(r *rig) {
	b := r.bus("planner")
	r.publish(b, contracts.LaneFresh, 4, "a", "b", "c")
	topic := r.topic(b, contracts.ImagePushedV1, contracts.LaneFresh)
	join := func() *kafka.ConsumerGroup {
		g, err := kafka.NewConsumerGroup(kafka.ConsumerGroupConfig{
			ID: b.Group(), Brokers: r.cfg.Brokers, Topics: []string{topic},
			Dialer:            &kafka.Dialer{Timeout: 5 * time.Second, TLS: r.cfg.TLS},
			HeartbeatInterval: 200 * time.Millisecond, SessionTimeout: 6 * time.Second, RebalanceTimeout: time.Second,
			JoinGroupBackoff: 100 * time.Millisecond,
		})
		r.must(err)
		return g
	}
	old := join()
	stale, err := old.Next(r.Context())
	r.must(err)
	release, released := make(chan struct{}), make(chan struct{})
	// A handler that does not let go: its generation cannot end.
	stale.Start(func(context.Context) { <-release; close(released) })
	r.must(stale.CommitOffsets(map[string]map[int]int64{topic: {0: 1}}))

	// The bus joins, takes everything over and commits.
	var seen journal
	stop := r.consume(b, bus.Subscription{Events: []string{contracts.ImagePushedV1}, Handler: func(_ context.Context, in event.Event) ([]event.Event, error) {
		seen.add(in.ID())
		return nil, nil
	}})
	r.caughtUp(b)
	err = stale.CommitOffsets(map[string]map[int]int64{topic: {0: 0, 1: 0, 2: 0, 3: 0}})
	if !errors.Is(err, kafka.UnknownMemberId) && !errors.Is(err, kafka.IllegalGeneration) {
		r.Errorf("a stale commit gave %v", err)
	}
	r.caughtUp(b)
	stop()
	close(release)
	<-released
	r.must(old.Close())
}

func brokerGone(r *rig) {
	if r.broker.Stop == nil || r.broker.Start == nil {
		r.Skip("this broker cannot be stopped and started here")
	}
	b := r.bus("planner")
	r.must(b.EnsureTopics(r.Context(), contracts.ImagePushedV1, contracts.TagObservedV1))
	var seen journal
	s := bus.Subscription{Events: []string{contracts.ImagePushedV1}, Handler: func(ctx context.Context, in event.Event) ([]event.Event, error) {
		select {
		case <-time.After(5 * time.Millisecond):
		case <-ctx.Done():
			return nil, ctx.Err()
		}
		seen.add(in.ID())
		return observe(ctx, in)
	}}
	const each = 20
	keys := []string{"a", "b", "c", "d", "e"}
	r.publish(b, contracts.LaneFresh, each, keys...)
	r.consume(b, s)
	r.eventually("some", func() bool { return seen.len() > 10 })
	r.broker.Stop(r.T)
	r.eventually("not ready", func() bool { return b.Ready() != nil })
	ctx, cancel := context.WithTimeout(r.Context(), 300*time.Millisecond)
	if err := b.Publish(ctx, r.pushed("lost", 0, contracts.LaneFresh)); err == nil {
		r.Error("an event was published without a broker")
	}
	cancel()
	r.broker.Start(r.T)
	late := []string{"v", "w"}
	r.eventually("published again", func() bool {
		ctx, cancel := context.WithTimeout(r.Context(), 5*time.Second)
		defer cancel()
		return b.Publish(ctx, r.pushed(late[0], 0, contracts.LaneFresh), r.pushed(late[1], 0, contracts.LaneFresh)) == nil
	})
	want := each*len(keys) + len(late)
	known := func() int {
		n := 0
		for _, id := range seen.distinct() {
			if !strings.HasPrefix(id, "lost") { // may have been stored nevertheless
				n++
			}
		}
		return n
	}
	r.eventually("all events", func() bool { return known() == want })
	r.caughtUp(b)
	r.eventually("ready", func() bool { return b.Ready() == nil })
	if key := seen.ordered(); key != "" {
		r.Errorf("%s was handled out of order", key)
	}
}

func lanes(r *rig) {
	b := r.bus("planner")
	keys := []string{"a", "b", "c", "d", "e", "f", "g", "h"}
	bulkKeys := []string{"k", "l", "m", "n"}
	r.publish(b, contracts.LaneFresh, 50, keys...)
	r.publish(b, contracts.LaneBulk, 30, bulkKeys...)
	fresh, bulk := 50*len(keys), 30*len(bulkKeys)
	var seen journal
	r.consume(b, bus.Subscription{
		Events: []string{contracts.ImagePushedV1}, Concurrency: 2,
		Handler: func(ctx context.Context, in event.Event) ([]event.Event, error) {
			seen.add(fmt.Sprint(in.Extensions()[contracts.ExtLane]))
			select {
			case <-time.After(2 * time.Millisecond):
			case <-ctx.Done():
			}
			return nil, nil
		},
	})
	r.eventually("all", func() bool { return seen.len() == fresh+bulk })
	// While fresh events were left, bulk had its share and not much more. The
	// first few are left out: which lane is fetched first is a matter of chance.
	order := seen.all()
	last := len(order) - 1
	for order[last] != contracts.LaneFresh {
		last--
	}
	window := order[len(order)/20 : last+1]
	n := 0
	for _, lane := range window {
		if lane == contracts.LaneBulk {
			n++
		}
	}
	share := float64(n) / float64(len(window))
	r.Logf("bulk: %d of %d while fresh events were left (%.1f %%)", n, len(window), share*100)
	if share < 0.05 && n < bulk-len(order)/20 {
		r.Errorf("bulk had %.1f %%, at least 5 %% were promised", share*100)
	}
	if share > 0.25 {
		r.Errorf("bulk had %.1f %% while fresh events waited", share*100)
	}
}

func batches(r *rig) {
	b := r.bus("catalog")
	r.must(b.EnsureTopics(r.Context(), contracts.ImagePushedV1, contracts.TagObservedV1))
	r.publish(b, contracts.LaneFresh, 60, "a", "b", "c")
	var seen journal
	var biggest atomic.Int32
	r.consume(b, bus.Subscription{
		Events: []string{contracts.ImagePushedV1}, BatchSize: 20,
		Batch: func(ctx context.Context, in []event.Event) ([]event.Event, error) {
			if n := int32(len(in)); n > biggest.Load() { //nolint:gosec // at most 20
				biggest.Store(n)
			}
			for _, ev := range in {
				seen.add(ev.ID())
			}
			return observe(ctx, in[0])
		},
	})
	r.eventually("all", func() bool { return len(seen.distinct()) == 180 })
	r.caughtUp(b)
	if key := seen.ordered(); key != "" {
		r.Errorf("%s was handled out of order", key)
	}
	if n := biggest.Load(); n < 2 || n > 20 {
		r.Errorf("the biggest batch had %d events", n)
	}
}

func failingBatch(r *rig) {
	b := r.bus("catalog")
	r.publish(b, contracts.LaneFresh, 10, "a")
	var seen journal
	r.consume(b, bus.Subscription{
		Events: []string{contracts.ImagePushedV1}, BatchSize: 10,
		Batch: func(_ context.Context, in []event.Event) ([]event.Event, error) {
			for _, ev := range in {
				if ev.ID() == "a-4" {
					return nil, errTrouble
				}
			}
			for _, ev := range in {
				seen.add(ev.ID())
			}
			return nil, nil
		},
	})
	r.eventually("all but one", func() bool { return len(seen.distinct()) == 9 })
	r.caughtUp(b)
	if slices.Contains(seen.all(), "a-4") {
		r.Error("the failing event was handled")
	}
	letters, err := b.ListDeadLetters(r.Context(), bus.DeadLetterFilter{})
	r.must(err)
	if len(letters) != 1 || letters[0].Subject != "r.example/a:4" {
		r.Errorf("dead letters %+v, want a:4", letters)
	}
}

func drain(r *rig) {
	b := r.bus("planner")
	r.must(b.EnsureTopics(r.Context(), contracts.ImagePushedV1, contracts.TagObservedV1))
	r.publish(b, contracts.LaneFresh, 2, "a")
	inHand, goOn := make(chan struct{}), make(chan struct{})
	var seen journal
	stop := r.consume(b, bus.Subscription{Events: []string{contracts.ImagePushedV1}, Handler: func(ctx context.Context, in event.Event) ([]event.Event, error) {
		seen.add(in.ID())
		close(inHand) // a second event would panic
		<-goOn
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		return observe(ctx, in)
	}})
	<-inHand
	var stopped sync.WaitGroup
	stopped.Go(stop)
	time.AfterFunc(200*time.Millisecond, func() { close(goOn) })
	stopped.Wait()
	if got := seen.all(); !slices.Equal(got, []string{"a-0"}) {
		r.Errorf("handled %v, want a-0 alone", got)
	}
	if out := r.read(b, r.topic(b, contracts.TagObservedV1, "")); len(out) != 1 {
		r.Errorf("%d outputs, want 1", len(out))
	}
	all, err := b.Lag(r.Context())
	r.must(err)
	if n := all[r.topic(b, contracts.ImagePushedV1, "")]; n != 1 {
		r.Errorf("lag %d, want 1: what was in hand is committed and nothing more", n)
	}
}

func drainExceeded(r *rig) {
	r.cfg.Drain = 200 * time.Millisecond
	b := r.bus("planner")
	r.publish(b, contracts.LaneFresh, 1, "a")
	inHand := make(chan struct{})
	stop := r.consume(b, bus.Subscription{Events: []string{contracts.ImagePushedV1}, Handler: func(ctx context.Context, _ event.Event) ([]event.Event, error) {
		close(inHand)
		<-ctx.Done()
		return nil, bus.Permanent(ctx.Err()) // whatever it says: the time was over
	}})
	<-inHand
	stop()
	var seen journal
	again := r.bus("planner")
	r.consume(again, bus.Subscription{Events: []string{contracts.ImagePushedV1}, Handler: func(_ context.Context, in event.Event) ([]event.Event, error) {
		seen.add(in.ID())
		return nil, nil
	}})
	r.eventually("handled again", func() bool { return seen.len() == 1 })
	r.caughtUp(again)
	if letters, err := b.ListDeadLetters(r.Context(), bus.DeadLetterFilter{}); err != nil || len(letters) != 0 {
		r.Errorf("dead letters %v, %v", letters, err)
	}
}
