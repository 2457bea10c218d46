package catalog

import (
	"cmp"
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/osv-scalibr/semantic"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/bus"
	"github.com/tidewaiter/tidewaiter/libs/store"
)

// Bounds of what a problem lists (see contracts.Problem).
const (
	maxVulnerabilities = 200
	maxImages          = 100
)

// maxGaps bounds the gaps that a summary lists.
const maxGaps = 1000

// Groups of problems: what an update mends, and what it does not.
const (
	groupFixable = "fixable"
	groupUnfixed = "unfixed"
)

// Problem states.
const (
	problemOpen   = "open"
	problemClosed = "closed"
)

// summary is what of a report outlives it here: enough for problems and for
// the fleet report.
type summary struct {
	Verdict  string           `json:"verdict"`
	Counts   contracts.Counts `json:"counts"`
	Lags     []contracts.Lag  `json:"lags,omitempty"`
	Findings []finding        `json:"findings,omitempty"`
	Gaps     []string         `json:"gaps,omitempty"` // what could not be looked at, sorted
}

// finding is one vulnerability of one package version.
type finding struct {
	ID        string   `json:"id"`
	Package   string   `json:"package"`
	Version   string   `json:"version"`
	Ecosystem string   `json:"ecosystem"`
	Severity  string   `json:"severity"`
	KEV       bool     `json:"kev,omitempty"`
	Fixed     []string `json:"fixed,omitempty"`
}

func (f finding) group() string {
	if len(f.Fixed) > 0 {
		return groupFixable
	}
	return groupUnfixed
}

func summaryOf(r contracts.Report) summary {
	s := summary{Verdict: r.Verdict, Counts: r.Counts, Lags: r.Lags}
	seen := map[string]bool{}
	for _, f := range r.Findings {
		if f.Status != contracts.StatusAffected {
			continue
		}
		key := f.Package.Ecosystem + "\x00" + f.Package.Name + "\x00" + f.Package.Version + "\x00" + f.ID
		if seen[key] {
			continue // on another platform of an index, or in another file
		}
		seen[key] = true
		s.Findings = append(s.Findings, finding{
			ID: f.ID, Package: f.Package.Name, Version: f.Package.Version, Ecosystem: f.Package.Ecosystem,
			Severity: f.Severity, KEV: f.KEV, Fixed: f.Fixed,
		})
	}
	gaps := map[string]bool{}
	for _, g := range r.Gaps {
		gaps[strings.TrimPrefix(g.Path+": "+g.Reason, ": ")] = true // in whatever layer: another build has others
	}
	s.Gaps = limited(slices.Sorted(maps.Keys(gaps)), maxGaps)
	return s
}

// readReports returns the summaries of the reports that verdicts refer to, by
// digest. A report that is not stored is left out.
func (s *Service) readReports(ctx context.Context, facts []fact) (map[string]summary, error) {
	reports := map[string]summary{}
	for _, f := range facts {
		if f.verdict == nil {
			continue
		}
		digest := f.verdict.Report.Digest
		if _, ok := reports[digest]; ok {
			continue
		}
		sum, ok, err := s.storedSummary(ctx, digest)
		if err != nil {
			return nil, err
		}
		if ok {
			reports[digest] = sum
			continue
		}
		content, err := s.db.Blob(ctx, digest)
		if errors.Is(err, store.ErrNotFound) || errors.Is(err, store.ErrCorrupt) {
			continue
		}
		if err != nil {
			return nil, err
		}
		var r contracts.Report
		if err := json.Unmarshal(content, &r); err != nil {
			return nil, bus.Permanent(fmt.Errorf("decode report %s: %w", digest, err))
		}
		reports[digest] = summaryOf(r)
	}
	return reports, nil
}

func (s *Service) storedSummary(ctx context.Context, digest string) (summary, bool, error) {
	var encoded string
	err := s.db.QueryRowContext(ctx, `SELECT summary FROM catalog_reports WHERE report = $1`, digest).Scan(&encoded)
	if errors.Is(err, sql.ErrNoRows) {
		return summary{}, false, nil
	}
	if err != nil {
		return summary{}, false, fmt.Errorf("read summary: %w", err)
	}
	var sum summary
	if err := json.Unmarshal([]byte(encoded), &sum); err != nil {
		return summary{}, false, fmt.Errorf("decode summary of %s: %w", digest, err)
	}
	return sum, true, nil
}

// current is the condition under which image i is what its repository offers
// now: a tag points at it, or no tag ever did and it is no part of an index.
const current = `i.state <> 'gone' AND (
	EXISTS (SELECT 1 FROM catalog_tags t WHERE t.registry = i.registry AND t.repository = i.repository AND t.digest = i.digest)
	OR (NOT EXISTS (SELECT 1 FROM catalog_tag_history h WHERE h.registry = i.registry AND h.repository = i.repository AND h.digest = i.digest)
		AND NOT EXISTS (SELECT 1 FROM catalog_parts p WHERE p.registry = i.registry AND p.repository = i.repository AND p.part = i.digest)))`

// problemKey names the problem of one package in the images of one owner.
func problemKey(owner, ecosystem, pkg, group string) string {
	return contracts.JoinID("problem", owner, contracts.DigestOf([]byte(ecosystem+"\x00"+pkg+"\x00"+group)))
}

// situation is what the current images of a repository suffer from.
type situation struct {
	problems map[string]*contracts.Problem // by key, without revision and times
	gaps     map[string][]string           // by problem: what could not be looked at where it was found, sorted
	hidden   map[string]bool               // what could not be looked at in any of the images, and images that failed
	pending  bool                          // a tag points at an image that has not come to its end
}

// problems compares what the current images of a repository suffer from with
// what was announced, and announces the difference.
func (b *batch) problems(ctx context.Context, d dirtying) error {
	owner := d.registry + "/" + d.repository
	now, err := b.situation(ctx, d)
	if err != nil {
		return err
	}
	known, err := b.known(ctx, owner)
	if err != nil {
		return err
	}
	keys := slices.Sorted(maps.Keys(now.problems))
	for key, k := range known {
		if now.problems[key] == nil && !now.mayHide(k) {
			keys = append(keys, key)
		}
	}
	slices.Sort(keys)
	for _, key := range keys {
		if err := b.compare(ctx, d, known[key], now.problems[key], now.gaps[key]); err != nil {
			return err
		}
	}
	return nil
}

// mayHide says whether a problem that is not found may be there all the same:
// in an image that is still being looked at, or behind something that could be
// looked at, or was not there, when the problem was found last. Only a scan that
// saw at least as much is evidence that it is gone.
func (s *situation) mayHide(k *knownProblem) bool {
	if s.pending {
		return true
	}
	for gap := range s.hidden {
		if k.gaps != nil && !slices.Contains(k.gaps, gap) {
			return true
		}
	}
	return false
}

// situation returns what the current images suffer from.
func (b *batch) situation(ctx context.Context, d dirtying) (*situation, error) {
	images, err := b.reported(ctx, d)
	if err != nil {
		return nil, err
	}
	s := &situation{problems: map[string]*contracts.Problem{}, gaps: map[string][]string{}, hidden: map[string]bool{}}
	if err := b.unreported(ctx, d, s); err != nil {
		return nil, err
	}
	failed := slices.Collect(maps.Keys(s.hidden))
	owner := d.registry + "/" + d.repository
	groups := map[string]*collected{}
	for report, digests := range images {
		sum, err := b.summary(ctx, report)
		if err != nil {
			return nil, err
		}
		for _, gap := range sum.Gaps {
			s.hidden[gap] = true
		}
		for _, f := range sum.Findings {
			key := problemKey(owner, f.Ecosystem, f.Package, f.group())
			if groups[key] == nil {
				groups[key] = &collected{images: map[string]bool{}, reports: map[string][]string{}}
			}
			groups[key].findings = append(groups[key].findings, f)
			groups[key].reports[report] = sum.Gaps
			for _, digest := range digests {
				groups[key].images[owner+"@"+digest] = true
			}
		}
	}
	for key, c := range groups {
		s.problems[key] = c.problem(key, owner)
		gaps := slices.Concat(append(slices.Collect(maps.Values(c.reports)), failed)...)
		slices.Sort(gaps)
		s.gaps[key] = slices.Compact(gaps)
	}
	return s, nil
}

// reported returns the digests of the current images by their reports.
func (b *batch) reported(ctx context.Context, d dirtying) (map[string][]string, error) {
	rows, err := b.tx.QueryContext(ctx, `SELECT i.digest, i.report FROM catalog_images i
		WHERE i.registry = $1 AND i.repository = $2 AND i.report <> '' AND `+current+` ORDER BY i.digest`, d.registry, d.repository)
	if err != nil {
		return nil, fmt.Errorf("read current images: %w", err)
	}
	defer rows.Close()
	images := map[string][]string{}
	for rows.Next() {
		var digest, report string
		if err := rows.Scan(&digest, &report); err != nil {
			return nil, fmt.Errorf("read current images: %w", err)
		}
		images[report] = append(images[report], digest)
	}
	if err := rows.Err(); err != nil {
		return nil, fmt.Errorf("read current images: %w", err)
	}
	return images, nil
}

// unreported notes the images that tags point at and of which nothing is known.
func (b *batch) unreported(ctx context.Context, d dirtying, s *situation) error {
	rows, err := b.tx.QueryContext(ctx, `SELECT t.digest, COALESCE(i.state, '') FROM catalog_tags t
		LEFT JOIN catalog_images i ON i.registry = t.registry AND i.repository = t.repository AND i.digest = t.digest
		WHERE t.registry = $1 AND t.repository = $2 AND t.digest <> '' AND COALESCE(i.report, '') = ''`, d.registry, d.repository)
	if err != nil {
		return fmt.Errorf("read images without a report: %w", err)
	}
	defer rows.Close()
	for rows.Next() {
		var digest, state string
		if err := rows.Scan(&digest, &state); err != nil {
			return fmt.Errorf("read images without a report: %w", err)
		}
		switch {
		case state == StateFailed:
			s.hidden[digest] = true
		case !IsEnd(state):
			s.pending = true
		}
	}
	if err := rows.Err(); err != nil {
		return fmt.Errorf("read images without a report: %w", err)
	}
	return nil
}

func (b *batch) summary(ctx context.Context, report string) (summary, error) {
	if sum, ok := b.reports[report]; ok {
		return sum, nil
	}
	if sum, ok := b.s.summaries.get(report); ok {
		return sum, nil
	}
	var encoded string
	if err := b.tx.QueryRowContext(ctx, `SELECT summary FROM catalog_reports WHERE report = $1`, report).Scan(&encoded); err != nil {
		return summary{}, fmt.Errorf("read summary of %s: %w", report, err)
	}
	var sum summary
	if err := json.Unmarshal([]byte(encoded), &sum); err != nil {
		return summary{}, bus.Permanent(fmt.Errorf("decode summary of %s: %w", report, err))
	}
	b.s.summaries.put(report, sum)
	return sum, nil
}

// cachedFindings bounds the findings kept in memory, some 200 bytes each.
const cachedFindings = 200_000

// summaryCache keeps decoded summaries, so that a repository with many images
// is not decoded anew for each of its events. Any of them makes room.
type summaryCache struct {
	mu       sync.Mutex
	findings int
	items    map[string]summary
}

func (c *summaryCache) get(report string) (summary, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	s, ok := c.items[report]
	return s, ok
}

func (c *summaryCache) put(report string, s summary) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, ok := c.items[report]; ok || len(s.Findings) > cachedFindings {
		return
	}
	c.findings += len(s.Findings) + 1
	c.items[report] = s
	for old, o := range c.items {
		if c.findings <= cachedFindings {
			return
		}
		delete(c.items, old)
		c.findings -= len(o.Findings) + 1
	}
}

// collected are the findings of one problem over all images.
type collected struct {
	findings []finding
	images   map[string]bool
	reports  map[string][]string // gaps by report
}

func (c *collected) problem(key, owner string) *contracts.Problem {
	first := c.findings[0]
	p := &contracts.Problem{
		Key: key, State: problemOpen, Owner: owner, Package: first.Package, Ecosystem: first.Ecosystem, Group: first.group(),
		Severity: contracts.SeverityUnknown, ImageCount: len(c.images),
	}
	versions, ids := map[string]bool{}, map[string]bool{}
	for _, f := range c.findings {
		versions[f.Version], ids[f.ID] = true, true
		p.KEV = p.KEV || f.KEV
		if contracts.SeverityRank(f.Severity) > contracts.SeverityRank(p.Severity) {
			p.Severity = f.Severity
		}
	}
	order := func(x, y string) int { return compareVersions(first.Ecosystem, x, y) }
	p.Versions = slices.SortedFunc(maps.Keys(versions), order)
	p.FixedIn = fixedIn(first.Ecosystem, c.findings)
	p.Vulnerabilities = limited(slices.Sorted(maps.Keys(ids)), maxVulnerabilities)
	p.Images = limited(slices.Sorted(maps.Keys(c.images)), maxImages)
	return p
}

func limited(s []string, n int) []string { return s[:min(len(s), n)] }

// compareVersions orders versions as their ecosystem does; where that is not
// known or one of them is no version there, as text.
func compareVersions(ecosystem, x, y string) int {
	v, err := semantic.Parse(x, ecosystem)
	if err != nil {
		return cmp.Compare(x, y)
	}
	order, err := v.CompareStr(y)
	if err != nil {
		return cmp.Compare(x, y)
	}
	return cmp.Or(order, cmp.Compare(x, y))
}

// fixedIn returns, for each installed version, the lowest version that mends
// all its findings which can be mended, or the highest fix where no single
// version does. Versions on different release branches so have a target each.
func fixedIn(ecosystem string, findings []finding) []string {
	fixes := map[string][][]string{} // installed version → fixed versions of each finding
	all := map[string]bool{}
	for _, f := range findings {
		if len(f.Fixed) == 0 {
			continue
		}
		fixes[f.Version] = append(fixes[f.Version], f.Fixed)
		all[f.Version] = true
		for _, v := range f.Fixed {
			all[v] = true
		}
	}
	// Versions are parsed and ordered once; their ranks are compared from here on.
	sorted := slices.SortedFunc(maps.Keys(all), func(x, y string) int { return compareVersions(ecosystem, x, y) })
	rank := make(map[string]int, len(sorted))
	for i, v := range sorted {
		rank[v] = i
	}
	targets := map[string]bool{}
	for installed, findings := range fixes {
		if target := lowestMending(sorted, rank, installed, findings); target != "" {
			targets[target] = true
		}
	}
	return slices.SortedFunc(maps.Keys(targets), func(x, y string) int { return cmp.Compare(rank[x], rank[y]) })
}

func lowestMending(sorted []string, rank map[string]int, installed string, findings [][]string) string {
	candidates := map[string]bool{}
	highest := ""
	var ahead [][]string // of each finding that can be mended: the fixes above the installed version
	for _, fixed := range findings {
		// The installed version has passed the others and is affected all the same: they are of other branches.
		above := slices.DeleteFunc(slices.Clone(fixed), func(v string) bool { return rank[v] <= rank[installed] })
		if len(above) == 0 {
			continue
		}
		ahead = append(ahead, above)
		for _, v := range above {
			candidates[v] = true
			if highest == "" || rank[v] > rank[highest] {
				highest = v
			}
		}
	}
	for _, c := range sorted[rank[installed]+1:] {
		if candidates[c] && !slices.ContainsFunc(ahead, func(fixed []string) bool { return !mends(rank, c, fixed) }) {
			return c
		}
	}
	return highest
}

// mends says whether a version holds one of the fixes: it has passed the one
// of its own major branch, or one of an older branch when its own never needed
// any.
func mends(rank map[string]int, version string, fixed []string) bool {
	passed, ahead := false, false
	for _, f := range fixed {
		own := major(f) == major(version)
		if rank[f] <= rank[version] {
			if own {
				return true
			}
			passed = true
			continue
		}
		ahead = ahead || own
	}
	return passed && !ahead
}

// major returns what stands before a version's first dot, which tells release
// branches apart well enough.
func major(version string) string {
	m, _, _ := strings.Cut(version, ".")
	return m
}

// knownProblem is one row of catalog_problems.
type knownProblem struct {
	content string
	problem contracts.Problem
	gaps    []string // of the last time it was found; nil: not kept then
}

func (b *batch) known(ctx context.Context, owner string) (map[string]*knownProblem, error) {
	rows, err := b.tx.QueryContext(ctx, `SELECT problem, content, data, gaps FROM catalog_problems WHERE owner = $1`, owner)
	if err != nil {
		return nil, fmt.Errorf("read problems: %w", err)
	}
	defer rows.Close()
	known := map[string]*knownProblem{}
	for rows.Next() {
		var key, data, gaps string
		k := new(knownProblem)
		if err := rows.Scan(&key, &k.content, &data, &gaps); err != nil {
			return nil, fmt.Errorf("read problems: %w", err)
		}
		if gaps != "" {
			if err := json.Unmarshal([]byte(gaps), &k.gaps); err != nil {
				return nil, bus.Permanent(fmt.Errorf("decode gaps of problem %s: %w", key, err))
			}
		}
		if err := json.Unmarshal([]byte(data), &k.problem); err != nil {
			return nil, bus.Permanent(fmt.Errorf("decode problem %s: %w", key, err))
		}
		known[key] = k
	}
	return known, rows.Err()
}

// compare announces the difference between what was said of a problem and what
// is to be said. Only content counts: a revision means that something changed.
// gaps is what could not be looked at where it is found now.
func (b *batch) compare(ctx context.Context, d dirtying, known *knownProblem, wanted *contracts.Problem, gaps []string) error {
	name := contracts.FindingChangedV1
	p := contracts.Problem{OpenedAt: d.at}
	switch {
	case wanted == nil && known.problem.State == problemClosed:
		return nil
	case wanted == nil:
		name = contracts.FindingClosedV1
		p = known.problem
		p.State, p.Images, p.ImageCount = problemClosed, []string{}, 0
	default:
		p = *wanted
		p.OpenedAt = d.at
		if known == nil || known.problem.State == problemClosed {
			name = contracts.FindingOpenedV1
		} else {
			p.OpenedAt = known.problem.OpenedAt
		}
	}
	content, err := contentOf(p)
	if err != nil {
		return err
	}
	if known != nil {
		if known.content == content {
			return b.gapsOf(ctx, known, gaps)
		}
		p.Revision = known.problem.Revision
	}
	p.Revision++
	p.ChangedAt = d.at
	data, err := json.Marshal(p)
	if err != nil {
		return bus.Permanent(fmt.Errorf("encode problem: %w", err))
	}
	seen, err := encodeGaps(gaps)
	if err != nil {
		return err
	}
	_, err = b.exec(ctx, `INSERT INTO catalog_problems (problem, owner, state, content, data, gaps) VALUES ($1, $2, $3, $4, $5, $6)
		ON CONFLICT (problem) DO UPDATE SET state = excluded.state, content = excluded.content, data = excluded.data, gaps = excluded.gaps`,
		p.Key, p.Owner, p.State, content, string(data), seen)
	if err != nil {
		return fmt.Errorf("store problem: %w", err)
	}
	ev, err := bus.NewEvent(name, p.Key, p)
	if err != nil {
		return bus.Permanent(err)
	}
	ev.SetID(contracts.JoinID(ev.Type(), p.Key, fmt.Sprintf("%s %d", content, p.Revision)))
	ev.SetTime(d.at)
	ev.SetExtension(contracts.ExtLane, contracts.LaneFresh)
	if d.traceparent != "" {
		ev.SetExtension(contracts.ExtTraceparent, d.traceparent)
	}
	return enqueue(ctx, b.exec, ev)
}

// gapsOf keeps what could not be looked at where a problem was found again.
func (b *batch) gapsOf(ctx context.Context, known *knownProblem, gaps []string) error {
	if known.gaps != nil && slices.Equal(known.gaps, gaps) {
		return nil
	}
	seen, err := encodeGaps(gaps)
	if err != nil {
		return err
	}
	if _, err := b.exec(ctx, `UPDATE catalog_problems SET gaps = $1 WHERE problem = $2`, seen, known.problem.Key); err != nil {
		return fmt.Errorf("store gaps of problem: %w", err)
	}
	return nil
}

func encodeGaps(gaps []string) (string, error) {
	encoded, err := json.Marshal(append([]string{}, gaps...)) // none is [], which is known, not null
	if err != nil {
		return "", bus.Permanent(fmt.Errorf("encode gaps: %w", err))
	}
	return string(encoded), nil
}

// contentOf returns the digest of what a problem says, whenever and in
// whatever revision it was said.
func contentOf(p contracts.Problem) (string, error) {
	p.Revision, p.OpenedAt, p.ChangedAt = 0, time.Time{}, time.Time{}
	encoded, err := json.Marshal(p)
	if err != nil {
		return "", bus.Permanent(fmt.Errorf("encode problem: %w", err))
	}
	return contracts.DigestOf(encoded), nil
}
