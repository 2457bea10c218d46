// Package store is the database: connections, migrations, the outbox that
// makes handlers repeatable, and content-addressed blobs.
package store

import (
	"context"
	"database/sql"
	"errors"
	"io/fs"
	"time"

	"github.com/cloudevents/sdk-go/v2/event"
)

// ErrNotFound is returned for what is not stored.
var ErrNotFound = errors.New("not found")

// ErrCorrupt is returned for a blob whose bytes do not have its digest.
var ErrCorrupt = errors.New("stored content does not have its digest")

// DB is the database of one service. Queries are written with $1, $2 …, which
// both SQLite and PostgreSQL take.
type DB struct {
	*sql.DB
	Dialect string // "sqlite" or "postgres"
}

// Open opens sqlite:///path/to/file.db (created when absent) or postgres://….
// It creates the tables that all services share (outbox, blobs).
func Open(ctx context.Context, url string) (*DB, error) { return nil, nil }

// Migrate brings the named service's tables up to date. files holds goose SQL
// migrations named 00001_what.sql; a folder "postgres" or "sqlite" beside them
// holds those that must differ. Versions are kept per service.
func (db *DB) Migrate(ctx context.Context, service string, files fs.FS) error { return nil }

// Tx runs work in one write transaction; it is retried when the database says
// it is busy or cannot serialise. Outages are returned as they are; see IsUnavailable.
func (db *DB) Tx(ctx context.Context, work func(tx *sql.Tx) error) error { return nil }

// IsUnavailable says whether err means that the database cannot be reached or written to now.
func IsUnavailable(err error) bool { return false }

// Once runs apply for an input event at most once: what it writes through tx
// and the events it returns are stored together, and a redelivered input gets
// the stored events again. It fits bus.Handler. Errors of the database come
// back marked bus.Unavailable.
func (db *DB) Once(ctx context.Context, service string, in event.Event,
	apply func(ctx context.Context, tx *sql.Tx) ([]event.Event, error)) ([]event.Event, error) {
	return nil, nil
}

// PruneOutbox forgets outputs of inputs older than age.
func (db *DB) PruneOutbox(ctx context.Context, age time.Duration) (int64, error) { return 0, nil }

// PutBlob stores content (zstd) and returns its digest. Storing again renews its age.
func (db *DB) PutBlob(ctx context.Context, content []byte) (digest string, err error) { return "", nil }

// Blob returns stored content, verified: ErrNotFound, ErrCorrupt.
func (db *DB) Blob(ctx context.Context, digest string) ([]byte, error) { return nil, nil }

// HasBlob says whether content is stored.
func (db *DB) HasBlob(ctx context.Context, digest string) (bool, error) { return false, nil }

// TouchBlobs renews the age of blobs that are still referred to.
func (db *DB) TouchBlobs(ctx context.Context, digests ...string) error { return nil }

// ExpireBlobs deletes blobs that were neither stored nor touched for age.
func (db *DB) ExpireBlobs(ctx context.Context, age time.Duration) (int64, error) { return 0, nil }
