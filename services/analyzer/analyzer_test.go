package analyzer

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/alicebob/miniredis/v2"
	"github.com/cloudevents/sdk-go/v2/event"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/bus"
	"github.com/tidewaiter/tidewaiter/libs/redis"
	"github.com/tidewaiter/tidewaiter/libs/registry"
	"github.com/tidewaiter/tidewaiter/libs/store"
	"github.com/tidewaiter/tidewaiter/libs/store/storetest"
	"github.com/tidewaiter/tidewaiter/services/analyzer/layer"
	lt "github.com/tidewaiter/tidewaiter/services/analyzer/layertest"
	"github.com/tidewaiter/tidewaiter/services/analyzer/worker"
)

// blobs is a registry that holds blobs by digest, or fails.
type blobs struct {
	mu    sync.Mutex
	have  map[string][]byte
	fail  error
	opens int
}

func (b *blobs) Blob(_ context.Context, _, _ string, d ocispec.Descriptor) (io.ReadCloser, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.opens++
	if b.fail != nil {
		return nil, b.fail
	}
	content, ok := b.have[d.Digest.String()]
	if !ok {
		return nil, &registry.Error{Kind: registry.ErrNotFound, What: "blob"}
	}
	return io.NopCloser(bytes.NewReader(content)), nil
}

// fixture is a fleet of one database, one Redis and one registry.
type fixture struct {
	t       *testing.T
	url     string
	redis   *miniredis.Miniredis
	reg     *blobs
	calls   atomic.Int64
	gate    chan struct{} // when set, every analysis waits for it
	entered chan struct{} // receives whenever an analysis begins
	report  func(*contracts.LayerReport)
	n       atomic.Int64
}

func newFixture(t *testing.T) *fixture {
	t.Helper()
	m := miniredis.NewMiniRedis()
	m.ClockTTL(true)
	if err := m.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(m.Close)
	return &fixture{
		t: t, url: storetest.URL(t), redis: m, reg: &blobs{have: map[string][]byte{}},
		entered: make(chan struct{}, 1000),
	}
}

// instance returns an analyzer with connections of its own.
func (f *fixture) instance() *Service {
	f.t.Helper()
	leases, err := redis.Open(redis.Config{URL: "redis://" + f.redis.Addr() + "/0"})
	if err != nil {
		f.t.Fatal(err)
	}
	f.t.Cleanup(func() { _ = leases.Close() })
	cfg := DefaultConfig()
	cfg.LeaseTTL = time.Second
	cfg.Attempts = 3
	s, err := New(f.t.Context(), cfg, storetest.OpenURL(f.t, f.url), leases, f.reg, f.analyze, slog.New(slog.DiscardHandler), prometheus.NewRegistry())
	if err != nil {
		f.t.Fatal(err)
	}
	return s
}

func (f *fixture) analyze(ctx context.Context, r io.Reader, o layer.Options) (*contracts.LayerReport, time.Duration, error) {
	f.calls.Add(1)
	f.entered <- struct{}{}
	if f.gate != nil {
		select {
		case <-f.gate:
		case <-ctx.Done():
			return nil, 0, ctx.Err()
		}
	}
	rep, err := layer.Analyze(ctx, r, o)
	if err == nil && f.report != nil {
		f.report(rep)
	}
	return rep, 5 * time.Millisecond, err
}

func (f *fixture) push(name string) contracts.LayerRequested {
	l := lt.Gzip(lt.Text("a/node_modules/"+name+"/package.json", `{"name":"`+name+`","version":"1.0.0"}`))
	f.reg.mu.Lock()
	defer f.reg.mu.Unlock()
	f.reg.have[l.Digest] = l.Compressed
	return contracts.LayerRequested{
		Digest: l.Digest, MediaType: l.MediaType, Size: int64(len(l.Compressed)), Source: "src",
		Image: contracts.Image{Registry: "r.example", Repository: "shop", Digest: lt.Digest([]byte("image"))},
	}
}

func (f *fixture) event(req contracts.LayerRequested) event.Event {
	f.t.Helper()
	ev, err := bus.NewEvent(contracts.LayerRequestedV1, req.Digest, req)
	if err != nil {
		f.t.Fatal(err)
	}
	ev.SetID(fmt.Sprint("event-", f.n.Add(1)))
	ev.SetSource("/services/planner")
	return ev
}

func analyzed(t *testing.T, out []event.Event) contracts.LayerAnalyzed {
	t.Helper()
	if len(out) != 1 || out[0].Type() != contracts.TypePrefix+contracts.LayerAnalyzedV1 {
		t.Fatalf("out: %v", out)
	}
	d, err := bus.Decode[contracts.LayerAnalyzed](out[0])
	if err != nil {
		t.Fatal(err)
	}
	if out[0].Subject() != d.Digest || out[0].Extensions()[contracts.ExtDataRef] != d.Report.Digest {
		t.Errorf("subject %q, dataref %v", out[0].Subject(), out[0].Extensions()[contracts.ExtDataRef])
	}
	return d
}

func handle(t *testing.T, s *Service, ev event.Event) []event.Event {
	t.Helper()
	out, err := s.Handle(t.Context(), ev)
	if err != nil {
		t.Fatalf("Handle: %v", err)
	}
	return out
}

func TestAnalysedOnceThenReused(t *testing.T) {
	f := newFixture(t)
	s := f.instance()
	req := f.push("x")
	first := f.event(req)
	a := analyzed(t, handle(t, s, first))
	if a.Reused || a.Packages != 1 || a.Gaps != 0 || a.Bytes == 0 || a.CPUMs != 5 || a.Analyzer != layer.Version {
		t.Errorf("first: %+v", a)
	}
	content, err := s.db.Blob(t.Context(), a.Report.Digest)
	if err != nil || int64(len(content)) != a.Report.Size {
		t.Fatalf("blob: %d bytes of %d, %v", len(content), a.Report.Size, err)
	}
	var rep contracts.LayerReport
	if err := json.Unmarshal(content, &rep); err != nil || rep.Digest != req.Digest || len(rep.Packages) != 1 {
		t.Fatalf("report %+v, %v", rep, err)
	}

	// A redelivery gets the very same output.
	one, two := handle(t, s, first), handle(t, f.instance(), first)
	if one[0].ID() != two[0].ID() || analyzed(t, one) != a || analyzed(t, two) != a {
		t.Errorf("redelivered: %v, %v, want %+v", one, two, a)
	}
	// Another event learns of it at once, with nothing read.
	b := analyzed(t, handle(t, f.instance(), f.event(req)))
	if !b.Reused || b.Report != a.Report || b.CPUMs != 0 || b.Packages != a.Packages || b.Bytes != a.Bytes {
		t.Errorf("reused: %+v", b)
	}
	if f.calls.Load() != 1 || f.reg.opens != 1 {
		t.Errorf("%d analyses, %d reads", f.calls.Load(), f.reg.opens)
	}
}

func TestLostReportIsMadeAgain(t *testing.T) {
	f := newFixture(t)
	s := f.instance()
	req := f.push("x")
	a := analyzed(t, handle(t, s, f.event(req)))
	if _, err := s.db.ExecContext(t.Context(), "DELETE FROM blobs"); err != nil {
		t.Fatal(err)
	}
	b := analyzed(t, handle(t, s, f.event(req)))
	if b.Reused || b.Report != a.Report || f.calls.Load() != 2 {
		t.Errorf("after the blob expired: %+v, %d analyses", b, f.calls.Load())
	}
}

func TestTakenByAnotherEvent(t *testing.T) {
	f := newFixture(t)
	f.gate = make(chan struct{})
	req := f.push("x")
	winner := make(chan []event.Event, 1)
	w := f.instance()
	go func() {
		out, err := w.Handle(t.Context(), f.event(req))
		if err != nil {
			t.Errorf("winner: %v", err)
		}
		winner <- out
	}()
	<-f.entered
	if out := handle(t, f.instance(), f.event(req)); len(out) != 0 {
		t.Errorf("the other event emits %v", out)
	}
	close(f.gate)
	analyzed(t, <-winner)
	if f.calls.Load() != 1 {
		t.Errorf("%d analyses", f.calls.Load())
	}
}

func TestManyEventsOneAnalysis(t *testing.T) {
	f := newFixture(t)
	f.gate = make(chan struct{})
	req := f.push("x")
	instances := []*Service{f.instance(), f.instance()}
	var wg sync.WaitGroup
	var announced atomic.Int64
	for i := range 40 {
		ev := f.event(req)
		wg.Go(func() {
			out, err := instances[i%2].Handle(t.Context(), ev)
			if err != nil {
				t.Errorf("Handle: %v", err)
			}
			announced.Add(int64(len(out)))
		})
	}
	<-f.entered
	close(f.gate)
	wg.Wait()
	if f.calls.Load() != 1 || announced.Load() < 1 {
		t.Errorf("%d analyses, %d announcements", f.calls.Load(), announced.Load())
	}
}

// A redelivery of the event that holds the lease waits, and takes over when the
// first delivery died.
func TestRedeliveryTakesOver(t *testing.T) {
	f := newFixture(t)
	req := f.push("x")
	ev := f.event(req)
	dead, err := redis.Open(redis.Config{URL: "redis://" + f.redis.Addr() + "/0"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = dead.Close() })
	lease, err := dead.Acquire(t.Context(), "layer/"+layer.Version+"/"+req.Digest, ev.ID(), 700*time.Millisecond)
	if err != nil {
		t.Fatal(err)
	}
	s := f.instance()
	analyzed(t, handle(t, s, ev))
	var token int64
	if err := s.db.QueryRowContext(t.Context(), "SELECT token FROM analyzer_layers WHERE layer = $1", req.Digest).Scan(&token); err != nil {
		t.Fatal(err)
	}
	if token <= lease.Token {
		t.Errorf("token %d, the dead one had %d", token, lease.Token)
	}
}

func TestWithoutRedis(t *testing.T) {
	f := newFixture(t)
	s := f.instance()
	f.redis.Close()
	if a := analyzed(t, handle(t, s, f.event(f.push("x")))); a.Reused {
		t.Errorf("%+v", a)
	}
}

func TestRedisFlushedWhileWorking(t *testing.T) {
	f := newFixture(t)
	f.gate = make(chan struct{})
	req := f.push("x")
	ev := f.event(req)
	s := f.instance()
	first := make(chan error, 1)
	go func() {
		_, err := s.Handle(t.Context(), ev)
		first <- err
	}()
	<-f.entered
	f.redis.FlushAll()
	if err := <-first; !errors.Is(err, redis.ErrLost) {
		t.Fatalf("with its lease lost: %v", err)
	}
	close(f.gate)
	analyzed(t, handle(t, s, ev)) // the bus tries again in place
}

// Two instances that both believe they hold the layer announce one report.
func TestTwoFinish(t *testing.T) {
	f := newFixture(t)
	one, two := f.instance(), f.instance()
	req := f.push("x")
	first := contracts.LayerReport{Analyzer: layer.Version, Digest: req.Digest, Bytes: 1}
	second := contracts.LayerReport{Analyzer: layer.Version, Digest: req.Digest, Bytes: 2}
	a, err := one.finish(t.Context(), f.event(req), req, &first, 0, 7)
	if err != nil {
		t.Fatal(err)
	}
	b, err := two.finish(t.Context(), f.event(req), req, &second, 0, 5)
	if err != nil {
		t.Fatal(err)
	}
	if x, y := analyzed(t, a), analyzed(t, b); x.Report != y.Report || y.Bytes != 1 {
		t.Errorf("%+v, %+v", x, y)
	}
	var token int64
	if err := one.db.QueryRowContext(t.Context(), "SELECT token FROM analyzer_layers").Scan(&token); err != nil || token != 7 {
		t.Errorf("token %d, %v: it never goes down", token, err)
	}
}

func TestRegistryFailures(t *testing.T) {
	cases := []struct {
		kind   error
		reason string // of layer.failed; "": tried later
	}{
		{registry.ErrNotFound, ReasonNotFound},
		{registry.ErrUnauthorized, ReasonUnauthorized},
		{registry.ErrNotConfigured, ReasonNotConfigured},
		{registry.ErrForbiddenHost, ReasonForbiddenHost},
		{registry.ErrRefused, ReasonRefused},
		{registry.ErrThrottled, ""},
		{registry.ErrUnavailable, ""},
		{registry.ErrDigestMismatch, ""}, // a fact only when it lasts: e2e has that
		{registry.ErrTooLarge, ""},
	}
	for _, c := range cases {
		t.Run(c.kind.Error(), func(t *testing.T) {
			f := newFixture(t)
			f.reg.fail = &registry.Error{Kind: c.kind, What: "blob"}
			s := f.instance()
			req := f.push("x")
			req.Attempt = 2
			ev := f.event(req)
			out, err := s.Handle(t.Context(), ev)
			if c.reason == "" {
				if outcome, at := bus.Classify(err); outcome != bus.OutcomeLater || !at.After(time.Now()) {
					t.Fatalf("outcome %v at %v of %v", outcome, at, err)
				}
				f.reg.fail = nil // and then it works: the lease is not in the way
				analyzed(t, handle(t, s, ev))
				return
			}
			if err != nil || len(out) != 1 {
				t.Fatalf("%v, %v", out, err)
			}
			d, err := bus.Decode[contracts.LayerFailed](out[0])
			if err != nil || d.Reason != c.reason || d.Image != req.Image || d.Attempt != 2 || d.Message == "" {
				t.Errorf("%+v, %v", d, err)
			}
			// It is this repository's failure: another one may have the layer.
			f.reg.fail = nil
			analyzed(t, handle(t, s, f.event(req)))
		})
	}
}

func TestCrashIsTriedOnceMore(t *testing.T) {
	for _, crashes := range []int64{1, 2} {
		t.Run(fmt.Sprint(crashes), func(t *testing.T) {
			f := newFixture(t)
			f.report = func(r *contracts.LayerReport) {
				if f.calls.Load() <= crashes {
					*r = contracts.LayerReport{Analyzer: r.Analyzer, Digest: r.Digest, Gaps: []contracts.Gap{{Reason: worker.CrashReason + "x"}}}
				}
			}
			a := analyzed(t, handle(t, f.instance(), f.event(f.push("x"))))
			if want := int(crashes - 1); a.Gaps != want || f.calls.Load() != 2 {
				t.Errorf("%d gaps, want %d, after %d analyses", a.Gaps, want, f.calls.Load())
			}
		})
	}
}

func TestInvalidRequests(t *testing.T) {
	f := newFixture(t)
	s := f.instance()
	good := f.push("x")
	for name, change := range map[string]func(*contracts.LayerRequested){
		"digest":   func(r *contracts.LayerRequested) { r.Digest = "sha256:../../x" },
		"registry": func(r *contracts.LayerRequested) { r.Image.Registry = "a b" },
		"size":     func(r *contracts.LayerRequested) { r.Size = -1 },
	} {
		req := good
		change(&req)
		ev := f.event(req)
		_, err := s.Handle(t.Context(), ev)
		if outcome, _ := bus.Classify(err); outcome != bus.OutcomePermanent {
			t.Errorf("%s: %v", name, err)
		}
		if out := s.Dead(ev, err); len(out) != 0 {
			t.Errorf("%s: nothing can be said of it, but %v", name, out)
		}
	}
	out := s.Dead(f.event(good), errors.New("tried often enough"))
	if len(out) != 1 {
		t.Fatalf("dead: %v", out)
	}
	if d, err := bus.Decode[contracts.LayerFailed](out[0]); err != nil || d.Reason != ReasonInternal || d.Digest != good.Digest {
		t.Errorf("dead: %+v, %v", d, err)
	}
}

func TestDatabaseAway(t *testing.T) {
	f := newFixture(t)
	s := f.instance()
	other, err := store.Open(t.Context(), storetest.URL(t))
	if err != nil {
		t.Fatal(err)
	}
	if err := other.Close(); err != nil {
		t.Fatal(err)
	}
	s.db = other
	if _, err := s.Handle(t.Context(), f.event(f.push("x"))); err == nil {
		t.Error("no error without a database")
	}
}

func TestConfig(t *testing.T) {
	if err := DefaultConfig().Validate(); err != nil {
		t.Errorf("defaults: %v", err)
	}
	if err := (Config{Limits: Limits{Entries: -1}}).Validate(); err == nil {
		t.Error("everything is wrong, and nothing is said")
	}
}
