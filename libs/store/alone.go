package store

import (
	"context"
	"database/sql/driver"
	"fmt"
	"sync"
	"time"
)

// unlockTimeout bounds giving the lock of Alone back.
const unlockTimeout = 5 * time.Second

// taken are the names that work in this process holds, by SQLite file.
var taken = struct {
	sync.Mutex
	names map[string]bool
}{names: map[string]bool{}}

// Alone runs work unless somebody else, in whichever process, runs work of the
// same name on the same database and schema; then ran is false. It spares
// replicas from doing the same at once (timers), and keeps an order among
// them. It is no fence: where the connection to PostgreSQL breaks while work
// runs, another one may begin, so what work writes must bear that.
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
	key := db.writer.path + "\x00" + name
	taken.Lock()
	defer taken.Unlock()
	if taken.names[key] {
		return nil, false, nil
	}
	taken.names[key] = true
	return func() {
		taken.Lock()
		defer taken.Unlock()
		delete(taken.names, key)
	}, true, nil
}

func (db *DB) aloneOnServer(ctx context.Context, name string) (unlock func(), ok bool, err error) {
	conn, err := db.Conn(ctx)
	if err != nil {
		return nil, false, err
	}
	discard := func() {
		// The lock ends with its session, so the connection must not go back to the pool.
		_ = conn.Raw(func(any) error { return driver.ErrBadConn })
		_ = conn.Close()
	}
	const key = "hashtextextended(current_schema() || $1, 0)"
	if err := conn.QueryRowContext(ctx, "SELECT pg_try_advisory_lock("+key+")", "/"+name).Scan(&ok); err != nil {
		discard()
		return nil, false, err
	}
	if !ok {
		return nil, false, conn.Close()
	}
	return func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), unlockTimeout)
		defer cancel()
		var held bool
		err := conn.QueryRowContext(ctx, "SELECT pg_advisory_unlock("+key+")", "/"+name).Scan(&held)
		if err != nil || !held {
			discard()
			return
		}
		_ = conn.Close() // back to the pool
	}, true, nil
}
