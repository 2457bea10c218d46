// Package storetest opens databases for tests: SQLite in the test's own
// folder, or PostgreSQL in the test's own schema when TIDEWAITER_POSTGRES
// holds a URL. Every test of a service should hold on both.
package storetest

import (
	"context"
	"crypto/rand"
	"database/sql"
	"net/url"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/tidewaiter/tidewaiter/libs/store"
)

// Env names the variable with the URL of a PostgreSQL to test on, whose user
// may create schemas.
const Env = "TIDEWAITER_POSTGRES"

// Open returns an empty database that is closed, and on PostgreSQL dropped, at
// the end of the test.
func Open(t testing.TB) *store.DB {
	t.Helper()
	return OpenURL(t, URL(t))
}

// OpenURL opens another handle on the database at url, as a second service or
// instance would. It is closed at the end of the test.
func OpenURL(t testing.TB, url string) *store.DB {
	t.Helper()
	db, err := store.Open(t.Context(), url)
	if err != nil {
		t.Fatalf("open the test's database: %v", err)
	}
	t.Cleanup(func() {
		if err := db.Close(); err != nil {
			t.Errorf("close the test's database: %v", err)
		}
	})
	return db
}

// URL returns the URL of an empty database for the test.
func URL(t testing.TB) string {
	t.Helper()
	server := os.Getenv(Env)
	if server == "" {
		return "sqlite://" + filepath.Join(t.TempDir(), "test.db")
	}
	u, err := url.Parse(server)
	if err != nil {
		t.Fatalf("%s is not a URL", Env)
	}
	admin, err := sql.Open("pgx", server)
	if err != nil {
		t.Fatalf("open PostgreSQL: %v", err)
	}
	schema := "test_" + rand.Text()
	if _, err := admin.ExecContext(t.Context(), `CREATE SCHEMA "`+schema+`"`); err != nil {
		t.Fatalf("create the test's schema: %v", err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
		defer cancel()
		if _, err := admin.ExecContext(ctx, `DROP SCHEMA "`+schema+`" CASCADE`); err != nil {
			t.Errorf("drop the test's schema: %v", err)
		}
		if err := admin.Close(); err != nil {
			t.Errorf("close PostgreSQL: %v", err)
		}
	})
	query := u.Query()
	query.Set("search_path", `"`+schema+`"`)
	u.RawQuery = query.Encode()
	return u.String()
}
