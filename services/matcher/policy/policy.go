// Package policy turns what is known to be wrong with an image into a verdict:
// pass, warn or fail.
//
// A policy is a YAML file. Every key may be left out and then has the value
// shown here, which is the default policy:
//
//	version: 1
//	rules:
//	  exploited: fail            # known to be exploited (KEV), with a fix or without
//	  malware: fail              # the package itself is malicious
//	  secretKey: fail            # a private key or token in the image
//	  critical:                  # findings by severity
//	    fixable: fail            #   where a fixed version is known
//	    unfixed: pass            #   where none is
//	  high: {fixable: warn, unfixed: pass}
//	  medium: {fixable: pass, unfixed: pass}
//	  low: {fixable: pass, unfixed: pass}
//	  unknown: {fixable: pass, unfixed: pass}
//	  endOfLife: warn            # a server or operating system whose release line has ended
//	  outdated: pass             # one that is behind its line's newest version
//	  gaps: warn                 # something could not be looked at
//	ignore:                      # none by default
//	  - id: CVE-2022-0001        # the finding's id or one of its aliases
//	    package: pkg:npm/left-pad  # purl without version, or name; absent: in every package
//	    reason: why it does not matter here; required
//	    expires: 2027-01-31      # from the day on which the advisories are that new it counts again; absent: never
//
// An ignored finding stays in the report with the status not_affected and its
// reason. A day is read from the advisory snapshot, never from a clock: the
// same snapshot gives the same report at any time.
package policy

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/goccy/go-yaml"

	"github.com/tidewaiter/tidewaiter/contracts"
)

// ErrInvalid is returned for a policy that cannot be used, with what is wrong and where.
var ErrInvalid = errors.New("policy is not valid")

// SecretPrefix begins the ids of findings about secret keys.
const SecretPrefix = "SECRET-"

const (
	maxPolicyBytes = 1 << 20
	maxReasons     = 20
)

// Rule is what follows from a finding: contracts.VerdictFail, VerdictWarn or VerdictPass (nothing).
type Rule string

// BySeverity are the rules for findings of one severity.
type BySeverity struct {
	Fixable Rule `yaml:"fixable" json:"fixable"` // a fixed version is known
	Unfixed Rule `yaml:"unfixed" json:"unfixed"` // none is
}

// Rules say what follows from what.
type Rules struct {
	Exploited Rule       `yaml:"exploited" json:"exploited"`
	Malware   Rule       `yaml:"malware" json:"malware"`
	SecretKey Rule       `yaml:"secretKey" json:"secretKey"`
	Critical  BySeverity `yaml:"critical" json:"critical"`
	High      BySeverity `yaml:"high" json:"high"`
	Medium    BySeverity `yaml:"medium" json:"medium"`
	Low       BySeverity `yaml:"low" json:"low"`
	Unknown   BySeverity `yaml:"unknown" json:"unknown"`
	EndOfLife Rule       `yaml:"endOfLife" json:"endOfLife"`
	Outdated  Rule       `yaml:"outdated" json:"outdated"`
	Gaps      Rule       `yaml:"gaps" json:"gaps"`
}

// Ignore excuses a finding.
type Ignore struct {
	ID      string `yaml:"id" json:"id"`
	Package string `yaml:"package,omitempty" json:"package,omitempty"`
	Reason  string `yaml:"reason" json:"reason"`
	Expires string `yaml:"expires,omitempty" json:"expires,omitempty"` // YYYY-MM-DD
}

// Policy is a policy ready for use.
type Policy struct {
	Version int      `yaml:"version" json:"version"`
	Rules   Rules    `yaml:"rules" json:"rules"`
	Ignore  []Ignore `yaml:"ignore,omitempty" json:"ignore,omitempty"`

	digest string
}

// Default returns the default policy.
func Default() *Policy {
	p := defaults()
	p.seal()
	return p
}

func defaults() *Policy {
	const fail, warn, pass = contracts.VerdictFail, contracts.VerdictWarn, contracts.VerdictPass
	none := BySeverity{Fixable: pass, Unfixed: pass}
	return &Policy{Version: 1, Rules: Rules{
		Exploited: fail, Malware: fail, SecretKey: fail,
		Critical: BySeverity{Fixable: fail, Unfixed: pass}, High: BySeverity{Fixable: warn, Unfixed: pass},
		Medium: none, Low: none, Unknown: none,
		EndOfLife: warn, Outdated: pass, Gaps: warn,
	}}
}

// Load reads a policy file. Errors name the line: ErrInvalid.
func Load(path string) (*Policy, error) {
	f, err := os.Open(path) //nolint:gosec // the file that the user names
	if err != nil {
		return nil, fmt.Errorf("open policy: %w", err)
	}
	defer func() { _ = f.Close() }()
	content, err := io.ReadAll(io.LimitReader(f, maxPolicyBytes+1))
	if err != nil {
		return nil, fmt.Errorf("read policy: %w", err)
	}
	p, err := Parse(content)
	if err != nil {
		return nil, fmt.Errorf("policy %s: %w", path, err)
	}
	return p, nil
}

// Parse reads a policy from YAML. Errors name the line: ErrInvalid.
func Parse(content []byte) (*Policy, error) {
	if len(content) > maxPolicyBytes {
		return nil, fmt.Errorf("more than %d bytes: %w", maxPolicyBytes, ErrInvalid)
	}
	p := defaults()
	if len(strings.TrimSpace(string(content))) > 0 {
		if err := yaml.UnmarshalWithOptions(content, p, yaml.Strict()); err != nil && !errors.Is(err, io.EOF) {
			return nil, fmt.Errorf("%s: %w", strings.TrimSpace(yaml.FormatError(err, false, true)), ErrInvalid)
		}
	}
	if err := p.validate(); err != nil {
		return nil, err
	}
	p.seal()
	return p, nil
}

func (p *Policy) validate() error {
	if p.Version != 1 {
		return fmt.Errorf("version: %d is not 1: %w", p.Version, ErrInvalid)
	}
	for _, r := range p.Rules.list() {
		switch r.rule {
		case contracts.VerdictFail, contracts.VerdictWarn, contracts.VerdictPass:
		default:
			return fmt.Errorf("rules.%s: %q is not fail, warn or pass: %w", r.name, r.rule, ErrInvalid)
		}
	}
	for i, g := range p.Ignore {
		switch {
		case g.ID == "":
			return fmt.Errorf("ignore[%d]: no id: %w", i, ErrInvalid)
		case strings.TrimSpace(g.Reason) == "":
			return fmt.Errorf("ignore[%d] (%s): no reason: %w", i, g.ID, ErrInvalid)
		}
		if g.Expires == "" {
			continue
		}
		if _, err := time.Parse(time.DateOnly, g.Expires); err != nil {
			return fmt.Errorf("ignore[%d] (%s): expires: %q is not a date like 2027-01-31: %w", i, g.ID, g.Expires, ErrInvalid)
		}
	}
	return nil
}

type namedRule struct {
	name string
	rule Rule
}

func (r Rules) list() []namedRule {
	list := []namedRule{
		{"exploited", r.Exploited},
		{"malware", r.Malware},
		{"secretKey", r.SecretKey},
		{"endOfLife", r.EndOfLife},
		{"outdated", r.Outdated},
		{"gaps", r.Gaps},
	}
	for _, s := range []string{contracts.SeverityCritical, contracts.SeverityHigh, contracts.SeverityMedium, contracts.SeverityLow, contracts.SeverityUnknown} {
		by := r.severity(s)
		list = append(list, namedRule{s + ".fixable", by.Fixable}, namedRule{s + ".unfixed", by.Unfixed})
	}
	return list
}

func (r Rules) severity(s string) BySeverity {
	switch s {
	case contracts.SeverityCritical:
		return r.Critical
	case contracts.SeverityHigh:
		return r.High
	case contracts.SeverityMedium:
		return r.Medium
	case contracts.SeverityLow:
		return r.Low
	default:
		return r.Unknown
	}
}

// seal puts the policy into its canonical form and names it.
func (p *Policy) seal() {
	slices.SortFunc(p.Ignore, func(a, b Ignore) int {
		return cmp.Or(cmp.Compare(a.ID, b.ID), cmp.Compare(a.Package, b.Package), cmp.Compare(a.Expires, b.Expires), cmp.Compare(a.Reason, b.Reason))
	})
	canonical, err := json.Marshal(p)
	if err != nil { // strings and numbers always encode
		panic(err)
	}
	p.digest = contracts.DigestOf(canonical)
}

// Digest returns the sha256 of the policy's canonical form: comments, order of
// keys and values left at their default do not change it.
func (p *Policy) Digest() string { return p.digest }

// Excuse gives ignored findings the status not_affected, with the reason.
// asOf is the day of the advisories, against which exceptions expire.
func (p *Policy) Excuse(findings []contracts.Finding, asOf time.Time) {
	if len(p.Ignore) == 0 {
		return
	}
	day := asOf.UTC().Format(time.DateOnly)
	for i := range findings {
		f := &findings[i]
		for _, g := range p.Ignore {
			if !g.matches(f) || g.Expires != "" && !asOf.IsZero() && day >= g.Expires {
				continue
			}
			f.Status = contracts.StatusNotAffected
			f.Reason = "ignored by policy: " + g.Reason
			if g.Expires != "" {
				f.Reason += " (until " + g.Expires + ")"
			}
			break
		}
	}
}

func (g Ignore) matches(f *contracts.Finding) bool {
	if g.ID != f.ID && !slices.Contains(f.Aliases, g.ID) {
		return false
	}
	if g.Package == "" || g.Package == f.Package.Name || g.Package == f.Package.PURL {
		return true
	}
	name, _, _ := strings.Cut(f.Package.PURL, "?")
	if i := strings.LastIndexByte(name, '@'); i > 0 {
		name = name[:i]
	}
	return g.Package == name
}

// Counts says whether a finding counts: it affects the image, as far as known.
func Counts(f *contracts.Finding) bool {
	return f.Status == contracts.StatusAffected || f.Status == contracts.StatusUnderInvestigation
}

// Evaluate returns the verdict on a report and why it is not "pass": at most
// 20 sentences, failures first, in the report's order. It reads findings, lags
// and gaps; whatever verdict the report carries is not looked at.
func (p *Policy) Evaluate(r *contracts.Report) (verdict string, reasons []string) {
	var fails, warns []string
	note := func(rule Rule, why string) {
		switch rule {
		case contracts.VerdictFail:
			fails = append(fails, why)
		case contracts.VerdictWarn:
			warns = append(warns, why)
		}
	}
	for i := range r.Findings {
		if f := &r.Findings[i]; Counts(f) {
			rule, why := p.finding(f)
			note(rule, why)
		}
	}
	for i := range r.Lags {
		rule, why := p.lag(&r.Lags[i])
		note(rule, why)
	}
	if len(r.Gaps) > 0 {
		note(p.Rules.Gaps, fmt.Sprintf("%d gaps, the first: %s", len(r.Gaps), r.Gaps[0].Reason))
	}
	switch {
	case len(fails) > 0:
		return contracts.VerdictFail, cut(append(fails, warns...))
	case len(warns) > 0:
		return contracts.VerdictWarn, cut(warns)
	default:
		return contracts.VerdictPass, nil
	}
}

// finding returns the strictest rule that a finding meets, and says which.
func (p *Policy) finding(f *contracts.Finding) (Rule, string) {
	by := p.Rules.severity(f.Severity)
	bySeverity, why := by.Unfixed, f.Severity+" without a fix"
	if len(f.Fixed) > 0 {
		bySeverity, why = by.Fixable, f.Severity+", fixed in "+f.Fixed[0]
	}
	best := bySeverity
	for _, special := range []struct {
		holds bool
		rule  Rule
		why   string
	}{
		{strings.HasPrefix(f.ID, SecretPrefix), p.Rules.SecretKey, "a secret key"},
		{f.KEV, p.Rules.Exploited, "known to be exploited"},
		{f.Malware, p.Rules.Malware, "malware"},
	} {
		if special.holds && strictness(special.rule) >= strictness(best) {
			best, why = special.rule, special.why
		}
	}
	return best, fmt.Sprintf("%s in %s: %s", f.ID, f.Package.PURL, why)
}

func (p *Policy) lag(l *contracts.Lag) (Rule, string) {
	switch {
	case l.EOL && strictness(p.Rules.EndOfLife) >= strictness(p.Rules.Outdated):
		return p.Rules.EndOfLife, fmt.Sprintf("%s %s: its release line has ended (%s)", l.Product, l.Version, l.EndOfLife)
	case l.Outdated:
		return p.Rules.Outdated, fmt.Sprintf("%s %s: %s is the newest of its line", l.Product, l.Version, l.LatestInCycle)
	default:
		return contracts.VerdictPass, ""
	}
}

func strictness(r Rule) int {
	switch r {
	case contracts.VerdictFail:
		return 2
	case contracts.VerdictWarn:
		return 1
	default:
		return 0
	}
}

func cut(reasons []string) []string {
	if len(reasons) <= maxReasons {
		return reasons
	}
	more := len(reasons) - maxReasons + 1
	return append(reasons[:maxReasons-1:maxReasons-1], fmt.Sprintf("and %d more", more))
}
