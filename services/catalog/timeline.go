package catalog

import (
	"cmp"
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/tidewaiter/tidewaiter/contracts"
)

// ErrBadRef is returned for a reference that cannot be read.
var ErrBadRef = errors.New("not registry/repository, with :tag or @digest, nor a digest")

// maxTimeline bounds the entries of one timeline; the newest are kept.
const maxTimeline = 10_000

// reference is what a user asks for.
type reference struct{ registry, repository, tag, digest string }

// parseRef reads registry/repository[:tag|@digest] or a digest.
func parseRef(s string) (reference, error) {
	if s == "" || contracts.ValidDigest(s) {
		return reference{digest: s}, nil
	}
	var r reference
	name, digest, isDigest := strings.Cut(s, "@")
	registry, repository, ok := strings.Cut(name, "/")
	if i := strings.LastIndex(repository, ":"); i >= 0 && !isDigest {
		r.tag, repository = repository[i+1:], repository[:i]
		ok = ok && contracts.ValidTag(r.tag)
	}
	r.registry, r.repository, r.digest = registry, repository, digest
	if !ok || !contracts.ValidRegistry(registry) || !contracts.ValidRepository(repository) || (isDigest && !contracts.ValidDigest(digest)) {
		return r, fmt.Errorf("%q: %w", s, ErrBadRef)
	}
	return r, nil
}

// resolve reads a reference and looks up where its tag points now; a tag that
// points nowhere leaves the digest empty.
func (s *Service) resolve(ctx context.Context, ref string) (reference, error) {
	r, err := parseRef(ref)
	if err != nil || r.tag == "" {
		return r, err
	}
	err = s.db.QueryRowContext(ctx, `SELECT digest FROM catalog_tags WHERE registry = $1 AND repository = $2 AND tag = $3`,
		r.registry, r.repository, r.tag).Scan(&r.digest)
	if err != nil && !errors.Is(err, sql.ErrNoRows) {
		return r, fmt.Errorf("look up tag: %w", err)
	}
	return r, nil
}

// Timeline tells what happened to an image, oldest first. ref is
// registry/repository:tag, registry/repository@digest, registry/repository or
// a digest, of an image or of a layer. Of a layer that an image shares with
// others, only the first answer that could serve it is told.
func (s *Service) Timeline(ctx context.Context, ref string) ([]contracts.TimelineEntry, error) {
	r, err := s.resolve(ctx, ref)
	if err != nil {
		return nil, err
	}
	var rows []timelineRow
	switch {
	case r.tag != "":
		rows, err = s.timelineRows(ctx, `registry = $1 AND repository = $2 AND (tag = $3 OR ($4 <> '' AND digest = $4))`,
			r.registry, r.repository, r.tag, r.digest)
	case r.repository != "" && r.digest != "":
		rows, err = s.timelineRows(ctx, `registry = $1 AND repository = $2 AND digest = $3`, r.registry, r.repository, r.digest)
	case r.repository != "":
		rows, err = s.timelineRows(ctx, `registry = $1 AND repository = $2`, r.registry, r.repository)
	default:
		rows, err = s.timelineRows(ctx, `digest = $1 OR layer = $1`, r.digest)
	}
	if err != nil {
		return nil, err
	}
	layers, err := s.layerRows(ctx, rows)
	if err != nil {
		return nil, err
	}
	rows = append(rows, layers...)
	slices.SortStableFunc(rows, func(a, b timelineRow) int {
		return cmp.Or(cmp.Compare(a.at, b.at), cmp.Compare(a.entry.Step, b.entry.Step), cmp.Compare(a.entry.Subject, b.entry.Subject))
	})
	entries := make([]contracts.TimelineEntry, len(rows))
	for i, row := range rows {
		entries[i] = row.entry
	}
	return entries, nil
}

// timelineRow is an entry with what it belongs to.
type timelineRow struct {
	entry contracts.TimelineEntry
	at    int64
	image contracts.Image // zero where the entry is of a tag or a layer
}

func (s *Service) timelineRows(ctx context.Context, where string, args ...any) ([]timelineRow, error) {
	rows, err := s.db.QueryContext(ctx, `SELECT time, step, service, registry, repository, tag, digest, layer, message, details
		FROM catalog_timeline WHERE step <> '' AND (`+where+`) ORDER BY time DESC LIMIT `+fmt.Sprint(maxTimeline), args...)
	if err != nil {
		return nil, fmt.Errorf("read timeline: %w", err)
	}
	defer rows.Close()
	var all []timelineRow
	for rows.Next() {
		row, err := scanTimeline(rows)
		if err != nil {
			return nil, err
		}
		all = append(all, row)
	}
	return all, rows.Err()
}

func scanTimeline(rows *sql.Rows) (timelineRow, error) {
	var row timelineRow
	var registry, repository, tag, digest, layer, details string
	e := &row.entry
	if err := rows.Scan(&row.at, &e.Step, &e.Service, &registry, &repository, &tag, &digest, &layer, &e.Message, &details); err != nil {
		return row, fmt.Errorf("read timeline: %w", err)
	}
	e.Time = time.Unix(0, row.at).UTC()
	e.Registry = registry
	name := registry + "/" + repository
	switch {
	case layer != "":
		e.Subject = layer
	case digest != "":
		e.Subject = name + "@" + digest
	case tag != "":
		e.Subject = name + ":" + tag
	default:
		e.Subject = name
	}
	if digest != "" {
		row.image = contracts.Image{Registry: registry, Repository: repository, Digest: digest}
		e.Image = row.image.String()
	}
	if details != "" {
		if err := json.Unmarshal([]byte(details), &e.Details); err != nil {
			return row, fmt.Errorf("decode timeline: %w", err)
		}
	}
	return row, nil
}

// layerRows returns one entry for each layer of the images that rows speak of:
// its analysis if that came after the image was first heard of, else that its
// earlier analysis was used again.
func (s *Service) layerRows(ctx context.Context, rows []timelineRow) ([]timelineRow, error) {
	first := map[contracts.Image]int64{}
	for _, row := range rows {
		if row.image.Digest == "" {
			continue
		}
		if at, ok := first[row.image]; !ok || row.at < at {
			first[row.image] = row.at
		}
	}
	var out []timelineRow
	told := map[string]bool{}
	for im, since := range first {
		layers, err := s.strings(ctx, `SELECT layer FROM catalog_layers WHERE registry = $1 AND repository = $2 AND digest = $3`,
			im.Registry, im.Repository, im.Digest)
		if err != nil {
			return nil, fmt.Errorf("read layers: %w", err)
		}
		for _, layer := range layers {
			key := im.Repo() + " " + layer
			if told[key] {
				continue
			}
			row, ok, err := s.layerRow(ctx, layer, since)
			if err != nil {
				return nil, err
			}
			if ok {
				told[key] = true
				out = append(out, row)
			}
		}
	}
	return out, nil
}

func (s *Service) layerRow(ctx context.Context, layer string, since int64) (timelineRow, bool, error) {
	rows, err := s.db.QueryContext(ctx, `SELECT time, step, service, registry, repository, tag, digest, layer, message, details
		FROM catalog_timeline WHERE layer = $1 AND step IN ('analyzed', 'deduplicated')
		ORDER BY CASE WHEN time >= $2 THEN 0 ELSE 1 END, CASE WHEN step = 'analyzed' THEN 0 ELSE 1 END, time LIMIT 1`, layer, since)
	if err != nil {
		return timelineRow{}, false, fmt.Errorf("read timeline of layer: %w", err)
	}
	defer rows.Close()
	if !rows.Next() {
		return timelineRow{}, false, rows.Err()
	}
	row, err := scanTimeline(rows)
	if err != nil {
		return row, false, err
	}
	if row.at < since {
		// Nobody asked again: the report was there before the image was.
		row.at, row.entry.Time = since, time.Unix(0, since).UTC()
		row.entry.Step = contracts.StepDeduplicated
	}
	return row, true, rows.Err()
}
