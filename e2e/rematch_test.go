package e2e

import (
	"archive/zip"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/bus"
	"github.com/tidewaiter/tidewaiter/libs/run"
	"github.com/tidewaiter/tidewaiter/services/advisor"
	"github.com/tidewaiter/tidewaiter/services/advisor/artefact"
	"github.com/tidewaiter/tidewaiter/services/advisor/compile"
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
type advised struct {
	*system
	dir string // of the advisor's keys and work
}

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
	first := filepath.Join(dir, "first.db")
	if _, err := compile.Build(t.Context(), compile.Options{From: from, Out: first}); err != nil {
		t.Fatal(err)
	}
	s := start(t, allinone.Options{Config: config, RegistryListen: host, Advisories: first})
	a := &advised{system: s, dir: dir}
	a.advisor()
	return a
}

// advisor runs the advisor until the test ends, unless the pipeline has its own.
func (a *advised) advisor() {
	a.t.Helper()
	if slices.ContainsFunc(allinone.Services(), func(s run.Named) bool { return s.Name == advisor.Name }) {
		return
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(a.t.Context()))
	ended := make(chan error, 1)
	env := a.Config.Env(advisor.Name, a.logger(), prometheus.NewRegistry(), a.Health)
	go func() { ended <- advisor.Run(ctx, env) }()
	a.t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			a.t.Errorf("advisor: %v", err)
		}
		if err := env.Close(); err != nil {
			a.t.Errorf("advisor: %v", err)
		}
	})
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
