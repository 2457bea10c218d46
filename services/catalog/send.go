package catalog

import (
	"context"
	"database/sql"
	"encoding/json"
	"fmt"

	"github.com/cloudevents/sdk-go/v2/event"

	"github.com/tidewaiter/tidewaiter/libs/bus"
)

// sendBatch bounds how many pending events are sent at once.
const sendBatch = 500

// execute runs a statement in a transaction.
type execute func(ctx context.Context, query string, args ...any) (sql.Result, error)

// enqueue stores an event that is to be sent, in the transaction that decided
// on it.
func enqueue(ctx context.Context, exec execute, ev event.Event) error {
	ev.SetSource("/services/" + Name)
	encoded, err := json.Marshal(ev)
	if err != nil {
		return bus.Permanent(fmt.Errorf("encode %s: %w", ev.Type(), err))
	}
	_, err = exec(ctx, `INSERT INTO catalog_pending (position, id, event)
		SELECT COALESCE(MAX(position), 0) + 1, $1, $2 FROM catalog_pending`, ev.ID(), string(encoded))
	if err != nil {
		return fmt.Errorf("store event to send: %w", err)
	}
	return nil
}

// send sends all pending events in order and forgets them. What a stop in
// between leaves behind is sent the next time, perhaps again, with the same id.
// One sends for all replicas: who finds another one at it leaves it to that one,
// which looks once more after it has let go.
func (s *Service) send(ctx context.Context) error {
	s.sending.Lock()
	defer s.sending.Unlock()
	for {
		var waits bool
		err := s.db.QueryRowContext(ctx, `SELECT EXISTS (SELECT 1 FROM catalog_pending)`).Scan(&waits)
		if err != nil {
			return outage(fmt.Errorf("read events to send: %w", err))
		}
		if !waits {
			return nil
		}
		ran, err := s.db.Alone(ctx, "catalog send", s.sendPending)
		if err != nil {
			return outage(err)
		}
		if !ran {
			return nil
		}
	}
}

func (s *Service) sendPending(ctx context.Context) error {
	for {
		events, positions, err := s.pending(ctx)
		if err != nil {
			return outage(fmt.Errorf("read events to send: %w", err))
		}
		if len(events) == 0 {
			return nil
		}
		if err := s.bus.Publish(ctx, events...); err != nil {
			return bus.Unavailable(fmt.Errorf("send events: %w", err))
		}
		err = s.db.Tx(ctx, func(tx *sql.Tx) error {
			for i, ev := range events {
				// Positions are used again once the table is empty: the id says whether this is still the event that was sent.
				_, err := tx.ExecContext(ctx, `DELETE FROM catalog_pending WHERE position = $1 AND id = $2`, positions[i], ev.ID())
				if err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return outage(fmt.Errorf("forget sent events: %w", err))
		}
	}
}

func (s *Service) pending(ctx context.Context) ([]event.Event, []int64, error) {
	rows, err := s.db.QueryContext(ctx, `SELECT position, event FROM catalog_pending ORDER BY position LIMIT $1`, sendBatch)
	if err != nil {
		return nil, nil, err
	}
	defer rows.Close()
	var events []event.Event
	var positions []int64
	for rows.Next() {
		var position int64
		var encoded string
		if err := rows.Scan(&position, &encoded); err != nil {
			return nil, nil, err
		}
		var ev event.Event
		if err := json.Unmarshal([]byte(encoded), &ev); err != nil {
			return nil, nil, fmt.Errorf("decode event: %w", err)
		}
		events, positions = append(events, ev), append(positions, position)
	}
	return events, positions, rows.Err()
}
