package match

import (
	"context"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/services/advisor/compile"
	"github.com/tidewaiter/tidewaiter/services/advisor/snapshot"
	"github.com/tidewaiter/tidewaiter/services/matcher/policy"
)

var realOnce struct {
	sync.Once
	path string
	err  error
}

// sharedAdvisories returns the folder with real advisories beside the repository.
func sharedAdvisories(tb testing.TB) string {
	tb.Helper()
	dir, err := filepath.Abs("../../../../shared/advisories")
	if err != nil {
		tb.Fatal(err)
	}
	if _, err := os.Stat(dir); err != nil {
		tb.Skip("no real advisories beside the repository: ", dir)
	}
	return dir
}

// realSnapshot opens a snapshot of the real advisories, compiled once a test run.
func realSnapshot(tb testing.TB) *snapshot.Snapshot {
	tb.Helper()
	from := sharedAdvisories(tb)
	realOnce.Do(func() {
		dir, err := os.MkdirTemp("", "tidewaiter-match") //nolint:usetesting // shared by all tests of the run; removed by TestMain
		if err != nil {
			realOnce.err = err
			return
		}
		realOnce.path = filepath.Join(dir, "advisories.db")
		_, realOnce.err = compile.Build(context.Background(), compile.Options{From: []string{from}, Out: realOnce.path}) //nolint:usetesting // outlives the test that builds it
	})
	if realOnce.err != nil {
		tb.Fatal(realOnce.err)
	}
	s, err := snapshot.Open(realOnce.path)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = s.Close() })
	return s
}

func TestMain(m *testing.M) {
	code := m.Run()
	if realOnce.path != "" {
		_ = os.RemoveAll(filepath.Dir(realOnce.path))
	}
	os.Exit(code)
}

// TestKnownVersions is the list of the issue: what must be found, and the fixed
// neighbours in which it must not be.
func TestKnownVersions(t *testing.T) {
	m := New(realSnapshot(t), policy.Default())
	tests := []struct {
		ecosystem, name, version string
		found, absent            []string
	}{
		{"Maven", "org.apache.logging.log4j:log4j-core", "2.14.1", []string{"CVE-2021-44228"}, nil},
		{"Maven", "org.apache.logging.log4j:log4j-core", "2.17.1", nil, []string{"CVE-2021-44228"}},
		{"npm", "lodash", "4.17.4", []string{"CVE-2018-3721", "CVE-2018-16487", "CVE-2019-10744", "CVE-2021-23337"}, nil},
		{"npm", "lodash", "4.17.21", nil, []string{"CVE-2018-3721", "CVE-2018-16487", "CVE-2019-10744", "CVE-2021-23337"}},
		{"PyPI", "Django", "2.2", []string{"CVE-2019-12308", "CVE-2019-14234"}, nil},
		{"PyPI", "Django", "2.2.28", nil, []string{"CVE-2019-12308", "CVE-2019-14234"}},
		{"Go", "stdlib", "1.17", []string{"CVE-2022-24675", "CVE-2022-23806"}, nil},
		{"Go", "go", "1.17.13", nil, []string{"CVE-2022-24675", "CVE-2022-23806"}},
		{"Bitnami", "redis", "2.8.19", []string{"CVE-2021-32626"}, nil},
		{"Bitnami", "redis", "6.2.6", nil, []string{"CVE-2021-32626"}},
		{"Bitnami", "tomcat", "9.0.50", []string{"CVE-2025-24813"}, nil},
		{"Bitnami", "tomcat", "9.0.30", []string{"CVE-2020-1938", "CVE-2020-11996"}, nil},
		{"Bitnami", "tomcat", "9.0.99", nil, []string{"CVE-2020-1938", "CVE-2020-11996", "CVE-2025-24813"}},
	}
	for _, tt := range tests {
		t.Run(tt.name+" "+tt.version, func(t *testing.T) {
			r := m.Package(&contracts.Package{Ecosystem: tt.ecosystem, Name: tt.name, Version: tt.version})
			ids := allNames(r.Findings())
			for _, id := range tt.found {
				if !slices.Contains(ids, id) {
					t.Errorf("%s not found among %d findings", id, len(r.Findings()))
				}
			}
			for _, id := range tt.absent {
				if slices.Contains(ids, id) {
					t.Errorf("%s found, it is fixed there", id)
				}
			}
			if !r.known || r.uncovered || r.gap != "" {
				t.Errorf("known %v, uncovered %v, gap %q", r.known, r.uncovered, r.gap)
			}
		})
	}
}

func allNames(findings []contracts.Finding) []string {
	var ids []string
	for _, f := range findings {
		ids = append(append(ids, f.ID), f.Aliases...)
	}
	return ids
}

// realPackages returns n package versions drawn from a snapshot's own names and
// bounds: every one is named by an advisory, which is the worst case.
func realPackages(s *snapshot.Snapshot, n int) []contracts.Package {
	r := rand.New(rand.NewPCG(1, 2)) //nolint:gosec // a sample, the same at every run
	var all []contracts.Package
	s.Each(func(base, name string, e snapshot.Entry) bool {
		releases := map[string]bool{}
		for i := range e.Candidates() {
			releases[e.Candidate(i).Release()] = true
		}
		for release := range releases {
			ecosystem := base
			if release != "" {
				ecosystem += ":" + release
			}
			if e.Bounds() > 0 { // one version of every name: a name is not the likelier the more is wrong with it
				v := e.Bound(r.IntN(e.Bounds()))
				all = append(all, contracts.Package{Ecosystem: ecosystem, Name: name, Version: v, PURL: "pkg:" + name + "@" + v})
			}
		}
		return true
	})
	slices.SortFunc(all, func(a, b contracts.Package) int {
		return slices.Compare([]string{a.Ecosystem, a.Name, a.Version}, []string{b.Ecosystem, b.Name, b.Version})
	})
	r.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	return all[:min(n, len(all))]
}

// BenchmarkCold evaluates package versions that are all named by advisories,
// without the result cache.
func BenchmarkCold(b *testing.B) {
	s := realSnapshot(b)
	m := New(s, policy.Default())
	packages := realPackages(s, 100_000)
	b.ResetTimer()
	start, findings := time.Now(), 0
	for i := range b.N {
		findings += len(m.evaluate(keyOf(&packages[i%len(packages)])).findings)
	}
	b.ReportMetric(float64(b.N)/time.Since(start).Seconds(), "versions/s")
	b.ReportMetric(float64(findings)/float64(b.N), "findings/version")
}

// BenchmarkFleet matches versions that were evaluated before.
func BenchmarkFleet(b *testing.B) {
	s := realSnapshot(b)
	m := New(s, policy.Default())
	packages := realPackages(s, 100_000)
	for i := range packages {
		m.Package(&packages[i])
	}
	b.ResetTimer()
	start, findings := time.Now(), 0
	for i := range b.N {
		findings += len(m.Package(&packages[i%len(packages)]).findings)
	}
	b.ReportMetric(float64(b.N)/time.Since(start).Seconds(), "versions/s")
	b.ReportMetric(float64(findings)/float64(b.N), "findings/version")
}
