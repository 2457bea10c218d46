package compile

import (
	"archive/zip"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/services/advisor/snapshot"
)

// osv returns a record about one npm package that is fixed in a version.
func osv(id, modified, name, fixed, more string) string {
	return fmt.Sprintf(`{"id":%q,"modified":%q,"schema_version":"99.0","new_field":{"a":1},"affected":[{"package":{"ecosystem":"npm","name":%q,"purl":"pkg:npm/x"},
		"ranges":[{"type":"SEMVER","events":[{"introduced":"0"},{"fixed":%q}]}]}]%s}`, id, modified, name, fixed, more)
}

func writeZip(t *testing.T, path string, files map[string]string) {
	t.Helper()
	var b bytes.Buffer
	z := zip.NewWriter(&b)
	names := make([]string, 0, len(files))
	for name := range files {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		w, err := z.CreateHeader(&zip.FileHeader{Name: name, Method: zip.Deflate, Modified: time.Date(2025, 6, 1, 0, 0, 0, 0, time.UTC)})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, files[name]); err != nil {
			t.Fatal(err)
		}
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	write(t, path, b.Bytes())
}

func write(t *testing.T, path string, content []byte) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
}

func gzipped(t *testing.T, text string) []byte {
	t.Helper()
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	if _, err := io.WriteString(z, text); err != nil {
		t.Fatal(err)
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func build(t *testing.T, o Options) (contracts.AdvisoriesBuild, *snapshot.Snapshot) {
	t.Helper()
	if o.Out == "" {
		o.Out = filepath.Join(t.TempDir(), "advisories.db")
	}
	got, err := Build(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	s, err := snapshot.Open(o.Out)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	if s.Digest() != got.Snapshot || s.Sequence() != got.Sequence {
		t.Errorf("the file is %s %d, the result says %s %d", s.Digest(), s.Sequence(), got.Snapshot, got.Sequence)
	}
	content, err := os.ReadFile(o.Out)
	if err != nil {
		t.Fatal(err)
	}
	if contracts.DigestOf(content) != got.Snapshot {
		t.Error("the snapshot's digest is not its file's sha256")
	}
	return got, s
}

func unix(t *testing.T, date string) int64 {
	t.Helper()
	at, err := time.Parse(time.RFC3339, date)
	if err != nil {
		t.Fatal(err)
	}
	return at.Unix()
}

const kevToday = `{"dateReleased":"2025-02-02T00:00:00Z","vulnerabilities":[{"cveID":"CVE-2024-1"},{"cveID":"CVE-2024-2"}]}`

// source writes a folder with everything in every place it may be.
func source(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	writeZip(t, filepath.Join(dir, "osv", "npm.zip"), map[string]string{
		"A-1.json":   osv("A-1", "2024-01-01T00:00:00Z", "a", "1.0.0", `,"aliases":["CVE-2024-1"],"severity":[{"type":"CVSS_V3","score":"CVSS:3.1/AV:N/AC:L/PR:N/UI:N/S:U/C:H/I:H/A:H"}]`),
		"W-1.json":   osv("W-1", "2025-01-01T00:00:00Z", "w", "1.0.0", `,"withdrawn":"2024-06-01T00:00:00Z"`),
		"BAD.json":   `{"id":"BAD","modified":`,
		"NOID.json":  `{"modified":"2024-01-01T00:00:00Z"}`,
		"TYPE.json":  `{"id":"TYPE","modified":"2024-01-01T00:00:00Z","affected":"all"}`,
		"README.txt": "not a record",
	})
	writeZip(t, filepath.Join(dir, "PyPI", "all.zip"), map[string]string{
		"P-1.json": `{"id":"P-1","modified":"2024-05-01T00:00:00.5Z","affected":[{"package":{"ecosystem":"PyPI","name":"Zope.Interface"},"versions":["1.0","1.1"],
			"ranges":[{"type":"GIT","repo":"https://example.org","events":[{"introduced":"0"}]}]}],"database_specific":{"severity":"MODERATE"}}`,
	})
	writeZip(t, filepath.Join(dir, "top.zip"), map[string]string{"T-1.json": osv("T-1", "2024-02-01T00:00:00Z", "t", "2.0.0", "")})
	writeZip(t, filepath.Join(dir, "updates", "npm-update.zip"), map[string]string{"U-1.json": osv("U-1", "2030-01-01T00:00:00Z", "u", "1.0.0", "")})
	write(t, filepath.Join(dir, "kev", "old.json"), []byte(`{"dateReleased":"2024-02-02T00:00:00Z","vulnerabilities":[{"cveID":"CVE-1999-1"}]}`))
	write(t, filepath.Join(dir, "kev", "new.json.gz"), gzipped(t, kevToday))
	write(t, filepath.Join(dir, "epss", "a.csv"), []byte("#model_version:v1,score_date:2025-01-02T00:00:00Z\ncve,epss,percentile\nCVE-2024-1,0.95,0.99\n"))
	write(t, filepath.Join(dir, "epss", "b.csv.gz"), gzipped(t, "#model_version:v1,score_date:2025-01-01T00:00:00Z\ncve,epss,percentile\nCVE-2024-1,0.1,0.5\n"))
	write(t, filepath.Join(dir, "eol", "redis.json"), []byte(`[{"cycle":"8.0","eol":false,"latest":"8.0.1","lts":"2025-01-01"},{"cycle":7,"eol":"2024-01-01","latest":"7.4.0"}]`))
	write(t, filepath.Join(dir, "eol", "broken.json"), []byte(`{"result":[]}`))
	write(t, filepath.Join(dir, "eol", "all.json"), []byte(`["redis"]`))
	return dir
}

func TestBuild(t *testing.T) {
	got, s := build(t, Options{From: []string{source(t)}})
	if got.Records != 3 || got.Withdrawn != 1 || got.KEV != 2 || got.EPSS != 1 || got.Products != 1 {
		t.Errorf("%+v", got)
	}
	if want := unix(t, "2025-01-01T00:00:00Z"); got.Sequence != want {
		t.Errorf("sequence %d, want that of the newest record, %d", got.Sequence, want)
	}
	if got.Ecosystems["npm"] != 2 || got.Ecosystems["PyPI"] != 1 || len(got.Ecosystems) != 2 {
		t.Errorf("ecosystems %v", got.Ecosystems)
	}
	var files []string
	for _, r := range got.Rejected {
		files = append(files, r.File)
		if r.Reason == "" {
			t.Errorf("%s rejected without a reason", r.File)
		}
	}
	if want := []string{"eol/broken.json", "osv/npm.zip/BAD.json", "osv/npm.zip/NOID.json", "osv/npm.zip/TYPE.json"}; !slices.Equal(files, want) {
		t.Errorf("rejected %v, want %v", files, want)
	}
	for name, want := range map[string]bool{"a": true, "w": false, "t": true, "u": false} {
		if _, ok := s.Lookup("npm", name); ok != want {
			t.Errorf("%s known: %v, want %v", name, ok, want)
		}
	}
	e, ok := s.Lookup("PyPI", "zope-interface")
	if !ok {
		t.Fatal("zope-interface is not known")
	}
	if c := e.Candidate(0); !slices.Equal(c.Versions(), []string{"1.0", "1.1"}) || len(c.Ranges()) != 0 || c.Record().Severity != contracts.SeverityMedium {
		t.Errorf("zope-interface: %v %v %+v", c.Versions(), c.Ranges(), c.Record())
	}
	a, _ := s.Lookup("npm", "a")
	if r := a.Candidate(0).Record(); r.Severity != contracts.SeverityCritical || r.Score != 9.8 {
		t.Errorf("a: %+v", r)
	}
	if !s.KEV("CVE-2024-1") || s.KEV("CVE-1999-1") {
		t.Error("the newest KEV catalog was not taken")
	}
	if band, _ := s.EPSS("CVE-2024-1"); band != ">=0.9" {
		t.Errorf("EPSS band %q: the newest day was not taken", band)
	}
	if c := s.Product("redis"); len(c) != 2 || c[1].Name != "7" || c[0].EOL != "false" || c[0].LTS != "2025-01-01" {
		t.Errorf("redis: %+v", c)
	}
}

func TestOverlay(t *testing.T) {
	dir, update := t.TempDir(), t.TempDir()
	writeZip(t, filepath.Join(dir, "npm.zip"), map[string]string{
		"A-1.json": osv("A-1", "2024-01-01T00:00:00Z", "a", "1.0.0", ""),
		"B-1.json": osv("B-1", "2024-01-01T00:00:00Z", "b", "1.0.0", ""),
		"C-1.json": osv("C-1", "2024-01-01T00:00:00Z", "c", "1.0.0", ""),
		"D-1.json": osv("D-1", "2024-03-01T00:00:00Z", "d", "1.0.0", ""),
	})
	// The same record in a second archive: the newer one counts.
	writeZip(t, filepath.Join(dir, "zz.zip"), map[string]string{"D-1.json": osv("D-1", "2024-02-01T00:00:00Z", "d-old", "1.0.0", "")})
	writeZip(t, filepath.Join(update, "npm-update.zip"), map[string]string{
		"A-1.json": osv("A-1", "2024-02-01T00:00:00Z", "a", "1.5.0", ""),
		"B-1.json": osv("B-1", "2024-02-01T00:00:00Z", "b", "1.0.0", `,"withdrawn":"2024-02-01T00:00:00Z"`),
		"N-1.json": osv("N-1", "2024-04-01T00:00:00Z", "n", "1.0.0", ""),
	})
	write(t, filepath.Join(update, "npm-update.changes.json"), []byte(`{"ecosystem":"npm","added":["N-1"],"removed":["C-1"]}`))
	got, s := build(t, Options{From: []string{dir, update}})
	if got.Records != 3 || got.Withdrawn != 1 || len(got.Rejected) != 0 {
		t.Errorf("%+v", got)
	}
	for name, want := range map[string]bool{"a": true, "b": false, "c": false, "d": true, "d-old": false, "n": true} {
		if _, ok := s.Lookup("npm", name); ok != want {
			t.Errorf("%s known: %v, want %v", name, ok, want)
		}
	}
	a, _ := s.Lookup("npm", "a")
	if a.Bounds() != 1 || a.Bound(0) != "1.5.0" {
		t.Error("the changed record did not replace the old one")
	}
	single, _ := build(t, Options{From: []string{filepath.Join(update, "npm-update.zip")}})
	if single.Records != 2 || single.Withdrawn != 1 {
		t.Errorf("a single archive: %+v", single)
	}
}

func TestSequenceAndSameBytes(t *testing.T) {
	dir := source(t)
	one, s := build(t, Options{From: []string{dir}})
	two, _ := build(t, Options{From: []string{dir}})
	if one.Snapshot != two.Snapshot {
		t.Error("the same input gave two files")
	}
	told := int64(7)
	three, _ := build(t, Options{From: []string{dir}, Sequence: &told})
	if three.Sequence != 7 || three.Snapshot == one.Snapshot {
		t.Errorf("sequence %d", three.Sequence)
	}
	// A record dated after the archive that holds it says nothing about how new the knowledge is.
	future := t.TempDir()
	writeZip(t, filepath.Join(future, "npm.zip"), map[string]string{
		"A-1.json": osv("A-1", "2024-01-01T00:00:00Z", "a", "1.0.0", ""), "F-1.json": osv("F-1", "2031-01-01T00:00:00Z", "f", "1.0.0", ""),
	})
	f, fs := build(t, Options{From: []string{future}})
	if f.Sequence != unix(t, "2031-01-01T00:00:00Z") || fs.Newest().Year() != 2024 {
		t.Errorf("sequence %d, newest %s", f.Sequence, fs.Newest())
	}
	if s.Newest().Year() != 2025 {
		t.Errorf("newest %s", s.Newest())
	}
}

func TestNoInput(t *testing.T) {
	out := filepath.Join(t.TempDir(), "x.db")
	if _, err := Build(t.Context(), Options{From: []string{t.TempDir()}, Out: out}); !errors.Is(err, ErrNoInput) {
		t.Errorf("empty folder: %v", err)
	}
	if _, err := Build(t.Context(), Options{Out: out}); !errors.Is(err, ErrNoInput) {
		t.Errorf("no source: %v", err)
	}
	if _, err := Build(t.Context(), Options{From: []string{filepath.Join(t.TempDir(), "absent")}, Out: out}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("absent folder: %v", err)
	}
	if _, err := os.Stat(out); !errors.Is(err, os.ErrNotExist) {
		t.Error("a failed build left a file")
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Build(ctx, Options{From: []string{source(t)}, Out: out}); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

func TestRejectedArchivesAndRanges(t *testing.T) {
	dir := t.TempDir()
	write(t, filepath.Join(dir, "broken.zip"), []byte("PK nothing"))
	writeZip(t, filepath.Join(dir, "big.zip"), map[string]string{"BIG.json": `{"id":"` + strings.Repeat("x", MaxEntryBytes) + `"}`})
	writeZip(t, filepath.Join(dir, "debian.zip"), map[string]string{
		"D-1.json": `{"id":"D-1","modified":"2024-01-01T00:00:00Z","affected":[{"package":{"ecosystem":"Debian:12","name":"x"},
			"ranges":[{"type":"ECOSYSTEM","events":[{"introduced":"0"},{"fixed":"x:1"}]},{"type":"ECOSYSTEM","events":[{"introduced":"0"},{"fixed":"1.2-3"}]}]}]}`,
		"A-1.json": `{"id":"A-1","modified":"2024-01-01T00:00:00Z","affected":[{"package":{"ecosystem":"Amazon Linux:2","name":"x"},
			"ranges":[{"type":"ECOSYSTEM","events":[{"introduced":"0"},{"fixed":"1.2-3"}]}]}]}`,
	})
	got, s := build(t, Options{From: []string{dir}})
	reasons := map[string]string{}
	for _, r := range got.Rejected {
		reasons[r.File] = r.Reason
	}
	for file, part := range map[string]string{
		"broken.zip": "not a zip", "big.zip/BIG.json": "more than", "debian.zip/D-1.json": "x:1", "debian.zip/A-1.json": "Amazon Linux",
	} {
		if !strings.Contains(reasons[file], part) {
			t.Errorf("%s: %q, want %q in it", file, reasons[file], part)
		}
	}
	e, ok := s.Lookup("Debian", "x")
	if !ok || len(e.Candidate(0).Ranges()) != 1 {
		t.Error("the range that can be read was lost with the other")
	}
}

func TestSeverity(t *testing.T) {
	v3, v4, v2 := "CVSS:3.1/AV:N/AC:L/PR:N/UI:N/S:U/C:H/I:H/A:H", "CVSS:4.0/AV:N/AC:L/AT:N/PR:N/UI:N/VC:H/VI:H/VA:H/SC:N/SI:N/SA:N", "AV:N/AC:L/Au:N/C:P/I:P/A:P"
	for _, tt := range []struct {
		name     string
		vectors  []osvSeverity
		database string
		want     rating
	}{
		{"v3", []osvSeverity{{"CVSS_V3", v3}}, "", rating{"critical", 9.8, true, v3}},
		{"v3 and v4", []osvSeverity{{"CVSS_V3", v3}, {"CVSS_V4", v4}}, "", rating{"critical", 9.8, true, v3}},
		{"v4", []osvSeverity{{"CVSS_V4", v4}}, "", rating{"critical", 9.3, true, v4}},
		{"v2", []osvSeverity{{"CVSS_V2", v2}}, "", rating{"high", 7.5, true, v2}},
		{"v2 loses to v3", []osvSeverity{{"CVSS_V2", "AV:N/AC:L/Au:N/C:C/I:C/A:C"}, {"CVSS_V3", "CVSS:3.1/AV:N/AC:L/PR:N/UI:N/S:U/C:N/I:N/A:L"}}, "", rating{"medium", 5.3, true, "CVSS:3.1/AV:N/AC:L/PR:N/UI:N/S:U/C:N/I:N/A:L"}},
		{"a vector goes before the word", []osvSeverity{{"CVSS_V3", v3}}, `{"severity":"LOW"}`, rating{"critical", 9.8, true, v3}},
		{"word", nil, `{"severity":"MODERATE","cwe_ids":["CWE-1"]}`, rating{severity: "medium"}},
		{"database's score", nil, `{"cvss_v3":5.3,"cvss_v4":6.9}`, rating{"medium", 6.9, true, ""}},
		{"broken vector", []osvSeverity{{"CVSS_V3", "CVSS:3.1/AV:X"}}, `{"severity":3}`, rating{severity: "unknown"}},
		{"Ubuntu's word", []osvSeverity{{"Ubuntu", "negligible"}}, "", rating{severity: "low"}},
		{"nothing", nil, "", rating{severity: "unknown"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := rate(tt.vectors, json.RawMessage(tt.database), nil); got != tt.want {
				t.Errorf("got %+v, want %+v", got, tt.want)
			}
		})
	}
	if got := wordFromSummary("Important: nodejs:18 security update"); got != contracts.SeverityHigh {
		t.Errorf("Important is %s", got)
	}
	for summary, want := range map[string]string{
		"Important: nodejs:18 security update": "nodejs:18", "Moderate: virt:rhel and virt-devel:rhel security update": "virt:rhel virt-devel:rhel",
		"kernel bug fix": "",
	} {
		if got := modulesOf(summary); got != want {
			t.Errorf("modules of %q: %q, want %q", summary, got, want)
		}
	}
}

// shared returns the folder with real advisories beside the repository.
func shared(tb testing.TB) string {
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

func TestRealAdvisories(t *testing.T) {
	if testing.Short() {
		t.Skip("all advisories there are, which takes the race detector minutes")
	}
	dir := shared(t)
	start := time.Now()
	got, s := build(t, Options{From: []string{dir}})
	t.Logf("%d records in %s: %v", got.Records, time.Since(start).Round(time.Millisecond), got.Ecosystems)
	if len(got.Rejected) != 0 {
		t.Errorf("rejected: %v", got.Rejected)
	}
	withdrawn := map[string]bool{}
	ids := map[string]bool{}
	for _, archive := range archivesOf(t, filepath.Join(dir, "osv")) {
		z, err := zip.OpenReader(archive)
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range z.File {
			content, err := readEntry(f)
			if err != nil {
				t.Fatal(err)
			}
			var r struct {
				ID        string
				Withdrawn string
			}
			if err := json.Unmarshal(content, &r); err != nil {
				t.Fatal(err)
			}
			ids[r.ID] = true
			if r.Withdrawn != "" {
				withdrawn[r.ID] = true
			}
		}
		_ = z.Close()
	}
	if got.Records != len(ids)-len(withdrawn) || got.Withdrawn != len(withdrawn) {
		t.Errorf("%d records and %d withdrawn, the archives have %d and %d", got.Records, got.Withdrawn, len(ids)-len(withdrawn), len(withdrawn))
	}
	s.Each(func(base, name string, e snapshot.Entry) bool {
		for i := range e.Candidates() {
			if id := e.Candidate(i).Record().ID; withdrawn[id] {
				t.Errorf("%s %s: %s is withdrawn", base, name, id)
			}
		}
		return true
	})
	if got.KEV != 1662 || got.EPSS != 1556 || got.Products != 464 {
		t.Errorf("KEV %d, EPSS %d, products %d", got.KEV, got.EPSS, got.Products)
	}
	today, _ := build(t, Options{From: []string{dir, filepath.Join(dir, "updates")}})
	if len(today.Rejected) != 0 || today.Records <= got.Records || today.Snapshot == got.Snapshot {
		t.Errorf("with updates: %d records, before %d; rejected %v", today.Records, got.Records, today.Rejected)
	}
}

func archivesOf(t *testing.T, dir string) []string {
	t.Helper()
	found, err := filepath.Glob(filepath.Join(dir, "*.zip"))
	if err != nil || len(found) == 0 {
		t.Fatal("no archives in ", dir, err)
	}
	return found
}

// FuzzRecord reads any bytes as an OSV record and puts them into a snapshot.
func FuzzRecord(f *testing.F) {
	f.Add([]byte(osv("A-1", "2024-01-01T00:00:00Z", "a", "1.0.0", `,"severity":[{"type":"CVSS_V3","score":"CVSS:3.1/AV:N/AC:L/PR:N/UI:N/S:U/C:H/I:H/A:H"}]`)))
	f.Add([]byte(`{"id":"D-1","modified":"2024-01-01T00:00:00Z","affected":[{"package":{"ecosystem":"AlmaLinux:9","name":"x"},"ranges":[{"type":"ECOSYSTEM","events":[{"introduced":"0"},{"fixed":"1:1-1"}]}]}]}`))
	f.Fuzz(func(t *testing.T, content []byte) {
		b := builder{records: map[string]*record{}, interned: map[string]string{}}
		b.record("x.json", content, time.Time{})
		c := &snapshot.Content{}
		for _, r := range b.records {
			c.Advisories = append(c.Advisories, r.Advisory)
		}
		if err := snapshot.Encode(io.Discard, c, func(string, string) {}); err != nil {
			t.Fatal(err)
		}
	})
}

// FuzzTables reads any bytes as scores and as release lines.
func FuzzTables(f *testing.F) {
	f.Add([]byte("#score_date:2025-01-02\ncve,epss,percentile\nCVE-2024-1,0.95,0.99\n"))
	f.Add([]byte(`[{"cycle":"8.0","eol":false}]`))
	f.Fuzz(func(t *testing.T, content []byte) {
		if _, scores, err := readScores(content); err == nil && len(scores) == 0 {
			t.Error("no scores and no error")
		}
		if cycles, err := readCycles(content); err == nil && len(cycles) == 0 {
			t.Error("no lines and no error")
		}
	})
}
