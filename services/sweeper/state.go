package sweeper

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/services/sweeper/list"
)

// ErrUnknownSource is returned for a source that is not swept.
var ErrUnknownSource = errors.New("no source of this id is swept")

// Phases of a sweep, in their order.
const (
	phaseRepositories = "repositories" // list repositories
	phaseTags         = "tags"         // list their tags and compare them
	phaseStatements   = "statements"   // look whether statements are attached
	phaseDeleted      = "deleted"      // look for what is known and was not listed
	phaseDone         = "done"
)

// progress is one sweep: how far it is and what it found.
type progress struct {
	source string
	id     int64 // its start, Unix nanoseconds
	state  string
	body
}

// body is the part of a progress that is stored as JSON.
type body struct {
	DryRun     bool                   `json:"dryRun,omitempty"`
	Baseline   int64                  `json:"baseline,omitempty"` // the complete sweep before; 0: none
	Phase      string                 `json:"phase"`
	Repository string                 `json:"repository,omitempty"` // in phase tags: the one that is listed, or was last
	Inside     bool                   `json:"inside,omitempty"`     // Repository is not finished
	Next       string                 `json:"next,omitempty"`       // position in the listing of the phase
	Pages      int                    `json:"pages,omitempty"`      // of that listing so far
	Listed     int                    `json:"listed,omitempty"`     // tags of Repository so far
	Unread     int                    `json:"unread,omitempty"`     // of Repository so far, tags that could not be read
	Pauses     int                    `json:"pauses,omitempty"`     // since the registry last served what was asked for
	Total      int                    `json:"total,omitempty"`      // images to check in phase statements
	Message    string                 `json:"message,omitempty"`
	FinishedAt time.Time              `json:"finishedAt,omitzero"`
	Figures    contracts.SweepFigures `json:"figures"`
}

// running says whether a sweep, if there is one, is not finished.
func (p *progress) running() bool { return p != nil && p.state == contracts.SweepRunning }

func (p *progress) started() time.Time { return time.Unix(0, p.id).UTC() }

// enter begins a phase.
func (p *progress) enter(phase string) {
	p.Phase, p.Repository, p.Inside, p.Next, p.Pages, p.Listed, p.Unread, p.Pauses = phase, "", false, "", 0, 0, 0, 0
}

// execute runs a statement, in a transaction or not.
type execute func(ctx context.Context, query string, args ...any) (sql.Result, error)

// save stores how far a sweep is.
func (p *progress) save(ctx context.Context, exec execute) error {
	encoded, err := json.Marshal(p.body)
	if err != nil {
		return fmt.Errorf("encode progress: %w", err)
	}
	_, err = exec(ctx, `INSERT INTO sweeper_sweeps (source, sweep, state, body) VALUES ($1, $2, $3, $4)
		ON CONFLICT (source, sweep) DO UPDATE SET state = excluded.state, body = excluded.body`, p.source, p.id, p.state, string(encoded))
	if err != nil {
		return fmt.Errorf("store progress: %w", err)
	}
	return nil
}

// querier is a database or a transaction.
type querier interface {
	QueryRowContext(ctx context.Context, query string, args ...any) *sql.Row
}

// load reads a sweep by its start; 0: the last of the source. nil: there is none.
func load(ctx context.Context, q querier, source string, id int64) (*progress, error) {
	p := &progress{source: source}
	var encoded string
	row := q.QueryRowContext(ctx, `SELECT sweep, state, body FROM sweeper_sweeps
		WHERE source = $1 AND (sweep = $2 OR $2 = 0) ORDER BY sweep DESC LIMIT 1`, source, id)
	err := row.Scan(&p.id, &p.state, &encoded)
	if errors.Is(err, sql.ErrNoRows) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read sweep: %w", err)
	}
	return p, p.decode(encoded)
}

func (p *progress) decode(encoded string) error {
	if err := json.Unmarshal([]byte(encoded), &p.body); err != nil {
		return fmt.Errorf("decode sweep: %w", err)
	}
	return nil
}

// between reads the sweeps of a source that began after one moment and not
// after another, in their order.
func (s *Sweeper) between(ctx context.Context, source string, after, until int64) ([]*progress, error) {
	rows, err := s.DB.QueryContext(ctx, `SELECT sweep, state, body FROM sweeper_sweeps
		WHERE source = $1 AND sweep > $2 AND sweep <= $3 ORDER BY sweep`, source, after, until)
	if err != nil {
		return nil, fmt.Errorf("read sweeps: %w", err)
	}
	defer rows.Close()
	var all []*progress
	for rows.Next() {
		p := &progress{source: source}
		var encoded string
		if err := rows.Scan(&p.id, &p.state, &encoded); err != nil {
			return nil, fmt.Errorf("read sweeps: %w", err)
		}
		if err := p.decode(encoded); err != nil {
			return nil, err
		}
		all = append(all, p)
	}
	return all, rows.Err()
}

// schedule is one row of sweeper_sources.
type schedule struct {
	completed, nextAt, resumeAt int64
	requested, listing          string
}

// due says whether a sweep goes on, or begins: p is the last one, nil where
// there is none.
func (r schedule) due(p *progress, now time.Time) bool {
	if p.running() {
		return r.resumeAt <= now.UnixNano() // what was asked for is looked at when it is finished
	}
	return r.requested != "" || r.nextAt <= now.UnixNano()
}

// elsewhere says whether the source listed something else when the last sweep began.
func (r schedule) elsewhere(src *source) bool { return r.listing != "" && r.listing != src.listing }

// request adds a kind of sweep to those that are asked for.
func (r *schedule) request(kind string) {
	if kinds := strings.Fields(r.requested); !slices.Contains(kinds, kind) {
		r.requested = strings.Join(append(kinds, kind), " ")
	}
}

// take returns the kind that was asked for first, and does not ask for it any
// more; "": none was.
func (r *schedule) take() (kind string) {
	kind, r.requested, _ = strings.Cut(r.requested, " ")
	return kind
}

// Kinds of sweeps in schedule.requested.
const (
	requestSweep  = "sweep"
	requestDryRun = "dry-run"
)

func kindOf(dryRun bool) string {
	if dryRun {
		return requestDryRun
	}
	return requestSweep
}

func readSchedule(ctx context.Context, q querier, source string) (schedule, error) {
	var row schedule
	err := q.QueryRowContext(ctx, `SELECT completed, next_at, resume_at, requested, listing FROM sweeper_sources WHERE source = $1`, source).
		Scan(&row.completed, &row.nextAt, &row.resumeAt, &row.requested, &row.listing)
	if err != nil && !errors.Is(err, sql.ErrNoRows) {
		return row, fmt.Errorf("read schedule: %w", err)
	}
	return row, nil
}

// saveSchedule stores what was read in the same transaction.
func saveSchedule(ctx context.Context, tx *sql.Tx, source string, row schedule) error {
	_, err := tx.ExecContext(ctx, `INSERT INTO sweeper_sources (source, completed, next_at, resume_at, requested, listing)
		VALUES ($1, $2, $3, $4, $5, $6) ON CONFLICT (source) DO UPDATE SET completed = excluded.completed, next_at = excluded.next_at,
		resume_at = excluded.resume_at, requested = excluded.requested, listing = excluded.listing`,
		source, row.completed, row.nextAt, row.resumeAt, row.requested, row.listing)
	if err != nil {
		return fmt.Errorf("store schedule: %w", err)
	}
	return nil
}

// saveRepositories remembers a page of repositories as listed by a sweep.
func saveRepositories(ctx context.Context, tx *sql.Tx, p *progress, page []list.Repository) (fresh int, err error) {
	for _, r := range page {
		var seen int64
		err := tx.QueryRowContext(ctx, `SELECT sweep FROM sweeper_repositories WHERE source = $1 AND repository = $2`, p.source, r.Name).Scan(&seen)
		if err != nil && !errors.Is(err, sql.ErrNoRows) {
			return 0, fmt.Errorf("read repository: %w", err)
		}
		if seen != p.id {
			fresh++
		}
		_, err = tx.ExecContext(ctx, `INSERT INTO sweeper_repositories (source, repository, handle, sweep) VALUES ($1, $2, $3, $4)
			ON CONFLICT (source, repository) DO UPDATE SET handle = excluded.handle, sweep = excluded.sweep, failure = ''`,
			p.source, r.Name, r.Handle, p.id)
		if err != nil {
			return 0, fmt.Errorf("store repository: %w", err)
		}
	}
	return fresh, nil
}

// repositoryRow is one row of sweeper_repositories.
type repositoryRow struct {
	list.Repository
	listed int64
}

// nextRepository returns the one that a sweep is in, or the one after; nil: none is left.
func (s *Sweeper) nextRepository(ctx context.Context, p *progress) (*repositoryRow, error) {
	var r repositoryRow
	err := s.DB.QueryRowContext(ctx, `SELECT repository, handle, listed FROM sweeper_repositories
		WHERE source = $1 AND sweep = $2 AND (repository > $3 OR repository = $3 AND $4 = 1) ORDER BY repository LIMIT 1`,
		p.source, p.id, p.Repository, flag(p.Inside)).Scan(&r.Name, &r.Handle, &r.listed)
	if errors.Is(err, sql.ErrNoRows) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read repository: %w", err)
	}
	return &r, nil
}

func flag(b bool) int {
	if b {
		return 1
	}
	return 0
}

// tagRow is one row of sweeper_tags.
type tagRow struct {
	repository, tag, digest         string
	looked, seen, found, since, due int64
	failure                         string
}

// readTag returns what the last look at a tag found; digest is empty where there was none.
func readTag(ctx context.Context, q querier, source, repository, tag string) (tagRow, error) {
	row := tagRow{repository: repository, tag: tag}
	err := q.QueryRowContext(ctx, `SELECT digest, looked, seen, found, since, due, failure FROM sweeper_tags
		WHERE source = $1 AND repository = $2 AND tag = $3`, source, repository, tag).
		Scan(&row.digest, &row.looked, &row.seen, &row.found, &row.since, &row.due, &row.failure)
	if err != nil && !errors.Is(err, sql.ErrNoRows) {
		return row, fmt.Errorf("read tag: %w", err)
	}
	return row, nil
}

func (r tagRow) save(ctx context.Context, exec execute, source string) error {
	_, err := exec(ctx, `INSERT INTO sweeper_tags (source, repository, tag, digest, looked, seen, found, since, due, failure)
		VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10) ON CONFLICT (source, repository, tag) DO UPDATE
		SET digest = excluded.digest, looked = excluded.looked, seen = excluded.seen, found = excluded.found,
		since = excluded.since, due = excluded.due, failure = excluded.failure`,
		source, r.repository, r.tag, r.digest, r.looked, r.seen, r.found, r.since, r.due, r.failure)
	if err != nil {
		return fmt.Errorf("store tag: %w", err)
	}
	return nil
}

// dueTags returns tags whose webhook has had its time, at most limit.
func (s *Sweeper) dueTags(ctx context.Context, source string, now time.Time, limit int) ([]tagRow, error) {
	rows, err := s.DB.QueryContext(ctx, `SELECT repository, tag, digest, looked, seen, found, since, due, failure FROM sweeper_tags
		WHERE source = $1 AND due > 0 AND due <= $2 ORDER BY repository, tag LIMIT $3`, source, now.UnixNano(), limit)
	if err != nil {
		return nil, fmt.Errorf("read tags that are due: %w", err)
	}
	defer rows.Close()
	var due []tagRow
	for rows.Next() {
		var r tagRow
		if err := rows.Scan(&r.repository, &r.tag, &r.digest, &r.looked, &r.seen, &r.found, &r.since, &r.due, &r.failure); err != nil {
			return nil, fmt.Errorf("read tags that are due: %w", err)
		}
		due = append(due, r)
	}
	return due, rows.Err()
}

// disown makes nothing count as listed before: it is another part of the
// registry that is listed now.
func disown(ctx context.Context, tx *sql.Tx, source string) error {
	if _, err := tx.ExecContext(ctx, `UPDATE sweeper_repositories SET listed = 0 WHERE source = $1`, source); err != nil {
		return fmt.Errorf("forget what was listed: %w", err)
	}
	return nil
}

// forget deletes what is too old: finished sweeps, and tags and repositories
// that no sweep has seen for as long.
func (s *Sweeper) forget(ctx context.Context, source string, now time.Time) error {
	before := now.Add(-s.cfg.Keep).UnixNano()
	return s.DB.Tx(ctx, func(tx *sql.Tx) error {
		for _, query := range []string{
			`DELETE FROM sweeper_sweeps WHERE source = $1 AND sweep < $2 AND state <> 'running'`,
			`DELETE FROM sweeper_tags WHERE source = $1 AND looked < $2`,
			`DELETE FROM sweeper_repositories WHERE source = $1 AND sweep < $2`,
		} {
			if _, err := tx.ExecContext(ctx, query, source, before); err != nil {
				return fmt.Errorf("forget old sweeps: %w", err)
			}
		}
		return nil
	})
}
