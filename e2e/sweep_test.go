package e2e

import (
	"encoding/json"
	"testing"
	"time"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/bus"
	"github.com/tidewaiter/tidewaiter/libs/run"
	"github.com/tidewaiter/tidewaiter/services/sweeper"
	"github.com/tidewaiter/tidewaiter/services/tidewaiter/allinone"
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
	return start(t, allinone.Options{Config: cfg})
}

// sweep asks for a sweep, waits for its end and returns it.
func (s *system) sweep(dryRun bool) contracts.Sweep {
	s.t.Helper()
	headers := map[string]string{"Authorization": "Bearer " + s.Token}
	path := s.Sweeper + "/v1/sweeps/" + allinone.Source
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
	s := swept(t)
	first := s.sweep(false)
	if err := s.StopService("intake"); err != nil {
		t.Fatal(err)
	}
	p := s.push("team/missed", "1.0", story(t).Clean...)
	found := s.sweep(false)
	s.attested(p)
	if first.State != contracts.SweepComplete || found.State != contracts.SweepComplete {
		t.Errorf("%+v\n%+v", first, found)
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
