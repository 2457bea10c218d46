package match

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"

	"github.com/google/osv-scalibr/semantic"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/services/advisor/snapshot"
)

func newVersions(n int) []atomic.Pointer[semantic.Version] {
	return make([]atomic.Pointer[semantic.Version], n)
}

// merge makes one finding of each vulnerability. Advisories that name each
// other or the same vulnerability as an alias are one. A distribution's
// advisory that answers several vulnerabilities (OSV's upstream) gives a
// finding for each of them.
func (m *Matcher) merge(entry snapshot.Entry, hits []hit, k key) []contracts.Finding {
	if len(hits) == 0 {
		return nil
	}
	same := union{}
	for _, h := range hits {
		if len(h.record.Upstream) == 0 {
			for _, alias := range h.record.Aliases {
				same.join(h.record.ID, alias)
			}
		}
	}
	type group struct {
		names []string
		hits  []hit
	}
	groups := map[string]*group{}
	var order []string
	add := func(name string, h hit) {
		root := same.find(name)
		g := groups[root]
		if g == nil {
			g = &group{}
			groups[root] = g
			order = append(order, root)
		}
		g.names = append(g.names, name, h.record.ID)
		if len(h.record.Upstream) <= 1 {
			g.names = append(g.names, h.record.Aliases...)
		}
		g.hits = append(g.hits, h)
	}
	for _, h := range hits {
		if len(h.record.Upstream) == 0 {
			add(h.record.ID, h)
		}
		for _, vulnerability := range h.record.Upstream {
			add(vulnerability, h)
		}
	}
	findings := make([]contracts.Finding, 0, len(order))
	for _, root := range order {
		findings = append(findings, m.finding(entry, groups[root].names, groups[root].hits, k))
	}
	slices.SortFunc(findings, compareFindings)
	return findings
}

// union is a union-find over names.
type union map[string]string

func (u union) find(name string) string {
	for {
		up, ok := u[name]
		if !ok {
			return name
		}
		name = up
	}
}

func (u union) join(a, b string) {
	a, b = u.find(a), u.find(b)
	if a == b {
		return
	}
	if b < a { // the same root whatever the order
		a, b = b, a
	}
	u[b] = a
}

// finding makes one finding of what several advisories say of one vulnerability.
func (m *Matcher) finding(entry snapshot.Entry, names []string, hits []hit, k key) contracts.Finding {
	slices.SortFunc(names, compareNames)
	names = slices.Compact(names)
	f := contracts.Finding{ID: names[0], Severity: contracts.SeverityUnknown, Status: contracts.StatusAffected}
	if len(names) > 1 {
		f.Aliases = slices.Clone(names[1:])
	}
	for _, name := range names {
		if !strings.HasPrefix(name, "CVE-") {
			continue
		}
		f.KEV = f.KEV || m.snap.KEV(name)
		if band, ok := m.snap.EPSS(name); ok && bandRank(band) > bandRank(f.EPSS) {
			f.EPSS = band
		}
	}
	var fixed []int
	for _, h := range hits {
		if contracts.SeverityRank(h.record.Severity) > contracts.SeverityRank(f.Severity) {
			f.Severity = h.record.Severity
		}
		if h.record.HasScore && (f.Score == nil || h.record.Score > *f.Score) {
			score := h.record.Score
			f.Score, f.Vector = &score, h.record.Vector
		}
		if f.Summary == "" || h.record.ID == f.ID {
			f.Summary = cmp.Or(h.record.Summary, f.Summary)
		}
		f.Malware = f.Malware || h.record.Malware
		fixed = append(fixed, h.fixed...)
	}
	if f.Malware {
		f.Severity = contracts.SeverityCritical
	}
	slices.Sort(fixed)
	for _, bound := range slices.Compact(fixed) {
		f.Fixed = append(f.Fixed, entry.Bound(bound))
	}
	f.Reason = reason(entry, hits, k)
	return f
}

// maxReasonHits bounds how many advisories a reason names.
const maxReasonHits = 3

func reason(entry snapshot.Entry, hits []hit, k key) string {
	var parts []string
	for i, h := range hits {
		if i == maxReasonHits {
			parts = append(parts, fmt.Sprintf("and %d more", len(hits)-i))
			break
		}
		parts = append(parts, fmt.Sprintf("%s: %s %s %s", h.record.ID, k.ecosystem, k.name, rangeText(entry, h.Hit, k.version)))
	}
	return strings.Join(parts, "; ")
}

func rangeText(entry snapshot.Entry, h snapshot.Hit, version string) string {
	if h.Listed {
		return "lists " + version
	}
	var parts []string
	if h.Introduced != snapshot.FromStart {
		parts = append(parts, "from "+entry.Bound(h.Introduced))
	}
	switch {
	case h.Until == snapshot.FromStart:
	case h.UntilKind == snapshot.Fixed:
		parts = append(parts, "before "+entry.Bound(h.Until))
	default:
		parts = append(parts, "up to "+entry.Bound(h.Until))
	}
	if len(parts) == 0 {
		return "all versions"
	}
	return strings.Join(parts, " ")
}

// compareNames puts the name that a finding is best known by first: CVE ids by
// year and number, then malware reports, GitHub's ids and others.
func compareNames(a, b string) int {
	if a == b {
		return 0
	}
	if c := cmp.Compare(nameRank(a), nameRank(b)); c != 0 {
		return c
	}
	if nameRank(a) == 0 {
		yearA, numberA := cveNumbers(a)
		yearB, numberB := cveNumbers(b)
		return cmp.Or(cmp.Compare(yearA, yearB), cmp.Compare(numberA, numberB), cmp.Compare(a, b))
	}
	return cmp.Compare(a, b)
}

func nameRank(id string) int {
	for i, prefix := range []string{"CVE-", "MAL-", "GHSA-"} {
		if strings.HasPrefix(id, prefix) {
			return i
		}
	}
	return 3
}

func cveNumbers(id string) (year, number int) {
	y, n, _ := strings.Cut(strings.TrimPrefix(id, "CVE-"), "-")
	year, _ = strconv.Atoi(y)   // 0 sorts first, no harm
	number, _ = strconv.Atoi(n) // the same
	return year, number
}

func bandRank(band string) int {
	return slices.Index([]string{"<0.01", ">=0.01", ">=0.1", ">=0.5", ">=0.9"}, band)
}
