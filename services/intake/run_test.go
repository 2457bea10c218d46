package intake

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/cloudevents/sdk-go/v2/event"
	"github.com/goccy/go-yaml"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/bus"
	"github.com/tidewaiter/tidewaiter/libs/embedded"
	"github.com/tidewaiter/tidewaiter/libs/run"
	"github.com/tidewaiter/tidewaiter/libs/store"
)

// rig is the service as it runs in production, on the embedded servers.
type rig struct {
	url     string
	servers *embedded.Servers
	kafka   bus.Config
}

// runService starts Kafka, a database and the service, and stops them at the end.
func runService(t testing.TB, sources map[string]any) *rig {
	t.Helper()
	log := slog.New(slog.DiscardHandler)
	serversCtx, stopServers := context.WithCancel(context.Background())
	servers, err := embedded.Start(serversCtx, embedded.Options{Dir: t.TempDir()}, log)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		stopServers()
		if err := servers.Wait(); err != nil {
			t.Errorf("stop the servers: %v", err)
		}
	})
	content, err := yaml.Marshal(map[string]any{
		"kafka": map[string]any{
			"brokers": []string{servers.KafkaAddress}, "username": servers.KafkaUsername,
			"passwordFile": file(t, servers.KafkaPassword),
		},
		"database": map[string]any{"url": servers.DatabaseURL},
		"intake":   map[string]any{"listen": "127.0.0.1:0", "admin": map[string]any{"tokenFile": file(t, "admin")}},
		"sources":  sources,
	})
	if err != nil {
		t.Fatal(err)
	}
	cfg, err := run.Parse(filepath.Join(t.TempDir(), "test.yaml"), content, func(string) (string, bool) { return "", false })
	if err != nil {
		t.Fatal(err)
	}
	env := cfg.Env(Name, log, prometheus.NewRegistry(), run.NewHealth())
	ctx, stop := context.WithCancel(context.Background())
	addr, ended := make(chan string, 1), make(chan error, 1)
	go func() { ended <- Listening(func(a string) { addr <- a })(ctx, env) }()
	t.Cleanup(func() {
		stop()
		if err := <-ended; err != nil {
			t.Errorf("the service ended with %v", err)
		}
		if err := env.Close(); err != nil {
			t.Errorf("close connections: %v", err)
		}
	})
	r := &rig{servers: servers, kafka: cfg.Kafka.Config}
	r.kafka.Password = servers.KafkaPassword // Env reads it of the file at every connection
	select {
	case a := <-addr:
		r.url = "http://" + a
	case err := <-ended:
		ended <- nil
		t.Fatalf("the service did not start: %v", err)
	}
	return r
}

func (r *rig) post(t testing.TB, client *http.Client, path, token string, body []byte) int {
	t.Helper()
	req, err := http.NewRequestWithContext(context.Background(), http.MethodPost, r.url+path, bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+token)
	resp, err := client.Do(req)
	if err != nil {
		t.Error(err)
		return 0
	}
	if err := resp.Body.Close(); err != nil {
		t.Error(err)
	}
	return resp.StatusCode
}

func TestRun(t *testing.T) {
	r := runService(t, map[string]any{"main": map[string]any{
		"kind": "distribution", "registry": "r.example:5000",
		"auth": map[string]any{"bearer": map[string]any{"tokenFile": file(t, "token")}},
	}})
	client := &http.Client{}
	defer client.CloseIdleConnections()
	for _, c := range []struct {
		path, token string
		body        []byte
		want        int
	}{
		{"/hooks/main", "token", push("1", "a/b", "1"), http.StatusAccepted},
		{"/hooks/main", "token", push("1", "a/b", "1"), http.StatusAccepted}, // again
		{"/hooks/main", "token", push("2", "a/b", testSigTag), http.StatusAccepted},
		{"/hooks/main", "token", []byte("garbage"), http.StatusAccepted},
		{"/hooks/main", "other", push("3", "a/b", "3"), http.StatusUnauthorized},
		{"/hooks/none", "token", push("4", "a/b", "4"), http.StatusNotFound},
		{"/v1/submit", "admin", []byte(`{"ref":"r.example:5000/c:5"}`), http.StatusAccepted},
		{"/v1/submit", "token", []byte(`{"ref":"r.example:5000/c:6"}`), http.StatusUnauthorized},
	} {
		if got := r.post(t, client, c.path, c.token, c.body); got != c.want {
			t.Errorf("%s %.20s: got %d, want %d", c.path, c.body, got, c.want)
		}
	}

	// A consumer of the next service sees what was acknowledged, and nothing else.
	b, err := bus.New(r.kafka, "planner", slog.New(slog.DiscardHandler), prometheus.NewRegistry())
	if err != nil {
		t.Fatal(err)
	}
	if err := b.EnsureTopics(t.Context(), contracts.ImagePushedV1); err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	var got []string
	ctx, stop := context.WithCancel(t.Context())
	consumed := make(chan error, 1)
	go func() {
		consumed <- b.Consume(ctx, bus.Subscription{
			Events: []string{contracts.ImagePushedV1},
			Handler: func(_ context.Context, ev event.Event) ([]event.Event, error) {
				p, err := bus.Decode[contracts.ImagePushed](ev)
				if err != nil {
					return nil, err
				}
				mu.Lock()
				defer mu.Unlock()
				got = append(got, fmt.Sprint(p.Repository, ":", p.Tag, " ", ev.Extensions()[contracts.ExtLane], " ", p.Cause))
				return nil, nil
			},
		})
	}()
	eventually(t, "three events arrive", func() bool {
		mu.Lock()
		defer mu.Unlock()
		return len(got) >= 3
	})
	stop()
	if err := <-consumed; err != nil {
		t.Error(err)
	}
	if err := b.Close(); err != nil {
		t.Error(err)
	}
	slices.Sort(got)
	want := []string{"a/b:1 fresh push", "a/b:" + testSigTag + " bulk push", "c:5 fresh submit"}
	if !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}

	// The calls are remembered, also the refused ones.
	db, err := store.Open(t.Context(), r.servers.DatabaseURL)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := db.Close(); err != nil {
			t.Error(err)
		}
	}()
	reasons := func() map[string]int {
		out := map[string]int{}
		q, err := db.QueryContext(t.Context(), `SELECT reason, count(*) FROM intake_deliveries GROUP BY reason`)
		if err != nil {
			return out // not migrated yet
		}
		defer func() { _ = q.Close() }() // read to its end
		for q.Next() {
			var reason string
			var n int
			if err := q.Scan(&reason, &n); err != nil {
				t.Fatal(err)
			}
			out[reason] = n
		}
		if err := q.Err(); err != nil {
			t.Fatal(err)
		}
		return out
	}
	eventually(t, "the deliveries are recorded", func() bool {
		r := reasons()
		return r[reasonStored] == 3 && r[reasonDuplicate] == 1 && r[reasonUnreadable] == 1 &&
			r[reasonUnknown] == 1 && r[reasonRefused] == 2 && len(r) == 5
	})
}

// TestRunRefusesBadConfiguration: nothing is served with a configuration that cannot be right.
func TestRunRefusesBadConfiguration(t *testing.T) {
	for name, sections := range map[string]map[string]any{
		"source without authentication": {"sources": map[string]any{"s": map[string]any{"kind": "distribution", "registry": "r"}}},
		"unknown field":                 {"sources": map[string]any{"s": map[string]any{"kin": "distribution"}}},
		"unknown field of intake":       {"intake": map[string]any{"lissten": ":1"}},
		"secret that is not there": {"sources": map[string]any{"s": map[string]any{
			"kind": "distribution", "registry": "r", "auth": map[string]any{"bearer": map[string]any{"tokenFile": "/no/such/file"}},
		}}},
	} {
		t.Run(name, func(t *testing.T) {
			sections["kafka"] = map[string]any{"brokers": []string{"127.0.0.1:1"}}
			content, err := yaml.Marshal(sections)
			if err != nil {
				t.Fatal(err)
			}
			cfg, err := run.Parse("test.yaml", content, func(string) (string, bool) { return "", false })
			if err != nil {
				t.Fatal(err)
			}
			env := cfg.Env(Name, slog.New(slog.DiscardHandler), prometheus.NewRegistry(), run.NewHealth())
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			defer cancel()
			if err := Run(ctx, env); err == nil || ctx.Err() != nil {
				t.Errorf("got %v", err)
			}
			if err := env.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}

// BenchmarkIntake sends pushes over HTTP from 64 connections, each stored in
// Kafka with acks=all before it is answered. To reach: 1,000 events/s, p99 below 100 ms.
func BenchmarkIntake(b *testing.B) {
	r := runService(b, map[string]any{"main": map[string]any{
		"kind": "distribution", "registry": "r.example:5000",
		"auth": map[string]any{"bearer": map[string]any{"tokenFile": file(b, "token")}},
	}})
	const connections = 64
	client := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: connections}}
	defer client.CloseIdleConnections()
	var mu sync.Mutex
	var took []time.Duration
	work := make(chan int)
	var senders sync.WaitGroup
	for range connections {
		senders.Go(func() {
			var own []time.Duration
			for i := range work {
				start := time.Now()
				if status := r.post(b, client, "/hooks/main", "token", push(fmt.Sprint(i), fmt.Sprint("team/app-", i%50), fmt.Sprint(i))); status != http.StatusAccepted {
					b.Errorf("got %d", status)
				}
				own = append(own, time.Since(start))
			}
			mu.Lock()
			defer mu.Unlock()
			took = append(took, own...)
		})
	}
	b.ResetTimer()
	for i := range b.N {
		work <- i
	}
	close(work)
	senders.Wait()
	b.StopTimer()
	slices.Sort(took)
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "events/s")
	b.ReportMetric(float64(took[len(took)*99/100].Microseconds())/1000, "p99-ms")
	b.ReportMetric(float64(took[len(took)/2].Microseconds())/1000, "p50-ms")
}

// BenchmarkDecode is the part of a request that is ours alone.
func BenchmarkDecode(b *testing.B) {
	body := push("1", "team/app", "1.0")
	b.SetBytes(int64(len(body)))
	for b.Loop() {
		if got, err := DecodeOnce("distribution", "", "r.example", nil, body); err != nil || len(got.Events) != 1 {
			b.Fatal(got, err)
		}
	}
}
