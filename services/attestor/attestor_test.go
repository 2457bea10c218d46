package attestor_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cloudevents/sdk-go/v2/event"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/olareg/olareg"
	"github.com/olareg/olareg/config"
	digestpkg "github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/sigstore/cosign/v2/pkg/cosign"
	"pgregory.net/rapid"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/bus"
	"github.com/tidewaiter/tidewaiter/libs/registry"
	"github.com/tidewaiter/tidewaiter/libs/store"
	"github.com/tidewaiter/tidewaiter/libs/store/storetest"
	"github.com/tidewaiter/tidewaiter/services/attestor"
	"github.com/tidewaiter/tidewaiter/services/attestor/statement"
)

// keys are made once, as each costs half a second: ours and somebody else's.
var keys = sync.OnceValue(func() [2]*statement.Signer {
	var out [2]*statement.Signer
	for i := range out {
		private, _, err := statement.GenerateKey([]byte("pw"))
		if err != nil {
			panic(err)
		}
		if out[i], err = statement.LoadSigner(private, []byte("pw")); err != nil {
			panic(err)
		}
	}
	return out
})

// severityPolicy fails what has a critical finding.
type severityPolicy struct{}

func (severityPolicy) Digest() string { return contracts.DigestOf([]byte("policy")) }

func (severityPolicy) Evaluate(r *contracts.Report) (string, []string) {
	if r.Counts.Critical > 0 {
		return contracts.VerdictFail, []string{"critical"}
	}
	return contracts.VerdictPass, nil
}

type mutexLocks struct {
	mu    sync.Mutex
	taken int
}

func (l *mutexLocks) WithLock(ctx context.Context, _, _ string, _ time.Duration, work func(ctx context.Context) error) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.taken++
	return work(ctx)
}

type noLocks struct{}

func (noLocks) WithLock(context.Context, string, string, time.Duration, func(ctx context.Context) error) error {
	return errors.New("redis is gone")
}

// flaky is a registry that fails one call.
type flaky struct {
	*registry.Client
	calls, failAt int // failAt 0: never
	err           error
}

func (f *flaky) call() error {
	f.calls++
	if f.calls == f.failAt {
		return f.err
	}
	return nil
}

func (f *flaky) Resolve(ctx context.Context, ref registry.Ref) (ocispec.Descriptor, error) {
	if err := f.call(); err != nil {
		return ocispec.Descriptor{}, err
	}
	return f.Client.Resolve(ctx, ref)
}

func (f *flaky) Referrers(ctx context.Context, ref registry.Ref, artifactType string) ([]ocispec.Descriptor, error) {
	if err := f.call(); err != nil {
		return nil, err
	}
	return f.Client.Referrers(ctx, ref, artifactType)
}

func (f *flaky) HasReferrersAPI(ctx context.Context, ref registry.Ref) (bool, error) {
	if err := f.call(); err != nil {
		return false, err
	}
	return f.Client.HasReferrersAPI(ctx, ref)
}

func (f *flaky) Attach(ctx context.Context, reg, repository string, subject ocispec.Descriptor, a registry.Artifact) (ocispec.Descriptor, error) {
	d, err := f.Client.Attach(ctx, reg, repository, subject, a)
	if failed := f.call(); failed != nil {
		return ocispec.Descriptor{}, failed // it was attached, but the answer got lost
	}
	return d, err
}

func (f *flaky) Detach(ctx context.Context, reg, repository string, subject, referrer ocispec.Descriptor) error {
	if err := f.call(); err != nil {
		return err
	}
	return f.Client.Detach(ctx, reg, repository, subject, referrer)
}

// world is an attestor with a real database and a real registry that holds one image.
type world struct {
	t        testing.TB
	db       *store.DB
	client   *registry.Client
	registry *flaky
	locks    *mutexLocks
	deps     attestor.Deps
	image    contracts.Image
	manifest registry.Manifest
	now      time.Time
	events   int
}

var start = time.Date(2026, 11, 23, 10, 0, 0, 0, time.UTC)

func newWorld(t testing.TB, referrersAPI bool) *world {
	t.Helper()
	yes := true
	reg := olareg.New(config.Config{
		Storage: config.ConfigStorage{StoreType: config.StoreMem},
		API: config.ConfigAPI{
			DeleteEnabled: &yes, Referrer: config.ConfigAPIReferrer{Enabled: &referrersAPI},
			Manifest: config.ConfigAPIManifest{SparseImage: &yes, SparseIndex: &yes},
		},
	})
	var writes sync.Mutex // olareg's list of referrers takes one writer at a time
	server := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodPut || r.Method == http.MethodDelete {
			writes.Lock()
			defer writes.Unlock()
		}
		if !referrersAPI && strings.Contains(r.URL.Path, "/referrers/") {
			http.NotFound(rw, r) // as registries do that know nothing of it
			return
		}
		reg.ServeHTTP(rw, r)
	}))
	t.Cleanup(func() {
		server.Close()
		if err := reg.Close(); err != nil {
			t.Errorf("close registry: %v", err)
		}
	})
	host := strings.TrimPrefix(server.URL, "http://")
	client, err := registry.New([]registry.Host{{Name: host, PlainHTTP: true}}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := client.Close(); err != nil {
			t.Errorf("close client: %v", err)
		}
	})
	w := &world{t: t, db: storetest.Open(t), client: client, registry: &flaky{Client: client}, locks: &mutexLocks{}, now: start.Add(time.Minute)}
	if err := attestor.Migrate(t.Context(), w.db); err != nil {
		t.Fatal(err)
	}
	w.deps = attestor.Deps{
		DB: w.db, Registry: w.registry, Locks: w.locks, Signer: keys()[0], Policy: severityPolicy{},
		Log: slog.New(slog.DiscardHandler), Now: func() time.Time { return w.now },
	}
	w.manifest = w.push(host, "shop/cart", "v1")
	w.image = contracts.Image{Registry: host, Repository: "shop/cart", Digest: w.manifest.Descriptor.Digest.String()}
	return w
}

// push uploads an image without content.
func (w *world) push(host, repository, tag string) registry.Manifest {
	w.t.Helper()
	config := []byte(`{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":[]}}`)
	d := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageConfig, Digest: digestpkg.FromBytes(config), Size: int64(len(config))}
	if err := w.client.PushBlob(w.t.Context(), host, repository, d, bytes.NewReader(config)); err != nil {
		w.t.Fatal(err)
	}
	body := w.json(ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, Config: d, Layers: []ocispec.Descriptor{},
		Annotations: map[string]string{"tag": tag},
	})
	m := registry.Manifest{Body: body, Descriptor: ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digestpkg.FromBytes(body), Size: int64(len(body))}}
	if err := w.client.PushManifest(w.t.Context(), host, repository, tag, m); err != nil {
		w.t.Fatal(err)
	}
	return m
}

func (w *world) json(v any) []byte {
	w.t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		w.t.Fatal(err)
	}
	return b
}

func (w *world) put(v any) contracts.Blob {
	w.t.Helper()
	content := w.json(v)
	digest, err := w.db.PutBlob(w.t.Context(), content)
	if err != nil {
		w.t.Fatal(err)
	}
	return contracts.Blob{Digest: digest, Size: int64(len(content))}
}

// matched stores a report with the given number of critical findings and
// returns what matcher would say about it.
func (w *world) matched(critical int, sequence int64, at time.Time) contracts.ImageMatched {
	w.t.Helper()
	inventory := w.put(contracts.Inventory{
		Digest: w.image.Digest, Kind: contracts.KindImage, Analyzer: "1",
		Packages: []contracts.Package{{PURL: "pkg:npm/lodash@4.17.4", Name: "lodash", Version: "4.17.4", Ecosystem: "npm"}},
	})
	report := contracts.Report{
		Digest: w.image.Digest, Kind: contracts.KindImage, Inventory: inventory.Digest, Analyzer: "1", Matcher: "1",
		Policy: severityPolicy{}.Digest(), Packages: 1, Counts: contracts.Counts{Critical: critical},
	}
	for i := range critical {
		report.Findings = append(report.Findings, contracts.Finding{
			ID: fmt.Sprintf("CVE-2019-%d", 10744+i), Severity: contracts.SeverityCritical, Status: contracts.StatusAffected,
			Package: contracts.FindingPackage{PURL: "pkg:npm/lodash@4.17.4", Name: "lodash", Version: "4.17.4", Ecosystem: "npm"},
		})
	}
	report.Verdict, report.Reasons = severityPolicy{}.Evaluate(&report)
	return contracts.ImageMatched{
		Image: w.image, Source: "main", Tag: "v1", Kind: contracts.KindImage, Inventory: inventory, Report: w.put(report),
		Snapshot:     contracts.SnapshotRef{Digest: contracts.DigestOf(fmt.Append(nil, sequence)), Sequence: sequence},
		SnapshotTime: start.Add(-time.Hour), MatchedAt: at, Policy: report.Policy,
		Verdict: report.Verdict, Reasons: report.Reasons, Counts: report.Counts, Packages: 1,
	}
}

func (w *world) event(m contracts.ImageMatched) event.Event {
	w.t.Helper()
	ev, err := bus.NewEvent(contracts.ImageMatchedV1, m.Image.String(), m)
	if err != nil {
		w.t.Fatal(err)
	}
	w.events++
	ev.SetID(fmt.Sprintf("event-%d", w.events))
	ev.SetSource("/services/matcher")
	return ev
}

func (w *world) attestor() *attestor.Attestor {
	return attestor.New(attestor.DefaultConfig(), w.deps)
}

// handle hands an event to the attestor and returns what it says of the image.
func (w *world) handle(ev event.Event) contracts.ImageAttested {
	w.t.Helper()
	out, err := w.attestor().Handle(w.t.Context(), ev)
	if err != nil {
		w.t.Fatal(err)
	}
	return w.attested(out)
}

func (w *world) attested(out []event.Event) contracts.ImageAttested {
	w.t.Helper()
	if len(out) != 1 || out[0].Type() != contracts.TypePrefix+contracts.ImageAttestedV1 || out[0].Subject() != w.image.String() {
		w.t.Fatalf("got %v, want one image.attested", out)
	}
	a, err := bus.Decode[contracts.ImageAttested](out[0])
	if err != nil {
		w.t.Fatal(err)
	}
	return a
}

// referrers returns the digests of what is attached, by predicate or artifact type.
func (w *world) referrers() map[string][]string {
	w.t.Helper()
	list, err := w.client.Referrers(w.t.Context(), w.ref(), "")
	if err != nil {
		w.t.Fatal(err)
	}
	out := map[string][]string{}
	for _, d := range list {
		kind := d.ArtifactType
		if p := d.Annotations["dev.sigstore.bundle.predicateType"]; p != "" {
			kind = p
		}
		out[kind] = append(out[kind], d.Digest.String())
	}
	return out
}

// expect asserts that exactly what a says is attached.
func (w *world) expect(a contracts.ImageAttested) {
	w.t.Helper()
	want := map[string][]string{}
	for _, s := range a.Statements {
		want[s.PredicateType] = append(want[s.PredicateType], s.Digest)
	}
	kinds := slices.Sorted(maps.Keys(want))
	if !slices.Equal(kinds, []string{contracts.MediaTypeCycloneDX, contracts.MediaTypeReport, contracts.PredicateVuln, contracts.PredicateVSA}) {
		w.t.Fatalf("statements of %v", kinds)
	}
	if got := w.referrers(); !maps.EqualFunc(got, want, slices.Equal) {
		w.t.Errorf("attached is %v, want %v", got, want)
	}
}

func (w *world) ref() registry.Ref {
	return registry.Ref{Registry: w.image.Registry, Repository: w.image.Repository, Digest: w.image.Digest}
}

func (w *world) verify() (contracts.Verification, error) {
	return statement.VerifyImage(w.t.Context(), w.client, w.ref(), statement.Options{
		Keys: []statement.Verifier{keys()[0].Verifier()}, Now: w.now, MaxAge: 24 * time.Hour, Policy: severityPolicy{}.Digest(),
	})
}

func TestAttest(t *testing.T) {
	for name, api := range map[string]bool{"referrers API": true, "fallback tag": false} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, api)
			m := w.matched(0, 100, start)
			a := w.handle(w.event(m))
			w.expect(a)
			if w.locks.taken > 0 == api {
				t.Errorf("%d locks taken", w.locks.taken)
			}
			if a.Report != m.Report || a.Verdict != contracts.VerdictPass || a.Signer != keys()[0].ID() || a.Snapshot != m.Snapshot || a.Source != "main" || a.Tag != "v1" {
				t.Errorf("attested %+v", a)
			}
			if !a.SignedAt.Equal(start) || !a.ValidUntil.Equal(start.Add(7*24*time.Hour)) {
				t.Errorf("signed at %s, valid until %s", a.SignedAt, a.ValidUntil)
			}
			for _, s := range a.Statements {
				got, err := w.client.ArtifactContent(t.Context(), w.image.Registry, w.image.Repository, s.Digest, statement.MaxBundle)
				if err != nil {
					t.Fatal(err)
				}
				switch {
				case s.PredicateType == contracts.MediaTypeReport && contracts.DigestOf(got.Content) != m.Report.Digest:
					t.Error("the report attached is another")
				case s.Bundle != "":
					stored, err := w.db.Blob(t.Context(), s.Bundle)
					if err != nil || !bytes.Equal(stored, got.Content) {
						t.Errorf("stored bundle differs (%v)", err)
					}
				}
			}
			v, err := w.verify()
			if err != nil || len(v.Statements) != 2 || len(v.Ignored) != 0 {
				t.Errorf("verify: %+v, %v", v, err)
			}
		})
	}
}

// The cosign library that is linked accepts what we attach, and refuses it with
// another key, for another digest or with a byte changed.
func TestCosignVerifies(t *testing.T) {
	for label, api := range map[string]bool{"referrers API": true, "fallback tag": false} {
		t.Run(label, func(t *testing.T) {
			w := newWorld(t, api)
			w.handle(w.event(w.matched(2, 100, start)))
			verify := func(image contracts.Image, key *statement.Signer) (int, error) {
				ref, err := name.ParseReference(image.String())
				if err != nil {
					t.Fatal(err)
				}
				found, _, err := cosign.VerifyImageAttestations(t.Context(), ref, statement.CheckOpts(key.Verifier()))
				return len(found), err
			}
			if n, err := verify(w.image, keys()[0]); err != nil || n != 2 {
				t.Errorf("our key: %d, %v", n, err)
			}
			if n, err := verify(w.image, keys()[1]); err == nil {
				t.Errorf("another key: %d statements accepted", n)
			}

			// The same bundles on another image.
			other := w.push(w.image.Registry, w.image.Repository, "v2")
			moved := contracts.Image{Registry: w.image.Registry, Repository: w.image.Repository, Digest: other.Descriptor.Digest.String()}
			list, err := w.client.Referrers(t.Context(), w.ref(), contracts.MediaTypeBundle)
			if err != nil || len(list) != 2 {
				t.Fatalf("%v, %v", list, err)
			}
			for _, d := range list {
				a, err := w.client.ArtifactContent(t.Context(), w.image.Registry, w.image.Repository, d.Digest.String(), statement.MaxBundle)
				if err != nil {
					t.Fatal(err)
				}
				if _, err := w.client.Attach(t.Context(), moved.Registry, moved.Repository, other.Descriptor, a); err != nil {
					t.Fatal(err)
				}
			}
			if n, err := verify(moved, keys()[0]); err == nil {
				t.Errorf("another digest: %d statements accepted", n)
			}

			// One byte changed, on a third image of the bundle's own digest: the payload's.
			third := w.push(w.image.Registry, "shop/copy", "v1")
			if third.Descriptor.Digest.String() != w.image.Digest {
				t.Fatal("the copy has another digest")
			}
			for _, d := range list {
				a, err := w.client.ArtifactContent(t.Context(), w.image.Registry, w.image.Repository, d.Digest.String(), statement.MaxBundle)
				if err != nil {
					t.Fatal(err)
				}
				i := bytes.Index(a.Content, []byte(`"payload":"`))
				if i < 0 {
					i = bytes.Index(a.Content, []byte(`"payload": "`))
				}
				a.Content = bytes.Clone(a.Content)
				at := i + 200
				a.Content[at] = map[bool]byte{true: 'B', false: 'A'}[a.Content[at] == 'A']
				if _, err := w.client.Attach(t.Context(), w.image.Registry, "shop/copy", third.Descriptor, a); err != nil {
					t.Fatal(err)
				}
			}
			if n, err := verify(contracts.Image{Registry: w.image.Registry, Repository: "shop/copy", Digest: w.image.Digest}, keys()[0]); err == nil {
				t.Errorf("a changed byte: %d statements accepted", n)
			}
		})
	}
}

// Whichever call fails, and however often the event comes: one set of
// statements in the end.
func TestCrashAnywhere(t *testing.T) {
	for _, api := range []bool{true, false} {
		for failAt := 1; ; failAt++ {
			w := newWorld(t, api)
			first := w.handle(w.event(w.matched(0, 100, start)))
			ev := w.event(w.matched(1, 101, start.Add(time.Second)))
			w.registry.calls, w.registry.failAt, w.registry.err = 0, failAt, errors.New("connection reset")
			out, err := w.attestor().Handle(t.Context(), ev)
			if w.registry.calls < failAt {
				break
			}
			// A superseded statement that cannot be deleted is left for the next time.
			w.registry.failAt = 0
			if err != nil {
				out, err = w.attestor().Handle(t.Context(), ev)
			}
			if err != nil {
				t.Fatal(err)
			}
			a := w.attested(out)
			again := w.handle(ev)
			if !slices.Equal(a.Statements, again.Statements) || slices.Equal(a.Statements, first.Statements) {
				t.Errorf("call %d: redelivered %v, first %v", failAt, again.Statements, a.Statements)
			}
			w.expect(again)
			if v, err := w.verify(); !errors.Is(err, statement.ErrVerdict) || v.Statements[0].Sequence != 101 {
				t.Errorf("call %d: %+v, %v", failAt, v, err)
			}
		}
	}
}

// A renewed verdict with an unchanged report signs the summary anew, nothing else.
func TestRenewal(t *testing.T) {
	w := newWorld(t, true)
	before := w.handle(w.event(w.matched(0, 100, start)))
	w.now = start.Add(5 * 24 * time.Hour)
	after := w.handle(w.event(w.matched(0, 100, w.now)))
	w.expect(after)
	for i, s := range after.Statements {
		if renewed := s != before.Statements[i]; renewed != (s.PredicateType == contracts.PredicateVSA) {
			t.Errorf("%s: before %v, after %v", s.PredicateType, before.Statements[i], s)
		}
	}
	if !after.ValidUntil.Equal(w.now.Add(7 * 24 * time.Hour)) {
		t.Errorf("valid until %s", after.ValidUntil)
	}
	// The scan's own validity has run out two days later, the summary's has not.
	w.now = start.Add(8 * 24 * time.Hour)
	_, err := statement.VerifyImage(t.Context(), w.client, w.ref(), statement.Options{Keys: []statement.Verifier{keys()[0].Verifier()}, Now: w.now})
	if err != nil {
		t.Error(err)
	}
}

func TestNewVerdictReplacesAll(t *testing.T) {
	w := newWorld(t, true)
	before := w.handle(w.event(w.matched(0, 100, start)))
	after := w.handle(w.event(w.matched(1, 101, start.Add(time.Second))))
	w.expect(after)
	for i := range after.Statements {
		if after.Statements[i].PredicateType != contracts.MediaTypeCycloneDX && after.Statements[i] == before.Statements[i] {
			t.Errorf("%v stands as before", after.Statements[i])
		}
	}
	if _, err := w.verify(); !errors.Is(err, statement.ErrVerdict) {
		t.Errorf("got %v, want ErrVerdict", err)
	}
}

// An older verdict never replaces a newer one; neither stores nor emits anything.
func TestOlderVerdict(t *testing.T) {
	w := newWorld(t, true)
	standing := w.handle(w.event(w.matched(1, 100, start)))
	for name, m := range map[string]contracts.ImageMatched{
		"lower sequence, later time":   w.matched(0, 99, start.Add(30*time.Second)),
		"equal sequence, earlier time": w.matched(0, 100, start.Add(-time.Second)),
	} {
		out, err := w.attestor().Handle(t.Context(), w.event(m))
		if err != nil || len(out) != 0 {
			t.Errorf("%s: %v, %v", name, out, err)
		}
		w.expect(standing)
	}
	later := w.handle(w.event(w.matched(0, 100, start.Add(time.Second))))
	w.expect(later)
}

// The same verdict under another event id is answered with what stands.
func TestSameVerdictAgain(t *testing.T) {
	w := newWorld(t, true)
	m := w.matched(0, 100, start)
	first := w.handle(w.event(m))
	second := w.handle(w.event(m))
	if !slices.Equal(first.Statements, second.Statements) {
		t.Errorf("first %v, then %v", first.Statements, second.Statements)
	}
	other := w.matched(3, 100, start)
	if _, err := w.attestor().Handle(t.Context(), w.event(other)); !isPermanent(err) || !errors.Is(err, attestor.ErrForged) {
		t.Errorf("another report of the same moment: %v", err)
	}
}

// TestTwoReplicas: the same verdict handed to both (a redelivery), and another
// one on the same image in the other lane, at the same time: in the end one set
// of statements is attached, the newest, and one event says so each time.
func TestTwoReplicas(t *testing.T) {
	for _, api := range []bool{true, false} {
		w := newWorld(t, api)
		w.deps.Registry = w.client
		for round := range 12 {
			sequence := int64(100 + 2*round)
			w.now = w.now.Add(time.Minute)
			older, newer := w.event(w.matched(round%2, sequence, w.now)), w.event(w.matched((round+1)%2, sequence+1, w.now))
			var mu sync.Mutex
			said := map[string]map[string]bool{}
			var last []event.Event // what was said of the newer
			var group sync.WaitGroup
			for _, ev := range []event.Event{older, newer, older, newer} {
				a := w.attestor()
				group.Go(func() {
					// As the bus would: again where that may help.
					for until := time.Now().Add(time.Minute); time.Now().Before(until); {
						out, err := a.Handle(t.Context(), ev)
						if isPermanent(err) {
							t.Error(err)
							return
						}
						if err != nil {
							time.Sleep(time.Millisecond)
							continue
						}
						mu.Lock()
						if ev.ID() == newer.ID() {
							last = out
						}
						for _, o := range out {
							if said[ev.ID()] == nil {
								said[ev.ID()] = map[string]bool{}
							}
							said[ev.ID()][o.ID()+string(o.Data())] = true
						}
						mu.Unlock()
						return
					}
					t.Errorf("%s has no end", ev.ID())
				})
			}
			group.Wait()
			if len(said[newer.ID()]) != 1 || len(said[older.ID()]) > 1 {
				t.Errorf("round %d: %d answers to the newer, %d to the older", round, len(said[newer.ID()]), len(said[older.ID()]))
			}
			w.expect(w.attested(last))
		}
	}
}

func isPermanent(err error) bool {
	outcome, _ := bus.Classify(err)
	return outcome == bus.OutcomePermanent
}

// Attestor signs nothing only because an event says so.
func TestForgedEvents(t *testing.T) {
	w := newWorld(t, true)
	for name, forge := range map[string]func(m *contracts.ImageMatched){
		"verdict":             func(m *contracts.ImageMatched) { m.Verdict = contracts.VerdictPass },
		"counts":              func(m *contracts.ImageMatched) { m.Counts = contracts.Counts{} },
		"another image":       func(m *contracts.ImageMatched) { m.Image.Digest = contracts.DigestOf([]byte("other")) },
		"another inventory":   func(m *contracts.ImageMatched) { m.Inventory.Digest = contracts.DigestOf([]byte("other")) },
		"kind":                func(m *contracts.ImageMatched) { m.Kind = contracts.KindIndex },
		"policy":              func(m *contracts.ImageMatched) { m.Policy = contracts.DigestOf([]byte("lax")) },
		"time":                func(m *contracts.ImageMatched) { m.MatchedAt = start.AddDate(1, 0, 0) },
		"a report of nothing": func(m *contracts.ImageMatched) { m.Report = w.put([]string{"no report"}) },
		"registry":            func(m *contracts.ImageMatched) { m.Image.Registry = "http://evil/" },
		"a report whose verdict does not follow": func(m *contracts.ImageMatched) {
			m.Verdict = contracts.VerdictPass
			m.Report = w.put(contracts.Report{
				Digest: m.Image.Digest, Kind: m.Kind, Inventory: m.Inventory.Digest, Policy: m.Policy,
				Packages: 1, Counts: m.Counts, Verdict: contracts.VerdictPass,
			})
		},
		"a report that miscounts": func(m *contracts.ImageMatched) {
			m.Counts = contracts.Counts{Critical: 2}
			m.Report = w.put(contracts.Report{
				Digest: m.Image.Digest, Kind: m.Kind, Inventory: m.Inventory.Digest, Policy: m.Policy,
				Packages: 1, Counts: m.Counts, Verdict: m.Verdict,
			})
		},
		"a report that hides its findings": func(m *contracts.ImageMatched) {
			m.Verdict, m.Counts = contracts.VerdictPass, contracts.Counts{}
			m.Report = w.put(contracts.Report{
				Digest: m.Image.Digest, Kind: m.Kind, Inventory: m.Inventory.Digest, Policy: m.Policy, Packages: 1, Verdict: m.Verdict,
				Findings: []contracts.Finding{{ID: "CVE-2019-10744", Severity: contracts.SeverityCritical, Status: contracts.StatusAffected}},
			})
		},
		"a clean report of another image": func(m *contracts.ImageMatched) {
			m.Verdict, m.Counts = contracts.VerdictPass, contracts.Counts{}
			m.Report = w.put(contracts.Report{
				Digest: contracts.DigestOf([]byte("other")), Kind: m.Kind, Inventory: m.Inventory.Digest, Policy: m.Policy, Packages: 1, Verdict: m.Verdict,
			})
		},
		"a clean report of another inventory": func(m *contracts.ImageMatched) {
			m.Verdict, m.Counts = contracts.VerdictPass, contracts.Counts{}
			m.Report = w.put(contracts.Report{
				Digest: m.Image.Digest, Kind: m.Kind, Inventory: contracts.DigestOf([]byte("other")), Policy: m.Policy, Packages: 1, Verdict: m.Verdict,
			})
		},
		"a report under another policy": func(m *contracts.ImageMatched) {
			m.Policy = contracts.DigestOf([]byte("lax"))
			m.Report = w.put(contracts.Report{
				Digest: m.Image.Digest, Kind: m.Kind, Inventory: m.Inventory.Digest, Policy: m.Policy,
				Packages: 1, Counts: m.Counts, Verdict: m.Verdict,
			})
		},
	} {
		t.Run(name, func(t *testing.T) {
			m := w.matched(1, 100, start)
			forge(&m)
			out, err := w.attestor().Handle(t.Context(), w.event(m))
			if !isPermanent(err) || len(out) > 0 {
				t.Errorf("got %v, %v", out, err)
			}
			if name != "registry" && !errors.Is(err, attestor.ErrForged) {
				t.Errorf("got %v, want %v", err, attestor.ErrForged)
			}
			w.silent()
		})
	}
	bad := w.event(w.matched(0, 100, start))
	if err := bad.SetData(event.ApplicationJSON, []byte(`"text"`)); err != nil {
		t.Fatal(err)
	}
	if _, err := w.attestor().Handle(t.Context(), bad); !isPermanent(err) {
		t.Errorf("garbage: %v", err)
	}
}

// silent asserts that nothing is attached to the image, and nothing prepared.
func (w *world) silent() {
	w.t.Helper()
	if attached := w.referrers(); len(attached) > 0 {
		w.t.Errorf("attached: %v", attached)
	}
	var n int
	if err := w.db.QueryRowContext(w.t.Context(), "SELECT count(*) FROM attestor_statements").Scan(&n); err != nil || n > 0 {
		w.t.Errorf("%d statements were prepared, %v", n, err)
	}
}

// A report is what has the digest, or there is none: nothing is signed about one
// that nobody stored, or whose content was exchanged.
func TestForgedReportDigest(t *testing.T) {
	w := newWorld(t, true)
	for name, c := range map[string]struct {
		digest func(vulnerable, clean contracts.ImageMatched) string
		want   error
	}{
		"never stored": {func(_, _ contracts.ImageMatched) string { return contracts.DigestOf([]byte("never stored")) }, store.ErrNotFound},
		"no digest":    {func(_, _ contracts.ImageMatched) string { return "../../etc/passwd" }, store.ErrNotFound},
		"exchanged": {func(vulnerable, clean contracts.ImageMatched) string {
			_, err := w.db.ExecContext(t.Context(), "UPDATE blobs SET content = (SELECT content FROM blobs WHERE digest = $1) WHERE digest = $2", clean.Report.Digest, vulnerable.Report.Digest)
			if err != nil {
				t.Fatal(err)
			}
			return vulnerable.Report.Digest
		}, store.ErrCorrupt},
	} {
		t.Run(name, func(t *testing.T) {
			m := w.matched(0, 100, start)
			m.Report.Digest = c.digest(w.matched(1, 100, start), m)
			out, err := w.attestor().Handle(t.Context(), w.event(m))
			if !errors.Is(err, c.want) || len(out) > 0 {
				t.Errorf("got %v, %v, want %v", out, err, c.want)
			}
			w.silent()
		})
	}
}

// Nothing is said about a digest that the registry does not have, however well
// the event and its report agree.
func TestForgedImage(t *testing.T) {
	w := newWorld(t, true)
	w.image.Digest = contracts.DigestOf([]byte("never pushed"))
	out, err := w.attestor().Handle(t.Context(), w.event(w.matched(0, 100, start)))
	if err != nil || len(out) > 0 {
		t.Errorf("got %v, %v", out, err)
	}
	w.silent()
}

// An image that is gone is let go; when it is back, its event is answered.
func TestGone(t *testing.T) {
	w := newWorld(t, true)
	real := w.image
	w.image.Repository = "shop/basket"
	ev := w.event(w.matched(0, 100, start))
	out, err := w.attestor().Handle(t.Context(), ev)
	if err != nil || len(out) > 0 {
		t.Fatalf("got %v, %v", out, err)
	}
	if m := w.push(real.Registry, "shop/basket", "v1"); m.Descriptor.Digest.String() != w.image.Digest {
		t.Fatal("pushed another image")
	}
	w.expect(w.handle(ev))
}

// What was attached is attached again, the same bytes, when the image was
// deleted and pushed again and its event comes by once more.
func TestMending(t *testing.T) {
	w := newWorld(t, true)
	ev := w.event(w.matched(0, 100, start))
	a := w.handle(ev)
	list, err := w.client.Referrers(t.Context(), w.ref(), "")
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range list[:3] {
		if err := w.client.Detach(t.Context(), w.image.Registry, w.image.Repository, w.manifest.Descriptor, d); err != nil {
			t.Fatal(err)
		}
	}
	again := w.handle(ev)
	if !slices.Equal(a.Statements, again.Statements) {
		t.Errorf("first %v, then %v", a.Statements, again.Statements)
	}
	w.expect(again)
}

// Where there is no referrers API, the fallback tag lists statements that were
// removed behind its back: they are attached again all the same, once.
func TestMendingWhatIsListedAndGone(t *testing.T) {
	w := newWorld(t, false)
	ev := w.event(w.matched(0, 100, start))
	a := w.handle(ev)
	for _, s := range a.Statements[:3] {
		gone := w.ref()
		gone.Digest = s.Digest
		if err := w.client.Delete(t.Context(), gone); err != nil {
			t.Fatal(err)
		}
		if _, err := w.client.Resolve(t.Context(), gone); !errors.Is(err, registry.ErrNotFound) {
			t.Fatalf("%s is still there: %v", s.Digest, err)
		}
	}
	w.expect(a) // that is what the tag says
	again := w.handle(ev)
	w.expect(again)
	for _, s := range again.Statements {
		there := w.ref()
		there.Digest = s.Digest
		if _, err := w.client.Resolve(t.Context(), there); err != nil {
			t.Errorf("%s: %v", s.PredicateType, err)
		}
	}
	if v, err := w.verify(); err != nil || !v.Verified {
		t.Errorf("%+v, %v", v, err)
	}
}

// What a renewal keeps is stored for longer; what is not stored any more is
// made anew, so that it can be attached again.
func TestRenewalKeepsContent(t *testing.T) {
	w := newWorld(t, true)
	first := w.handle(w.event(w.matched(0, 100, start)))
	age := func(digest string) (touched int64) {
		if err := w.db.QueryRowContext(t.Context(), "SELECT touched_at FROM blobs WHERE digest = $1", digest).Scan(&touched); err != nil {
			t.Fatal(err)
		}
		return touched
	}
	var bundle string
	for _, s := range first.Statements {
		if s.PredicateType == contracts.PredicateVuln {
			bundle = s.Bundle
		}
	}
	if _, err := w.db.ExecContext(t.Context(), "UPDATE blobs SET touched_at = 1"); err != nil {
		t.Fatal(err)
	}
	w.now = start.Add(5 * 24 * time.Hour)
	w.expect(w.handle(w.event(w.matched(0, 100, w.now))))
	if age(bundle) == 1 {
		t.Error("what is still attached was left to expire")
	}
	if _, err := w.db.ExecContext(t.Context(), "DELETE FROM blobs WHERE digest = $1", bundle); err != nil {
		t.Fatal(err)
	}
	w.now = w.now.Add(5 * 24 * time.Hour)
	ev := w.event(w.matched(0, 100, w.now))
	renewed := w.handle(ev)
	w.expect(renewed)
	for _, s := range renewed.Statements {
		if s.Bundle == bundle {
			t.Error("what is not stored any more was kept")
		}
	}
	list, err := w.client.Referrers(t.Context(), w.ref(), "")
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range list {
		if err := w.client.Detach(t.Context(), w.image.Registry, w.image.Repository, w.manifest.Descriptor, d); err != nil {
			t.Fatal(err)
		}
	}
	w.expect(w.handle(ev))
}

func TestExpiredVerdictIsNotSigned(t *testing.T) {
	w := newWorld(t, true)
	ev := w.event(w.matched(0, 100, start))
	w.now = start.Add(7*24*time.Hour + time.Second)
	out, err := w.attestor().Handle(t.Context(), ev)
	if err != nil || len(out) > 0 || len(w.referrers()) > 0 {
		t.Errorf("got %v, %v", out, err)
	}
}

// Each kind of trouble asks for its own kind of retry.
func TestTrouble(t *testing.T) {
	for name, c := range map[string]struct {
		api  bool
		set  func(w *world)
		want bus.Outcome
	}{
		"throttled":      {true, func(w *world) { w.registry.failAt, w.registry.err = 1, registry.ErrThrottled }, bus.OutcomeLater},
		"registry down":  {true, func(w *world) { w.registry.failAt, w.registry.err = 4, registry.ErrUnavailable }, bus.OutcomeLater},
		"not allowed":    {true, func(w *world) { w.registry.failAt, w.registry.err = 4, registry.ErrUnauthorized }, bus.OutcomePermanent},
		"not configured": {true, func(w *world) { w.image.Registry = "elsewhere.example" }, bus.OutcomePermanent},
		"no lock":        {false, func(w *world) { w.deps.Locks = noLocks{} }, bus.OutcomeUnavailable},
		"no lock needed": {true, func(w *world) { w.deps.Locks = noLocks{} }, bus.OutcomeOK},
		"database gone": {true, func(w *world) {
			w.deps.DB = storetest.Open(w.t)
			if err := attestor.Migrate(w.t.Context(), w.deps.DB); err != nil {
				w.t.Fatal(err)
			}
			if err := w.deps.DB.Close(); err != nil {
				w.t.Fatal(err)
			}
		}, bus.OutcomeUnavailable},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, c.api)
			c.set(w)
			out, err := w.attestor().Handle(t.Context(), w.event(w.matched(0, 100, start)))
			got, at := bus.Classify(err)
			if got != c.want || (got == bus.OutcomeOK) != (len(out) == 1) {
				t.Errorf("got %v (%v), %v", got, err, out)
			}
			if got == bus.OutcomeLater && !at.After(time.Now().Add(-time.Minute)) {
				t.Errorf("again at %s", at)
			}
		})
	}
}

// Only what carries our mark, made with our key, is deleted.
func TestOthersStatementsStay(t *testing.T) {
	w := newWorld(t, true)
	theirs, err := w.client.Attach(t.Context(), w.image.Registry, w.image.Repository, w.manifest.Descriptor, registry.Artifact{
		Type: "application/x.notes", MediaType: "text/plain", Content: []byte("mind the gap"),
	})
	if err != nil {
		t.Fatal(err)
	}
	ours := w.deps
	staging := w.deps
	staging.Signer, staging.DB = keys()[1], storetest.Open(t)
	if err := attestor.Migrate(t.Context(), staging.DB); err != nil {
		t.Fatal(err)
	}
	for i := range 2 {
		m := w.matched(i, 100+int64(i), start.Add(time.Duration(i)*time.Second))
		for _, d := range []attestor.Deps{ours, staging} {
			w.deps, w.db = d, d.DB
			w.matched(i, 100, start) // stores report and inventory there too
			w.handle(w.event(m))
		}
	}
	got := w.referrers()
	if !slices.Equal(got["application/x.notes"], []string{theirs.Digest.String()}) || len(got[contracts.PredicateVSA]) != 2 || len(got[contracts.PredicateVuln]) != 2 {
		t.Errorf("attached: %v", got)
	}
}

// The SBOM of an index holds the packages of its platforms.
func TestIndex(t *testing.T) {
	w := newWorld(t, true)
	m := w.matched(0, 100, start)
	part := m.Inventory
	m.Kind = contracts.KindIndex
	m.Inventory = w.put(contracts.Inventory{Digest: w.image.Digest, Kind: contracts.KindIndex, Parts: []contracts.InventoryPart{
		{Digest: contracts.DigestOf([]byte("part")), Platform: &contracts.Platform{OS: "linux", Architecture: "arm64"}, Inventory: part.Digest, Packages: 1},
	}})
	m.Report = w.put(contracts.Report{
		Digest: w.image.Digest, Kind: contracts.KindIndex, Inventory: m.Inventory.Digest, Policy: m.Policy, Packages: 1, Verdict: m.Verdict,
	})
	a := w.handle(w.event(m))
	w.expect(a)
	i := slices.IndexFunc(a.Statements, func(s contracts.StatementRef) bool { return s.PredicateType == contracts.MediaTypeCycloneDX })
	document, err := w.client.ArtifactContent(t.Context(), w.image.Registry, w.image.Repository, a.Statements[i].Digest, 1<<20)
	if err != nil || !bytes.Contains(document.Content, []byte("pkg:npm/lodash@4.17.4")) || !bytes.Contains(document.Content, []byte("linux/arm64")) {
		t.Errorf("SBOM: %s, %v", document.Content, err)
	}
}

func TestOnDead(t *testing.T) {
	w := newWorld(t, true)
	out := w.attestor().OnDead(w.event(w.matched(0, 100, start)), errors.New("no luck"))
	if len(out) != 1 {
		t.Fatalf("got %v", out)
	}
	f, err := bus.Decode[contracts.ImageFailed](out[0])
	want := contracts.ImageFailed{Registry: w.image.Registry, Repository: w.image.Repository, Tag: "v1", Digest: w.image.Digest, Stage: "attestor", Message: "no luck"}
	if err != nil || f != want {
		t.Errorf("got %+v, %v", f, err)
	}
	if out := w.attestor().OnDead(event.New(), errors.New("no luck")); len(out) != 0 {
		t.Errorf("of garbage: %v", out)
	}
}

// Verdicts in any order, doubled anywhere: the newest stands, alone, and a
// replay of all of them changes nothing.
func TestAnyOrder(t *testing.T) {
	worlds := map[bool]*world{true: newWorld(t, true), false: newWorld(t, false)}
	round := 0
	rapid.Check(t, func(rt *rapid.T) {
		w := worlds[rapid.Bool().Draw(rt, "api")]
		round++
		w.image.Repository = fmt.Sprintf("shop/cart%d", round)
		w.push(w.image.Registry, w.image.Repository, "v1")
		var events []event.Event
		newest := contracts.ImageMatched{}
		for i := range rapid.IntRange(1, 5).Draw(rt, "verdicts") {
			sequence := rapid.Int64Range(100, 102).Draw(rt, "sequence")
			m := w.matched(rapid.IntRange(0, 1).Draw(rt, "critical"), sequence, start.Add(time.Duration(i)*time.Second))
			if sequence >= newest.Snapshot.Sequence {
				newest = m
			}
			events = append(events, w.event(m))
		}
		order := rapid.SliceOfN(rapid.SampledFrom(events), 0, 6).Draw(rt, "order")
		order = append(order, rapid.Permutation(events).Draw(rt, "all")...)
		play := func() {
			for _, ev := range order {
				if _, err := w.attestor().Handle(t.Context(), ev); err != nil {
					rt.Fatal(err)
				}
			}
		}
		play()
		v, err := w.verify()
		if (err == nil) != (newest.Verdict == contracts.VerdictPass) || v.Statements[0].Sequence != newest.Snapshot.Sequence || !v.Statements[0].Time.Equal(newest.MatchedAt) {
			rt.Fatalf("newest is %+v; %+v, %v", newest, v, err)
		}
		before := w.referrers()
		for kind, digests := range before {
			if len(digests) != 1 {
				rt.Errorf("%d of %s", len(digests), kind)
			}
		}
		play()
		if after := w.referrers(); !maps.EqualFunc(before, after, slices.Equal) {
			rt.Errorf("after a replay %v, before %v", after, before)
		}
	})
}

func TestConfig(t *testing.T) {
	private, _, err := statement.GenerateKey([]byte("pw"))
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "cosign.key")
	if err := os.WriteFile(file, private, 0o600); err != nil {
		t.Fatal(err)
	}
	env := func(name string) (string, bool) {
		v, ok := map[string]string{"KEY": string(private), "PW": "pw", "WRONG": "secret-word"}[name]
		return v, ok
	}
	for name, c := range map[string]struct {
		cfg   attestor.Config
		valid bool
		loads bool
	}{
		"key file":          {attestor.Config{KeyFile: file, PasswordEnv: "PW", Validity: time.Hour}, true, true},
		"key in variable":   {attestor.Config{KeyEnv: "KEY", PasswordEnv: "PW", Validity: time.Hour}, true, true},
		"wrong password":    {attestor.Config{KeyFile: file, PasswordEnv: "WRONG", Validity: time.Hour}, true, false},
		"no such variable":  {attestor.Config{KeyEnv: "NONE", PasswordEnv: "PW", Validity: time.Hour}, true, false},
		"no such file":      {attestor.Config{KeyFile: file + ".not", PasswordEnv: "PW", Validity: time.Hour}, true, false},
		"no key":            {attestor.DefaultConfig(), false, false},
		"two keys":          {attestor.Config{KeyFile: file, KeyEnv: "KEY", Validity: time.Hour}, false, false},
		"two passwords":     {attestor.Config{KeyFile: file, PasswordFile: "x", PasswordEnv: "PW", Validity: time.Hour}, false, false},
		"too short a while": {attestor.Config{KeyFile: file, Validity: time.Minute}, false, false},
	} {
		if err := c.cfg.Validate(); (err == nil) != c.valid {
			t.Errorf("%s: validate: %v", name, err)
		}
		if !c.valid {
			continue
		}
		signer, err := c.cfg.Signer(env)
		if (err == nil) != c.loads || (signer == nil) == c.loads {
			t.Errorf("%s: %v", name, err)
		}
		if err != nil && strings.Contains(err.Error(), "secret-word") {
			t.Errorf("%s: the error holds the password: %v", name, err)
		}
	}
}
