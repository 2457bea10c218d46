package builtin

import (
	"path/filepath"
	"testing"

	"github.com/tidewaiter/tidewaiter/services/advisor/snapshot"
)

func TestWrite(t *testing.T) {
	digests := map[string]bool{}
	for _, name := range []string{"one.db", "two.db"} {
		file := filepath.Join(t.TempDir(), name)
		if err := Write(file); err != nil {
			t.Fatal(err)
		}
		s, err := snapshot.Open(file)
		if err != nil {
			t.Fatal(err)
		}
		digests[s.Digest()] = true
		stats := s.Stats()
		if stats.Records < 50 || stats.Withdrawn != 0 || stats.KEV < 15 || stats.EPSS < 15 || stats.Products < 12 {
			t.Errorf("too little: %+v", stats)
		}
		for _, eco := range []string{"Maven", "npm", "PyPI", "Go", "Bitnami", "Debian:12", "Alpine:v3.20"} {
			if stats.Ecosystems[eco] == 0 {
				t.Errorf("nothing about %s", eco)
			}
		}
		if !s.KEV("CVE-2021-44228") || s.KEV("CVE-2018-3721") {
			t.Error("known exploited marks are wrong")
		}
		if band, ok := s.EPSS("CVE-2021-44228"); !ok || band != ">=0.9" {
			t.Errorf("EPSS of CVE-2021-44228: %q %v", band, ok)
		}
		if got := s.Newest().Year(); got != 2026 {
			t.Errorf("newest advisory of %d", got)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if len(digests) != 1 {
		t.Error("two runs gave two files")
	}
}
