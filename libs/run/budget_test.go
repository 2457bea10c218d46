package run

import (
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/alicebob/miniredis/v2"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/tidewaiter/tidewaiter/libs/registry"
)

// Connections to registries end with the service that made them.
func TestCloseEndsConnectionsToRegistries(t *testing.T) {
	var open atomic.Int32
	server := httptest.NewUnstartedServer(http.NotFoundHandler())
	server.Config.ConnState = func(_ net.Conn, state http.ConnState) {
		switch state {
		case http.StateNew:
			open.Add(1)
		case http.StateClosed:
			open.Add(-1)
		}
	}
	server.Start()
	defer server.Close()
	name := strings.TrimPrefix(server.URL, "http://")
	cfg, err := Parse("", fmt.Appendf(nil, `registries: [{host: "%s", plainHTTP: true}]`, name), env("", ""))
	if err != nil {
		t.Fatal(err)
	}
	env := cfg.Env("planner", slog.New(slog.DiscardHandler), prometheus.NewRegistry(), NewHealth())
	c, err := env.Registry()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Resolve(t.Context(), registry.Ref{Registry: name, Repository: "a", Tag: "v"}); err == nil {
		t.Error("found what is not there")
	}
	if open.Load() == 0 {
		t.Fatal("no connection was kept")
	}
	if err := env.Close(); err != nil {
		t.Error(err)
	}
	for end := time.Now().Add(20 * time.Second); open.Load() > 0; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%d connections are left", open.Load())
		}
	}
}

// Services that one configuration starts share what a registry says to any of them.
func TestRegistriesShareABudget(t *testing.T) {
	var asked atomic.Int32
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		asked.Add(1)
		w.Header().Set("Retry-After", "300")
		w.WriteHeader(http.StatusTooManyRequests)
	}))
	defer server.Close()
	redis := miniredis.NewMiniRedis()
	redis.RequireAuth("s3cret")
	if err := redis.Start(); err != nil {
		t.Fatal(err)
	}
	defer redis.Close()
	name := strings.TrimPrefix(server.URL, "http://")
	cfg, err := Parse("", fmt.Appendf(nil, `
redis: {url: "redis://%s/0", passwordEnv: REDIS_SECRET}
registries: [{host: "%s", plainHTTP: true, rate: {requestsPerSecond: 5, burst: 5, pullsPerHour: 90}}]
`, redis.Addr(), name), env("REDIS_SECRET", "s3cret"))
	if err != nil {
		t.Fatal(err)
	}
	for i, service := range []string{"planner", "analyzer", "attestor"} {
		env := cfg.Env(service, slog.New(slog.DiscardHandler), prometheus.NewRegistry(), NewHealth())
		c, err := env.Registry()
		if err != nil {
			t.Fatal(err)
		}
		_, err = c.Resolve(t.Context(), registry.Ref{Registry: name, Repository: "a", Tag: "v"})
		if registry.Held(err) != (i > 0) || err == nil {
			t.Errorf("%s: %v", service, err)
		}
		if problems := env.Health.Problems(); len(problems) != 0 {
			t.Errorf("%s: a budget is no condition: %q", service, problems)
		}
		if err := env.Close(); err != nil {
			t.Error(err)
		}
	}
	if asked.Load() != 1 {
		t.Errorf("asked %d times, want 1", asked.Load())
	}
}
