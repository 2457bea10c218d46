package match

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/services/advisor/builtin"
	"github.com/tidewaiter/tidewaiter/services/advisor/snapshot"
	"github.com/tidewaiter/tidewaiter/services/matcher/policy"
)

var update = flag.Bool("update", false, "write golden files")

func builtinSnapshot(tb testing.TB) *snapshot.Snapshot {
	tb.Helper()
	path := filepath.Join(tb.TempDir(), "builtin.db")
	if err := builtin.Write(path); err != nil {
		tb.Fatal(err)
	}
	s, err := snapshot.Open(path)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = s.Close() })
	return s
}

func pkg(ecosystem, purl, name, version string) contracts.Package {
	return contracts.Package{
		PURL: purl + "@" + version, Name: name, Version: version, Ecosystem: ecosystem, Paths: []string{"app/" + name},
		Layer: &contracts.LayerRef{Index: 1, Digest: contracts.DigestOf([]byte("layer")), Instruction: "COPY app /app"},
	}
}

func server(name, version, product string) contracts.Package {
	p := pkg("Bitnami", "pkg:bitnami/"+name, name, version)
	p.Server, p.Product = true, product
	return p
}

func vulnerable() *contracts.Inventory {
	openssl := contracts.Package{
		PURL: "pkg:deb/debian/libssl3@3.0.9-1?distro=bookworm", Name: "libssl3", Version: "3.0.9-1", Source: "openssl", Ecosystem: "Debian:12",
	}
	return &contracts.Inventory{
		Digest: contracts.DigestOf([]byte("image")), Kind: "image", MediaType: "application/vnd.oci.image.manifest.v1+json",
		Platform: &contracts.Platform{OS: "linux", Architecture: "amd64"}, Analyzer: "1",
		OS: &contracts.OSRelease{Path: "etc/os-release", ID: "debian", VersionID: "12"},
		Packages: []contracts.Package{
			pkg("Maven", "pkg:maven/org.apache.logging.log4j/log4j-core", "org.apache.logging.log4j:log4j-core", "2.14.1"),
			pkg("npm", "pkg:npm/lodash", "lodash", "4.17.4"),
			pkg("npm", "pkg:npm/0-dns", "0-dns", "1.0.0"),
			pkg("PyPI", "pkg:pypi/django", "Django", "2.2"),
			pkg("Go", "pkg:golang/stdlib", "stdlib", "1.17"),
			pkg("Go", "pkg:golang/github.com/example/app", "github.com/example/app", "(devel)"),
			pkg("Go", "pkg:golang/golang.org/x/text", "golang.org/x/text", "(devel)"),
			openssl,
			server("redis", "2.8.19", "redis"),
			server("tomcat", "9.0.50", "tomcat"),
			server("opensearch", "1.0.0", "opensearch"),
			pkg("Hex", "pkg:hex/plug", "plug", "1.0.0"),
		},
		Gaps: []contracts.Gap{{Layer: contracts.DigestOf([]byte("layer")), Path: "big.jar", Reason: "limit: more than 512 MiB"}},
	}
}

func noParts(context.Context, string) (*contracts.Inventory, error) {
	return nil, errors.New("there are no parts")
}

func matched(tb testing.TB, m *Matcher, inv *contracts.Inventory) (*contracts.Report, []byte) {
	tb.Helper()
	r, err := m.Match(tb.Context(), inv, noParts)
	if err != nil {
		tb.Fatal(err)
	}
	b, err := json.MarshalIndent(r, "", " ")
	if err != nil {
		tb.Fatal(err)
	}
	return r, append(b, '\n')
}

func TestGoldenReport(t *testing.T) {
	m := New(builtinSnapshot(t), policy.Default())
	r, got := matched(t, m, vulnerable())
	golden := filepath.Join("testdata", "vulnerable.golden.json")
	if *update {
		if err := os.MkdirAll("testdata", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(golden, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if string(got) != string(want) {
		t.Errorf("the report changed; run with -update and look at the difference\n%s", got)
	}
	if r.Verdict != contracts.VerdictFail || !strings.Contains(r.Reasons[0], "CVE-2021-44228") {
		t.Errorf("verdict %s, reasons %v", r.Verdict, r.Reasons)
	}
	_, again := matched(t, New(m.snap, policy.Default()), vulnerable())
	_, cached := matched(t, m, vulnerable())
	if string(again) != string(got) || string(cached) != string(got) {
		t.Error("the same inventory gave another report")
	}
}

// TestBuiltinVersions is the same for the built-in advisories as for real ones.
func TestBuiltinVersions(t *testing.T) {
	m := New(builtinSnapshot(t), policy.Default())
	for _, tt := range []struct {
		ecosystem, name, version string
		want                     []string
	}{
		{"Maven", "org.apache.logging.log4j:log4j-core", "2.14.1", []string{"CVE-2021-44228", "CVE-2021-44832", "CVE-2021-45046", "CVE-2021-45105"}},
		{"Maven", "org.apache.logging.log4j:log4j-core", "2.16.0", []string{"CVE-2021-44832", "CVE-2021-45105"}},
		{"Maven", "org.apache.logging.log4j:log4j-core", "2.17.1", nil},
		{"Maven", "org.apache.logging.log4j/log4j-core", "2.17.0", []string{"CVE-2021-44832"}},
		{"npm", "lodash", "4.17.21", nil},
		{"PyPI", "PyYAML", "5.3", []string{"CVE-2020-1747", "CVE-2020-14343"}},
		{"Bitnami", "jenkins", "2.441", []string{"CVE-2024-23897"}},
		{"Bitnami", "jenkins", "2.440.1", nil},
		{"Bitnami", "mysql", "5.5.9", []string{"CVE-2012-2122", "CVE-2016-6662"}},
		{"Bitnami", "mysql", "5.5.53", nil},
		{"Bitnami", "nodejs", "18.18.1", []string{"CVE-2023-44487"}},
		{"Debian:12", "glibc", "2.36-9+deb12u3", []string{"CVE-2023-6246"}},
		{"Debian:12.5", "glibc", "2.36-9+deb12u4", nil},
		{"Debian:11", "glibc", "2.31-13", nil},
		{"Alpine:v3.18", "curl", "8.3.0-r0", []string{"CVE-2023-38545"}},
		{"Go", "golang.org/x/crypto", "v0.16.0", []string{"CVE-2023-48795", "CVE-2024-45337"}},
		{"Go", "golang.org/x/crypto", "0.0.0-20220314234659-1baeb1ce4c0b", []string{"CVE-2023-48795", "CVE-2024-45337"}},
	} {
		var got []string
		for _, f := range m.Package(&contracts.Package{Ecosystem: tt.ecosystem, Name: tt.name, Version: tt.version}).Findings() {
			got = append(got, f.ID)
		}
		slices.Sort(got)
		want := slices.Sorted(slices.Values(tt.want))
		if !slices.Equal(got, want) {
			t.Errorf("%s %s %s: %v, want %v", tt.ecosystem, tt.name, tt.version, got, want)
		}
	}
}

// TestBuiltinFactsAreTrue compares the built-in advisories with real ones, at
// and around every version they mention: where both know a vulnerability of a
// package, they must agree on who has it.
func TestBuiltinFactsAreTrue(t *testing.T) {
	ours, real := New(builtinSnapshot(t), policy.Default()), New(realSnapshot(t), policy.Default())
	// Facts in which the builtin set is knowingly better than the sample of real advisories.
	better := map[string]string{
		"jenkins CVE-2024-23897":   "Bitnami takes the first LTS line after the repair for the repaired version",
		"axios CVE-2021-3749":      "retire.js counts 0.21.2, in which it was repaired, GitHub does not",
		"postgresql CVE-2023-5869": "Bitnami has 16.0.1 for the repaired 16.1",
	}
	compared := 0
	ours.snap.Each(func(base, name string, e snapshot.Entry) bool {
		for i := range e.Candidates() {
			c := e.Candidate(i)
			ecosystem := base
			if c.Release() != "" {
				ecosystem += ":" + c.Release()
			}
			theirs, ok := real.snap.Lookup(base, name)
			if !ok {
				continue
			}
			known := map[string]bool{}
			for j := range theirs.Candidates() {
				rec := theirs.Candidate(j).Record()
				if theirs.Candidate(j).Release() != c.Release() {
					continue
				}
				for _, id := range slices.Concat([]string{rec.ID}, rec.Aliases, rec.Upstream) {
					known[id] = true
				}
			}
			for _, id := range cves(c.Record()) {
				if !known[id] || better[name+" "+id] != "" {
					continue
				}
				for j := range e.Bounds() {
					p := contracts.Package{Ecosystem: ecosystem, Name: name, Version: e.Bound(j)}
					a, b := allNames(ours.Package(&p).Findings()), allNames(real.Package(&p).Findings())
					if slices.Contains(a, id) != slices.Contains(b, id) {
						t.Errorf("%s of %s %s %s: built in %v, real %v", id, ecosystem, name, p.Version, slices.Contains(a, id), slices.Contains(b, id))
					}
					compared++
				}
			}
		}
		return true
	})
	if compared < 200 {
		t.Errorf("only %d facts were compared", compared)
	}
}

func cves(r snapshot.Record) []string {
	return slices.DeleteFunc(slices.Concat([]string{r.ID}, r.Aliases, r.Upstream), func(id string) bool { return !strings.HasPrefix(id, "CVE-") })
}

// TestCachedIsCold: whatever was asked before, in whatever order, a package
// version gets the same answer.
func TestCachedIsCold(t *testing.T) {
	s := builtinSnapshot(t)
	warm := New(s, policy.Default())
	var all []contracts.Package
	s.Each(func(base, name string, e snapshot.Entry) bool {
		for i := range e.Candidates() {
			for j := range e.Bounds() {
				ecosystem := base
				if r := e.Candidate(i).Release(); r != "" {
					ecosystem += ":" + r
				}
				all = append(all, contracts.Package{Ecosystem: ecosystem, Name: name, Version: e.Bound(j)})
			}
		}
		return true
	})
	rapid.Check(t, func(t *rapid.T) {
		p := rapid.SampledFrom(all).Draw(t, "package")
		p.Version += rapid.SampledFrom([]string{"", ".1", "-r1", "~rc1", "x"}).Draw(t, "suffix")
		cold := New(s, policy.Default()).Package(&p)
		if got := warm.Package(&p); !reflect.DeepEqual(got, cold) {
			t.Fatalf("warm %+v, cold %+v", got, cold)
		}
	})
}

func TestIndex(t *testing.T) {
	m := New(builtinSnapshot(t), policy.Default())
	amd, arm := vulnerable(), vulnerable()
	arm.Platform = &contracts.Platform{OS: "linux", Architecture: "arm64"}
	arm.Packages = arm.Packages[:2]
	load := func(_ context.Context, digest string) (*contracts.Inventory, error) {
		return map[string]*contracts.Inventory{"amd": amd, "arm": arm}[digest], nil
	}
	index := &contracts.Inventory{
		Digest: contracts.DigestOf([]byte("index")), Kind: "index", Analyzer: "1",
		Parts: []contracts.InventoryPart{{Digest: "d1", Platform: amd.Platform, Inventory: "amd"}, {Digest: "d2", Platform: arm.Platform, Inventory: "arm"}},
		Gaps:  []contracts.Gap{{Layer: "d3", Reason: "platform: not selected"}},
	}
	r, err := m.Match(t.Context(), index, load)
	if err != nil {
		t.Fatal(err)
	}
	one, _ := matched(t, m, amd)
	two, _ := matched(t, m, arm)
	if len(r.Findings) != len(one.Findings)+len(two.Findings) || r.Packages != one.Packages+two.Packages || len(r.Parts) != 2 {
		t.Errorf("%d findings and %d packages of %d parts", len(r.Findings), r.Packages, len(r.Parts))
	}
	if r.Parts[1].Counts != two.Counts || r.Counts.Total() != one.Counts.Total()+two.Counts.Total() || r.Verdict != contracts.VerdictFail {
		t.Errorf("counts %+v, parts %+v, verdict %s", r.Counts, r.Parts, r.Verdict)
	}
	for _, f := range r.Findings {
		if f.Platform != "linux/amd64" && f.Platform != "linux/arm64" {
			t.Fatalf("%s has platform %q", f.ID, f.Platform)
		}
	}
	if !slices.ContainsFunc(r.Gaps, func(g contracts.Gap) bool { return g.Layer == "d3" }) {
		t.Error("the index's own gap is lost")
	}
	failing := errors.New("no such blob")
	if _, err := m.Match(t.Context(), index, func(context.Context, string) (*contracts.Inventory, error) { return nil, failing }); !errors.Is(err, failing) {
		t.Errorf("a part that cannot be loaded: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := m.Match(ctx, amd, noParts); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

func TestIgnored(t *testing.T) {
	p, err := policy.Parse([]byte("ignore: [{id: GHSA-jfh8-c2jp-5v3q, reason: lookups are switched off}]"))
	if err != nil {
		t.Fatal(err)
	}
	s := builtinSnapshot(t)
	plain, _ := matched(t, New(s, policy.Default()), vulnerable())
	r, _ := matched(t, New(s, p), vulnerable())
	i := slices.IndexFunc(r.Findings, func(f contracts.Finding) bool { return f.ID == "CVE-2021-44228" })
	if i < 0 || r.Findings[i].Status != contracts.StatusNotAffected || !strings.Contains(r.Findings[i].Reason, "lookups are switched off") {
		t.Errorf("finding %d of %d is not excused", i, len(r.Findings))
	}
	if len(r.Findings) != len(plain.Findings) || r.Counts.Total() != plain.Counts.Total()-1 {
		t.Errorf("%d findings, %d counted", len(r.Findings), r.Counts.Total())
	}
}

func TestLags(t *testing.T) {
	m := New(builtinSnapshot(t), policy.Default())
	for _, tt := range []struct {
		product, version string
		cycle            string
		eol, outdated    bool
		known            bool
	}{
		{"redis", "2.8.19", "", true, true, true},
		{"tomcat", "9.0.50", "9.0", false, true, true},
		{"tomcat", "7.0.20", "7", true, true, true},
		{"jenkins", "2.319.1", "2", false, true, true},
		{"mysql", "5.5.9", "5.5", true, true, true},
		{"elasticsearch", "2.4.6", "", true, true, true},
		{"postgresql", "9.6.1", "9.6", true, true, true},
		{"couchdb", "3.1.1", "", true, true, true},
		{"debian", "12", "12", true, true, true},
		{"debian", "13", "13", false, false, true},
		{"alpine-linux", "3.23.5", "3.23", false, false, true},
		{"openjdk", "17.0.2", "17", true, true, true},
		{"nothing", "1.0", "", false, false, false},
	} {
		l, ok := m.lag(tt.product, tt.version)
		if ok != tt.known || l.Cycle != tt.cycle || l.EOL != tt.eol || l.Outdated != tt.outdated {
			t.Errorf("%s %s: known %v, %+v; want %+v", tt.product, tt.version, ok, l, tt)
		}
	}
	l, _ := m.lag("tomcat", "10.0.1")
	if l.BehindDays == nil || *l.BehindDays < 1000 || l.LatestInCycle != "10.0.27" || l.EndOfLife != "2022-10-31" || !strings.HasPrefix(l.Latest, "11.") {
		t.Errorf("tomcat 10.0.1: %+v", l)
	}
}

func TestModules(t *testing.T) {
	const modular, plain = "1:16.20.1-1.module_el8.8.0+3576", "1:16.20.1-1.el8"
	for _, tt := range []struct {
		version, module, advisory, fixed string
		want                             bool
	}{
		{"1:18.1.0-1.module_el8.8.0+1", "nodejs:18:80800:abc", "nodejs:16", modular, false},
		{"1:16.1.0-1.module_el8.8.0+1", "nodejs:16:80800:abc", "nodejs:16", modular, true},
		{"1:16.1.0-1.module_el8.8.0+1", "", "nodejs:16", modular, true},
		{"1:16.1.0-1.module_el8.8.0+1", "virt-devel:rhel:1:a", "virt:rhel virt-devel:rhel", modular, true},
		{"1:16.1.0-1.el8", "", "nodejs:16", modular, false},
		{"1:16.1.0-1.el8", "", "", plain, true},
		{"1:16.1.0-1.module_el8.8.0+1", "nodejs:16:1:a", "", plain, false},
	} {
		if got := sameModule(key{version: tt.version, module: tt.module}, tt.advisory, tt.fixed); got != tt.want {
			t.Errorf("%+v: %v", tt, got)
		}
	}
}

// TestMerge: which advisories are one finding.
func TestMerge(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x.db")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	below := func(v string) [][]snapshot.RangeEvent {
		return [][]snapshot.RangeEvent{{{Kind: snapshot.Introduced, Version: "0"}, {Kind: snapshot.Fixed, Version: v}}}
	}
	npm := func(severity string, score float64, fixed string) []snapshot.Affected {
		return []snapshot.Affected{{Ecosystem: "npm", Name: "x", Severity: severity, Score: score, HasScore: score > 0, Ranges: below(fixed)}}
	}
	deb := []snapshot.Affected{{Ecosystem: "Debian:12", Name: "x", Severity: "unknown", Ranges: below("2.0")}}
	err = snapshot.Encode(f, &snapshot.Content{
		Advisories: []snapshot.Advisory{
			{ID: "GHSA-1", Aliases: []string{"CVE-2024-10"}, Affected: npm("high", 7.5, "1.2.0")},
			{ID: "NSWG-1", Aliases: []string{"CVE-2024-10"}, Affected: npm("critical", 9.1, "1.3.0")},
			{ID: "RETIRE-1", Aliases: []string{"GHSA-1"}, Affected: npm("low", 0, "1.1.0")},
			{ID: "RETIRE-2", Affected: npm("low", 0, "1.1.0")},
			{ID: "DSA-1", Upstream: []string{"CVE-2024-2", "CVE-2024-3"}, Affected: deb},
			{ID: "DSA-2", Upstream: []string{"CVE-2024-3"}, Affected: deb},
		},
		KEV: []string{"CVE-2024-3"}, EPSS: map[string]float64{"CVE-2024-10": 0.95},
	}, func(id, reason string) { t.Error(id, reason) })
	if err := errors.Join(err, f.Close()); err != nil {
		t.Fatal(err)
	}
	s, err := snapshot.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = s.Close() }()
	m := New(s, policy.Default())
	found := m.Package(&contracts.Package{Ecosystem: "npm", Name: "x", Version: "1.0.0"}).Findings()
	if len(found) != 2 {
		t.Fatalf("%d findings: %+v", len(found), found)
	}
	one := found[0]
	if one.ID != "CVE-2024-10" || !slices.Equal(one.Aliases, []string{"GHSA-1", "NSWG-1", "RETIRE-1"}) || one.Severity != "critical" || *one.Score != 9.1 ||
		!slices.Equal(one.Fixed, []string{"1.1.0", "1.2.0", "1.3.0"}) || one.EPSS != ">=0.9" || one.KEV {
		t.Errorf("merged: %+v", one)
	}
	if found[1].ID != "RETIRE-2" {
		t.Errorf("not merged: %+v", found[1])
	}
	found = m.Package(&contracts.Package{Ecosystem: "Debian:12", Name: "libx", Source: "x", Version: "1.0+b1", SourceVersion: "1.0"}).Findings()
	if len(found) != 2 || found[0].ID != "CVE-2024-2" || found[0].KEV || !slices.Equal(found[0].Aliases, []string{"DSA-1"}) ||
		found[1].ID != "CVE-2024-3" || !found[1].KEV || !slices.Equal(found[1].Aliases, []string{"DSA-1", "DSA-2"}) {
		t.Errorf("a distribution's advisories: %+v", found)
	}
	if r := m.Package(&contracts.Package{Ecosystem: "Debian:13", Name: "x", Version: "1.0"}); !r.uncovered {
		t.Errorf("a release without advisories: %+v", r)
	}
}
