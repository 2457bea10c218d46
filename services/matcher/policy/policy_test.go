package policy

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/tidewaiter/tidewaiter/contracts"
)

func finding(id, severity string, change func(*contracts.Finding)) contracts.Finding {
	f := contracts.Finding{
		ID: id, Severity: severity, Status: contracts.StatusAffected,
		Package: contracts.FindingPackage{PURL: "pkg:npm/left-pad@1.0.0?x=y", Name: "left-pad", Version: "1.0.0", Ecosystem: "npm"},
	}
	if change != nil {
		change(&f)
	}
	return f
}

func fixed(f *contracts.Finding)     { f.Fixed = []string{"1.2.0"} }
func exploited(f *contracts.Finding) { f.KEV = true }
func malware(f *contracts.Finding)   { f.Malware = true }
func excused(f *contracts.Finding)   { f.KEV = true; f.Status = contracts.StatusNotAffected }

func TestDefaultPolicy(t *testing.T) {
	p := Default()
	for _, tt := range []struct {
		name    string
		report  contracts.Report
		verdict string
		reason  string
	}{
		{"nothing", contracts.Report{}, "pass", ""},
		{"exploited without a fix", contracts.Report{Findings: []contracts.Finding{finding("CVE-2024-1", "low", exploited)}}, "fail", "known to be exploited"},
		{"critical with a fix", contracts.Report{Findings: []contracts.Finding{finding("CVE-2024-1", "critical", fixed)}}, "fail", "critical, fixed in 1.2.0"},
		{"critical without a fix", contracts.Report{Findings: []contracts.Finding{finding("CVE-2024-1", "critical", nil)}}, "pass", ""},
		{"malware", contracts.Report{Findings: []contracts.Finding{finding("MAL-2024-1", "critical", malware)}}, "fail", "malware"},
		{"secret key", contracts.Report{Findings: []contracts.Finding{finding(SecretPrefix+"private-key", "high", nil)}}, "fail", "a secret key"},
		{"high with a fix", contracts.Report{Findings: []contracts.Finding{finding("CVE-2024-1", "high", fixed)}}, "warn", "high, fixed in 1.2.0"},
		{"high without a fix", contracts.Report{Findings: []contracts.Finding{finding("CVE-2024-1", "high", nil)}}, "pass", ""},
		{"medium with a fix", contracts.Report{Findings: []contracts.Finding{finding("CVE-2024-1", "medium", fixed)}}, "pass", ""},
		{"not affected", contracts.Report{Findings: []contracts.Finding{finding("CVE-2024-1", "critical", excused)}}, "pass", ""},
		{"end of life", contracts.Report{Lags: []contracts.Lag{{Product: "redis", Version: "2.8.19", EOL: true, EndOfLife: "ended"}}}, "warn", "its release line has ended"},
		{"outdated", contracts.Report{Lags: []contracts.Lag{{Product: "redis", Version: "8.0.1", Outdated: true, LatestInCycle: "8.0.6"}}}, "pass", ""},
		{"gap", contracts.Report{Gaps: []contracts.Gap{{Reason: "limit: too big"}}}, "warn", "1 gaps, the first: limit: too big"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			verdict, reasons := p.Evaluate(&tt.report)
			if verdict != tt.verdict {
				t.Errorf("verdict %s, want %s", verdict, tt.verdict)
			}
			if (len(reasons) > 0) != (tt.reason != "") || tt.reason != "" && !strings.Contains(reasons[0], tt.reason) {
				t.Errorf("reasons %q, want %q", reasons, tt.reason)
			}
		})
	}
}

func TestReasonsAreFew(t *testing.T) {
	var r contracts.Report
	for range 30 {
		r.Findings = append(r.Findings, finding("CVE-2024-1", "high", fixed))
	}
	r.Findings = append(r.Findings, finding("CVE-2024-2", "critical", exploited))
	verdict, reasons := Default().Evaluate(&r)
	if verdict != "fail" || len(reasons) != 20 || !strings.Contains(reasons[0], "CVE-2024-2") || reasons[19] != "and 12 more" {
		t.Errorf("%s, %d reasons, first %q, last %q", verdict, len(reasons), reasons[0], reasons[len(reasons)-1])
	}
}

const custom = `
version: 1
rules:
  critical: {fixable: warn, unfixed: warn}
  gaps: pass
ignore:
  - id: CVE-2024-1
    package: pkg:npm/left-pad
    reason: never called
  - id: GHSA-2
    reason: mitigated
    expires: 2026-01-01
`

func TestCustomPolicy(t *testing.T) {
	p, err := Parse([]byte(custom))
	if err != nil {
		t.Fatal(err)
	}
	if p.Rules.Critical.Unfixed != "warn" || p.Rules.Gaps != "pass" || p.Rules.Exploited != "fail" || p.Rules.High.Fixable != "warn" {
		t.Errorf("rules %+v", p.Rules)
	}
	findings := []contracts.Finding{
		finding("CVE-2024-1", "critical", exploited),
		finding("CVE-2024-1", "critical", func(f *contracts.Finding) { f.Package.PURL, f.Package.Name = "pkg:npm/other@1.0.0", "other" }),
		finding("CVE-2024-2", "critical", func(f *contracts.Finding) { f.Aliases = []string{"GHSA-2"} }),
	}
	before := time.Date(2025, 12, 31, 0, 0, 0, 0, time.UTC)
	p.Excuse(findings, before)
	for i, want := range []string{contracts.StatusNotAffected, contracts.StatusAffected, contracts.StatusNotAffected} {
		if findings[i].Status != want {
			t.Errorf("finding %d is %s, want %s", i, findings[i].Status, want)
		}
	}
	if findings[0].Reason != "ignored by policy: never called" || findings[2].Reason != "ignored by policy: mitigated (until 2026-01-01)" {
		t.Errorf("reasons %q, %q", findings[0].Reason, findings[2].Reason)
	}
	late := []contracts.Finding{finding("GHSA-2", "critical", nil)}
	p.Excuse(late, before.AddDate(0, 0, 1))
	if late[0].Status != contracts.StatusAffected {
		t.Error("an exception held after its end")
	}
}

func TestDigest(t *testing.T) {
	same := []string{"", "version: 1", "# a comment\nversion: 1\nrules: {malware: fail}\n"}
	for _, text := range same {
		p, err := Parse([]byte(text))
		if err != nil {
			t.Fatalf("%q: %v", text, err)
		}
		if p.Digest() != Default().Digest() {
			t.Errorf("%q is the default policy but has another digest", text)
		}
	}
	p, err := Parse([]byte(custom))
	if err != nil {
		t.Fatal(err)
	}
	if p.Digest() == Default().Digest() || !contracts.ValidDigest(p.Digest()) {
		t.Errorf("digest %s", p.Digest())
	}
}

func TestInvalid(t *testing.T) {
	for _, tt := range []struct{ text, want string }{
		{"version: 2", "version"},
		{"rules:\n  gaps: maybe", "rules.gaps"},
		{"rules:\n  gap: fail", "2:3"},
		{"rules: {critical: {fixable: no}}", "critical.fixable"},
		{"ignore:\n  - reason: x", "no id"},
		{"ignore:\n  - id: CVE-2024-1", "no reason"},
		{"ignore:\n  - {id: CVE-2024-1, reason: x, expires: soon}", "expires"},
		{"rules: [", "1:"},
		{strings.Repeat("#", maxPolicyBytes+1), "more than"},
	} {
		_, err := Parse([]byte(tt.text))
		if !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%.40q: %v, want %q in it", tt.text, err, tt.want)
		}
	}
	if _, err := Load(filepath.Join(t.TempDir(), "absent.yaml")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("absent file: %v", err)
	}
}

func TestExampleIsTheDefault(t *testing.T) {
	p, err := Load("../../../deploy/policy.example.yaml")
	if err != nil {
		t.Fatal(err)
	}
	if p.Rules != Default().Rules || len(p.Ignore) == 0 {
		t.Errorf("the example's rules are not the default ones, or it shows no exception: %+v", p)
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(custom))
	f.Fuzz(func(t *testing.T, content []byte) {
		p, err := Parse(content)
		if err != nil {
			if !errors.Is(err, ErrInvalid) {
				t.Errorf("%v is not ErrInvalid", err)
			}
			return
		}
		if !contracts.ValidDigest(p.Digest()) {
			t.Error("a valid policy without a digest")
		}
	})
}
