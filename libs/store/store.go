// Package store is the database: connections, migrations, the outbox that
// makes handlers repeatable, and content-addressed blobs.
//
// Everything works on SQLite and on PostgreSQL. SQLite has one writer at a
// time: all handles that this process opened on one file queue for it, in
// order, so that none of them waits in SQLite's own busy loop. A write
// transaction is serialisable on both, and is run again when the database
// says that it could not be.
package store

import (
	"context"
	"crypto/tls"
	"database/sql"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/klauspost/compress/zstd"

	_ "modernc.org/sqlite" // the driver named "sqlite"
)

// Values of DB.Dialect.
const (
	SQLite   = "sqlite"
	Postgres = "postgres"
)

// ErrNotFound is returned for what is not stored.
var ErrNotFound = errors.New("not found")

// ErrCorrupt is returned for a blob whose bytes do not have its digest.
var ErrCorrupt = errors.New("stored content does not have its digest")

const (
	// busyTimeout is how long SQLite waits for another process's lock.
	busyTimeout = 5 * time.Second
	// sqliteConns bounds the connections of one handle; each has its own page cache.
	sqliteConns = 8
	// postgresConns bounds the connections of one handle.
	postgresConns = 10
	// walBytes is what SQLite's log is cut back to after a checkpoint.
	walBytes = 64 << 20
	// zstdConcurrency bounds the contents that one handle packs, and unpacks, at once.
	zstdConcurrency = 2
	// zstdWindow is how far back in bytes packing looks for repetitions.
	zstdWindow = 1 << 20
)

// DB is the database of one service. Queries are written with $1, $2 …, which
// both SQLite and PostgreSQL take. It is safe for concurrent use.
type DB struct {
	*sql.DB
	Dialect string // SQLite or Postgres

	writer  *writer // nil on PostgreSQL
	turns   turns   // of Alone, on PostgreSQL
	encoder *zstd.Encoder
	decoder *zstd.Decoder
}

// Config says how a database is reached.
type Config struct {
	URL string // as Open takes it
	// PasswordSource and TLSSource, where set, are asked at every connection to
	// PostgreSQL. With TLSSource the server must prove itself (as with
	// sslmode=verify-full), and the URL names no certificates.
	PasswordSource func() (string, error)
	TLSSource      func() (*tls.Config, error)
}

// Open opens sqlite:///path/to/file.db (created when absent, with its folder)
// or postgres://…. It creates the tables that all services share (outbox,
// blobs). sqlite://…?sync=full makes every transaction survive a power cut;
// without it all survive the death of the process, and a power cut may cost the
// last ones but never damages the file. Errors hold no password. For a database that cannot be reached
// IsUnavailable(err) is true.
func Open(ctx context.Context, url string) (*DB, error) {
	return OpenConfig(ctx, Config{URL: url})
}

// OpenConfig is Open with credentials that may change.
func OpenConfig(ctx context.Context, cfg Config) (*DB, error) {
	db, err := open(cfg)
	if err != nil {
		return nil, err
	}
	if err := db.Migrate(ctx, "store", sharedTables); err != nil {
		return nil, errors.Join(err, db.Close())
	}
	return db, nil
}

func open(cfg Config) (*DB, error) {
	// A dozen handles live in one process: they are kept small.
	encoder, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(zstdConcurrency), zstd.WithWindowSize(zstdWindow), zstd.WithLowerEncoderMem(true))
	if err != nil {
		return nil, fmt.Errorf("prepare zstd: %w", err)
	}
	decoder, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(zstdConcurrency), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxMemory(maxBlob))
	if err != nil {
		return nil, fmt.Errorf("prepare zstd: %w", err)
	}
	db := &DB{encoder: encoder, decoder: decoder}

	scheme, rest, _ := strings.Cut(cfg.URL, "://")
	switch scheme {
	case "sqlite":
		err = db.openSQLite(rest)
	case "postgres", "postgresql":
		err = db.openPostgres(cfg)
	default:
		err = fmt.Errorf("database %q: want sqlite:///path/to/file.db or postgres://", scheme)
	}
	if err != nil {
		return nil, err
	}
	return db, nil
}

func (db *DB) openSQLite(path string) error {
	path, full := strings.CutSuffix(path, "?sync=full")
	if path == "" || strings.ContainsAny(path, "?#") {
		return fmt.Errorf("database file %q: want a path without ? and #, perhaps ?sync=full", path)
	}
	synchronous := "synchronous(NORMAL)"
	if full {
		synchronous = "synchronous(FULL)"
	}
	path, err := filepath.Abs(path)
	if err != nil {
		return fmt.Errorf("database file: %w", err)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return &unavailableError{fmt.Errorf("create the database's folder: %w", err)}
	}
	// SQLite would create the file readable by everybody; its log and index take the file's mode.
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600) // #nosec G304 -- the operator names the file
	if err != nil {
		return &unavailableError{fmt.Errorf("open the database: %w", err)}
	}
	if err := f.Close(); err != nil {
		return &unavailableError{fmt.Errorf("open the database: %w", err)}
	}
	pragmas := url.Values{"_txlock": {"immediate"}, "_pragma": {
		fmt.Sprintf("busy_timeout(%d)", busyTimeout.Milliseconds()),
		"journal_mode(WAL)",
		synchronous,
		"foreign_keys(1)",
		fmt.Sprintf("journal_size_limit(%d)", walBytes),
	}}
	pool, err := sql.Open("sqlite", "file:"+(&url.URL{Path: path}).EscapedPath()+"?"+pragmas.Encode())
	if err != nil {
		return fmt.Errorf("open the database: %w", err)
	}
	pool.SetMaxOpenConns(sqliteConns)
	pool.SetMaxIdleConns(sqliteConns)
	db.DB, db.Dialect, db.writer = pool, SQLite, writerOf(path)
	return nil
}

// Close closes the connections. SQLite's log is folded into its file when the
// last handle of the process closes.
func (db *DB) Close() error {
	db.writer.close()
	db.turns.close()
	db.decoder.Close()
	return errors.Join(db.DB.Close(), db.encoder.Close())
}

// Ping returns nil if the database answers.
func (db *DB) Ping(ctx context.Context) error {
	var one int
	if err := db.QueryRowContext(ctx, "SELECT 1").Scan(&one); err != nil {
		return fmt.Errorf("ping the database: %w", err)
	}
	return nil
}
