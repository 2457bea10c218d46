package store_test

import (
	"bytes"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"sync"
	"testing"
	"testing/fstest"
	"time"

	"github.com/cloudevents/sdk-go/v2/event"
	"go.uber.org/goleak"
	"pgregory.net/rapid"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/bus"
	"github.com/tidewaiter/tidewaiter/libs/store"
	"github.com/tidewaiter/tidewaiter/libs/store/storetest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func tables() fstest.MapFS {
	return fstest.MapFS{
		"00001_counters.sql": {Data: []byte("-- +goose Up\nCREATE TABLE test_counters (name TEXT PRIMARY KEY, n BIGINT NOT NULL);\n")},
	}
}

func input(id string) event.Event {
	ev := event.New()
	ev.SetID(id)
	ev.SetSource("/services/planner")
	ev.SetType(contracts.TypePrefix + contracts.ImagePlannedV1)
	return ev
}

func output(t testing.TB, subject string) event.Event {
	t.Helper()
	ev, err := bus.NewEvent(contracts.ImageAssembledV1, subject, map[string]any{"n": 1, "html": "<&>", "big": uint64(1) << 60})
	if err != nil {
		t.Fatal(err)
	}
	ev.SetExtension(contracts.ExtLane, contracts.LaneBulk)
	return ev
}

func counter(t testing.TB, db *store.DB, name string) int64 {
	t.Helper()
	var n int64
	err := db.QueryRowContext(t.Context(), "SELECT n FROM test_counters WHERE name = $1", name).Scan(&n)
	if err != nil && !errors.Is(err, sql.ErrNoRows) {
		t.Fatal(err)
	}
	return n
}

const increment = "INSERT INTO test_counters (name, n) VALUES ($1, 1) ON CONFLICT (name) DO UPDATE SET n = test_counters.n + 1"

func TestOnceAppliesOnceAndRepeatsItsOutputs(t *testing.T) {
	db := storetest.Open(t)
	ctx := t.Context()
	if err := db.Migrate(ctx, "assembler", tables()); err != nil {
		t.Fatal(err)
	}
	apply := func(ctx context.Context, tx *sql.Tx) ([]event.Event, error) {
		_, err := tx.ExecContext(ctx, increment, "a")
		return []event.Event{output(t, "s1"), output(t, "s2")}, err
	}
	first, err := db.Once(ctx, "assembler", input("1"), apply)
	if err != nil {
		t.Fatal(err)
	}
	again, err := db.Once(ctx, "assembler", input("1"), apply)
	if err != nil {
		t.Fatal(err)
	}
	if len(first) != 2 || len(again) != 2 {
		t.Fatalf("outputs: %d and %d, want 2 and 2", len(first), len(again))
	}
	for i := range first {
		if first[i].Time().IsZero() {
			t.Errorf("output %d has no time", i)
		}
		if first[i].String() != again[i].String() {
			t.Errorf("output %d differs:\n%s\n%s", i, first[i], again[i])
		}
		if !bytes.Equal(first[i].Data(), again[i].Data()) {
			t.Errorf("data of output %d: %s and %s", i, first[i].Data(), again[i].Data())
		}
	}
	if n := counter(t, db, "a"); n != 1 {
		t.Errorf("applied %d times, want once", n)
	}
	// Another service, and another input, are on their own.
	if _, err := db.Once(ctx, "catalog", input("1"), apply); err != nil {
		t.Fatal(err)
	}
	if _, err := db.Once(ctx, "assembler", input("2"), apply); err != nil {
		t.Fatal(err)
	}
	if n := counter(t, db, "a"); n != 3 {
		t.Errorf("applied %d times, want 3", n)
	}
}

func TestOnceRollsBack(t *testing.T) {
	db := storetest.Open(t)
	ctx := t.Context()
	if err := db.Migrate(ctx, "assembler", tables()); err != nil {
		t.Fatal(err)
	}
	failure := errors.New("no such layer")
	_, err := db.Once(ctx, "assembler", input("1"), func(ctx context.Context, tx *sql.Tx) ([]event.Event, error) {
		if _, err := tx.ExecContext(ctx, increment, "a"); err != nil {
			return nil, err
		}
		if _, err := db.PutBlob(ctx, []byte("rolled back")); err != nil {
			return nil, err
		}
		return nil, failure
	})
	if !errors.Is(err, failure) || store.IsUnavailable(err) {
		t.Fatalf("got %v, want the error of apply as it was", err)
	}
	if n := counter(t, db, "a"); n != 0 {
		t.Errorf("counter is %d after a rollback", n)
	}
	if has, err := db.HasBlob(ctx, contracts.DigestOf([]byte("rolled back"))); err != nil || has {
		t.Errorf("blob of a rolled back transaction: %v, %v", has, err)
	}
	out, err := db.Once(ctx, "assembler", input("1"), func(ctx context.Context, tx *sql.Tx) ([]event.Event, error) {
		_, err := db.PutBlob(ctx, []byte("kept"))
		return nil, err
	})
	if err != nil || len(out) != 0 {
		t.Fatalf("got %v, %v after the failure", out, err)
	}
	if got, err := db.Blob(ctx, contracts.DigestOf([]byte("kept"))); err != nil || string(got) != "kept" {
		t.Errorf("blob: %q, %v", got, err)
	}
}

// Several services, each with a handle of its own on the same database, all
// writing at once: nothing is lost and nobody is told that it is busy.
func TestManyHandlesWriteAtOnce(t *testing.T) {
	url := storetest.URL(t)
	const services, inputs = 6, 30
	var wg sync.WaitGroup
	handles := make([]*store.DB, services)
	for i := range handles {
		handles[i] = storetest.OpenURL(t, url)
	}
	for _, db := range handles {
		if err := db.Migrate(t.Context(), "test", tables()); err != nil {
			t.Fatal(err)
		}
	}
	for s, db := range handles {
		for worker := range 2 { // both get every input: they compete for it
			wg.Go(func() {
				for i := range inputs {
					_, err := db.Once(t.Context(), fmt.Sprintf("service%d", s), input(fmt.Sprint(i)),
						func(ctx context.Context, tx *sql.Tx) ([]event.Event, error) {
							var n int64
							err := tx.QueryRowContext(ctx, "SELECT n FROM test_counters WHERE name = 'all'").Scan(&n)
							if errors.Is(err, sql.ErrNoRows) {
								_, err = tx.ExecContext(ctx, "INSERT INTO test_counters (name, n) VALUES ('all', 1)")
								return []event.Event{output(t, "s")}, err
							}
							if err != nil {
								return nil, err
							}
							// Read, then write: only right if transactions are serialisable.
							_, err = tx.ExecContext(ctx, "UPDATE test_counters SET n = $1 WHERE name = 'all'", n+1)
							return []event.Event{output(t, "s")}, err
						})
					if err != nil {
						t.Errorf("service %d worker %d input %d: %v", s, worker, i, err)
					}
				}
			})
		}
		wg.Go(func() {
			for i := range inputs {
				if _, err := db.PutBlob(t.Context(), bytes.Repeat([]byte{byte(i)}, 20_000)); err != nil {
					t.Errorf("put: %v", err)
				}
			}
		})
	}
	wg.Wait()
	if n := counter(t, handles[0], "all"); n != services*inputs {
		t.Errorf("counter is %d, want %d", n, services*inputs)
	}
}

func TestBlobs(t *testing.T) {
	db := storetest.Open(t)
	ctx := t.Context()
	for name, content := range map[string][]byte{
		"empty": {}, "text": []byte("layer report"), "packs well": bytes.Repeat([]byte("a"), 1<<20),
	} {
		t.Run(name, func(t *testing.T) {
			digest, err := db.PutBlob(ctx, content)
			if err != nil {
				t.Fatal(err)
			}
			if want := contracts.DigestOf(content); digest != want {
				t.Errorf("digest %s, want %s", digest, want)
			}
			if again, err := db.PutBlob(ctx, content); err != nil || again != digest {
				t.Errorf("put again: %s, %v", again, err)
			}
			got, err := db.Blob(ctx, digest)
			if err != nil || !bytes.Equal(got, content) {
				t.Errorf("got %d bytes, %v; want %d", len(got), err, len(content))
			}
			if has, err := db.HasBlob(ctx, digest); err != nil || !has {
				t.Errorf("HasBlob: %v, %v", has, err)
			}
		})
	}
	missing := contracts.DigestOf([]byte("missing"))
	if _, err := db.Blob(ctx, missing); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("missing blob: %v", err)
	}
	if has, err := db.HasBlob(ctx, missing); err != nil || has {
		t.Errorf("HasBlob of a missing one: %v, %v", has, err)
	}
}

func TestBlobProperties(t *testing.T) {
	db := storetest.Open(t)
	rapid.Check(t, func(rt *rapid.T) {
		part := rapid.SliceOfN(rapid.Byte(), 0, 1000).Draw(rt, "part")
		content := bytes.Repeat(part, rapid.IntRange(0, 50).Draw(rt, "times"))
		digest, err := db.PutBlob(t.Context(), content)
		if err != nil || digest != contracts.DigestOf(content) {
			rt.Fatalf("put: %s, %v", digest, err)
		}
		if got, err := db.Blob(t.Context(), digest); err != nil || !bytes.Equal(got, content) {
			rt.Fatalf("got %d bytes, %v; want %d", len(got), err, len(content))
		}
	})
}

func TestCorruptBlobIsFoundAndRepaired(t *testing.T) {
	db := storetest.Open(t)
	ctx := t.Context()
	good, err := db.PutBlob(ctx, []byte("good"))
	if err != nil {
		t.Fatal(err)
	}
	other, err := db.PutBlob(ctx, []byte("other"))
	if err != nil {
		t.Fatal(err)
	}
	for name, damage := range map[string]string{
		"other content": "UPDATE blobs SET content = (SELECT content FROM blobs WHERE digest = '" + other + "') WHERE digest = $1",
		"not zstd":      "UPDATE blobs SET content = '" + "abc" + "' WHERE digest = $1",
	} {
		if _, err := db.ExecContext(ctx, damage, good); err != nil {
			t.Fatal(err)
		}
		if _, err := db.Blob(ctx, good); !errors.Is(err, store.ErrCorrupt) {
			t.Errorf("%s: got %v, want ErrCorrupt", name, err)
		}
		if _, err := db.PutBlob(ctx, []byte("good")); err != nil {
			t.Errorf("%s: put again: %v", name, err)
		}
		if got, err := db.Blob(ctx, good); err != nil || string(got) != "good" {
			t.Errorf("%s: after repair %q, %v", name, got, err)
		}
	}
}

// A blob whose age is renewed while it is being expired stays.
func TestExpiryMeetsARenewal(t *testing.T) {
	db := storetest.Open(t)
	if db.Dialect != store.Postgres {
		t.Skip("SQLite has one writer at a time; " + storetest.Env + " names a PostgreSQL")
	}
	ctx := t.Context()
	kept, err := db.PutBlob(ctx, []byte("kept"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := db.ExecContext(ctx, "UPDATE blobs SET touched_at = 0"); err != nil {
		t.Fatal(err)
	}
	renewal, err := db.BeginTx(ctx, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer renewal.Rollback()
	if _, err := renewal.ExecContext(ctx, "UPDATE blobs SET touched_at = $1", time.Now().UnixMilli()); err != nil {
		t.Fatal(err)
	}
	type result struct {
		n   int64
		err error
	}
	expired := make(chan result, 1)
	go func() {
		n, err := db.ExpireBlobs(ctx, time.Hour)
		expired <- result{n, err}
	}()
	for waits := 0; waits == 0; time.Sleep(time.Millisecond) { // until it meets the renewal
		select {
		case r := <-expired:
			t.Fatalf("it did not wait: %d, %v", r.n, r.err)
		default:
		}
		err := db.QueryRowContext(ctx, `SELECT count(*) FROM pg_stat_activity
			WHERE datname = current_database() AND wait_event_type = 'Lock' AND query LIKE 'DELETE FROM blobs%'`).Scan(&waits)
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := renewal.Commit(); err != nil {
		t.Fatal(err)
	}
	if r := <-expired; r.n != 0 || r.err != nil {
		t.Errorf("expired %d, %v; want none", r.n, r.err)
	}
	if _, err := db.Blob(ctx, kept); err != nil {
		t.Error(err)
	}
}

func TestExpiry(t *testing.T) {
	db := storetest.Open(t)
	ctx := t.Context()
	old := func(table, column string) {
		t.Helper()
		if _, err := db.ExecContext(ctx, "UPDATE "+table+" SET "+column+" = "+column+" - 3600000"); err != nil {
			t.Fatal(err)
		}
	}
	kept, err := db.PutBlob(ctx, []byte("kept"))
	if err != nil {
		t.Fatal(err)
	}
	dropped, err := db.PutBlob(ctx, []byte("dropped"))
	if err != nil {
		t.Fatal(err)
	}
	old("blobs", "touched_at")
	if err := db.TouchBlobs(ctx, kept, contracts.DigestOf([]byte("missing"))); err != nil {
		t.Fatal(err)
	}
	if n, err := db.ExpireBlobs(ctx, 30*time.Minute); err != nil || n != 1 {
		t.Errorf("expired %d, %v; want 1", n, err)
	}
	if has, err := db.HasBlob(ctx, dropped); err != nil || has {
		t.Errorf("expired blob is there: %v, %v", has, err)
	}
	if _, err := db.Blob(ctx, kept); err != nil {
		t.Errorf("touched blob: %v", err)
	}

	applied := 0
	apply := func(context.Context, *sql.Tx) ([]event.Event, error) { applied++; return nil, nil }
	for range 2 {
		if _, err := db.Once(ctx, "test", input("1"), apply); err != nil {
			t.Fatal(err)
		}
	}
	old("outbox", "created_at")
	if _, err := db.Once(ctx, "test", input("2"), apply); err != nil {
		t.Fatal(err)
	}
	if n, err := db.PruneOutbox(ctx, 30*time.Minute); err != nil || n != 1 {
		t.Errorf("pruned %d, %v; want 1", n, err)
	}
	for _, id := range []string{"1", "2"} {
		if _, err := db.Once(ctx, "test", input(id), apply); err != nil {
			t.Fatal(err)
		}
	}
	if applied != 3 {
		t.Errorf("applied %d times, want 3: the pruned input again", applied)
	}
}
