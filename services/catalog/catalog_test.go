package catalog

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cloudevents/sdk-go/v2/event"
	"golang.org/x/sync/errgroup"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/bus"
	"github.com/tidewaiter/tidewaiter/libs/store"
	"github.com/tidewaiter/tidewaiter/libs/store/storetest"
)

var start = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

func dig(s string) string { return contracts.DigestOf([]byte(s)) }

func img(repository, name string) contracts.Image {
	return contracts.Image{Registry: "r.example", Repository: repository, Digest: dig(name)}
}

// outbox is a Publisher that keeps what it was given.
type outbox struct {
	events []event.Event
	down   error // returned instead
}

func (o *outbox) Publish(_ context.Context, events ...event.Event) error {
	if o.down != nil {
		return o.down
	}
	o.events = append(o.events, events...)
	return nil
}

// fixture is a service on a database of its own, and a clock for its events.
type fixture struct {
	t   testing.TB
	db  *store.DB
	s   *Service
	out *outbox
	now time.Time
	n   int
}

func newFixture(t testing.TB) *fixture {
	t.Helper()
	f := &fixture{t: t, db: storetest.Open(t), out: &outbox{}, now: start}
	f.restart()
	return f
}

func (f *fixture) restart() {
	f.t.Helper()
	s, err := New(f.t.Context(), DefaultConfig(), f.db, f.out, slog.New(slog.DiscardHandler))
	if err != nil {
		f.t.Fatal(err)
	}
	f.s = s
}

// event returns an event one second after the last.
func (f *fixture) event(service, name, subject string, data any) event.Event {
	f.t.Helper()
	ev, err := bus.NewEvent(name, subject, data)
	if err != nil {
		f.t.Fatal(err)
	}
	f.n++
	f.now = f.now.Add(time.Second)
	ev.SetID(fmt.Sprint("event-", f.n))
	ev.SetSource("/services/" + service)
	ev.SetTime(f.now)
	return ev
}

func (f *fixture) pushed(repository, tag, digest string) event.Event {
	return f.event("intake", contracts.ImagePushedV1, repository, contracts.ImagePushed{
		Source: "hub", Registry: "r.example", Repository: repository, Tag: tag, Digest: digest, Cause: "push", ReceivedAt: f.now.Add(time.Second),
	})
}

func (f *fixture) observed(repository, tag, digest string) event.Event {
	return f.event("planner", contracts.TagObservedV1, repository, contracts.TagObserved{
		Source: "hub", Registry: "r.example", Repository: repository, Tag: tag, Digest: digest, ObservedAt: f.now.Add(time.Second),
	})
}

func (f *fixture) planned(im contracts.Image, layers ...string) event.Event {
	p := contracts.ImagePlanned{Image: im, Source: "hub", Kind: contracts.KindImage, Platform: &contracts.Platform{OS: "linux", Architecture: "amd64"}}
	for _, l := range layers {
		p.Layers = append(p.Layers, contracts.PlannedLayer{Digest: dig(l)})
	}
	return f.event("planner", contracts.ImagePlannedV1, im.String(), p)
}

func (f *fixture) index(im contracts.Image, parts ...string) event.Event {
	p := contracts.ImagePlanned{Image: im, Source: "hub", Kind: contracts.KindIndex}
	for _, part := range parts {
		p.Parts = append(p.Parts, contracts.PlannedPart{Digest: dig(part)})
	}
	return f.event("planner", contracts.ImagePlannedV1, im.String(), p)
}

func (f *fixture) analyzed(layer string, reused bool) event.Event {
	return f.event("analyzer", contracts.LayerAnalyzedV1, dig(layer), contracts.LayerAnalyzed{Digest: dig(layer), Reused: reused, Packages: 7})
}

// attested stores a report with the findings and returns the verdict on it.
func (f *fixture) attested(im contracts.Image, sequence int64, findings ...contracts.Finding) event.Event {
	f.t.Helper()
	return f.verdict(im, sequence, contracts.Report{Digest: im.Digest, Kind: contracts.KindImage, Verdict: contracts.VerdictWarn, Findings: findings})
}

func (f *fixture) verdict(im contracts.Image, sequence int64, r contracts.Report) event.Event {
	f.t.Helper()
	for _, x := range r.Findings {
		switch x.Severity {
		case contracts.SeverityCritical:
			r.Counts.Critical++
		case contracts.SeverityHigh:
			r.Counts.High++
		}
	}
	content, err := json.Marshal(r)
	if err != nil {
		f.t.Fatal(err)
	}
	digest, err := f.db.PutBlob(context.Background(), content)
	if err != nil {
		f.t.Fatal(err)
	}
	return f.event("attestor", contracts.ImageAttestedV1, im.String(), contracts.ImageAttested{
		Image: im, Source: "hub", Kind: r.Kind, Report: contracts.Blob{Digest: digest, Size: int64(len(content))},
		Snapshot: contracts.SnapshotRef{Digest: dig("snapshot"), Sequence: sequence}, Verdict: r.Verdict, Counts: r.Counts,
		Signer: "key", SignedAt: f.now.Add(time.Second), ValidUntil: f.now.Add(7 * 24 * time.Hour),
	})
}

func vuln(id, pkg, version, severity string, fixed ...string) contracts.Finding {
	return contracts.Finding{
		ID: id, Severity: severity, Fixed: fixed, Status: contracts.StatusAffected,
		Package: contracts.FindingPackage{PURL: "pkg:npm/" + pkg + "@" + version, Name: pkg, Version: version, Ecosystem: "npm"},
	}
}

func (f *fixture) handle(events ...event.Event) {
	f.t.Helper()
	for _, ev := range events {
		if _, err := f.s.Handle(context.Background(), ev); err != nil {
			f.t.Fatalf("handle %s %s: %v", ev.Type(), ev.Subject(), err)
		}
	}
}

// said returns what was sent since the last call, as "finding.opened.v1
// package group r1 severity versions → fixed in (images)".
func (f *fixture) said() []string {
	f.t.Helper()
	var out []string
	for _, ev := range f.out.events {
		name := strings.TrimPrefix(ev.Type(), contracts.TypePrefix)
		if !strings.HasPrefix(name, "finding.") {
			out = append(out, name+" "+ev.Subject())
			continue
		}
		p, err := bus.Decode[contracts.Problem](ev)
		if err != nil {
			f.t.Fatal(err)
		}
		if ev.Subject() != p.Key || ev.ID() == "" || ev.Source() != "/services/catalog" {
			f.t.Errorf("event %s about %s from %s, problem %s", ev.ID(), ev.Subject(), ev.Source(), p.Key)
		}
		out = append(out, fmt.Sprintf("%s %s %s r%d %s %s → %s (%d)", name, p.Package, p.Group, p.Revision, p.Severity,
			strings.Join(p.Versions, ","), strings.Join(p.FixedIn, ","), p.ImageCount))
	}
	f.out.events = nil
	return out
}

func expect(t testing.TB, what string, got []string, want ...string) {
	t.Helper()
	slices.Sort(got)
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("%s:\n got %q\nwant %q", what, got, want)
	}
}

func TestProblemsOfARepository(t *testing.T) {
	f := newFixture(t)
	one, two := img("a", "one"), img("a", "two")
	f.handle(f.observed("a", "latest", one.Digest))
	f.handle(f.attested(one, 1, vuln("CVE-1", "lodash", "4.17.4", contracts.SeverityHigh, "4.17.11"), vuln("CVE-2", "lodash", "4.17.4", contracts.SeverityCritical, "4.17.21"),
		vuln("CVE-3", "old", "1.0.0", contracts.SeverityHigh)))
	expect(t, "first verdict", f.said(),
		"finding.opened.v1 lodash fixable r1 critical 4.17.4 → 4.17.21 (1)", "finding.opened.v1 old unfixed r1 high 1.0.0 →  (1)")

	f.handle(f.attested(one, 2, vuln("CVE-1", "lodash", "4.17.4", contracts.SeverityHigh, "4.17.11"), vuln("CVE-2", "lodash", "4.17.4", contracts.SeverityCritical, "4.17.21"),
		vuln("CVE-3", "old", "1.0.0", contracts.SeverityHigh, "1.0.1")))
	expect(t, "a fix appears", f.said(), "finding.closed.v1 old unfixed r2 high 1.0.0 →  (0)", "finding.opened.v1 old fixable r1 high 1.0.0 → 1.0.1 (1)")

	f.handle(f.observed("a", "v2", two.Digest), f.attested(two, 2, vuln("CVE-1", "lodash", "4.17.10", contracts.SeverityHigh, "4.17.11")))
	expect(t, "a second image", f.said(), "finding.changed.v1 lodash fixable r2 critical 4.17.4,4.17.10 → 4.17.11,4.17.21 (2)")

	f.handle(f.observed("a", "latest", two.Digest))
	expect(t, "the tag moves on", f.said(), "finding.changed.v1 lodash fixable r3 high 4.17.10 → 4.17.11 (1)", "finding.closed.v1 old fixable r2 high 1.0.0 → 1.0.1 (0)")

	f.handle(f.event("planner", contracts.ImageGoneV1, two.String(), contracts.ImageGone{Image: two, Reason: "not found"}))
	expect(t, "the image is deleted", f.said(), "finding.closed.v1 lodash fixable r4 high 4.17.10 → 4.17.11 (0)")

	f.handle(f.observed("a", "latest", one.Digest))
	expect(t, "the tag moves back", f.said(), "finding.opened.v1 lodash fixable r5 critical 4.17.4 → 4.17.21 (1)", "finding.opened.v1 old fixable r3 high 1.0.0 → 1.0.1 (1)")

	problems, err := f.s.Problems(t.Context(), problemOpen, "", 10)
	if err != nil || len(problems) != 2 {
		t.Fatalf("%d open problems, error %v", len(problems), err)
	}
	p := problems[slices.IndexFunc(problems, func(p contracts.Problem) bool { return p.Package == "lodash" })]
	if p.Owner != "r.example/a" || !slices.Equal(p.Vulnerabilities, []string{"CVE-1", "CVE-2"}) || !slices.Equal(p.Images, []string{one.String()}) {
		t.Errorf("got %+v", p)
	}
}

func TestOlderVerdictsChangeNothing(t *testing.T) {
	f := newFixture(t)
	im := img("a", "one")
	old := f.attested(im, 1, vuln("CVE-1", "a", "1", contracts.SeverityHigh, "2"))
	earlier := f.attested(im, 2, vuln("CVE-2", "b", "1", contracts.SeverityHigh, "2"))
	f.handle(f.attested(im, 2), old, earlier)
	expect(t, "findings", f.said())
	images, err := f.s.Images(t.Context(), "", "", "", 10)
	if err != nil || len(images) != 1 || images[0].Sequence != 2 || images[0].Counts.Total() != 0 {
		t.Errorf("images %+v, error %v", images, err)
	}
}

func TestPartsCountThroughTheirIndex(t *testing.T) {
	f := newFixture(t)
	index, part := img("a", "index"), img("a", "part")
	v := vuln("CVE-1", "a", "1.0.0", contracts.SeverityHigh, "1.0.1")
	f.handle(f.attested(part, 1, v))
	expect(t, "as long as nothing is known of the index", f.said(), "finding.opened.v1 a fixable r1 high 1.0.0 → 1.0.1 (1)")
	f.handle(f.index(index, "part"), f.attested(index, 1, v))
	f.said()
	problems, err := f.s.Problems(t.Context(), problemOpen, "", 10)
	if err != nil || len(problems) != 1 || !slices.Equal(problems[0].Images, []string{index.String()}) {
		t.Errorf("problems %+v, error %v", problems, err)
	}
	report, err := f.s.Fleet(t.Context())
	if err != nil || report.Images != 1 {
		t.Errorf("%d images in the fleet, error %v", report.Images, err)
	}
}

func TestReplayChangesNothing(t *testing.T) {
	f := newFixture(t)
	im := img("a", "one")
	events := []event.Event{
		f.pushed("a", "latest", ""), f.observed("a", "latest", im.Digest), f.planned(im, "l0"), f.analyzed("l0", false),
		f.attested(im, 1, vuln("CVE-1", "a", "1.0.0", contracts.SeverityHigh, "1.0.1")), f.attested(im, 2),
	}
	f.handle(events...)
	expect(t, "first", f.said(), "finding.opened.v1 a fixable r1 high 1.0.0 → 1.0.1 (1)", "finding.closed.v1 a fixable r2 high 1.0.0 → 1.0.1 (0)")
	f.restart()
	f.handle(events...)
	expect(t, "again", f.said())
	if err := f.s.CheckDeadlines(t.Context(), f.now.Add(time.Hour)); err != nil {
		t.Fatal(err)
	}
	expect(t, "an hour later", f.said())
}

func TestNothingIsLostWhenKafkaIsAway(t *testing.T) {
	f := newFixture(t)
	f.out.down = errors.New("no broker")
	ev := f.attested(img("a", "one"), 1, vuln("CVE-1", "a", "1.0.0", contracts.SeverityHigh, "1.0.1"))
	_, err := f.s.Handle(t.Context(), ev)
	if outcome, _ := bus.Classify(err); outcome != bus.OutcomeUnavailable {
		t.Fatalf("error %v is no outage", err)
	}
	f.out.down = nil
	f.restart()
	f.handle(ev)
	expect(t, "after the outage", f.said(), "finding.opened.v1 a fixable r1 high 1.0.0 → 1.0.1 (1)")
}

func TestVerdictWithoutReportIsNotTakenOver(t *testing.T) {
	f := newFixture(t)
	ev := f.attested(img("a", "one"), 1, vuln("CVE-1", "a", "1.0.0", contracts.SeverityHigh))
	if _, err := f.db.ExecContext(t.Context(), `DELETE FROM blobs`); err != nil {
		t.Fatal(err)
	}
	f.handle(ev)
	expect(t, "findings", f.said())
}

func TestFixedIn(t *testing.T) {
	of := func(version string, fixed ...[]string) []finding {
		var out []finding
		for _, f := range fixed {
			out = append(out, finding{Version: version, Fixed: f})
		}
		return out
	}
	tests := []struct {
		name      string
		ecosystem string
		findings  []finding
		want      []string
	}{
		{"one fix", "npm", of("1.0.0", []string{"1.0.1"}), []string{"1.0.1"}},
		{"the highest of several", "npm", of("4.17.4", []string{"4.17.5"}, []string{"4.17.21"}, []string{"4.17.11"}), []string{"4.17.21"}},
		{"the own branch", "Maven", of("2.14.1", []string{"2.3.1", "2.12.2", "2.15.0"}, []string{"2.3.1", "2.12.2", "2.16.0"}), []string{"2.16.0"}},
		{"a fix on the own branch is not enough", "PyPI", of("1.0", []string{"2.0"}, []string{"1.2", "2.1"}), []string{"2.1"}},
		{"a branch each", "PyPI", append(of("2.2", []string{"2.2.28", "3.2.13"}), of("3.2", []string{"2.2.28", "3.2.13"})...), []string{"2.2.28", "3.2.13"}},
		{"Debian's order", "Debian:12", of("1.0~rc1", []string{"1.0"}, []string{"1.0-1+deb12u2"}, []string{"1.0-1+deb12u10"}), []string{"1.0-1+deb12u10"}},
		{"none can be mended", "npm", of("1.0.0", nil), nil},
		{"an order that is unknown", "Nowhere", of("a", []string{"b"}), []string{"b"}},
	}
	for _, tt := range tests {
		if got := fixedIn(tt.ecosystem, tt.findings); !slices.Equal(got, tt.want) {
			t.Errorf("%s: got %q, want %q", tt.name, got, tt.want)
		}
	}
}

func TestDeadlines(t *testing.T) {
	f := newFixture(t)
	im, done := img("a", "stuck"), img("a", "done")
	check := func(after time.Duration) []string {
		t.Helper()
		if err := f.s.CheckDeadlines(t.Context(), start.Add(after)); err != nil {
			t.Fatal(err)
		}
		return f.said()
	}
	f.handle(f.pushed("a", "v1", im.Digest), f.planned(im, "l0"), f.pushed("a", "v2", done.Digest), f.attested(done, 1), f.pushed("a", "never", ""))
	expect(t, "early", check(time.Minute))
	f.out.down = errors.New("no broker")
	if err := f.s.CheckDeadlines(t.Context(), start.Add(20*time.Minute)); err == nil {
		t.Error("a broker that is away was not noticed")
	}
	f.out.down = nil
	f.restart()
	if err := f.s.CheckDeadlines(t.Context(), start.Add(21*time.Minute)); err != nil {
		t.Fatal(err)
	}
	d, err := bus.Decode[contracts.ImagePushed](f.out.events[0])
	if err != nil || d.Source != "hub" || d.Cause != "overdue" || d.Digest != im.Digest || d.Tag != "v1" || f.out.events[0].Extensions()[contracts.ExtLane] != contracts.LaneBulk {
		t.Errorf("pushed again: %+v, error %v", d, err)
	}
	again := slices.Clone(f.out.events)
	expect(t, "overdue, sent after the outage", f.said(), "image.pushed.v1 "+im.String(), "image.pushed.v1 r.example/a:never")
	f.handle(again...)
	expect(t, "our own reminder starts nothing", check(22*time.Minute))
	f.handle(f.observed("a", "never", ""))
	expect(t, "overdue again, but the tag is known to be gone", check(90*time.Minute), "image.pushed.v1 "+im.String())
	expect(t, "not yet", check(7*time.Hour))
	expect(t, "given up", check(8*time.Hour), "image.failed.v1 "+im.String())
	expect(t, "for good", check(100*time.Hour))

	report, err := f.s.Fleet(t.Context())
	if err != nil || report.Unfinished != 1 {
		t.Errorf("%d unfinished, error %v; want the stuck one until its image.failed arrives", report.Unfinished, err)
	}
}

func TestFailedTagEndsItsDeadline(t *testing.T) {
	f := newFixture(t)
	f.handle(f.pushed("a", "v1", ""), f.event("planner", contracts.ImageFailedV1, "x", contracts.ImageFailed{Registry: "r.example", Repository: "a", Tag: "v1", Stage: "planner", Message: "unauthorized"}))
	if err := f.s.CheckDeadlines(t.Context(), start.Add(time.Hour)); err != nil {
		t.Fatal(err)
	}
	expect(t, "pushed again", f.said())
}

func TestFleet(t *testing.T) {
	f := newFixture(t)
	days := func(n int) *int { return &n }
	redis := func(version string, outdated bool, behind *int) contracts.Lag {
		return contracts.Lag{Product: "redis", Version: version, Latest: "7.4.1", Outdated: outdated, EOL: version == "2.8.19", BehindDays: behind}
	}
	fail := contracts.Report{Verdict: contracts.VerdictFail, Kind: contracts.KindImage, Lags: []contracts.Lag{redis("2.8.19", true, days(3000))}, Findings: []contracts.Finding{vuln("CVE-1", "a", "1", contracts.SeverityCritical)}}
	pass := contracts.Report{Verdict: contracts.VerdictPass, Kind: contracts.KindImage, Lags: []contracts.Lag{redis("7.4.1", false, days(0))}}
	old := contracts.Report{Verdict: contracts.VerdictWarn, Kind: contracts.KindImage, Lags: []contracts.Lag{redis("6.0.0", true, nil)}}
	f.handle(f.verdict(img("a", "one"), 1, fail), f.verdict(img("b", "two"), 1, pass), f.verdict(img("c", "old"), 1, old), f.attested(img("d", "plain"), 1))
	f.handle(f.observed("c", "latest", dig("old")), f.observed("c", "latest", dig("newer")), f.planned(img("c", "newer")))
	got, err := f.s.Fleet(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	third, half := 1.0/3, 0.5
	want := contracts.FleetReport{
		Images: 3, Vulnerable: 1, ShareVuln: &third, Outdated: 1, WithServers: 2, ShareOutdated: &half,
		Servers: []contracts.ServerLag{{
			Product: "redis", Images: 2, Outdated: 1, EOL: 1, Oldest: "2.8.19", Latest: "7.4.1", WorstDays: days(3000), Versions: []string{"2.8.19", "7.4.1"},
		}},
		Verdicts: contracts.VerdictCounts{Pass: 1, Warn: 1, Fail: 1}, Counts: contracts.Counts{Critical: 1}, Open: 1, Unfinished: 1,
	}
	g, _ := json.Marshal(got)
	w, _ := json.Marshal(want)
	if string(g) != string(w) {
		t.Errorf("got  %s\nwant %s", g, w)
	}
	empty, err := newFixture(t).s.Fleet(t.Context())
	if err != nil || empty.ShareVuln != nil || empty.ShareOutdated != nil || empty.Servers == nil {
		t.Errorf("an empty fleet: %+v, error %v", empty, err)
	}
}

func TestCleanUpKeepsWhatIsUsed(t *testing.T) {
	f := newFixture(t)
	kept, gone := f.attested(img("a", "one"), 1), f.attested(img("a", "two"), 1, vuln("CVE-1", "a", "1", contracts.SeverityHigh))
	f.handle(kept, gone, f.event("planner", contracts.ImageGoneV1, "x", contracts.ImageGone{Image: img("a", "two"), Reason: "not found"}))
	if _, err := f.db.ExecContext(t.Context(), `UPDATE blobs SET touched_at = 0`); err != nil {
		t.Fatal(err)
	}
	if err := f.s.CleanUp(t.Context(), start.Add(365*24*time.Hour)); err != nil {
		t.Fatal(err)
	}
	for ev, want := range map[*event.Event]bool{&kept: true, &gone: false} {
		d, err := bus.Decode[contracts.ImageAttested](*ev)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := f.db.HasBlob(t.Context(), d.Report.Digest); err != nil || got != want {
			t.Errorf("report of %s is stored: %v, want %v (error %v)", d.Image, got, want, err)
		}
	}
	entries, err := f.s.Timeline(t.Context(), img("a", "one").String())
	if err != nil || len(entries) != 0 {
		t.Errorf("%d entries are left after a year, error %v", len(entries), err)
	}
}

func TestConfigValidate(t *testing.T) {
	if err := DefaultConfig().Validate(); err != nil {
		t.Error(err)
	}
	for name, change := range map[string]func(c *Config){
		"an API without a token": func(c *Config) { c.Listen = "127.0.0.1:0" },
		"no deadlines":           func(c *Config) { c.Deadlines = nil },
		"a deadline of nothing":  func(c *Config) { c.Deadlines = []time.Duration{0} },
		"no tick":                func(c *Config) { c.Tick = 0 },
	} {
		c := DefaultConfig()
		change(&c)
		if err := c.Validate(); err == nil {
			t.Errorf("%s was accepted", name)
		}
	}
}

func TestEventsThatAreNotUnderstood(t *testing.T) {
	f := newFixture(t)
	for _, name := range append(Consumes(), contracts.ImageRematchV1) {
		_, err := f.s.Handle(t.Context(), f.event("x", name, "x", "garbage"))
		if outcome, _ := bus.Classify(err); outcome != bus.OutcomePermanent {
			t.Errorf("%s with garbage: %v", name, err)
		}
	}
}

func TestPartitionsAreRecordedAtOnce(t *testing.T) {
	f := newFixture(t)
	var group errgroup.Group
	group.SetLimit(6)
	for i := range 12 {
		im := img("a", fmt.Sprint("image", i))
		events := []event.Event{f.planned(im, "base"), f.attested(im, 1, vuln("CVE-1", "a", "1.0.0", contracts.SeverityHigh, "1.0.1"))}
		group.Go(func() error {
			_, err := f.s.Batch(t.Context(), events)
			return err
		})
	}
	if err := group.Wait(); err != nil {
		t.Fatal(err)
	}
	problems, err := f.s.Problems(t.Context(), problemOpen, "", 10)
	if err != nil || len(problems) != 1 || problems[0].ImageCount != 12 || problems[0].Revision != 12 {
		t.Errorf("problems %+v, error %v", problems, err)
	}
	last := int64(0)
	for _, ev := range f.out.events {
		p, err := bus.Decode[contracts.Problem](ev)
		if err != nil {
			t.Fatal(err)
		}
		if p.Revision != last+1 {
			t.Errorf("revision %d was sent after %d", p.Revision, last)
		}
		last = p.Revision
	}
}

func BenchmarkVerdicts(b *testing.B) {
	f := newFixture(b)
	var findings []contracts.Finding
	for i := range 200 {
		findings = append(findings, vuln(fmt.Sprint("CVE-", i), fmt.Sprint("pkg", i/3), "1.0.0", contracts.SeverityHigh, "1.0.1"))
	}
	var events []event.Event
	for i := range 2000 {
		im := img(fmt.Sprint("app", i), fmt.Sprint("image", i))
		events = append(events, f.planned(im, "base", "own"), f.attested(im, 1, findings...))
	}
	b.ResetTimer()
	n := 0
	for b.Loop() && n < len(events) {
		if _, err := f.s.Batch(b.Context(), events[n:n+batchSize]); err != nil {
			b.Fatal(err)
		}
		n += batchSize
	}
	b.ReportMetric(float64(n/2)/b.Elapsed().Seconds(), "images/s")
}

// TestProblemsCloseOnEvidence: a problem is closed by a scan that saw as much as
// the one that found it, not by one that is under way, failed or saw less.
func TestProblemsCloseOnEvidence(t *testing.T) {
	v := vuln("CVE-1", "lodash", "4.17.4", contracts.SeverityHigh, "4.17.11")
	const opened = "finding.opened.v1 lodash fixable r1 high 4.17.4 → 4.17.11 (1)"
	const closed = "finding.closed.v1 lodash fixable r2 high 4.17.4 → 4.17.11 (0)"
	old, next := img("a", "old"), img("a", "next")
	archive := contracts.Gap{Layer: dig("layer 1"), Path: "srv/app.jar", Reason: "limit: nested too deep"}
	sameArchive, other := archive, contracts.Gap{Layer: dig("layer 3"), Path: "srv/other.jar", Reason: "limit: nested too deep"}
	sameArchive.Layer = dig("layer 2")
	report := func(im contracts.Image, gaps []contracts.Gap, findings ...contracts.Finding) contracts.Report {
		return contracts.Report{Digest: im.Digest, Kind: contracts.KindImage, Verdict: contracts.VerdictWarn, Gaps: gaps, Findings: findings}
	}
	begin := func(t *testing.T, gaps ...contracts.Gap) *fixture {
		f := newFixture(t)
		f.handle(f.observed("a", "latest", old.Digest), f.verdict(old, 1, report(old, gaps, v)))
		expect(t, "found", f.said(), opened)
		f.handle(f.observed("a", "latest", next.Digest))
		expect(t, "a new image, not looked at yet", f.said())
		f.handle(f.planned(next, "l"))
		expect(t, "planned", f.said())
		return f
	}
	t.Run("a complete scan", func(t *testing.T) {
		f := begin(t)
		f.handle(f.attested(next, 1))
		expect(t, "not there", f.said(), closed)
	})
	t.Run("still there", func(t *testing.T) {
		f := begin(t)
		f.handle(f.attested(next, 1, v))
		expect(t, "in the next image", f.said(), "finding.changed.v1 lodash fixable r2 high 4.17.4 → 4.17.11 (1)")
	})
	t.Run("a scan that saw less", func(t *testing.T) {
		f := begin(t)
		f.handle(f.verdict(next, 1, report(next, []contracts.Gap{archive})))
		expect(t, "with a gap", f.said())
		f.handle(f.verdict(next, 1, report(next, nil)))
		expect(t, "without", f.said(), closed)
	})
	t.Run("a gap that was there before", func(t *testing.T) {
		f := begin(t, archive)
		f.handle(f.verdict(next, 1, report(next, []contracts.Gap{sameArchive, other})))
		expect(t, "and another one", f.said())
		f.handle(f.verdict(next, 1, report(next, []contracts.Gap{sameArchive})))
		expect(t, "the same one", f.said(), closed)
	})
	t.Run("a gap that came while it was found", func(t *testing.T) {
		f := begin(t)
		f.handle(f.verdict(next, 1, report(next, []contracts.Gap{archive}, v)))
		f.said()
		f.handle(f.verdict(next, 1, report(next, []contracts.Gap{archive})))
		expect(t, "the same one", f.said(), strings.Replace(closed, "r2", "r3", 1))
	})
	t.Run("a gap of another image", func(t *testing.T) {
		f := newFixture(t)
		f.handle(f.observed("a", "1", old.Digest), f.verdict(old, 1, report(old, nil, v)),
			f.observed("a", "2", next.Digest), f.verdict(next, 1, report(next, []contracts.Gap{archive})))
		f.said()
		f.handle(f.observed("a", "1", ""))
		expect(t, "which may hide it", f.said())
	})
	t.Run("a scan that failed", func(t *testing.T) {
		f := begin(t)
		f.handle(f.event("analyzer", contracts.ImageFailedV1, next.String(), contracts.ImageFailed{
			Registry: next.Registry, Repository: next.Repository, Digest: next.Digest, Stage: "analyzer",
		}), f.observed("a", "other", ""))
		expect(t, "failed", f.said())
		f.handle(f.observed("a", "latest", ""))
		expect(t, "the tag is gone", f.said(), closed)
	})
	t.Run("a tag of no image", func(t *testing.T) {
		f := begin(t)
		f.handle(f.event("planner", contracts.ImageUnsupportedV1, next.String(), contracts.ImageUnsupported{Image: next, Reason: "helm-chart"}))
		expect(t, "unsupported", f.said(), closed)
	})
}
