package matcher

import (
	"bytes"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"testing"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/bus"
	"github.com/tidewaiter/tidewaiter/libs/registry"
	"github.com/tidewaiter/tidewaiter/services/advisor/advisortest"
	"github.com/tidewaiter/tidewaiter/services/advisor/artefact"
	"github.com/tidewaiter/tidewaiter/services/advisor/snapshot"
)

// publication is a repository of snapshots with the key that signs them.
type publication struct {
	t        *testing.T
	dir      string
	registry *advisortest.Registry
	to       artefact.Repository
}

func newPublication(t *testing.T) *publication {
	t.Helper()
	p := &publication{t: t, dir: t.TempDir(), registry: advisortest.New(), to: artefact.Repository{Registry: "r.example", Repository: "tidewaiter/advisories"}}
	p.newKey("key")
	return p
}

// newKey writes name and name.pub.
func (p *publication) newKey(name string) {
	p.t.Helper()
	private, public, err := artefact.GenerateKey()
	if err != nil {
		p.t.Fatal(err)
	}
	for file, content := range map[string][]byte{name: private, name + ".pub": public} {
		if err := os.WriteFile(filepath.Join(p.dir, file), content, 0o600); err != nil {
			p.t.Fatal(err)
		}
	}
}

// publish publishes the built-in set under a sequence and returns its location.
func (p *publication) publish(key string, sequence int64) string {
	p.t.Helper()
	path := builtinFile(p.t)
	replace(p.t, path, sequence)
	private, err := artefact.LoadKey(filepath.Join(p.dir, key))
	if err != nil {
		p.t.Fatal(err)
	}
	location, err := artefact.Push(p.t.Context(), p.registry, p.to, path, private)
	if err != nil {
		p.t.Fatal(err)
	}
	return location
}

func (p *publication) service(blobs Blobs) *Service {
	p.t.Helper()
	cfg := DefaultConfig()
	cfg.Snapshots, cfg.SnapshotKeys, cfg.Cache = p.to.String(), filepath.Join(p.dir, "key.pub"), filepath.Join(p.dir, "cache")
	s, err := New(cfg, blobs, p.registry, slog.New(slog.DiscardHandler))
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() { _ = s.Close() })
	return s
}

func (p *publication) rematch(s *Service, inventory contracts.Blob, sequence int64, location string) (contracts.ImageMatched, error) {
	p.t.Helper()
	out, err := s.Handle(p.t.Context(), newEvent(p.t, contracts.ImageRematchV1, contracts.ImageRematch{
		Image: image(), Source: "hub", Kind: "image", Inventory: inventory, Analyzer: "1",
		Snapshot: contracts.SnapshotRef{Sequence: sequence}, Location: location, Reason: contracts.RematchAdvisories,
	}))
	if err != nil {
		return contracts.ImageMatched{}, err
	}
	m, err := bus.Decode[contracts.ImageMatched](out[0])
	if err != nil {
		p.t.Fatal(err)
	}
	return m, nil
}

// TestFetchesWhatIsNamed: a request that names a newer snapshot brings it here;
// an older one never replaces it, and the last two files are kept.
func TestFetchesWhatIsNamed(t *testing.T) {
	p := newPublication(t)
	blobs, inventory := stored(t)
	s := p.service(blobs)
	if _, err := p.rematch(s, inventory, 1, ""); outcome(err) != bus.OutcomeUnavailable {
		t.Fatalf("without any snapshot: %v", err)
	}
	first := p.publish("key", 1)
	m, err := p.rematch(s, inventory, 1, first)
	if err != nil || m.Snapshot.Sequence != 1 || m.SnapshotTime.IsZero() {
		t.Fatalf("got %+v, %v", m, err)
	}
	p.publish("key", 2)
	if m, err = p.rematch(s, inventory, 1, first); err != nil || m.Snapshot.Sequence != 1 || p.registry.Fetched() != 1 {
		t.Errorf("what is here suffices; got %+v, %v, %d fetched", m.Snapshot, err, p.registry.Fetched())
	}
	third := p.publish("key", 3)
	if m, err = p.rematch(s, inventory, 3, third); err != nil || m.Snapshot.Sequence != 3 {
		t.Fatalf("got %+v, %v", m, err)
	}
	// somebody points the tag at an old one: the newest stays
	p.publish("key", 2)
	if changed, err := s.holder.refresh(t.Context(), 0, ""); err != nil || changed {
		t.Errorf("an older one was taken: %v, %v", changed, err)
	}
	if m, err = p.rematch(s, inventory, 1, first); err != nil || m.Snapshot.Sequence != 3 {
		t.Errorf("got %+v, %v", m, err)
	}
	if _, err := p.rematch(s, inventory, 4, first); outcome(err) != bus.OutcomeLater {
		t.Errorf("a sequence that nobody has: %v", err)
	}
	p.publish("key", 5)
	if m, err = p.rematch(s, inventory, 4, "r.example/tidewaiter/advisories@"+contracts.DigestOf([]byte("gone"))); err != nil || m.Snapshot.Sequence != 5 {
		t.Errorf("the named one is gone, a newer one is there: %+v, %v", m, err)
	}
	if files := s.holder.published.files(); len(files) != keepFiles {
		t.Errorf("%d files are kept: %v", len(files), files)
	}
	p.registry.Fail(registry.ErrUnavailable)
	again := p.service(blobs) // a restart while the registry is away
	if m, err := p.rematch(again, inventory, 0, ""); err != nil || m.Snapshot.Sequence != 5 {
		t.Errorf("after a restart: %+v, %v", m, err)
	}
}

func outcome(err error) bus.Outcome {
	o, _ := bus.Classify(err)
	return o
}

// TestRefusesWhatIsNotSigned: each with its own reason, and what was in use stays.
func TestRefusesWhatIsNotSigned(t *testing.T) {
	for _, test := range []struct {
		name string
		make func(p *publication) (location string)
		want error
	}{
		{"foreign key", func(p *publication) string {
			p.newKey("stranger")
			return p.publish("stranger", 9)
		}, artefact.ErrSignature},
		{"sequence raised", func(p *publication) string {
			p.publish("key", 8)
			p.registry.Replace(`"dev.tidewaiter.advisories.sequence":"8"`, `"dev.tidewaiter.advisories.sequence":"9"`)
			return ""
		}, artefact.ErrSignature},
		{"signature removed", func(p *publication) string {
			p.publish("key", 9)
			p.registry.Replace(`"dev.tidewaiter.advisories.signature"`, `"other"`)
			return ""
		}, artefact.ErrSignature},
		{"content changed", func(p *publication) string {
			location := p.publish("key", 9)
			p.registry.Break(100)
			return location
		}, snapshot.ErrCorrupt},
		{"another type", func(p *publication) string {
			p.publish("key", 9)
			p.registry.Replace(contracts.MediaTypeAdvisories, "application/vnd.example.other.v1")
			return ""
		}, artefact.ErrForeign},
		{"another repository", func(p *publication) string {
			return "r.example/somebody/else@" + contracts.DigestOf([]byte("x"))
		}, artefact.ErrForeign},
	} {
		t.Run(test.name, func(t *testing.T) {
			p := newPublication(t)
			blobs, inventory := stored(t)
			s := p.service(blobs)
			first := p.publish("key", 1)
			if _, err := p.rematch(s, inventory, 1, first); err != nil {
				t.Fatal(err)
			}
			location := test.make(p)
			_, err := p.rematch(s, inventory, 9, location)
			if !errors.Is(err, test.want) || outcome(err) != bus.OutcomeLater {
				t.Errorf("got %v, want %v", err, test.want)
			}
			if m, err := p.rematch(s, inventory, 0, ""); err != nil || m.Snapshot.Sequence != 1 {
				t.Errorf("what was in use is gone: %+v, %v", m, err)
			}
		})
	}
}

func TestKeys(t *testing.T) {
	p := newPublication(t)
	p.newKey("next")
	both := filepath.Join(p.dir, "both.pub")
	a, errA := os.ReadFile(filepath.Join(p.dir, "key.pub"))
	b, errB := os.ReadFile(filepath.Join(p.dir, "next.pub"))
	if err := errors.Join(errA, errB, os.WriteFile(both, append(bytes.Clone(a), b...), 0o600)); err != nil {
		t.Fatal(err)
	}
	keys, err := artefact.LoadPublicKeys(both)
	if err != nil || len(keys) != 2 {
		t.Fatalf("%d keys, %v", len(keys), err)
	}
	p.publish("next", 3)
	if found, err := artefact.Look(t.Context(), p.registry, p.to, "", keys); err != nil || found.Snapshot.Sequence != 3 {
		t.Errorf("the second key does not count: %+v, %v", found, err)
	}
	for _, file := range []string{"key", "none"} {
		if _, err := artefact.LoadPublicKeys(filepath.Join(p.dir, file)); err == nil {
			t.Errorf("%s holds public keys", file)
		}
	}
	if _, err := artefact.LoadKey(both); !errors.Is(err, artefact.ErrKey) {
		t.Errorf("a public key signs: %v", err)
	}
}
