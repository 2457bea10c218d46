package matcher

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/cloudevents/sdk-go/v2/event"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/bus"
	"github.com/tidewaiter/tidewaiter/libs/store"
	"github.com/tidewaiter/tidewaiter/services/advisor/builtin"
	"github.com/tidewaiter/tidewaiter/services/advisor/compile"
)

// memory keeps blobs, and fails with err while that is set.
type memory struct {
	mu    sync.Mutex
	blobs map[string][]byte
	err   error
}

func (m *memory) Blob(_ context.Context, digest string) ([]byte, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.err != nil {
		return nil, m.err
	}
	b, ok := m.blobs[digest]
	if !ok {
		return nil, store.ErrNotFound
	}
	return b, nil
}

func (m *memory) PutBlob(_ context.Context, content []byte) (string, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	digest := contracts.DigestOf(content)
	m.blobs[digest] = content
	return digest, m.err
}

func image() contracts.Image {
	return contracts.Image{Registry: "registry.example", Repository: "team/app", Digest: contracts.DigestOf([]byte("manifest"))}
}

// stored returns blobs that hold an inventory with one vulnerable package.
func stored(t *testing.T) (*memory, contracts.Blob) {
	t.Helper()
	b, err := json.Marshal(contracts.Inventory{
		Digest: image().Digest, Kind: "image", Analyzer: "1",
		Packages: []contracts.Package{{PURL: "pkg:npm/lodash@4.17.4", Name: "lodash", Version: "4.17.4", Ecosystem: "npm"}},
	})
	if err != nil {
		t.Fatal(err)
	}
	m := &memory{blobs: map[string][]byte{}}
	digest, err := m.PutBlob(t.Context(), b)
	if err != nil {
		t.Fatal(err)
	}
	return m, contracts.Blob{Digest: digest, Size: int64(len(b))}
}

func newEvent(t *testing.T, name string, data any) event.Event {
	t.Helper()
	ev, err := bus.NewEvent(name, image().String(), data)
	if err != nil {
		t.Fatal(err)
	}
	ev.SetID("in-1")
	ev.SetSource("/services/test")
	return ev
}

func newService(t *testing.T, blobs Blobs, advisories string) *Service {
	t.Helper()
	cfg := DefaultConfig()
	cfg.Advisories = advisories
	s, err := New(cfg, blobs, nil, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

func builtinFile(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "advisories.db")
	if err := builtin.Write(path); err != nil {
		t.Fatal(err)
	}
	return path
}

// replace puts the built-in advisories with another sequence in a file's place.
func replace(t *testing.T, path string, sequence int64) {
	t.Helper()
	dir := t.TempDir()
	if err := builtin.Unpack(dir); err != nil {
		t.Fatal(err)
	}
	if _, err := compile.Build(t.Context(), compile.Options{From: []string{dir}, Out: path, Sequence: &sequence}); err != nil {
		t.Fatal(err)
	}
}

func TestAssembledBecomesMatched(t *testing.T) {
	blobs, inventory := stored(t)
	s := newService(t, blobs, builtinFile(t))
	in := newEvent(t, contracts.ImageAssembledV1, contracts.ImageAssembled{Image: image(), Source: "harbor", Tag: "v1", Kind: "image", Inventory: inventory, Analyzer: "1"})
	out, err := s.Handle(t.Context(), in)
	if err != nil || len(out) != 1 {
		t.Fatalf("%d events, %v", len(out), err)
	}
	if out[0].Type() != contracts.TypePrefix+contracts.ImageMatchedV1 || out[0].Subject() != image().String() || out[0].Extensions()[contracts.ExtKey] != image().Digest {
		t.Errorf("event %s", out[0])
	}
	got, err := bus.Decode[contracts.ImageMatched](out[0])
	if err != nil {
		t.Fatal(err)
	}
	if got.Image != image() || got.Source != "harbor" || got.Tag != "v1" || got.Verdict != contracts.VerdictFail || got.Counts.Total() != 6 ||
		got.Inventory != inventory || got.Snapshot.Sequence == 0 || !contracts.ValidDigest(got.Snapshot.Digest) || got.MatchedAt.IsZero() || got.Packages != 1 {
		t.Errorf("%+v", got)
	}
	content, err := blobs.Blob(t.Context(), got.Report.Digest)
	if err != nil {
		t.Fatal(err)
	}
	var report contracts.Report
	if err := json.Unmarshal(content, &report); err != nil {
		t.Fatal(err)
	}
	if len(report.Findings) != 6 || report.Inventory != inventory.Digest || report.Policy != got.Policy || int64(len(content)) != got.Report.Size {
		t.Errorf("report %+v", report)
	}
	again, err := s.Handle(t.Context(), in)
	if err != nil {
		t.Fatal(err)
	}
	if second, _ := bus.Decode[contracts.ImageMatched](again[0]); second.Report != got.Report {
		t.Error("a redelivery made another report")
	}
}

func TestWithoutSnapshotNothingIsClean(t *testing.T) {
	blobs, inventory := stored(t)
	path := filepath.Join(t.TempDir(), "advisories.db")
	s := newService(t, blobs, path)
	in := newEvent(t, contracts.ImageAssembledV1, contracts.ImageAssembled{Image: image(), Inventory: inventory})
	if outcome := outcomeOf(s.Handle(t.Context(), in)); outcome != bus.OutcomeUnavailable {
		t.Errorf("outcome %v, want unavailable", outcome)
	}
	if s.holder.ready() == nil {
		t.Error("ready without a snapshot")
	}
	if outcome := outcomeOf(newService(t, blobs, "").Handle(t.Context(), in)); outcome != bus.OutcomeUnavailable {
		t.Errorf("without a path: outcome %v, want unavailable", outcome)
	}
	if err := builtin.Write(path); err != nil {
		t.Fatal(err)
	}
	if outcome := outcomeOf(s.Handle(t.Context(), in)); outcome != bus.OutcomeOK {
		t.Errorf("once it is there: outcome %v", outcome)
	}
	if err := s.holder.ready(); err != nil {
		t.Errorf("not ready with a snapshot: %v", err)
	}
}

func outcomeOf(_ []event.Event, err error) bus.Outcome {
	outcome, _ := bus.Classify(err)
	return outcome
}

func TestRematchWaitsForItsSnapshot(t *testing.T) {
	blobs, inventory := stored(t)
	path := builtinFile(t)
	replace(t, path, 100)
	s := newService(t, blobs, path)
	request := func(sequence int64) event.Event {
		return newEvent(t, contracts.ImageRematchV1, contracts.ImageRematch{
			Image: image(), Kind: "image", Inventory: inventory, Snapshot: contracts.SnapshotRef{Sequence: sequence}, Reason: "advisories",
		})
	}
	if outcome := outcomeOf(s.Handle(t.Context(), request(100))); outcome != bus.OutcomeOK {
		t.Errorf("the snapshot here: %v", outcome)
	}
	_, err := s.Handle(t.Context(), request(200))
	if outcome, at := bus.Classify(err); outcome != bus.OutcomeLater || !at.After(time.Now()) {
		t.Errorf("a newer snapshot: %v at %s", outcome, at)
	}
	replace(t, path, 200)
	out, err := s.Handle(t.Context(), request(200))
	if err != nil {
		t.Fatalf("after it came: %v", err)
	}
	if got, _ := bus.Decode[contracts.ImageMatched](out[0]); got.Snapshot.Sequence != 200 {
		t.Errorf("matched with sequence %d", got.Snapshot.Sequence)
	}
}

// TestReplacedWhileInUse: a snapshot is given back only after its last user.
func TestReplacedWhileInUse(t *testing.T) {
	path := builtinFile(t)
	replace(t, path, 1)
	blobs, _ := stored(t)
	s := newService(t, blobs, path)
	l, release, err := s.holder.acquire(t.Context(), 0, "")
	if err != nil {
		t.Fatal(err)
	}
	replace(t, path, 2)
	if changed, err := s.holder.reload(); err != nil || !changed {
		t.Fatalf("changed %v, %v", changed, err)
	}
	p := contracts.Package{Ecosystem: "npm", Name: "minimist", Version: "1.2.0"}
	if got := l.matcher.Package(&p).Findings(); len(got) != 2 {
		t.Errorf("%d findings from a replaced snapshot in use", len(got))
	}
	release()
	if l.users != 0 || !l.replaced {
		t.Errorf("%d users, replaced %v", l.users, l.replaced)
	}
	next, done, err := s.holder.acquire(t.Context(), 2, "")
	if err != nil {
		t.Fatal(err)
	}
	defer done()
	if next.snapshot.Sequence() != 2 {
		t.Errorf("sequence %d", next.snapshot.Sequence())
	}
}

func TestBadInputs(t *testing.T) {
	blobs, inventory := stored(t)
	s := newService(t, blobs, builtinFile(t))
	missing := contracts.ImageAssembled{Image: image(), Tag: "v1", Inventory: contracts.Blob{Digest: contracts.DigestOf([]byte("gone"))}}
	in := newEvent(t, contracts.ImageAssembledV1, missing)
	_, err := s.Handle(t.Context(), in)
	if outcome, _ := bus.Classify(err); outcome != bus.OutcomePermanent || !errors.Is(err, store.ErrNotFound) {
		t.Errorf("missing inventory: %v, %v", outcome, err)
	}
	dead := s.dead(in, err)
	if len(dead) != 1 {
		t.Fatalf("%d events for a dead letter", len(dead))
	}
	failed, err := bus.Decode[contracts.ImageFailed](dead[0])
	if err != nil || failed.Digest != image().Digest || failed.Stage != Name || failed.Message == "" || failed.Tag != "v1" {
		t.Errorf("%+v, %v", failed, err)
	}
	index, err := json.Marshal(contracts.Inventory{Kind: "index", Parts: []contracts.InventoryPart{{Digest: "d", Inventory: contracts.DigestOf([]byte("gone"))}}})
	if err != nil {
		t.Fatal(err)
	}
	indexDigest, _ := blobs.PutBlob(t.Context(), index)
	textDigest, _ := blobs.PutBlob(t.Context(), []byte("text"))
	for name, ev := range map[string]event.Event{
		"missing part":     newEvent(t, contracts.ImageAssembledV1, contracts.ImageAssembled{Image: image(), Inventory: contracts.Blob{Digest: indexDigest}}),
		"no inventory":     newEvent(t, contracts.ImageAssembledV1, contracts.ImageAssembled{Image: image(), Inventory: contracts.Blob{Digest: textDigest}}),
		"no image":         newEvent(t, contracts.ImageAssembledV1, contracts.ImageAssembled{Inventory: inventory}),
		"no data":          newEvent(t, contracts.ImageAssembledV1, "text"),
		"another's events": newEvent(t, contracts.ImagePushedV1, contracts.ImagePushed{}),
	} {
		if outcome := outcomeOf(s.Handle(t.Context(), ev)); outcome != bus.OutcomePermanent {
			t.Errorf("%s: outcome %v, want permanent", name, outcome)
		}
	}
	if got := s.dead(newEvent(t, contracts.ImageAssembledV1, "text"), errors.New("x")); got != nil {
		t.Errorf("%d events for nobody's image", len(got))
	}
	cfg := DefaultConfig()
	cfg.Policy = filepath.Join(t.TempDir(), "absent.yaml")
	if _, err := New(cfg, blobs, nil, slog.New(slog.DiscardHandler)); err == nil {
		t.Error("an absent policy file was taken for the default one")
	}
	if err := (Config{Concurrency: -1}).Validate(); err == nil {
		t.Error("a configuration without reload and with negative concurrency is valid")
	}
}

// TestJudgedAgain: a repeated event is the same judgement as long as advisories
// and policy are the same, and another one once either is not.
func TestJudgedAgain(t *testing.T) {
	blobs, inventory := stored(t)
	path := builtinFile(t)
	replace(t, path, 100)
	s := newService(t, blobs, path)
	in := newEvent(t, contracts.ImageAssembledV1, contracts.ImageAssembled{Image: image(), Kind: "image", Inventory: inventory})
	id := func(s *Service) string {
		t.Helper()
		out, err := s.Handle(t.Context(), in)
		if err != nil || len(out) != 1 {
			t.Fatalf("%d events, %v", len(out), err)
		}
		got, err := bus.Decode[contracts.ImageMatched](out[0])
		if err != nil || out[0].Extensions()[contracts.ExtDataRef] != got.Report.Digest {
			t.Errorf("dataref %v of report %s, %v", out[0].Extensions()[contracts.ExtDataRef], got.Report.Digest, err)
		}
		return out[0].ID()
	}
	first := id(s)
	if again := id(s); again != first || first == "" {
		t.Errorf("a redelivery has id %s, the first one %s", again, first)
	}
	replace(t, path, 200)
	if _, err := s.holder.reload(); err != nil {
		t.Fatal(err)
	}
	second := id(s)
	if second == first {
		t.Error("newer advisories, but the id of the old judgement")
	}
	cfg := DefaultConfig()
	cfg.Advisories, cfg.Policy = path, filepath.Join(t.TempDir(), "policy.yaml")
	if err := os.WriteFile(cfg.Policy, []byte("version: 1\nrules:\n  gaps: fail\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	other, err := New(cfg, blobs, nil, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = other.Close() }()
	if third := id(other); third == second || third == first {
		t.Error("another policy, but the id of the old judgement")
	}
}

// TestMetricOfAdvisories: how old the knowledge is can be seen, and that there is none.
func TestMetricOfAdvisories(t *testing.T) {
	blobs, _ := stored(t)
	path := builtinFile(t)
	s := newService(t, blobs, path)
	l, release, err := s.holder.acquire(t.Context(), 0, "")
	if err != nil {
		t.Fatal(err)
	}
	defer release()
	want := float64(l.snapshot.Newest().Unix())
	if got := testutil.ToFloat64(s.holder.newest()); got != want || got <= 0 {
		t.Errorf("newest is %f, want %f", got, want)
	}
	if got := testutil.ToFloat64(newService(t, blobs, "").holder.newest()); got != 0 {
		t.Errorf("newest without a snapshot is %f", got)
	}
}
