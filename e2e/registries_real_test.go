//go:build real

package e2e

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/registry"
	"github.com/tidewaiter/tidewaiter/libs/run"
	"github.com/tidewaiter/tidewaiter/services/tidewaiter/allinone"
	"github.com/tidewaiter/tidewaiter/services/tidewaiter/sample"
)

// Real registries with their own notifications: docker-registry 2.8, distribution
// 3.1, and olareg with ours. Of each kind of push, one scan or none; what we
// attach comes back as notifications and is not scanned; a deletion is noticed.
//
//	SERVERS="docker-registry distribution" ./e2e/servers/servers.sh with go test -tags real -run TestRealRegistries ./e2e
func TestRealRegistries(t *testing.T) {
	known := map[string]string{"docker-registry": os.Getenv("SERVERS_DOCKER_REGISTRY"), "distribution": os.Getenv("SERVERS_DISTRIBUTION")}
	intake, err := url.Parse(os.Getenv("SERVERS_INTAKE_URL"))
	if err != nil || intake.Host == "" || known["docker-registry"] == "" || known["distribution"] == "" {
		t.Skip("docker-registry and distribution do not run: e2e/servers/servers.sh starts them")
	}
	var hosts []registry.Host
	sources := map[string]any{}
	var registries []map[string]any
	for id, host := range known {
		hosts = append(hosts, registry.Host{Name: host, PlainHTTP: true})
		registries = append(registries, map[string]any{"host": host, "plainHTTP": true})
		sources[id] = map[string]any{
			"kind": "distribution", "registry": host, "auth": map[string]any{"bearer": map[string]any{"tokenFile": os.Getenv("SERVERS_HOOK_TOKEN_FILE")}},
		}
	}
	content, err := json.Marshal(map[string]any{"registries": registries, "sources": sources})
	if err != nil {
		t.Fatal(err)
	}
	cfg, err := run.Parse("", content, noEnv)
	if err != nil {
		t.Fatal(err)
	}
	s := start(t, allinone.Options{Config: cfg, IntakeListen: intake.Host})
	s.client = s.registryClient(append(hosts, s.RegistryHost())...)
	known["olareg"] = s.Registry.Host
	for _, name := range []string{"docker-registry", "distribution", "olareg"} {
		host := known[name]
		t.Run(name, func(t *testing.T) {
			sub := *s
			sub.t = t
			sub.registryStory(t, host)
		})
	}

	// Nothing goes round: when it is quiet it stays quiet.
	s.quiet()
	before := s.log.distinctIDs()
	s.quiet()
	if after := s.log.distinctIDs(); len(after) != len(before) {
		t.Errorf("%d events came after the end", len(after)-len(before))
	}
	for layer, n := range s.log.analyses(t) {
		if n != 1 {
			t.Errorf("layer %s was analysed %d times", layer, n)
		}
	}
}

// registryStory pushes, tags, mounts, attaches and deletes in one registry.
func (s *system) registryStory(t *testing.T, host string) {
	push := func(repository, tag string, images ...sample.Image) sample.Pushed {
		t.Helper()
		p, err := sample.Push(t.Context(), s.client, registry.Ref{Registry: host, Repository: repository, Tag: tag}, images...)
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	stories := story(t)
	image := push("team/tool", "1.0", stories.Clean...)
	index := push("team/shop", "1.0", stories.Vulnerable...)
	s.attested(image, index)

	// the same image by another tag
	ref := registry.Ref{Registry: host, Repository: "team/tool", Digest: image.Ref.Digest}
	m, err := s.client.Manifest(t.Context(), ref)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.client.PushManifest(t.Context(), host, "team/tool", "stable", m); err != nil {
		t.Fatal(err)
	}
	s.log.wait(t, func(l *events) string {
		if len(l.about(contracts.TagObservedV1, host+"/team/tool:stable")) == 0 {
			return "the second tag was not looked at"
		}
		return ""
	})

	// the same layers, mounted into another repository
	mounted := s.mount(t, host, "team/tool", "team/copy", m)
	s.log.wait(t, func(l *events) string {
		if len(l.about(contracts.ImageAttestedV1, mounted)) == 0 {
			return mounted + " is not attested"
		}
		return ""
	})

	chart := s.chart(t, host)
	if end := s.ended(chart); end != contracts.ImageUnsupportedV1 {
		t.Errorf("a Helm chart ended as %s", end)
	}

	s.quiet()
	want := slices.Concat(images(image), images(index), []string{mounted})
	planned, assembled := map[string]bool{}, map[string]map[string]bool{}
	unsupported := 0
	for _, e := range s.log.snapshot() {
		subject := e.Event.Subject()
		if !strings.HasPrefix(subject, host+"/") {
			continue
		}
		switch strings.TrimPrefix(e.Event.Type(), contracts.TypePrefix) {
		case contracts.ImagePlannedV1:
			planned[subject] = true
		case contracts.ImageUnsupportedV1:
			unsupported++
		case contracts.ImageAssembledV1:
			if assembled[subject] == nil {
				assembled[subject] = map[string]bool{}
			}
			assembled[subject][e.Event.ID()] = true
		}
	}
	if len(planned) != len(want) {
		t.Errorf("planned %v, want %v: what is attached to images is none", planned, want)
	}
	for _, im := range want {
		if len(assembled[im]) != 1 {
			t.Errorf("%s was assembled %d times, want once for one push, whatever the number of tags and notifications", im, len(assembled[im]))
		}
		if got := s.referrers(im); len(got) != 4 {
			t.Errorf("%s carries %d referrers, want vuln, VSA, report and SBOM: %v", im, len(got), got)
		}
	}
	if unsupported < 4*len(want) {
		t.Errorf("%d of our own pushes were recognised, want at least %d", unsupported, 4*len(want))
	}

	deleted, err := contracts.ParseImage(mounted)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.client.Delete(t.Context(), registry.Ref{Registry: host, Repository: deleted.Repository, Digest: deleted.Digest}); err != nil {
		t.Fatal(err)
	}
	s.log.wait(t, func(l *events) string {
		if len(l.about(contracts.ImageGoneV1, mounted)) == 0 {
			return mounted + " was deleted, and nobody noticed"
		}
		return ""
	})
}

// mount brings an image into another repository without uploading its blobs
// (distribution-spec, "Mounting a blob from another repository").
func (s *system) mount(t *testing.T, host, from, to string, m registry.Manifest) string {
	t.Helper()
	var doc ocispec.Manifest
	if err := json.Unmarshal(m.Body, &doc); err != nil {
		t.Fatal(err)
	}
	for _, d := range append(doc.Layers, doc.Config) {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPost,
			fmt.Sprintf("http://%s/v2/%s/blobs/uploads/?mount=%s&from=%s", host, to, d.Digest, from), nil)
		if err != nil {
			t.Fatal(err)
		}
		if host == s.Registry.Host {
			req.SetBasicAuth(s.Registry.Username, s.Registry.Password)
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		_ = resp.Body.Close()
		if resp.StatusCode != http.StatusCreated {
			t.Fatalf("mount %s: %s", d.Digest, resp.Status)
		}
	}
	if err := s.client.PushManifest(t.Context(), host, to, "1.0", m); err != nil {
		t.Fatal(err)
	}
	return host + "/" + to + "@" + m.Descriptor.Digest.String()
}

// chart pushes a Helm chart.
func (s *system) chart(t *testing.T, host string) string {
	t.Helper()
	blob := func(mediaType, content string) ocispec.Descriptor {
		d := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromString(content), Size: int64(len(content))}
		if err := s.client.PushBlob(t.Context(), host, "charts/shop", d, strings.NewReader(content)); err != nil {
			t.Fatal(err)
		}
		return d
	}
	body, err := json.Marshal(ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest,
		Config: blob("application/vnd.cncf.helm.config.v1+json", `{"name":"shop","version":"0.1.0"}`),
		Layers: []ocispec.Descriptor{blob("application/vnd.cncf.helm.chart.content.v1.tar+gzip", "a chart's archive")},
	})
	if err != nil {
		t.Fatal(err)
	}
	d := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromBytes(body), Size: int64(len(body))}
	if err := s.client.PushManifest(t.Context(), host, "charts/shop", "0.1.0", registry.Manifest{Descriptor: d, Body: body}); err != nil {
		t.Fatal(err)
	}
	return host + "/charts/shop@" + d.Digest.String()
}
