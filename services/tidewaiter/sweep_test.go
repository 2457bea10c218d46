package main

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/run"
	"github.com/tidewaiter/tidewaiter/services/sweeper"
)

// fakeSweeper answers as sweeper does: a sweep that is under way for two
// looks, then ends as given.
func fakeSweeper(t *testing.T, end contracts.Sweep) string {
	t.Helper()
	began := time.Date(2026, 5, 4, 3, 0, 0, 0, time.UTC)
	looks := 0
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != "Bearer the-token" {
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		reply := func(status int, v any) {
			w.WriteHeader(status)
			if err := json.NewEncoder(w).Encode(v); err != nil {
				t.Error(err)
			}
		}
		old := contracts.Sweep{Source: "main", State: contracts.SweepComplete, StartedAt: began, Unlisted: []contracts.Unlisted{}}
		switch {
		case r.URL.Path == "/v1/sweeps" && r.Method == http.MethodGet:
			reply(http.StatusOK, map[string]any{"sweeps": []sweeper.SourceSweeps{{Source: "main", Last: &end, Complete: &end}, {Source: "new"}}})
		case r.URL.Path != "/v1/sweeps/main":
			reply(http.StatusNotFound, map[string]string{"error": "no source of this id is swept"})
		case r.Method == http.MethodPost:
			if (r.URL.Query().Get("dryRun") == "true") != end.DryRun {
				t.Errorf("asked for %s", r.URL)
			}
			reply(http.StatusAccepted, map[string]any{"after": began})
		default:
			q := r.URL.Query()
			if at, err := time.Parse(time.RFC3339Nano, q.Get("after")); err != nil || !at.Equal(began) || (q.Get("dryRun") == "true") != end.DryRun {
				t.Errorf("asked about %s, %v", r.URL, err)
			}
			now := end
			now.StartedAt = began.Add(time.Second)
			if looks++; looks == 1 {
				now = old
			} else if looks < 4 {
				left := int64(90)
				now.State, now.Phase, now.SecondsLeft = contracts.SweepRunning, "tags", &left
				now.Figures.Tags = 10 * looks
			}
			reply(http.StatusOK, sweeper.SourceSweeps{Source: "main", Last: &now})
		}
	}))
	t.Cleanup(s.Close)
	t.Setenv("TIDEWAITER_TOKEN", "the-token")
	return s.URL
}

func ended(state string, dryRun bool) contracts.Sweep {
	share := 0.25
	return contracts.Sweep{
		Source: "main", Registry: "registry.example.com", State: state, Phase: "done", DryRun: dryRun, StartedAt: time.Date(2026, 5, 4, 3, 0, 1, 0, time.UTC),
		Figures:  contracts.SweepFigures{Repositories: 2, Tags: 40, Missed: 3, Changed: 4, Heard: 3, Lost: 1, ShareLost: &share},
		Unlisted: []contracts.Unlisted{},
	}
}

func TestSweep(t *testing.T) {
	url := fakeSweeper(t, ended(contracts.SweepComplete, false))
	code, out, errs := tidewaiter(t, "", "sweep", "--source", "main", "--sweeper", url, "--output", "json")
	var got contracts.Sweep
	if err := json.Unmarshal([]byte(out), &got); err != nil || code != run.ExitOK || got.Figures.Missed != 3 || got.State != contracts.SweepComplete {
		t.Errorf("%d %s %s, %v", code, out, errs, err)
	}
	if !strings.Contains(errs, "20 tags looked at, 3 missed, about 1m30s left") || !strings.Contains(errs, "30 tags") {
		t.Errorf("the progress is %q", errs)
	}
}

func TestSweepDryRun(t *testing.T) {
	url := fakeSweeper(t, ended(contracts.SweepComplete, true))
	code, out, errs := tidewaiter(t, "", "sweep", "--source", "main", "--dry-run", "--sweeper", url)
	if code != run.ExitOK || !strings.Contains(out, "nothing was sent") || !strings.Contains(out, "25.0 % (1 of 4 pushes)") {
		t.Errorf("%d\n%s\n%s", code, out, errs)
	}
}

func TestSweepThatIsNotComplete(t *testing.T) {
	end := ended(contracts.SweepIncomplete, false)
	end.Message = "1 repositories could not be listed"
	end.Unlisted = []contracts.Unlisted{
		{Repository: "team/closed", Reason: "registry refused the credentials"},
		{Repository: "team/app", Tag: "0.9", Reason: "not a manifest of a known kind"},
	}
	url := fakeSweeper(t, end)
	code, out, errs := tidewaiter(t, "", "sweep", "--source", "main", "--sweeper", url)
	if code != run.ExitUnavailable || !strings.Contains(out, "team/closed: registry refused") || !strings.Contains(out, "team/app:0.9: not a manifest") || !strings.Contains(errs, "incomplete") {
		t.Errorf("%d\n%s\n%s", code, out, errs)
	}
	code, _, errs = tidewaiter(t, "", "sweep", "--source", "other", "--sweeper", url)
	if code != run.ExitUsage || !strings.Contains(errs, "no source of this id is swept") {
		t.Errorf("an unknown source: %d %s", code, errs)
	}
	code, _, errs = tidewaiter(t, "", "sweep", "--source", "main", "--intake", url)
	if code != run.ExitUsage || !strings.Contains(errs, "--sweeper URL") {
		t.Errorf("no sweeper: %d %s", code, errs)
	}
}

// The report says what registries lost, where a sweeper is known.
func TestReportOfLostEvents(t *testing.T) {
	url := fakeSweeper(t, ended(contracts.SweepComplete, false))
	catalog := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		if err := json.NewEncoder(w).Encode(contracts.FleetReport{}); err != nil {
			t.Error(err)
		}
	}))
	t.Cleanup(catalog.Close)
	code, out, errs := tidewaiter(t, "", "report", "--server", catalog.URL, "--sweeper", url)
	if code != run.ExitOK || !strings.Contains(out, "EVENTS LOST") || !strings.Contains(out, "25.0 % (1 of 4 pushes)") {
		t.Errorf("%d\n%s\n%s", code, out, errs)
	}
	code, out, _ = tidewaiter(t, "", "report", "--server", catalog.URL, "--sweeper", url, "--output", "json")
	var report contracts.FleetReport
	if err := json.Unmarshal([]byte(out), &report); err != nil || code != run.ExitOK || len(report.Registries) != 1 || report.Registries[0].Figures.Lost != 1 {
		t.Errorf("%d %s, %v", code, out, err)
	}
	code, out, errs = tidewaiter(t, "", "report", "--server", catalog.URL, "--sweeper", "http://127.0.0.1:1")
	if code != run.ExitOK || strings.Contains(out, "EVENTS LOST") || !strings.Contains(errs, "sweeper does not answer") {
		t.Errorf("without an answer: %d\n%s\n%s", code, out, errs)
	}
}
