package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/bus"
	"github.com/tidewaiter/tidewaiter/libs/embedded"
	"github.com/tidewaiter/tidewaiter/libs/registry"
	"github.com/tidewaiter/tidewaiter/libs/run"
	"github.com/tidewaiter/tidewaiter/services/tidewaiter/allinone"
	"github.com/tidewaiter/tidewaiter/services/tidewaiter/sample"
)

// outside are registries beside the embedded one: proxies that can be told to
// misbehave, each a registry of its own, before one store of images.
type outside struct {
	*system
	store   *embedded.Servers
	proxies map[string]*troubled
}

// startStore starts embedded servers whose registry is one that a pipeline
// knows, with their data below dir, until the test ends.
func startStore(t *testing.T, dir string) *embedded.Servers {
	t.Helper()
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	store, err := embedded.Start(ctx, embedded.Options{Dir: filepath.Join(dir, "store")}, slog.New(slog.DiscardHandler))
	if err != nil {
		cancel()
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cancel()
		if err := store.Wait(); err != nil {
			t.Errorf("stop the store: %v", err)
		}
	})
	return store
}

// startOutside starts a pipeline that knows a registry for each label.
func startOutside(t *testing.T, more string, labels ...string) *outside {
	t.Helper()
	dir := t.TempDir()
	store := startStore(t, dir)
	o := &outside{store: store, proxies: map[string]*troubled{}}
	secret := filepath.Join(dir, "password")
	if err := os.WriteFile(secret, []byte(store.RegistryPassword), 0o600); err != nil {
		t.Fatal(err)
	}
	var registries []map[string]any
	for _, label := range labels {
		o.proxies[label] = trouble(t, store.RegistryAddress)
		registries = append(registries, map[string]any{
			"host": o.proxies[label].address, "plainHTTP": true,
			"username": store.RegistryUsername, "passwordFile": secret,
		})
	}
	config, err := json.Marshal(map[string]any{"registries": registries}) // JSON is YAML
	if err != nil {
		t.Fatal(err)
	}
	cfg, err := run.Parse("", append(append(config[:len(config)-1], more...), '}'), func(string) (string, bool) { return "", false })
	if err != nil {
		t.Fatal(err)
	}
	o.system = start(t, allinone.Options{Dir: filepath.Join(dir, "data"), Config: cfg})
	return o
}

// direct returns a client that does not go through the proxy.
func (o *outside) direct(label string) *registry.Client {
	return o.registryClient(registry.Host{
		Name: o.proxies[label].address, Address: o.store.RegistryAddress, PlainHTTP: true,
		Username: o.store.RegistryUsername, Password: o.store.RegistryPassword,
	})
}

// submit pushes images into a registry, past its proxy, and says so to intake.
func (o *outside) submit(label string, images []sample.Image) []sample.Pushed {
	o.t.Helper()
	client := o.direct(label)
	var pushed []sample.Pushed
	for i, image := range images {
		p, err := sample.Push(o.t.Context(), client, registry.Ref{
			Registry: o.proxies[label].address, Repository: fmt.Sprintf("%s/app-%d", digest.FromString(label).Encoded()[:12], i), Tag: "1",
		}, image)
		if err != nil {
			o.t.Fatal(err)
		}
		pushed = append(pushed, p)
		o.announce(p)
	}
	return pushed
}

// announce tells intake of a push by hand.
func (s *system) announce(p sample.Pushed) {
	s.t.Helper()
	ref := p.Ref.Registry + "/" + p.Ref.Repository + ":" + p.Ref.Tag
	status, body := s.deliver(s.Intake+"/v1/submit", map[string]string{"Authorization": "Bearer " + s.Token}, []byte(`{"ref":"`+ref+`"}`))
	if status != http.StatusAccepted {
		s.t.Fatalf("submit %s: %d %s", ref, status, body)
	}
}

// deadLetters returns all dead letters, oldest first.
func (s *system) deadLetters() []contracts.DeadLetter {
	s.t.Helper()
	b, err := bus.New(s.BusConfig(), "e2e", slog.New(slog.DiscardHandler), nil)
	if err != nil {
		s.t.Fatal(err)
	}
	defer func() { _ = b.Close() }() // nothing was written
	letters, err := b.ListDeadLetters(s.t.Context(), bus.DeadLetterFilter{})
	if err != nil {
		s.t.Fatal(err)
	}
	return letters
}

// distinctFleet returns n images that share a layer with each other and with no
// other fleet.
func distinctFleet(t testing.TB, salt, n int) []sample.Image {
	t.Helper()
	layer := func(instruction string, files ...sample.File) sample.Layer {
		l, err := sample.NewLayer(instruction, files...)
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	shared := layer("RUN npm ci", sample.NPM("srv", "lodash", "4.17.4"), sample.NPM("srv", fmt.Sprintf("fleet-%d", salt), "1.0.0"),
		sample.File{Path: "srv/data.bin", Body: sample.Noise(uint64(10_000+salt), 40<<10)})
	var out []sample.Image
	for i := range n {
		own := layer("COPY app", sample.NPM("app", "minimist", "0.0.8"), sample.NPM("app", fmt.Sprintf("own-%d-%d", salt, i), "1.0.0"))
		out = append(out, sample.Image{Platform: sample.AMD64, Layers: []sample.Layer{shared, own}})
	}
	return out
}

// trouble that passes: the images of each registry, and what is asserted of them.
type disturbed struct {
	*outside
	labels []string
	fleets map[string][]sample.Image
	pushed map[string][]sample.Pushed
	want   map[string]string // reports by image, undisturbed
}

const perRegistry = 2 // images

// disturb starts a pipeline with one registry a misdeed, and images for each.
func disturb(t *testing.T, misdeeds ...misdeed) *disturbed {
	t.Helper()
	d := &disturbed{fleets: map[string][]sample.Image{}, pushed: map[string][]sample.Pushed{}}
	var all []sample.Image
	for i, what := range misdeeds {
		d.labels = append(d.labels, string(what))
		d.fleets[string(what)] = distinctFleet(t, i, perRegistry)
		all = append(all, d.fleets[string(what)]...)
	}
	d.want = undisturbed(t, all)
	d.outside = startOutside(t, "", d.labels...)
	return d
}

// all lets a share of the requests to every registry go wrong.
func (d *disturbed) all(s share) {
	for _, label := range d.labels {
		d.proxies[label].do(misdeed(label), s)
	}
}

func (d *disturbed) submitAll() {
	d.t.Helper()
	for _, label := range d.labels {
		d.pushed[label] = d.submit(label, d.fleets[label])
	}
}

// met waits until every proxy did so many requests wrong.
func (d *disturbed) met(hits int64) {
	d.t.Helper()
	d.log.wait(d.t, func(*events) string {
		for _, label := range d.labels {
			if n := d.proxies[label].hits.Load(); n < hits {
				return fmt.Sprintf("%d requests met with %q, not %d", n, label, hits)
			}
		}
		return ""
	})
}

// good waits for all images and asserts that they are what they are without
// trouble, and that no layer was analysed twice.
func (d *disturbed) good() {
	d.t.Helper()
	d.attested(slices.Concat(slices.Collect(maps.Values(d.pushed))...)...)
	d.quiet()
	got := map[string]string{}
	for _, label := range d.labels {
		d.proxies[label].behave()
		s := *d.system
		s.client = d.direct(label)
		maps.Copy(got, s.reportDigests(d.pushed[label]))
		for _, p := range d.pushed[label] {
			if attached := s.referrers(p.String()); len(attached) != 4 {
				d.t.Errorf("%s (%s) carries %d referrers: %v", p, label, len(attached), attached)
			}
		}
	}
	sameReports(d.t, got, d.want)
	for layer, n := range d.log.analyses(d.t) {
		if n != 1 {
			d.t.Errorf("layer %s was analysed %d times", layer, n)
		}
	}
}

func (d *disturbed) noDeadLetters() {
	d.t.Helper()
	for _, l := range d.deadLetters() {
		d.t.Errorf("dead letter %s, %s of %s: %s", l.ID, l.EventType, l.Subject, l.Reason)
	}
}

// Registries that refuse, fail and break off: first with every request, until
// an image of another registry, which stands behind theirs in every queue, is
// done; then with one of three, for a while.
func TestRegistriesDown(t *testing.T) {
	t.Parallel()
	misdeeds := []misdeed{throttlesFor, fails503, resets, truncates}
	if *chaos {
		misdeeds = append(misdeeds, throttles, fails500, fails502, resetsLate, redirects)
	}
	d := registriesDown(t, misdeeds...)
	d.all(passing)
	d.good()
	d.noDeadLetters()
}

// Registries that never come to an end: it takes as long as they are given.
func TestRegistriesSlow(t *testing.T) {
	t.Parallel()
	if !*chaos {
		t.Skip("it takes minutes: task chaos runs it")
	}
	d := registriesDown(t, trickles, endlessHeader)
	for _, p := range d.proxies {
		p.behave()
	}
	d.good()
	d.noDeadLetters()
}

func registriesDown(t *testing.T, misdeeds ...misdeed) *disturbed {
	t.Helper()
	d := disturb(t, misdeeds...)
	d.all(every)
	d.submitAll()
	began := time.Now()
	d.attested(d.push("healthy/app", "1", distinctFleet(t, len(misdeeds), 1)...))
	t.Logf("the image of a good registry was done in %s", time.Since(began).Round(time.Millisecond))
	d.met(2 * perRegistry)
	if n := len(d.log.named(contracts.ImageAttestedV1)); n != 1 {
		t.Errorf("%d images were attested in the middle of the trouble", n)
	}
	return d
}

// liars are registries that answer with something else than what was asked for.
func liars() []misdeed {
	return []misdeed{swaps, wrongLength, endlessBody, notJSON, emptyAnswers}
}

// Registries that lie now and then, each about every blob: they are asked again.
func TestRegistriesLieNowAndThen(t *testing.T) {
	t.Parallel()
	d := disturb(t, liars()...)
	d.all(bearable)
	d.submitAll()
	d.met(2 * 3 * perRegistry) // two layers and a configuration of each image, twice
	d.good()
	d.noDeadLetters()
}

// Registries that lie whatever is asked: their images end with a reason, after
// a few tries, and are good when they are pushed again later.
func TestRegistriesLieForGood(t *testing.T) {
	t.Parallel()
	d := disturb(t, liars()...)
	d.all(every)
	d.submitAll()
	healthy := d.push("healthy/app", "1", distinctFleet(t, len(liars()), 1)...)
	d.attested(healthy)
	for _, label := range d.labels {
		for _, p := range d.pushed[label] {
			d.failed(label, p)
		}
	}
	if n := len(d.log.named(contracts.ImageAttestedV1)); n != 1 {
		t.Errorf("%d images were attested on the word of a liar", n-1)
	}
	for _, label := range d.labels {
		d.proxies[label].behave()
	}
	for _, label := range d.labels {
		for _, p := range d.pushed[label] {
			d.announce(p)
		}
	}
	d.good()
	for _, l := range d.deadLetters() {
		if l.Reason == "" || l.Service != "planner" || l.Attempts < 2 {
			t.Errorf("dead letter %s of %s after %d attempts: %q", l.ID, l.Service, l.Attempts, l.Reason)
		}
	}
}

// failed waits for the end of an image that cannot be read, by its tag or its
// digest, and asserts that it says why.
func (d *disturbed) failed(label string, p sample.Pushed) {
	d.t.Helper()
	tagged := p.Ref.Registry + "/" + p.Ref.Repository + ":" + p.Ref.Tag
	var end bus.Tailed
	d.log.wait(d.t, func(l *events) string {
		for _, subject := range []string{tagged, p.String()} {
			for _, name := range []string{contracts.ImageFailedV1, contracts.ImageUnsupportedV1} {
				if all := l.about(name, subject); len(all) > 0 {
					end = all[0]
					return ""
				}
			}
		}
		return fmt.Sprintf("%s (%s) has reached no end", p, label)
	})
	var said struct {
		Message string `json:"message"`
	}
	if err := end.Event.DataAs(&said); err != nil || said.Message == "" {
		d.t.Errorf("%s (%s) ended with %s %q, %v", p, label, end.Event.Type(), said.Message, err)
	}
	d.t.Logf("%s: %s: %s", label, strings.TrimPrefix(end.Event.Type(), contracts.TypePrefix), said.Message)
}
