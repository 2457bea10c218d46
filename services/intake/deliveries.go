package intake

import (
	"context"
	"crypto/rand"
	"database/sql"
	"embed"
	"fmt"
	"io/fs"
	"log/slog"
	"sync"
	"time"

	"github.com/tidewaiter/tidewaiter/libs/store"
)

//go:embed migrations
var migrations embed.FS

// delivery is one authenticated call, as it is remembered.
type delivery struct {
	source     string
	deliveryID string // of its first event
	received   time.Time
	status     int
	reason     string // a code, see the constants
	bytes      int
	events     int // in the body
	published  int
	ignored    int // ended here
	duplicates int // published before
	dead       int // went to the dead letters
	overQuota  int // went to the bulk lane because of the quota
}

// Reason codes of deliveries.
const (
	reasonStored     = "stored"
	reasonIgnored    = "ignored"
	reasonDuplicate  = "duplicate"
	reasonUnreadable = "unreadable"
	reasonIncomplete = "incomplete"
	reasonNotStored  = "not-stored"
	reasonTooLarge   = "too-large"
	reasonHandshake  = "handshake"
)

const (
	recordQueue = 8192 // deliveries that wait to be written; more are dropped and counted
	recordBatch = 500
	recordEvery = 200 * time.Millisecond
	recordRetry = time.Second
	flushWithin = 3 * time.Second
	pruneEvery  = time.Hour
)

// recorder writes deliveries to the database, away from the requests: a call is
// answered whether or not the database works.
type recorder struct {
	queue   chan delivery
	keep    time.Duration
	open    func(context.Context) (*store.DB, error)
	dropped func()
	log     *slog.Logger
}

func newRecorder(keep time.Duration, open func(context.Context) (*store.DB, error), dropped func(), log *slog.Logger) *recorder {
	return &recorder{queue: make(chan delivery, recordQueue), keep: keep, open: open, dropped: dropped, log: log}
}

// record hands a delivery over; it never waits.
func (r *recorder) record(d delivery) {
	select {
	case r.queue <- d:
	default:
		r.dropped()
	}
}

// run writes until ctx ends, then what is queued.
func (r *recorder) run(ctx context.Context) {
	db := r.connect(ctx)
	if db == nil {
		return
	}
	ticker := time.NewTicker(recordEvery)
	defer ticker.Stop()
	var batch []delivery
	var nextPrune, nextTry time.Time
	for {
		select {
		case <-ctx.Done():
			r.flush(context.WithoutCancel(ctx), db, batch)
			return
		case d := <-r.queue:
			batch = append(batch, d)
			if len(batch) < recordBatch {
				continue
			}
		case <-ticker.C:
		}
		now := time.Now()
		if now.Before(nextTry) {
			batch = r.bound(batch)
			continue
		}
		if err := write(ctx, db, batch); err != nil {
			r.log.WarnContext(ctx, "deliveries cannot be recorded", "error", err)
			nextTry = now.Add(recordRetry)
			continue
		}
		batch = batch[:0]
		if now.After(nextPrune) {
			nextPrune = now.Add(pruneEvery)
			r.prune(ctx, db, now)
		}
	}
}

// bound drops the oldest of what could not be written for long.
func (r *recorder) bound(batch []delivery) []delivery {
	for len(batch) > recordQueue {
		batch = batch[1:]
		r.dropped()
	}
	return batch
}

func (r *recorder) connect(ctx context.Context) *store.DB {
	for {
		db, err := r.open(ctx)
		if err == nil {
			return db
		}
		r.log.WarnContext(ctx, "database of deliveries cannot be opened", "error", err)
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(recordRetry):
		}
	}
}

func (r *recorder) flush(ctx context.Context, db *store.DB, batch []delivery) {
	ctx, cancel := context.WithTimeout(ctx, flushWithin)
	defer cancel()
	for {
		select {
		case d := <-r.queue:
			batch = append(batch, d)
			continue
		default:
		}
		break
	}
	if err := write(ctx, db, batch); err != nil {
		r.log.WarnContext(ctx, "last deliveries were not recorded", "error", err, "count", len(batch))
	}
}

func (r *recorder) prune(ctx context.Context, db *store.DB, now time.Time) {
	_, err := db.ExecContext(ctx, `DELETE FROM intake_deliveries WHERE received_at < $1`, now.Add(-r.keep).UnixMilli())
	if err != nil {
		r.log.WarnContext(ctx, "old deliveries cannot be deleted", "error", err)
	}
}

func write(ctx context.Context, db *store.DB, batch []delivery) error {
	if len(batch) == 0 {
		return nil
	}
	err := db.Tx(ctx, func(tx *sql.Tx) error {
		stmt, err := tx.PrepareContext(ctx, `INSERT INTO intake_deliveries
			(id, source, delivery_id, received_at, status, reason, bytes, events, published, ignored, duplicates, dead, over_quota)
			VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13)`)
		if err != nil {
			return fmt.Errorf("prepare: %w", err)
		}
		defer func() { _ = stmt.Close() }() // the transaction's end closes it anyway
		for _, d := range batch {
			_, err := stmt.ExecContext(ctx, rand.Text(), d.source, d.deliveryID, d.received.UnixMilli(), d.status, d.reason,
				d.bytes, d.events, d.published, d.ignored, d.duplicates, d.dead, d.overQuota)
			if err != nil {
				return fmt.Errorf("insert: %w", err)
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("write %d deliveries: %w", len(batch), err)
	}
	return nil
}

// migrate opens the tables.
func migrate(ctx context.Context, db *store.DB) error {
	files, err := fs.Sub(migrations, "migrations")
	if err != nil {
		return fmt.Errorf("embedded migrations: %w", err)
	}
	if err := db.Migrate(ctx, "intake", files); err != nil {
		return fmt.Errorf("migrate: %w", err)
	}
	return nil
}

// seen remembers the ids of events that were published, the newest ones, so
// that a delivery that comes again is not published again. It is only a saving:
// an id that was forgotten is published twice, and whoever consumes it knows it.
type seen struct {
	mu       sync.Mutex
	limit    int
	new, old map[string]struct{}
}

func newSeen(limit int) *seen {
	return &seen{limit: limit / 2, new: map[string]struct{}{}}
}

func (s *seen) has(id string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := s.new[id]; ok {
		return true
	}
	_, ok := s.old[id]
	return ok
}

func (s *seen) add(id string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.new) >= s.limit {
		s.old, s.new = s.new, make(map[string]struct{}, s.limit)
	}
	s.new[id] = struct{}{}
}
