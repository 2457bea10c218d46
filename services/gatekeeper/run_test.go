package gatekeeper

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/goccy/go-yaml"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/bus"
	"github.com/tidewaiter/tidewaiter/libs/embedded"
	"github.com/tidewaiter/tidewaiter/libs/run"
	gt "github.com/tidewaiter/tidewaiter/services/gatekeeper/gatekeepertest"
)

// runGatekeeper starts the service on the embedded servers, as its program does.
func runGatekeeper(t *testing.T, servers *embedded.Servers, reg *gt.Registry, dir string) (url string, cfg *run.Config, health *run.Health) {
	t.Helper()
	path := func(name, content string) string {
		p := filepath.Join(dir, name)
		write(t, p, []byte(content))
		return p
	}
	content, err := yaml.Marshal(map[string]any{
		"kafka": map[string]any{
			"brokers": []string{servers.KafkaAddress}, "username": servers.KafkaUsername, "prefix": "test.",
			"passwordFile": path("kafka.password", servers.KafkaPassword),
		},
		"redis":      map[string]any{"url": servers.RedisURL, "passwordFile": path("redis.password", servers.RedisPassword)},
		"database":   map[string]any{"url": servers.DatabaseURL},
		"registries": []any{map[string]any{"host": reg.Host, "plainHTTP": true}},
		"gatekeeper": map[string]any{
			"listen": "127.0.0.1:0", "keyFiles": []string{path("attestor.pub", string(gt.Key(t, 0).PublicPEM()))}, "bundles": FromDatabase,
			"budget": "10s", "auth": map[string]any{"tokenFile": path("token", "secret")},
			"tls": map[string]any{"dir": filepath.Join(dir, "certificates"), "names": []string{"127.0.0.1"}},
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	cfg, err = run.Parse("test.yaml", content, func(string) (string, bool) { return "", false })
	if err != nil {
		t.Fatal(err)
	}
	health = run.NewHealth()
	env := cfg.Env(Name, quiet, prometheus.NewRegistry(), health)
	ctx, stop := context.WithCancel(context.Background())
	ready, ended := make(chan string, 1), make(chan error, 1)
	go func() { ended <- Listening(func(a string) { ready <- a })(ctx, env) }()
	t.Cleanup(func() {
		stop()
		if err := <-ended; err != nil {
			t.Errorf("the service ended with %v", err)
		}
		if err := env.Close(); err != nil {
			t.Errorf("close connections: %v", err)
		}
	})
	select {
	case address := <-ready:
		return "https://" + address + "/validate", cfg, health
	case err := <-ended:
		ended <- err
		t.Fatalf("the service ended with %v", err)
	case <-time.After(time.Minute):
		t.Fatal("the service does not answer")
	}
	return "", nil, nil
}

func TestRun(t *testing.T) {
	serversCtx, stopServers := context.WithCancel(context.Background())
	dir := t.TempDir()
	servers, err := embedded.Start(serversCtx, embedded.Options{Dir: filepath.Join(dir, "servers")}, quiet)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		stopServers()
		if err := servers.Wait(); err != nil {
			t.Errorf("stop the servers: %v", err)
		}
	})
	reg := gt.NewRegistry(t)
	good, bad := reg.Push(t, "shop/good", "v1"), reg.Push(t, "shop/bad", "v1")
	gt.Attached(t, reg.Client, gt.Key(t, 0), gt.Statement{Verdict: contracts.VerdictPass, Sequence: 100}, good)
	url, cfg, _ := runGatekeeper(t, servers, reg, dir)

	bundle, err := os.ReadFile(filepath.Join(dir, "certificates", BundleFile))
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(bundle)
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12}}}
	t.Cleanup(client.CloseIdleConnections)
	ask := func(token string, review any) (int, *response) {
		body, err := json.Marshal(review)
		if err != nil {
			t.Fatal(err)
		}
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, url, bytes.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Content-Type", "application/json")
		req.Header.Set("Authorization", "Bearer "+token)
		resp, err := client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		var out struct {
			Response *response `json:"response"`
		}
		if resp.StatusCode == http.StatusOK {
			if err := json.NewDecoder(resp.Body).Decode(&out); err != nil {
				t.Fatal(err)
			}
		}
		return resp.StatusCode, out.Response
	}
	if code, _ := ask("wrong", pod(good.String())); code != http.StatusUnauthorized {
		t.Errorf("a wrong token: %d", code)
	}
	if _, r := ask("secret", pod(good.String())); !r.Allowed {
		t.Errorf("a good image: %+v", r)
	}
	if _, r := ask("secret", pod(bad.String())); r.Allowed || !strings.Contains(r.Status.Message, "no statement") {
		t.Errorf("an image without a statement: %+v", r)
	}

	// The decisions arrive in Kafka.
	env := cfg.Env("test", quiet, nil, run.NewHealth())
	t.Cleanup(func() { _ = env.Close() })
	b, err := env.Bus()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := b.EnsureTopics(ctx, contracts.AdmissionDecidedV1); err != nil {
		t.Fatal(err)
	}
	decisions := map[string]bool{}
	errDone := errors.New("done")
	err = b.Tail(ctx, b.Topics(contracts.AdmissionDecidedV1), true, func(m bus.Tailed) error {
		d, err := bus.Decode[contracts.AdmissionDecided](m.Event)
		if err != nil || m.Event.Source() != "/services/gatekeeper" {
			return errors.Join(errors.New("an event of somebody else"), err)
		}
		decisions[d.Decision] = true
		if len(decisions) == 2 {
			return errDone
		}
		return nil
	})
	if !errors.Is(err, errDone) || !decisions[contracts.DecisionAdmit] || !decisions[contracts.DecisionDeny] {
		t.Errorf("decisions %v, %v", decisions, err)
	}
}

// Without Kafka and Redis reviews are answered, and the service is ready: a
// cluster must be able to start what mends them.
func TestRunAlone(t *testing.T) {
	dir := t.TempDir()
	gone := &embedded.Servers{
		KafkaAddress: "127.0.0.1:1", KafkaUsername: "u", KafkaPassword: "p", RedisURL: "redis://127.0.0.1:1/0", RedisPassword: "p",
		DatabaseURL: "sqlite://" + filepath.Join(dir, "db"),
	}
	reg := gt.NewRegistry(t)
	good := reg.Push(t, "shop/good", "v1")
	gt.Attached(t, reg.Client, gt.Key(t, 0), gt.Statement{Verdict: contracts.VerdictPass, Sequence: 100}, good)
	url, _, health := runGatekeeper(t, gone, reg, dir)
	if problems := health.Problems(); len(problems) != 0 {
		t.Errorf("not ready: %q", problems)
	}
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}} // the certificate is tested above
	t.Cleanup(client.CloseIdleConnections)
	body, err := json.Marshal(pod(good.String()))
	if err != nil {
		t.Fatal(err)
	}
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, url, bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("Authorization", "Bearer secret")
	resp, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	var out struct {
		Response *response `json:"response"`
	}
	if err := json.NewDecoder(resp.Body).Decode(&out); err != nil || !out.Response.Allowed {
		t.Errorf("%+v, %v", out.Response, err)
	}
}
