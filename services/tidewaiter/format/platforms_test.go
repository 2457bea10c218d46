package format

import (
	"strings"
	"testing"

	"github.com/tidewaiter/tidewaiter/contracts"
)

// One finding in two platforms is one row, and two in the totals.
func TestFindingsOfPlatformsShareARow(t *testing.T) {
	finding := func(id, platform, layer string) contracts.Finding {
		return contracts.Finding{
			ID: id, Severity: contracts.SeverityHigh, Status: contracts.StatusAffected, Platform: platform,
			Package: contracts.FindingPackage{PURL: "pkg:npm/a@1", Name: "a", Version: "1"},
			Layer:   &contracts.LayerRef{Digest: contracts.DigestOf([]byte(layer))},
		}
	}
	var out strings.Builder
	err := Findings(&out, []contracts.Finding{
		finding("CVE-2020-1", "linux/amd64", "x"), finding("CVE-2020-1", "linux/arm64", "x"),
		finding("CVE-2020-2", "linux/amd64", "x"), finding("CVE-2020-2", "linux/arm64", "y"),
	}, Options{})
	if err != nil {
		t.Fatal(err)
	}
	for text, want := range map[string]int{"CVE-2020-1": 1, "linux/amd64, linux/arm64": 1, "CVE-2020-2": 2, "Findings: 4 (0 critical, 4 high": 1} {
		if got := strings.Count(out.String(), text); got != want {
			t.Errorf("%q stands there %d times, want %d:\n%s", text, got, want, out.String())
		}
	}
}
