package catalog

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/bus"
)

// This file answers sweeper, which compares registries with what is known here.

// Tagged is a tag as a registry has it.
type Tagged struct {
	Tag    string `json:"tag"`
	Digest string `json:"digest"`
}

// KnownQuery asks about tags of one repository, at most maxLimit of them.
type KnownQuery struct {
	Registry   string   `json:"registry"`
	Repository string   `json:"repository"`
	Tags       []Tagged `json:"tags"`
}

// KnownTag is what is known of one tag of a KnownQuery.
type KnownTag struct {
	Tagged
	At    string `json:"at"`    // digest that the tag is known to point at; "": unknown, or gone
	State string `json:"state"` // of the image with Digest; "": unknown
	// HeardAt is when a webhook last told of this tag at this digest, or of one of
	// them without the other; zero: none did, or it is forgotten (KeepTimeline).
	HeardAt time.Time `json:"heardAt,omitzero"`
}

// Known says what is known of tags, in their order.
func (s *Service) Known(ctx context.Context, q KnownQuery) ([]KnownTag, error) {
	known := make([]KnownTag, 0, len(q.Tags))
	for _, t := range q.Tags {
		k := KnownTag{Tagged: t}
		err := s.db.QueryRowContext(ctx, `SELECT digest FROM catalog_tags WHERE registry = $1 AND repository = $2 AND tag = $3`,
			q.Registry, q.Repository, t.Tag).Scan(&k.At)
		if err != nil && !errors.Is(err, sql.ErrNoRows) {
			return nil, fmt.Errorf("read tag: %w", err)
		}
		err = s.db.QueryRowContext(ctx, `SELECT state FROM catalog_images WHERE registry = $1 AND repository = $2 AND digest = $3`,
			q.Registry, q.Repository, t.Digest).Scan(&k.State)
		if err != nil && !errors.Is(err, sql.ErrNoRows) {
			return nil, fmt.Errorf("read image: %w", err)
		}
		var heard int64
		err = s.db.QueryRowContext(ctx, `SELECT COALESCE(MAX(heard_at), 0) FROM catalog_heard WHERE registry = $1 AND repository = $2
			AND (digest = $4 AND tag IN ($3, '') OR digest = '' AND tag = $3)`, q.Registry, q.Repository, t.Tag, t.Digest).Scan(&heard)
		if err != nil {
			return nil, fmt.Errorf("read webhooks: %w", err)
		}
		if heard > 0 {
			k.HeardAt = time.Unix(0, heard).UTC()
		}
		known = append(known, k)
	}
	return known, nil
}

// ReadUpTo says whether all pushes that were sent before a moment are known here.
func (s *Service) ReadUpTo(ctx context.Context, t time.Time) (bool, error) {
	if s.readUpTo == nil {
		return true, nil
	}
	return s.readUpTo(ctx, t)
}

// Standing is an image that should carry statements.
type Standing struct {
	Repository string    `json:"repository"`
	Digest     string    `json:"digest"`
	State      string    `json:"state"`      // StateAttested, or StateFailed: the statements never came
	Statements []string  `json:"statements"` // manifests that were attached; none of an image that was attested before this was kept
	SignedAt   time.Time `json:"signedAt,omitzero"`
}

// Position is where a listing goes on after this image.
func (s Standing) Position() string { return s.Repository + "@" + s.Digest }

// Standings lists a registry's images that should carry statements, in the
// order of repository and digest, after the given ones, and how many there are
// in all.
func (s *Service) Standings(ctx context.Context, registry, repository, digest string, limit int) ([]Standing, int, error) {
	var total int
	err := s.db.QueryRowContext(ctx, `SELECT COUNT(*) FROM catalog_images WHERE registry = $1 AND state IN ('attested', 'failed')`, registry).Scan(&total)
	if err != nil {
		return nil, 0, fmt.Errorf("count images: %w", err)
	}
	rows, err := s.db.QueryContext(ctx, `SELECT repository, digest, state, statements, attested_at FROM catalog_images
		WHERE registry = $1 AND (repository, digest) > ($2, $3) AND state IN ('attested', 'failed')
		ORDER BY repository, digest LIMIT $4`, registry, repository, digest, limit)
	if err != nil {
		return nil, 0, fmt.Errorf("read images: %w", err)
	}
	defer rows.Close()
	list := []Standing{}
	for rows.Next() {
		i := Standing{Statements: []string{}}
		var statements string
		var signed int64
		if err := rows.Scan(&i.Repository, &i.Digest, &i.State, &statements, &signed); err != nil {
			return nil, 0, fmt.Errorf("read images: %w", err)
		}
		if statements != "" {
			if err := json.Unmarshal([]byte(statements), &i.Statements); err != nil {
				return nil, 0, fmt.Errorf("decode statements of %s@%s: %w", i.Repository, i.Digest, err)
			}
		}
		if signed > 0 {
			i.SignedAt = time.Unix(0, signed).UTC()
		}
		list = append(list, i)
	}
	return list, total, rows.Err()
}

// RepositoryTag is a tag that is known to point somewhere.
type RepositoryTag struct {
	Repository string `json:"repository"`
	Tagged
	ObservedAt time.Time `json:"observedAt"` // when it pointed there
}

// Tags lists a registry's tags in the order of repository and tag, after the given ones.
func (s *Service) Tags(ctx context.Context, registry, repository, tag string, limit int) ([]RepositoryTag, error) {
	rows, err := s.db.QueryContext(ctx, `SELECT repository, tag, digest, observed_at FROM catalog_tags
		WHERE registry = $1 AND (repository, tag) > ($2, $3) AND digest <> '' ORDER BY repository, tag LIMIT $4`, registry, repository, tag, limit)
	if err != nil {
		return nil, fmt.Errorf("read tags: %w", err)
	}
	defer rows.Close()
	list := []RepositoryTag{}
	for rows.Next() {
		var t RepositoryTag
		var observed int64
		if err := rows.Scan(&t.Repository, &t.Tag, &t.Digest, &observed); err != nil {
			return nil, fmt.Errorf("read tags: %w", err)
		}
		t.ObservedAt = time.Unix(0, observed).UTC()
		list = append(list, t)
	}
	return list, rows.Err()
}

// heard remembers that a webhook told of a push.
func (b *batch) heard(ctx context.Context, d contracts.ImagePushed, at time.Time) error {
	_, err := b.exec(ctx, `INSERT INTO catalog_heard (registry, repository, tag, digest, heard_at) VALUES ($1, $2, $3, $4, $5)
		ON CONFLICT (registry, repository, tag, digest) DO UPDATE SET heard_at = excluded.heard_at WHERE catalog_heard.heard_at < excluded.heard_at`,
		d.Registry, d.Repository, d.Tag, d.Digest, at.UnixNano())
	if err != nil {
		return fmt.Errorf("store webhook: %w", err)
	}
	return nil
}

// forgetHeard deletes webhooks that came before a moment.
func forgetHeard(ctx context.Context, tx *sql.Tx, before time.Time) error {
	if _, err := tx.ExecContext(ctx, `DELETE FROM catalog_heard WHERE heard_at < $1`, before.UnixNano()); err != nil {
		return fmt.Errorf("forget webhooks: %w", err)
	}
	return nil
}

// statementsOf returns what the column statements holds for a verdict.
func statementsOf(d contracts.ImageAttested) (string, error) {
	digests := make([]string, 0, len(d.Statements))
	for _, s := range d.Statements {
		digests = append(digests, s.Digest)
	}
	b, err := json.Marshal(digests)
	return string(b), err
}

// maxKnownBytes bounds a KnownQuery.
const maxKnownBytes = 1 << 20

func (a *api) known(w http.ResponseWriter, r *http.Request) error {
	var q KnownQuery
	d := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxKnownBytes))
	d.DisallowUnknownFields()
	if err := d.Decode(&q); err != nil {
		return fmt.Errorf("body: %w: %w", err, errBadRequest)
	}
	switch {
	case !contracts.ValidRegistry(q.Registry) || !contracts.ValidRepository(q.Repository):
		return fmt.Errorf("registry or repository is no name: %w", errBadRequest)
	case len(q.Tags) > maxLimit:
		return fmt.Errorf("%d tags, at most %d: %w", len(q.Tags), maxLimit, errBadRequest)
	}
	for i, t := range q.Tags {
		if !contracts.ValidTag(t.Tag) || !contracts.ValidDigest(t.Digest) {
			return fmt.Errorf("tags[%d] is no tag with a digest: %w", i, errBadRequest)
		}
	}
	known, err := a.s.Known(r.Context(), q)
	if err != nil {
		return err
	}
	a.answer(w, r, http.StatusOK, map[string]any{"tags": known})
	return nil
}

func (a *api) read(w http.ResponseWriter, r *http.Request) error {
	until, err := time.Parse(time.RFC3339Nano, r.URL.Query().Get("until"))
	if err != nil {
		return fmt.Errorf("until is not an RFC 3339 time: %w", errBadRequest)
	}
	read, err := a.s.ReadUpTo(r.Context(), until)
	if err != nil {
		return bus.Unavailable(fmt.Errorf("ask Kafka what is read: %w", err))
	}
	a.answer(w, r, http.StatusOK, map[string]bool{"read": read})
	return nil
}

func (a *api) standings(w http.ResponseWriter, r *http.Request) error {
	registry, limit, err := listingOf(r)
	if err != nil {
		return err
	}
	repository, digest, _ := strings.Cut(r.URL.Query().Get("after"), "@")
	images, total, err := a.s.Standings(r.Context(), registry, repository, digest, limit)
	if err != nil {
		return err
	}
	var next *string
	if len(images) == limit {
		after := images[limit-1].Position()
		next = &after
	}
	a.answer(w, r, http.StatusOK, map[string]any{"images": images, "total": total, "next": next})
	return nil
}

func (a *api) tags(w http.ResponseWriter, r *http.Request) error {
	registry, limit, err := listingOf(r)
	if err != nil {
		return err
	}
	repository, tag, _ := strings.Cut(r.URL.Query().Get("after"), ":")
	tags, err := a.s.Tags(r.Context(), registry, repository, tag, limit)
	if err != nil {
		return err
	}
	var next *string
	if len(tags) == limit {
		after := tags[limit-1].Repository + ":" + tags[limit-1].Tag
		next = &after
	}
	a.answer(w, r, http.StatusOK, map[string]any{"tags": tags, "next": next})
	return nil
}

func listingOf(r *http.Request) (registry string, limit int, err error) {
	registry = r.URL.Query().Get("registry")
	if !contracts.ValidRegistry(registry) {
		return "", 0, fmt.Errorf("registry is missing, or no host[:port]: %w", errBadRequest)
	}
	limit, err = limitOf(r.URL.Query().Get("limit"))
	return registry, limit, err
}
