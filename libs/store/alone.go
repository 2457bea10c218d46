package store

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"fmt"
	"sync"
	"time"
)

// turnTimeout bounds one question to PostgreSQL about a lock.
const turnTimeout = 5 * time.Second

// turns are the names that this process holds: of a SQLite file, of one handle
// on PostgreSQL.
type turns struct {
	mu    sync.Mutex
	names map[string]bool
	conn  *sql.Conn // PostgreSQL: the session that holds them all
}

// filesTurns are those of SQLite files.
var filesTurns = turns{names: map[string]bool{}}

// Alone runs work unless somebody else, in whichever process, runs work of the
// same name on the same database and schema; then ran is false. It spares
// replicas from doing the same at once (timers, one image), and keeps an order
// among them. It is no fence: where the connection to PostgreSQL breaks while
// work runs, another one may begin, so what work writes must bear that.
//
// On PostgreSQL it is a lock of a session (advisory), which ends with it; a
// pooler between must leave sessions whole.
func (db *DB) Alone(ctx context.Context, name string, work func(ctx context.Context) error) (ran bool, err error) {
	lock := db.aloneOnServer
	if db.Dialect == SQLite {
		lock = db.aloneHere
	}
	unlock, ok, err := lock(ctx, name)
	if err != nil {
		return false, fmt.Errorf("ask for the turn %q: %w", name, err)
	}
	if !ok {
		return false, nil
	}
	defer unlock()
	return true, work(ctx)
}

// aloneHere is Alone for SQLite, whose file belongs to one process.
func (db *DB) aloneHere(_ context.Context, name string) (unlock func(), ok bool, err error) {
	t, key := &filesTurns, db.writer.path+"\x00"+name
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.names[key] {
		return nil, false, nil
	}
	t.names[key] = true
	return func() {
		t.mu.Lock()
		defer t.mu.Unlock()
		delete(t.names, key)
	}, true, nil
}

// turnKey turns a name into the number that PostgreSQL locks.
const turnKey = "hashtextextended(current_schema() || $1, 0)"

// aloneOnServer is Alone for PostgreSQL. One session of a handle holds all its
// locks, so that they take nothing from the pool. A session is given a lock
// again that it holds: within the handle the names decide.
func (db *DB) aloneOnServer(ctx context.Context, name string) (unlock func(), ok bool, err error) {
	t := &db.turns
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.names[name] {
		return nil, false, nil
	}
	// An ended context would end the session, and with it what others hold.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), turnTimeout)
	defer cancel()
	if t.conn == nil {
		if t.conn, err = db.Conn(ctx); err != nil {
			return nil, false, err
		}
	}
	if err := t.conn.QueryRowContext(ctx, "SELECT pg_try_advisory_lock("+turnKey+")", "/"+name).Scan(&ok); err != nil {
		t.discard()
		return nil, false, err
	}
	if !ok {
		return nil, false, nil
	}
	if t.names == nil {
		t.names = map[string]bool{}
	}
	t.names[name] = true
	session := t.conn
	return func() { t.unlock(ctx, session, name) }, true, nil
}

func (t *turns) unlock(ctx context.Context, session *sql.Conn, name string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.names, name)
	if t.conn != session {
		return // it ended, and the lock with it
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), turnTimeout)
	defer cancel()
	var held bool
	err := session.QueryRowContext(ctx, "SELECT pg_advisory_unlock("+turnKey+")", "/"+name).Scan(&held)
	if err != nil || !held {
		t.discard()
	}
}

// discard ends the session: its locks must not go back to the pool with it. The
// caller holds t.
func (t *turns) discard() {
	if t.conn == nil {
		return
	}
	_ = t.conn.Raw(func(any) error { return driver.ErrBadConn })
	_ = t.conn.Close()
	t.conn = nil
}

// close ends the session.
func (t *turns) close() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.discard()
}
