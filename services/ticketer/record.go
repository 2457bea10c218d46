package ticketer

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/tidewaiter/tidewaiter/libs/bus"
	"github.com/tidewaiter/tidewaiter/libs/store"
)

// State of a problem's ticket.
type state string

const (
	stateNone     state = "none"     // seen, and there is no ticket
	stateClaimed  state = "claimed"  // a ticket is to be made; none was
	stateCreating state = "creating" // a ticket was asked for, and it is not known whether it exists
	stateOpen     state = "open"     // the problem is open, whatever the ticket is
	stateClosed   state = "closed"   // the problem is closed, and so is the ticket
)

// errOvertaken is returned when somebody else wrote about the same problem in
// between; the event is handled again then.
var errOvertaken = errors.New("somebody else works on the same ticket")

// record is what is known about the ticket of one problem.
type record struct {
	Key       string
	version   int64
	Revision  int64
	State     state
	Tracker   string
	Project   string
	Ticket    string
	Slot      time.Time
	AttemptAt time.Time
	RecheckAt time.Time
	body
}

// body is the part of a record that is stored as JSON.
type body struct {
	Claim     string    `json:"claim,omitempty"` // random, marks the tickets that this claim made
	ClaimedAt time.Time `json:"claimedAt,omitzero"`
	URL       string    `json:"url,omitempty"`

	// What the ticket showed when it was last seen open.
	Title    string   `json:"title,omitempty"`
	Labels   []string `json:"labels,omitempty"`
	Severity string   `json:"severity,omitempty"`
	KEV      bool     `json:"kev,omitempty"`

	Pending *pending `json:"pending,omitempty"`
}

// pending is an update that was begun and perhaps not finished.
type pending struct {
	Since    time.Time `json:"since"`
	State    state     `json:"state"`            // of the problem
	Marker   string    `json:"marker,omitempty"` // of the comment; "": there is none
	Severity string    `json:"severity"`         // that the comment knows of
	KEV      bool      `json:"kev,omitempty"`
}

// querier is a database or a transaction.
type querier interface {
	QueryRowContext(ctx context.Context, query string, args ...any) *sql.Row
}

// load returns the record of a problem; of one that was never seen, an empty
// one in stateNone.
func load(ctx context.Context, q querier, key string) (*record, error) {
	r := &record{Key: key, State: stateNone}
	var slot, attempt, recheck int64
	var text string
	err := q.QueryRowContext(ctx, `SELECT version, revision, state, tracker, project, ticket, slot, attempt_at, recheck_at, body
		FROM ticketer_tickets WHERE problem_key = $1`, key).
		Scan(&r.version, &r.Revision, &r.State, &r.Tracker, &r.Project, &r.Ticket, &slot, &attempt, &recheck, &text)
	if errors.Is(err, sql.ErrNoRows) {
		return r, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read ticket of problem %s: %w", key, err)
	}
	if err := json.Unmarshal([]byte(text), &r.body); err != nil {
		return nil, fmt.Errorf("decode ticket of problem %s: %w", key, err)
	}
	r.Slot, r.AttemptAt, r.RecheckAt = fromMilli(slot), fromMilli(attempt), fromMilli(recheck)
	return r, nil
}

// save stores r if nobody else wrote since it was loaded: errOvertaken.
func (r *record) save(ctx context.Context, tx *sql.Tx) error {
	text, err := json.Marshal(r.body)
	if err != nil {
		return fmt.Errorf("encode ticket of problem %s: %w", r.Key, err)
	}
	result, err := tx.ExecContext(ctx, `INSERT INTO ticketer_tickets
			(problem_key, version, revision, state, tracker, project, ticket, slot, attempt_at, recheck_at, body)
		VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)
		ON CONFLICT (problem_key) DO UPDATE SET version = excluded.version, revision = excluded.revision, state = excluded.state,
			tracker = excluded.tracker, project = excluded.project, ticket = excluded.ticket, slot = excluded.slot,
			attempt_at = excluded.attempt_at, recheck_at = excluded.recheck_at, body = excluded.body
		WHERE ticketer_tickets.version = excluded.version - 1`,
		r.Key, r.version+1, r.Revision, string(r.State), r.Tracker, r.Project, r.Ticket,
		toMilli(r.Slot), toMilli(r.AttemptAt), toMilli(r.RecheckAt), string(text))
	if err != nil {
		return fmt.Errorf("store ticket of problem %s: %w", r.Key, err)
	}
	n, err := result.RowsAffected()
	if err != nil {
		return fmt.Errorf("store ticket of problem %s: %w", r.Key, err)
	}
	if n == 0 {
		return fmt.Errorf("ticket of problem %s: %w", r.Key, errOvertaken)
	}
	return nil
}

func toMilli(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixMilli()
}

func fromMilli(ms int64) time.Time {
	if ms == 0 {
		return time.Time{}
	}
	return time.UnixMilli(ms).UTC()
}

// put stores r in a transaction of its own.
func (s *Service) put(ctx context.Context, r *record) error {
	err := s.DB.Tx(ctx, func(tx *sql.Tx) error { return r.save(ctx, tx) })
	if err != nil {
		return dbError(err)
	}
	r.version++
	return nil
}

// claim stores r and gives it the tracker's next slot. A tracker gets a
// minute's worth of tickets at once, and then one after the other.
func (s *Service) claim(ctx context.Context, r *record) error {
	between := time.Minute / time.Duration(s.cfg.perMinute(r.Tracker))
	err := s.DB.Tx(ctx, func(tx *sql.Tx) error {
		var last sql.NullInt64
		err := tx.QueryRowContext(ctx, `SELECT MAX(slot) FROM ticketer_tickets WHERE tracker = $1`, r.Tracker).Scan(&last)
		if err != nil {
			return fmt.Errorf("read the pace of tracker %s: %w", r.Tracker, err)
		}
		r.Slot = s.Now()
		if next := fromMilli(last.Int64); next.After(r.Slot) {
			r.Slot = next
		}
		r.Slot = r.Slot.Add(between)
		return r.save(ctx, tx)
	})
	if err != nil {
		return dbError(err)
	}
	r.version++
	return nil
}

// start returns when the ticket may be made.
func (r *record) start() time.Time { return r.Slot.Add(-time.Minute) }

// due returns the keys of tickets that are to be looked at for doubles.
func (s *Service) due(ctx context.Context, limit int) ([]string, error) {
	rows, err := s.DB.QueryContext(ctx, `SELECT problem_key FROM ticketer_tickets
		WHERE recheck_at > 0 AND recheck_at <= $1 ORDER BY recheck_at LIMIT $2`, s.Now().UnixMilli(), limit)
	if err != nil {
		return nil, fmt.Errorf("read tickets to look at again: %w", err)
	}
	defer rows.Close()
	var keys []string
	for rows.Next() {
		var key string
		if err := rows.Scan(&key); err != nil {
			return nil, fmt.Errorf("read tickets to look at again: %w", err)
		}
		keys = append(keys, key)
	}
	if err := rows.Err(); err != nil {
		return nil, fmt.Errorf("read tickets to look at again: %w", err)
	}
	return keys, nil
}

// dbError marks an outage of the database as what it is.
func dbError(err error) error {
	if store.IsUnavailable(err) {
		return bus.Unavailable(err)
	}
	return err
}
