// Package gatekeepertest makes images with statements, good and bad ones, for
// tests of what gatekeeper does with them.
package gatekeepertest

import (
	"bytes"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/olareg/olareg"
	"github.com/olareg/olareg/config"
	digestpkg "github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/registry"
	"github.com/tidewaiter/tidewaiter/services/attestor/statement"
)

// Key returns the signer with the given number, made when first asked for.
func Key(t testing.TB, number int) *statement.Signer {
	t.Helper()
	s, err := keys[number]()
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// keys are made once, as each costs half a second.
var keys = [2]func() (*statement.Signer, error){sync.OnceValues(newKey), sync.OnceValues(newKey)}

func newKey() (*statement.Signer, error) {
	private, _, err := statement.GenerateKey([]byte("password"))
	if err != nil {
		return nil, err
	}
	return statement.LoadSigner(private, []byte("password"))
}

// Registry is a registry on loopback that can be made slow or go away.
type Registry struct {
	Host     string
	Client   *registry.Client
	Requests atomic.Int64
	// Gate, if set, is called with each request before it is answered; false
	// answers 503.
	Gate atomic.Pointer[func(r *http.Request) bool]
}

// NewRegistry starts an empty registry that ends with the test.
func NewRegistry(t testing.TB) *Registry {
	t.Helper()
	yes := true
	store := olareg.New(config.Config{
		Storage: config.ConfigStorage{StoreType: config.StoreMem},
		API: config.ConfigAPI{
			DeleteEnabled: &yes, Referrer: config.ConfigAPIReferrer{Enabled: &yes},
			Manifest: config.ConfigAPIManifest{SparseImage: &yes, SparseIndex: &yes},
		},
	})
	r := &Registry{}
	var mu sync.Mutex // olareg changes its index without a lock
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		r.Requests.Add(1)
		if gate := r.Gate.Load(); gate != nil && !(*gate)(req) {
			http.Error(w, "away", http.StatusServiceUnavailable)
			return
		}
		mu.Lock()
		defer mu.Unlock()
		store.ServeHTTP(w, req)
	}))
	t.Cleanup(func() {
		server.Close()
		if err := store.Close(); err != nil {
			t.Errorf("close registry: %v", err)
		}
	})
	r.Host = strings.TrimPrefix(server.URL, "http://")
	client, err := registry.New([]registry.Host{{Name: r.Host, PlainHTTP: true, Concurrency: 64}}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := client.Close(); err != nil {
			t.Errorf("close client: %v", err)
		}
	})
	r.Client = client
	return r
}

// Push uploads an image without content under a tag.
func (r *Registry) Push(t testing.TB, repository, tag string) contracts.Image {
	t.Helper()
	return Push(t, r.Client, r.Host, repository, tag)
}

// Push uploads an image without content to a registry.
func Push(t testing.TB, client *registry.Client, host, repository, tag string) contracts.Image {
	t.Helper()
	body := []byte(`{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":[]}}`)
	d := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageConfig, Digest: digestpkg.FromBytes(body), Size: int64(len(body))}
	if err := client.PushBlob(t.Context(), host, repository, d, bytes.NewReader(body)); err != nil {
		t.Fatal(err)
	}
	manifest, err := json.Marshal(ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, Config: d, Layers: []ocispec.Descriptor{},
		Annotations: map[string]string{"name": repository + ":" + tag},
	})
	if err != nil {
		t.Fatal(err)
	}
	m := registry.Manifest{Body: manifest, Descriptor: ocispec.Descriptor{
		MediaType: ocispec.MediaTypeImageManifest, Digest: digestpkg.FromBytes(manifest), Size: int64(len(manifest)),
	}}
	if err := client.PushManifest(t.Context(), host, repository, tag, m); err != nil {
		t.Fatal(err)
	}
	return contracts.Image{Registry: host, Repository: repository, Digest: m.Descriptor.Digest.String()}
}

// Statement is what is to be said about an image.
type Statement struct {
	Verdict      string
	Sequence     int64
	Time         time.Time // zero: the present
	ValidUntil   time.Time // zero: a week after Time
	SnapshotTime time.Time // zero: an hour before Time
	Policy       string    // digest; "": that of "policy"
}

// Sign returns the verification summary of an image as a bundle.
func Sign(t testing.TB, key *statement.Signer, image contracts.Image, s Statement) []byte {
	t.Helper()
	if s.Time.IsZero() {
		s.Time = time.Now()
	}
	if s.ValidUntil.IsZero() {
		s.ValidUntil = s.Time.Add(7 * 24 * time.Hour)
	}
	if s.SnapshotTime.IsZero() {
		s.SnapshotTime = s.Time.Add(-time.Hour)
	}
	if s.Policy == "" {
		s.Policy = contracts.DigestOf([]byte("policy"))
	}
	report := &contracts.Report{
		Digest: image.Digest, Kind: contracts.KindImage, Inventory: contracts.DigestOf([]byte("inventory")),
		Analyzer: "1", Matcher: "1", Policy: s.Policy, Verdict: s.Verdict,
	}
	if s.Verdict == contracts.VerdictFail {
		report.Counts = contracts.Counts{Critical: 1, KEV: 1}
	}
	bundle, err := statement.SignBundle(t.Context(), key, image.Repo(), image.Digest, contracts.PredicateVSA, statement.VSAPredicate(statement.Facts{
		Image: image, Report: report, ReportDigest: contracts.DigestOf([]byte("report")),
		Snapshot:     contracts.SnapshotRef{Digest: contracts.DigestOf(fmt.Append(nil, s.Sequence)), Sequence: s.Sequence},
		SnapshotTime: s.SnapshotTime, Time: s.Time, ValidUntil: s.ValidUntil,
	}))
	if err != nil {
		t.Fatal(err)
	}
	return bundle
}

// Attach attaches a bundle to an image and returns the referrer.
func Attach(t testing.TB, client *registry.Client, image contracts.Image, bundle []byte) ocispec.Descriptor {
	t.Helper()
	subject, err := client.Resolve(t.Context(), registry.Ref{Registry: image.Registry, Repository: image.Repository, Digest: image.Digest})
	if err != nil {
		t.Fatal(err)
	}
	d, err := client.Attach(t.Context(), image.Registry, image.Repository, subject, registry.Artifact{
		Type: contracts.MediaTypeBundle, MediaType: contracts.MediaTypeBundle, Content: bundle,
		Annotations: statement.BundleAnnotations(contracts.PredicateVSA),
	})
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// Attached attaches to every image a verification summary that key signed.
func Attached(t testing.TB, client *registry.Client, key *statement.Signer, s Statement, images ...contracts.Image) {
	t.Helper()
	for _, image := range images {
		Attach(t, client, image, Sign(t, key, image, s))
	}
}

// Detach removes a referrer from an image.
func Detach(t testing.TB, client *registry.Client, image contracts.Image, referrer ocispec.Descriptor) {
	t.Helper()
	subject, err := client.Resolve(t.Context(), registry.Ref{Registry: image.Registry, Repository: image.Repository, Digest: image.Digest})
	if err != nil {
		t.Fatal(err)
	}
	if err := client.Detach(t.Context(), image.Registry, image.Repository, subject, referrer); err != nil {
		t.Fatal(err)
	}
}
