package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"
)

const (
	// txAttempts bounds how often a transaction is run while the database is
	// busy or cannot serialise it.
	txAttempts = 20
	// txDuplicates bounds the same for keys that exist: where two write at once
	// PostgreSQL may say that, and not that it cannot serialise.
	txDuplicates = 4
	// txBackoff is the longest wait between two attempts.
	txBackoff = 250 * time.Millisecond
	// writerWait bounds the wait for SQLite's one writer. It only passes when
	// work inside a transaction waits for that transaction.
	writerWait = time.Minute
)

var errWriterBusy = errors.New("another transaction did not end in time")

// txKey is the context key of the transaction that Once runs on db.
type txKey struct{ db *DB }

// querier is what *sql.DB and *sql.Tx have in common.
type querier interface {
	ExecContext(ctx context.Context, query string, args ...any) (sql.Result, error)
	QueryRowContext(ctx context.Context, query string, args ...any) *sql.Row
}

// Tx runs work in one write transaction; it is retried when the database says
// it is busy or cannot serialise. Outages are returned as they are; see
// IsUnavailable. An error of work rolls back and is returned as it is.
//
// work must use tx alone: on SQLite another handle or connection would wait
// for this transaction. It must be quick, and may run several times. Within
// Once, with the context that Once gives, Tx joins the transaction of Once.
func (db *DB) Tx(ctx context.Context, work func(tx *sql.Tx) error) error {
	if tx := db.joined(ctx); tx != nil {
		return work(tx)
	}
	return db.retry(ctx, func() error { return db.tx(ctx, work) })
}

// ExecContext shadows the method of sql.DB: a write queues with the others of
// this process and is retried like Tx. Within Once it joins its transaction.
func (db *DB) ExecContext(ctx context.Context, query string, args ...any) (sql.Result, error) {
	if tx := db.joined(ctx); tx != nil {
		return tx.ExecContext(ctx, query, args...)
	}
	var result sql.Result
	err := db.retry(ctx, func() error {
		unlock, err := db.writer.lock(ctx)
		if err != nil {
			return err
		}
		defer unlock()
		result, err = db.DB.ExecContext(ctx, query, args...)
		return err
	})
	return result, err
}

// reader returns what to read with: the transaction that ctx belongs to, or
// the pool.
func (db *DB) reader(ctx context.Context) querier {
	if tx := db.joined(ctx); tx != nil {
		return tx
	}
	return db.DB
}

func (db *DB) joined(ctx context.Context) *sql.Tx {
	tx, _ := ctx.Value(txKey{db}).(*sql.Tx)
	return tx
}

func (db *DB) tx(ctx context.Context, work func(tx *sql.Tx) error) (err error) {
	unlock, err := db.writer.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	tx, err := db.BeginTx(ctx, db.txOptions())
	if err != nil {
		return fmt.Errorf("begin: %w", err)
	}
	done := false
	defer func() {
		if done {
			return
		}
		rollback := tx.Rollback()
		// A connection that broke under work shows in the rollback, whatever work made of its error.
		if err != nil && rollback != nil && !errors.Is(rollback, sql.ErrTxDone) && ctx.Err() == nil {
			err = &unavailableError{err}
		}
	}()
	if err := work(tx); err != nil {
		return err
	}
	done = true
	if err := tx.Commit(); err != nil {
		return fmt.Errorf("commit: %w", err)
	}
	return nil
}

// txOptions gives PostgreSQL's transactions what SQLite's have by nature, so
// that one piece of SQL is right on both.
func (db *DB) txOptions() *sql.TxOptions {
	if db.Dialect == Postgres {
		return &sql.TxOptions{Isolation: sql.LevelSerializable}
	}
	return nil
}

func (db *DB) retry(ctx context.Context, work func() error) error {
	wait := 2 * time.Millisecond
	for attempt := 1; ; attempt++ {
		err := work()
		raced := db.Dialect == Postgres && isDuplicate(err) && attempt < txDuplicates
		if err == nil || !isBusy(err) && !raced || attempt == txAttempts {
			return err
		}
		select {
		case <-ctx.Done():
			return errors.Join(ctx.Err(), err)
		case <-time.After(wait/2 + rand.N(wait)): // #nosec G404 -- jitter
		}
		wait = min(2*wait, txBackoff)
	}
}

// writer is the right to write to one SQLite file, of which there is one in a
// process. A nil writer is always free.
type writer struct {
	path  string
	users int
	turn  chan struct{} // holds one element while somebody writes; waiters are served in order
}

// writers are the SQLite files that are open. The file is shared by the whole
// process, however many handles it has, and so must this be.
var writers = struct {
	sync.Mutex
	byPath map[string]*writer
}{byPath: map[string]*writer{}}

func writerOf(path string) *writer {
	writers.Lock()
	defer writers.Unlock()
	w := writers.byPath[path]
	if w == nil {
		w = &writer{path: path, turn: make(chan struct{}, 1)}
		writers.byPath[path] = w
	}
	w.users++
	return w
}

func (w *writer) close() {
	if w == nil {
		return
	}
	writers.Lock()
	defer writers.Unlock()
	w.users--
	if w.users == 0 && writers.byPath[w.path] == w {
		delete(writers.byPath, w.path)
	}
}

func (w *writer) lock(ctx context.Context) (unlock func(), err error) {
	if w == nil {
		return func() {}, nil
	}
	timeout := time.NewTimer(writerWait)
	defer timeout.Stop()
	select {
	case w.turn <- struct{}{}:
		return func() { <-w.turn }, nil
	case <-ctx.Done():
		return nil, fmt.Errorf("wait to write: %w", ctx.Err())
	case <-timeout.C:
		return nil, &unavailableError{errWriterBusy}
	}
}
