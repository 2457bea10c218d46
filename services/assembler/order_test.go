package assembler

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"testing"

	"github.com/cloudevents/sdk-go/v2/event"
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
