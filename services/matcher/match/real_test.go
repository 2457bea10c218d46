package match

import (
	"context"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

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
		_, realOnce.err = compile.Build(context.Background(), compile.Options{From: []string{from}, Out: realOnce.path})
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
	r := rand.New(rand.NewPCG(1, 2))
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

// cpu returns the seconds of processor time that the process has used: other
// processes on the machine do not count.
func cpu(b *testing.B) float64 {
	b.Helper()
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return float64(u.Utime.Nano()+u.Stime.Nano()) / 1e9
}

// BenchmarkCold evaluates package versions without the result cache. "named":
// each is named by advisories, the worst case. "image": nine in ten are not,
// as in images.
func BenchmarkCold(b *testing.B) {
	for _, kind := range []string{"named", "image"} {
		b.Run(kind, func(b *testing.B) {
			m, packages := benchmarkSet(b, kind)
			b.ResetTimer()
			start, findings := cpu(b), 0
			for i := range b.N {
				findings += len(m.evaluate(keyOf(&packages[i%len(packages)])).findings)
			}
			b.ReportMetric(float64(b.N)/(cpu(b)-start), "versions/cpu-s")
			b.ReportMetric(float64(findings)/float64(b.N), "findings/version")
		})
	}
}

// BenchmarkFleet matches versions that were evaluated before.
func BenchmarkFleet(b *testing.B) {
	for _, kind := range []string{"named", "image"} {
		b.Run(kind, func(b *testing.B) {
			m, packages := benchmarkSet(b, kind)
			for i := range packages {
				m.Package(&packages[i])
			}
			b.ResetTimer()
			start, findings := cpu(b), 0
			for i := range b.N {
				findings += len(m.Package(&packages[i%len(packages)]).findings)
			}
			b.ReportMetric(float64(b.N)/(cpu(b)-start), "versions/cpu-s")
			b.ReportMetric(float64(findings)/float64(b.N), "findings/version")
		})
	}
}

// benchmarkSet returns a matcher on the real advisories where they are, else
// on the built-in ones, and package versions for it.
func benchmarkSet(b *testing.B, kind string) (*Matcher, []contracts.Package) {
	b.Helper()
	var s *snapshot.Snapshot
	if _, err := os.Stat("../../../../shared/advisories"); err == nil {
		s = realSnapshot(b)
	} else {
		s = builtinSnapshot(b)
	}
	packages := realPackages(s, 20_000)
	if kind == "image" {
		for i := range packages {
			if i%10 != 0 {
				packages[i].Name = "unheard-of-" + packages[i].Name
			}
		}
	}
	return New(s, policy.Default()), packages
}

// BenchmarkOpen opens the full snapshot.
func BenchmarkOpen(b *testing.B) {
	realSnapshot(b)
	for b.Loop() {
		s, err := snapshot.Open(realOnce.path)
		if err != nil {
			b.Fatal(err)
		}
		_ = s.Close()
	}
	info, err := os.Stat(realOnce.path)
	if err != nil {
		b.Fatal(err)
	}
	b.ReportMetric(float64(info.Size())/(1<<20), "MiB")
}
