package plan_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http/httptest"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/olareg/olareg"
	"github.com/olareg/olareg/config"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"pgregory.net/rapid"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/registry"
	"github.com/tidewaiter/tidewaiter/services/planner/plan"
)

const (
	layerGzip  = ocispec.MediaTypeImageLayerGzip
	dockerList = "application/vnd.docker.distribution.manifest.list.v2+json"
	dockerV2   = "application/vnd.docker.distribution.manifest.v2+json"
)

// server is a registry in this process with a client for it.
type server struct {
	t      *testing.T
	host   string
	client *registry.Client
}

func newServer(t *testing.T) *server {
	t.Helper()
	yes := true
	reg := olareg.New(config.Config{
		Storage: config.ConfigStorage{StoreType: config.StoreMem},
		API:     config.ConfigAPI{DeleteEnabled: &yes, Manifest: config.ConfigAPIManifest{SparseImage: &yes, SparseIndex: &yes}},
	})
	s := httptest.NewServer(reg)
	host := strings.TrimPrefix(s.URL, "http://")
	c, err := registry.New([]registry.Host{{Name: host, PlainHTTP: true}}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(c.Close(), func() error { s.Close(); return reg.Close() }()); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return &server{t: t, host: host, client: c}
}

func encode(t *testing.T, v any) []byte {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func descriptor(mediaType string, content []byte) ocispec.Descriptor {
	return ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(content), Size: int64(len(content))}
}

// blob uploads content.
func (s *server) blob(mediaType, content string) ocispec.Descriptor {
	s.t.Helper()
	d := descriptor(mediaType, []byte(content))
	if err := s.client.PushBlob(s.t.Context(), s.host, "app", d, strings.NewReader(content)); err != nil {
		s.t.Fatal(err)
	}
	return d
}

// put uploads a manifest or an index.
func (s *server) put(mediaType string, v any) ocispec.Descriptor {
	s.t.Helper()
	body := encode(s.t, v)
	d := descriptor(mediaType, body)
	if err := s.client.PushManifest(s.t.Context(), s.host, "app", "", registry.Manifest{Descriptor: d, Body: body}); err != nil {
		s.t.Fatal(err)
	}
	return d
}

// config uploads an image config.
func (s *server) config(arch string, layers int) ocispec.Descriptor {
	img := ocispec.Image{Platform: ocispec.Platform{OS: "linux", Architecture: arch}}
	for i := range layers {
		img.RootFS.DiffIDs = append(img.RootFS.DiffIDs, digest.FromString(fmt.Sprint("diff", i)))
		img.History = append(img.History,
			ocispec.History{CreatedBy: fmt.Sprintf("/bin/sh -c #(nop) COPY  file%d\n in /", i)},
			ocispec.History{CreatedBy: "ENV X=1", EmptyLayer: true})
	}
	return s.blob(ocispec.MediaTypeImageConfig, string(encode(s.t, img)))
}

func manifest(mediaType string, cfg ocispec.Descriptor, layers ...ocispec.Descriptor) ocispec.Manifest {
	return ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: mediaType, Config: cfg, Layers: layers}
}

// image uploads an image with one layer.
func (s *server) image(arch, content string) ocispec.Descriptor {
	d := s.put(ocispec.MediaTypeImageManifest, manifest(ocispec.MediaTypeImageManifest, s.config(arch, 1), s.blob(layerGzip, content)))
	d.Platform = &ocispec.Platform{OS: "linux", Architecture: arch}
	return d
}

func (s *server) index(children ...ocispec.Descriptor) ocispec.Descriptor {
	return s.put(ocispec.MediaTypeImageIndex, ocispec.Index{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex, Manifests: children,
	})
}

func (s *server) plan(d ocispec.Descriptor, options ...plan.Option) plan.Result {
	s.t.Helper()
	res, err := plan.Image(s.t.Context(), s.client, registry.Ref{Registry: s.host, Repository: "app", Digest: d.Digest.String()}, options...)
	if err != nil {
		s.t.Fatal(err)
	}
	if res.Image.Digest != d.Digest.String() {
		s.t.Fatalf("result is about %s", res.Image)
	}
	return res
}

func TestImage(t *testing.T) {
	s := newServer(t)
	one, two := s.blob(layerGzip, "one"), s.blob("application/vnd.docker.image.rootfs.diff.tar.gzip", "two")
	d := s.put(dockerV2, manifest(dockerV2, s.config("amd64", 3), one, two, one))
	res := s.plan(d)
	if len(res.Planned) != 1 {
		t.Fatalf("planned %d", len(res.Planned))
	}
	got := res.Planned[0]
	if got.Kind != contracts.KindImage || got.MediaType != dockerV2 || got.Platform == nil || got.Platform.String() != "linux/amd64" {
		t.Errorf("%+v", got)
	}
	want := []contracts.PlannedLayer{
		{Digest: one.Digest.String(), MediaType: one.MediaType, Size: 3, DiffID: digest.FromString("diff0").String(), Instruction: "COPY file0 in /"},
		{Digest: two.Digest.String(), MediaType: two.MediaType, Size: 3, DiffID: digest.FromString("diff1").String(), Instruction: "COPY file1 in /"},
		{Digest: one.Digest.String(), MediaType: one.MediaType, Size: 3, DiffID: digest.FromString("diff2").String(), Instruction: "COPY file2 in /"},
	}
	if fmt.Sprint(got.Layers) != fmt.Sprint(want) {
		t.Errorf("layers\n%v\nwant\n%v", got.Layers, want)
	}
	if len(res.Layers) != 2 || res.Layers[0].Digest != want[0].Digest || res.Layers[1].Digest != want[1].Digest ||
		res.Layers[0].Image != got.Image || res.Layers[0].MediaType != one.MediaType || res.Layers[0].Size != 3 {
		t.Errorf("requested %+v", res.Layers)
	}
}

// TestWhatIsAnImage: any layer of an image-layer media type means scan.
func TestWhatIsAnImage(t *testing.T) {
	s := newServer(t)
	empty := s.blob(ocispec.MediaTypeEmptyJSON, "{}")
	cfg := s.config("amd64", 1)
	subject := s.image("amd64", "subject")
	helm := s.blob("application/vnd.cncf.helm.config.v1+json", "{}")
	tests := []struct {
		name     string
		config   ocispec.Descriptor
		layers   []string // media types
		artifact string
		subject  bool
		want     string // reason; "": scanned
	}{
		{name: "oci tar", config: cfg, layers: []string{"application/vnd.oci.image.layer.v1.tar"}},
		{name: "oci gzip", config: cfg, layers: []string{layerGzip}},
		{name: "oci zstd", config: cfg, layers: []string{"application/vnd.oci.image.layer.v1.tar+zstd"}},
		{name: "docker gzip", config: cfg, layers: []string{"application/vnd.docker.image.rootfs.diff.tar.gzip"}},
		{name: "nondistributable that is there", config: cfg, layers: []string{"application/vnd.oci.image.layer.nondistributable.v1.tar+gzip"}},
		{name: "upper case and a parameter", config: cfg, layers: []string{"Application/vnd.OCI.image.layer.v1.tar+gzip; x=y"}},
		{name: "encrypted", config: cfg, layers: []string{"application/vnd.oci.image.layer.v1.tar+gzip+encrypted"}},
		{name: "image that carries a subject", config: cfg, layers: []string{layerGzip}, subject: true},
		{name: "image that says it is a helm chart", config: helm, layers: []string{layerGzip}},
		{name: "image that says it is an attestation", config: empty, artifact: "application/vnd.in-toto+json", layers: []string{"application/vnd.in-toto+json", layerGzip}},
		{name: "cache of buildkit as a manifest", config: s.blob("application/vnd.buildkit.cacheconfig.v0", "{}"), layers: []string{layerGzip}},

		{name: "attestations of buildkit", config: cfg, layers: []string{"application/vnd.in-toto+json", "application/vnd.in-toto+json"}, want: "attestation"},
		{name: "cosign signature", config: cfg, layers: []string{"application/vnd.dev.cosign.simplesigning.v1+json"}, want: "signature"},
		{name: "cosign attestation", config: cfg, layers: []string{"application/vnd.dsse.envelope.v1+json"}, want: "attestation"},
		{name: "sigstore bundle", config: empty, artifact: "application/vnd.dev.sigstore.bundle.v0.3+json", layers: []string{"application/vnd.dev.sigstore.bundle.v0.3+json"}, subject: true, want: "sigstore-bundle"},
		{name: "helm", config: helm, layers: []string{"application/vnd.cncf.helm.chart.content.v1.tar+gzip"}, want: "helm-chart"},
		{name: "wasm", config: s.blob("application/vnd.wasm.config.v0+json", "{}"), layers: []string{"application/wasm"}, want: "wasm"},
		{name: "wasm of old", config: s.blob("application/vnd.wasm.config.v1+json", "{}"), layers: []string{"application/vnd.wasm.content.layer.v1+wasm"}, want: "wasm"},
		{name: "spdx", config: empty, layers: []string{"text/spdx+json"}, want: "sbom"},
		{name: "cyclonedx", config: empty, layers: []string{"application/vnd.cyclonedx+json"}, subject: true, want: "sbom"},
		{name: "oras artifact", config: empty, artifact: "application/x.example", layers: []string{"text/plain"}, want: "no-image-layers"},
		{name: "referrer", config: empty, artifact: "application/x.example", layers: []string{"text/plain"}, subject: true, want: "referrer"},
		{name: "no layers", config: cfg, want: "no-layers"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			m := manifest(ocispec.MediaTypeImageManifest, tt.config)
			m.ArtifactType = tt.artifact
			for i, mt := range tt.layers {
				m.Layers = append(m.Layers, s.blob(mt, fmt.Sprint(tt.name, i)))
			}
			if tt.subject {
				m.Subject = &ocispec.Descriptor{MediaType: subject.MediaType, Digest: subject.Digest, Size: subject.Size}
			}
			res := s.plan(s.put(ocispec.MediaTypeImageManifest, m))
			if tt.want == "" {
				if res.Unsupported != nil || len(res.Planned) != 1 || len(res.Planned[0].Layers) != len(tt.layers) {
					t.Fatalf("not scanned: %+v", res.Unsupported)
				}
				return
			}
			if res.Unsupported == nil || res.Unsupported.Reason != tt.want || res.Unsupported.Message == "" || len(res.Layers) != 0 {
				t.Fatalf("want %s, got %+v", tt.want, res.Unsupported)
			}
		})
	}
}

func TestLayersThatCannotBeHad(t *testing.T) {
	s := newServer(t)
	here := s.blob(layerGzip, "here")
	away := descriptor(layerGzip, []byte("away"))
	t.Run("foreign", func(t *testing.T) {
		foreign := descriptor("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", []byte("foreign"))
		foreign.URLs = []string{"http://127.0.0.1:1/layer"}
		res := s.plan(s.put(dockerV2, manifest(dockerV2, s.config("amd64", 2), foreign, here)))
		layers := res.Planned[0].Layers
		if !strings.HasPrefix(layers[0].Missing, "foreign layer") || layers[1].Missing != "" {
			t.Errorf("layers %+v", layers)
		}
		if len(res.Layers) != 1 || res.Layers[0].Digest != here.Digest.String() {
			t.Errorf("requested %+v", res.Layers)
		}
	})
	t.Run("other digest", func(t *testing.T) {
		odd := here
		odd.Digest = digest.SHA512.FromString("here")
		res := s.plan(s.put(ocispec.MediaTypeImageManifest, manifest(ocispec.MediaTypeImageManifest, s.config("amd64", 2), odd, here)))
		if res.Planned[0].Layers[0].Missing == "" || len(res.Layers) != 1 {
			t.Errorf("%+v", res)
		}
	})
	t.Run("encrypted", func(t *testing.T) {
		enc := s.blob("application/vnd.oci.image.layer.v1.tar+encrypted", "enc")
		res := s.plan(s.put(ocispec.MediaTypeImageManifest, manifest(ocispec.MediaTypeImageManifest, s.config("amd64", 1), enc)))
		if res.Planned[0].Layers[0].Missing == "" || len(res.Layers) != 0 {
			t.Errorf("%+v", res)
		}
	})
	t.Run("missing", func(t *testing.T) {
		d := s.put(ocispec.MediaTypeImageManifest, manifest(ocispec.MediaTypeImageManifest, s.config("amd64", 2), here, away))
		_, err := plan.Image(t.Context(), s.client, registry.Ref{Registry: s.host, Repository: "app", Digest: d.Digest.String()})
		if !errors.Is(err, plan.ErrMissingLayer) || !strings.Contains(err.Error(), away.Digest.String()) {
			t.Errorf("%v", err)
		}
	})
	t.Run("in another repository only", func(t *testing.T) {
		d := descriptor(layerGzip, []byte("secret of another"))
		if err := s.client.PushBlob(t.Context(), s.host, "other", d, strings.NewReader("secret of another")); err != nil {
			t.Fatal(err)
		}
		m := s.put(ocispec.MediaTypeImageManifest, manifest(ocispec.MediaTypeImageManifest, s.config("amd64", 1), d))
		_, err := plan.Image(t.Context(), s.client, registry.Ref{Registry: s.host, Repository: "app", Digest: m.Digest.String()})
		if !errors.Is(err, plan.ErrMissingLayer) {
			t.Errorf("%v", err)
		}
	})
}

func TestConfigThatCannotBeRead(t *testing.T) {
	s := newServer(t)
	layer := s.blob(layerGzip, "layer")
	tests := map[string]ocispec.Descriptor{
		"no JSON":           s.blob(ocispec.MediaTypeImageConfig, "{"),
		"not there":         descriptor(ocispec.MediaTypeImageConfig, []byte("not there")),
		"other counts":      s.config("arm64", 5),
		"size that is told": {MediaType: ocispec.MediaTypeImageConfig, Digest: digest.FromString("x"), Size: 5 << 20},
	}
	for name, cfg := range tests {
		t.Run(name, func(t *testing.T) {
			res := s.plan(s.put(ocispec.MediaTypeImageManifest, manifest(ocispec.MediaTypeImageManifest, cfg, layer)))
			if len(res.Planned) != 1 || len(res.Layers) != 1 {
				t.Fatalf("%+v", res)
			}
			if l := res.Planned[0].Layers[0]; l.DiffID != "" || l.Instruction != "" {
				t.Errorf("%+v", l)
			}
		})
	}
}

// TestIndex: every child is there afterwards, planned or with why not.
func TestIndex(t *testing.T) {
	s := newServer(t)
	amd, arm := s.image("amd64", "amd"), s.image("arm64", "arm")
	arm.Platform.Variant = "v8"
	provenance := s.put(ocispec.MediaTypeImageManifest, manifest(ocispec.MediaTypeImageManifest, s.config("amd64", 0), s.blob("application/vnd.in-toto+json", "{}")))
	provenance.Platform = &ocispec.Platform{OS: "unknown", Architecture: "unknown"}
	provenance.Annotations = map[string]string{"vnd.docker.reference.type": "attestation-manifest"}
	lost := descriptor(ocispec.MediaTypeImageManifest, []byte("lost"))
	broken := s.put(ocispec.MediaTypeImageManifest, manifest(ocispec.MediaTypeImageManifest, s.config("s390x", 1), descriptor(layerGzip, []byte("no such layer"))))
	chart := s.put(ocispec.MediaTypeImageManifest, manifest(ocispec.MediaTypeImageManifest, s.blob("application/vnd.cncf.helm.config.v1+json", "{}"), s.blob("text/plain", "x")))
	bare := s.image("riscv64", "riscv")
	bare.Platform = nil
	file := descriptor("text/plain", []byte("file"))
	lostImage := descriptor(ocispec.MediaTypeImageManifest, []byte("lost, and called an image"))
	lostImage.ArtifactType = ocispec.MediaTypeImageConfig

	d := s.index(amd, arm, provenance, lost, broken, chart, bare, file, lostImage)
	res := s.plan(d)
	if len(res.Planned) != 4 || res.Planned[0].Kind != contracts.KindIndex || len(res.Layers) != 3 {
		t.Fatalf("%+v", res)
	}
	want := []struct {
		skipped  string // part of it
		gap      bool
		platform string
	}{
		{platform: "linux/amd64"},
		{platform: "linux/arm64/v8"},
		{skipped: "attestation", platform: "unknown/unknown"},
		{skipped: "not in the repository", gap: true},
		{skipped: "layers is not in the repository", gap: true},
		{skipped: "Helm"},
		{platform: "linux/riscv64"},
		{skipped: "not a manifest: text/plain"},
		{skipped: "not in the repository", gap: true},
	}
	for i, w := range want {
		p := res.Planned[0].Parts[i]
		platform := ""
		if p.Platform != nil {
			platform = p.Platform.String()
		}
		if !strings.Contains(p.Skipped, w.skipped) || (w.skipped == "") != (p.Skipped == "") || p.Gap != w.gap || platform != w.platform {
			t.Errorf("part %d: %+v, platform %s", i, p, platform)
		}
	}
	if got := res.Planned[2].Platform.String(); got != "linux/arm64/v8" {
		t.Errorf("the part's own plan says %s", got)
	}

	res = s.plan(d, plan.WithPlatforms("linux/arm64"))
	if len(res.Planned) != 3 || !res.Planned[0].Parts[0].Gap || res.Planned[0].Parts[1].Gap {
		t.Errorf("selected: %+v", res.Planned)
	}
}

func TestIndexThatIsNone(t *testing.T) {
	s := newServer(t)
	subject := s.image("amd64", "x")
	empty := s.blob(ocispec.MediaTypeEmptyJSON, "{}")
	m := manifest(ocispec.MediaTypeImageManifest, empty, s.blob("text/plain", "about x"))
	m.Subject = &ocispec.Descriptor{MediaType: subject.MediaType, Digest: subject.Digest, Size: subject.Size}
	referrer := s.put(ocispec.MediaTypeImageManifest, m)
	signature := s.put(ocispec.MediaTypeImageManifest, manifest(ocispec.MediaTypeImageManifest, empty, s.blob("application/vnd.dev.cosign.simplesigning.v1+json", "{}")))
	chart := s.put(ocispec.MediaTypeImageManifest, manifest(ocispec.MediaTypeImageManifest, s.blob("application/vnd.cncf.helm.config.v1+json", "{}"), s.blob("text/plain", "x")))
	replaced := descriptor(ocispec.MediaTypeImageManifest, []byte("a statement that a newer one has replaced"))
	replaced.ArtifactType = "application/vnd.dev.sigstore.bundle.v0.3+json"
	tests := []struct {
		name     string
		children []ocispec.Descriptor
		want     string
	}{
		{"empty", nil, "empty-index"},
		{"fallback tag as it was before", []ocispec.Descriptor{replaced, referrer}, "referrers-list"},
		{"fallback tag", []ocispec.Descriptor{referrer, signature}, "referrers-list"},
		{"charts", []ocispec.Descriptor{chart, referrer}, "no-images"},
		{"cache", []ocispec.Descriptor{s.blob(layerGzip, "l"), s.blob("application/vnd.buildkit.cacheconfig.v0", "{}")}, "buildkit-cache"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			res := s.plan(s.index(tt.children...))
			if res.Unsupported == nil || res.Unsupported.Reason != tt.want || len(res.Planned) != 0 || len(res.Layers) != 0 {
				t.Errorf("%+v", res)
			}
		})
	}
}

func TestNestedIndex(t *testing.T) {
	s := newServer(t)
	amd := s.image("amd64", "amd")
	inner := s.index(amd)
	res := s.plan(s.index(inner, amd))
	if len(res.Planned) != 3 || res.Planned[1].Image.Digest != inner.Digest.String() || res.Planned[1].Kind != contracts.KindIndex || len(res.Layers) != 1 {
		t.Fatalf("%+v", res.Planned)
	}
	deep := inner
	for range 6 {
		deep = s.index(deep, s.image("arm64", "arm"))
	}
	res = s.plan(deep)
	gaps := 0
	for _, img := range res.Planned {
		for _, p := range img.Parts {
			if strings.Contains(p.Skipped, "nested deeper") && p.Gap {
				gaps++
			}
		}
	}
	if gaps != 1 {
		t.Errorf("%d gaps for the nesting: %+v", gaps, res.Planned)
	}
}

func TestLimits(t *testing.T) {
	s := newServer(t)
	layers := func(n int) []ocispec.Descriptor {
		l := s.blob(layerGzip, "layer")
		out := make([]ocispec.Descriptor, n)
		for i := range out {
			out[i] = l
		}
		return out
	}
	long := ocispec.Image{}
	for range 256 {
		long.RootFS.DiffIDs = append(long.RootFS.DiffIDs, digest.FromString("d"))
		long.History = append(long.History, ocispec.History{CreatedBy: "RUN " + strings.Repeat("ä", 400)})
	}
	cfg := s.blob(ocispec.MediaTypeImageConfig, string(encode(t, long)))

	res := s.plan(s.put(ocispec.MediaTypeImageManifest, manifest(ocispec.MediaTypeImageManifest, cfg, layers(256)...)))
	if res.Unsupported != nil {
		t.Fatalf("256 layers: %+v", res.Unsupported)
	}
	if b := encode(t, res.Planned[0]); len(b) > contracts.MaxEventBytes {
		t.Errorf("event data of %d bytes", len(b))
	}
	res = s.plan(s.put(ocispec.MediaTypeImageManifest, manifest(ocispec.MediaTypeImageManifest, cfg, layers(257)...)))
	if res.Unsupported == nil || res.Unsupported.Reason != "too-many-layers" {
		t.Errorf("257 layers: %+v", res)
	}
	part := s.image("amd64", "part")
	children := make([]ocispec.Descriptor, plan.MaxChildren+1)
	for i := range children {
		children[i] = part
	}
	res = s.plan(s.index(children...))
	if len(res.Planned) != 2 || !res.Planned[0].Parts[plan.MaxChildren].Gap {
		t.Errorf("%d planned", len(res.Planned))
	}
}

// scripted is a Source of fixed answers.
type scripted struct {
	mediaType string
	body      []byte
	err       error
}

func (s scripted) Manifest(context.Context, registry.Ref) (registry.Manifest, error) {
	return registry.Manifest{Descriptor: descriptor(s.mediaType, s.body), Body: s.body}, s.err
}

func (s scripted) HasBlob(context.Context, string, string, string) (bool, error) { return true, nil }

func (s scripted) ReadBlob(context.Context, string, string, ocispec.Descriptor, int64) ([]byte, error) {
	return s.body, nil
}

func TestManifestsOfOtherKinds(t *testing.T) {
	ref := registry.Ref{Registry: "r.example", Repository: "app", Digest: contracts.DigestOf([]byte("m"))}
	both := `{"schemaVersion":2,"manifests":[{"mediaType":"` + ocispec.MediaTypeImageManifest + `","size":1,"digest":"` + ref.Digest + `"}],"layers":[{"mediaType":"` + layerGzip + `","size":1,"digest":"` + ref.Digest + `"}]}`
	tests := []struct {
		name string
		src  scripted
		want string
		err  error
	}{
		{name: "schema 1", src: scripted{mediaType: "application/vnd.docker.distribution.manifest.v1+prettyjws", body: []byte("{}")}, want: "schema-1"},
		{name: "artifact manifest", src: scripted{mediaType: "application/vnd.oci.artifact.manifest.v1+json", body: []byte("{}")}, want: "artifact"},
		{name: "unknown", src: scripted{mediaType: "text/html", body: []byte("{}")}, want: "unknown-manifest"},
		{name: "unknown to the client", src: scripted{err: fmt.Errorf("x: %w", registry.ErrUnknownManifest)}, want: "unknown-manifest"},
		{name: "too large", src: scripted{err: fmt.Errorf("x: %w", registry.ErrTooLarge)}, want: "manifest-too-large"},
		{name: "no JSON", src: scripted{mediaType: ocispec.MediaTypeImageManifest, body: []byte("{")}, want: "invalid-manifest"},
		{name: "both at once", src: scripted{mediaType: ocispec.MediaTypeImageManifest, body: []byte(both)}, want: "ambiguous-manifest"},
		{name: "both at once, as index", src: scripted{mediaType: dockerList, body: []byte(both)}, want: "ambiguous-manifest"},
		{name: "negative size", src: scripted{mediaType: ocispec.MediaTypeImageManifest, body: []byte(`{"layers":[{"mediaType":"` + layerGzip + `","size":-1}]}`)}, want: "invalid-manifest"},
		{name: "down", src: scripted{err: fmt.Errorf("x: %w", registry.ErrUnavailable)}, err: registry.ErrUnavailable},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			res, err := plan.Image(t.Context(), tt.src, ref)
			if !errors.Is(err, tt.err) {
				t.Fatal(err)
			}
			if tt.want != "" && (res.Unsupported == nil || res.Unsupported.Reason != tt.want) {
				t.Errorf("%+v", res)
			}
		})
	}
	res, err := plan.Image(t.Context(), scripted{err: fmt.Errorf("x: %w", registry.ErrNotFound)}, ref)
	if err != nil || res.Gone == "" {
		t.Errorf("gone: %+v, %v", res, err)
	}
}

// TestInstruction: whatever the config says, the instruction is one short line.
func TestInstruction(t *testing.T) {
	ref := registry.Ref{Registry: "r.example", Repository: "app", Digest: contracts.DigestOf([]byte("m"))}
	rapid.Check(t, func(t *rapid.T) {
		created := rapid.String().Draw(t, "created_by")
		cfg, err := json.Marshal(map[string]any{"history": []any{map[string]any{"created_by": created}}})
		if err != nil {
			t.Fatal(err)
		}
		m := manifest(ocispec.MediaTypeImageManifest, descriptor(ocispec.MediaTypeImageConfig, cfg), descriptor(layerGzip, []byte("l")))
		body, err := json.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		res, err := plan.Image(context.Background(), withConfig{scripted{mediaType: ocispec.MediaTypeImageManifest, body: body}, cfg}, ref)
		if err != nil {
			t.Fatal(err)
		}
		got := res.Planned[0].Layers[0].Instruction
		if len(got) > 200 || !utf8.ValidString(got) || strings.ContainsAny(got, "\n\t\r") {
			t.Fatalf("%q", got)
		}
	})
}

type withConfig struct {
	scripted
	config []byte
}

func (w withConfig) ReadBlob(context.Context, string, string, ocispec.Descriptor, int64) ([]byte, error) {
	return w.config, nil
}

// FuzzImage: no manifest and no config makes planning panic, or hold more than
// an event may.
func FuzzImage(f *testing.F) {
	body, err := json.Marshal(manifest(ocispec.MediaTypeImageManifest, descriptor(ocispec.MediaTypeImageConfig, []byte("{}")), descriptor(layerGzip, []byte("l"))))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(ocispec.MediaTypeImageManifest, body, []byte(`{"os":"linux","architecture":"amd64","history":[{"created_by":"x"}]}`))
	f.Add(ocispec.MediaTypeImageIndex, []byte(`{"manifests":[{"mediaType":"`+ocispec.MediaTypeImageManifest+`","digest":"`+contracts.DigestOf(body)+`","size":2,"platform":{"os":"linux","architecture":"amd64"}}]}`), body)
	f.Fuzz(func(t *testing.T, mediaType string, manifestBody, configBody []byte) {
		ref := registry.Ref{Registry: "r.example", Repository: "app", Digest: contracts.DigestOf(manifestBody)}
		res, err := plan.Image(t.Context(), withConfig{scripted{mediaType: mediaType, body: manifestBody}, configBody}, ref)
		if err != nil {
			t.Fatal(err)
		}
		if (res.Unsupported != nil) == (len(res.Planned) > 0) {
			t.Fatalf("neither planned nor unsupported, or both: %+v", res)
		}
		for _, img := range res.Planned {
			b, err := json.Marshal(img)
			if err != nil || len(b) > contracts.MaxEventBytes {
				t.Fatalf("%d bytes, %v", len(b), err)
			}
		}
	})
}
