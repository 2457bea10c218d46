package e2e

import (
	"archive/zip"
	"bytes"
	"encoding/json"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/bus"
	"github.com/tidewaiter/tidewaiter/libs/run"
	"github.com/tidewaiter/tidewaiter/libs/store"
	"github.com/tidewaiter/tidewaiter/services/advisor/artefact"
	"github.com/tidewaiter/tidewaiter/services/advisor/compile"
	"github.com/tidewaiter/tidewaiter/services/advisor/snapshot"
	"github.com/tidewaiter/tidewaiter/services/matcher/match"
	"github.com/tidewaiter/tidewaiter/services/matcher/policy"
	"github.com/tidewaiter/tidewaiter/services/tidewaiter/allinone"
	"github.com/tidewaiter/tidewaiter/services/tidewaiter/sample"
)

// osv is an advisory of our own about one npm package: versions below fixed are affected.
type osv struct {
	id, name, fixed string
	modified        string
	withdrawn       bool
}

// critical is a CVSS vector that scores 9.8.
const critical = "CVSS:3.1/AV:N/AC:L/PR:N/UI:N/S:U/C:H/I:H/A:H"

// writeOSV replaces the npm archive in dir.
func writeOSV(t *testing.T, dir string, advisories ...osv) {
	t.Helper()
	var content bytes.Buffer
	z := zip.NewWriter(&content)
	for _, a := range advisories {
		record := map[string]any{
			"id": a.id, "modified": a.modified, "summary": "A flaw in " + a.name,
			"severity": []any{map[string]any{"type": "CVSS_V3", "score": critical}},
			"affected": []any{map[string]any{
				"package": map[string]any{"ecosystem": "npm", "name": a.name},
				"ranges":  []any{map[string]any{"type": "SEMVER", "events": []any{map[string]any{"introduced": "0"}, map[string]any{"fixed": a.fixed}}}},
			}},
		}
		if a.withdrawn {
			record["withdrawn"] = a.modified
		}
		body, err := json.Marshal(record)
		if err != nil {
			t.Fatal(err)
		}
		w, err := z.Create(a.id + ".json")
		if err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(body); err != nil {
			t.Fatal(err)
		}
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	replaceFile(t, filepath.Join(dir, "npm.zip"), content.Bytes())
}

// replaceFile writes a file as a whole.
func replaceFile(t *testing.T, name string, content []byte) {
	t.Helper()
	if err := os.WriteFile(name+".new", content, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(name+".new", name); err != nil {
		t.Fatal(err)
	}
}

// advised is a pipeline whose advisories come from an advisor.
type advised struct{ *system }

// startAdvised starts a pipeline with an advisor that watches the given folders.
func startAdvised(t *testing.T, from ...string) *advised {
	t.Helper()
	dir := t.TempDir()
	private, public, err := artefact.GenerateKey()
	if err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string][]byte{"advisor.key": private, "advisor.pub": public} {
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	var lc net.ListenConfig
	l, err := lc.Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	host := l.Addr().String()
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	repository := host + "/tidewaiter/advisories"
	empty, err := run.Parse("", nil, func(string) (string, bool) { return "", false })
	if err != nil {
		t.Fatal(err)
	}
	config, err := empty.With(map[string]any{
		"advisor": map[string]any{
			"from": from, "work": filepath.Join(dir, "work"), "publish": repository, "keyFile": filepath.Join(dir, "advisor.key"), "poll": "200ms",
		},
		"matcher": map[string]any{
			"snapshots": repository, "snapshotKeys": filepath.Join(dir, "advisor.pub"), "cache": filepath.Join(dir, "cache"),
			// what is published is only found when somebody names it
			"poll": "1h",
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	first := from[0] // a snapshot, or what one is compiled from
	if !strings.HasSuffix(first, ".db") {
		first = filepath.Join(dir, "first.db")
		if _, err := compile.Build(t.Context(), compile.Options{From: from, Out: first}); err != nil {
			t.Fatal(err)
		}
	}
	s := start(t, allinone.Options{Config: config, RegistryListen: host, Advisories: first})
	return &advised{system: s}
}

// changed waits for the n-th published snapshot.
func (a *advised) changed(n int) contracts.AdvisoriesChanged {
	a.t.Helper()
	var last bus.Tailed
	a.log.wait(a.t, func(l *events) string {
		found := l.about(contracts.AdvisoriesChangedV1, "")
		if len(found) < n {
			return fmt.Sprintf("%d snapshots are published, %d expected", len(found), n)
		}
		last = found[n-1]
		return ""
	})
	d, err := bus.Decode[contracts.AdvisoriesChanged](last.Event)
	if err != nil {
		a.t.Fatal(err)
	}
	return d
}

// rematched returns the subjects of image.rematch about a snapshot, by lane.
func (a *advised) rematched(sequence int64) map[string][]string {
	a.t.Helper()
	lanes := map[string][]string{}
	for _, m := range a.log.named(contracts.ImageRematchV1) {
		d, err := bus.Decode[contracts.ImageRematch](m.Event)
		if err != nil {
			a.t.Fatal(err)
		}
		if d.Snapshot.Sequence == sequence {
			lane, _ := m.Event.Extensions()[contracts.ExtLane].(string)
			lanes[lane] = append(lanes[lane], m.Event.Subject())
		}
	}
	for _, list := range lanes {
		slices.Sort(list)
	}
	return lanes
}

// attestedWith waits until the images' newest statements rest on a snapshot.
func (a *advised) attestedWith(sequence int64, subjects ...string) {
	a.t.Helper()
	a.log.wait(a.t, func(l *events) string {
		for _, subject := range subjects {
			ok := slices.ContainsFunc(l.about(contracts.ImageAttestedV1, subject), func(m bus.Tailed) bool {
				d, err := bus.Decode[contracts.ImageAttested](m.Event)
				return err == nil && d.Snapshot.Sequence >= sequence
			})
			if !ok {
				return fmt.Sprintf("%s is not attested with snapshot %d", subject, sequence)
			}
		}
		return ""
	})
}

// npmImage is an image with one layer that holds npm packages.
func npmImage(t *testing.T, platform sample.Image, packages ...[2]string) sample.Image {
	t.Helper()
	var files []sample.File
	for _, p := range packages {
		files = append(files, sample.NPM("srv", p[0], p[1]))
	}
	l, err := sample.NewLayer("RUN npm ci", files...)
	if err != nil {
		t.Fatal(err)
	}
	platform.Layers = []sample.Layer{l}
	return platform
}

// A new advisory and a withdrawn one: exactly the images they touch are matched
// again, what runs first, without a layer being asked for; the new statement
// takes the old one's place, problems open and close. Nobody else hears of it.
func TestNewAdvisoriesTouchOnlyWhomTheyMust(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	const day1, day2 = "2026-05-01T00:00:00Z", "2026-05-02T00:00:00Z"
	writeOSV(t, dir,
		osv{id: "TEST-MINIMIST", name: "minimist", fixed: "1.2.6", modified: day1},
		osv{id: "TEST-EXPRESS", name: "express", fixed: "4.0.0", modified: day1})
	a := startAdvised(t, dir)
	amd, arm := sample.Image{Platform: sample.AMD64}, sample.Image{Platform: sample.ARM64}
	runs := a.push("team/runs", "1", npmImage(t, amd, [2]string{"lodash", "4.17.4"}))
	index := a.push("team/index", "1", npmImage(t, amd, [2]string{"left-pad", "1.0.0"}), npmImage(t, arm, [2]string{"lodash", "4.17.20"}))
	closed := a.push("team/closed", "1", npmImage(t, amd, [2]string{"minimist", "1.2.0"}))
	still := a.push("team/still", "1", npmImage(t, amd, [2]string{"express", "3.0.0"}))
	pushed := []sample.Pushed{runs, index, closed, still}
	a.attested(pushed...)
	first := a.changed(1)
	if first.Previous != nil {
		t.Errorf("the first snapshot has a previous one: %+v", first)
	}
	a.quiet()
	body, _ := json.Marshal(map[string]any{"origin": "test", "images": []string{runs.String()}})
	if status, answer := a.call("POST", a.Catalog+"/v1/deployed", map[string]string{"Authorization": "Bearer " + a.Token}, body); status != 200 {
		t.Fatalf("deployed: %d %s", status, answer)
	}
	requests := len(a.log.named(contracts.LayerRequestedV1))
	before := map[string][]string{}
	for _, p := range pushed {
		for _, image := range images(p) {
			before[image] = a.referrers(image)
		}
	}
	verdictBefore := a.report(runs.String()).Verdict

	writeOSV(t, dir,
		osv{id: "TEST-MINIMIST", name: "minimist", fixed: "1.2.6", modified: day2, withdrawn: true},
		osv{id: "TEST-EXPRESS", name: "express", fixed: "4.0.0", modified: day2}, // nothing but its date
		osv{id: "TEST-LODASH", name: "lodash", fixed: "4.17.21", modified: day2})
	second := a.changed(2)
	if second.Previous == nil || *second.Previous != first.Snapshot || second.Snapshot.Sequence <= first.Snapshot.Sequence || second.Changed != 2 {
		t.Errorf("second snapshot %+v after %+v", second, first)
	}
	arm64 := index.Ref.Registry + "/" + index.Ref.Repository + "@" + index.Platforms[1].Digest.String()
	touched := []string{runs.String(), index.String(), arm64, closed.String()}
	slices.Sort(touched)
	a.attestedWith(second.Snapshot.Sequence, touched...)
	a.quiet()

	lanes := a.rematched(second.Snapshot.Sequence)
	if got := lanes[contracts.LaneFresh]; !slices.Equal(got, []string{runs.String()}) {
		t.Errorf("in the fresh lane %v, want what runs: %v", got, runs)
	}
	all := append(slices.Clone(lanes[contracts.LaneFresh]), lanes[contracts.LaneBulk]...)
	slices.Sort(all)
	if !slices.Equal(all, touched) {
		t.Errorf("matched again:\n%v\nwant\n%v", all, touched)
	}
	if n := len(a.log.named(contracts.LayerRequestedV1)); n != requests {
		t.Errorf("%d layers were asked for", n-requests)
	}
	for image, old := range before {
		now := a.referrers(image)
		if slices.Contains(touched, image) == slices.Equal(old, now) || len(now) != 4 {
			t.Errorf("%s: referrers were %v, are %v", image, old, now)
		}
		v, err := a.verify(image)
		if err != nil || !v.Verified || len(v.Statements) != 2 {
			t.Fatalf("verify %s: %+v, %v", image, v, err)
		}
		for _, st := range v.Statements {
			if touchedNow := slices.Contains(touched, image); touchedNow && st.Sequence != second.Snapshot.Sequence || !touchedNow && st.Sequence != first.Snapshot.Sequence {
				t.Errorf("%s: statement of sequence %d", image, st.Sequence)
			}
		}
	}
	if r := a.report(runs.String()); verdictBefore == contracts.VerdictFail || r.Verdict != contracts.VerdictFail || len(r.Findings) != 1 {
		t.Errorf("verdict was %s, is %s with %d findings", verdictBefore, r.Verdict, len(r.Findings))
	}
	if r := a.report(closed.String()); len(r.Findings) != 0 {
		t.Errorf("a withdrawn advisory still matches: %+v", r.Findings)
	}
	open := map[string]string{}
	for _, p := range a.problems() {
		open[p.Owner] = p.Package
	}
	host := a.Registry.Host
	if len(open) != 3 || open[host+"/team/runs"] != "lodash" || open[host+"/team/index"] != "lodash" || open[host+"/team/still"] != "express" {
		t.Errorf("open problems: %v", open)
	}
	ends := 0
	for _, m := range a.log.named(contracts.FindingClosedV1) {
		p, err := bus.Decode[contracts.Problem](m.Event)
		if err != nil || p.Owner != host+"/team/closed" {
			t.Errorf("closed %+v, %v", p, err)
		}
		ends++
	}
	if ends != 1 {
		t.Errorf("%d problems were closed, want that of the withdrawn advisory", ends)
	}
}

// An image that is matched with the old snapshot while the new one is known to
// nobody but the advisor is caught, also by a catalog that was away meanwhile,
// and a matcher and an attestor that stop in between lose nothing.
func TestMatchedWhileASnapshotSpreads(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	const day1, day2 = "2026-05-01T00:00:00Z", "2026-05-02T00:00:00Z"
	writeOSV(t, dir, osv{id: "TEST-MINIMIST", name: "minimist", fixed: "1.2.6", modified: day1})
	a := startAdvised(t, dir)
	amd := sample.Image{Platform: sample.AMD64}
	early := a.push("team/early", "1", npmImage(t, amd, [2]string{"lodash", "4.17.4"}))
	a.attested(early)
	first := a.changed(1)
	a.quiet()
	stop := func(names ...string) {
		t.Helper()
		for _, name := range names {
			if err := a.StopService(name); err != nil {
				t.Fatal(err)
			}
		}
	}
	begin := func(names ...string) {
		t.Helper()
		for _, name := range names {
			if err := a.StartService(name); err != nil {
				t.Fatal(err)
			}
		}
	}
	stop("catalog")
	writeOSV(t, dir, osv{id: "TEST-MINIMIST", name: "minimist", fixed: "1.2.6", modified: day1},
		osv{id: "TEST-LODASH", name: "lodash", fixed: "4.17.21", modified: day2})
	second := a.changed(2)
	late := a.push("team/late", "1", npmImage(t, amd, [2]string{"lodash", "4.17.20"}))
	other := a.push("team/other", "1", npmImage(t, amd, [2]string{"express", "3.0.0"}))
	a.attested(late, other)
	for _, p := range []sample.Pushed{late, other} {
		if v, err := a.verify(p.String()); err != nil || !v.Verified || v.Statements[0].Sequence != first.Snapshot.Sequence {
			t.Fatalf("%s was not matched with the old snapshot: %+v, %v", p, v, err)
		}
	}
	stop("matcher", "attestor")
	begin("catalog")
	a.log.wait(t, func(l *events) string {
		for _, p := range []sample.Pushed{early, late} {
			if len(l.about(contracts.ImageRematchV1, p.String())) == 0 {
				return p.String() + " is not asked for"
			}
		}
		return ""
	})
	stop("catalog")
	begin("attestor", "matcher", "catalog")
	a.attestedWith(second.Snapshot.Sequence, early.String(), late.String())
	a.quiet()
	lanes := a.rematched(second.Snapshot.Sequence)
	want := []string{early.String(), late.String()}
	slices.Sort(want)
	if got := lanes[contracts.LaneBulk]; !slices.Equal(got, want) || len(lanes[contracts.LaneFresh]) != 0 {
		t.Errorf("asked for %v, want %v", lanes, want)
	}
	for _, subject := range want {
		if r := a.report(subject); r.Verdict != contracts.VerdictFail || len(a.referrers(subject)) != 4 {
			t.Errorf("%s: verdict %s, %d referrers", subject, r.Verdict, len(a.referrers(subject)))
		}
	}
	if problems := a.problems(); len(problems) != 2 {
		t.Errorf("%d problems are open, want two: %+v", len(problems), problems)
	}
}

// sharedAdvisories returns the folder of real advisories, which is beside the
// repository where there is one.
func sharedAdvisories(t *testing.T) string {
	t.Helper()
	dir, err := filepath.Abs(filepath.Join("..", "..", "shared", "advisories"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(dir); err != nil {
		t.Skip("the real advisories are not here: ../shared/advisories")
	}
	return dir
}

// copyFiles copies files into a new folder.
func copyFiles(t *testing.T, into string, files ...string) {
	t.Helper()
	if err := os.MkdirAll(into, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		content, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(into, filepath.Base(f)), content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// twoDays compiles yesterday's and today's advisories.
func twoDays(t *testing.T, shared string) (yesterday, today string) {
	t.Helper()
	dir := t.TempDir()
	base := filepath.Join(dir, "base")
	copyFiles(t, filepath.Join(base, "kev"), filepath.Join(shared, "kev", "known_exploited_vulnerabilities-yesterday.json.gz"))
	copyFiles(t, filepath.Join(base, "epss"), filepath.Join(shared, "epss", "epss_scores-kev-yesterday.csv.gz"))
	copyFiles(t, filepath.Join(base, "eol"), filepath.Join(shared, "eol", "endoflife.zip"))
	if err := os.Symlink(filepath.Join(shared, "osv"), filepath.Join(base, "osv")); err != nil {
		t.Fatal(err)
	}
	updates := filepath.Join(dir, "updates")
	copyFiles(t, filepath.Join(updates, "kev"), filepath.Join(shared, "kev", "known_exploited_vulnerabilities.json.gz"))
	copyFiles(t, filepath.Join(updates, "epss"), filepath.Join(shared, "epss", "epss_scores-kev-2026-08-22.csv.gz"))
	found, err := filepath.Glob(filepath.Join(shared, "updates", "*"))
	if err != nil {
		t.Fatal(err)
	}
	copyFiles(t, updates, found...)
	yesterday, today = filepath.Join(dir, "yesterday.db"), filepath.Join(dir, "today.db")
	for out, from := range map[string][]string{yesterday: {base}, today: {base, updates}} {
		if _, err := compile.Build(t.Context(), compile.Options{From: from, Out: out}); err != nil {
			t.Fatal(err)
		}
	}
	return yesterday, today
}

func openSnapshot(t *testing.T, file string) *snapshot.Snapshot {
	t.Helper()
	s, err := snapshot.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// changedIDs returns every advisory id that the updates' lists of changes name.
func changedIDs(t *testing.T, shared string) map[string]bool {
	t.Helper()
	lists, err := filepath.Glob(filepath.Join(shared, "updates", "*.changes.json"))
	if err != nil || len(lists) == 0 {
		t.Fatalf("%d lists of changes, %v", len(lists), err)
	}
	ids := map[string]bool{}
	for _, file := range lists {
		content, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		var c struct {
			Added, Modified, Removed []string
			Withdrawn                []string `json:"withdrawn_now"`
		}
		if err := json.Unmarshal(content, &c); err != nil {
			t.Fatal(err)
		}
		for _, id := range slices.Concat(c.Added, c.Modified, c.Removed, c.Withdrawn) {
			ids[id] = true
		}
	}
	return ids
}

// chosen is an image of the test: one package, whose advisories the updates change or not.
type chosen struct {
	ecosystem, name, version string
	listed                   bool // whether a changed advisory names the package
}

// choose picks packages of every ecosystem: some of those whose results differ
// between the two days, and some that no list of changes and no exploited
// vulnerability is about.
func choose(t *testing.T, old, next *snapshot.Snapshot, ids map[string]bool, each int) []chosen {
	t.Helper()
	before, after := match.New(old, policy.Default()), match.New(next, policy.Default())
	type group struct{ differ, same int }
	groups := map[string]*group{}
	var all []chosen
	look := func(base, name string, e snapshot.Entry, other *snapshot.Snapshot) {
		g := groups[base]
		if g == nil {
			g = &group{}
			groups[base] = g
		}
		if g.differ >= each && g.same >= each || e.Bounds() == 0 {
			return
		}
		release, listed, exploited := e.Candidate(0).Release(), false, false
		entries := []snapshot.Entry{e}
		if o, ok := other.Lookup(base, name); ok {
			entries = append(entries, o)
		}
		for _, e := range entries {
			for i := range e.Candidates() {
				r := e.Candidate(i).Record()
				listed = listed || ids[r.ID]
				for _, cve := range slices.Concat([]string{r.ID}, r.Aliases, r.Upstream) {
					for _, s := range []*snapshot.Snapshot{old, next} {
						_, scored := s.EPSS(cve)
						exploited = exploited || scored || s.KEV(cve)
					}
				}
			}
		}
		ecosystem := base
		if release != "" {
			ecosystem += ":" + release
		}
		p := contracts.Package{Ecosystem: ecosystem, Name: name, Version: e.Bound(0)}
		if !listed && !exploited && g.same < each {
			g.same++
			all = append(all, chosen{ecosystem, name, p.Version, false})
			return
		}
		if !listed || g.differ >= each {
			return
		}
		for i := range e.Bounds() {
			p.Version = e.Bound(i)
			x, errX := json.Marshal(before.Package(&p).Findings())
			y, errY := json.Marshal(after.Package(&p).Findings())
			if errX != nil || errY != nil {
				t.Fatal(errX, errY)
			}
			if !bytes.Equal(x, y) {
				g.differ++
				all = append(all, chosen{ecosystem, name, p.Version, true})
				return
			}
		}
	}
	next.Each(func(base, name string, e snapshot.Entry) bool { look(base, name, e, old); return true })
	old.Each(func(base, name string, e snapshot.Entry) bool { // what the updates removed altogether
		if _, ok := next.Lookup(base, name); !ok {
			look(base, name, e, next)
		}
		return true
	})
	return all
}

// assembledWith gives an image that is in the registry an inventory of our own,
// as assembler would, so that packages of every ecosystem take part.
func (a *advised) assembledWith(b *bus.Bus, db *store.DB, p sample.Pushed, c chosen) *contracts.Inventory {
	a.t.Helper()
	inv := &contracts.Inventory{
		Digest: p.Ref.Digest, Kind: contracts.KindImage, MediaType: "application/vnd.oci.image.manifest.v1+json", Analyzer: "test",
		Packages: []contracts.Package{{PURL: "pkg:generic/" + url.PathEscape(c.name) + "@" + url.PathEscape(c.version), Name: c.name, Version: c.version, Ecosystem: c.ecosystem}},
	}
	content, err := json.Marshal(inv)
	if err != nil {
		a.t.Fatal(err)
	}
	digest, err := db.PutBlob(a.t.Context(), content)
	if err != nil {
		a.t.Fatal(err)
	}
	im := contracts.Image{Registry: p.Ref.Registry, Repository: p.Ref.Repository, Digest: p.Ref.Digest}
	ev, err := bus.NewEvent(contracts.ImageAssembledV1, im.String(), contracts.ImageAssembled{
		Image: im, Source: allinone.Source, Tag: "1", Kind: inv.Kind, Inventory: contracts.Blob{Digest: digest, Size: int64(len(content))},
		Analyzer: inv.Analyzer, Packages: 1,
	})
	if err != nil {
		a.t.Fatal(err)
	}
	ev.SetID(contracts.JoinID(ev.Type(), ev.Subject(), digest))
	ev.SetSource("/services/assembler")
	ev.SetTime(time.Now())
	bus.Key(&ev, im.Digest)
	if err := b.Publish(a.t.Context(), ev); err != nil {
		a.t.Fatal(err)
	}
	return inv
}

// Today's real advisories after yesterday's, of all ecosystems: exactly the
// images change whose report a full match of every inventory finds different,
// nothing is pulled for it, and nobody else hears of it.
func TestTodayAfterYesterday(t *testing.T) {
	t.Parallel()
	shared := sharedAdvisories(t)
	yesterday, today := twoDays(t, shared)
	old, next := openSnapshot(t, yesterday), openSnapshot(t, today)
	images := choose(t, old, next, changedIDs(t, shared), 2)
	current := filepath.Join(t.TempDir(), "current.db")
	content, err := os.ReadFile(yesterday)
	if err != nil {
		t.Fatal(err)
	}
	replaceFile(t, current, content)
	a := startAdvised(t, current)
	b, err := bus.New(a.BusConfig(), "e2e-assembler", slog.New(slog.DiscardHandler), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = b.Close() }()
	db, err := store.Open(t.Context(), a.Config.Database.URL)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = db.Close() }()

	var pushed []sample.Pushed
	for i := range images {
		l, err := sample.NewLayer("COPY app", sample.File{Path: "app/own.bin", Body: sample.Noise(uint64(i), 64)})
		if err != nil {
			t.Fatal(err)
		}
		pushed = append(pushed, a.push(fmt.Sprintf("fleet/app-%d", i), "1", sample.Image{Platform: sample.AMD64, Layers: []sample.Layer{l}}))
	}
	a.attested(pushed...)
	first := a.changed(1)
	a.quiet()
	inventories := map[string]*contracts.Inventory{}
	ecosystems := map[string]bool{}
	for i, c := range images {
		inventories[pushed[i].String()] = a.assembledWith(b, db, pushed[i], c)
		base, _, _ := strings.Cut(c.ecosystem, ":")
		ecosystems[base] = ecosystems[base] || c.listed
	}
	a.quiet()
	before, requests := map[string][]string{}, len(a.log.named(contracts.LayerRequestedV1))
	for subject := range inventories {
		before[subject] = a.referrers(subject)
	}
	if content, err = os.ReadFile(today); err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	replaceFile(t, current, content)
	second := a.changed(2)
	if second.Snapshot.Sequence <= first.Snapshot.Sequence {
		t.Errorf("the sequence did not rise: %d after %d", second.Snapshot.Sequence, first.Snapshot.Sequence)
	}

	was, is := match.New(old, policy.Default()), match.New(next, policy.Default())
	full := map[string][]byte{}
	var differ []string
	for subject, inv := range inventories {
		x, errX := was.Match(t.Context(), inv, nil)
		y, errY := is.Match(t.Context(), inv, nil)
		if errX != nil || errY != nil {
			t.Fatal(errX, errY)
		}
		xs, errX := json.Marshal(x)
		ys, errY := json.Marshal(y)
		if errX != nil || errY != nil {
			t.Fatal(errX, errY)
		}
		full[subject] = ys
		if !bytes.Equal(xs, ys) {
			differ = append(differ, subject)
		}
	}
	slices.Sort(differ)
	a.attestedWith(second.Snapshot.Sequence, differ...)
	t.Logf("%d of %d images of %d ecosystems have new statements %s after the file was replaced", len(differ), len(images), len(ecosystems), time.Since(start).Round(time.Millisecond))
	a.quiet()

	lanes := a.rematched(second.Snapshot.Sequence)
	asked := slices.Concat(lanes[contracts.LaneFresh], lanes[contracts.LaneBulk])
	slices.Sort(asked)
	var listed []string
	for i, c := range images {
		if c.listed {
			listed = append(listed, pushed[i].String())
		}
	}
	slices.Sort(listed)
	if !slices.Equal(differ, listed) || !slices.Equal(asked, listed) {
		t.Errorf("listed as changed:\n%v\ndiffer in a full match:\n%v\nasked for:\n%v", listed, differ, asked)
	}
	if len(ecosystems) < 10 || len(listed) < 15 || len(listed) > len(images)-10 {
		t.Errorf("%d images, %d of them changed, of %d ecosystems: too few to prove anything", len(images), len(listed), len(ecosystems))
	}
	if n := len(a.log.named(contracts.LayerRequestedV1)); n != requests {
		t.Errorf("%d layers were asked for", n-requests)
	}
	for subject, old := range before {
		sequence := first.Snapshot.Sequence
		if slices.Contains(listed, subject) {
			sequence = second.Snapshot.Sequence
		} else if now := a.referrers(subject); !slices.Equal(now, old) {
			t.Errorf("%s is not touched, its referrers were %v and are %v", subject, old, now)
		}
		v, err := a.verify(subject)
		if err != nil || len(v.Statements) != 2 || v.Statements[0].Sequence != sequence || v.Statements[1].Sequence != sequence {
			t.Errorf("%s: %+v, %v; want sequence %d", subject, v, err, sequence)
		}
		if got, err := json.Marshal(a.report(subject)); err != nil || !bytes.Equal(got, full[subject]) {
			t.Errorf("%s: report\n%s\na full match gives\n%s", subject, got, full[subject])
		}
	}
}
