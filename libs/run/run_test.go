package run

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func env(pairs ...string) func(string) (string, bool) {
	return func(name string) (string, bool) {
		for i := 0; i < len(pairs); i += 2 {
			if pairs[i] == name {
				return pairs[i+1], true
			}
		}
		return "", false
	}
}

func TestParseReportsEveryMistakeWithItsLine(t *testing.T) {
	content := "kafka:\n  brokers: [a:9092]\n  brokerz: x\nkafak:\n  a: 1\nredis:\n  url: [1]\nhttp:\n  listen: 127.0.0.1:1\n"
	_, err := Parse("c.yaml", []byte(content), env())
	if !errors.Is(err, ErrConfig) {
		t.Fatalf("got %v, want ErrConfig", err)
	}
	for _, want := range []string{"c.yaml:3:", "brokerz", "c.yaml:4: kafak", `did you mean "kafka"?`, "c.yaml:7:"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%q is not in:\n%v", want, err)
		}
	}
}

func TestParseRefusesWhatIsNoMapping(t *testing.T) {
	for _, content := range []string{"- a\n", "just text\n", "a: b\n---\nc: d\n", "kafka: [\n", "\t\n:"} {
		if _, err := Parse("c.yaml", []byte(content), env()); !errors.Is(err, ErrConfig) {
			t.Errorf("%q: got %v, want ErrConfig", content, err)
		}
	}
	for _, content := range []string{"", "# nothing\n", "kafka:\n", `{"kafka": {"brokers": ["a:1"]}}`, "'kafka':\n"} {
		if _, err := Parse("c.yaml", []byte(content), env()); err != nil {
			t.Errorf("%q: %v", content, err)
		}
	}
}

func TestParseNeverShowsValues(t *testing.T) {
	content := "kafka:\n  username: u\n  password: hunter2\n  nonsense: hunter3\n"
	_, err := Parse("c.yaml", []byte(content), env())
	if err == nil || strings.Contains(err.Error(), "hunter") {
		t.Errorf("got %v, want an error without the values", err)
	}
}

func TestEnvironmentGoesBeforeTheFile(t *testing.T) {
	secret := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(secret, []byte("s3cret\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	content := "kafka:\n  brokers: [file:1]\n  passwordFile: " + secret + "\nredis:\n  url: redis://file\n  passwordEnv: REDIS_SECRET\n"
	c, err := Parse("c.yaml", []byte(content), env("TIDEWAITER_KAFKA_BROKERS", "a:1,b:2", "REDIS_SECRET", "pw"))
	if err != nil {
		t.Fatal(err)
	}
	if got := strings.Join(c.Kafka.Brokers, " "); got != "a:1 b:2" {
		t.Errorf("brokers = %q", got)
	}
	if c.Redis.URL != "redis://file" {
		t.Errorf("redis url %q", c.Redis.URL)
	}
	k, err := c.BusConfig("planner")
	if err != nil {
		t.Fatal(err)
	}
	if password, err := k.PasswordSource(); err != nil || password != "s3cret" {
		t.Errorf("kafka password %q, %v", password, err)
	}
	r, err := c.redisConfig("planner")
	if err != nil {
		t.Fatal(err)
	}
	if password, err := r.PasswordSource(); err != nil || password != "pw" {
		t.Errorf("redis password %q, %v", password, err)
	}
	if c, err = Parse("c.yaml", []byte(content), env()); err != nil {
		t.Fatal(err)
	}
	if _, err := c.redisConfig("planner"); !errors.Is(err, ErrConfig) || !strings.Contains(err.Error(), "REDIS_SECRET") {
		t.Errorf("got %v, want an error that names REDIS_SECRET", err)
	}
}

func TestEveryCommonSettingHasAVariable(t *testing.T) {
	content := "redis:\n  sentinel: {master: m, addresses: [\"s:26379\"]}\nkafka:\n  tls: {caFile: from-file, keyFile: k}\n"
	c, err := Parse("c.yaml", []byte(content), env(
		"TIDEWAITER_KAFKA_TLS_CA_FILE", "from-env", "TIDEWAITER_KAFKA_PARTITIONS", "9", "TIDEWAITER_KAFKA_RETRY_BACKOFF", "3s",
		"TIDEWAITER_REDIS_SENTINEL_ADDRESSES", "a:1,b:2", "TIDEWAITER_DATABASE_TLS_CERT_FILE", "c", "TIDEWAITER_LOG_LEVEL", "warn"))
	if err != nil {
		t.Fatal(err)
	}
	if got := *c.Kafka.TLSFiles; got.CAFile != "from-env" || got.KeyFile != "k" {
		t.Errorf("kafka.tls = %+v", got)
	}
	if c.Kafka.Partitions != 9 || c.Kafka.RetryBackoff != 3*time.Second || c.Log.Level != "warn" || c.Database.TLSFiles.CertFile != "c" {
		t.Errorf("%+v", c)
	}
	if got := c.Redis.Sentinel; got.Master != "m" || strings.Join(got.Addresses, " ") != "a:1 b:2" {
		t.Errorf("redis.sentinel = %+v", got)
	}
	if c.Redis.TLSFiles != nil {
		t.Error("a section that nothing names is there")
	}
	_, err = Parse("c.yaml", nil, env("TIDEWAITER_KAFKA_PARTITIONS", "many"))
	if !errors.Is(err, ErrConfig) || !strings.Contains(err.Error(), "TIDEWAITER_KAFKA_PARTITIONS") {
		t.Errorf("got %v, want an error that names the variable", err)
	}
}

// One file serves services with credentials of their own.
func TestEachServiceHasItsOwnCredentials(t *testing.T) {
	dir := t.TempDir()
	for service, password := range map[string]string{"planner": "p1", "attestor": "a1"} {
		if err := os.WriteFile(filepath.Join(dir, service+".kafka"), []byte(password+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	content := `
kafka: {brokers: ["k:9092"], username: "tidewaiter-{service}", passwordFile: "` + dir + `/{service}.kafka"}
redis: {url: "redis://{service}@r:6379", passwordEnv: "REDIS_{SERVICE}"}
database: {url: "postgres://tidewaiter_{service}@d/tidewaiter"}
registries: [{host: r.example.com, username: "robot-{service}", certFile: "{service}.pem", keyFile: "{service}.key"}]
`
	c, err := Parse("c.yaml", []byte(content), env("REDIS_ATTESTOR", "r1"))
	if err != nil {
		t.Fatal(err)
	}
	k, err := c.BusConfig("attestor")
	if err != nil {
		t.Fatal(err)
	}
	password, err := k.PasswordSource()
	if err != nil || k.Username != "tidewaiter-attestor" || password != "a1" {
		t.Errorf("kafka: %q, %q, %v", k.Username, password, err)
	}
	if err := os.WriteFile(filepath.Join(dir, "attestor.kafka"), []byte("a2"), 0o600); err != nil {
		t.Fatal(err)
	}
	if password, _ = k.PasswordSource(); password != "a2" {
		t.Errorf("after the file was replaced: %q", password)
	}
	if r, err := c.redisConfig("attestor"); err != nil || r.URL != "redis://attestor@r:6379" {
		t.Errorf("redis: %q, %v", r.URL, err)
	}
	if d, err := c.storeConfig("attestor"); err != nil || d.URL != "postgres://tidewaiter_attestor@d/tidewaiter" {
		t.Errorf("database: %q, %v", d.URL, err)
	}
	if h := c.Hosts("planner")[0]; h.Username != "robot-planner" || h.KeyFile != "planner.key" {
		t.Errorf("registry: %+v", h)
	}
	if c.Registries[0].Username != "robot-{service}" || c.Kafka.Username != "tidewaiter-{service}" {
		t.Error("what one service sees was written into the common configuration")
	}
}

type section struct {
	Name string `yaml:"name"`
	Size int    `yaml:"size"`
}

func (s *section) Validate() error {
	if s.Size < 1 {
		return errors.New("size must be at least 1")
	}
	return nil
}

func TestSections(t *testing.T) {
	c, err := Parse("c.yaml", []byte("planner:\n  name: p\n  size: 3\nmatcher:\n  size: 0\ncatalog:\n  sice: 1\n"), env())
	if err != nil {
		t.Fatal(err)
	}
	got := section{Name: "default", Size: 1}
	if err := c.CheckSection("planner", &got); err != nil || got != (section{"p", 3}) {
		t.Errorf("planner = %+v, %v", got, err)
	}
	got = section{Name: "default", Size: 1}
	if err := c.CheckSection("intake", &got); err != nil || got != (section{"default", 1}) {
		t.Errorf("absent section = %+v, %v", got, err)
	}
	if err := c.CheckSection("matcher", &section{}); !errors.Is(err, ErrConfig) || !strings.Contains(err.Error(), "c.yaml:5") {
		t.Errorf("got %v, want the section's line", err)
	}
	if err := c.CheckSection("catalog", &section{}); !errors.Is(err, ErrConfig) || !strings.Contains(err.Error(), "c.yaml:7") {
		t.Errorf("got %v, want the key's line", err)
	}
}

// Services of one process read one file at the same time, while addresses of
// servers are merged into it; Go ends a process that writes a map twice at once.
func TestSectionsAreReadAtOnce(t *testing.T) {
	c, err := Parse("c.yaml", []byte("kafka:\n  brokers: [old:1]\nplanner:\n  name: p\n  size: 3\nmatcher:\n  name: m\n  size: 0\n"), env())
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 500 {
				got := section{}
				if err := c.CheckSection("planner", &got); err != nil || got != (section{"p", 3}) {
					t.Errorf("planner = %+v, %v", got, err)
				}
				if err := c.CheckSection("matcher", &section{}); err == nil || !strings.Contains(err.Error(), "c.yaml:8") {
					t.Errorf("got %v, want the section's line", err)
				}
				if _, err := c.With(map[string]any{"kafka": map[string]any{"brokers": []string{"new:1"}}}); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
}

func TestWithMergesMapsAndReplacesTheRest(t *testing.T) {
	c, err := Parse("c.yaml", []byte("kafka:\n  prefix: tw-\n  brokers: [old:1]\nplanner:\n  name: kept\n"), env())
	if err != nil {
		t.Fatal(err)
	}
	merged, err := c.With(map[string]any{
		"kafka":   map[string]any{"brokers": []string{"new:1"}},
		"planner": map[string]any{"size": 7},
	})
	if err != nil {
		t.Fatal(err)
	}
	if merged.Kafka.Prefix != "tw-" || merged.Kafka.Brokers[0] != "new:1" {
		t.Errorf("kafka = %+v", merged.Kafka)
	}
	var got section
	if err := merged.CheckSection("planner", &got); err != nil || got != (section{"kept", 7}) {
		t.Errorf("planner = %+v, %v", got, err)
	}
}

func TestHealthListsWhatDoesNotWork(t *testing.T) {
	h := NewHealth()
	h.Set("a", nil)
	ask := func() (int, string) {
		w := httptest.NewRecorder()
		Monitor(h, prometheus.NewRegistry()).ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/readyz", nil))
		return w.Code, w.Body.String()
	}
	if code, _ := ask(); code != http.StatusOK {
		t.Errorf("ready: %d", code)
	}
	h.Set("b", errors.New("gone"))
	h.Check("c", func() error { return errors.New("away") })
	if code, body := ask(); code != http.StatusServiceUnavailable || body != "b: gone\nc: away\n" {
		t.Errorf("not ready: %d %q", code, body)
	}
}

// A process is ready when each of its services has said that it has started.
func TestReadyWhenAllHaveStarted(t *testing.T) {
	c, err := Parse("", []byte("http: {listen: 127.0.0.1:0}\n"), env())
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	begin, begun := make(chan struct{}), make(chan *Health)
	service := func(ctx context.Context, e *Env) error {
		begun <- e.Health
		<-begin
		e.Listening(nil)("address")
		begun <- e.Health
		<-ctx.Done()
		return nil
	}
	ended := make(chan error)
	go func() {
		ended <- All(ctx, c, slog.New(slog.DiscardHandler), Named{"planner", service}, Named{"matcher", service})
	}()
	<-begun
	health := <-begun
	if got := health.Problems(); !slices.Equal(got, []string{"matcher: it is starting", "planner: it is starting"}) {
		t.Errorf("problems %v, want both starting", got)
	}
	begin <- struct{}{}
	<-begun
	if got := health.Problems(); len(got) != 1 {
		t.Errorf("problems %v, want one starting", got)
	}
	begin <- struct{}{}
	<-begun
	if got := health.Problems(); len(got) > 0 {
		t.Errorf("problems %v, want none", got)
	}
	stop()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

func TestAllDrainsAndReportsTheFirstError(t *testing.T) {
	log := slog.New(slog.DiscardHandler)
	c, err := Parse("", nil, env())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	started := make(chan struct{})
	drained := false
	go func() { <-started; cancel() }()
	err = All(ctx, c, log, Named{"planner", func(ctx context.Context, _ *Env) error {
		close(started)
		<-ctx.Done()
		drained = true
		return nil
	}})
	if err != nil || !drained {
		t.Errorf("stop: %v, drained %t", err, drained)
	}

	broken := errors.New("broken")
	err = All(t.Context(), c, log,
		Named{"planner", func(ctx context.Context, _ *Env) error { <-ctx.Done(); return nil }},
		Named{"matcher", func(context.Context, *Env) error { return broken }})
	if !errors.Is(err, broken) || !strings.Contains(err.Error(), "matcher") {
		t.Errorf("got %v, want matcher's error", err)
	}

	err = All(t.Context(), c, log, Named{"planner", func(context.Context, *Env) error { return nil }})
	if err == nil {
		t.Error("a service that ends by itself must be an error")
	}
}

func TestServeLetsRequestsFinish(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	entered, release := make(chan struct{}), make(chan struct{})
	address := make(chan string, 1)
	e := &Env{Log: slog.New(slog.DiscardHandler)}
	served := make(chan error, 1)
	go func() {
		served <- e.Serve(ctx, "127.0.0.1:0", http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			close(entered)
			<-release
			_, _ = io.WriteString(w, "done")
		}), func(a string) { address <- a })
	}()
	answer := make(chan string, 1)
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	url := "http://" + <-address
	go func() {
		req, _ := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
		resp, err := client.Do(req)
		if err != nil {
			answer <- err.Error()
			return
		}
		defer resp.Body.Close()
		b, _ := io.ReadAll(resp.Body)
		answer <- string(b)
	}()
	<-entered
	cancel()
	close(release)
	if got := <-answer; got != "done" {
		t.Errorf("answer = %q", got)
	}
	if err := <-served; err != nil {
		t.Errorf("serve: %v", err)
	}
}

func TestRunExitCodes(t *testing.T) {
	bad := filepath.Join(t.TempDir(), "bad.yaml")
	if err := os.WriteFile(bad, []byte("nope: 1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	ok := func(ctx context.Context, _ *Env) error { <-ctx.Done(); return nil }
	stopped, cancel := context.WithCancel(t.Context())
	cancel()
	for _, test := range []struct {
		name    string
		ctx     context.Context
		service Service
		args    []string
		want    int
	}{
		{"stopped by a signal", stopped, ok, nil, ExitOK},
		{"help", t.Context(), ok, []string{"-h"}, ExitOK},
		{"unknown flag", t.Context(), ok, []string{"-x"}, ExitUsage},
		{"bad configuration", t.Context(), ok, []string{"-config", bad}, ExitUsage},
		{"missing configuration", t.Context(), ok, []string{"-config", bad + ".not"}, ExitUsage},
		{"no brokers", t.Context(), func(_ context.Context, e *Env) error { _, err := e.Bus(); return err }, nil, ExitUsage},
		{"broken", t.Context(), func(context.Context, *Env) error { return errors.New("x") }, nil, ExitUnavailable},
	} {
		var stderr bytes.Buffer
		if got := run(test.ctx, "planner", test.service, test.args, &stderr); got != test.want {
			t.Errorf("%s: exit code %d, want %d\n%s", test.name, got, test.want, stderr.String())
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add("kafka:\n  brokers: [a]\n")
	f.Add("- 1\n")
	f.Add("registries:\n- host: x\n  plainHTTP: true\n")
	f.Fuzz(func(t *testing.T, content string) {
		if _, err := Parse("c.yaml", []byte(content), env()); err != nil && !errors.Is(err, ErrConfig) {
			t.Errorf("%q: %v is not ErrConfig", content, err)
		}
	})
}

func TestRedactURL(t *testing.T) {
	for in, want := range map[string]string{
		"":                                 "not set",
		"sqlite:///data/x.db":              "sqlite:///data/x.db",
		"postgres://u:hunter2@h:5432/d":    "postgres://u:xxxxx@h:5432/d",
		"postgres://h/d?password=hunter2":  "postgres://h/d?password=xxxxx",
		"redis://:hunter2@h/0":             "redis://:xxxxx@h/0",
		"postgres://u:hun\x7fter2@h:5432/": "not a URL",
	} {
		if got := RedactURL(in); got != want {
			t.Errorf("%q: %q, want %q", in, got, want)
		}
	}
}

// TestNotes: what is noted shows and does not make the process unready.
func TestNotes(t *testing.T) {
	h := NewHealth()
	ask := func() (int, string) {
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/readyz", nil))
		return w.Code, w.Body.String()
	}
	h.Note("queue b", errors.New("is away"))
	h.Note("queue a", errors.New("is closed"))
	if code, body := ask(); code != http.StatusOK || body != "ready\nnote: queue a: is closed\nnote: queue b: is away\n" {
		t.Errorf("got %d, %q", code, body)
	}
	h.Set("kafka", errors.New("is away"))
	h.Note("queue a", nil)
	if code, body := ask(); code != http.StatusServiceUnavailable || body != "kafka: is away\nnote: queue b: is away\n" {
		t.Errorf("got %d, %q", code, body)
	}
}
