package artefact_test

import (
	"context"
	"crypto/ed25519"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/registry"
	"github.com/tidewaiter/tidewaiter/services/advisor/advisortest"
	"github.com/tidewaiter/tidewaiter/services/advisor/artefact"
	"github.com/tidewaiter/tidewaiter/services/advisor/builtin"
)

// one answers every request with the same manifest.
type one []byte

func (o one) Manifest(context.Context, registry.Ref) (registry.Manifest, error) {
	return registry.Manifest{Body: o}, nil
}

func (one) Blob(context.Context, string, string, ocispec.Descriptor) (io.ReadCloser, error) {
	return nil, registry.ErrNotFound
}

func keys(t testing.TB) (ed25519.PrivateKey, []ed25519.PublicKey) {
	t.Helper()
	private, public, err := artefact.GenerateKey()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := errors.Join(os.WriteFile(filepath.Join(dir, "key"), private, 0o600), os.WriteFile(filepath.Join(dir, "pub"), public, 0o600)); err != nil {
		t.Fatal(err)
	}
	key, err := artefact.LoadKey(filepath.Join(dir, "key"))
	if err != nil {
		t.Fatal(err)
	}
	pub, err := artefact.LoadPublicKeys(filepath.Join(dir, "pub"))
	if err != nil {
		t.Fatal(err)
	}
	return key, pub
}

// TestPushTwice: publishing is idempotent, and what is fetched is what was published.
func TestPushTwice(t *testing.T) {
	key, public := keys(t)
	r, to := advisortest.New(), artefact.Repository{Registry: "r.example", Repository: "advisories"}
	file := filepath.Join(t.TempDir(), "a.db")
	if err := builtin.Write(file); err != nil {
		t.Fatal(err)
	}
	first, err := artefact.Push(t.Context(), r, to, file, key)
	if err != nil {
		t.Fatal(err)
	}
	again, err := artefact.Push(t.Context(), r, to, file, key)
	if err != nil || again != first || r.Manifests() != 1 {
		t.Errorf("first %s, then %s, %v; %d manifests", first, again, err, r.Manifests())
	}
	p, err := artefact.Look(t.Context(), r, to, first, public)
	if err != nil || p.Location != first {
		t.Fatalf("got %+v, %v", p, err)
	}
	dir := t.TempDir()
	for range 2 {
		fetched, err := artefact.Fetch(t.Context(), r, to, p, dir)
		if err != nil {
			t.Fatal(err)
		}
		want, errWant := os.ReadFile(file)
		got, errGot := os.ReadFile(fetched)
		if errWant != nil || errGot != nil || contracts.DigestOf(got) != contracts.DigestOf(want) {
			t.Errorf("fetched something else: %v, %v", errWant, errGot)
		}
	}
	if r.Fetched() != 1 {
		t.Errorf("%d blobs were read, want one", r.Fetched())
	}
}

// FuzzLook: whatever a registry answers, nothing that the key did not sign is taken.
func FuzzLook(f *testing.F) {
	f.Add([]byte(`{"schemaVersion":2,"artifactType":"` + contracts.MediaTypeAdvisories + `","layers":[{"mediaType":"` + contracts.MediaTypeAdvisories +
		`","digest":"` + contracts.DigestOf(nil) + `","size":1}],"annotations":{"dev.tidewaiter.advisories.sequence":"1","dev.tidewaiter.advisories.signature":"AAAA"}}`))
	f.Add([]byte(`{}`))
	_, public := keys(f)
	to := artefact.Repository{Registry: "r.example", Repository: "advisories"}
	f.Fuzz(func(t *testing.T, body []byte) {
		p, err := artefact.Look(t.Context(), one(body), to, "", public)
		if err == nil {
			t.Fatalf("taken: %+v", p)
		}
	})
}
