package registry

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/olareg/olareg"
	"github.com/olareg/olareg/config"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/contracts"
)

func discard() *slog.Logger { return slog.New(slog.DiscardHandler) }

func ptr[T any](v T) *T { return &v }

// olaregServer starts a registry in this process.
func olaregServer(t *testing.T, referrersAPI bool) (*httptest.Server, string) {
	t.Helper()
	reg := olareg.New(config.Config{
		Storage: config.ConfigStorage{StoreType: config.StoreMem},
		API: config.ConfigAPI{
			DeleteEnabled: ptr(true),
			Manifest:      config.ConfigAPIManifest{SparseImage: ptr(true), SparseIndex: ptr(true)},
			Referrer:      config.ConfigAPIReferrer{Enabled: &referrersAPI},
		},
	})
	s := httptest.NewServer(reg)
	t.Cleanup(func() {
		s.Close()
		if err := reg.Close(); err != nil {
			t.Errorf("close registry: %v", err)
		}
	})
	return s, strings.TrimPrefix(s.URL, "http://")
}

func newClient(t *testing.T, hosts ...Host) *Client {
	t.Helper()
	c, err := New(hosts, discard())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Errorf("close client: %v", err)
		}
	})
	return c
}

func random(t *testing.T, n int) []byte {
	t.Helper()
	b := make([]byte, n)
	if _, err := rand.Read(b); err != nil {
		t.Fatal(err)
	}
	return b
}

func descriptorOf(mediaType string, content []byte) ocispec.Descriptor {
	return ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(content), Size: int64(len(content))}
}

func encode(t *testing.T, v any) []byte {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// pushImage pushes an image of the given layers and returns its manifest.
func pushImage(t *testing.T, c *Client, registry, repository, tag string, layers ...[]byte) Manifest {
	t.Helper()
	cfg := encode(t, ocispec.Image{Platform: ocispec.Platform{OS: "linux", Architecture: "amd64"}})
	m := ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest,
		Config: descriptorOf(ocispec.MediaTypeImageConfig, cfg),
	}
	for _, content := range append([][]byte{cfg}, layers...) {
		if err := c.PushBlob(t.Context(), registry, repository, descriptorOf("", content), bytes.NewReader(content)); err != nil {
			t.Fatal(err)
		}
	}
	for _, l := range layers {
		m.Layers = append(m.Layers, descriptorOf(ocispec.MediaTypeImageLayerGzip, l))
	}
	body := encode(t, m)
	out := Manifest{Descriptor: descriptorOf(ocispec.MediaTypeImageManifest, body), Body: body}
	if err := c.PushManifest(t.Context(), registry, repository, tag, out); err != nil {
		t.Fatal(err)
	}
	return out
}

func readAll(t *testing.T, c *Client, registry, repository string, d ocispec.Descriptor) ([]byte, error) {
	t.Helper()
	rc, err := c.Blob(t.Context(), registry, repository, d)
	if err != nil {
		return nil, err
	}
	b, err := io.ReadAll(rc)
	if cerr := rc.Close(); cerr != nil {
		t.Errorf("close: %v", cerr)
	}
	return b, err
}

func TestImageRoundTrip(t *testing.T) {
	_, name := olaregServer(t, true)
	c := newClient(t, Host{Name: name, PlainHTTP: true})
	layer := random(t, 300_000)
	m := pushImage(t, c, name, "team/app", "v1", layer)
	tag := Ref{Registry: name, Repository: "team/app", Tag: "v1"}

	d, err := c.Resolve(t.Context(), tag)
	if err != nil || d.Digest != m.Descriptor.Digest || d.MediaType != ocispec.MediaTypeImageManifest || d.Size != m.Descriptor.Size {
		t.Fatalf("resolve: %+v, %v", d, err)
	}
	got, err := c.Manifest(t.Context(), Ref{Registry: name, Repository: "team/app", Digest: d.Digest.String()})
	if err != nil || !bytes.Equal(got.Body, m.Body) {
		t.Fatalf("manifest: %s, %v", got.Body, err)
	}
	content, err := readAll(t, c, name, "team/app", descriptorOf("", layer))
	if err != nil || !bytes.Equal(content, layer) {
		t.Fatalf("blob: %d bytes, %v", len(content), err)
	}
	for digest, want := range map[string]bool{digest.FromBytes(layer).String(): true, contracts.DigestOf([]byte("no")): false} {
		if have, err := c.HasBlob(t.Context(), name, "team/app", digest); err != nil || have != want {
			t.Errorf("HasBlob(%s) = %v, %v", digest, have, err)
		}
	}
	if _, err := c.Resolve(t.Context(), Ref{Registry: name, Repository: "team/app", Tag: "none"}); !errors.Is(err, ErrNotFound) {
		t.Errorf("resolve of what is not there: %v", err)
	}
	if _, err := readAll(t, c, name, "team/app", descriptorOf("", []byte("no"))); !errors.Is(err, ErrNotFound) {
		t.Errorf("blob that is not there: %v", err)
	}
}

func TestNotConfiguredMakesNoConnection(t *testing.T) {
	asked := 0
	s := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { asked++ }))
	defer s.Close()
	name := strings.TrimPrefix(s.URL, "http://")
	c := newClient(t, Host{Name: "registry.example", PlainHTTP: true})
	ref := Ref{Registry: name, Repository: "a/b", Tag: "v1"}
	calls := map[string]func(ctx context.Context) error{
		"resolve":  func(ctx context.Context) error { _, err := c.Resolve(ctx, ref); return err },
		"manifest": func(ctx context.Context) error { _, err := c.Manifest(ctx, ref); return err },
		"blob": func(ctx context.Context) error {
			_, err := c.Blob(ctx, name, "a/b", descriptorOf("", []byte("x")))
			return err
		},
		"push": func(ctx context.Context) error {
			return c.PushBlob(ctx, name, "a/b", descriptorOf("", []byte("x")), strings.NewReader("x"))
		},
	}
	for what, call := range calls {
		if err := call(t.Context()); !errors.Is(err, ErrNotConfigured) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if asked != 0 {
		t.Errorf("%d requests", asked)
	}
}

func TestReferrers(t *testing.T) {
	for _, api := range []bool{true, false} {
		t.Run(map[bool]string{true: "api", false: "fallback tag"}[api], func(t *testing.T) {
			_, name := olaregServer(t, api)
			c := newClient(t, Host{Name: name, PlainHTTP: true})
			m := pushImage(t, c, name, "app", "v1", random(t, 100))
			at := Ref{Registry: name, Repository: "app", Digest: m.Descriptor.Digest.String()}
			if has, err := c.HasReferrersAPI(t.Context(), at); err != nil || has != api {
				t.Fatalf("HasReferrersAPI = %v, %v", has, err)
			}
			a := Artifact{Type: "application/x.one", MediaType: "text/plain", Content: []byte("one"), Annotations: map[string]string{"k": "v"}}
			b := Artifact{Type: "application/x.two", MediaType: "text/plain", Content: []byte("two")}
			da, err := c.Attach(t.Context(), name, "app", m.Descriptor, a)
			if err != nil {
				t.Fatal(err)
			}
			again, err := c.Attach(t.Context(), name, "app", m.Descriptor, a)
			if err != nil || again.Digest != da.Digest {
				t.Fatalf("again: %v, %v", again.Digest, err)
			}
			db, err := c.Attach(t.Context(), name, "app", m.Descriptor, b)
			if err != nil {
				t.Fatal(err)
			}
			want := func(artifactType string, digests ...digest.Digest) {
				t.Helper()
				list, err := c.Referrers(t.Context(), at, artifactType)
				if err != nil || len(list) != len(digests) {
					t.Fatalf("referrers %q: %+v, %v", artifactType, list, err)
				}
				for i, d := range list {
					if d.Digest != digests[i] {
						t.Errorf("referrer %d is %s, not %s", i, d.Digest, digests[i])
					}
				}
			}
			want("application/x.one", da.Digest)
			want("application/x.two", db.Digest)
			got, err := c.ArtifactContent(t.Context(), name, "app", da.Digest.String(), 10)
			if err != nil || string(got.Content) != "one" || got.Type != "application/x.one" || got.Annotations[contracts.AnnotationOwner] == "" {
				t.Fatalf("content: %+v, %v", got, err)
			}
			if _, err := c.ArtifactContent(t.Context(), name, "app", da.Digest.String(), 2); !errors.Is(err, ErrTooLarge) {
				t.Errorf("limit: %v", err)
			}
			for range 2 { // what is gone already is no error
				if err := c.Detach(t.Context(), name, "app", m.Descriptor, da); err != nil {
					t.Fatal(err)
				}
			}
			want("", db.Digest)
			if err := c.Detach(t.Context(), name, "app", m.Descriptor, db); err != nil {
				t.Fatal(err)
			}
			want("")
		})
	}
}
