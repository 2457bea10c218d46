package match

import (
	"cmp"
	"slices"
	"strconv"
	"strings"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/services/advisor/snapshot"
)

// merge makes one finding of each vulnerability that the hits are about.
func merge(entry snapshot.Entry, hits []hit, k key) []contracts.Finding {
	if len(hits) == 0 {
		return nil
	}
	type found struct{ group, hit, part int }
	var parts []found
	for i, h := range hits {
		for j := range h.advice.parts {
			parts = append(parts, found{h.advice.parts[j].group, i, j})
		}
	}
	slices.SortFunc(parts, func(a, b found) int {
		if a.group != b.group {
			return a.group - b.group
		}
		return a.hit - b.hit
	})
	findings := make([]contracts.Finding, 0, len(parts))
	var together []hit
	for i, p := range parts {
		h := hits[p.hit]
		if i > 0 && parts[i-1].group == p.group {
			f := &findings[len(findings)-1]
			if together[len(together)-1].advice != h.advice {
				together = append(together, h)
			}
			combine(f, &h.advice.parts[p.part].finding)
		} else {
			together = append(together[:0], h)
			findings = append(findings, h.advice.parts[p.part].finding)
		}
		if i+1 == len(parts) || parts[i+1].group != p.group {
			complete(&findings[len(findings)-1], entry, together, k)
		}
	}
	return findings
}

// combine adds to a finding what another advisory says of the same
// vulnerability: the worse is believed.
func combine(f, other *contracts.Finding) {
	names := append(append([]string{f.ID, other.ID}, f.Aliases...), other.Aliases...)
	slices.SortFunc(names, compareNames)
	names = slices.Compact(names)
	f.ID, f.Aliases = names[0], names[1:]
	if contracts.SeverityRank(other.Severity) > contracts.SeverityRank(f.Severity) {
		f.Severity = other.Severity
	}
	if other.Score != nil && (f.Score == nil || *other.Score > *f.Score) {
		f.Score, f.Vector = other.Score, other.Vector
	}
	f.Summary = cmp.Or(f.Summary, other.Summary)
	f.KEV = f.KEV || other.KEV
	f.Malware = f.Malware || other.Malware
	if bandRank(other.EPSS) > bandRank(f.EPSS) {
		f.EPSS = other.EPSS
	}
}

// complete writes what depends on the version: what mends it, and which
// advisories and ranges said so.
func complete(f *contracts.Finding, entry snapshot.Entry, hits []hit, k key) {
	fixed := hits[0].fixed
	for _, h := range hits[1:] {
		fixed = append(fixed[:len(fixed):len(fixed)], h.fixed...)
	}
	if len(fixed) > 1 {
		fixed = slices.Clone(fixed)
		slices.Sort(fixed)
		fixed = slices.Compact(fixed)
	}
	if len(fixed) > 0 {
		f.Fixed = make([]string, len(fixed))
		for i, bound := range fixed {
			f.Fixed[i] = entry.Bound(bound)
		}
	}
	f.Reason = reason(entry, hits, k)
}

// maxReasonHits bounds how many advisories a reason names.
const maxReasonHits = 3

func reason(entry snapshot.Entry, hits []hit, k key) string {
	var b strings.Builder
	b.Grow(128)
	for i, h := range hits {
		if i > 0 {
			b.WriteString("; ")
		}
		if i == maxReasonHits {
			b.WriteString("and " + strconv.Itoa(len(hits)-i) + " more")
			break
		}
		b.WriteString(h.advice.id)
		b.WriteString(": ")
		b.WriteString(k.ecosystem)
		b.WriteByte(' ')
		b.WriteString(k.name)
		writeRange(&b, entry, h.Hit, k.version)
	}
	return b.String()
}

func writeRange(b *strings.Builder, entry snapshot.Entry, h snapshot.Hit, version string) {
	switch {
	case h.Listed:
		b.WriteString(" lists " + version)
		return
	case h.Introduced == snapshot.FromStart && h.Until == snapshot.FromStart:
		b.WriteString(" all versions")
		return
	}
	if h.Introduced != snapshot.FromStart {
		b.WriteString(" from ")
		b.WriteString(entry.Bound(h.Introduced))
	}
	switch {
	case h.Until == snapshot.FromStart:
	case h.UntilKind == snapshot.Fixed:
		b.WriteString(" before ")
		b.WriteString(entry.Bound(h.Until))
	default:
		b.WriteString(" up to ")
		b.WriteString(entry.Bound(h.Until))
	}
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
