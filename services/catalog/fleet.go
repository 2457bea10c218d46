package catalog

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/tidewaiter/tidewaiter/contracts"
)

// serverEcosystem is the version order of server software.
const serverEcosystem = "Bitnami"

// Fleet sums up the current images of all repositories: an index counts once,
// its parts not beside it.
func (s *Service) Fleet(ctx context.Context) (contracts.FleetReport, error) {
	rows, err := s.db.QueryContext(ctx, `SELECT i.verdict, i.counts, r.summary FROM catalog_images i
		JOIN catalog_reports r ON r.report = i.report WHERE `+current)
	if err != nil {
		return contracts.FleetReport{}, fmt.Errorf("read current images: %w", err)
	}
	defer rows.Close()
	report := contracts.FleetReport{Servers: []contracts.ServerLag{}}
	servers := map[string]*contracts.ServerLag{}
	for rows.Next() {
		var verdict, counts, encoded string
		if err := rows.Scan(&verdict, &counts, &encoded); err != nil {
			return report, fmt.Errorf("read current images: %w", err)
		}
		var sum summary
		if err := json.Unmarshal([]byte(encoded), &sum); err != nil {
			return report, fmt.Errorf("decode summary: %w", err)
		}
		var c contracts.Counts
		if err := json.Unmarshal([]byte(counts), &c); err != nil {
			return report, fmt.Errorf("decode counts: %w", err)
		}
		addImage(&report, servers, verdict, c, sum.Lags)
	}
	if err := rows.Err(); err != nil {
		return report, fmt.Errorf("read current images: %w", err)
	}
	for _, product := range slices.Sorted(maps.Keys(servers)) {
		report.Servers = append(report.Servers, *servers[product])
	}
	report.ShareVuln = share(report.Vulnerable, report.Images)
	report.ShareOutdated = share(report.Outdated, report.WithServers)
	return report, s.openEnds(ctx, &report)
}

func addImage(report *contracts.FleetReport, servers map[string]*contracts.ServerLag, verdict string, c contracts.Counts, lags []contracts.Lag) {
	report.Images++
	if c.Total() > 0 {
		report.Vulnerable++
	}
	switch verdict {
	case contracts.VerdictPass:
		report.Verdicts.Pass++
	case contracts.VerdictWarn:
		report.Verdicts.Warn++
	case contracts.VerdictFail:
		report.Verdicts.Fail++
	}
	report.Counts.Critical += c.Critical
	report.Counts.High += c.High
	report.Counts.Medium += c.Medium
	report.Counts.Low += c.Low
	report.Counts.Unknown += c.Unknown
	report.Counts.Fixable += c.Fixable
	report.Counts.KEV += c.KEV
	if len(lags) > 0 {
		report.WithServers++
	}
	if slices.ContainsFunc(lags, func(l contracts.Lag) bool { return l.Outdated || l.EOL }) {
		report.Outdated++
	}
	byProduct := map[string][]contracts.Lag{}
	for _, l := range lags {
		byProduct[l.Product] = append(byProduct[l.Product], l)
	}
	for product, lags := range byProduct {
		if servers[product] == nil {
			servers[product] = &contracts.ServerLag{Product: product, Versions: []string{}}
		}
		addServer(servers[product], lags)
	}
}

// addServer adds one image's installations of a product.
func addServer(s *contracts.ServerLag, lags []contracts.Lag) {
	s.Images++
	if slices.ContainsFunc(lags, func(l contracts.Lag) bool { return l.Outdated || l.EOL }) {
		s.Outdated++
	}
	if slices.ContainsFunc(lags, func(l contracts.Lag) bool { return l.EOL }) {
		s.EOL++
	}
	order := func(x, y string) int { return compareVersions(serverEcosystem, x, y) }
	for _, l := range lags {
		if !slices.Contains(s.Versions, l.Version) {
			s.Versions = append(s.Versions, l.Version)
		}
		if l.Latest != "" && (s.Latest == "" || order(l.Latest, s.Latest) > 0) {
			s.Latest = l.Latest
		}
		if l.BehindDays != nil && (s.WorstDays == nil || *l.BehindDays > *s.WorstDays) {
			s.WorstDays = l.BehindDays
		}
		if l.LinesBehind != nil && (s.WorstLines == nil || *l.LinesBehind > *s.WorstLines) {
			s.WorstLines = l.LinesBehind
		}
	}
	slices.SortFunc(s.Versions, order)
	s.Oldest = s.Versions[0]
}

// share returns part/whole; nil when there is no whole.
func share(part, whole int) *float64 {
	if whole == 0 {
		return nil
	}
	v := float64(part) / float64(whole)
	return &v
}

// openEnds counts open problems and images that have not reached an end.
func (s *Service) openEnds(ctx context.Context, report *contracts.FleetReport) error {
	err := s.db.QueryRowContext(ctx, `SELECT COUNT(*) FROM catalog_problems WHERE state = $1`, problemOpen).Scan(&report.Open)
	if err != nil {
		return fmt.Errorf("count problems: %w", err)
	}
	err = s.db.QueryRowContext(ctx, `SELECT
		(SELECT COUNT(*) FROM catalog_images WHERE state NOT IN ('attested', 'unsupported', 'failed', 'gone')) +
		(SELECT COUNT(*) FROM catalog_deadlines d WHERE substr(d.target, 1, 1) = ':' AND NOT EXISTS (SELECT 1 FROM catalog_tags t
			WHERE t.registry = d.registry AND t.repository = d.repository AND t.tag = d.tag AND t.observed_at >= d.since))`).Scan(&report.Unfinished)
	if err != nil {
		return fmt.Errorf("count unfinished images: %w", err)
	}
	return nil
}

// ImageEntry is one image as the API lists it.
type ImageEntry = contracts.ImageEntry

// Images lists images in the order of their names, after the one named, at
// most limit. ref narrows to a registry/repository[:tag|@digest] or a digest,
// state to a state; empty ones do not.
func (s *Service) Images(ctx context.Context, ref, state, after string, limit int) ([]ImageEntry, error) {
	r, err := s.resolve(ctx, ref)
	if err != nil {
		return nil, err
	}
	where, args := []string{}, []any{}
	add := func(condition string, value any) {
		args = append(args, value)
		where = append(where, fmt.Sprintf(condition, len(args)))
	}
	if r.repository != "" {
		add("i.registry = $%d", r.registry)
		add("i.repository = $%d", r.repository)
	}
	if r.digest != "" || r.tag != "" {
		add("i.digest = $%d", r.digest)
	}
	if state != "" {
		add("i.state = $%d", state)
	}
	if after != "" {
		add("(i.registry || '/' || i.repository || '@' || i.digest) > $%d", after)
	}
	args = append(args, limit)
	query := `SELECT ` + imageColumns + `, CASE WHEN ` + current + ` THEN 1 ELSE 0 END FROM catalog_images i`
	if len(where) > 0 {
		query += " WHERE " + strings.Join(where, " AND ")
	}
	query += fmt.Sprintf(` ORDER BY (i.registry || '/' || i.repository || '@' || i.digest) LIMIT $%d`, len(args))
	rows, err := s.db.QueryContext(ctx, query, args...) //nolint:gosec // conditions are constants, values are parameters
	if err != nil {
		return nil, fmt.Errorf("read images: %w", err)
	}
	defer rows.Close()
	entries := []ImageEntry{}
	for rows.Next() {
		var i image
		var isCurrent int
		if err := rows.Scan(append(i.fields(), &isCurrent)...); err != nil {
			return nil, fmt.Errorf("read images: %w", err)
		}
		e, err := i.entry()
		if err != nil {
			return nil, err
		}
		e.Current = isCurrent != 0
		entries = append(entries, e)
	}
	if err := rows.Err(); err != nil {
		return nil, fmt.Errorf("read images: %w", err)
	}
	return entries, s.addTags(ctx, entries)
}

func (i *image) entry() (ImageEntry, error) {
	e := ImageEntry{
		Image: i.String(), Tags: []string{}, State: i.state, Kind: i.kind, Platform: i.platform, Source: i.source,
		Verdict: i.verdict, Report: i.report, Sequence: i.sequence, FirstSeen: time.Unix(0, i.firstSeen).UTC(),
	}
	if i.attested > 0 {
		signed, until := time.Unix(0, i.attested).UTC(), time.Unix(0, i.validUntil).UTC()
		e.SignedAt, e.ValidUntil = &signed, &until
	}
	if i.counts != "" {
		e.Counts = new(contracts.Counts)
		if err := json.Unmarshal([]byte(i.counts), e.Counts); err != nil {
			return e, fmt.Errorf("decode counts of %s: %w", i.Image, err)
		}
	}
	return e, nil
}

func (s *Service) addTags(ctx context.Context, entries []ImageEntry) error {
	for n := range entries {
		im, err := contracts.ParseImage(entries[n].Image)
		if err != nil {
			return err
		}
		tags, err := s.strings(ctx, `SELECT tag FROM catalog_tags WHERE registry = $1 AND repository = $2 AND digest = $3 ORDER BY tag`,
			im.Registry, im.Repository, im.Digest)
		if err != nil {
			return fmt.Errorf("read tags: %w", err)
		}
		entries[n].Tags = append(entries[n].Tags, tags...)
	}
	return nil
}

// Problems lists problems in the order of their keys, after the one named, at
// most limit; state "" lists open and closed ones.
func (s *Service) Problems(ctx context.Context, state, after string, limit int) ([]contracts.Problem, error) {
	data, err := s.strings(ctx, `SELECT data FROM catalog_problems WHERE ($1 = '' OR state = $1) AND problem > $2 ORDER BY problem LIMIT $3`,
		state, after, limit)
	if err != nil {
		return nil, fmt.Errorf("read problems: %w", err)
	}
	problems := make([]contracts.Problem, len(data))
	for i, d := range data {
		if err := json.Unmarshal([]byte(d), &problems[i]); err != nil {
			return nil, fmt.Errorf("decode problem: %w", err)
		}
	}
	return problems, nil
}

func (s *Service) strings(ctx context.Context, query string, args ...any) ([]string, error) {
	rows, err := s.db.QueryContext(ctx, query, args...)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	var all []string
	for rows.Next() {
		var v string
		if err := rows.Scan(&v); err != nil {
			return nil, err
		}
		all = append(all, v)
	}
	return all, rows.Err()
}
