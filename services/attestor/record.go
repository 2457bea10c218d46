package attestor

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/store"
)

// errOvertaken is returned when somebody else wrote about the same image in
// between; the event is handled again then.
var errOvertaken = errors.New("a newer verdict on the image came in between")

// record is what has been said about one image.
type record struct {
	Image    contracts.Image
	Sequence int64
	Matched  time.Time
	Done     bool // attached and announced
	body
}

// body is the part of a record that is stored as JSON.
type body struct {
	Artifacts  []artifact              `json:"artifacts"`
	Superseded []string                `json:"superseded,omitempty"` // manifests to delete from the registry
	Attested   contracts.ImageAttested `json:"attested"`             // statements are listed once they are attached
}

// artifact is something attached to an image.
type artifact struct {
	PredicateType string            `json:"predicateType,omitempty"` // of a signed statement
	Type          string            `json:"type"`                    // artifact type and media type
	Blob          string            `json:"blob"`                    // digest of the stored content
	Annotations   map[string]string `json:"annotations"`
	Manifest      string            `json:"manifest,omitempty"` // digest, once attached
}

// compare orders verdicts on one image: the advisories' sequence, then the time.
func (r *record) compare(sequence int64, matched time.Time) int {
	switch {
	case sequence != r.Sequence:
		if sequence > r.Sequence {
			return 1
		}
		return -1
	default:
		return matched.Compare(r.Matched)
	}
}

// querier is a database or a transaction.
type querier interface {
	QueryRowContext(ctx context.Context, query string, args ...any) *sql.Row
}

// loadRecord returns what has been said about an image: store.ErrNotFound when nothing has.
func loadRecord(ctx context.Context, q querier, image contracts.Image) (*record, error) {
	r := &record{Image: image}
	var matched int64
	var state, text string
	err := q.QueryRowContext(ctx, `SELECT sequence, matched_at, state, body FROM attestor_statements
		WHERE registry = $1 AND repository = $2 AND digest = $3`,
		image.Registry, image.Repository, image.Digest).Scan(&r.Sequence, &matched, &state, &text)
	if errors.Is(err, sql.ErrNoRows) {
		return nil, fmt.Errorf("statements of %s: %w", image, store.ErrNotFound)
	}
	if err != nil {
		return nil, fmt.Errorf("read statements of %s: %w", image, err)
	}
	if err := json.Unmarshal([]byte(text), &r.body); err != nil {
		return nil, fmt.Errorf("decode statements of %s: %w", image, err)
	}
	r.Matched, r.Done = time.Unix(0, matched).UTC(), state == "done"
	return r, nil
}

// saveRecord stores r unless something newer, or other statements of the same
// moment, are stored: errOvertaken.
func saveRecord(ctx context.Context, tx *sql.Tx, r *record) error {
	old, err := loadRecord(ctx, tx, r.Image)
	if err != nil && !errors.Is(err, store.ErrNotFound) {
		return err
	}
	if err == nil {
		c := old.compare(r.Sequence, r.Matched)
		completes := r.Done && !old.Done && slices.EqualFunc(old.Artifacts, r.Artifacts, func(a, b artifact) bool { return a.Blob == b.Blob })
		if c < 0 || c == 0 && !completes {
			return fmt.Errorf("statements of %s: %w", r.Image, errOvertaken)
		}
	}
	text, err := json.Marshal(r.body)
	if err != nil {
		return fmt.Errorf("encode statements of %s: %w", r.Image, err)
	}
	state := "pending"
	if r.Done {
		state = "done"
	}
	_, err = tx.ExecContext(ctx, `INSERT INTO attestor_statements (registry, repository, digest, sequence, matched_at, state, body)
		VALUES ($1, $2, $3, $4, $5, $6, $7)
		ON CONFLICT (registry, repository, digest) DO UPDATE SET
			sequence = excluded.sequence, matched_at = excluded.matched_at, state = excluded.state, body = excluded.body`,
		r.Image.Registry, r.Image.Repository, r.Image.Digest, r.Sequence, r.Matched.UnixNano(), state, string(text))
	if err != nil {
		return fmt.Errorf("store statements of %s: %w", r.Image, err)
	}
	return nil
}
