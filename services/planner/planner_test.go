package planner_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cloudevents/sdk-go/v2/event"
	"github.com/olareg/olareg"
	"github.com/olareg/olareg/config"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/bus"
	"github.com/tidewaiter/tidewaiter/libs/registry"
	"github.com/tidewaiter/tidewaiter/services/intake/scope"
	"github.com/tidewaiter/tidewaiter/services/planner"
)

// world is a planner with a registry in this process, whose answers can be replaced.
type world struct {
	t       *testing.T
	host    string
	client  *registry.Client
	planner *planner.Planner

	asked atomic.Int32
	mu    sync.Mutex
	front http.HandlerFunc // nil: the registry answers
}

func newWorld(t *testing.T) *world {
	t.Helper()
	yes := true
	reg := olareg.New(config.Config{
		Storage: config.ConfigStorage{StoreType: config.StoreMem},
		API: config.ConfigAPI{
			DeleteEnabled: &yes,
			Manifest:      config.ConfigAPIManifest{SparseImage: &yes, SparseIndex: &yes},
		},
	})
	w := &world{t: t}
	s := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		w.asked.Add(1)
		w.mu.Lock()
		front := w.front
		w.mu.Unlock()
		if front != nil {
			front(rw, r)
			return
		}
		reg.ServeHTTP(rw, r)
	}))
	w.host = strings.TrimPrefix(s.URL, "http://")
	c, err := registry.New([]registry.Host{{Name: w.host, PlainHTTP: true}}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	w.client = c
	t.Cleanup(func() {
		cerr := c.Close()
		s.Close()
		if err := errors.Join(cerr, reg.Close()); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	w.planner, err = planner.New(planner.DefaultConfig(), map[string]scope.Scope{
		"hub":  {Registry: w.host},
		"team": {Registry: w.host, Paths: []string{"team/", "one"}},
		"far":  {Registry: "registry.example"},
		"any":  {AnyRegistry: true},
		"few": {
			Registry: w.host, Repositories: scope.Filter{Exclude: []string{"scratch/**"}}, Tags: scope.Filter{Include: []string{"v*"}},
			Platforms: []string{"linux/arm64"},
		},
	}, c, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	return w
}

func (w *world) answer(h http.HandlerFunc) {
	w.mu.Lock()
	w.front = h
	w.mu.Unlock()
}

func (w *world) blob(repository, mediaType, content string) ocispec.Descriptor {
	w.t.Helper()
	d := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromString(content), Size: int64(len(content))}
	if err := w.client.PushBlob(w.t.Context(), w.host, repository, d, strings.NewReader(content)); err != nil {
		w.t.Fatal(err)
	}
	return d
}

func (w *world) put(repository, tag, mediaType string, v any) ocispec.Descriptor {
	w.t.Helper()
	body, err := json.Marshal(v)
	if err != nil {
		w.t.Fatal(err)
	}
	d := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(body), Size: int64(len(body))}
	if err := w.client.PushManifest(w.t.Context(), w.host, repository, tag, registry.Manifest{Descriptor: d, Body: body}); err != nil {
		w.t.Fatal(err)
	}
	return d
}

// image pushes an image of the given layer contents.
func (w *world) image(repository, tag, arch string, layers ...string) ocispec.Descriptor {
	w.t.Helper()
	m := ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest,
		Config: w.blob(repository, ocispec.MediaTypeImageConfig, `{"os":"linux","architecture":"`+arch+`"}`),
	}
	for _, l := range layers {
		m.Layers = append(m.Layers, w.blob(repository, ocispec.MediaTypeImageLayerGzip, l))
	}
	d := w.put(repository, tag, ocispec.MediaTypeImageManifest, m)
	d.Platform = &ocispec.Platform{OS: "linux", Architecture: arch}
	return d
}

func (w *world) pushed(source, repository, tag, digest string) event.Event {
	return w.event(contracts.ImagePushedV1, contracts.ImagePushed{
		Source: source, Registry: w.host, Repository: repository, Tag: tag, Digest: digest, Cause: "push", ReceivedAt: time.Now(),
	})
}

func (w *world) deleted(repository, tag, digest string) event.Event {
	return w.deletedBy("hub", repository, tag, digest)
}

func (w *world) deletedBy(source, repository, tag, digest string) event.Event {
	return w.event(contracts.ImageDeletedV1, contracts.ImageDeleted{
		Source: source, Registry: w.host, Repository: repository, Tag: tag, Digest: digest, ReceivedAt: time.Now(),
	})
}

func (w *world) event(name string, data any) event.Event {
	w.t.Helper()
	ev, err := bus.NewEvent(name, "subject", data)
	if err != nil {
		w.t.Fatal(err)
	}
	return ev
}

// names returns "name subject key" of events.
func names(t *testing.T, list []event.Event) []string {
	t.Helper()
	var out []string
	for _, ev := range list {
		out = append(out, fmt.Sprintf("%s %s %s", strings.TrimPrefix(ev.Type(), contracts.TypePrefix), ev.Subject(), ev.Extensions()[contracts.ExtKey]))
	}
	return out
}

func (w *world) handle(ev event.Event) []event.Event {
	w.t.Helper()
	out, err := w.planner.Handle(w.t.Context(), ev)
	if err != nil {
		w.t.Fatal(err)
	}
	return out
}

func (w *world) expect(got []event.Event, want ...string) {
	w.t.Helper()
	if have := names(w.t, got); !slices.Equal(have, want) {
		w.t.Errorf("events\n%s\nwant\n%s", strings.Join(have, "\n"), strings.Join(want, "\n"))
	}
}

func decode[T any](t *testing.T, ev event.Event) T {
	t.Helper()
	v, err := bus.Decode[T](ev)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func TestPushedImage(t *testing.T) {
	w := newWorld(t)
	repo := w.host + "/team/app"
	d := w.image("team/app", "v1", "amd64", "base", "app")
	base, app := digest.FromString("base").String(), digest.FromString("app").String()
	want := []string{
		fmt.Sprintf("tag.observed.v1 %s:v1 %s", repo, repo),
		fmt.Sprintf("image.planned.v1 %s@%s %s", repo, d.Digest, d.Digest),
		fmt.Sprintf("layer.requested.v1 %s %s", base, base),
		fmt.Sprintf("layer.requested.v1 %s %s", app, app),
	}
	for _, source := range []string{"hub", "team", "any", "submit", "catalog", "sweeper"} {
		w.expect(w.handle(w.pushed(source, "team/app", "v1", "")), want...)
		w.expect(w.handle(w.pushed(source, "team/app", "v1", d.Digest.String())), want...)
		w.expect(w.handle(w.pushed(source, "team/app", "", d.Digest.String())), want[1:]...)
	}
	out := w.handle(w.pushed("hub", "team/app", "v1", ""))
	if o := decode[contracts.TagObserved](t, out[0]); o.Digest != d.Digest.String() || o.Source != "hub" || time.Since(o.ObservedAt) > time.Minute {
		t.Errorf("%+v", o)
	}
	if p := decode[contracts.ImagePlanned](t, out[1]); p.Source != "hub" || p.Tag != "v1" || p.Kind != contracts.KindImage || len(p.Layers) != 2 {
		t.Errorf("%+v", p)
	}
	if l := decode[contracts.LayerRequested](t, out[2]); l.Source != "hub" || l.Image.Digest != d.Digest.String() || l.Size != 4 || l.Attempt != 0 {
		t.Errorf("%+v", l)
	}
}

// asked is a registry that notes when it was asked where tags point.
type asked struct {
	*registry.Client
	at []time.Time
}

func (a *asked) Resolve(ctx context.Context, ref registry.Ref) (ocispec.Descriptor, error) {
	a.at = append(a.at, time.Now())
	return a.Client.Resolve(ctx, ref)
}

// What is observed is not newer than the question: an answer that took long
// does not win over one that was asked for after it.
func TestObservedBeforeTheAnswer(t *testing.T) {
	w := newWorld(t)
	w.image("app", "v1", "amd64", "layer")
	reg := &asked{Client: w.client}
	p, err := planner.New(planner.DefaultConfig(), map[string]scope.Scope{"hub": {Registry: w.host}}, reg, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	before := time.Now()
	for _, tag := range []string{"v1", "gone"} {
		reg.at = nil
		out, err := p.Handle(t.Context(), w.pushed("hub", "app", tag, ""))
		if err != nil || len(reg.at) == 0 {
			t.Fatalf("asked %d times, %v", len(reg.at), err)
		}
		if o := decode[contracts.TagObserved](t, out[0]); o.ObservedAt.After(reg.at[0]) || o.ObservedAt.Before(before) {
			t.Errorf("%s: observed at %s, asked at %s", tag, o.ObservedAt, reg.at[0])
		}
	}
}

func TestTagThatHasMovedOn(t *testing.T) {
	w := newWorld(t)
	old := w.image("app", "v1", "amd64", "old")
	now := w.image("app", "v1", "amd64", "new")
	out := w.handle(w.pushed("hub", "app", "v1", old.Digest.String()))
	if o := decode[contracts.TagObserved](t, out[0]); o.Digest != now.Digest.String() {
		t.Errorf("the tag is said to point at %s", o.Digest)
	}
	if p := decode[contracts.ImagePlanned](t, out[1]); p.Image.Digest != old.Digest.String() {
		t.Errorf("planned %s", p.Image)
	}
}

func TestPushedIndex(t *testing.T) {
	w := newWorld(t)
	amd, arm := w.image("app", "", "amd64", "shared", "amd"), w.image("app", "", "arm64", "shared", "arm")
	d := w.put("app", "v1", ocispec.MediaTypeImageIndex, ocispec.Index{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{amd, arm},
	})
	repo := w.host + "/app"
	image := func(d ocispec.Descriptor) string {
		return fmt.Sprintf("image.planned.v1 %s@%s %s", repo, d.Digest, d.Digest)
	}
	layer := func(content string) string {
		return fmt.Sprintf("layer.requested.v1 %s %s", digest.FromString(content), digest.FromString(content))
	}
	out := w.handle(w.pushed("hub", "app", "", d.Digest.String()))
	w.expect(out, image(d), image(amd), image(arm), layer("shared"), layer("amd"), layer("arm"))

	cfg := planner.DefaultConfig()
	cfg.SourcePlatforms = map[string][]string{"hub": {"linux/arm64"}}
	p, err := planner.New(cfg, map[string]scope.Scope{"hub": {Registry: w.host}}, w.client, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	out, err = p.Handle(t.Context(), w.pushed("hub", "app", "", d.Digest.String()))
	if err != nil {
		t.Fatal(err)
	}
	w.expect(out, image(d), image(arm), layer("shared"), layer("arm"))
	out, err = p.Handle(t.Context(), w.pushed("submit", "app", "", d.Digest.String()))
	if err != nil || len(out) != 6 {
		t.Errorf("%d events for another source, %v", len(out), err)
	}
}

func TestOurOwnPushesAreNoImages(t *testing.T) {
	w := newWorld(t)
	subject := w.image("app", "v1", "amd64", "layer")
	a, err := w.client.Attach(t.Context(), w.host, "app", subject, registry.Artifact{
		Type: "application/vnd.dev.sigstore.bundle.v0.3+json", MediaType: "application/vnd.dev.sigstore.bundle.v0.3+json", Content: []byte("{}"),
	})
	if err != nil {
		t.Fatal(err)
	}
	out := w.handle(w.pushed("hub", "app", "", a.Digest.String()))
	w.expect(out, fmt.Sprintf("image.unsupported.v1 %s/app@%s %s", w.host, a.Digest, a.Digest))
	if u := decode[contracts.ImageUnsupported](t, out[0]); u.Reason != "sigstore-bundle" || u.Source != "hub" || u.Message == "" {
		t.Errorf("%+v", u)
	}
}

func TestGone(t *testing.T) {
	w := newWorld(t)
	d := w.image("app", "v1", "amd64", "layer")
	none := digest.FromString("none").String()
	repo := w.host + "/app"
	tag := fmt.Sprintf("tag.observed.v1 %s:%%s %s", repo, repo)
	gone := fmt.Sprintf("image.gone.v1 %s@%s %s", repo, none, none)
	tests := []struct {
		name string
		in   event.Event
		want []string
	}{
		{"digest that is not there", w.pushed("hub", "app", "", none), []string{gone}},
		{"digest and tag that are not there", w.pushed("hub", "app", "v0", none), []string{fmt.Sprintf(tag, "v0"), gone}},
		{"tag that is not there", w.pushed("hub", "app", "v0", ""), []string{fmt.Sprintf(tag, "v0")}},
		{"deleted, and it is", w.deleted("app", "v0", none), []string{fmt.Sprintf(tag, "v0"), gone}},
		{"deleted by digest, and it is", w.deleted("app", "", none), []string{gone}},
		{"deleted, and it is still there", w.deleted("app", "v1", d.Digest.String()), []string{fmt.Sprintf(tag, "v1")}},
		{"deleted by digest, and it is still there", w.deleted("app", "", d.Digest.String()), nil},
		{"tag deleted, and it is still there", w.deleted("app", "v1", ""), []string{fmt.Sprintf(tag, "v1")}},
		{"repository deleted", w.deleted("app", "", ""), nil},
		{"repository deleted, of a source that is about it", w.deletedBy("team", "team/app", "", ""), nil},
		{"tag deleted, the image is still there", w.deleted("app", "v0", d.Digest.String()), []string{fmt.Sprintf(tag, "v0")}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			out := w.handle(tt.in)
			w.expect(out, tt.want...)
			for _, ev := range out {
				if strings.HasSuffix(ev.Subject(), ":v0") && decode[contracts.TagObserved](t, ev).Digest != "" {
					t.Errorf("%s", ev)
				}
			}
		})
	}
}

// TestRefused: what may not be asked for goes to the dead letters, without a connection.
func TestRefused(t *testing.T) {
	w := newWorld(t)
	d := w.image("app", "v1", "amd64", "layer").Digest.String()
	elsewhere := func(source string) event.Event {
		return w.event(contracts.ImagePushedV1, contracts.ImagePushed{Source: source, Registry: "other.example", Repository: "app", Tag: "v1"})
	}
	repository := func(source, repository string) event.Event { return w.deletedBy(source, repository, "", "") }
	tests := []struct {
		name   string
		in     event.Event
		says   string
		failed bool // image.failed is sent
	}{
		{"registry that is not configured", elsewhere("submit"), "add it under registries:", true},
		{"registry that is not configured, of any", elsewhere("any"), "add it under registries:", true},
		{"registry of another source", w.pushed("far", "app", "v1", d), "bound to registry registry.example", false},
		{"path of another source", w.pushed("team", "app", "v1", d), "bound to paths", false},
		{"path that begins alike", w.pushed("team", "teams/app", "v1", d), "bound to paths", false},
		{"unknown source", w.pushed("nobody", "app", "v1", d), `source "nobody" is not configured`, false},
		{"neither tag nor digest", w.pushed("hub", "app", "", ""), "neither a tag nor a digest", false},
		{"deleted repository of another registry", repository("far", "app"), "bound to registry registry.example", false},
		{"deleted repository of another path", repository("team", "app"), "bound to paths", false},
		{"deleted repository, unknown source", repository("nobody", "app"), `source "nobody" is not configured`, false},
		{"deleted repository that is none", repository("hub", "../app"), "not a repository name", false},
		{"repository", w.pushed("hub", "../app", "v1", ""), "not a repository name", false},
		{"tag", w.pushed("hub", "app", "-", ""), "not a tag", false},
		{"digest", w.pushed("hub", "app", "", "sha256:1"), "not a sha256 digest", false},
		{"data", w.event(contracts.ImagePushedV1, "text"), "decode", false},
		{"type", w.event(contracts.ImageGoneV1, "text"), "does not handle", false},
	}
	before := w.asked.Load()
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			out, err := w.planner.Handle(t.Context(), tt.in)
			if o, _ := bus.Classify(err); o != bus.OutcomePermanent || len(out) != 0 {
				t.Fatalf("outcome %s, %d events, %v", o, len(out), err)
			}
			if !strings.Contains(err.Error(), tt.says) {
				t.Errorf("%v", err)
			}
			dead := w.planner.Dead(tt.in, err)
			if (len(dead) == 1) != tt.failed {
				t.Errorf("dead: %v", names(t, dead))
			}
		})
	}
	if n := w.asked.Load() - before; n != 0 {
		t.Errorf("%d requests were sent", n)
	}
}

func TestRegistryTrouble(t *testing.T) {
	w := newWorld(t)
	d := w.image("app", "v1", "amd64", "layer").Digest.String()
	tests := []struct {
		name    string
		answer  http.HandlerFunc
		outcome bus.Outcome
		after   time.Duration
	}{
		{"throttled", func(rw http.ResponseWriter, _ *http.Request) {
			rw.Header().Set("Retry-After", "300")
			rw.WriteHeader(http.StatusTooManyRequests)
		}, bus.OutcomeLater, 290 * time.Second},
		{"down", func(rw http.ResponseWriter, _ *http.Request) { rw.WriteHeader(http.StatusBadGateway) }, bus.OutcomeLater, 0},
		{"unauthorized", func(rw http.ResponseWriter, _ *http.Request) { rw.WriteHeader(http.StatusUnauthorized) }, bus.OutcomePermanent, 0},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			w := newWorld(t)
			w.answer(tt.answer)
			for _, in := range []event.Event{w.pushed("hub", "app", "v1", ""), w.pushed("hub", "app", "", d), w.deleted("app", "", d)} {
				_, err := w.planner.Handle(t.Context(), in)
				outcome, at := bus.Classify(err)
				if outcome != tt.outcome || tt.outcome == bus.OutcomeLater && time.Until(at) < tt.after {
					t.Errorf("%s at %s: %v", outcome, at, err)
				}
			}
		})
	}
	t.Run("a layer is missing", func(t *testing.T) {
		m := ocispec.Manifest{
			Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest,
			Config: w.blob("app", ocispec.MediaTypeImageConfig, "{}"),
			Layers: []ocispec.Descriptor{{MediaType: ocispec.MediaTypeImageLayerGzip, Digest: digest.FromString("none"), Size: 4}},
		}
		bad := w.put("app", "bad", ocispec.MediaTypeImageManifest, m)
		in := w.pushed("hub", "app", "bad", bad.Digest.String())
		_, err := w.planner.Handle(t.Context(), in)
		if o, _ := bus.Classify(err); o != bus.OutcomePermanent {
			t.Fatalf("%s: %v", o, err)
		}
		dead := w.planner.Dead(in, err)
		w.expect(dead, fmt.Sprintf("image.failed.v1 %s/app@%s %s", w.host, bad.Digest, bad.Digest))
		f := decode[contracts.ImageFailed](t, dead[0])
		if f.Stage != "planner" || f.Tag != "bad" || !strings.Contains(f.Message, "layer is not in the image's repository") {
			t.Errorf("%+v", f)
		}
	})
	t.Run("the end comes from outside", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		_, err := w.planner.Handle(ctx, w.pushed("hub", "app", "v1", ""))
		if o, _ := bus.Classify(err); !errors.Is(err, context.Canceled) || o != bus.OutcomeRetry {
			t.Errorf("%s: %v", o, err)
		}
	})
}

func TestDead(t *testing.T) {
	w := newWorld(t)
	long := errors.New(strings.Repeat("ä", 5000))
	dead := w.planner.Dead(w.pushed("hub", "app", "v1", ""), long)
	w.expect(dead, fmt.Sprintf("image.failed.v1 %s/app:v1 %s/app", w.host, w.host))
	if f := decode[contracts.ImageFailed](t, dead[0]); len(f.Message) > 1000 || f.Digest != "" {
		t.Errorf("%d bytes, %+v", len(f.Message), f)
	}
	if dead := w.planner.Dead(w.deleted("app", "v1", ""), long); len(dead) != 0 {
		t.Errorf("%v", names(t, dead))
	}
}

func TestConfig(t *testing.T) {
	good := planner.DefaultConfig()
	good.Platforms = []string{"linux/amd64", "linux/arm/v7", "windows/amd64"}
	if err := good.Validate(); err != nil {
		t.Error(err)
	}
	for name, c := range map[string]planner.Config{
		"platform":        {Attempts: 1, Platforms: []string{"linux"}},
		"source platform": {Attempts: 1, SourcePlatforms: map[string][]string{"a": {"linux/amd64/v8/x"}}},
		"attempts":        {},
		"concurrency":     {Attempts: 1, Concurrency: -1},
	} {
		if c.Validate() == nil {
			t.Errorf("%s: no error", name)
		}
		if _, err := planner.New(c, nil, nil, slog.New(slog.DiscardHandler)); err == nil {
			t.Errorf("%s: New takes it", name)
		}
	}
}

// TestFilters: what the source leaves out reaches an end without being scanned,
// and what its platforms leave out is a gap.
func TestFilters(t *testing.T) {
	w := newWorld(t)
	d := w.image("app", "v1", "amd64", "layer")
	w.image("app", "dev", "amd64", "layer")
	scratch := w.image("scratch/app", "v1", "amd64", "layer")
	repo := w.host + "/app"
	unsupported := func(repository, digest string) string {
		return fmt.Sprintf("image.unsupported.v1 %s/%s@%s %s", w.host, repository, digest, digest)
	}
	observed := func(repository, tag string) string {
		return fmt.Sprintf("tag.observed.v1 %[1]s/%[2]s:%[3]s %[1]s/%[2]s", w.host, repository, tag)
	}
	digest := d.Digest.String()
	w.expect(w.handle(w.pushed("few", "app", "v1", "")), observed("app", "v1"),
		fmt.Sprintf("image.planned.v1 %s@%s %s", repo, digest, digest), fmt.Sprintf("layer.requested.v1 %[1]s %[1]s", digestOf("layer")))
	w.expect(w.handle(w.pushed("few", "app", "dev", "")), observed("app", "dev"), unsupported("app", digest))
	// what it is called may be told by another push
	w.expect(w.handle(w.pushed("few", "app", "", digest)),
		fmt.Sprintf("image.planned.v1 %s@%s %s", repo, digest, digest), fmt.Sprintf("layer.requested.v1 %[1]s %[1]s", digestOf("layer")))
	out := w.handle(w.pushed("few", "scratch/app", "v1", scratch.Digest.String()))
	w.expect(out, observed("scratch/app", "v1"), unsupported("scratch/app", scratch.Digest.String()))
	if u := decode[contracts.ImageUnsupported](t, out[1]); u.Reason != "filtered" || u.Source != "few" || u.Tag != "v1" || !strings.Contains(u.Message, "scratch/**") {
		t.Errorf("%+v", u)
	}
	// who may speak of every image is not bound by the filters of one source
	if out := w.handle(w.pushed("submit", "app", "dev", "")); len(out) != 3 {
		t.Errorf("submitted by hand: %q", names(t, out))
	}
	arm := w.image("app", "", "arm64", "arm")
	index := w.put("app", "v2", ocispec.MediaTypeImageIndex, ocispec.Index{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{d, arm},
	})
	out = w.handle(w.pushed("few", "app", "v2", index.Digest.String()))
	var planned []string
	for _, ev := range out {
		if strings.HasSuffix(ev.Type(), contracts.ImagePlannedV1) {
			planned = append(planned, decode[contracts.ImagePlanned](t, ev).Image.Digest)
		}
	}
	if want := []string{index.Digest.String(), arm.Digest.String()}; !slices.Equal(planned, want) {
		t.Errorf("planned %q, want %q: the source wants linux/arm64 alone", planned, want)
	}

	gone := digestOf("none")
	if out := w.handle(w.deletedBy("few", "scratch/app", "", gone)); len(out) != 0 {
		t.Errorf("a deletion in a repository that is left out: %q", names(t, out))
	}
	w.expect(w.handle(w.deletedBy("few", "app", "", gone)), fmt.Sprintf("image.gone.v1 %s@%s %s", repo, gone, gone))
}

func digestOf(s string) string { return digest.FromString(s).String() }
