package store

import (
	"context"
	"database/sql/driver"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"regexp"
	"slices"

	"github.com/pressly/goose/v3"
)

//go:embed migrations
var sharedTables embed.FS

var servicePattern = regexp.MustCompile(`^[a-z][a-z0-9_]{0,31}$`)

// Migrate brings the named service's tables up to date. files holds goose SQL
// migrations named 00001_what.sql, at its root or in its only folder
// "migrations"; a folder "postgres" or "sqlite" beside them holds those that
// must differ. Versions are kept per service, in <service>_versions. It may be
// called by several instances at once.
func (db *DB) Migrate(ctx context.Context, service string, files fs.FS) error {
	if !servicePattern.MatchString(service) {
		return fmt.Errorf("migrate: %q is not a service name", service)
	}
	sources, err := overlayOf(files, db.Dialect)
	if err != nil {
		return fmt.Errorf("migrate %s: %w", service, err)
	}
	options := []goose.ProviderOption{
		goose.WithDisableGlobalRegistry(true),
		goose.WithTableName(service + "_versions"),
	}
	dialect := goose.DialectSQLite3
	if db.Dialect == Postgres {
		dialect = goose.DialectPostgres
	}
	provider, err := goose.NewProvider(dialect, db.DB, sources, options...)
	if err != nil {
		return fmt.Errorf("migrate %s: %w", service, err)
	}
	unlock, err := db.lockMigrations(ctx)
	if err != nil {
		return fmt.Errorf("migrate %s: %w", service, err)
	}
	defer unlock()
	if _, err := provider.Up(ctx); err != nil {
		return fmt.Errorf("migrate %s: %w", service, err)
	}
	return nil
}

// migrationLock is the key of PostgreSQL's advisory lock around migrations. It
// only has to differ from those of others in the same database.
const migrationLock = 7_433_702_617

// lockMigrations waits until nobody else migrates. goose's own lock asks again
// every few seconds, which a dozen services that start together would feel.
func (db *DB) lockMigrations(ctx context.Context) (unlock func(), err error) {
	if db.Dialect == SQLite {
		return db.writer.lock(ctx)
	}
	conn, err := db.Conn(ctx)
	if err != nil {
		return nil, err
	}
	discard := func() {
		// The lock ends with its session, so the connection must not go back to the pool.
		_ = conn.Raw(func(any) error { return driver.ErrBadConn })
		_ = conn.Close()
	}
	if _, err := conn.ExecContext(ctx, "SELECT pg_advisory_lock($1)", migrationLock); err != nil {
		discard()
		return nil, err
	}
	return discard, nil
}

// overlay shows migrations from several folders as one flat folder, which is
// what goose reads.
type overlay map[string]func() (fs.File, error)

func overlayOf(files fs.FS, dialect string) (overlay, error) {
	if info, err := fs.Stat(files, "migrations"); err == nil && info.IsDir() {
		sub, err := fs.Sub(files, "migrations")
		if err != nil {
			return nil, err
		}
		files = sub
	}
	merged := overlay{}
	for _, dir := range []string{".", dialect} { // the dialect's file goes before the common one of that name
		entries, err := fs.ReadDir(files, dir)
		if errors.Is(err, fs.ErrNotExist) && dir != "." {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("read migrations: %w", err)
		}
		for _, e := range entries {
			if e.IsDir() || path.Ext(e.Name()) != ".sql" {
				continue
			}
			merged[e.Name()] = func() (fs.File, error) { return files.Open(path.Join(dir, e.Name())) }
		}
	}
	return merged, nil
}

// Open implements fs.FS.
func (o overlay) Open(name string) (fs.File, error) {
	open, ok := o[name]
	if !ok {
		return nil, &fs.PathError{Op: "open", Path: name, Err: fs.ErrNotExist}
	}
	return open()
}

// Glob implements fs.GlobFS.
func (o overlay) Glob(pattern string) ([]string, error) {
	var names []string
	for name := range o {
		ok, err := path.Match(pattern, name)
		if err != nil {
			return nil, err
		}
		if ok {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names, nil
}
