package ticketer_test

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cloudevents/sdk-go/v2/event"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/bus"
	"github.com/tidewaiter/tidewaiter/libs/embedded"
	"github.com/tidewaiter/tidewaiter/libs/run"
	"github.com/tidewaiter/tidewaiter/services/ticketer"
	"github.com/tidewaiter/tidewaiter/services/ticketer/tracker"
	"github.com/tidewaiter/tidewaiter/services/ticketer/trackertest"
)

// receiver is a webhook's receiver.
type receiver struct {
	URL string

	mu     sync.Mutex
	status int
	events []event.Event
}

func newReceiver(t *testing.T) *receiver {
	t.Helper()
	r := &receiver{status: http.StatusNoContent}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		body, err := io.ReadAll(req.Body)
		if err != nil {
			t.Error(err)
		}
		var ev event.Event
		if err := json.Unmarshal(body, &ev); err != nil {
			t.Errorf("%s: %v", body, err)
		}
		var seconds int64
		if _, err := fmt.Sscan(req.Header.Get(tracker.HeaderTimestamp), &seconds); err != nil {
			t.Error(err)
		}
		want, err := tracker.Sign("a secret that is long enough", ev.ID(), time.Unix(seconds, 0), body)
		if err != nil || req.Header.Get(tracker.HeaderSignature) != want {
			t.Errorf("signature %q, want %q, %v", req.Header.Get(tracker.HeaderSignature), want, err)
		}
		r.mu.Lock()
		defer r.mu.Unlock()
		if r.status < 300 {
			r.events = append(r.events, ev)
		}
		w.WriteHeader(r.status)
	}))
	t.Cleanup(server.Close)
	r.URL = server.URL
	return r
}

func (r *receiver) got() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	var ids []string
	for _, ev := range r.events {
		ids = append(ids, ev.ID())
	}
	return ids
}

func (r *receiver) answer(status int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.status = status
}

// A webhook is told of each revision once, of nothing that no rule wants, and
// not of the end of what it never heard of.
func TestWebhook(t *testing.T) {
	w := newWorld(t, ticketer.KindGitHub)
	r := newReceiver(t)
	w.env["HOOK"] = "a secret that is long enough"
	w.cfg.Trackers = append(w.cfg.Trackers, ticketer.Tracker{Name: "hook", Kind: ticketer.KindWebhook, URL: r.URL, SecretEnv: "HOOK"})
	w.cfg.Rules[0].Tracker, w.cfg.Rules[0].MinSeverity = "hook", contracts.SeverityHigh
	w.restart()
	closed := problem(2)
	closed.Key, closed.State = strings.Repeat("f", 32), "closed"
	w.handle(closed)
	r.answer(http.StatusServiceUnavailable)
	if outcome, _ := bus.Classify(w.try(problem(1))); outcome != bus.OutcomeLater {
		t.Errorf("got %v", outcome)
	}
	r.answer(http.StatusGone)
	if outcome, _ := bus.Classify(w.try(problem(1))); outcome != bus.OutcomePermanent {
		t.Errorf("got %v", outcome)
	}
	r.answer(http.StatusAccepted)
	for range 2 {
		for _, p := range story() {
			w.handle(p)
		}
	}
	key := problem(1).Key
	want := fmt.Sprintf("[%[1]s-1 %[1]s-2 %[1]s-3 %[1]s-4]", key)
	if got := fmt.Sprint(r.got()); got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

func TestConfig(t *testing.T) {
	good := func() ticketer.Config {
		c := ticketer.DefaultConfig()
		c.Trackers = []ticketer.Tracker{
			{Name: "gh", Kind: "github", URL: "https://api.github.com/", SecretEnv: "T"},
			{Name: "gl", Kind: "gitlab", URL: "https://gitlab.example", SecretFile: "/f"},
			{Name: "hook", Kind: "webhook", URL: "http://127.0.0.1:1/x", SecretEnv: "T"},
		}
		c.Rules = []ticketer.Rule{
			{Tracker: "none", Repositories: []string{"a/b"}},
			{Tracker: "gh", Project: "a/b", MinSeverity: "high"},
			{Tracker: "gl", Project: "g/sub/p"},
			{Tracker: "hook"},
		}
		return c
	}
	if err := good().Validate(); err != nil {
		t.Error(err)
	}
	for want, spoil := range map[string]func(c *ticketer.Config){
		"reserved or taken": func(c *ticketer.Config) { c.Trackers[1].Name = "gh" },
		"kind is":           func(c *ticketer.Config) { c.Trackers[0].Kind = "jira" },
		"no URL":            func(c *ticketer.Config) { c.Trackers[0].URL = "api.github.com" },
		"not encrypted":     func(c *ticketer.Config) { c.Trackers[0].URL = "http://api.github.com" },
		"holds credentials": func(c *ticketer.Config) { c.Trackers[2].URL = "https://u:hunter2@h/" },
		"one of them":       func(c *ticketer.Config) { c.Trackers[0].SecretFile = "/f" },
		"createPerMinute":   func(c *ticketer.Config) { c.Trackers[0].CreatePerMinute = -1 },
		"no tracker":        func(c *ticketer.Config) { c.Rules[1].Tracker = "jira" },
		"owner/repository":  func(c *ticketer.Config) { c.Rules[1].Project = "a" },
		"whole path":        func(c *ticketer.Config) { c.Rules[2].Project = "a" },
		"minSeverity":       func(c *ticketer.Config) { c.Rules[1].MinSeverity = "bad" },
		"has a comma":       func(c *ticketer.Config) { c.Rules[1].Labels = []string{"a,b"} },
		"label is empty":    func(c *ticketer.Config) { c.Label = "" },
		"at least 1s":       func(c *ticketer.Config) { c.Timeout = 0 },
		"to settle takes":   func(c *ticketer.Config) { c.Settle = time.Second },
	} {
		c := good()
		spoil(&c)
		if err := c.Validate(); err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("%s: %v", want, err)
		}
	}
	c := good()
	if _, _, err := c.Connect(func(string) (string, bool) { return "", false }, nil); err == nil || !strings.Contains(err.Error(), "variable T") {
		t.Errorf("got %v", err)
	}
}

// Without rules nothing is opened: neither Kafka nor a database is there.
func TestRunWithoutRules(t *testing.T) {
	cfg, err := run.Parse("", nil, func(string) (string, bool) { return "", false })
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	env := cfg.Env(ticketer.Name, slog.New(slog.DiscardHandler), prometheus.NewRegistry(), run.NewHealth())
	if err := ticketer.Run(ctx, env); err != nil {
		t.Error(err)
	}
	if err := env.Close(); err != nil {
		t.Error(err)
	}
}

// TestRunOnKafka runs the service on the embedded servers: finding events
// become a ticket, which is closed in the end.
func TestRunOnKafka(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	log := slog.New(slog.DiscardHandler)
	servers, err := embedded.Start(ctx, embedded.Options{Dir: t.TempDir()}, log)
	if err != nil {
		t.Fatal(err)
	}
	github := trackertest.GitHub(t, time.Now)
	t.Setenv("GITHUB_TOKEN", trackertest.Token)
	t.Setenv("KAFKA_PASSWORD", servers.KafkaPassword)
	cfg, err := run.Parse("", fmt.Appendf(nil, `
kafka: {brokers: ["%s"], username: "%s", passwordEnv: KAFKA_PASSWORD, partitions: 2}
database: {url: "%s"}
ticketer:
  trackers: [{name: main, kind: github, url: "%s", secretEnv: GITHUB_TOKEN}]
  rules: [{repositories: [r.example], minSeverity: high, onlyFixable: true, tracker: main, project: %s}]
`, servers.KafkaAddress, servers.KafkaUsername, servers.DatabaseURL, github.URL, trackertest.Project), os.LookupEnv)
	if err != nil {
		t.Fatal(err)
	}
	env := cfg.Env(ticketer.Name, log, prometheus.NewRegistry(), run.NewHealth())
	ended := make(chan error, 1)
	go func() {
		err := ticketer.Run(ctx, env)
		if closed := env.Close(); err == nil {
			err = closed
		}
		ended <- err
	}()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("service: %v", err)
		}
		if err := servers.Wait(); err != nil {
			t.Errorf("servers: %v", err)
		}
	})
	kafka := cfg.Kafka.Config
	kafka.Password = os.Getenv("KAFKA_PASSWORD") // services read it at every connection
	b, err := bus.New(kafka, "tester", log, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := b.Close(); err != nil {
			t.Errorf("close the bus: %v", err)
		}
	}()
	if err := b.EnsureTopics(ctx, contracts.FindingOpenedV1); err != nil {
		t.Fatal(err)
	}
	closed := problem(2)
	closed.State = "closed"
	if err := b.Publish(ctx, ev(t, problem(1)), ev(t, closed), ev(t, problem(1))); err != nil {
		t.Fatal(err)
	}
	for {
		if is := github.Issues(); len(is) == 1 && !is[0].Open && len(is[0].Comments) == 1 {
			return
		}
		select {
		case <-ctx.Done():
			t.Fatalf("got %+v", github.Issues())
		case <-time.After(50 * time.Millisecond):
		}
	}
}
