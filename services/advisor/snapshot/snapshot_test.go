package snapshot

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"
)

// content is a small snapshot with a bit of everything.
func content() *Content {
	return &Content{
		Sequence: 42, Newest: 1_700_000_000, Withdrawn: 3,
		Advisories: []Advisory{
			{
				ID: "GHSA-2", Aliases: []string{"CVE-2024-2"}, Summary: "second", Modified: 1_600_000_000,
				Affected: []Affected{{
					Ecosystem: "npm", Name: "left-pad", Severity: "high", Score: 7.5, HasScore: true, Vector: "CVSS:3.1/…",
					Ranges:   [][]RangeEvent{{{Introduced, "0"}, {Fixed, "1.2.0"}, {Introduced, "2.0.0"}, {LastAffected, "2.1.0"}}},
					Versions: []string{"9.9.9"},
				}},
			},
			{
				ID: "DSA-1", Upstream: []string{"CVE-2024-3", "CVE-2024-4"}, Module: "nodejs:18",
				Affected: []Affected{{Ecosystem: "Debian:12", Name: "openssl", Severity: "unknown", Ranges: [][]RangeEvent{{{Introduced, "0"}, {Fixed, "3.0.11-1~deb12u2"}}}}},
			},
			{ID: "MAL-1", Malware: true, Affected: []Affected{{Ecosystem: "npm", Name: "evil", Severity: "critical", Versions: []string{"1.0.0"}}}},
		},
		KEV: []string{"CVE-2024-2"}, EPSS: map[string]float64{"CVE-2024-2": 0.55, "CVE-2024-3": 0.001},
		Products: map[string][]Cycle{"redis": {{Name: "8.0", Latest: "8.0.6", EOL: "2026-12-01"}, {Name: "7.4", EOL: "true"}}},
	}
}

func encoded(tb testing.TB, c *Content) []byte {
	tb.Helper()
	var b bytes.Buffer
	if err := Encode(&b, c, func(id, reason string) { tb.Errorf("%s rejected: %s", id, reason) }); err != nil {
		tb.Fatal(err)
	}
	return b.Bytes()
}

func written(tb testing.TB, b []byte) string {
	tb.Helper()
	path := filepath.Join(tb.TempDir(), "advisories.db")
	if err := os.WriteFile(path, b, 0o600); err != nil {
		tb.Fatal(err)
	}
	return path
}

func TestRoundTrip(t *testing.T) {
	s, err := Open(written(t, encoded(t, content())))
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}()
	if s.Sequence() != 42 || !s.Newest().Equal(time.Unix(1_700_000_000, 0)) {
		t.Errorf("sequence %d, newest %s", s.Sequence(), s.Newest())
	}
	stats := s.Stats()
	if stats.Records != 3 || stats.Withdrawn != 3 || stats.Packages != 3 || stats.KEV != 1 || stats.EPSS != 2 || stats.Products != 1 ||
		stats.Ecosystems["npm"] != 2 || stats.Ecosystems["Debian:12"] != 1 {
		t.Errorf("stats %+v", stats)
	}
	e, ok := s.Lookup("npm", "left-pad")
	if !ok || e.Candidates() != 1 || e.Bounds() != 3 {
		t.Fatalf("left-pad: %v, %d candidates, %d bounds", ok, e.Candidates(), e.Bounds())
	}
	c := e.Candidate(0)
	r := c.Record()
	if r.ID != "GHSA-2" || !slices.Equal(r.Aliases, []string{"CVE-2024-2"}) || r.Summary != "second" || r.Severity != "high" || r.Score != 7.5 ||
		!r.HasScore || r.Vector != "CVSS:3.1/…" || r.Malware || r.Modified.Unix() != 1_600_000_000 {
		t.Errorf("record %+v", r)
	}
	if got := c.Versions(); !slices.Equal(got, []string{"9.9.9"}) {
		t.Errorf("versions %v", got)
	}
	if got := c.Ranges(); len(got) != 1 || len(got[0]) != 4 || got[0][0] != (Event{Introduced, FromStart}) || got[0][3].Kind != LastAffected {
		t.Errorf("ranges %v", got)
	}
	d, _ := s.Lookup("Debian", "openssl")
	if got := d.Candidate(0); got.Release() != "12" || got.Record().Module != "nodejs:18" || len(got.Record().Upstream) != 2 {
		t.Errorf("openssl: %q %+v", got.Release(), got.Record())
	}
	if m, _ := s.Lookup("npm", "evil"); !m.Candidate(0).Record().Malware {
		t.Error("malware is not marked")
	}
	if _, ok := s.Lookup("npm", "openssl"); ok {
		t.Error("a name of another ecosystem was found")
	}
	if !s.KEV("CVE-2024-2") || s.KEV("CVE-2024-3") || s.KEV("CVE-1999-1") {
		t.Error("KEV is wrong")
	}
	for cve, want := range map[string]string{"CVE-2024-2": ">=0.5", "CVE-2024-3": "<0.01", "CVE-2024-4": ""} {
		if got, ok := s.EPSS(cve); got != want || ok != (want != "") {
			t.Errorf("EPSS of %s: %q %v", cve, got, ok)
		}
	}
	if got := s.Product("redis"); len(got) != 2 || got[0] != (Cycle{Name: "8.0", Latest: "8.0.6", EOL: "2026-12-01"}) {
		t.Errorf("redis %+v", got)
	}
	if s.Product("nothing") != nil {
		t.Error("an unknown product has cycles")
	}
}

func TestEvaluate(t *testing.T) {
	s, err := read(encoded(t, content()), true)
	if err != nil {
		t.Fatal(err)
	}
	e, _ := s.Lookup("npm", "left-pad")
	for version, want := range map[string]bool{
		"0.0.0-alpha": true, "1.1.9": true, "1.2.0": false, "1.5.0": false, "2.0.0-rc.1": false, "2.0.0": true, "2.1.0": true, "2.1.1": false, "9.9.9": true,
	} {
		v, err := ParseVersion("npm", version)
		if err != nil {
			t.Fatal(err)
		}
		place, err := e.Locate(v, parse(e))
		if err != nil {
			t.Fatal(err)
		}
		id, known := s.StringID(version)
		hit, got := e.Candidate(0).Evaluate(&place, id, known)
		if got != want {
			t.Errorf("%s affected: %v, want %v (%+v)", version, got, want, hit)
		}
		if version == "0.0.0-alpha" && (hit.Fixed == FromStart || e.Bound(hit.Fixed) != "1.2.0") {
			t.Errorf("%s fixed in %d, want 1.2.0", version, hit.Fixed)
		}
	}
}

func TestDamaged(t *testing.T) {
	good := encoded(t, content())
	changed := func(at int, to byte) []byte {
		b := slices.Clone(good)
		b[at] = to
		return b
	}
	tests := []struct {
		name    string
		content []byte
		want    error
	}{
		{"empty", nil, ErrForeign},
		{"text", []byte("hello"), ErrForeign},
		{"long text", bytes.Repeat([]byte("hello "), 1000), ErrForeign},
		{"header cut", good[:100], ErrTruncated},
		{"cut", good[:len(good)-1], ErrTruncated},
		{"grown", append(slices.Clone(good), 0), ErrTruncated},
		{"later format", changed(8, 9), ErrFormat},
		{"a changed byte", changed(len(good)/2, good[len(good)/2]^1), ErrCorrupt},
		{"a changed digest", changed(len(good)-1, good[len(good)-1]^1), ErrCorrupt},
		{"a section outside", changed(headerFixed+7, 0xff), ErrCorrupt},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s, err := Open(written(t, tt.content))
			if !errors.Is(err, tt.want) {
				t.Errorf("Open: %v, want %v", err, tt.want)
			}
			if s != nil {
				_ = s.Close()
			}
		})
	}
	if _, err := Open(filepath.Join(t.TempDir(), "absent")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("absent file: %v", err)
	}
}

func TestNames(t *testing.T) {
	for _, tt := range []struct{ base, name, want string }{
		{"PyPI", "Django", "django"},
		{"PyPI", "zope.interface", "zope-interface"},
		{"PyPI", "a__-.b", "a-b"},
		{"PyPI", "requests", "requests"},
		{"Packagist", "Symfony/HTTP", "symfony/http"},
		{"Go", "go", "stdlib"},
		{"Go", "github.com/Azure/x", "github.com/azure/x"},
		{"npm", "JSONStream", "JSONStream"},
		{"NuGet", "Newtonsoft.Json", "newtonsoft.json"},
	} {
		if got := NormalName(tt.base, tt.name); got != tt.want {
			t.Errorf("NormalName(%s, %s) = %s, want %s", tt.base, tt.name, got, tt.want)
		}
	}
	for ecosystem, want := range map[string][2]string{
		"Debian:12": {"Debian", "12"}, "Debian:12.5": {"Debian", "12"}, "Debian:6.0": {"Debian", "6.0"}, "Alpine:v3.18.4": {"Alpine", "v3.18"},
		"Alpine:3.18": {"Alpine", "v3.18"}, "AlmaLinux:9.4": {"AlmaLinux", "9"}, "Ubuntu:22.04:LTS": {"Ubuntu", "22.04"}, "npm": {"npm", ""},
	} {
		if base, release := Split(ecosystem); base != want[0] || release != want[1] {
			t.Errorf("Split(%s) = %s, %s", ecosystem, base, release)
		}
	}
	for version, want := range map[string]string{"v1.2.3": "1.2.3", "go1.17": "1.17", "go1.22.1 X:nocoverageredesign": "1.22.1"} {
		if got := NormalVersion("Go", version); got != want {
			t.Errorf("NormalVersion(Go, %s) = %s", version, got)
		}
	}
}

// FuzzOpen opens any bytes whose digest holds and reads everything in them.
func FuzzOpen(f *testing.F) {
	good := encoded(f, content())
	f.Add(good[:len(good)-trailerSize])
	f.Add([]byte(magic))
	f.Fuzz(func(_ *testing.T, body []byte) {
		b := slices.Clone(body)
		if len(b) > 24 { // so that not every change ends at the size or the digest
			binary.LittleEndian.PutUint64(b[16:], uint64(len(b)+trailerSize))
		}
		sum := sha256.Sum256(b)
		s, err := read(append(b, sum[:]...), true)
		if err != nil {
			return
		}
		_ = s.Stats()
		s.KEV("CVE-2024-2")
		s.EPSS("CVE-2024-2")
		s.Product("redis")
		n := 0
		s.Each(func(base, name string, e Entry) bool {
			s.Lookup(base, name)
			for i := range min(e.Candidates(), 10) {
				c := e.Candidate(i)
				c.Record()
				c.Ranges()
				c.Versions()
				c.Evaluate(&Place{1, 2}, 3, true)
			}
			for i := range min(e.Bounds(), 10) {
				_ = e.Bound(i)
			}
			n++
			return n < 100
		})
	})
}
