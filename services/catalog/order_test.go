package catalog

import (
	"context"
	"encoding/json"
	"slices"
	"testing"
	"time"

	"github.com/cloudevents/sdk-go/v2/event"
	"pgregory.net/rapid"

	"github.com/tidewaiter/tidewaiter/contracts"
)

// knowledge is what the catalog holds in the end: images, problems (without
// revision and times, which tell how it came to be) and the fleet's figures.
func knowledge(t rapid.TB, f *fixture) string {
	images, err := f.s.Images(f.t.Context(), "", "", "", 100)
	if err != nil {
		t.Fatal(err)
	}
	// A problem that in this order was never open does not exist; one that was is closed.
	problems, err := f.s.Problems(f.t.Context(), problemOpen, "", 100)
	if err != nil {
		t.Fatal(err)
	}
	for i := range problems {
		problems[i].Revision, problems[i].OpenedAt, problems[i].ChangedAt = 0, time.Time{}, time.Time{}
	}
	fleet, err := f.s.Fleet(f.t.Context())
	if err != nil {
		t.Fatal(err)
	}
	encoded, err := json.MarshalIndent([]any{images, problems, fleet}, "", " ")
	if err != nil {
		t.Fatal(err)
	}
	return string(encoded)
}

// TestAnyOrderGivesTheSameKnowledge plays the story of a small fleet (a tag
// that moves, verdicts that are overtaken, an index with its part, a deleted
// image, one that fails) in a random order and random batches, with any of the
// events doubled.
func TestAnyOrderGivesTheSameKnowledge(t *testing.T) {
	f, events := story(t)
	f.handle(events...)
	want := knowledge(t, f)
	rapid.Check(t, func(rt *rapid.T) {
		f.forget()
		all := append(slices.Clone(events), rapid.SliceOfN(rapid.SampledFrom(events), 0, 8).Draw(rt, "doubled")...)
		all = rapid.Permutation(all).Draw(rt, "order")
		for len(all) > 0 {
			n := rapid.IntRange(1, min(6, len(all))).Draw(rt, "batch")
			if _, err := f.s.Batch(t.Context(), all[:n]); err != nil {
				rt.Fatal(err)
			}
			all = all[n:]
		}
		if got := knowledge(rt, f); got != want {
			rt.Fatalf("got %s\nwant %s", got, want)
		}
		f.said()
		if _, err := f.s.Batch(t.Context(), events); err != nil {
			rt.Fatal(err)
		}
		if len(f.out.events) != 0 {
			rt.Fatalf("a replay sent %d events", len(f.out.events))
		}
	})
}

// forget empties the catalog's tables; blobs stay.
func (f *fixture) forget() {
	f.t.Helper()
	for _, table := range []string{"timeline", "images", "tags", "tag_history", "layers", "parts", "reports", "problems", "deadlines", "pending"} {
		if _, err := f.db.ExecContext(context.Background(), "DELETE FROM catalog_"+table); err != nil {
			f.t.Fatal(err)
		}
	}
}

func story(t *testing.T) (*fixture, []event.Event) {
	f := newFixture(t)
	one, two, index, part, deleted, broken := img("a", "one"), img("a", "two"), img("b", "index"), img("b", "part"), img("b", "deleted"), img("b", "broken")
	lodash := vuln("CVE-1", "lodash", "4.17.4", contracts.SeverityHigh, "4.17.11")
	old := vuln("CVE-2", "old", "1.0.0", contracts.SeverityCritical)
	return f, []event.Event{
		f.pushed("a", "latest", ""), f.observed("a", "latest", one.Digest), f.planned(one, "base", "l1"), f.analyzed("base", false), f.analyzed("l1", false),
		f.attested(one, 1, lodash, old),
		f.pushed("a", "latest", two.Digest), f.observed("a", "latest", two.Digest), f.planned(two, "base", "l2"), f.analyzed("base", true),
		f.attested(two, 1, lodash, old), f.attested(two, 2, lodash), f.attested(one, 2, old),
		f.index(index, "part"), f.planned(part, "base"), f.attested(part, 2, lodash), f.attested(index, 2, lodash, old), f.attested(index, 2, lodash),
		f.planned(deleted, "base"), f.attested(deleted, 2, old), f.event("planner", contracts.ImageGoneV1, "x", contracts.ImageGone{Image: deleted, Reason: "not found"}),
		f.planned(broken, "l3"), f.event("planner", contracts.ImageFailedV1, "x", contracts.ImageFailed{Registry: "r.example", Repository: "b", Digest: broken.Digest, Stage: "analyzer"}),
		f.event("planner", contracts.ImageUnsupportedV1, "x", contracts.ImageUnsupported{Image: img("b", "chart"), Source: "hub", Reason: "helm-chart"}),
	}
}
