package intake

import (
	"context"
	"errors"
	"log/slog"
	"net/http"
	"reflect"
	"sync/atomic"
	"testing"
	"time"

	"github.com/tidewaiter/tidewaiter/contracts"
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
		bytes: 1, events: 2, published: 3, ignored: 4, duplicates: 5, dead: 6, overQuota: 7, filtered: 8,
		trouble: "a quota", subjects: []string{"r.example/a:1", "r.example/b:1"},
	}
	for range 2*recordBatch + 1 {
		r.record(want)
	}
	stop()
	if n := rows(t, db); n != 2*recordBatch+1 {
		t.Errorf("%d rows, want %d", n, 2*recordBatch+1)
	}
	listed, err := listDeliveries(t.Context(), db, deliveryQuery{limit: 1})
	if err != nil || len(listed.Deliveries) != 1 {
		t.Fatalf("got %+v, %v", listed, err)
	}
	got := listed.Deliveries[0]
	if len(got.ID) < 20 {
		t.Errorf("id %q", got.ID)
	}
	got.ID = ""
	stored := reasonOf(reasonStored)
	expected := contracts.Delivery{
		Time: at, Calls: 1, Source: "s", Status: http.StatusAccepted, Reason: reasonStored, Means: stored.Means, Action: stored.Do,
		Trouble: "a quota", DeliveryID: "d", Bytes: 1, Events: 2, Published: 3, Ignored: 4, Duplicates: 5, Dead: 6, OverQuota: 7,
		Filtered: 8, Subjects: want.subjects,
	}
	if !reflect.DeepEqual(got, expected) {
		t.Errorf("got %+v, want %+v", got, expected)
	}
}

func TestOldDeliveriesAreForgotten(t *testing.T) {
	db := opened(t)
	now := time.Now()
	if err := write(t.Context(), db, []delivery{{source: "old", received: now.Add(-2 * time.Hour)}, {source: "new", received: now}}, nil); err != nil {
		t.Fatal(err)
	}
	r := newRecorder(time.Hour, nil, nil, slog.New(slog.DiscardHandler))
	r.prune(t.Context(), db, now)
	var source string
	if err := db.QueryRowContext(t.Context(), `SELECT source FROM intake_deliveries`).Scan(&source); err != nil || source != "new" || rows(t, db) != 1 {
		t.Errorf("got %q, %v", source, err)
	}
	if _, err := db.ExecContext(t.Context(), `UPDATE intake_hours SET hour = 0 WHERE source = 'old'`); err != nil {
		t.Fatal(err)
	}
	r.prune(t.Context(), db, now)
	if err := db.QueryRowContext(t.Context(), `SELECT source FROM intake_hours`).Scan(&source); err != nil || source != "new" {
		t.Errorf("counts: got %q, %v", source, err)
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
