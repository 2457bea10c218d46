package advisor

import (
	"archive/zip"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/cloudevents/sdk-go/v2/event"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/bus"
	"github.com/tidewaiter/tidewaiter/libs/registry"
	"github.com/tidewaiter/tidewaiter/libs/store"
	"github.com/tidewaiter/tidewaiter/libs/store/storetest"
	"github.com/tidewaiter/tidewaiter/services/advisor/advisortest"
	"github.com/tidewaiter/tidewaiter/services/advisor/artefact"
)

// outbox is a Publisher that keeps what it was given.
type outbox struct {
	events []event.Event
	err    error
}

func (o *outbox) Publish(_ context.Context, events ...event.Event) error {
	if o.err == nil {
		o.events = append(o.events, events...)
	}
	return o.err
}

// archive returns a zip of OSV records of npm packages: name → version that mends it.
func archive(t *testing.T, modified string, fixed map[string]string) []byte {
	t.Helper()
	var b bytes.Buffer
	z := zip.NewWriter(&b)
	for name, version := range fixed {
		w, err := z.Create("T-" + name + ".json")
		if err != nil {
			t.Fatal(err)
		}
		_, err = fmt.Fprintf(w, `{"id":"T-%s","modified":%q,"affected":[{"package":{"ecosystem":"npm","name":%q},
			"ranges":[{"type":"SEMVER","events":[{"introduced":"0"},{"fixed":%q}]}]}]}`, name, modified, name, version)
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

type fixture struct {
	t        *testing.T
	cfg      Config
	db       *store.DB
	registry *advisortest.Registry
	out      *outbox
	s        *Service
}

func newFixture(t *testing.T, from ...string) *fixture {
	t.Helper()
	dir := t.TempDir()
	private, _, err := artefact.GenerateKey()
	if err != nil {
		t.Fatal(err)
	}
	cfg := DefaultConfig()
	cfg.From, cfg.Ecosystems, cfg.Work, cfg.Publish = from, []string{"npm", "Go"}, filepath.Join(dir, "work"), "r.example/advisories"
	cfg.KeyFile = filepath.Join(dir, "key")
	if err := os.WriteFile(cfg.KeyFile, private, 0o600); err != nil {
		t.Fatal(err)
	}
	f := &fixture{t: t, cfg: cfg, db: storetest.Open(t), registry: advisortest.New(), out: &outbox{}}
	f.restart()
	return f
}

func (f *fixture) restart() {
	f.t.Helper()
	s, err := New(f.t.Context(), f.cfg, f.db, f.registry, f.out, slog.New(slog.DiscardHandler))
	if err != nil {
		f.t.Fatal(err)
	}
	f.s = s
}

// poll polls and returns the events that were sent.
func (f *fixture) poll() []contracts.AdvisoriesChanged {
	f.t.Helper()
	if _, err := f.s.Poll(f.t.Context()); err != nil {
		f.t.Fatal(err)
	}
	return f.sent()
}

func (f *fixture) sent() []contracts.AdvisoriesChanged {
	f.t.Helper()
	var all []contracts.AdvisoriesChanged
	for _, ev := range f.out.events {
		d, err := bus.Decode[contracts.AdvisoriesChanged](ev)
		if err != nil {
			f.t.Fatal(err)
		}
		all = append(all, d)
	}
	f.out.events = nil
	return all
}

func (f *fixture) delta(d contracts.AdvisoriesChanged) []string {
	f.t.Helper()
	content, err := f.db.Blob(f.t.Context(), d.Delta.Digest)
	if err != nil {
		f.t.Fatal(err)
	}
	var delta contracts.AdvisoriesDelta
	if err := json.Unmarshal(content, &delta); err != nil {
		f.t.Fatal(err)
	}
	var names []string
	for _, p := range delta.Packages {
		names = append(names, p.Name)
	}
	return names
}

func put(t *testing.T, dir string, content []byte) {
	t.Helper()
	name := filepath.Join(dir, "npm.zip")
	if err := os.WriteFile(name+".new", content, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(name+".new", name); err != nil {
		t.Fatal(err)
	}
}

// locked is an outbox for several replicas.
type locked struct {
	mu sync.Mutex
	*outbox
}

func (l *locked) Publish(ctx context.Context, events ...event.Event) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.outbox.Publish(ctx, events...)
}

// TestTwoReplicas: replicas whose timers go off at once publish a change once.
func TestTwoReplicas(t *testing.T) {
	dir := t.TempDir()
	content := func(names ...string) []byte {
		fixed := map[string]string{}
		for _, n := range names {
			fixed[n] = "1.0.0"
		}
		return archive(t, "2026-05-01T00:00:00Z", fixed)
	}
	put(t, dir, content("a"))
	f := newFixture(t, dir)
	out := &locked{outbox: f.out}
	var replicas []*Service
	for i := range 3 {
		cfg := f.cfg
		cfg.Work = filepath.Join(t.TempDir(), fmt.Sprint(i))
		s, err := New(t.Context(), cfg, f.db, f.registry, out, slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		replicas = append(replicas, s)
	}
	last := int64(0)
	for _, names := range [][]string{{"a"}, {"a", "b"}, {"a", "b", "c"}} {
		put(t, dir, content(names...))
		for range 2 { // the second time there is nothing new
			var group sync.WaitGroup
			for _, s := range replicas {
				group.Go(func() {
					if _, err := s.Poll(t.Context()); err != nil {
						t.Error(err)
					}
				})
			}
			group.Wait()
		}
		sent := f.sent()
		if len(sent) != 1 || sent[0].Snapshot.Sequence <= last || sent[0].Records != len(names) {
			t.Fatalf("%v: sent %+v", names, sent)
		}
		last = sent[0].Snapshot.Sequence
	}
}

// TestPublish: a snapshot a change, with a sequence above the last one's even
// where the newest date does not rise; nothing for nobody otherwise.
func TestPublish(t *testing.T) {
	const future, now = "2031-01-01T00:00:00Z", "2026-05-01T00:00:00Z"
	dir := t.TempDir()
	put(t, dir, archive(t, future, map[string]string{"a": "1.0.0", "b": "1.0.0"}))
	f := newFixture(t, dir)
	f.cfg.Keep = 2
	f.restart()
	first := f.poll()
	if len(first) != 1 || first[0].Previous != nil || first[0].Delta != nil || first[0].Records != 2 {
		t.Fatalf("first: %+v", first)
	}
	if again := f.poll(); again != nil {
		t.Errorf("nothing changed, and was published: %+v", again)
	}
	put(t, dir, archive(t, future, map[string]string{"a": "1.0.0", "b": "1.0.0"}))
	f.restart() // what was compiled before is not known
	if again := f.poll(); again != nil {
		t.Errorf("the same content in another file was published: %+v", again)
	}
	put(t, dir, archive(t, future, map[string]string{"a": "1.0.1", "b": "1.0.0"}))
	second := f.poll()
	if len(second) != 1 || *second[0].Previous != first[0].Snapshot || second[0].Snapshot.Sequence != first[0].Snapshot.Sequence+1 {
		t.Fatalf("second: %+v after %+v", second, first)
	}
	if got := f.delta(second[0]); len(got) != 1 || got[0] != "a" || second[0].Changed != 1 {
		t.Errorf("delta %v", got)
	}
	put(t, dir, archive(t, now, map[string]string{"b": "1.0.0"}))
	third := f.poll()
	if len(third) != 1 || third[0].Snapshot.Sequence != second[0].Snapshot.Sequence+1 {
		t.Fatalf("third: %+v", third)
	}
	if f.registry.Manifests() != 2 {
		t.Errorf("%d snapshots are kept, want 2", f.registry.Manifests())
	}
	keys := f.s.public()
	p, err := artefact.Look(t.Context(), f.registry, f.s.to, "", keys)
	if err != nil || p.Snapshot != third[0].Snapshot || p.Location != third[0].Location {
		t.Errorf("the newest is %+v, %v", p, err)
	}
}

// TestPublishSurvives: Kafka, the registry, the database's memory may go away
// at any moment: what was published is said, once it can be, with the same id.
func TestPublishSurvives(t *testing.T) {
	dir := t.TempDir()
	put(t, dir, archive(t, "2026-05-01T00:00:00Z", map[string]string{"a": "1.0.0"}))
	f := newFixture(t, dir)
	f.registry.Fail(registry.ErrUnavailable)
	if _, err := f.s.Poll(t.Context()); !errors.Is(err, registry.ErrUnavailable) {
		t.Fatalf("got %v", err)
	}
	f.registry.Fail(nil)
	f.out.err = errors.New("kafka is away")
	if _, err := f.s.Poll(t.Context()); !errors.Is(err, f.out.err) {
		t.Fatalf("got %v", err)
	}
	f.out.err = nil
	f.restart()
	first := f.poll()
	if len(first) != 1 {
		t.Fatalf("got %+v", first)
	}
	if again := f.poll(); again != nil {
		t.Errorf("said twice: %+v", again)
	}
	// a new database and work folder: the registry remembers
	put(t, dir, archive(t, "2026-05-01T00:00:00Z", map[string]string{"a": "1.0.1"}))
	f.db, f.cfg.Work = storetest.Open(t), filepath.Join(t.TempDir(), "work")
	f.restart()
	second := f.poll()
	if len(second) != 1 || second[0].Previous == nil || *second[0].Previous != first[0].Snapshot || second[0].Snapshot.Sequence <= first[0].Snapshot.Sequence {
		t.Errorf("got %+v after %+v", second, first)
	}
}

// TestSnapshotFile: a snapshot that was compiled elsewhere is published as it is.
func TestSnapshotFile(t *testing.T) {
	dir := t.TempDir()
	put(t, dir, archive(t, "2026-05-01T00:00:00Z", map[string]string{"a": "1.0.0"}))
	compiled := newFixture(t, dir)
	first := compiled.poll()
	f := newFixture(t, filepath.Join(compiled.s.folder(), artefact.FileName(first[0].Snapshot)))
	if got := f.poll(); len(got) != 1 || got[0].Snapshot != first[0].Snapshot {
		t.Errorf("got %+v, want %+v", got, first)
	}
}

// upstream is a host of archives that behaves as told.
type upstream struct {
	mu       sync.Mutex
	content  []byte
	etag     string
	status   int
	cut      bool // announces more than it sends
	requests int
	sent304  int
}

func (u *upstream) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.requests++
	switch {
	case !strings.HasSuffix(r.URL.Path, "/npm/all.zip"):
		http.NotFound(w, r)
	case u.status != 0:
		if u.status == http.StatusFound {
			w.Header().Set("Location", "http://169.254.169.254/latest")
		}
		w.WriteHeader(u.status)
	case r.Header.Get("If-None-Match") == u.etag:
		u.sent304++
		w.WriteHeader(http.StatusNotModified)
	default:
		w.Header().Set("ETag", u.etag)
		if u.cut {
			w.Header().Set("Content-Length", fmt.Sprint(len(u.content)+10))
		}
		_, _ = w.Write(u.content) // the client may go away
	}
}

func (u *upstream) set(content []byte, etag string, status int, cut bool) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.content, u.etag, u.status, u.cut = content, etag, status, cut
}

func TestDownload(t *testing.T) {
	u := &upstream{}
	server := httptest.NewServer(u)
	defer server.Close()
	one := archive(t, "2026-05-01T00:00:00Z", map[string]string{"a": "1.0.0"})
	two := archive(t, "2026-05-02T00:00:00Z", map[string]string{"a": "1.0.1"})

	f := newFixture(t, server.URL+"/osv/")
	u.set(nil, "", http.StatusBadGateway, false)
	if _, err := f.s.Poll(t.Context()); !errors.Is(err, ErrDownload) {
		t.Fatalf("without anything downloaded: %v", err)
	}
	u.set(one, `"1"`, 0, false)
	if got := f.poll(); len(got) != 1 {
		t.Fatalf("got %+v", got)
	}
	f.restart() // what was seen is in the database
	if got := f.poll(); got != nil || u.sent304 != 1 {
		t.Errorf("published %+v, answered 304 %d times", got, u.sent304)
	}
	for name, bad := range map[string]func(){
		"error":        func() { u.set(nil, `"2"`, http.StatusInternalServerError, false) },
		"gone":         func() { u.set(nil, `"2"`, http.StatusNotFound, false) },
		"cut off":      func() { u.set(two, `"2"`, 0, true) },
		"half archive": func() { u.set(two[:len(two)/2], `"2"`, 0, false) },
		"no archive":   func() { u.set([]byte("<html>"), `"2"`, 0, false) },
		"stray":        func() { u.set(nil, `"2"`, http.StatusFound, false) },
		"huge": func() {
			u.set(append(bytes.Clone(two), make([]byte, 5000)...), `"2"`, 0, false)
			f.s.sources.limit = 4000
		},
		"huge, chunked": func() { f.s.sources.limit = int64(len(two)) - 1; u.set(two, `"2"`, 0, false) },
	} {
		bad()
		if got := f.poll(); got != nil {
			t.Errorf("%s: published %+v", name, got)
		}
		f.s.sources.limit = MaxDownload
	}
	u.set(two, `"2"`, 0, false)
	if got := f.poll(); len(got) != 1 || len(f.delta(got[0])) != 1 {
		t.Errorf("got %+v", got)
	}
	// the file is lost: the condition is not sent
	if err := os.RemoveAll(f.s.sources.folder(f.cfg.From[0])); err != nil {
		t.Fatal(err)
	}
	if got := f.poll(); got != nil {
		t.Errorf("the same again was published: %+v", got)
	}
}

func TestConfig(t *testing.T) {
	good := DefaultConfig()
	good.From, good.Work, good.KeyFile, good.Publish = []string{"dir"}, "work", "key", "r.example/a"
	if err := good.Validate(); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(c *Config){
		"no source":   func(c *Config) { c.From = nil },
		"no work":     func(c *Config) { c.Work = "" },
		"no key":      func(c *Config) { c.KeyFile = "" },
		"credentials": func(c *Config) { c.From = []string{"https://user:secret@example.com/"} },
		"no host":     func(c *Config) { c.KEV = "https:///kev" },
		"publish":     func(c *Config) { c.Publish = "r.example" },
		"poll":        func(c *Config) { c.Poll = 0 },
		"keep":        func(c *Config) { c.Keep = 1 },
	} {
		c := good
		change(&c)
		err := c.Validate()
		if err == nil {
			t.Errorf("%s: no error", name)
		} else if strings.Contains(err.Error(), "secret") {
			t.Errorf("%s: a secret is shown: %v", name, err)
		}
	}
}
