package catalog

import (
	"encoding/json"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/cloudevents/sdk-go/v2/event"
	"pgregory.net/rapid"

	"github.com/tidewaiter/tidewaiter/contracts"
)

// TestDeletesAndPushesInAnyOrder: registries move tags, delete and push again,
// and what planner saw of it arrives in any order and more than once. In the end
// each tag points where it was last seen, its history is the one of the times at
// which it was looked at, and an image is gone only if nothing was seen of it
// after that: an older deletion never closes what was pushed later.
func TestDeletesAndPushesInAnyOrder(t *testing.T) {
	f := newFixture(t)
	names := []string{"one", "two", "three"}
	rapid.Check(t, func(rt *rapid.T) {
		f.forget()
		type seen struct{ planned, attested, gone time.Time }
		images := map[string]*seen{}
		tags := map[string][]observation{} // oldest first
		var events []event.Event
		for range rapid.IntRange(1, 12).Draw(rt, "steps") {
			name := rapid.SampledFrom(names).Draw(rt, "image")
			im := img("a", name)
			if images[name] == nil {
				images[name] = &seen{}
			}
			switch rapid.SampledFrom([]string{"push", "attest", "tag", "untag", "delete"}).Draw(rt, "step") {
			case "push":
				events = append(events, f.planned(im, "l"))
				images[name].planned = f.now
			case "attest":
				events = append(events, f.attested(im, 1, vuln("CVE-"+name, name, "1", contracts.SeverityHigh, "2")))
				images[name].attested = f.now
			case "delete":
				events = append(events, f.event("planner", contracts.ImageGoneV1, "x", contracts.ImageGone{Image: im, Reason: "not found"}))
				images[name].gone = f.now
			case "tag":
				events = append(events, f.observed("a", "latest", im.Digest))
				tags["latest"] = append(tags["latest"], observation{f.now, im.Digest})
			case "untag":
				events = append(events, f.observed("a", "latest", ""))
				tags["latest"] = append(tags["latest"], observation{f.now, ""})
			}
		}
		all := append(slices.Clone(events), rapid.SliceOfN(rapid.SampledFrom(events), 0, 5).Draw(rt, "doubled")...)
		all = rapid.Permutation(all).Draw(rt, "order")
		for len(all) > 0 {
			n := rapid.IntRange(1, min(4, len(all))).Draw(rt, "batch")
			if _, err := f.s.Batch(t.Context(), all[:n]); err != nil {
				rt.Fatal(err)
			}
			all = all[n:]
		}

		found, err := f.s.Images(t.Context(), "", "", "", 100)
		if err != nil {
			rt.Fatal(err)
		}
		now := ""
		if o := tags["latest"]; len(o) > 0 {
			now = o[len(o)-1].digest
		}
		for _, i := range found {
			name := names[slices.IndexFunc(names, func(n string) bool { return img("a", n).String() == i.Image })]
			s := images[name]
			later := s.planned.After(s.gone) || s.attested.After(s.gone)
			if gone := i.State == StateGone; gone != (!s.gone.IsZero() && !later) {
				rt.Fatalf("%s is %s; it was deleted at %s, planned at %s, attested at %s", name, i.State, s.gone, s.planned, s.attested)
			}
			if pointed := slices.Contains(i.Tags, "latest"); pointed != (now == img("a", name).Digest) {
				rt.Fatalf("latest points at %s: %t, and was last seen at %q", name, pointed, now)
			}
		}
		history, err := f.s.TagHistory(t.Context(), "r.example/a:latest")
		if err != nil {
			rt.Fatal(err)
		}
		if got, want := fmt.Sprint(told(history)), fmt.Sprint(expected(tags["latest"])); got != want {
			rt.Fatalf("history %s, want %s", got, want)
		}
	})
}

// told is a history as "digest from until", newest first.
func told(history []contracts.TagPeriod) (out []string) {
	for _, p := range history {
		digest, until := "", "now"
		if p.Digest != nil {
			digest = *p.Digest
		}
		if p.Until != nil {
			until = p.Until.Format(time.RFC3339)
		}
		out = append(out, fmt.Sprintf("%s %s %s", digest, p.From.Format(time.RFC3339), until))
	}
	return out
}

// expected is told of observations in the order in which they were made.
func expected(observed []observation) (out []string) {
	until := "now"
	for i := len(observed) - 1; i >= 0; i-- {
		o := observed[i]
		if i > 0 && observed[i-1].digest == o.digest {
			continue // it was there already
		}
		at := o.at.UTC().Format(time.RFC3339)
		out = append(out, fmt.Sprintf("%s %s %s", o.digest, at, until))
		until = at
	}
	return out
}

func TestTagHistory(t *testing.T) {
	f := newFixture(t)
	one, two := img("a", "one"), img("a", "two")
	begin := f.now
	f.handle(
		f.observed("a", "v1", one.Digest), f.observed("a", "latest", one.Digest), f.observed("a", "latest", one.Digest),
		f.observed("a", "latest", two.Digest), f.observed("a", "v1", ""), f.observed("b", "latest", one.Digest),
	)
	get := serve(t, f, secret)
	periods := func(ref string) []contracts.TagPeriod {
		t.Helper()
		status, body := get("/v1/history?ref="+ref, "Bearer s3cret")
		var answer struct {
			Periods []contracts.TagPeriod `json:"periods"`
		}
		if err := json.Unmarshal([]byte(body), &answer); err != nil || status != 200 {
			t.Fatalf("%s: %d %s, %v", ref, status, body, err)
		}
		return answer.Periods
	}
	at := func(seconds int) string {
		return begin.Add(time.Duration(seconds) * time.Second).UTC().Format(time.RFC3339)
	}
	want := []string{
		fmt.Sprintf("%s %s now", two.Digest, at(4)), fmt.Sprintf("%s %s %s", one.Digest, at(2), at(4)),
		" " + at(5) + " now", fmt.Sprintf("%s %s %s", one.Digest, at(1), at(5)),
	}
	if got := told(periods("r.example/a")); !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	if got := told(periods("r.example/a:v1")); !slices.Equal(got, want[2:]) {
		t.Errorf("got %q, want %q", got, want[2:])
	}
	if got := periods("r.example/nowhere"); got == nil || len(got) != 0 {
		t.Errorf("got %v", got)
	}
	for _, bad := range []string{"", "a", "r.example/a@" + one.Digest, one.Digest} {
		if status, body := get("/v1/history?ref="+bad, "Bearer s3cret"); status != 400 {
			t.Errorf("%q: %d %s", bad, status, body)
		}
	}
	if status, _ := get("/v1/history?ref=r.example/a", ""); status != 401 {
		t.Errorf("without a token: %d", status)
	}
}
