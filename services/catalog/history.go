package catalog

import (
	"context"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"time"

	"github.com/tidewaiter/tidewaiter/contracts"
)

// maxObservations bounds what one tag history is made of; the newest are kept.
const maxObservations = 10_000

// observation is where a tag pointed when planner looked.
type observation struct {
	at     time.Time
	digest string // empty: the tag was gone
}

// TagHistory tells where tags pointed over time: tag by tag, the newest period
// first, a period for each change that was observed. ref is registry/repository
// or registry/repository:tag. When an observation was made counts, not when it
// was heard of.
func (s *Service) TagHistory(ctx context.Context, ref string) ([]contracts.TagPeriod, error) {
	r, err := parseRef(ref)
	if err != nil {
		return nil, err
	}
	if r.repository == "" || r.digest != "" {
		return nil, fmt.Errorf("%q is no registry/repository, with or without :tag: %w", ref, ErrBadRef)
	}
	// Of two observations at one moment the greater digest counts, as in catalog_tags.
	rows, err := s.db.QueryContext(ctx, `SELECT tag, observed_at, MAX(digest) FROM catalog_tag_history
		WHERE registry = $1 AND repository = $2 AND ($3 = '' OR tag = $3)
		GROUP BY tag, observed_at ORDER BY observed_at DESC, tag LIMIT $4`, r.registry, r.repository, r.tag, maxObservations)
	if err != nil {
		return nil, fmt.Errorf("read tag history: %w", err)
	}
	defer rows.Close()
	observed := map[string][]observation{} // by tag, newest first
	for rows.Next() {
		var tag, digest string
		var at int64
		if err := rows.Scan(&tag, &at, &digest); err != nil {
			return nil, fmt.Errorf("read tag history: %w", err)
		}
		observed[tag] = append(observed[tag], observation{time.Unix(0, at).UTC(), digest})
	}
	if err := rows.Err(); err != nil {
		return nil, fmt.Errorf("read tag history: %w", err)
	}
	out := []contracts.TagPeriod{}
	for _, tag := range slices.Sorted(maps.Keys(observed)) {
		out = append(out, periods(r.registry+"/"+r.repository, tag, observed[tag])...)
	}
	return out, nil
}

// periods joins observations, newest first, that say the same.
func periods(repository, tag string, newestFirst []observation) []contracts.TagPeriod {
	var out []contracts.TagPeriod
	for i, o := range newestFirst {
		if i > 0 && o.digest == newestFirst[i-1].digest {
			out[len(out)-1].From = o.at
			continue
		}
		p := contracts.TagPeriod{Repository: repository, Tag: tag, From: o.at}
		if o.digest != "" {
			p.Digest = &o.digest
		}
		if n := len(out); n > 0 {
			until := out[n-1].From
			p.Until = &until
		}
		out = append(out, p)
	}
	return out
}

func (a *api) history(w http.ResponseWriter, r *http.Request) error {
	ref := r.URL.Query().Get("ref")
	if ref == "" {
		return fmt.Errorf("ref is missing: %w", errBadRequest)
	}
	found, err := a.s.TagHistory(r.Context(), ref)
	if err != nil {
		return err
	}
	a.answer(w, r, http.StatusOK, map[string]any{"periods": found})
	return nil
}
