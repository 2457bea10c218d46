package sweeper

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/http/httptest"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/alicebob/miniredis/v2"
	"github.com/cloudevents/sdk-go/v2/event"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/bus"
	"github.com/tidewaiter/tidewaiter/libs/redis"
	"github.com/tidewaiter/tidewaiter/libs/registry"
	"github.com/tidewaiter/tidewaiter/libs/store"
	"github.com/tidewaiter/tidewaiter/libs/store/storetest"
	"github.com/tidewaiter/tidewaiter/services/catalog"
	"github.com/tidewaiter/tidewaiter/services/intake"
	"github.com/tidewaiter/tidewaiter/services/intake/scope"
	"github.com/tidewaiter/tidewaiter/services/sweeper/list"
)

const host = "registry.example.com"

// world is a registry, a catalog with its real API, and sweepers between them.
type world struct {
	t       *testing.T
	db      *store.DB
	mini    *miniredis.Miniredis
	api     *catalogAPI
	catalog *catalog.Service
	cfg     Config
	sweep   intake.Sweep

	mu      sync.Mutex
	clock   time.Time
	tags    map[string]map[string]string // what the registry holds
	fault   func(repository, next string) error
	noHead  func(repository, tag string) error // to say where a tag points
	noRefs  func(digest string) error          // to say what refers to an image
	heads   int
	pages   int
	held    map[string][]string // digests of referrers by image
	removed map[string]bool     // referrers that are gone
	noAPI   bool                // there is only the fallback tag
	sent    []event.Event
	refuse  func(n int) error // to store the n-th event
}

func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{
		t: t, db: storetest.Open(t), mini: miniredis.RunT(t), clock: time.Now().UTC().Truncate(time.Second),
		tags: map[string]map[string]string{}, held: map[string][]string{}, removed: map[string]bool{},
		cfg:   Config{Tick: time.Second, Attempts: 2, Pause: time.Minute, Keep: 24 * time.Hour, TokenEnv: "SWEEPER_TEST_TOKEN"},
		sweep: intake.Sweep{API: list.Distribution, Rate: 1000, Every: time.Hour, Grace: time.Minute},
	}
	t.Setenv("SWEEPER_TEST_TOKEN", "a-token")
	if err := Migrate(t.Context(), w.db); err != nil {
		t.Fatal(err)
	}
	var err error
	if w.catalog, err = catalog.New(t.Context(), catalog.DefaultConfig(), w.db, nobody{}, slog.New(slog.DiscardHandler)); err != nil {
		t.Fatal(err)
	}
	s := httptest.NewServer(w.catalog.API(func() ([]string, error) { return []string{"catalogs"}, nil }))
	t.Cleanup(s.Close)
	w.api = newCatalogAPI(s.URL, func() (string, error) { return "catalogs", nil })
	return w
}

type nobody struct{}

func (nobody) Publish(context.Context, ...event.Event) error { return nil }

// sweeper returns another replica.
func (w *world) sweeper() *Sweeper {
	w.t.Helper()
	leases, err := redis.Open(redis.Config{URL: "redis://" + w.mini.Addr()})
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { _ = leases.Close() })
	s, err := New(w.cfg, intake.Sources{"main": {Kind: "distribution", Registry: host, Auth: intake.Auth{None: true}, Sweep: &w.sweep}}, Deps{
		DB: w.db, Registry: w, Catalog: w.api, Bus: w, Leases: leases, Log: slog.New(slog.DiscardHandler), Now: w.now,
	})
	if err != nil {
		w.t.Fatal(err)
	}
	return s
}

func (w *world) now() time.Time {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.clock
}

func (w *world) pass(d time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.clock = w.clock.Add(d)
}

func digestOf(of string) string { return contracts.DigestOf([]byte(of)) }

// hold puts tags into the registry; each has a digest of its own.
func (w *world) hold(repository string, tags ...string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.tags[repository] == nil {
		w.tags[repository] = map[string]string{}
	}
	for _, t := range tags {
		w.tags[repository][t] = digestOf(repository + ":" + t)
	}
}

func (w *world) pageOf(all []string, repository, next string, limit int) (registry.Listing, error) {
	w.pages++
	if w.fault != nil {
		if err := w.fault(repository, next); err != nil {
			return registry.Listing{}, err
		}
	}
	all = slices.DeleteFunc(all, func(s string) bool { return s <= next })
	l := registry.Listing{Names: all[:min(limit, len(all))]}
	if len(all) > limit {
		l.Next = all[limit-1]
	}
	return l, nil
}

func (w *world) ListRepositories(_ context.Context, _, next string, limit int) (registry.Listing, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.pageOf(slices.Sorted(maps.Keys(w.tags)), "", next, limit)
}

func (w *world) ListTags(_ context.Context, _, repository, next string, limit int) (registry.Listing, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.pageOf(slices.Sorted(maps.Keys(w.tags[repository])), repository, next, limit)
}

func (w *world) Resolve(_ context.Context, ref registry.Ref) (ocispec.Descriptor, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.heads++
	if ref.Digest != "" {
		if w.removed[ref.Digest] {
			return ocispec.Descriptor{}, registry.ErrNotFound
		}
		return ocispec.Descriptor{Digest: digest.Digest(ref.Digest)}, nil
	}
	if w.noHead != nil {
		if err := w.noHead(ref.Repository, ref.Tag); err != nil {
			return ocispec.Descriptor{}, err
		}
	}
	d, ok := w.tags[ref.Repository][ref.Tag]
	if !ok {
		return ocispec.Descriptor{}, registry.ErrNotFound
	}
	return ocispec.Descriptor{Digest: digest.Digest(d), MediaType: ocispec.MediaTypeImageManifest}, nil
}

func (w *world) AllReferrers(_ context.Context, ref registry.Ref) ([]ocispec.Descriptor, bool, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.noRefs != nil {
		if err := w.noRefs(ref.Digest); err != nil {
			return nil, false, err
		}
	}
	var all []ocispec.Descriptor
	for _, d := range w.held[ref.Digest] {
		if w.noAPI || !w.removed[d] {
			all = append(all, ocispec.Descriptor{Digest: digest.Digest(d), ArtifactType: contracts.MediaTypeBundle})
		}
	}
	return all, !w.noAPI, nil
}

// Publish stores events and tells catalog, as Kafka does.
func (w *world) Publish(ctx context.Context, events ...event.Event) error {
	for _, ev := range events {
		w.mu.Lock()
		n := len(w.sent)
		refuse := w.refuse
		if refuse == nil || refuse(n) == nil {
			w.sent = append(w.sent, ev)
		}
		w.mu.Unlock()
		if refuse != nil {
			if err := refuse(n); err != nil {
				return err
			}
		}
	}
	for i := range events {
		events[i].SetSource("/services/sweeper")
	}
	_, err := w.catalog.Batch(ctx, events)
	return err
}

// tell lets catalog know of an event of another service.
func (w *world) tell(name, subject string, data any) {
	w.t.Helper()
	ev, err := bus.NewEvent(name, subject, data)
	if err != nil {
		w.t.Fatal(err)
	}
	ev.SetID(contracts.OutputID("test", subject, w.now().String(), name, subject))
	ev.SetSource("/services/test")
	ev.SetTime(w.now())
	if _, err := w.catalog.Handle(w.t.Context(), ev); err != nil {
		w.t.Fatal(err)
	}
}

// observed lets catalog know where a tag points, "" for nowhere, as planner does.
func (w *world) observed(repository, tag, digest string) {
	w.t.Helper()
	w.tell(contracts.TagObservedV1, host+"/"+repository+":"+tag, contracts.TagObserved{
		Source: "main", Registry: host, Repository: repository, Tag: tag, Digest: digest, ObservedAt: w.now(),
	})
}

// ended lets catalog know that an image has reached its end.
func (w *world) ended(repository, digest string) {
	w.t.Helper()
	image := contracts.Image{Registry: host, Repository: repository, Digest: digest}
	w.tell(contracts.ImageUnsupportedV1, image.String(), contracts.ImageUnsupported{Image: image, Source: "main", Reason: "helm-chart"})
}

// known lets catalog know an image under a tag, as planner does.
func (w *world) known(repository, tag string) {
	w.t.Helper()
	d := digestOf(repository + ":" + tag)
	w.observed(repository, tag, d)
	image := contracts.Image{Registry: host, Repository: repository, Digest: d}
	w.tell(contracts.ImagePlannedV1, image.String(), contracts.ImagePlanned{Image: image, Source: "main", Tag: tag, Kind: contracts.KindImage})
}

// webhook lets catalog know what intake was told of a push.
func (w *world) webhook(repository, tag string) {
	w.t.Helper()
	w.webhookOf(repository, tag, digestOf(repository+":"+tag))
}

// webhookOf is webhook of a sender that leaves the tag or the digest out.
func (w *world) webhookOf(repository, tag, digest string) {
	w.t.Helper()
	w.tell(contracts.ImagePushedV1, host+"/"+repository+":"+tag+"@"+digest, contracts.ImagePushed{
		Source: "main", Registry: host, Repository: repository, Tag: tag, Digest: digest, Cause: contracts.CausePush, ReceivedAt: w.now(),
	})
}

// turn lets a sweeper do what is due.
func (w *world) turn(s *Sweeper) {
	w.t.Helper()
	if err := s.Turn(w.t.Context(), "main"); err != nil {
		w.t.Fatal(err)
	}
}

// full asks for a sweep and returns it when it is finished.
func (w *world) full(s *Sweeper, dryRun bool) contracts.Sweep {
	w.t.Helper()
	w.pass(time.Second)
	if _, err := s.Request(w.t.Context(), "main", dryRun); err != nil {
		w.t.Fatal(err)
	}
	w.turn(s)
	return w.last(s)
}

func (w *world) last(s *Sweeper) contracts.Sweep {
	w.t.Helper()
	last, _, err := s.Status(w.t.Context(), "main")
	if err != nil || last == nil {
		w.t.Fatalf("%v, %v", last, err)
	}
	return *last
}

// pushes returns the subjects of what was sent, by event id, and how often each was.
func (w *world) pushes(name, cause string) map[string]int {
	w.t.Helper()
	w.mu.Lock()
	defer w.mu.Unlock()
	out := map[string]int{}
	for _, ev := range w.sent {
		if ev.Type() != contracts.TypePrefix+name {
			continue
		}
		if name == contracts.ImagePushedV1 {
			d, err := bus.Decode[contracts.ImagePushed](ev)
			if err != nil || d.Cause != cause {
				continue
			}
		}
		out[ev.ID()+" "+ev.Subject()]++
	}
	return out
}

func subjects(pushes map[string]int) []string {
	var out []string
	for k := range pushes {
		_, subject, _ := strings.Cut(k, " ")
		out = append(out, subject)
	}
	slices.Sort(out)
	return out
}

func named(repository string, tags ...string) []string {
	var out []string
	for _, t := range tags {
		out = append(out, host+"/"+repository+":"+t+"@"+digestOf(repository+":"+t))
	}
	return out
}

func numbers(n int) []string {
	tags := make([]string, n)
	for i := range tags {
		tags[i] = fmt.Sprintf("v%05d", i)
	}
	return tags
}

// What catalog knows is left alone; what it does not is pushed into the bulk
// lane, under the id of the source.
func TestWhatWasMissedIsPushed(t *testing.T) {
	w := newWorld(t)
	w.hold("team/app", "1", "2", "3")
	w.hold("team/tool", "1")
	w.known("team/app", "2")
	s := w.sweeper()
	p := w.full(s, false)
	if p.State != contracts.SweepComplete || p.Figures.Repositories != 2 || p.Figures.Tags != 4 || p.Figures.Missed != 3 {
		t.Errorf("%+v", p)
	}
	got := subjects(w.pushes(contracts.ImagePushedV1, contracts.CauseSweep))
	want := slices.Concat(named("team/app", "1", "3"), named("team/tool", "1"))
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("%v\nwant %v", got, want)
	}
	for _, ev := range w.sent {
		d, err := bus.Decode[contracts.ImagePushed](ev)
		if err != nil || d.Source != "main" || ev.Extensions()[contracts.ExtLane] != contracts.LaneBulk {
			t.Errorf("%+v, %v", d, err)
		}
	}
	// what was pushed is known now: a second sweep sends nothing
	w.pass(time.Hour)
	if p := w.full(s, false); p.Figures.Missed != 0 || len(w.sent) != 3 {
		t.Errorf("the second sweep: %+v, %d events", p.Figures, len(w.sent))
	}
}

func TestDryRunSendsNothing(t *testing.T) {
	w := newWorld(t)
	w.hold("team/app", "1", "2")
	s := w.sweeper()
	p := w.full(s, true)
	if !p.DryRun || p.State != contracts.SweepComplete || p.Figures.Missed != 2 || len(w.sent) != 0 {
		t.Errorf("%+v, %d events", p, len(w.sent))
	}
	if p := w.full(s, false); p.DryRun || p.Figures.Missed != 2 || len(w.sent) != 2 {
		t.Errorf("the real one: %+v, %d events", p, len(w.sent))
	}
	// nor does it count pushes as seen
	w.hold("team/app", "3")
	w.full(s, true)
	if p := w.full(s, false); p.Figures.Changed != 1 {
		t.Errorf("after a dry run: %+v", p.Figures)
	}
}

// 10,000 tags: each is asked for with one HEAD, only unknown digests are sent,
// and memory does not grow with them.
func TestBackfill(t *testing.T) {
	const tags, repositories = 2500, 4
	w := newWorld(t)
	w.sweep.Rate, w.sweep.NoStatements = 1000, true
	all := numbers(tags)
	known := 0
	for r := range repositories {
		repository := fmt.Sprintf("team/app-%d", r)
		w.hold(repository, all...)
		for i := 0; i < tags; i += 50 {
			w.known(repository, all[i])
			known++
		}
	}
	s := w.sweeper()
	s.sources["main"].budget.SetLimit(1e9)
	heap := func() uint64 {
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	w.pass(time.Second)
	before, peak, biggest := heap(), uint64(0), 0
	bus := w.sweeperBus(func(n int, batch int) {
		biggest = max(biggest, batch)
		if n%10 == 0 {
			peak = max(peak, heap())
		}
	})
	s.Bus = bus
	w.turn(s)
	p := w.last(s)
	if p.State != contracts.SweepComplete || p.Figures.Tags != tags*repositories || p.Figures.Missed != tags*repositories-known {
		t.Errorf("%+v", p)
	}
	if bus.events != tags*repositories-known || w.heads != tags*repositories {
		t.Errorf("%d events, want %d; %d HEADs, want %d", bus.events, tags*repositories-known, w.heads, tags*repositories)
	}
	grown := int64(peak) - int64(before)
	t.Logf("heap: %d KiB before, %+d KiB at most while %d tags were swept; at most %d events at once", before>>10, grown>>10, p.Figures.Tags, biggest)
	if grown > 16<<20 || biggest > chunk {
		t.Errorf("the heap grew by %d bytes, %d events were sent at once", grown, biggest)
	}
}

// counting counts events and forgets them.
type counting struct {
	w       *world
	events  int
	batches int
	look    func(batches, size int)
}

func (w *world) sweeperBus(look func(batches, size int)) *counting {
	return &counting{w: w, look: look}
}

func (c *counting) Publish(ctx context.Context, events ...event.Event) error {
	c.events += len(events)
	c.batches++
	c.look(c.batches, len(events))
	for i := range events {
		events[i].SetSource("/services/sweeper")
	}
	_, err := c.w.catalog.Batch(ctx, events)
	return err
}

// A sweep that is killed at any moment goes on where it was, in another
// process; what is sent twice has the same id.
func TestKilledInTheMiddle(t *testing.T) {
	w := newWorld(t)
	all := numbers(350)
	for _, r := range []string{"team/a", "team/b", "team/c"} {
		w.hold(r, all...)
	}
	died := errors.New("killed")
	kills := []int{1, 120, 400, 401, 900}
	for _, at := range kills {
		ctx, kill := context.WithCancelCause(t.Context())
		w.refuse = func(n int) error {
			if n < at {
				return nil
			}
			kill(died)
			return died
		}
		if err := w.sweeper().Turn(ctx, "main"); !errors.Is(err, died) {
			t.Fatalf("at event %d: %v", at, err)
		}
	}
	w.refuse = nil
	before := w.pages
	s := w.sweeper()
	w.turn(s)
	p := w.last(s)
	if p.State != contracts.SweepComplete || p.Figures.Repositories != 3 || p.Figures.Tags != 3*len(all) {
		t.Errorf("%+v", p)
	}
	if w.pages-before > 2 {
		t.Errorf("%d pages were listed after the last kill: it began anew", w.pages-before)
	}
	pushes := w.pushes(contracts.ImagePushedV1, contracts.CauseSweep)
	if len(pushes) != 3*len(all) {
		t.Errorf("%d distinct events, want %d", len(pushes), 3*len(all))
	}
	twice := 0
	for _, n := range pushes {
		if n > 1 {
			twice++
		}
	}
	t.Logf("killed %d times, %d of %d events sent twice", len(kills), twice, len(pushes))
	if twice > len(kills)*chunk {
		t.Errorf("%d events were sent twice", twice)
	}
}

// Of many replicas one sweeps a source.
func TestReplicas(t *testing.T) {
	w := newWorld(t)
	w.hold("team/app", numbers(500)...)
	var group sync.WaitGroup
	for range 4 {
		s := w.sweeper()
		group.Go(func() {
			for range 3 {
				if err := s.Turn(t.Context(), "main"); err != nil {
					t.Error(err)
				}
			}
		})
	}
	group.Wait()
	pushes := w.pushes(contracts.ImagePushedV1, contracts.CauseSweep)
	if len(pushes) != 500 || len(w.sent) != 500 || w.heads != 500 {
		t.Errorf("%d events of %d ids, %d HEADs", len(w.sent), len(pushes), w.heads)
	}
}

// What is pushed between two complete sweeps is lost if no webhook tells of it
// within the grace; the rest is not. What was lost is pushed then.
func TestEventsLost(t *testing.T) {
	w := newWorld(t)
	s := w.sweeper()
	w.hold("team/app", "old")
	if p := w.full(s, false); p.Figures.Changed != 0 || p.Figures.ShareLost != nil {
		t.Errorf("the first sweep knows nothing of webhooks: %+v", p.Figures)
	}
	w.pass(10 * time.Minute)
	w.webhook("team/app", "told")
	w.hold("team/app", "told", "late", "lost-1", "lost-2", "sha256-"+strings.Repeat("a", 64)+".sig")
	p := w.full(s, false)
	if f := p.Figures; f.Changed != 4 || f.Heard != 1 || f.Pending != 3 || f.Lost != 0 {
		t.Errorf("at the sweep: %+v", f)
	}
	early := subjects(w.pushes(contracts.ImagePushedV1, contracts.CauseSweep))
	w.pass(30 * time.Second)
	w.webhook("team/app", "late")
	w.turn(s)
	if f := w.last(s).Figures; f.Pending != 3 {
		t.Errorf("within the grace: %+v", f)
	}
	w.pass(time.Minute)
	w.turn(s)
	f := w.last(s).Figures
	if f.Changed != 4 || f.Heard != 2 || f.Lost != 2 || f.Pending != 0 || f.ShareLost == nil || *f.ShareLost != 0.5 {
		t.Errorf("after the grace: %+v", f)
	}
	got := subjects(w.pushes(contracts.ImagePushedV1, contracts.CauseSweep))
	for _, tag := range []string{"lost-1", "lost-2"} {
		subject := named("team/app", tag)[0]
		if slices.Contains(early, subject) || !slices.Contains(got, subject) {
			t.Errorf("%s: pushed before the grace was over %v, after it %v", tag, slices.Contains(early, subject), slices.Contains(got, subject))
		}
	}
	for _, tag := range []string{"told", "late"} {
		if slices.Contains(got, named("team/app", tag)[0]) {
			t.Errorf("%s was pushed, and its webhook had come", tag)
		}
	}
	// nothing is counted twice
	w.pass(time.Hour)
	if p := w.full(s, false); p.Figures.Changed != 0 {
		t.Errorf("the next sweep: %+v", p.Figures)
	}
}

// A tag that moves again before its webhook's time is over is decided about.
func TestMovedAgain(t *testing.T) {
	w := newWorld(t)
	s := w.sweeper()
	w.hold("team/app", "1")
	w.full(s, false)
	w.tags["team/app"]["1"] = digestOf("second")
	second := w.full(s, false)
	w.tags["team/app"]["1"] = digestOf("third")
	third := w.full(s, false)
	if third.Figures.Changed != 1 || third.Figures.Pending != 1 {
		t.Errorf("%+v", third.Figures)
	}
	p, err := load(t.Context(), w.db, "main", second.StartedAt.UnixNano())
	if err != nil || p.Figures.Lost != 1 || p.Figures.Pending != 0 {
		t.Errorf("%+v, %v", p, err)
	}
	pushed := subjects(w.pushes(contracts.ImagePushedV1, contracts.CauseSweep))
	if !slices.Contains(pushed, host+"/team/app:1@"+digestOf("second")) {
		t.Errorf("the overtaken push is not among %v", pushed)
	}
}

// What was listed before and is not listed any more is reported; nothing is
// said of what could not be listed.
func TestDeleted(t *testing.T) {
	w := newWorld(t)
	s := w.sweeper()
	for _, r := range []string{"team/app", "team/closed", "team/vanished"} {
		w.hold(r, "1", "2")
		w.known(r, "1")
		w.known(r, "2")
	}
	w.known("team/elsewhere", "1") // no sweep ever saw it
	if p := w.full(s, false); p.Figures.Deleted != 0 {
		t.Errorf("%+v", p.Figures)
	}
	for _, r := range []string{"team/app", "team/closed"} {
		delete(w.tags[r], "2")
	}
	delete(w.tags, "team/vanished")
	w.fault = func(repository, _ string) error {
		if repository == "team/closed" {
			return &registry.Error{Kind: registry.ErrUnauthorized, Status: 403}
		}
		return nil
	}
	w.full(s, true)
	if n := len(w.pushes(contracts.ImageDeletedV1, "")); n != 0 {
		t.Errorf("a dry run reported %d deletions", n)
	}
	p := w.full(s, false)
	if p.State != contracts.SweepIncomplete || len(p.Unlisted) != 1 || p.Unlisted[0].Repository != "team/closed" || p.Figures.Deleted != 3 {
		t.Errorf("%+v", p)
	}
	got := subjects(w.pushes(contracts.ImageDeletedV1, ""))
	want := slices.Concat(named("team/app", "2"), named("team/vanished", "1", "2"))
	if !slices.Equal(got, want) {
		t.Errorf("%v\nwant %v", got, want)
	}
}

// Where the registry cannot be listed nothing is deleted and nothing is pushed.
func TestCouldNotBeListed(t *testing.T) {
	w := newWorld(t)
	s := w.sweeper()
	w.hold("team/app", "1")
	w.known("team/app", "1")
	w.full(s, false)
	w.fault = func(string, string) error { return &registry.Error{Kind: registry.ErrNotFound, Status: 404} }
	delete(w.tags["team/app"], "1")
	w.pass(time.Second)
	if _, err := s.Request(t.Context(), "main", false); err != nil {
		t.Fatal(err)
	}
	if err := s.Turn(t.Context(), "main"); !errors.Is(err, registry.ErrNotFound) {
		t.Errorf("%v", err)
	}
	p := w.last(s)
	if p.State != contracts.SweepFailed || p.Message == "" || p.Figures.Deleted != 0 || len(w.sent) != 0 {
		t.Errorf("%+v, %d events", p, len(w.sent))
	}
	if _, complete, err := s.Status(t.Context(), "main"); err != nil || complete == nil || complete.Figures.Tags != 1 {
		t.Errorf("the last complete sweep is forgotten: %+v, %v", complete, err)
	}
}

// A registry that is down for long makes the sweep pause; it goes on later, and
// after a while without a repository that alone is broken.
func TestPauses(t *testing.T) {
	w := newWorld(t)
	w.cfg.Attempts = 1
	s := w.sweeper()
	w.hold("team/a", "1")
	w.hold("team/b", "1")
	w.hold("team/c", "1")
	w.fault = func(repository, _ string) error {
		if repository == "team/b" {
			return &registry.Error{Kind: registry.ErrUnavailable, Status: 500}
		}
		return nil
	}
	for i := range maxPauses + 1 {
		if err := s.Turn(t.Context(), "main"); !errors.Is(err, registry.ErrUnavailable) {
			t.Fatalf("turn %d: %v", i, err)
		}
		p := w.last(s)
		if p.State != contracts.SweepRunning || p.Message == "" {
			t.Fatalf("turn %d: %+v", i, p)
		}
		if err := s.Turn(t.Context(), "main"); err != nil { // it is not due
			t.Fatal(err)
		}
		w.pass(2 * time.Minute)
	}
	w.turn(s)
	p := w.last(s)
	if p.State != contracts.SweepIncomplete || p.Figures.Missed != 2 || len(p.Unlisted) != 1 || p.Unlisted[0].Repository != "team/b" {
		t.Errorf("%+v", p)
	}
}

// What throttles is asked again when it says so.
func TestThrottled(t *testing.T) {
	w := newWorld(t)
	s := w.sweeper()
	w.hold("team/app", "1")
	var times []time.Time
	w.fault = func(repository, _ string) error {
		if repository != "team/app" {
			return nil
		}
		if times = append(times, time.Now()); len(times) == 1 {
			return &registry.Error{Kind: registry.ErrThrottled, Status: 429, After: 1200 * time.Millisecond}
		}
		return nil
	}
	w.turn(s)
	if p := w.last(s); p.State != contracts.SweepComplete || p.Figures.Missed != 1 {
		t.Errorf("%+v", p)
	}
	if len(times) != 2 || times[1].Sub(times[0]) < 1200*time.Millisecond {
		t.Errorf("asked again after %v", times)
	}
}

// That it is nobody's turn is no failed attempt.
func TestHeldIsNoAttempt(t *testing.T) {
	w := newWorld(t)
	w.cfg.Attempts = 1
	s := w.sweeper()
	w.hold("team/app", "1")
	held := 0
	w.fault = func(string, string) error {
		if held++; held <= 3 {
			return &registry.Error{Kind: registry.ErrThrottled, Held: true, After: time.Millisecond}
		}
		return nil
	}
	w.turn(s)
	if p := w.last(s); p.State != contracts.SweepComplete || p.Figures.Missed != 1 || held < 4 {
		t.Errorf("%+v, held %d times", p, held)
	}
}

// The source's filters hold: what they leave out is neither pushed nor, when it
// is gone, reported.
func TestFilters(t *testing.T) {
	w := newWorld(t)
	s := w.sweeper()
	rules, err := scope.Compile(scope.Scope{
		Registry: host, Paths: []string{"team"},
		Repositories: scope.Filter{Exclude: []string{"team/scratch/**"}}, Tags: scope.Filter{Include: []string{"v*"}},
	})
	if err != nil {
		t.Fatal(err)
	}
	s.sources["main"].rules = rules
	for _, r := range []string{"team/app", "team/scratch/x", "other/app"} {
		w.hold(r, "v1", "nightly", "v2")
		w.known(r, "v2")
	}
	p := w.full(s, false)
	if got := subjects(w.pushes(contracts.ImagePushedV1, contracts.CauseSweep)); !slices.Equal(got, named("team/app", "v1")) || p.Figures.Repositories != 1 {
		t.Errorf("%v, %+v", got, p.Figures)
	}
	for r := range w.tags {
		delete(w.tags[r], "v2")
	}
	w.full(s, false)
	if got := subjects(w.pushes(contracts.ImageDeletedV1, "")); !slices.Equal(got, named("team/app", "v2")) {
		t.Errorf("reported as gone: %v", got)
	}
}

// A request joins a sweep that is still listing; after that it is one of its own.
func TestRequests(t *testing.T) {
	w := newWorld(t)
	w.cfg.Attempts = 1
	s := w.sweeper()
	w.hold("team/app", "1")
	w.fault = func(repository, _ string) error {
		if repository == "team/app" {
			return &registry.Error{Kind: registry.ErrUnavailable}
		}
		return nil
	}
	if err := s.Turn(t.Context(), "main"); !errors.Is(err, registry.ErrUnavailable) {
		t.Fatal(err)
	}
	running := w.last(s)
	if after, err := s.Request(t.Context(), "main", false); err != nil || !running.StartedAt.After(after) {
		t.Errorf("%s is not after %s, %v", running.StartedAt, after, err)
	}
	after, err := s.Request(t.Context(), "main", true)
	if err != nil || running.StartedAt.After(after) {
		t.Errorf("%s is after %s, %v", running.StartedAt, after, err)
	}
	w.fault = nil
	w.turn(s) // goes on at once
	if p := w.last(s); p.State != contracts.SweepComplete || p.DryRun || !p.StartedAt.Equal(running.StartedAt) {
		t.Errorf("%+v", p)
	}
	w.turn(s)
	if p := w.last(s); p.State != contracts.SweepComplete || !p.DryRun || !p.StartedAt.After(after) {
		t.Errorf("%+v", p)
	}
	if _, err := s.Request(t.Context(), "other", false); !errors.Is(err, ErrUnknownSource) {
		t.Errorf("%v", err)
	}
}

// circles are listings that never end.
type circles struct {
	repositories, tags func(next string) string // where a page leads
	pages              int
}

func (c *circles) Repositories(_ context.Context, next string) ([]list.Repository, string, error) {
	c.pages++
	if c.repositories == nil {
		return []list.Repository{{Name: "team/app"}}, "", nil
	}
	return []list.Repository{{Name: "team/app"}}, c.repositories(next), nil
}

func (c *circles) Tags(_ context.Context, _ list.Repository, next string) ([]list.Tag, string, error) {
	c.pages++
	if c.tags == nil {
		return nil, "", nil
	}
	return []list.Tag{{Name: "1", Digest: digestOf("1")}}, c.tags(next), nil
}

// Links that point at themselves, at each other, or on and on to the same
// page, come to an end, and say nothing of what is deleted.
func TestCircles(t *testing.T) {
	self := func(string) string { return "x" }
	other := func(next string) string { return map[string]string{"": "a", "a": "b", "b": "a"}[next] }
	on := func(next string) string { return next + "+" }
	for name, lead := range map[string]func(string) string{"itself": self, "each other": other, "on and on": on} {
		for _, where := range []string{"repositories", "tags"} {
			t.Run(name+"/"+where, func(t *testing.T) {
				w := newWorld(t)
				w.known("team/app", "gone")
				s := w.sweeper()
				c := &circles{}
				s.sources["main"].lister = c
				w.turn(s)
				before := c.pages
				want := contracts.SweepFailed
				if where == "repositories" {
					c.repositories = lead
				} else {
					c.tags, want = lead, contracts.SweepIncomplete
				}
				w.pass(2 * time.Hour)
				if err := s.Turn(t.Context(), "main"); err != nil && !errors.Is(err, errEndless) {
					t.Error(err)
				}
				p := w.last(s)
				if p.State != want || c.pages-before > 12 {
					t.Errorf("%s after %d pages: %+v", p.State, c.pages-before, p)
				}
			})
		}
	}
}

// Statements that are not in the registry any more are asked for again, also
// where the fallback tag still names them; so is what has failed.
func TestStatementsAreLookedFor(t *testing.T) {
	for _, fallback := range []bool{false, true} {
		t.Run(fmt.Sprintf("fallback tag %v", fallback), func(t *testing.T) {
			w := newWorld(t)
			w.noAPI = fallback
			s := w.sweeper()
			standing := &standings{Catalog: w.api}
			s.Catalog = standing
			for _, state := range []string{"whole", "removed", "never", "failed", "unremembered"} {
				image := catalog.Standing{Repository: "team/app", Digest: digestOf(state), State: catalog.StateAttested, Statements: []string{}}
				statements := []string{digestOf(state + "vuln"), digestOf(state + "vsa")}
				switch state {
				case "failed":
					image.State = catalog.StateFailed
				case "unremembered":
					w.held[image.Digest] = statements
				case "never":
					image.Statements = statements
				default:
					image.Statements, w.held[image.Digest] = statements, statements
				}
				if state == "removed" {
					w.removed[statements[1]] = true
				}
				standing.images = append(standing.images, image)
			}
			if p := w.full(s, true); p.Figures.Checked != 5 || p.Figures.Unstated != 3 || len(w.sent) != 0 {
				t.Errorf("dry run: %+v, %d events", p.Figures, len(w.sent))
			}
			p := w.full(s, false)
			got := subjects(w.pushes(contracts.ImagePushedV1, contracts.CauseStatement))
			var want []string
			for _, state := range []string{"removed", "never", "failed"} {
				want = append(want, host+"/team/app@"+digestOf(state))
			}
			slices.Sort(want)
			if p.Figures.Unstated != 3 || !slices.Equal(got, want) {
				t.Errorf("%+v\n%v\nwant %v", p.Figures, got, want)
			}
		})
	}
}

type standings struct {
	Catalog
	images []catalog.Standing
}

func (s *standings) Standings(context.Context, string, string, int) ([]catalog.Standing, string, int, error) {
	return s.images, "", len(s.images), nil
}

// How long a sweep goes on is estimated from what the repositories held.
func TestEstimate(t *testing.T) {
	w := newWorld(t)
	w.sweep.Rate, w.sweep.NoStatements = 10, true
	s := w.sweeper()
	p := &progress{source: "main", id: 1, state: contracts.SweepRunning}
	p.enter(phaseTags)
	p.Repository, p.Figures = "b", contracts.SweepFigures{Repositories: 4, Tags: 60}
	if err := p.save(t.Context(), w.db.ExecContext); err != nil {
		t.Fatal(err)
	}
	for name, tags := range map[string]int{"a": 20, "b": 40, "c": 100, "d": -1} {
		if _, err := w.db.ExecContext(t.Context(), `INSERT INTO sweeper_repositories (source, repository, handle, sweep, tags) VALUES ('main', $1, '', 1, $2)`, name, tags); err != nil {
			t.Fatal(err)
		}
	}
	left, err := s.secondsLeft(t.Context(), s.sources["main"], p)
	if err != nil || left == nil || *left != 13 { // 100 of c and 30, the average, of d, at ten a second
		t.Errorf("%v, %v", left, err)
	}
	p.enter(phaseRepositories)
	if left, err := s.secondsLeft(t.Context(), s.sources["main"], p); err != nil || left != nil {
		t.Errorf("%v, %v", left, err)
	}
}
