package assembler

import (
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
func outcome(t *rapid.T, f *fixture, events []event.Event) (ids []string, inventories map[string]string) {
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

// fleet returns a new service whose layer reports are stored already.
func fleet(t testing.TB) *fixture {
	f := newFixture(t)
	for _, l := range []string{"base", "runtime", "own0", "own1", "own2", "own3"} {
		f.report(l)
	}
	return f
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

	var wantIDs []string
	var want map[string]string
	rapid.Check(t, func(t *rapid.T) {
		if want == nil {
			wantIDs, want = outcome(t, fleet(maker.t), events)
		}
		if len(want) != 6 {
			t.Fatalf("%d images have an inventory, want 6", len(want))
		}
		doubled := append(slices.Clone(events), rapid.SliceOfN(rapid.SampledFrom(events), 0, 6).Draw(t, "doubled")...)
		ids, inventories := outcome(t, fleet(maker.t), rapid.Permutation(doubled).Draw(t, "order"))
		if !slices.Equal(ids, wantIDs) {
			t.Fatalf("ids %q, want %q", ids, wantIDs)
		}
		if !maps.Equal(inventories, want) {
			t.Fatalf("inventories %v, want %v", inventories, want)
		}
	})
}
