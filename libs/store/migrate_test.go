package store_test

import (
	"io/fs"
	"sync"
	"testing"
	"testing/fstest"

	"github.com/tidewaiter/tidewaiter/libs/store"
	"github.com/tidewaiter/tidewaiter/libs/store/storetest"
)

func sqlFile(statements string) *fstest.MapFile {
	return &fstest.MapFile{Data: []byte("-- +goose Up\n" + statements + "\n")}
}

func TestMigrationsPerDialect(t *testing.T) {
	files := fstest.MapFS{
		"migrations/00001_common.sql":         sqlFile("CREATE TABLE cat_images (digest TEXT PRIMARY KEY);"),
		"migrations/postgres/00002_blob.sql":  sqlFile("ALTER TABLE cat_images ADD COLUMN report BYTEA;"),
		"migrations/sqlite/00002_blob.sql":    sqlFile("ALTER TABLE cat_images ADD COLUMN report BLOB;"),
		"migrations/00003_after.sql":          sqlFile("ALTER TABLE cat_images ADD COLUMN both_have TEXT;"),
		"migrations/postgres/00003_after.sql": sqlFile("ALTER TABLE cat_images ADD COLUMN postgres_has TEXT;"),
		"migrations/README.md":                {Data: []byte("not a migration")},
	}
	db := storetest.Open(t)
	for range 2 { // again changes nothing
		if err := db.Migrate(t.Context(), "catalog", files); err != nil {
			t.Fatal(err)
		}
	}
	column := map[string]string{store.SQLite: "both_have", store.Postgres: "postgres_has"}[db.Dialect]
	if _, err := db.ExecContext(t.Context(), "INSERT INTO cat_images (digest, report, "+column+") VALUES ($1, $2, $3)", "d", []byte{0, 255}, "x"); err != nil {
		t.Error(err)
	}
}

func TestMigrationsPerService(t *testing.T) {
	url := storetest.URL(t)
	var wg sync.WaitGroup
	for _, service := range []string{"planner", "catalog"} {
		for range 3 { // instances that start at once
			wg.Go(func() {
				db := storetest.OpenURL(t, url)
				files := fstest.MapFS{"00001_x.sql": sqlFile("CREATE TABLE " + service + "_x (n BIGINT);")}
				if err := db.Migrate(t.Context(), service, files); err != nil {
					t.Error(err)
				}
			})
		}
	}
	wg.Wait()
}

func TestMigrateRefuses(t *testing.T) {
	db := storetest.Open(t)
	good := fstest.MapFS{"00001_x.sql": sqlFile("CREATE TABLE x (n BIGINT);")}
	for _, test := range []struct {
		name, service string
		files         fs.FS
	}{
		{"a name that is no table's", `x"; DROP TABLE blobs; --`, good},
		{"no name", "", good},
		{"no migrations", "test", fstest.MapFS{}},
		{"wrong SQL", "test", fstest.MapFS{"00001_x.sql": sqlFile("CREATE TABEL x (n BIGINT);")}},
	} {
		if err := db.Migrate(t.Context(), test.service, test.files); err == nil {
			t.Errorf("%s: accepted", test.name)
		}
	}
}
