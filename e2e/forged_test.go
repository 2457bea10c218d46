package e2e

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cloudevents/sdk-go/v2/event"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/bus"
	"github.com/tidewaiter/tidewaiter/libs/store"
	"github.com/tidewaiter/tidewaiter/services/matcher/policy"
	"github.com/tidewaiter/tidewaiter/services/tidewaiter/allinone"
)

// What somebody else than matcher says in image.matched of a vulnerable image does
// not make it a clean one: what does not agree with the stored report, the policy
// or what was said before is a dead letter with a reason; what the registry does
// not have is not spoken of. Nothing is attached, and what stands stays.
func TestForgedMatches(t *testing.T) {
	t.Parallel()
	s := start(t, allinone.Options{})
	p := s.push("team/shop", "1.0", story(t).Vulnerable[0])
	s.attested(p)
	s.quiet()
	before := s.referrers(p.String())
	report := s.report(p.String())
	told := s.log.about(contracts.ImageMatchedV1, p.String())
	if len(told) == 0 || report.Verdict != contracts.VerdictFail {
		t.Fatalf("%d verdicts on %s, the last is %q; want %q", len(told), p, report.Verdict, contracts.VerdictFail)
	}
	real, err := bus.Decode[contracts.ImageMatched](told[len(told)-1].Event)
	if err != nil {
		t.Fatal(err)
	}

	db, err := store.Open(t.Context(), s.Config.Database.URL)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = db.Close() }() // what was put is committed
	put := func(r contracts.Report) contracts.Blob {
		content, err := json.Marshal(r)
		if err != nil {
			t.Fatal(err)
		}
		digest, err := db.PutBlob(t.Context(), content)
		if err != nil {
			t.Fatal(err)
		}
		return contracts.Blob{Digest: digest, Size: int64(len(content))}
	}
	says := *report // "pass", whatever it found
	says.Verdict, says.Reasons = contracts.VerdictPass, nil
	clean := says // and found nothing
	clean.Findings, clean.Counts = nil, contracts.Counts{}
	hides := says // the findings, but not in its counts
	hides.Counts = contracts.Counts{}
	missing := p.Ref.Registry + "/" + p.Ref.Repository + "@" + contracts.DigestOf([]byte("never pushed"))
	gone, err := contracts.ParseImage(missing)
	if err != nil {
		t.Fatal(err)
	}
	absent := clean
	absent.Digest = gone.Digest
	absent.Verdict, absent.Reasons = policy.Default().Evaluate(&absent)

	b, err := bus.New(s.BusConfig(), "matcher", s.logger(), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = b.Close() }() // what was published is acknowledged
	forge := func(name string, change func(m *contracts.ImageMatched)) {
		m := real
		change(&m)
		ev, err := bus.NewEvent(contracts.ImageMatchedV1, m.Image.String(), m)
		if err != nil {
			t.Fatal(err)
		}
		ev.SetID("forged " + name)
		bus.Key(&ev, m.Image.Digest)
		if err := b.Publish(t.Context(), []event.Event{ev}...); err != nil {
			t.Fatal(err)
		}
	}
	later := func(m *contracts.ImageMatched) {
		m.MatchedAt = m.MatchedAt.Add(time.Millisecond) // newer than what stands
		m.Verdict, m.Reasons = contracts.VerdictPass, nil
	}
	forged := map[string]struct {
		reason string
		change func(m *contracts.ImageMatched)
	}{
		"verdict in the event":                        {`verdict is "pass" in the event`, later},
		"verdict in the report":                       {`"fail" by policy`, func(m *contracts.ImageMatched) { later(m); m.Report = put(says) }},
		"report without findings, the event's counts": {"counts otherwise", func(m *contracts.ImageMatched) { later(m); m.Report = put(clean) }},
		"report that hides findings": {"counts otherwise", func(m *contracts.ImageMatched) {
			later(m)
			m.Report, m.Counts = put(hides), hides.Counts
		}},
		"report without findings, of the same moment": {"of the same moment", func(m *contracts.ImageMatched) {
			m.Verdict, m.Reasons = contracts.VerdictPass, nil
			m.Report, m.Counts = put(clean), clean.Counts
		}},
		"report that nobody stored": {"not found", func(m *contracts.ImageMatched) {
			later(m)
			m.Report.Digest = contracts.DigestOf([]byte("never stored"))
		}},
		"another digest, the report of a real image": {"is about " + report.Digest, func(m *contracts.ImageMatched) { later(m); m.Image = gone }},
	}
	for name, f := range forged {
		forge(name, f.change)
	}
	forge("a digest that was never pushed, all else agrees", func(m *contracts.ImageMatched) {
		later(m)
		m.Image, m.Report, m.Counts, m.Verdict = gone, put(absent), absent.Counts, absent.Verdict
	})

	var letters []contracts.DeadLetter
	s.log.wait(t, func(*events) string {
		letters = s.deadLetters()
		if len(letters) < len(forged) {
			return fmt.Sprintf("%d dead letters of %d forged verdicts", len(letters), len(forged))
		}
		return ""
	})
	s.quiet()
	letters = s.deadLetters()
	if len(letters) != len(forged) {
		t.Errorf("%d dead letters, want %d", len(letters), len(forged))
	}
	for name, f := range forged {
		found := slices.ContainsFunc(letters, func(l contracts.DeadLetter) bool { return strings.Contains(l.Reason, f.reason) })
		if !found {
			t.Errorf("%s: no dead letter says %q", name, f.reason)
		}
	}
	for _, l := range letters {
		if want := "image.matched.v1.attestor.dlq"; l.Topic != want || l.Service != "attestor" {
			t.Errorf("a dead letter of %s is in %s, want %s: %s", l.Service, l.Topic, want, l.Reason)
		}
	}
	if after := s.referrers(p.String()); !slices.Equal(before, after) {
		t.Errorf("attached were %v, now %v", before, after)
	}
	if v, err := s.verify(p.String()); err != nil || len(v.Statements) == 0 || v.Statements[0].Verdict != contracts.VerdictFail {
		t.Errorf("%s is said to be %+v, %v", p, v, err)
	}
	for _, m := range s.log.named(contracts.ImageAttestedV1) {
		if m.Event.Subject() == missing {
			t.Errorf("%s, which was never pushed, is attested", missing)
		}
	}
	if attached := s.referrers(missing); len(attached) > 0 {
		t.Errorf("attached to what was never pushed: %v", attached)
	}
}
