package store_test

import (
	"context"
	"database/sql"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cloudevents/sdk-go/v2/event"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/tidewaiter/tidewaiter/libs/bus"
	"github.com/tidewaiter/tidewaiter/libs/store"
	"github.com/tidewaiter/tidewaiter/libs/store/storetest"
)

func openSQLite(t *testing.T) *store.DB {
	t.Helper()
	return storetest.OpenURL(t, "sqlite://"+filepath.Join(t.TempDir(), "test.db"))
}

func mustExec(t *testing.T, db *store.DB, query string) {
	t.Helper()
	if _, err := db.ExecContext(t.Context(), query); err != nil {
		t.Fatal(err)
	}
}

// wantUnavailable checks that err is an outage, and that Once says so to the bus.
func wantUnavailable(t *testing.T, db *store.DB) {
	t.Helper()
	if _, err := db.PutBlob(t.Context(), make([]byte, 1)); !store.IsUnavailable(err) {
		t.Errorf("PutBlob: %v is no outage", err)
	}
	_, err := db.Once(t.Context(), "test", input("1"), func(ctx context.Context, tx *sql.Tx) ([]event.Event, error) {
		_, err := tx.ExecContext(ctx, "INSERT INTO blobs (digest, size, touched_at, content) VALUES ('x', 1, 1, $1)", make([]byte, 1<<20))
		return nil, err
	})
	if outcome, _ := bus.Classify(err); outcome != bus.OutcomeUnavailable {
		t.Errorf("Once: outcome %v of %v", outcome, err)
	}
}

func TestFullDisk(t *testing.T) {
	db := openSQLite(t)
	db.SetMaxOpenConns(1) // the limit belongs to a connection
	mustExec(t, db, "PRAGMA max_page_count = 1")
	_, err := db.Once(t.Context(), "test", input("1"), func(ctx context.Context, tx *sql.Tx) ([]event.Event, error) {
		_, err := tx.ExecContext(ctx, "INSERT INTO blobs (digest, size, touched_at, content) VALUES ('x', 1, 1, $1)", make([]byte, 1<<20))
		return nil, err
	})
	if outcome, _ := bus.Classify(err); outcome != bus.OutcomeUnavailable || !store.IsUnavailable(err) {
		t.Errorf("outcome %v of %v", outcome, err)
	}
	mustExec(t, db, "PRAGMA max_page_count = 1000000")
	if _, err := db.Once(t.Context(), "test", input("1"), func(context.Context, *sql.Tx) ([]event.Event, error) { return nil, nil }); err != nil {
		t.Errorf("after there is room again: %v", err)
	}
}

func TestReadOnly(t *testing.T) {
	db := openSQLite(t)
	db.SetMaxOpenConns(1)
	mustExec(t, db, "PRAGMA query_only = 1")
	wantUnavailable(t, db)
	mustExec(t, db, "PRAGMA query_only = 0")
	if _, err := db.PutBlob(t.Context(), []byte("x")); err != nil {
		t.Errorf("after it is writable again: %v", err)
	}
}

func TestClosed(t *testing.T) {
	db, err := store.Open(t.Context(), storetest.URL(t))
	if err != nil {
		t.Fatal(err)
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	wantUnavailable(t, db)
}

func TestOpenFails(t *testing.T) {
	dir := t.TempDir()
	damaged := filepath.Join(dir, "damaged.db")
	if err := os.WriteFile(damaged, []byte(strings.Repeat("this is no database ", 1000)), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(dir, "folder"), 0o700); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		url         string
		unavailable bool
	}{
		{"", false},
		{"mysql://localhost/x", false},
		{"sqlite://", false},
		{"sqlite:///x?mode=ro", false},
		{"postgres://%zz:hunter2@/", false},
		{"postgres://tidewaiter:hunter2@127.0.0.1:1/tidewaiter?sslmode=disable", true},
		{"sqlite://" + damaged, true},
		{"sqlite://" + filepath.Join(dir, "folder"), true},
		{"sqlite://" + filepath.Join(damaged, "below-a-file.db"), true},
	} {
		db, err := store.Open(t.Context(), test.url)
		if err == nil {
			t.Errorf("%s: opened", test.url)
			_ = db.Close()
			continue
		}
		if got := store.IsUnavailable(err); got != test.unavailable {
			t.Errorf("%s: IsUnavailable is %v for %v", test.url, got, err)
		}
		if strings.Contains(err.Error(), "hunter2") {
			t.Errorf("%s: the error holds the password: %v", test.url, err)
		}
	}
}

func TestOpenMakesTheFolderAndAPrivateFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "new folder", "100% #1.db")
	db, err := store.Open(t.Context(), "sqlite://"+path)
	if err == nil {
		t.Cleanup(func() { _ = db.Close() })
		t.Fatal("a path with # was accepted")
	}
	path = strings.ReplaceAll(path, "#", "")
	storetest.OpenURL(t, "sqlite://"+path)
	for _, file := range []string{path, path + "-wal"} {
		info, err := os.Stat(file)
		if err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", file, info, err)
		}
	}
}

func TestSync(t *testing.T) {
	path := "sqlite://" + filepath.Join(t.TempDir(), "test.db")
	for url, want := range map[string]int{path: 1, path + "?sync=full": 2} {
		var got int
		err := storetest.OpenURL(t, url).QueryRowContext(t.Context(), "PRAGMA synchronous").Scan(&got)
		if err != nil || got != want {
			t.Errorf("%s: synchronous is %d, %v; want %d", url, got, err, want)
		}
	}
}

func TestIsUnavailable(t *testing.T) {
	pg := func(code string) error { return &pgconn.PgError{Code: code} }
	for _, test := range []struct {
		name string
		err  error
		want bool
	}{
		{"nil", nil, false},
		{"some error", errors.New("no such layer"), false},
		{"cancelled", context.Canceled, false},
		{"own deadline", context.DeadlineExceeded, false},
		{"not found", store.ErrNotFound, false},
		{"no rows", sql.ErrNoRows, false},
		{"connection broke", io.ErrUnexpectedEOF, true},
		{"refused", &net.OpError{Op: "dial", Err: errors.New("refused")}, true},
		{"connection done", sql.ErrConnDone, true},
		{"disk full", pg("53100"), true},
		{"too many connections", pg("53300"), true},
		{"shutting down", pg("57P01"), true},
		{"starting up", pg("57P03"), true},
		{"statement timeout", pg("57014"), false},
		{"standby", pg("25006"), true},
		{"wrong password", pg("28P01"), true},
		{"never serialised", pg("40001"), true},
		{"duplicate key", pg("23505"), false},
		{"no such table", pg("42P01"), false},
	} {
		if got := store.IsUnavailable(test.err); got != test.want {
			t.Errorf("%s: %v, want %v", test.name, got, test.want)
		}
	}
}

// A registry that cannot be reached is not the database's outage.
func TestOtherOutagesAreNotTheDatabases(t *testing.T) {
	db := storetest.Open(t)
	elsewhere := &net.OpError{Op: "dial", Err: errors.New("connection refused")}
	_, err := db.Once(t.Context(), "test", input("1"), func(context.Context, *sql.Tx) ([]event.Event, error) { return nil, elsewhere })
	if outcome, _ := bus.Classify(err); outcome == bus.OutcomeUnavailable || !errors.Is(err, elsewhere) {
		t.Errorf("outcome %v of %v", outcome, err)
	}
	until := time.Now().Add(time.Hour)
	_, err = db.Once(t.Context(), "test", input("1"), func(context.Context, *sql.Tx) ([]event.Event, error) { return nil, bus.Later(elsewhere, until) })
	if outcome, at := bus.Classify(err); outcome != bus.OutcomeLater || !at.Equal(until) {
		t.Errorf("outcome %v at %v of %v", outcome, at, err)
	}
}

func TestBrokenConnection(t *testing.T) {
	db := storetest.Open(t)
	if db.Dialect != store.Postgres {
		t.Skip("SQLite has no connection to break")
	}
	attempts := 0
	apply := func(ctx context.Context, tx *sql.Tx) ([]event.Event, error) {
		attempts++
		if attempts > 1 {
			return nil, nil
		}
		var pid int
		if err := tx.QueryRowContext(ctx, "SELECT pg_backend_pid()").Scan(&pid); err != nil {
			return nil, err
		}
		if _, err := db.DB.ExecContext(ctx, "SELECT pg_terminate_backend($1)", pid); err != nil {
			return nil, err
		}
		_, err := tx.ExecContext(ctx, "SELECT 1")
		return nil, err
	}
	_, err := db.Once(t.Context(), "test", input("1"), apply)
	if outcome, _ := bus.Classify(err); outcome != bus.OutcomeUnavailable {
		t.Errorf("outcome %v of %v", outcome, err)
	}
	if _, err := db.Once(t.Context(), "test", input("1"), apply); err != nil || attempts != 2 {
		t.Errorf("%v after %d attempts", err, attempts)
	}
}

func TestPanicRollsBack(t *testing.T) {
	db := storetest.Open(t)
	if err := db.Migrate(t.Context(), "test", tables()); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if recover() == nil {
			t.Error("the panic was swallowed")
		}
		if n := counter(t, db, "a"); n != 0 {
			t.Errorf("counter is %d after a panic", n)
		}
		// The writer is free again.
		if _, err := db.PutBlob(t.Context(), []byte("x")); err != nil {
			t.Error(err)
		}
	}()
	_ = db.Tx(t.Context(), func(tx *sql.Tx) error {
		if _, err := tx.ExecContext(t.Context(), increment, "a"); err != nil {
			return err
		}
		panic("bug")
	})
}
