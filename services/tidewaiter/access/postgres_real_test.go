//go:build real

package access_test

import (
	"context"
	"database/sql"
	"errors"
	"net/url"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/cloudevents/sdk-go/v2/event"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/store"
	"github.com/tidewaiter/tidewaiter/services/tidewaiter/access"
)

// On a real PostgreSQL (SERVERS_POSTGRES_ADMIN_URL, of a superuser; see
// e2e/servers) an owner that is none makes the roles, and each role makes its own tables, adds to the blobs and sees its
// own outputs, and is refused what is another's.
func TestRolesInPostgreSQL(t *testing.T) {
	raw := os.Getenv("SERVERS_POSTGRES_ADMIN_URL")
	server, err := url.Parse(raw)
	if err != nil || raw == "" {
		t.Fatal("SERVERS_POSTGRES_ADMIN_URL is not set; run: SERVERS=postgres e2e/servers/servers.sh with go test -tags real …")
	}
	const password = "of a role"
	names := access.Names{Role: "access_test_{service}"}
	owner := strings.ReplaceAll(names.Role, "{service}", "owner")
	superuser := open(t, server, nil, "postgres")
	run(t, superuser, "DROP DATABASE IF EXISTS access_test")
	for _, s := range access.Services() {
		run(t, superuser, `DROP ROLE IF EXISTS "`+strings.ReplaceAll(names.Role, "{service}", s.Name)+`"`)
	}
	run(t, superuser, "DROP ROLE IF EXISTS "+owner, "CREATE ROLE "+owner+" LOGIN CREATEROLE PASSWORD '"+password+"'",
		"CREATE DATABASE access_test OWNER "+owner)
	admin := open(t, server, url.UserPassword(owner, password), "access_test") // makes the common tables
	for range 2 {                                                              // it may be run again
		run(t, admin, access.Postgres(access.Services(), names))
	}
	as := func(service string) *store.DB {
		role := strings.ReplaceAll(names.Role, "{service}", service)
		run(t, admin, `ALTER ROLE "`+role+`" PASSWORD '`+password+`'`)
		return open(t, server, url.UserPassword(role, password), "access_test")
	}
	a, c, s, m := as("analyzer"), as("catalog"), as("attestor"), as("matcher")
	for service, db := range map[string]*store.DB{"analyzer": a, "catalog": c, "attestor": s} {
		if err := db.Migrate(t.Context(), service, os.DirFS("../../"+service+"/migrations")); err != nil {
			t.Fatalf("%s makes its tables: %v", service, err)
		}
	}
	digest, err := a.PutBlob(t.Context(), []byte("a layer report"))
	if err != nil {
		t.Fatalf("analyzer stores a blob: %v", err)
	}
	if content, err := c.Blob(t.Context(), digest); err != nil || string(content) != "a layer report" {
		t.Errorf("catalog reads it: %q, %v", content, err)
	}
	if err := c.TouchBlobs(t.Context(), digest); err != nil {
		t.Errorf("catalog renews it: %v", err)
	}
	if _, err := m.PutBlob(t.Context(), []byte("a report")); err != nil {
		t.Errorf("matcher stores a blob: %v", err)
	}
	output(t, a, "analyzer")
	output(t, s, "attestor")
	var rows int
	if err := a.QueryRowContext(t.Context(), "SELECT count(*) FROM outbox").Scan(&rows); err != nil || rows != 1 {
		t.Errorf("analyzer sees %d outputs, %v", rows, err)
	}
	for query, db := range map[string]*store.DB{
		"SELECT * FROM catalog_images":                                           a,
		"SELECT * FROM attestor_statements":                                      a,
		"UPDATE attestor_statements SET repository = ''":                         c,
		"DROP TABLE analyzer_layers":                                             c,
		"DELETE FROM blobs":                                                      a,
		"TRUNCATE blobs":                                                         c,
		"UPDATE blobs SET content = ''":                                          c,
		"DELETE FROM outbox":                                                     s,
		"INSERT INTO outbox VALUES ('attestor', 's', 'i', '', 0)":                a,
		"INSERT INTO store_versions (version_id, is_applied) VALUES (99, false)": a,
		"INSERT INTO outbox VALUES ('catalog', 's', 'i', '', 0)":                 c,
		"SELECT * FROM outbox":                                                   as("ticketer"),
		"CREATE TABLE matcher_own ()":                                            m,
		"CREATE ROLE another":                                                    c,
	} {
		var refused *pgconn.PgError
		if _, err := db.ExecContext(t.Context(), query); !errors.As(err, &refused) || refused.Code != "42501" {
			t.Errorf("%s: %v, want permission denied (42501)", query, err)
		}
	}
	if pruned, err := c.PruneOutbox(t.Context(), -time.Minute); err != nil || pruned != 2 {
		t.Errorf("catalog prunes %d of 2 outputs: %v", pruned, err)
	}
}

// open opens a database as another user, or the URL's own.
func open(t *testing.T, server *url.URL, user *url.Userinfo, database string) *store.DB {
	t.Helper()
	u := *server
	u.Path = "/" + database
	if user != nil {
		u.User = user
	}
	db, err := store.Open(t.Context(), u.String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = db.Close() })
	return db
}

func run(t *testing.T, db *store.DB, queries ...string) {
	t.Helper()
	for _, q := range queries {
		if _, err := db.ExecContext(t.Context(), q); err != nil {
			t.Fatalf("%s: %v", q, err)
		}
	}
}

// output stores an output as a service does.
func output(t *testing.T, db *store.DB, service string) {
	t.Helper()
	in := event.New()
	in.SetSource("/services/planner")
	in.SetID("1")
	in.SetType(contracts.TypePrefix + contracts.LayerRequestedV1)
	_, err := db.Once(t.Context(), service, in, func(context.Context, *sql.Tx) ([]event.Event, error) { return nil, nil })
	if err != nil {
		t.Fatalf("%s stores its output: %v", service, err)
	}
}
