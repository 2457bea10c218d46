// Package match finds what is known to be wrong with an inventory: it compares
// packages with an advisory snapshot, server software and the operating system
// with their release lines, and evaluates the policy.
package match

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"sync/atomic"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/services/advisor/snapshot"
	"github.com/tidewaiter/tidewaiter/services/matcher/policy"
)

// Version names the matcher in reports; it is raised when results change.
const Version = "2"

// Matcher matches inventories with one snapshot under one policy. It may be
// used by several goroutines at once, and not after its snapshot is closed.
type Matcher struct {
	snap    *snapshot.Snapshot
	policy  *policy.Policy
	entries []atomic.Pointer[entryFacts] // by Entry.Index
	cache   *cache
	cover   map[string]map[string]bool // base ecosystem → releases; "" is all of them
}

// New returns a matcher.
func New(snap *snapshot.Snapshot, pol *policy.Policy) *Matcher {
	m := &Matcher{
		snap: snap, policy: pol, entries: make([]atomic.Pointer[entryFacts], snap.Entries()),
		cache: newCache(), cover: map[string]map[string]bool{},
	}
	for ecosystem := range snap.Stats().Ecosystems {
		base, release := snapshot.Split(ecosystem)
		if m.cover[base] == nil {
			m.cover[base] = map[string]bool{}
		}
		m.cover[base][release] = true
	}
	return m
}

// Match returns the report on an inventory: for an index, on those of all its
// parts, which part loads by their digest. The same inventory, snapshot and
// policy give the same report to the byte.
func (m *Matcher) Match(ctx context.Context, inv *contracts.Inventory,
	part func(ctx context.Context, inventoryDigest string) (*contracts.Inventory, error),
) (*contracts.Report, error) {
	canonical, err := json.Marshal(inv)
	if err != nil {
		return nil, fmt.Errorf("encode inventory of %s: %w", inv.Digest, err)
	}
	r := &contracts.Report{
		Digest: inv.Digest, Kind: inv.Kind, Platform: inv.Platform, Inventory: contracts.DigestOf(canonical),
		Analyzer: inv.Analyzer, Matcher: Version, Policy: m.policy.Digest(), Findings: []contracts.Finding{},
	}
	if err := m.inventory(ctx, inv, "", r); err != nil {
		return nil, err
	}
	for _, p := range inv.Parts {
		if err := m.part(ctx, p, part, r); err != nil {
			return nil, err
		}
	}
	m.finish(r)
	return r, nil
}

// part adds one platform of an index to its report.
func (m *Matcher) part(ctx context.Context, p contracts.InventoryPart,
	load func(ctx context.Context, inventoryDigest string) (*contracts.Inventory, error), r *contracts.Report,
) error {
	inv, err := load(ctx, p.Inventory)
	if err != nil {
		return fmt.Errorf("load inventory of part %s: %w", p.Digest, err)
	}
	platform := ""
	if p.Platform != nil {
		platform = p.Platform.String()
	}
	own := &contracts.Report{}
	if err := m.inventory(ctx, inv, platform, own); err != nil {
		return err
	}
	m.finish(own)
	r.Packages += own.Packages
	r.Findings = append(r.Findings, own.Findings...)
	for _, l := range own.Lags {
		l.Layer = nil // layers are counted within a platform
		if !slices.ContainsFunc(r.Lags, func(x contracts.Lag) bool { return x.Product == l.Product && x.Version == l.Version }) {
			r.Lags = append(r.Lags, l)
		}
	}
	for _, g := range own.Gaps {
		if g.Layer == "" {
			g.Layer = p.Digest
		}
		r.Gaps = append(r.Gaps, g)
	}
	r.Parts = append(r.Parts, contracts.ReportPart{Digest: p.Digest, Platform: p.Platform, Counts: own.Counts, Packages: own.Packages})
	return nil
}

// inventory adds the findings, lags and gaps of one inventory's own packages.
func (m *Matcher) inventory(ctx context.Context, inv *contracts.Inventory, platform string, r *contracts.Report) error {
	r.Packages += len(inv.Packages)
	r.Gaps = append(r.Gaps, inv.Gaps...)
	uncovered := map[string]int{}
	for i := range inv.Packages {
		if i&1023 == 0 && ctx.Err() != nil {
			return fmt.Errorf("match %s: %w", inv.Digest, ctx.Err())
		}
		p := &inv.Packages[i]
		v := m.Package(p)
		if v.uncovered {
			uncovered[p.Ecosystem]++
		}
		if v.gap != "" {
			r.Gaps = append(r.Gaps, contracts.Gap{Path: firstPath(p), Reason: v.gap})
		}
		if p.Server && !v.known && !v.uncovered {
			r.Gaps = append(r.Gaps, contracts.Gap{Path: firstPath(p), Reason: fmt.Sprintf("no-advisories: none names %s; only its release lines were looked at", p.Name)})
		}
		for _, f := range v.findings {
			f.Package = contracts.FindingPackage{PURL: p.PURL, Name: p.Name, Version: p.Version, Ecosystem: p.Ecosystem}
			f.Layer, f.Paths, f.Platform = p.Layer, p.Paths, platform
			r.Findings = append(r.Findings, f)
		}
	}
	for ecosystem, n := range uncovered {
		r.Gaps = append(r.Gaps, contracts.Gap{Reason: m.uncoveredReason(ecosystem, n)})
	}
	r.Lags = append(r.Lags, m.lags(inv)...)
	return nil
}

func firstPath(p *contracts.Package) string {
	if len(p.Paths) == 0 {
		return ""
	}
	return p.Paths[0]
}

// covered says whether the snapshot has anything about an ecosystem and release.
func (m *Matcher) covered(base, release string) bool {
	releases := m.cover[base]
	return releases[""] || releases[release]
}

func (m *Matcher) uncoveredReason(ecosystem string, n int) string {
	packages := fmt.Sprintf("%d packages", n)
	if n == 1 {
		packages = "1 package"
	}
	if ecosystem == "" || ecosystem == "Linux" {
		return "no-ecosystem: " + packages + " of an unknown distribution or kind could not be matched"
	}
	base, _ := snapshot.Split(ecosystem)
	if _, err := snapshot.ParseVersion(base, "1"); err != nil {
		return "no-order: the versions of " + ecosystem + " cannot be compared; " + packages + " could not be matched"
	}
	return "no-advisories: the snapshot has none about " + ecosystem + "; " + packages + " could not be matched"
}

// finish sorts the report and evaluates the policy.
func (m *Matcher) finish(r *contracts.Report) {
	m.policy.Excuse(r.Findings, m.snap.Newest())
	slices.SortStableFunc(r.Findings, func(a, b contracts.Finding) int { return compareFindings(&a, &b) })
	r.Counts = Count(r.Findings)
	slices.SortStableFunc(r.Lags, func(a, b contracts.Lag) int {
		return cmp.Or(cmp.Compare(a.Product, b.Product), cmp.Compare(a.Version, b.Version))
	})
	slices.SortFunc(r.Gaps, func(a, b contracts.Gap) int {
		return cmp.Or(cmp.Compare(a.Layer, b.Layer), cmp.Compare(a.Path, b.Path), cmp.Compare(a.Reason, b.Reason))
	})
	r.Gaps = slices.Compact(r.Gaps)
	r.Verdict, r.Reasons = m.policy.Evaluate(r)
}

// compareFindings puts the worst first.
func compareFindings(a, b *contracts.Finding) int {
	if c := cmp.Compare(contracts.SeverityRank(b.Severity), contracts.SeverityRank(a.Severity)); c != 0 {
		return c
	}
	if a.KEV != b.KEV {
		if a.KEV {
			return -1
		}
		return 1
	}
	if c := cmp.Compare(a.ID, b.ID); c != 0 {
		return c
	}
	if c := cmp.Compare(a.Package.PURL, b.Package.PURL); c != 0 {
		return c
	}
	if c := cmp.Compare(a.Platform, b.Platform); c != 0 {
		return c
	}
	return slices.Compare(a.Paths, b.Paths)
}

// Count counts the findings that affect the image.
func Count(findings []contracts.Finding) contracts.Counts {
	var c contracts.Counts
	for i := range findings {
		f := &findings[i]
		if !policy.Counts(f) {
			continue
		}
		c.Add(f)
	}
	return c
}
