package sweeper

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math"
	"net/http"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/credential"
)

// maxUnlisted bounds the repositories that are named as not listed, and the
// tags that are named as not read.
const maxUnlisted = 100

// pace measures how fast a sweep advances in this process.
type pace struct {
	mu      sync.Mutex
	running bool
	start   time.Time
	before  contracts.SweepFigures
	now     contracts.SweepFigures
}

func (p *pace) begin(now time.Time, f contracts.SweepFigures) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.running, p.start, p.before, p.now = true, now, f, f
}

func (p *pace) advance(f contracts.SweepFigures) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.now = f
}

func (p *pace) end() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.running = false
}

// each returns the seconds that a tag or an image took; otherwise what the
// budget allows at most.
func (p *pace) each(now time.Time, budget float64) float64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	done := p.now.Tags + p.now.Checked - p.before.Tags - p.before.Checked
	if !p.running || done == 0 {
		return 1 / budget
	}
	return now.Sub(p.start).Seconds() / float64(done)
}

// Asked returns the first sweep of a kind that began after a moment: the one
// that Request was asked for. nil: it has not begun. Errors: ErrUnknownSource.
func (s *Sweeper) Asked(ctx context.Context, id string, dryRun bool, after time.Time) (*contracts.Sweep, error) {
	src := s.sources[id]
	if src == nil {
		return nil, fmt.Errorf("%q: %w", id, ErrUnknownSource)
	}
	began := int64(0)
	if !after.IsZero() {
		began = after.UnixNano()
	}
	sweeps, err := s.between(ctx, id, began, math.MaxInt64)
	if err != nil {
		return nil, err
	}
	for _, p := range sweeps {
		if p.DryRun == dryRun {
			return s.status(ctx, src, p)
		}
	}
	return nil, nil
}

// Status returns the last sweep of a source, and the last complete one that
// was no dry run; nil where there is none. Errors: ErrUnknownSource.
func (s *Sweeper) Status(ctx context.Context, id string) (last, complete *contracts.Sweep, err error) {
	src := s.sources[id]
	if src == nil {
		return nil, nil, fmt.Errorf("%q: %w", id, ErrUnknownSource)
	}
	p, err := load(ctx, s.DB, id, 0)
	if err != nil || p == nil {
		return nil, nil, err
	}
	if last, err = s.status(ctx, src, p); err != nil {
		return nil, nil, err
	}
	row, err := readSchedule(ctx, s.DB, id)
	if err != nil || row.completed == 0 {
		return last, nil, err
	}
	if p, err = load(ctx, s.DB, id, row.completed); err != nil || p == nil {
		return last, nil, err
	}
	complete, err = s.status(ctx, src, p)
	return last, complete, err
}

func (s *Sweeper) status(ctx context.Context, src *source, p *progress) (*contracts.Sweep, error) {
	out := &contracts.Sweep{
		Source: src.id, Registry: src.Registry, DryRun: p.DryRun, State: p.state, Phase: p.Phase, Message: p.Message,
		StartedAt: p.started(), Figures: p.Figures, Unlisted: []contracts.Unlisted{},
	}
	if !p.FinishedAt.IsZero() {
		at := p.FinishedAt
		out.FinishedAt = &at
	}
	if !p.DryRun && p.Baseline > 0 {
		// What a sweep finds new that is not complete is new to the complete one after it.
		sweeps, err := s.between(ctx, src.id, p.Baseline, p.id-1)
		if err != nil {
			return nil, err
		}
		for _, before := range sweeps {
			if !before.DryRun {
				out.Figures.Changed += before.Figures.Changed
				out.Figures.Heard += before.Figures.Heard
				out.Figures.Lost += before.Figures.Lost
				out.Figures.Pending += before.Figures.Pending
			}
		}
	}
	if n := out.Figures.Heard + out.Figures.Lost; n > 0 {
		share := float64(out.Figures.Lost) / float64(n)
		out.Figures.ShareLost = &share
	}
	err := s.unlistedIn(ctx, out, `SELECT repository, '', failure FROM sweeper_repositories
		WHERE source = $1 AND sweep = $2 AND failure <> '' ORDER BY repository LIMIT $3`, p)
	if err != nil {
		return nil, err
	}
	err = s.unlistedIn(ctx, out, `SELECT repository, tag, failure FROM sweeper_tags
		WHERE source = $1 AND looked = $2 AND failure <> '' ORDER BY repository, tag LIMIT $3`, p)
	if err != nil {
		return nil, err
	}
	if p.state == contracts.SweepRunning {
		out.SecondsLeft, err = s.secondsLeft(ctx, src, p)
	}
	return out, err
}

// unlistedIn adds what a query finds that a sweep could not list or read.
func (s *Sweeper) unlistedIn(ctx context.Context, out *contracts.Sweep, query string, p *progress) error {
	rows, err := s.DB.QueryContext(ctx, query, p.source, p.id, maxUnlisted)
	if err != nil {
		return fmt.Errorf("read what could not be listed: %w", err)
	}
	defer rows.Close()
	for rows.Next() {
		var u contracts.Unlisted
		if err := rows.Scan(&u.Repository, &u.Tag, &u.Reason); err != nil {
			return fmt.Errorf("read what could not be listed: %w", err)
		}
		out.Unlisted = append(out.Unlisted, u)
	}
	if err := rows.Err(); err != nil {
		return fmt.Errorf("read what could not be listed: %w", err)
	}
	return nil
}

// secondsLeft estimates how long a sweep goes on: from how long a tag took, and
// how many tags the repositories that are left had last time, or have on
// average. nil: it is not known yet what is to be listed.
func (s *Sweeper) secondsLeft(ctx context.Context, src *source, p *progress) (*int64, error) {
	var left float64
	switch p.Phase {
	case phaseRepositories:
		return nil, nil
	case phaseTags:
		var all, counted, tags sql.NullInt64
		err := s.DB.QueryRowContext(ctx, `SELECT COUNT(*), SUM(CASE WHEN tags >= 0 THEN 1 ELSE 0 END), SUM(CASE WHEN tags >= 0 THEN tags ELSE 0 END)
			FROM sweeper_repositories WHERE source = $1 AND sweep = $2 AND repository > $3`, src.id, p.id, p.Repository).Scan(&all, &counted, &tags)
		if err != nil {
			return nil, fmt.Errorf("count what is left: %w", err)
		}
		average := 1.0
		if done := p.Figures.Repositories - int(all.Int64); done > 0 {
			average = float64(p.Figures.Tags) / float64(done)
		}
		left = float64(tags.Int64) + float64(all.Int64-counted.Int64)*average
		if !src.sweep.NoStatements {
			left += left + float64(p.Figures.Tags) // each is looked at once more
		}
	case phaseStatements:
		left = float64(max(p.Total-p.Figures.Checked, 0))
	}
	seconds := int64(left*src.pace.each(s.Now(), src.sweep.Rate) + 0.5)
	return &seconds, nil
}

// Request asks for a sweep of a source now, by whichever replica comes first.
// One of that kind that is still listing is the one that was asked for; what is
// under way otherwise goes on first. The sweep that was asked for is the first
// of its kind that begins after the returned time.
func (s *Sweeper) Request(ctx context.Context, id string, dryRun bool) (after time.Time, err error) {
	src := s.sources[id]
	if src == nil {
		return after, fmt.Errorf("%q: %w", id, ErrUnknownSource)
	}
	err = s.DB.Tx(ctx, func(tx *sql.Tx) error {
		after = time.Time{}
		row, err := readSchedule(ctx, tx, id)
		if err != nil {
			return err
		}
		p, err := load(ctx, tx, id, 0)
		if err != nil {
			return err
		}
		joins := false
		if p != nil {
			after = p.started()
		}
		if p.running() {
			row.resumeAt = 0 // where it pauses, it goes on now
			joins = p.DryRun == dryRun && (p.Phase == phaseRepositories || p.Phase == phaseTags)
		}
		if joins {
			after = p.started().Add(-1)
		} else {
			row.request(kindOf(dryRun))
		}
		return saveSchedule(ctx, tx, id, row)
	})
	if err != nil {
		return after, err
	}
	select {
	case src.wake <- struct{}{}:
	default: // it will look
	}
	return after, nil
}

// API returns the HTTP API, version 1:
//
//	GET /healthz                           200; the only one without a token
//	GET /v1/sweeps                         {"sweeps": [SourceSweeps]}
//	GET /v1/sweeps/{source}                SourceSweeps
//	GET /v1/sweeps/{source}?after=&dryRun= SourceSweeps; last is the first sweep of this kind that began after the time
//	POST /v1/sweeps/{source}?dryRun=true   asks for a sweep now: 202, {"after": it begins after this time}
//
// All but the first ask for "Authorization: Bearer <token>". Errors are
// {"error": "…"} with 400 (after is no time), 401, 404 (no such source) or 503.
func (s *Sweeper) API() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		answer(w, http.StatusOK, map[string]string{"status": "ok"})
	})
	mux.Handle("GET /v1/sweeps", s.protected(func(r *http.Request) (int, any, error) {
		all := []SourceSweeps{}
		for _, id := range slices.Sorted(maps.Keys(s.sources)) {
			one, err := s.both(r.Context(), id)
			if err != nil {
				return 0, nil, err
			}
			all = append(all, one)
		}
		return http.StatusOK, map[string]any{"sweeps": all}, nil
	}))
	mux.Handle("GET /v1/sweeps/{source}", s.protected(func(r *http.Request) (int, any, error) {
		one, err := s.both(r.Context(), r.PathValue("source"))
		if err != nil || !r.URL.Query().Has("after") {
			return http.StatusOK, one, err
		}
		after, err := time.Parse(time.RFC3339Nano, r.URL.Query().Get("after"))
		if err != nil {
			return 0, nil, fmt.Errorf("after is not an RFC 3339 time: %w", errBadRequest)
		}
		one.Last, err = s.Asked(r.Context(), one.Source, dryRun(r), after)
		return http.StatusOK, one, err
	}))
	mux.Handle("POST /v1/sweeps/{source}", s.protected(func(r *http.Request) (int, any, error) {
		after, err := s.Request(r.Context(), r.PathValue("source"), dryRun(r))
		return http.StatusAccepted, map[string]any{"after": after}, err
	}))
	return mux
}

func dryRun(r *http.Request) bool { return r.URL.Query().Get("dryRun") == "true" }

// errBadRequest marks what the client did wrong.
var errBadRequest = errors.New("bad request")

// SourceSweeps are the last sweeps of a source.
type SourceSweeps struct {
	Source   string           `json:"source"`
	Last     *contracts.Sweep `json:"last"`     // or the one that was asked about; null: there is none
	Complete *contracts.Sweep `json:"complete"` // the last complete one that was no dry run
}

func (s *Sweeper) both(ctx context.Context, id string) (SourceSweeps, error) {
	last, complete, err := s.Status(ctx, id)
	return SourceSweeps{Source: id, Last: last, Complete: complete}, err
}

// protected asks for one of the tokens.
func (s *Sweeper) protected(next func(r *http.Request) (status int, body any, err error)) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		tokens, err := credential.Secret{File: s.cfg.TokenFile, Env: s.cfg.TokenEnv}.All(os.LookupEnv)
		if err != nil {
			s.Log.ErrorContext(r.Context(), "the API's token cannot be read", slog.Any("error", err))
		}
		if err != nil || !credential.Bearer(r.Header.Get("Authorization"), tokens) {
			w.Header().Set("WWW-Authenticate", `Bearer realm="tidewaiter sweeper"`)
			answer(w, http.StatusUnauthorized, map[string]string{"error": "a valid bearer token is needed"})
			return
		}
		status, body, err := next(r)
		switch {
		case errors.Is(err, errBadRequest):
			answer(w, http.StatusBadRequest, map[string]string{"error": err.Error()})
		case errors.Is(err, ErrUnknownSource):
			answer(w, http.StatusNotFound, map[string]string{"error": err.Error()})
		case err != nil:
			s.Log.ErrorContext(r.Context(), "request failed", slog.String("path", r.URL.Path), slog.Any("error", err))
			answer(w, http.StatusServiceUnavailable, map[string]string{"error": http.StatusText(http.StatusServiceUnavailable)})
		default:
			answer(w, status, body)
		}
	})
}

func answer(w http.ResponseWriter, status int, body any) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	// The client is gone if this fails.
	_ = json.NewEncoder(w).Encode(body)
}
