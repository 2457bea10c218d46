package delta_test

import (
	"bytes"
	"encoding/json"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/services/advisor/delta"
	"github.com/tidewaiter/tidewaiter/services/advisor/snapshot"
	"github.com/tidewaiter/tidewaiter/services/matcher/match"
	"github.com/tidewaiter/tidewaiter/services/matcher/policy"
)

// noon is a moment on a day in May 2026 in Unix seconds.
func noon(day int64) int64 { return 1777550400 + day*86400 + 43200 }

func encode(t interface {
	Fatal(args ...any)
	Helper()
}, dir string, c snapshot.Content,
) *snapshot.Snapshot {
	t.Helper()
	f, err := os.CreateTemp(dir, "*.db")
	if err != nil {
		t.Fatal(err)
	}
	if err := snapshot.Encode(f, &c, func(string, string) {}); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	s, err := snapshot.Open(f.Name())
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// lodash is an advisory about one package.
func lodash(change func(a *snapshot.Advisory)) snapshot.Advisory {
	a := snapshot.Advisory{
		ID: "GHSA-1", Aliases: []string{"CVE-2020-1"}, Summary: "flaw", Modified: noon(1),
		Affected: []snapshot.Affected{{
			Ecosystem: "npm", Name: "lodash", Severity: "high",
			Ranges: [][]snapshot.RangeEvent{{{Kind: snapshot.Introduced, Version: "0"}, {Kind: snapshot.Fixed, Version: "2.0.0"}}},
		}},
	}
	if change != nil {
		change(&a)
	}
	return a
}

func TestCompare(t *testing.T) {
	debian := func(id, release, fixed string) snapshot.Advisory {
		return snapshot.Advisory{ID: id, Modified: noon(1), Affected: []snapshot.Affected{{
			Ecosystem: "Debian:" + release, Name: "openssl", Severity: "high",
			Ranges: [][]snapshot.RangeEvent{{{Kind: snapshot.Introduced, Version: "0"}, {Kind: snapshot.Fixed, Version: fixed}}},
		}}}
	}
	redis := func(eol string) map[string][]snapshot.Cycle {
		return map[string][]snapshot.Cycle{"redis": {{Name: "7.2", EOL: eol, Latest: "7.2.4"}}}
	}
	npm := []contracts.DeltaPackage{{Ecosystem: "npm", Name: "lodash", Releases: []string{""}}}
	for _, test := range []struct {
		name       string
		old, next  snapshot.Content
		packages   []contracts.DeltaPackage
		ecosystems []string
		products   []string
	}{
		{name: "nothing", old: snapshot.Content{Advisories: []snapshot.Advisory{lodash(nil)}}, next: snapshot.Content{Advisories: []snapshot.Advisory{lodash(nil)}}},
		{
			name: "only the date of the advisory", old: snapshot.Content{Advisories: []snapshot.Advisory{lodash(nil)}},
			next: snapshot.Content{Advisories: []snapshot.Advisory{lodash(func(a *snapshot.Advisory) { a.Modified = noon(3) })}},
		},
		{
			name: "fixed elsewhere", old: snapshot.Content{Advisories: []snapshot.Advisory{lodash(nil)}},
			next:     snapshot.Content{Advisories: []snapshot.Advisory{lodash(func(a *snapshot.Advisory) { a.Affected[0].Ranges[0][1].Version = "2.0.1" })}},
			packages: npm,
		},
		{
			name: "severity", old: snapshot.Content{Advisories: []snapshot.Advisory{lodash(nil)}},
			next:     snapshot.Content{Advisories: []snapshot.Advisory{lodash(func(a *snapshot.Advisory) { a.Affected[0].Severity = "low" })}},
			packages: npm,
		},
		{
			name: "exploited now", old: snapshot.Content{Advisories: []snapshot.Advisory{lodash(nil)}, KEV: []string{"CVE-1999-1"}},
			next:     snapshot.Content{Advisories: []snapshot.Advisory{lodash(nil)}, KEV: []string{"CVE-1999-1", "CVE-2020-1"}},
			packages: npm,
		},
		{
			name: "score within its band", old: snapshot.Content{Advisories: []snapshot.Advisory{lodash(nil)}, EPSS: map[string]float64{"CVE-2020-1": 0.2}},
			next: snapshot.Content{Advisories: []snapshot.Advisory{lodash(nil)}, EPSS: map[string]float64{"CVE-2020-1": 0.3}},
		},
		{
			name: "score in another band", old: snapshot.Content{Advisories: []snapshot.Advisory{lodash(nil)}, EPSS: map[string]float64{"CVE-2020-1": 0.2}},
			next:     snapshot.Content{Advisories: []snapshot.Advisory{lodash(nil)}, EPSS: map[string]float64{"CVE-2020-1": 0.6}},
			packages: npm,
		},
		{
			name:       "the last advisory of an ecosystem went",
			old:        snapshot.Content{Advisories: []snapshot.Advisory{lodash(nil)}},
			packages:   npm,
			ecosystems: []string{"npm"},
		},
		{
			name:     "one release of a distribution",
			old:      snapshot.Content{Advisories: []snapshot.Advisory{debian("DSA-1", "11", "1.1"), debian("DSA-2", "12", "3.0")}},
			next:     snapshot.Content{Advisories: []snapshot.Advisory{debian("DSA-1", "11", "1.1"), debian("DSA-2", "12", "3.1")}},
			packages: []contracts.DeltaPackage{{Ecosystem: "Debian", Name: "openssl", Releases: []string{"12"}}},
		},
		{
			name:       "a new release of a distribution",
			old:        snapshot.Content{Advisories: []snapshot.Advisory{debian("DSA-1", "11", "1.1")}},
			next:       snapshot.Content{Advisories: []snapshot.Advisory{debian("DSA-1", "11", "1.1"), debian("DSA-2", "12", "3.1")}},
			packages:   []contracts.DeltaPackage{{Ecosystem: "Debian", Name: "openssl", Releases: []string{"12"}}},
			ecosystems: []string{"Debian:12"},
		},
		{
			name:     "a line got another latest version",
			old:      snapshot.Content{Products: redis("2027-01-01")},
			next:     snapshot.Content{Products: map[string][]snapshot.Cycle{"redis": {{Name: "7.2", EOL: "2027-01-01", Latest: "7.2.5"}}}},
			products: []string{"redis"},
		},
		{
			name: "a line ended in between", old: snapshot.Content{Products: redis("2026-05-04"), Newest: noon(1)},
			next: snapshot.Content{Products: redis("2026-05-04"), Newest: noon(5)}, products: []string{"redis"},
		},
		{
			name: "a line ends later", old: snapshot.Content{Products: redis("2026-05-04"), Newest: noon(1)},
			next: snapshot.Content{Products: redis("2026-05-04"), Newest: noon(2)},
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			dir := t.TempDir()
			old, next := encode(t, dir, test.old), encode(t, dir, test.next)
			defer func() { _, _ = old.Close(), next.Close() }()
			d, err := delta.Compare(t.Context(), old, next)
			if err != nil {
				t.Fatal(err)
			}
			if !equal(t, d.Packages, test.packages) || !slices.Equal(d.Ecosystems, test.ecosystems) || !slices.Equal(d.Products, test.products) {
				t.Errorf("got %+v", d)
			}
		})
	}
}

func equal(t *testing.T, a, b []contracts.DeltaPackage) bool {
	t.Helper()
	if len(a) == 0 && len(b) == 0 {
		return true
	}
	x, errA := json.Marshal(a)
	y, errB := json.Marshal(b)
	if errA != nil || errB != nil {
		t.Fatal(errA, errB)
	}
	return bytes.Equal(x, y)
}

// draw returns advisories about few packages, so that they meet often.
func draw(r *rapid.T) snapshot.Content {
	pick := func(label string, of ...string) string { return rapid.SampledFrom(of).Draw(r, label) }
	c := snapshot.Content{Newest: noon(rapid.Int64Range(0, 9).Draw(r, "newest")), EPSS: map[string]float64{}, Products: map[string][]snapshot.Cycle{}}
	for _, id := range []string{"A-1", "A-2", "CVE-2020-1", "GHSA-1"} {
		if !rapid.Bool().Draw(r, "has "+id) {
			continue
		}
		a := snapshot.Advisory{ID: id, Summary: pick("summary", "", "flaw"), Modified: noon(rapid.Int64Range(0, 5).Draw(r, "modified"))}
		a.Informational = rapid.IntRange(0, 9).Draw(r, "informational") == 0
		a.Malware = rapid.IntRange(0, 9).Draw(r, "malware") == 0
		for _, name := range []string{"CVE-2020-1", "CVE-2020-2", "A-1"} {
			switch pick("relation of "+name, "none", "none", "alias", "upstream") {
			case "alias":
				a.Aliases = append(a.Aliases, name)
			case "upstream":
				a.Upstream = append(a.Upstream, name)
			}
		}
		for range rapid.IntRange(1, 3).Draw(r, "affected") {
			f := snapshot.Affected{
				Ecosystem: pick("ecosystem", "npm", "Debian:11", "Debian:12", "Debian", "Alpine:v3.20"), Name: pick("name", "x", "y"),
				Severity: pick("severity", "low", "critical"),
			}
			if rapid.Bool().Draw(r, "scored") {
				f.Score, f.HasScore = 7.5, true
			}
			f.Ranges = [][]snapshot.RangeEvent{{
				{Kind: snapshot.Introduced, Version: pick("introduced", "0", "1.0.0", "2.0.0")},
				{Kind: rapid.SampledFrom([]int{snapshot.Fixed, snapshot.LastAffected}).Draw(r, "kind"), Version: pick("end", "2.0.0", "3.0.0")},
			}}
			if rapid.Bool().Draw(r, "listed") {
				f.Versions = []string{"1.5.0"}
			}
			a.Affected = append(a.Affected, f)
		}
		c.Advisories = append(c.Advisories, a)
	}
	for _, cve := range []string{"CVE-2020-1", "CVE-2020-2"} {
		if rapid.Bool().Draw(r, "kev") {
			c.KEV = append(c.KEV, cve)
		}
		if rapid.Bool().Draw(r, "epss") {
			c.EPSS[cve] = rapid.SampledFrom([]float64{0.02, 0.03, 0.95}).Draw(r, "score")
		}
	}
	for _, product := range []string{"redis", "debian"} {
		if rapid.Bool().Draw(r, product) {
			c.Products[product] = []snapshot.Cycle{{Name: "12", EOL: pick("eol", "2026-05-03", "2026-05-05", "false"), Latest: pick("latest", "12.1", "12.2")}}
		}
	}
	return c
}

// inventories are small, so that a difference in one is not hidden by another.
func inventories() []*contracts.Inventory {
	var all []*contracts.Inventory
	for _, ecosystem := range []string{"npm", "Debian:11", "Debian:12", "Alpine:v3.20"} {
		for _, name := range []string{"x", "y", "z"} {
			for _, version := range []string{"1.5.0", "2.0.0"} {
				all = append(all, &contracts.Inventory{Digest: "d", Kind: "image", Packages: []contracts.Package{{Name: name, Version: version, Ecosystem: ecosystem}}})
			}
		}
	}
	return append(all,
		&contracts.Inventory{Digest: "d", Kind: "image", OS: &contracts.OSRelease{ID: "debian", VersionID: "12"}},
		&contracts.Inventory{Digest: "d", Kind: "image", Packages: []contracts.Package{{Name: "redis", Product: "redis", Version: "12.1", Ecosystem: "Bitnami", Server: true}}})
}

// touches says whether a delta is about what an inventory looks up, the slow and plain way.
func touches(d contracts.AdvisoriesDelta, inv *contracts.Inventory) bool {
	return slices.ContainsFunc(match.Uses(inv), func(u match.Use) bool {
		switch {
		case u.Product != "":
			return slices.Contains(d.Products, u.Product)
		case u.Name == "":
			return slices.Contains(d.Ecosystems, u.Ecosystem) || slices.Contains(d.Ecosystems, u.Ecosystem+":"+u.Release)
		}
		return slices.ContainsFunc(d.Packages, func(p contracts.DeltaPackage) bool {
			return p.Ecosystem == u.Ecosystem && p.Name == u.Name && (slices.Contains(p.Releases, "") || slices.Contains(p.Releases, u.Release))
		})
	})
}

// TestDeltaCovers: whatever the two snapshots, a report that differs is about an
// inventory that the delta touches; and what no advisory, score or release line
// of differs is not in the delta.
func TestDeltaCovers(t *testing.T) {
	dir := t.TempDir()
	pol := policy.Default()
	rapid.Check(t, func(r *rapid.T) {
		a, b := draw(r), draw(r)
		if rapid.Bool().Draw(r, "mostly the same") { // so that most of it is equal
			b = a
			b.Newest = noon(rapid.Int64Range(0, 9).Draw(r, "newest"))
			if len(a.Advisories) > 0 {
				b.Advisories = slices.Clone(a.Advisories)
				i := rapid.IntRange(0, len(a.Advisories)-1).Draw(r, "which")
				b.Advisories[i].Affected = slices.Clone(a.Advisories[i].Affected)
				b.Advisories[i].Affected[0].Severity = "medium"
			}
		}
		old, next := encode(r, dir, a), encode(r, dir, b)
		defer func() { _, _ = old.Close(), next.Close() }()
		d, err := delta.Compare(t.Context(), old, next)
		if err != nil {
			r.Fatal(err)
		}
		before, after := match.New(old, pol), match.New(next, pol)
		for _, inv := range inventories() {
			x, errX := before.Match(t.Context(), inv, nil)
			y, errY := after.Match(t.Context(), inv, nil)
			if errX != nil || errY != nil {
				r.Fatal(errX, errY)
			}
			xs, _ := json.Marshal(x)
			ys, _ := json.Marshal(y)
			if !bytes.Equal(xs, ys) && !touches(d, inv) {
				r.Fatalf("the report on %+v differs, and the delta does not touch it:\n%s\n%s\n%+v", inv, xs, ys, d)
			}
		}
		names := map[string]bool{}
		for _, c := range []snapshot.Content{a, b} {
			for _, adv := range c.Advisories {
				for _, f := range adv.Affected {
					base, _ := snapshot.Split(f.Ecosystem)
					names[base+" "+f.Name] = true
				}
			}
		}
		for _, p := range d.Packages {
			if !names[p.Ecosystem+" "+p.Name] {
				r.Fatalf("%+v is in no advisory; there are %v", p, slices.Sorted(maps.Keys(names)))
			}
		}
		same, err := delta.Compare(t.Context(), next, next)
		if err != nil || len(same.Packages)+len(same.Ecosystems)+len(same.Products) != 0 {
			r.Fatalf("a snapshot differs from itself: %+v, %v", same, err)
		}
		for _, f := range must(filepath.Glob(filepath.Join(dir, "*.db"))) {
			_ = os.Remove(f)
		}
	})
}

func must(list []string, _ error) []string { return list }
