package assembler

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/cloudevents/sdk-go/v2/event"
	"golang.org/x/sync/errgroup"
	"pgregory.net/rapid"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/bus"
)

// outcome is what a run of the service leads to: which events it sent, and the
// last inventory of each image.
func outcome(t rapid.TB, f *fixture, events []event.Event) (ids []string, inventories map[string]string) {
	seen := map[string]bool{}
	inventories = map[string]string{}
	for _, ev := range events {
		out, err := f.s.Handle(f.t.Context(), ev)
		if err != nil {
			t.Fatalf("handle %s %s: %v", ev.Type(), ev.Subject(), err)
		}
		for _, o := range out {
			d, err := bus.Decode[contracts.ImageAssembled](o)
			if err != nil {
				t.Fatal(err)
			}
			seen[o.ID()] = true
			inventories[o.Subject()] = d.Inventory.Digest
		}
	}
	return slices.Sorted(maps.Keys(seen)), inventories
}

// forget empties the assembler's tables; blobs stay.
func (f *fixture) forget() {
	f.t.Helper()
	for _, table := range []string{"plans", "plan_layers", "plan_parts", "layers", "failures", "asks", "ended", "inventories"} {
		if _, err := f.db.ExecContext(context.Background(), "DELETE FROM assembler_"+table); err != nil {
			f.t.Fatal(err)
		}
	}
	if _, err := f.db.ExecContext(context.Background(), "DELETE FROM outbox"); err != nil {
		f.t.Fatal(err)
	}
}

// TestAnyOrderGivesTheSameInventories plays the events of a small fleet (images
// in two repositories that share layers, an index above two of them, an index
// with a part that is unsupported) in a random order, with any of them doubled.
func TestAnyOrderGivesTheSameInventories(t *testing.T) {
	maker := newFixture(t)
	events := []event.Event{
		maker.planned(indexPlan(img("a", "index"), "i0", "i1")),
		maker.planned(indexPlan(img("b", "broken"), "i2", "sig")),
		maker.event(contracts.ImageUnsupportedV1, "", contracts.ImageUnsupported{Image: img("b", "sig"), Reason: "referrer"}),
	}
	for i := range 4 {
		repository := []string{"a", "b"}[i/2]
		own := fmt.Sprint("own", i)
		events = append(events, maker.planned(plan(img(repository, fmt.Sprint("i", i)), "base", "runtime", own)), maker.analyzed(own))
	}
	events = append(events, maker.analyzed("base"), maker.analyzed("runtime"), maker.analyzed("base"))

	wantIDs, want := outcome(t, maker, events)
	if len(want) != 6 {
		t.Fatalf("%d images have an inventory, want 6", len(want))
	}
	rapid.Check(t, func(t *rapid.T) {
		maker.forget()
		doubled := append(slices.Clone(events), rapid.SliceOfN(rapid.SampledFrom(events), 0, 6).Draw(t, "doubled")...)
		ids, inventories := outcome(t, maker, rapid.Permutation(doubled).Draw(t, "order"))
		if !slices.Equal(ids, wantIDs) {
			t.Fatalf("ids %q, want %q", ids, wantIDs)
		}
		if !maps.Equal(inventories, want) {
			t.Fatalf("inventories %v, want %v", inventories, want)
		}
	})
}

// TestPartitionsAreHandledAtOnce plays the fleet's events from several
// goroutines, as the partitions of a topic are.
func TestPartitionsAreHandledAtOnce(t *testing.T) {
	f := newFixture(t)
	var events []event.Event
	for i := range 12 {
		own := fmt.Sprint("own", i)
		events = append(events, f.planned(plan(img(fmt.Sprint("app", i), own), "base", own)), f.analyzed(own), f.analyzed("base"))
	}
	var mu sync.Mutex
	seen := map[string]bool{}
	var group errgroup.Group
	group.SetLimit(6)
	for _, ev := range events {
		group.Go(func() error {
			out, err := f.s.Handle(t.Context(), ev)
			mu.Lock()
			defer mu.Unlock()
			for _, o := range out {
				seen[o.Subject()] = true
			}
			return err
		})
	}
	if err := group.Wait(); err != nil {
		t.Fatal(err)
	}
	if len(seen) != 12 {
		t.Errorf("%d images are assembled, want 12", len(seen))
	}
}

// TestSuccessOutlivesFailures plays failures of layers, through the image's own
// repository and another's, and their analysis in a random order: the last
// inventory has everything.
func TestSuccessOutlivesFailures(t *testing.T) {
	f := newFixture(t)
	a, b := img("a", "ia"), img("b", "ib")
	events := []event.Event{
		f.planned(plan(a, "l0", "l1")), f.planned(plan(b, "l1")), f.planned(indexPlan(img("b", "index"), "ib")),
		f.failed("l1", a, 0, "unavailable"), f.failed("l1", b, 0, "not-found"), f.failed("l0", a, 0, "not-found"),
		f.event(contracts.ImageFailedV1, "", contracts.ImageFailed{Registry: b.Registry, Repository: b.Repository, Digest: b.Digest, Stage: "analyzer"}),
		f.analyzed("l0"), f.analyzed("l1"),
	}
	rapid.Check(t, func(t *rapid.T) {
		f.forget()
		last := map[string]string{}
		for _, ev := range rapid.Permutation(events).Draw(t, "order") {
			out, err := f.s.Handle(f.t.Context(), ev)
			if err != nil {
				t.Fatal(err)
			}
			for i, said := range said(f.t, out) {
				if strings.HasPrefix(said, "assembled") {
					last[out[i].Subject()] = said
				}
			}
		}
		want := map[string]string{
			a.String(): "assembled a image 2 0", b.String(): "assembled b image 1 0", img("b", "index").String(): "assembled b index 1 0",
		}
		if !maps.Equal(last, want) {
			t.Fatalf("got %v, want %v", last, want)
		}
	})
}
