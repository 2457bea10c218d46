package assembler

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"testing"

	"github.com/cloudevents/sdk-go/v2/event"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/bus"
	"github.com/tidewaiter/tidewaiter/libs/store"
	"github.com/tidewaiter/tidewaiter/libs/store/storetest"
)

func dig(s string) string { return contracts.DigestOf([]byte(s)) }

func img(repository, name string) contracts.Image {
	return contracts.Image{Registry: "r.example", Repository: repository, Digest: dig(name)}
}

// fixture is a service on a database of its own, with layer reports stored.
type fixture struct {
	t  testing.TB
	db *store.DB
	s  *Service
	n  int // events made
}

func newFixture(t testing.TB) *fixture {
	t.Helper()
	db := storetest.Open(t)
	s, err := New(t.Context(), DefaultConfig(), db, slog.New(slog.DiscardHandler), prometheus.NewRegistry())
	if err != nil {
		t.Fatal(err)
	}
	return &fixture{t: t, db: db, s: s}
}

// event returns an event with an id of its own, or the given one.
func (f *fixture) event(name, subject string, data any) event.Event {
	f.t.Helper()
	ev, err := bus.NewEvent(name, subject, data)
	if err != nil {
		f.t.Fatal(err)
	}
	f.n++
	ev.SetID(fmt.Sprint("event-", f.n))
	ev.SetSource("/test")
	ev.SetExtension(contracts.ExtLane, contracts.LaneFresh)
	return ev
}

// report stores a layer's report, with one npm package named like the layer.
func (f *fixture) report(layer string) contracts.LayerAnalyzed {
	f.t.Helper()
	r := contracts.LayerReport{Analyzer: "1", Digest: dig(layer), DiffID: dig("diff " + layer), Packages: []contracts.LayerPackage{{
		Type: "npm", Name: layer, Version: "1.0.0", PURL: "pkg:npm/" + layer + "@1.0.0", Ecosystem: "npm", Paths: []string{layer + "/package.json"},
	}}}
	content, err := json.Marshal(r)
	if err != nil {
		f.t.Fatal(err)
	}
	digest, err := f.db.PutBlob(context.Background(), content)
	if err != nil {
		f.t.Fatal(err)
	}
	return contracts.LayerAnalyzed{Digest: dig(layer), Report: contracts.Blob{Digest: digest, Size: int64(len(content))}, Analyzer: "1", Packages: 1}
}

func (f *fixture) analyzed(layer string) event.Event {
	return f.event(contracts.LayerAnalyzedV1, dig(layer), f.report(layer))
}

func (f *fixture) failed(layer string, through contracts.Image, attempt int, reason string) event.Event {
	return f.event(contracts.LayerFailedV1, dig(layer), contracts.LayerFailed{Digest: dig(layer), Image: through, Attempt: attempt, Reason: reason})
}

func plan(im contracts.Image, layers ...string) contracts.ImagePlanned {
	p := contracts.ImagePlanned{
		Image: im, Source: "src", Tag: "latest", Kind: contracts.KindImage, MediaType: "application/vnd.oci.image.manifest.v1+json",
		Platform: &contracts.Platform{OS: "linux", Architecture: "amd64"},
	}
	for _, l := range layers {
		p.Layers = append(p.Layers, contracts.PlannedLayer{Digest: dig(l), MediaType: "application/vnd.oci.image.layer.v1.tar+gzip", Size: 10, DiffID: dig("diff " + l)})
	}
	return p
}

func indexPlan(im contracts.Image, parts ...string) contracts.ImagePlanned {
	p := contracts.ImagePlanned{Image: im, Source: "src", Tag: "latest", Kind: contracts.KindIndex, MediaType: "application/vnd.oci.image.index.v1+json"}
	for i, part := range parts {
		p.Parts = append(p.Parts, contracts.PlannedPart{Digest: dig(part), Platform: &contracts.Platform{OS: "linux", Architecture: fmt.Sprint("arch", i)}})
	}
	return p
}

func (f *fixture) planned(p contracts.ImagePlanned) event.Event {
	return f.event(contracts.ImagePlannedV1, p.Image.String(), p)
}

// handle returns what the service makes of events, in order.
func (f *fixture) handle(events ...event.Event) []event.Event {
	f.t.Helper()
	var out []event.Event
	for _, ev := range events {
		o, err := f.s.Handle(context.Background(), ev)
		if err != nil {
			f.t.Fatalf("handle %s %s: %v", ev.Type(), ev.Subject(), err)
		}
		out = append(out, o...)
	}
	return out
}

// said lists events as "image.assembled <repository> <packages> <gaps>" or
// "layer.requested <repository> <attempt>".
func said(t testing.TB, events []event.Event) []string {
	t.Helper()
	var out []string
	for _, ev := range events {
		switch strings.TrimPrefix(ev.Type(), contracts.TypePrefix) {
		case contracts.ImageAssembledV1:
			d, err := bus.Decode[contracts.ImageAssembled](ev)
			if err != nil {
				t.Fatal(err)
			}
			out = append(out, fmt.Sprintf("assembled %s %s %d %d", d.Image.Repository, d.Kind, d.Packages, d.Gaps))
		case contracts.LayerRequestedV1:
			d, err := bus.Decode[contracts.LayerRequested](ev)
			if err != nil {
				t.Fatal(err)
			}
			out = append(out, fmt.Sprintf("requested %s %d", d.Image.Repository, d.Attempt))
		default:
			t.Fatalf("unexpected %s", ev.Type())
		}
	}
	return out
}

func expect(t testing.TB, what string, events []event.Event, want ...string) {
	t.Helper()
	if got := said(t, events); !slices.Equal(got, want) {
		t.Errorf("%s:\n got %q\nwant %q", what, got, want)
	}
}

func (f *fixture) inventory(ev event.Event) contracts.Inventory {
	f.t.Helper()
	d, err := bus.Decode[contracts.ImageAssembled](ev)
	if err != nil {
		f.t.Fatal(err)
	}
	content, err := f.db.Blob(context.Background(), d.Inventory.Digest)
	if err != nil {
		f.t.Fatal(err)
	}
	var inv contracts.Inventory
	if err := json.Unmarshal(content, &inv); err != nil {
		f.t.Fatal(err)
	}
	if int64(len(content)) != d.Inventory.Size {
		f.t.Errorf("inventory has %d bytes, the event says %d", len(content), d.Inventory.Size)
	}
	return inv
}

func TestImageIsAssembledWhenAllIsThere(t *testing.T) {
	f := newFixture(t)
	im := img("a", "image")
	p := f.planned(plan(im, "l0", "l1"))
	p.SetExtension(contracts.ExtLane, contracts.LaneBulk)
	p.SetExtension(contracts.ExtTraceparent, "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
	expect(t, "plan", f.handle(p))
	expect(t, "first layer", f.handle(f.analyzed("l0")))
	out := f.handle(f.analyzed("l1"))
	expect(t, "last layer", out, "assembled a image 2 0")

	ev := out[0]
	d, err := bus.Decode[contracts.ImageAssembled](ev)
	if err != nil {
		t.Fatal(err)
	}
	if ev.ID() != contracts.JoinID(ev.Type(), im.String(), d.Inventory.Digest) || ev.Subject() != im.String() {
		t.Errorf("id %s subject %s", ev.ID(), ev.Subject())
	}
	want := map[string]any{
		contracts.ExtLane: contracts.LaneBulk, contracts.ExtKey: im.Digest, contracts.ExtDataRef: d.Inventory.Digest,
		contracts.ExtTraceparent: "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
	}
	for name, value := range want {
		if ev.Extensions()[name] != value {
			t.Errorf("extension %s is %v, want %v (of the plan, not of the layer that came last)", name, ev.Extensions()[name], value)
		}
	}
	if d.Source != "src" || d.Tag != "latest" || d.Analyzer != "1" {
		t.Errorf("got %+v", d)
	}
	inv := f.inventory(ev)
	if inv.Digest != im.Digest || len(inv.Layers) != 2 || inv.Packages[1].Layer.Index != 1 {
		t.Errorf("inventory %+v", inv)
	}
}

func TestRedeliveryRepeatsTheOutput(t *testing.T) {
	f := newFixture(t)
	f.handle(f.planned(plan(img("a", "image"), "l0")))
	last := f.analyzed("l0")
	first, second := f.handle(last), f.handle(last)
	if len(first) != 1 || len(second) != 1 || first[0].ID() != second[0].ID() {
		t.Errorf("first %v, then %v", first, second)
	}
	expect(t, "the same report by another event", f.handle(f.analyzed("l0")))
}

func TestReplanAnnouncesAgain(t *testing.T) {
	f := newFixture(t)
	im := img("a", "image")
	first := f.handle(f.analyzed("l0"), f.planned(plan(im, "l0")))
	again := f.handle(f.planned(plan(im, "l0")))
	if len(first) != 1 || len(again) != 1 || first[0].ID() != again[0].ID() {
		t.Errorf("first %v, again %v", first, again)
	}
}

func TestOneInventoryForManyRepositories(t *testing.T) {
	f := newFixture(t)
	a := f.handle(f.analyzed("l0"), f.planned(plan(img("a", "image"), "l0")))
	b := f.handle(f.planned(plan(img("b", "image"), "l0")))
	expect(t, "b", b, "assembled b image 1 0")
	da, _ := bus.Decode[contracts.ImageAssembled](a[0])
	db, _ := bus.Decode[contracts.ImageAssembled](b[0])
	if da.Inventory != db.Inventory {
		t.Errorf("%v in a, %v in b", da.Inventory, db.Inventory)
	}
	var n int
	if err := f.db.QueryRowContext(t.Context(), `SELECT COUNT(*) FROM assembler_inventories`).Scan(&n); err != nil || n != 1 {
		t.Errorf("%d inventories made, error %v", n, err)
	}
	hidden := plan(img("c", "image"), "l0")
	hidden.Layers[0].Missing = "not found in this repository"
	expect(t, "c cannot read the layer", f.handle(f.planned(hidden)), "assembled c image 0 1")
}

func TestNewerAnalyzerReplacesReports(t *testing.T) {
	f := newFixture(t)
	f.handle(f.planned(plan(img("a", "image"), "l0")), f.analyzed("l0"))
	d := f.report("l0")
	d.Analyzer = "2"
	content, _ := json.Marshal(contracts.LayerReport{Analyzer: "2", Digest: dig("l0"), DiffID: dig("diff l0")})
	digest, err := f.db.PutBlob(t.Context(), content)
	if err != nil {
		t.Fatal(err)
	}
	d.Report.Digest = digest
	expect(t, "newer", f.handle(f.event(contracts.LayerAnalyzedV1, dig("l0"), d)), "assembled a image 0 0")
	expect(t, "older again", f.handle(f.analyzed("l0")))
}

func TestLayerFailedThroughItsOwnRepository(t *testing.T) {
	f := newFixture(t)
	im := img("a", "image")
	f.handle(f.planned(plan(im, "l0", "l1")), f.analyzed("l0"))
	out := f.handle(f.failed("l1", im, 0, "not-found"))
	expect(t, "a permanent failure", out, "assembled a image 1 1")
	if gap := f.inventory(out[0]).Gaps[0]; gap.Layer != dig("l1") || gap.Reason != "layer not analysed: not-found" {
		t.Errorf("gap %+v", gap)
	}
	expect(t, "the layer is had after all", f.handle(f.analyzed("l1")), "assembled a image 2 0")

	tried := img("b", "other")
	f.handle(f.planned(plan(tried, "l2")))
	expect(t, "first", f.handle(f.failed("l2", tried, 0, "unavailable")), "requested b 1")
	expect(t, "second", f.handle(f.failed("l2", tried, 1, "unavailable")), "requested b 2")
	expect(t, "third", f.handle(f.failed("l2", tried, 2, "unavailable")), "assembled b image 0 1")
}

func TestLayerFailedThroughAnotherRepository(t *testing.T) {
	f := newFixture(t)
	a, b, c := img("a", "ia"), img("b", "ib"), img("c", "ic")
	f.handle(f.planned(plan(a, "l0")), f.planned(plan(b, "l0")))
	out := f.handle(f.failed("l0", a, 0, "unauthorized"))
	expect(t, "a has its end, b is asked", out, "assembled a image 0 1", "requested b 1")
	d, err := bus.Decode[contracts.LayerRequested](out[1])
	if err != nil {
		t.Fatal(err)
	}
	if d.Image != b || d.MediaType == "" || d.Size != 10 || d.Source != "src" || out[1].Subject() != dig("l0") {
		t.Errorf("got %+v about %s", d, out[1].Subject())
	}
	expect(t, "a plan that comes after the failure", f.handle(f.planned(plan(c, "l0"))), "requested b 2")
	expect(t, "b fails too", f.handle(f.failed("l0", b, 1, "not-found")), "assembled b image 0 1", "requested c 3")
	expect(t, "c can read it, which serves all", f.handle(f.analyzed("l0")),
		"assembled a image 1 0", "assembled b image 1 0", "assembled c image 1 0")
}

func TestLostReportIsAskedForAgain(t *testing.T) {
	f := newFixture(t)
	f.handle(f.planned(plan(img("a", "image"), "l0", "l1")))
	d := f.report("l0")
	if _, err := f.db.ExecContext(t.Context(), `DELETE FROM blobs WHERE digest = $1`, d.Report.Digest); err != nil {
		t.Fatal(err)
	}
	f.handle(f.event(contracts.LayerAnalyzedV1, dig("l0"), d))
	expect(t, "lost", f.handle(f.analyzed("l1")), "requested a 1")
	expect(t, "stored again", f.handle(f.analyzed("l0")), "assembled a image 2 0")
}

func TestIndexWaitsForItsParts(t *testing.T) {
	f := newFixture(t)
	index := indexPlan(img("a", "index"), "p0", "p1", "p2")
	index.Parts = append(index.Parts, contracts.PlannedPart{Digest: dig("att"), Skipped: "unknown platform"})
	expect(t, "parts are missing", f.handle(f.planned(index), f.planned(plan(img("a", "p0"), "l0")), f.planned(plan(img("b", "p1"), "l0"))))
	expect(t, "the first part", f.handle(f.analyzed("l0")), "assembled a image 1 0", "assembled b image 1 0")
	expect(t, "the second has no image in it", f.handle(f.event(contracts.ImageUnsupportedV1, "", contracts.ImageUnsupported{Image: img("a", "p1"), Reason: "no-image-layers"})))
	out := f.handle(f.event(contracts.ImageFailedV1, "", contracts.ImageFailed{Registry: "r.example", Repository: "a", Digest: dig("p2"), Stage: "planner", Message: "not found"}))
	expect(t, "the third failed", out, "assembled a index 1 2")
	inv := f.inventory(out[0])
	if len(inv.Parts) != 1 || inv.Parts[0].Digest != dig("p0") || inv.Parts[0].Packages != 1 {
		t.Errorf("parts %+v", inv.Parts)
	}
	reasons := []string{inv.Gaps[0].Reason, inv.Gaps[1].Reason}
	slices.Sort(reasons)
	if !slices.Equal(reasons, []string{"part failed: not found", "part unsupported: no-image-layers"}) {
		t.Errorf("gaps %q", reasons)
	}
	expect(t, "the failed part is planned after all", f.handle(f.planned(plan(img("a", "p2"), "l0"))), "assembled a image 1 0", "assembled a index 2 1")
}

func TestEventsThatAreNotUnderstood(t *testing.T) {
	f := newFixture(t)
	garbage := f.event(contracts.ImagePlannedV1, "x", "not a plan")
	if _, err := f.s.Handle(t.Context(), garbage); err == nil {
		t.Error("a plan that is none was accepted")
	}
	if _, err := f.s.Handle(t.Context(), f.event(contracts.ImagePlannedV1, "x", contracts.ImagePlanned{})); err == nil {
		t.Error("a plan without image was accepted")
	}
	if _, err := f.s.Handle(t.Context(), f.event(contracts.ImageMatchedV1, "x", contracts.ImageMatched{})); err == nil {
		t.Error("a foreign event was accepted")
	}
	expect(t, "a tag that never was", f.handle(f.event(contracts.ImageFailedV1, "x", contracts.ImageFailed{Registry: "r.example", Repository: "a", Tag: "v1"})))
}

// TestDeadPlan: an image whose plan is given up has an end; nothing is said of layers.
func TestDeadPlan(t *testing.T) {
	f := newFixture(t)
	p := plan(img("a", "image"), "base")
	p.Tag = "v1"
	out := dead(f.planned(p), errors.New("cannot be merged"))
	if len(out) != 1 || out[0].Extensions()[contracts.ExtKey] != p.Image.Digest || out[0].Subject() != p.Image.String() {
		t.Fatalf("got %v", out)
	}
	got, err := bus.Decode[contracts.ImageFailed](out[0])
	want := contracts.ImageFailed{
		Registry: p.Image.Registry, Repository: p.Image.Repository, Tag: "v1", Digest: p.Image.Digest, Stage: Name, Message: "cannot be merged",
	}
	if err != nil || got != want {
		t.Errorf("got %+v, %v", got, err)
	}
	if _, err := f.s.record(out[0]); err != nil {
		t.Errorf("assembler does not understand itself: %v", err)
	}
	for name, ev := range map[string]event.Event{
		"a layer":    f.analyzed("base"),
		"no image":   f.event(contracts.ImagePlannedV1, "x", contracts.ImagePlanned{}),
		"not a plan": f.event(contracts.ImagePlannedV1, "x", "text"),
	} {
		if out := dead(ev, errors.New("x")); out != nil {
			t.Errorf("%s: %v", name, out)
		}
	}
}

func TestConfigValidate(t *testing.T) {
	if err := DefaultConfig().Validate(); err != nil {
		t.Error(err)
	}
	if err := (Config{MaxAttempts: 0}).Validate(); err == nil {
		t.Error("no attempts at all were accepted")
	}
	if err := (Config{MaxAttempts: 1, CacheBytes: -1}).Validate(); err == nil {
		t.Error("a negative cache was accepted")
	}
}

func TestReportCacheForgetsTheOldest(t *testing.T) {
	c := newReportCache(10)
	c.put("a", &contracts.LayerReport{}, 4)
	c.put("b", &contracts.LayerReport{}, 4)
	c.get("a")
	c.put("c", &contracts.LayerReport{}, 4)
	c.put("huge", &contracts.LayerReport{}, 11)
	for digest, want := range map[string]bool{"a": true, "b": false, "c": true, "huge": false} {
		if got := c.get(digest) != nil; got != want {
			t.Errorf("%s is cached: %v, want %v", digest, got, want)
		}
	}
}
