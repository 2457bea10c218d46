package store

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/cloudevents/sdk-go/v2/event"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/bus"
)

// pruneBatch bounds the rows that one transaction deletes, so that it does not
// keep others from writing.
const pruneBatch = 1000

// Once runs apply for an input event at most once: what it writes through tx
// and the events it returns are stored together, and a redelivered input gets
// the stored events again. It fits bus.Handler. Errors of the database come
// back marked bus.Unavailable; those of apply roll back and come back as they
// are.
//
// Where the events lack source, id or time, these are set as the bus would set
// them, once, and stored. apply must be quick and may run several times until
// one transaction succeeds. With the context it is given, PutBlob, TouchBlobs,
// Tx and ExecContext of db join the transaction.
func (db *DB) Once(ctx context.Context, service string, in event.Event,
	apply func(ctx context.Context, tx *sql.Tx) ([]event.Event, error),
) ([]event.Event, error) {
	if in.Source() == "" || in.ID() == "" {
		return nil, bus.Permanent(fmt.Errorf("input of %s without source or id", service))
	}
	out, err := db.outputs(ctx, db.DB, service, in)
	if err == nil {
		return out, nil
	}
	if !errors.Is(err, ErrNotFound) {
		return nil, markUnavailable(err)
	}
	err = db.once(ctx, service, in, apply, &out)
	if isDuplicate(err) {
		// Two instances worked on the same input; the other one was first. Or
		// apply broke a key of its own, which it does again.
		err = db.once(ctx, service, in, apply, &out)
	}
	if err != nil {
		return nil, markUnavailable(err)
	}
	return out, nil
}

// Stored returns what Once stored for an input event, and whether it did: a
// service that finds that an event changes nothing answers without writing,
// once it knows that this was not the event that did.
func (db *DB) Stored(ctx context.Context, service string, in event.Event) (out []event.Event, ok bool, err error) {
	out, err = db.outputs(ctx, db.DB, service, in)
	if errors.Is(err, ErrNotFound) {
		return nil, false, nil
	}
	return out, err == nil, markUnavailable(err)
}

func (db *DB) once(ctx context.Context, service string, in event.Event,
	apply func(ctx context.Context, tx *sql.Tx) ([]event.Event, error), out *[]event.Event,
) error {
	return db.Tx(ctx, func(tx *sql.Tx) error {
		stored, err := db.outputs(ctx, tx, service, in)
		if err == nil {
			*out = stored
			return nil
		}
		if !errors.Is(err, ErrNotFound) {
			return err
		}
		*out, err = apply(context.WithValue(ctx, txKey{db}, tx), tx)
		if err != nil {
			return err
		}
		now := time.Now().UTC()
		for i := range *out {
			complete(&(*out)[i], service, in, now)
		}
		if *out == nil {
			*out = []event.Event{}
		}
		encoded, err := json.Marshal(*out)
		if err != nil {
			return bus.Permanent(fmt.Errorf("encode outputs: %w", err))
		}
		_, err = tx.ExecContext(ctx,
			"INSERT INTO outbox (service, source, id, outputs, created_at) VALUES ($1, $2, $3, $4, $5)",
			service, in.Source(), in.ID(), db.encoder.EncodeAll(encoded, nil), now.UnixMilli())
		if err != nil {
			return fmt.Errorf("store outputs: %w", err)
		}
		return nil
	})
}

// complete fills in what must be the same in every delivery, as the bus would.
func complete(out *event.Event, service string, in event.Event, now time.Time) {
	if out.Source() == "" {
		out.SetSource("/services/" + service)
	}
	if out.ID() == "" {
		out.SetID(contracts.OutputID(service, in.Source(), in.ID(), out.Type(), out.Subject()))
	}
	if out.Time().IsZero() {
		out.SetTime(now)
	}
}

func (db *DB) outputs(ctx context.Context, q querier, service string, in event.Event) ([]event.Event, error) {
	var encoded []byte
	err := q.QueryRowContext(ctx, "SELECT outputs FROM outbox WHERE service = $1 AND source = $2 AND id = $3",
		service, in.Source(), in.ID()).Scan(&encoded)
	if errors.Is(err, sql.ErrNoRows) {
		return nil, ErrNotFound
	}
	if err != nil {
		return nil, fmt.Errorf("read stored outputs: %w", err)
	}
	decoded, err := db.decoder.DecodeAll(encoded, nil)
	if err != nil {
		return nil, fmt.Errorf("stored outputs of %s: %w: %w", in.ID(), ErrCorrupt, err)
	}
	out := []event.Event{}
	if err := json.Unmarshal(decoded, &out); err != nil {
		return nil, fmt.Errorf("stored outputs of %s: %w: %w", in.ID(), ErrCorrupt, err)
	}
	return out, nil
}

func markUnavailable(err error) error {
	if outcome, _ := bus.Classify(err); outcome == bus.OutcomePermanent || outcome == bus.OutcomeLater {
		return err
	}
	if isOutage(err) {
		return bus.Unavailable(err)
	}
	return err
}

// PruneOutbox forgets outputs of inputs older than age and returns how many.
// age must be longer than Kafka can redeliver.
func (db *DB) PruneOutbox(ctx context.Context, age time.Duration) (int64, error) {
	n, err := db.deleteInBatches(ctx, `DELETE FROM outbox WHERE (service, source, id) IN
		(SELECT service, source, id FROM outbox WHERE created_at < $1 LIMIT $2)`, time.Now().Add(-age).UnixMilli())
	if err != nil {
		return n, fmt.Errorf("prune the outbox: %w", err)
	}
	return n, nil
}

// deleteInBatches runs a DELETE of the rows older than cutoff ($1, Unix
// milliseconds), at most $2 of them, until none is left.
func (db *DB) deleteInBatches(ctx context.Context, query string, cutoff int64) (int64, error) {
	var total int64
	for {
		result, err := db.ExecContext(ctx, query, cutoff, pruneBatch)
		if err != nil {
			return total, err
		}
		n, err := result.RowsAffected()
		if err != nil {
			return total, err
		}
		total += n
		if n < pruneBatch {
			return total, nil
		}
	}
}
