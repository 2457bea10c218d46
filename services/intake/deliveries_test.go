package intake

import (
	"context"
	"errors"
	"log/slog"
	"net/http"
	"sync/atomic"
	"testing"
	"time"

	"github.com/tidewaiter/tidewaiter/libs/store"
	"github.com/tidewaiter/tidewaiter/libs/store/storetest"
)

// eventually waits until cond holds.
func eventually(t testing.TB, what string, cond func() bool) {
	t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	for !cond() {
		if time.Now().After(deadline) {
			t.Fatalf("still not: %s", what)
		}
		time.Sleep(5 * time.Millisecond) // between two looks
	}
}

// recording starts a recorder; stop ends it when it has written everything.
func recording(t *testing.T, r *recorder) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		r.run(ctx)
	}()
	return func() {
		cancel()
		<-done
	}
}

func opened(t *testing.T) *store.DB {
	t.Helper()
	db := storetest.Open(t)
	if err := migrate(t.Context(), db); err != nil {
		t.Fatal(err)
	}
	return db
}

func rows(t *testing.T, db *store.DB) (n int) {
	t.Helper()
	if err := db.QueryRowContext(t.Context(), `SELECT count(*) FROM intake_deliveries`).Scan(&n); err != nil {
		t.Fatal(err)
	}
	return n
}

func TestDeliveriesAreRecorded(t *testing.T) {
	db := opened(t)
	r := newRecorder(time.Hour, func(context.Context) (*store.DB, error) { return db, nil },
		func() { t.Error("a delivery was dropped") }, slog.New(slog.DiscardHandler))
	stop := recording(t, r)
	at := time.Date(2026, 5, 4, 3, 2, 1, 500e6, time.UTC)
	want := delivery{
		source: "s", deliveryID: "d", received: at, status: http.StatusAccepted, reason: reasonStored,
		bytes: 1, events: 2, published: 3, ignored: 4, duplicates: 5, dead: 6, overQuota: 7,
	}
	for range 2*recordBatch + 1 {
		r.record(want)
	}
	stop()
	if n := rows(t, db); n != 2*recordBatch+1 {
		t.Errorf("%d rows, want %d", n, 2*recordBatch+1)
	}
	var got delivery
	var received int64
	err := db.QueryRowContext(t.Context(), `SELECT source, delivery_id, received_at, status, reason, bytes, events, published,
		ignored, duplicates, dead, over_quota FROM intake_deliveries LIMIT 1`).Scan(&got.source, &got.deliveryID, &received,
		&got.status, &got.reason, &got.bytes, &got.events, &got.published, &got.ignored, &got.duplicates, &got.dead, &got.overQuota)
	if err != nil {
		t.Fatal(err)
	}
	got.received = time.UnixMilli(received).UTC()
	if got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
}

func TestOldDeliveriesAreForgotten(t *testing.T) {
	db := opened(t)
	now := time.Now()
	if err := write(t.Context(), db, []delivery{{source: "old", received: now.Add(-2 * time.Hour)}, {source: "new", received: now}}); err != nil {
		t.Fatal(err)
	}
	r := newRecorder(time.Hour, nil, nil, slog.New(slog.DiscardHandler))
	r.prune(t.Context(), db, now)
	var source string
	if err := db.QueryRowContext(t.Context(), `SELECT source FROM intake_deliveries`).Scan(&source); err != nil || source != "new" || rows(t, db) != 1 {
		t.Errorf("got %q, %v", source, err)
	}
}

// TestDatabaseThatComesLate: calls are answered without it and remembered when it is there.
func TestDatabaseThatComesLate(t *testing.T) {
	db := opened(t)
	var there atomic.Bool
	asked := make(chan struct{}, 100)
	open := func(context.Context) (*store.DB, error) {
		select {
		case asked <- struct{}{}:
		default:
		}
		if !there.Load() {
			return nil, errors.New("no database")
		}
		return db, nil
	}
	r := newRecorder(time.Hour, open, func() { t.Error("a delivery was dropped") }, slog.New(slog.DiscardHandler))
	stop := recording(t, r)
	<-asked
	s, m := start(t, openSource())
	s.record = r.record
	if w := call(s, http.MethodPost, "/hooks/s", nil, push("1", "a", "1")); w.Code != http.StatusAccepted || len(m.events) != 1 {
		t.Errorf("got %d and %d events without a database, want 202 and 1", w.Code, len(m.events))
	}
	there.Store(true)
	eventually(t, "the delivery is recorded", func() bool { return rows(t, db) == 1 })
	stop()
}

// TestQueueIsBounded: without a database memory does not grow without end.
func TestQueueIsBounded(t *testing.T) {
	dropped := 0
	r := newRecorder(time.Hour, nil, func() { dropped++ }, slog.New(slog.DiscardHandler))
	for range recordQueue + 3 {
		r.record(delivery{})
	}
	if dropped != 3 || len(r.queue) != recordQueue {
		t.Errorf("%d dropped and %d queued", dropped, len(r.queue))
	}
	dropped = 0
	if kept := r.bound(make([]delivery, recordQueue+2)); len(kept) != recordQueue || dropped != 2 {
		t.Errorf("%d kept, %d dropped", len(kept), dropped)
	}
}
