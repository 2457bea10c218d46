package catalog

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cloudevents/sdk-go/v2/event"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/bus"
)

func (f *fixture) blob(v any) contracts.Blob {
	f.t.Helper()
	content, err := json.Marshal(v)
	if err != nil {
		f.t.Fatal(err)
	}
	digest, err := f.db.PutBlob(context.Background(), content)
	if err != nil {
		f.t.Fatal(err)
	}
	return contracts.Blob{Digest: digest, Size: int64(len(content))}
}

func npmPackages(names ...string) []contracts.Package {
	var all []contracts.Package
	for _, name := range names {
		all = append(all, contracts.Package{Name: name, Version: "1.0.0", Ecosystem: "npm"})
	}
	return all
}

// assembled stores an inventory and returns the event about it.
func (f *fixture) assembled(im contracts.Image, inv contracts.Inventory) event.Event {
	f.t.Helper()
	inv.Digest, inv.Kind, inv.Analyzer = im.Digest, contracts.KindImage, "1"
	return f.event("assembler", contracts.ImageAssembledV1, im.String(), contracts.ImageAssembled{
		Image: im, Source: "hub", Kind: contracts.KindImage, Inventory: f.blob(inv), Analyzer: "1",
	})
}

// published says that a snapshot replaces the one before; delta nil: everything is new.
func (f *fixture) published(previous, sequence int64, delta *contracts.AdvisoriesDelta) event.Event {
	f.t.Helper()
	d := contracts.AdvisoriesChanged{
		Snapshot: contracts.SnapshotRef{Digest: dig(fmt.Sprint("snapshot ", sequence)), Sequence: sequence},
		Location: "r.example/advisories@" + dig(fmt.Sprint("artefact ", sequence)), PublishedAt: f.now,
	}
	if delta != nil {
		blob := f.blob(delta)
		d.Previous, d.Delta = &contracts.SnapshotRef{Digest: dig(fmt.Sprint("snapshot ", previous)), Sequence: previous}, &blob
	}
	return f.event("advisor", contracts.AdvisoriesChangedV1, d.Snapshot.Digest, d)
}

func about(names ...string) *contracts.AdvisoriesDelta {
	d := &contracts.AdvisoriesDelta{}
	for _, name := range names {
		d.Packages = append(d.Packages, contracts.DeltaPackage{Ecosystem: "npm", Name: name, Releases: []string{""}})
	}
	return d
}

func (f *fixture) rematch() {
	f.t.Helper()
	if err := f.s.Rematch(context.Background(), f.now); err != nil {
		f.t.Fatal(err)
	}
}

// asked returns the image.rematch events sent since the last call, in order:
// "repository lane sequence reason".
func (f *fixture) asked() []string {
	f.t.Helper()
	var all []string
	for _, ev := range f.out.events {
		if ev.Type() != contracts.TypePrefix+contracts.ImageRematchV1 {
			continue
		}
		d, err := bus.Decode[contracts.ImageRematch](ev)
		if err != nil {
			f.t.Fatal(err)
		}
		if d.Inventory.Size == 0 || d.Analyzer != "1" || d.Source != "hub" || d.Kind != contracts.KindImage || ev.Subject() != d.Image.String() {
			f.t.Errorf("incomplete: %+v", d)
		}
		all = append(all, fmt.Sprintf("%s %v %d %s", d.Image.Repository, ev.Extensions()[contracts.ExtLane], d.Snapshot.Sequence, d.Reason))
	}
	f.out.events = nil
	return all
}

func same(t *testing.T, what string, got []string, want ...string) {
	t.Helper()
	if !slices.Equal(got, want) {
		t.Errorf("%s:\n got %q\nwant %q", what, got, want)
	}
}

func TestRematchAsksForWhatASnapshotTouches(t *testing.T) {
	f := newFixture(t)
	a, b, c, os, server := img("a", "a"), img("b", "b"), img("c", "c"), img("os", "os"), img("server", "server")
	f.handle(
		f.assembled(a, contracts.Inventory{Packages: npmPackages("lodash", "left-pad")}), f.attested(a, 1),
		f.assembled(b, contracts.Inventory{Packages: npmPackages("lodash")}), f.attested(b, 1),
		f.assembled(c, contracts.Inventory{Packages: npmPackages("express")}), f.attested(c, 1),
		f.assembled(os, contracts.Inventory{
			OS:       &contracts.OSRelease{ID: "debian", VersionID: "12"},
			Packages: []contracts.Package{{Name: "libssl3", Source: "openssl", Version: "3.0", Ecosystem: "Debian:12"}},
		}), f.attested(os, 1),
		f.assembled(server, contracts.Inventory{Packages: []contracts.Package{{Name: "redis", Version: "7.2.1", Ecosystem: "Bitnami", Server: true, Product: "redis"}}}),
		f.attested(server, 1),
	)
	if err := f.s.Deployed(t.Context(), "cluster", []contracts.Image{b}, f.now); err != nil {
		t.Fatal(err)
	}
	change := f.published(1, 2, about("lodash"))
	f.handle(change)
	f.rematch()
	same(t, "what runs is first", f.asked(), "b fresh 2 advisories", "a bulk 2 advisories")
	f.handle(change)
	f.rematch()
	f.restart()
	f.rematch()
	same(t, "a replay", f.asked())

	debian := func(releases ...string) *contracts.AdvisoriesDelta {
		return &contracts.AdvisoriesDelta{Packages: []contracts.DeltaPackage{{Ecosystem: "Debian", Name: "openssl", Releases: releases}}}
	}
	for i, test := range []struct {
		delta *contracts.AdvisoriesDelta
		want  []string
	}{
		{about("nothing"), nil},
		{debian("11"), nil},
		{debian("11", "12"), []string{"os"}},
		{debian(""), []string{"os"}},
		{&contracts.AdvisoriesDelta{Ecosystems: []string{"Debian:11"}}, nil},
		{&contracts.AdvisoriesDelta{Ecosystems: []string{"Debian:12"}}, []string{"os"}},
		{&contracts.AdvisoriesDelta{Ecosystems: []string{"npm"}}, []string{"b", "a", "c"}},
		{&contracts.AdvisoriesDelta{Products: []string{"redis"}}, []string{"server"}},
		{&contracts.AdvisoriesDelta{Products: []string{"debian"}}, []string{"os"}},
		{&contracts.AdvisoriesDelta{Products: []string{"npm", "openssl"}}, nil},
		{nil, []string{"b", "a", "c", "os", "server"}},
	} {
		sequence := int64(i + 3)
		f.handle(f.published(sequence-1, sequence, test.delta))
		f.rematch()
		var want []string
		for _, name := range test.want {
			lane := contracts.LaneBulk
			if name == "b" {
				lane = contracts.LaneFresh
			}
			want = append(want, fmt.Sprintf("%s %s %d advisories", name, lane, sequence))
		}
		same(t, fmt.Sprintf("%+v", test.delta), f.asked(), want...)
	}
	f.handle(f.event("planner", contracts.ImageGoneV1, a.String(), contracts.ImageGone{Image: a, Reason: "not found"}))
	f.handle(f.attested(b, 20), f.published(14, 15, about("lodash")))
	f.rematch()
	same(t, "what is gone, and what was matched with a newer one", f.asked())
}

// TestRematchParts: an index is touched through its parts, and either is known
// to run when a cluster names the other.
func TestRematchParts(t *testing.T) {
	f := newFixture(t)
	index, part, other := img("a", "index"), img("a", "part"), img("a", "other")
	inventory := contracts.Inventory{Packages: npmPackages("lodash")}
	p := f.assembled(part, inventory)
	d, err := bus.Decode[contracts.ImageAssembled](p)
	if err != nil {
		t.Fatal(err)
	}
	f.handle(f.index(index, "part", "other"), p, f.attested(part, 1),
		f.assembled(other, contracts.Inventory{Packages: npmPackages("express")}), f.attested(other, 1),
		f.assembled(index, contracts.Inventory{Parts: []contracts.InventoryPart{{Digest: part.Digest, Inventory: d.Inventory.Digest}}}), f.attested(index, 1))
	if err := f.s.Deployed(t.Context(), "cluster", []contracts.Image{part}, f.now); err != nil {
		t.Fatal(err)
	}
	f.handle(f.published(1, 2, about("lodash")))
	f.rematch()
	var subjects []string
	for _, ev := range f.out.events {
		if ev.Type() == contracts.TypePrefix+contracts.ImageRematchV1 {
			subjects = append(subjects, ev.Subject()+" "+ev.Extensions()[contracts.ExtLane].(string))
		}
	}
	expect(t, "asked", subjects, index.String()+" fresh", part.String()+" fresh")
}

// TestRematchCatchesLateVerdicts: an image matched with an old snapshot while
// the new one was spreading is found when its verdict comes, if any snapshot
// since touches it.
func TestRematchCatchesLateVerdicts(t *testing.T) {
	f := newFixture(t)
	touched, untouched := img("touched", "1"), img("untouched", "2")
	f.handle(
		f.assembled(touched, contracts.Inventory{Packages: npmPackages("lodash")}), f.assembled(untouched, contracts.Inventory{Packages: npmPackages("express")}),
		f.published(1, 2, about("lodash")), f.published(2, 3, about("left-pad")))
	f.rematch()
	same(t, "without a verdict", f.asked())
	f.handle(f.attested(untouched, 1), f.attested(touched, 1))
	f.rematch()
	same(t, "late verdicts", f.asked(), "touched bulk 3 advisories")
	f.rematch()
	same(t, "once", f.asked())

	t.Run("the verdict is known before the inventory", func(t *testing.T) {
		f := newFixture(t)
		im := img("early", "1")
		f.handle(f.attested(im, 1), f.published(1, 2, about("lodash")))
		f.rematch()
		same(t, "without an inventory", f.asked())
		f.handle(f.assembled(im, contracts.Inventory{Packages: npmPackages("lodash")}))
		f.rematch()
		same(t, "with it", f.asked(), "early bulk 2 advisories")
	})
	t.Run("what changed in between is forgotten", func(t *testing.T) {
		f := newFixture(t)
		im := img("old", "1")
		f.handle(f.assembled(im, contracts.Inventory{Packages: npmPackages("express")}), f.published(5, 6, about("lodash")), f.attested(im, 4))
		f.rematch()
		same(t, "a gap", f.asked(), "old bulk 6 advisories")
	})
	t.Run("the delta is lost", func(t *testing.T) {
		f := newFixture(t)
		im := img("lost", "1")
		f.handle(f.assembled(im, contracts.Inventory{Packages: npmPackages("express")}), f.attested(im, 1))
		f.handle(f.event("advisor", contracts.AdvisoriesChangedV1, dig("s"), contracts.AdvisoriesChanged{
			Snapshot: contracts.SnapshotRef{Digest: dig("s"), Sequence: 2}, Previous: &contracts.SnapshotRef{Digest: dig("r"), Sequence: 1},
			Delta: &contracts.Blob{Digest: dig("nowhere"), Size: 1},
		}))
		f.rematch()
		same(t, "everything", f.asked(), "lost bulk 2 advisories")
	})
}

// TestRematchGoesOn: Kafka away in the middle, and a restart: each image is
// asked for, with the same id.
func TestRematchGoesOn(t *testing.T) {
	f := newFixture(t)
	for i := range 3 {
		im := img(fmt.Sprint("r", i), fmt.Sprint(i))
		f.handle(f.assembled(im, contracts.Inventory{Packages: npmPackages("lodash")}), f.attested(im, 1))
	}
	f.out.events = nil
	f.handle(f.published(1, 2, about("lodash")))
	f.out.down = errors.New("kafka is away")
	if err := f.s.Rematch(t.Context(), f.now); !errors.Is(err, f.out.down) {
		t.Fatalf("got %v", err)
	}
	f.out.down = nil
	f.restart()
	f.rematch()
	ids := map[string]bool{}
	for _, ev := range f.out.events {
		ids[ev.ID()] = true
	}
	if got := f.asked(); len(got) != 3 || len(ids) != 3 {
		t.Errorf("asked %v with %d ids", got, len(ids))
	}
}

func TestRefresh(t *testing.T) {
	f := newFixture(t)
	im := img("a", "1")
	f.handle(f.assembled(im, contracts.Inventory{Packages: npmPackages("lodash")}), f.attested(im, 1))
	signed := f.now.Add(time.Second)
	validity := 7*24*time.Hour - time.Second
	at := func(share float64) {
		f.now = signed.Add(time.Duration(float64(validity) * share))
		f.rematch()
	}
	at(0.69)
	same(t, "before 70 %", f.asked())
	at(0.751)
	same(t, "by 75 %", f.asked(), "a bulk 1 refresh")
	at(0.76)
	same(t, "asked once", f.asked())
	at(0.81)
	same(t, "asked again, nothing came", f.asked(), "a bulk 1 refresh")
	f.handle(f.published(1, 2, about("express")))
	at(0.87)
	same(t, "with the newest snapshot", f.asked(), "a bulk 2 refresh")
	f.handle(f.attested(im, 2))
	signed = f.now.Add(time.Second)
	at(0.5)
	same(t, "a new statement", f.asked())
}

func TestDeployedAPI(t *testing.T) {
	f := newFixture(t)
	api := f.s.API(func() ([]string, error) { return []string{"secret"}, nil })
	im := img("a", "1")
	for _, test := range []struct {
		token, body string
		status      int
	}{
		{"wrong", `{}`, http.StatusUnauthorized},
		{"secret", `{"origin":"import","images":["` + im.String() + `"]}`, http.StatusOK},
		{"secret", `{"images":[]}`, http.StatusBadRequest},
		{"secret", `{"origin":"import","images":["a:latest"]}`, http.StatusBadRequest},
		{"secret", `{"origin":"import","other":1}`, http.StatusBadRequest},
		{"secret", `[`, http.StatusBadRequest},
	} {
		req := httptest.NewRequestWithContext(t.Context(), http.MethodPost, "/v1/deployed", strings.NewReader(test.body))
		req.Header.Set("Authorization", "Bearer "+test.token)
		answer := httptest.NewRecorder()
		api.ServeHTTP(answer, req)
		if answer.Code != test.status {
			t.Errorf("%s: %d %s", test.body, answer.Code, answer.Body)
		}
	}
	if running, err := f.s.running(t.Context()); err != nil || len(running) != 1 || !running[im.Digest] {
		t.Errorf("runs %v, %v", running, err)
	}
	if err := f.s.Deployed(t.Context(), "import", nil, f.now); err != nil {
		t.Fatal(err)
	}
	if running, err := f.s.running(t.Context()); err != nil || len(running) != 0 {
		t.Errorf("runs %v, %v", running, err)
	}
}

// BenchmarkRematch: one advisory, 100,000 stored images with 20 packages each,
// of which it touches a tenth: until every event is handed over.
func BenchmarkRematch(b *testing.B) {
	const images, packages, every = 100_000, 20, 10
	f := newFixture(b)
	err := f.db.Tx(b.Context(), func(tx *sql.Tx) error {
		x := &batch{s: f.s, tx: tx, stmts: map[string]*sql.Stmt{}}
		for i := range images {
			im := img(fmt.Sprint("team/app-", i/20), fmt.Sprint("image ", i))
			inventory := dig(fmt.Sprint("inventory ", i))
			_, err := x.exec(b.Context(), `INSERT INTO catalog_images (registry, repository, digest, source, kind, platform, state, first_seen,
				attested_at, inventory, report, sequence, verdict, valid_until) VALUES ($1, $2, $3, 'hub', 'image', 'linux/amd64', 'attested', 1, 1, $4, '', 1, 'pass', 2)`,
				im.Registry, im.Repository, im.Digest, inventory)
			if err != nil {
				return err
			}
			row := indexed{number: number(inventory), size: 1, analyzer: "1"}
			for p := range packages {
				row.uses = append(row.uses, number("package", "npm", "", fmt.Sprint("package-", (i*7+p*131)%5000)))
			}
			if i%every == 0 {
				row.uses = append(row.uses, number("package", "npm", "", "lodash"))
			}
			if err := writeIndex(b.Context(), x.exec, inventory, row); err != nil {
				return err
			}
		}
		_, err := x.exec(b.Context(), `INSERT INTO catalog_releases (ecosystem, release) VALUES ('npm', '')`)
		return err
	})
	if err != nil {
		b.Fatal(err)
	}
	sequence := int64(1)
	for b.Loop() {
		sequence++
		f.out.events = nil
		f.handle(f.published(sequence-1, sequence, about("lodash")))
		f.rematch()
		if n := len(f.out.events); n != images/every {
			b.Fatalf("%d events, want %d", n, images/every)
		}
	}
}
