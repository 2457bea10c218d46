package intake

import (
	"cmp"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"database/sql"
	"embed"
	"encoding/base32"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/tidewaiter/tidewaiter/libs/store"
)

//go:embed migrations
var migrations embed.FS

// delivery is one call, as it is remembered.
type delivery struct {
	source     string
	deliveryID string // of its first event
	received   time.Time
	status     int
	reason     string // a code, see Reasons
	trouble    string // in words; never what was presented as a proof
	bytes      int
	events     int // in the body
	published  int
	ignored    int      // ended here
	filtered   int      // left out by the source's filters
	duplicates int      // published before
	dead       int      // went to the dead letters
	overQuota  int      // went to the bulk lane because of the quota
	subjects   []string // of what was published, the first maxSubjects
}

// maxSubjects bounds how many subjects of a call are remembered.
const maxSubjects = 5

const (
	recordQueue = 8192 // deliveries that wait to be written; more are dropped and counted
	recordBatch = 500
	recordEvery = 200 * time.Millisecond
	recordRetry = time.Second
	flushWithin = 3 * time.Second
	pruneEvery  = time.Hour
	// refusedEvery is how much time one row of refused calls sums up, and
	// maxRefused how many such rows wait to be written.
	refusedEvery = 10 * time.Minute
	maxRefused   = 4096
)

// refusal is what refused calls have in common that are remembered as one.
type refusal struct {
	source, reason, trouble string
	status                  int
	window                  int64 // begin, Unix milliseconds
}

// id is the same on every replica.
func (f refusal) id() string {
	sum := sha256.Sum256(fmt.Appendf(nil, "%q %q %q %d %d", f.source, f.reason, f.trouble, f.status, f.window))
	return base32.StdEncoding.EncodeToString(sum[:])[:26]
}

// tally counts calls.
type tally struct {
	calls       int
	first, last time.Time
}

func (t tally) add(o tally) tally {
	if t.calls == 0 {
		return o
	}
	if o.first.Before(t.first) {
		t.first = o.first
	}
	if o.last.After(t.last) {
		t.last = o.last
	}
	t.calls += o.calls
	return t
}

// recorder writes deliveries to the database, away from the requests: a call is
// answered whether or not the database works.
type recorder struct {
	queue   chan delivery
	keep    time.Duration
	open    func(context.Context) (*store.DB, error)
	dropped func()
	log     *slog.Logger
	db      atomic.Pointer[store.DB] // nil until it is open

	mu      sync.Mutex
	refused map[refusal]tally // not yet written
}

func newRecorder(keep time.Duration, open func(context.Context) (*store.DB, error), dropped func(), log *slog.Logger) *recorder {
	return &recorder{
		queue: make(chan delivery, recordQueue), keep: keep, open: open, dropped: dropped, log: log,
		refused: map[refusal]tally{},
	}
}

// record hands a delivery over; it never waits.
func (r *recorder) record(d delivery) {
	select {
	case r.queue <- d:
	default:
		r.dropped()
	}
}

// refuse counts a call that did not prove itself. Anybody can make such calls,
// so they cost a row each refusedEvery and not one each.
func (r *recorder) refuse(d delivery) {
	key := refusal{d.source, d.reason, d.trouble, d.status, d.received.Truncate(refusedEvery).UnixMilli()}
	r.keepRefused(map[refusal]tally{key: {1, d.received, d.received}})
}

func (r *recorder) keepRefused(more map[refusal]tally) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for key, t := range more {
		before, ok := r.refused[key]
		if !ok && len(r.refused) >= maxRefused {
			r.dropped()
			continue
		}
		r.refused[key] = before.add(t)
	}
}

func (r *recorder) takeRefused() map[refusal]tally {
	r.mu.Lock()
	defer r.mu.Unlock()
	taken := r.refused
	r.refused = map[refusal]tally{}
	return taken
}

// run writes until ctx ends, then what is queued.
func (r *recorder) run(ctx context.Context) {
	db := r.connect(ctx)
	if db == nil {
		return
	}
	r.db.Store(db)
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
		refused := r.takeRefused()
		if err := write(ctx, db, batch, refused); err != nil {
			r.log.WarnContext(ctx, "deliveries cannot be recorded", "error", err)
			r.keepRefused(refused)
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
	if err := write(ctx, db, batch, r.takeRefused()); err != nil {
		r.log.WarnContext(ctx, "last deliveries were not recorded", "error", err, "count", len(batch))
	}
}

func (r *recorder) prune(ctx context.Context, db *store.DB, now time.Time) {
	before := now.Add(-r.keep).UnixMilli()
	for _, query := range []string{
		`DELETE FROM intake_deliveries WHERE received_at < $1`,
		`DELETE FROM intake_hours WHERE hour < $1`,
	} {
		if _, err := db.ExecContext(ctx, query, before); err != nil {
			r.log.WarnContext(ctx, "old deliveries cannot be deleted", "error", err)
		}
	}
}

// write stores deliveries and refused calls, and counts both.
func write(ctx context.Context, db *store.DB, batch []delivery, refused map[refusal]tally) error {
	if len(batch)+len(refused) == 0 {
		return nil
	}
	err := db.Tx(ctx, func(tx *sql.Tx) error {
		hours := map[hour]tally{}
		if err := insert(ctx, tx, batch, hours); err != nil {
			return err
		}
		if err := sumUp(ctx, tx, refused, hours); err != nil {
			return err
		}
		return countHours(ctx, tx, hours)
	})
	if err != nil {
		return fmt.Errorf("write %d deliveries and %d sums of refused calls: %w", len(batch), len(refused), err)
	}
	return nil
}

func insert(ctx context.Context, tx *sql.Tx, batch []delivery, hours map[hour]tally) error {
	stmt, err := tx.PrepareContext(ctx, `INSERT INTO intake_deliveries (id, source, delivery_id, received_at, status, reason,
		bytes, events, published, ignored, filtered, duplicates, dead, over_quota, trouble, subjects)
		VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16)`)
	if err != nil {
		return fmt.Errorf("prepare: %w", err)
	}
	defer func() { _ = stmt.Close() }() // the transaction's end closes it anyway
	for _, d := range batch {
		_, err := stmt.ExecContext(ctx, rand.Text(), d.source, d.deliveryID, d.received.UnixMilli(), d.status, d.reason,
			d.bytes, d.events, d.published, d.ignored, d.filtered, d.duplicates, d.dead, d.overQuota, d.trouble,
			strings.Join(d.subjects, "\n"))
		if err != nil {
			return fmt.Errorf("insert: %w", err)
		}
		key := hourOf(d.source, d.reason, d.received)
		hours[key] = hours[key].add(tally{1, d.received, d.received})
	}
	return nil
}

// sumUp adds refused calls to the rows that stand for them, in one order on
// every replica, so that replicas do not block each other.
func sumUp(ctx context.Context, tx *sql.Tx, refused map[refusal]tally, hours map[hour]tally) error {
	keys := slices.SortedFunc(maps.Keys(refused), func(a, b refusal) int { return cmp.Compare(a.id(), b.id()) })
	for _, f := range keys {
		t := refused[f]
		_, err := tx.ExecContext(ctx, `INSERT INTO intake_deliveries (id, source, delivery_id, received_at, status, reason,
			bytes, events, published, ignored, duplicates, dead, over_quota, trouble, calls, first_at)
			VALUES ($1, $2, '', $3, $4, $5, 0, 0, 0, 0, 0, 0, 0, $6, $7, $8)
			ON CONFLICT (id) DO UPDATE SET calls = intake_deliveries.calls + excluded.calls,
				received_at = CASE WHEN excluded.received_at > intake_deliveries.received_at
					THEN excluded.received_at ELSE intake_deliveries.received_at END,
				first_at = CASE WHEN excluded.first_at < intake_deliveries.first_at
					THEN excluded.first_at ELSE intake_deliveries.first_at END`,
			f.id(), f.source, t.last.UnixMilli(), f.status, f.reason, f.trouble, t.calls, t.first.UnixMilli())
		if err != nil {
			return fmt.Errorf("sum up refused calls: %w", err)
		}
		key := hourOf(f.source, f.reason, t.last)
		hours[key] = hours[key].add(t)
	}
	return nil
}

// hour is what calls are counted by.
type hour struct {
	source, reason string
	begin          int64 // Unix milliseconds
}

func hourOf(source, reason string, at time.Time) hour {
	return hour{source, reason, at.Truncate(time.Hour).UnixMilli()}
}

func countHours(ctx context.Context, tx *sql.Tx, hours map[hour]tally) error {
	keys := slices.SortedFunc(maps.Keys(hours), func(a, b hour) int {
		return cmp.Or(cmp.Compare(a.source, b.source), cmp.Compare(a.reason, b.reason), cmp.Compare(a.begin, b.begin))
	})
	for _, h := range keys {
		_, err := tx.ExecContext(ctx, `INSERT INTO intake_hours (source, reason, hour, calls, last_at) VALUES ($1, $2, $3, $4, $5)
			ON CONFLICT (source, reason, hour) DO UPDATE SET calls = intake_hours.calls + excluded.calls,
				last_at = CASE WHEN excluded.last_at > intake_hours.last_at THEN excluded.last_at ELSE intake_hours.last_at END`,
			h.source, h.reason, h.begin, hours[h].calls, hours[h].last.UnixMilli())
		if err != nil {
			return fmt.Errorf("count: %w", err)
		}
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
