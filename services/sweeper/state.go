package sweeper

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
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
	Pauses     int                    `json:"pauses,omitempty"`     // at this position
	Total      int                    `json:"total,omitempty"`      // images to check in phase statements
	Message    string                 `json:"message,omitempty"`
	FinishedAt time.Time              `json:"finishedAt,omitzero"`
	Figures    contracts.SweepFigures `json:"figures"`
}

func (p *progress) started() time.Time { return time.Unix(0, p.id).UTC() }

// enter begins a phase.
func (p *progress) enter(phase string) {
	p.Phase, p.Repository, p.Inside, p.Next, p.Pages, p.Listed, p.Pauses = phase, "", false, "", 0, 0, 0
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
	if err := json.Unmarshal([]byte(encoded), &p.body); err != nil {
		return nil, fmt.Errorf("decode sweep: %w", err)
	}
	return p, nil
}

// schedule is one row of sweeper_sources.
type schedule struct {
	completed, nextAt int64
	requested         string
}

// Values of schedule.requested.
const (
	requestSweep  = "sweep"
	requestDryRun = "dry-run"
)

func (s *Sweeper) schedule(ctx context.Context, source string) (schedule, error) {
	var row schedule
	err := s.DB.QueryRowContext(ctx, `SELECT completed, next_at, requested FROM sweeper_sources WHERE source = $1`, source).
		Scan(&row.completed, &row.nextAt, &row.requested)
	if err != nil && !errors.Is(err, sql.ErrNoRows) {
		return row, fmt.Errorf("read schedule: %w", err)
	}
	return row, nil
}

func saveSchedule(ctx context.Context, exec execute, source string, row schedule) error {
	_, err := exec(ctx, `INSERT INTO sweeper_sources (source, completed, next_at, requested) VALUES ($1, $2, $3, $4)
		ON CONFLICT (source) DO UPDATE SET completed = excluded.completed, next_at = excluded.next_at, requested = excluded.requested`,
		source, row.completed, row.nextAt, row.requested)
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
	repository, tag, digest string
	looked, found, due      int64
}

// readTag returns what the last look at a tag found; digest is empty where there was none.
func readTag(ctx context.Context, q querier, source, repository, tag string) (tagRow, error) {
	row := tagRow{repository: repository, tag: tag}
	err := q.QueryRowContext(ctx, `SELECT digest, looked, found, due FROM sweeper_tags WHERE source = $1 AND repository = $2 AND tag = $3`,
		source, repository, tag).Scan(&row.digest, &row.looked, &row.found, &row.due)
	if err != nil && !errors.Is(err, sql.ErrNoRows) {
		return row, fmt.Errorf("read tag: %w", err)
	}
	return row, nil
}

func (r tagRow) save(ctx context.Context, exec execute, source string) error {
	_, err := exec(ctx, `INSERT INTO sweeper_tags (source, repository, tag, digest, looked, found, due) VALUES ($1, $2, $3, $4, $5, $6, $7)
		ON CONFLICT (source, repository, tag) DO UPDATE
		SET digest = excluded.digest, looked = excluded.looked, found = excluded.found, due = excluded.due`,
		source, r.repository, r.tag, r.digest, r.looked, r.found, r.due)
	if err != nil {
		return fmt.Errorf("store tag: %w", err)
	}
	return nil
}

// dueTags returns tags whose webhook has had its time, at most limit.
func (s *Sweeper) dueTags(ctx context.Context, source string, now time.Time, limit int) ([]tagRow, error) {
	rows, err := s.DB.QueryContext(ctx, `SELECT repository, tag, digest, looked, found, due FROM sweeper_tags
		WHERE source = $1 AND due > 0 AND due <= $2 ORDER BY repository, tag LIMIT $3`, source, now.UnixNano(), limit)
	if err != nil {
		return nil, fmt.Errorf("read tags that are due: %w", err)
	}
	defer rows.Close()
	var due []tagRow
	for rows.Next() {
		var r tagRow
		if err := rows.Scan(&r.repository, &r.tag, &r.digest, &r.looked, &r.found, &r.due); err != nil {
			return nil, fmt.Errorf("read tags that are due: %w", err)
		}
		due = append(due, r)
	}
	return due, rows.Err()
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
