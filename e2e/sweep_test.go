package e2e

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"net/url"
	"slices"
	"testing"
	"time"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/bus"
	"github.com/tidewaiter/tidewaiter/libs/registry"
	"github.com/tidewaiter/tidewaiter/libs/run"
	"github.com/tidewaiter/tidewaiter/services/catalog"
	"github.com/tidewaiter/tidewaiter/services/sweeper"
	"github.com/tidewaiter/tidewaiter/services/tidewaiter/allinone"
	"github.com/tidewaiter/tidewaiter/services/tidewaiter/sample"
)

// swept is a pipeline whose embedded registry is swept when it is asked for.
func swept(t *testing.T) *system {
	t.Helper()
	cfg, err := run.Parse("", []byte(`
sources:
  embedded:
    sweep: {api: distribution, every: 24h, grace: 1ms, rate: 1000}
sweeper: {tick: 50ms}
`), noEnv)
	if err != nil {
		t.Fatal(err)
	}
	s := start(t, allinone.Options{Config: cfg})
	s.sweep(false) // after the one that a source begins with
	return s
}

// sweep asks for a sweep of the embedded registry, waits for its end and returns it.
func (s *system) sweep(dryRun bool) contracts.Sweep {
	s.t.Helper()
	return s.sweepOf(allinone.Source, dryRun)
}

// sweepOf is sweep for a source.
func (s *system) sweepOf(source string, dryRun bool) contracts.Sweep {
	s.t.Helper()
	headers := map[string]string{"Authorization": "Bearer " + s.Token}
	path := s.Sweeper + "/v1/sweeps/" + source
	var asked struct {
		After time.Time `json:"after"`
	}
	request := path
	if dryRun {
		request += "?dryRun=true"
	}
	s.ask("POST", request, headers, 202, &asked)
	var last *contracts.Sweep
	s.log.wait(s.t, func(*events) string {
		var now sweeper.SourceSweeps
		s.ask("GET", path, headers, 200, &now)
		if now.Last == nil || now.Last.State == contracts.SweepRunning || now.Last.DryRun != dryRun || !now.Last.StartedAt.After(asked.After) {
			return "the sweep is not finished"
		}
		last = now.Last
		return ""
	})
	return *last
}

// A push whose webhook never came is found and attested.
func TestSweepFindsWhatIntakeMissed(t *testing.T) {
	t.Parallel()
	s := swept(t)
	if err := s.StopService("intake"); err != nil {
		t.Fatal(err)
	}
	p := s.push("team/missed", "1.0", story(t).Clean...)
	found := s.sweep(false)
	s.attested(p)
	if found.State != contracts.SweepComplete || found.Figures.Changed != 1 {
		t.Errorf("%+v", found)
	}
	pushes := s.log.about(contracts.ImagePushedV1, s.Registry.Host+"/team/missed:1.0@"+p.Ref.Digest)
	if len(pushes) == 0 {
		t.Fatal("nothing was pushed")
	}
	d, err := bus.Decode[contracts.ImagePushed](pushes[0].Event)
	if err != nil || d.Cause != contracts.CauseSweep || d.Source != allinone.Source {
		t.Errorf("%+v, %v", d, err)
	}
	if lane, _ := pushes[0].Event.Extensions()[contracts.ExtLane].(string); lane != contracts.LaneBulk {
		t.Errorf("it went in the lane %q", lane)
	}
}

func (s *system) ask(method, url string, headers map[string]string, want int, into any) {
	s.t.Helper()
	status, body := s.call(method, url, headers, nil)
	if status != want {
		s.t.Fatalf("%s %s: %d %s", method, url, status, body)
	}
	if err := json.Unmarshal(body, into); err != nil {
		s.t.Fatal(err)
	}
}

// recorded waits until catalog knows all images of pushes as attested.
func (s *system) recorded(pushed ...sample.Pushed) {
	s.t.Helper()
	s.log.wait(s.t, func(*events) string {
		for _, p := range pushed {
			for _, image := range images(p) {
				var answer struct{ Images []catalog.ImageEntry }
				s.catalog("/v1/images?ref="+url.QueryEscape(image), &answer)
				if len(answer.Images) != 1 || answer.Images[0].State != catalog.StateAttested {
					return image + " is not recorded as attested"
				}
			}
		}
		return ""
	})
}

// A push is planned alike whether a webhook told of it or a sweep found it.
func TestWebhookAndSweepPlanTheSame(t *testing.T) {
	t.Parallel()
	s := swept(t)
	if err := s.StopService("intake"); err != nil {
		t.Fatal(err)
	}
	p := s.push("team/shop", "1.0", story(t).Vulnerable...)
	s.sweep(false)
	s.attested(p)
	// the registry has kept its notifications, and sends them now
	if err := s.StartService("intake"); err != nil {
		t.Fatal(err)
	}
	s.log.wait(t, func(l *events) string {
		for _, image := range images(p) {
			byLane := map[string][]byte{}
			for _, m := range l.about(contracts.ImagePlannedV1, image) {
				lane, _ := m.Event.Extensions()[contracts.ExtLane].(string)
				byLane[lane] = m.Event.Data()
			}
			if byLane[contracts.LaneBulk] == nil || byLane[contracts.LaneFresh] == nil {
				return image + " was not planned by both"
			}
			if image == p.String() && !bytes.Equal(byLane[contracts.LaneBulk], byLane[contracts.LaneFresh]) {
				t.Errorf("%s\nby sweep   %s\nby webhook %s", image, byLane[contracts.LaneBulk], byLane[contracts.LaneFresh])
			}
		}
		return ""
	})
	s.quiet()
	for _, image := range images(p) {
		var first []byte
		for _, m := range s.log.about(contracts.ImagePlannedV1, image) {
			if first == nil {
				first = m.Event.Data()
			}
			// A webhook about a part alone does not name its platform's index; all else is equal.
			if !bytes.Equal(first, m.Event.Data()) {
				t.Errorf("%s\n%s\n%s", image, first, m.Event.Data())
			}
		}
	}
	for layer, n := range s.log.analyses(t) {
		if n != 1 {
			t.Errorf("layer %s was analysed %d times", layer, n)
		}
	}
}

// Statements that were removed from the registry are attached again, the same
// ones, of the index and of its parts; nothing is analysed for that.
func TestRemovedStatementsAreAttestedAgain(t *testing.T) {
	t.Parallel()
	s := swept(t)
	p := s.push("team/shop", "1.0", story(t).Vulnerable...)
	s.attested(p)
	s.recorded(p)
	s.quiet()
	analyses := s.log.analyses(t)
	before := map[string][]string{}
	for _, image := range images(p) {
		before[image] = s.referrers(image)
		i, err := contracts.ParseImage(image)
		if err != nil {
			t.Fatal(err)
		}
		at := registry.Ref{Registry: i.Registry, Repository: i.Repository, Digest: i.Digest}
		subject, err := s.client.Resolve(t.Context(), at)
		if err != nil {
			t.Fatal(err)
		}
		list, err := s.client.Referrers(t.Context(), at, contracts.MediaTypeBundle)
		if err != nil || len(list) != 2 {
			t.Fatalf("%d statements, %v", len(list), err)
		}
		for _, d := range list {
			if err := s.client.Detach(t.Context(), i.Registry, i.Repository, subject, d); err != nil {
				t.Fatal(err)
			}
		}
		if v, err := s.verify(image); err == nil && v.Verified {
			t.Fatalf("%s is verified without statements", image)
		}
	}
	dry := s.sweep(true)
	if dry.Figures.Unstated != len(before) || dry.Figures.Missed != 0 {
		t.Errorf("dry run: %+v", dry.Figures)
	}
	if n := len(s.log.named(contracts.ImagePushedV1)); n == 0 {
		t.Error("no pushes were seen at all")
	}
	for _, m := range s.log.named(contracts.ImagePushedV1) {
		if d, err := bus.Decode[contracts.ImagePushed](m.Event); err != nil || d.Cause != contracts.CausePush {
			t.Errorf("the dry run sent %+v, %v", d, err)
		}
	}
	found := s.sweep(false)
	if found.Figures.Checked != len(before) || found.Figures.Unstated != len(before) {
		t.Errorf("%+v", found.Figures)
	}
	s.log.wait(t, func(*events) string {
		for image, want := range before {
			if got := s.referrers(image); !slices.Equal(got, want) {
				return fmt.Sprintf("%s carries %v, want %v", image, got, want)
			}
		}
		return ""
	})
	for image := range before {
		if v, err := s.verify(image); err != nil || !v.Verified || len(v.Statements) != 2 {
			t.Errorf("verify %s: %+v, %v", image, v, err)
		}
	}
	s.quiet()
	if now := s.log.analyses(t); !maps.Equal(analyses, now) {
		t.Errorf("layers were analysed again: %v, before %v", now, analyses)
	}
	if again := s.sweep(false); again.Figures.Unstated != 0 || again.Figures.Missed != 0 {
		t.Errorf("the next sweep: %+v", again.Figures)
	}
}

// A tag that was deleted while intake was down is found to be gone.
func TestSweepFindsWhatIsGone(t *testing.T) {
	t.Parallel()
	s := swept(t)
	p := s.push("team/app", "1.0", story(t).Clean...)
	s.attested(p)
	s.recorded(p)
	s.sweep(false)
	if err := s.StopService("intake"); err != nil {
		t.Fatal(err)
	}
	if err := s.client.Delete(t.Context(), registry.Ref{Registry: s.Registry.Host, Repository: "team/app", Digest: p.Ref.Digest}); err != nil {
		t.Fatal(err)
	}
	if swept := s.sweep(false); swept.Figures.Deleted == 0 {
		t.Errorf("%+v", swept.Figures)
	}
	s.log.wait(t, func(l *events) string {
		if len(l.about(contracts.ImageGoneV1, p.String())) == 0 {
			return p.String() + " is not gone"
		}
		return ""
	})
}
