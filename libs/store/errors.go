package store

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"io"
	"net"
	"strings"
	"syscall"

	"github.com/jackc/pgx/v5/pgconn"
	"modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"
)

// unavailableError marks an error as an outage of the database.
type unavailableError struct{ error }

func (e *unavailableError) Unwrap() error { return e.error }

// IsUnavailable says whether err, which must come from the database, means
// that it cannot be reached or written to now: unreachable, shutting down,
// full, read-only, damaged, locked for too long. Another try can help, perhaps
// after somebody has repaired it. A context that ended is not an outage.
func IsUnavailable(err error) bool {
	if isOutage(err) {
		return true
	}
	if err == nil || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return false
	}
	var network net.Error
	return errors.As(err, &network) || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF)
}

// isOutage is IsUnavailable for errors that may come from elsewhere: it knows
// only what nothing but a database returns.
func isOutage(err error) bool {
	if err == nil || errors.Is(err, context.Canceled) {
		return false
	}
	var marked *unavailableError
	if errors.As(err, &marked) {
		return true
	}
	if errors.Is(err, driver.ErrBadConn) || errors.Is(err, sql.ErrConnDone) || errors.Is(err, syscall.ENOSPC) {
		return true
	}
	var lite *sqlite.Error
	if errors.As(err, &lite) {
		return sqliteOutage(lite.Code())
	}
	var pg *pgconn.PgError
	if errors.As(err, &pg) {
		return postgresOutage(pg.Code)
	}
	var connect *pgconn.ConnectError
	if errors.As(err, &connect) {
		return true
	}
	// database/sql keeps this error to itself. It is seen when a service drains longer than its database lives.
	return strings.Contains(err.Error(), "sql: database is closed") || strings.Contains(err.Error(), "conn closed")
}

// sqliteOutage knows the primary result codes (https://www.sqlite.org/rescode.html).
func sqliteOutage(code int) bool {
	switch code & 0xff {
	case sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL, // others write
		sqlite3.SQLITE_FULL, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM, sqlite3.SQLITE_AUTH,
		sqlite3.SQLITE_IOERR, sqlite3.SQLITE_NOMEM,
		sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB: // no input is to blame for a damaged file
		return true
	}
	return false
}

// postgresOutage knows the classes and codes of PostgreSQL's errors
// (https://www.postgresql.org/docs/current/errcodes-appendix.html).
func postgresOutage(code string) bool {
	for _, class := range []string{
		"08", // connection exception
		"28", // invalid authorization: a password that is being changed
		"53", // insufficient resources: disk full, out of memory, too many connections
		"57", // operator intervention: shutting down, starting up
		"58", // system error, I/O error
		"XX", // internal error, data corrupted
	} {
		if strings.HasPrefix(code, class) {
			return code != "57014" // query_canceled: by a timeout or by ourselves
		}
	}
	switch code {
	case "25006", // read_only_sql_transaction: a standby
		"3D000", "3F000", // the database or schema is not there (yet)
		"40001", "40P01", "40003", // could not be serialised, however often it was tried
		"55P03": // lock_not_available
		return true
	}
	return false
}

// isBusy says whether the same transaction may succeed if it is run again now.
func isBusy(err error) bool {
	var lite *sqlite.Error
	if errors.As(err, &lite) {
		code := lite.Code() & 0xff
		return code == sqlite3.SQLITE_BUSY || code == sqlite3.SQLITE_LOCKED
	}
	var pg *pgconn.PgError
	if errors.As(err, &pg) {
		return pg.Code == "40001" || pg.Code == "40P01"
	}
	return false
}

// isDuplicate says whether a row with the same key exists.
func isDuplicate(err error) bool {
	var lite *sqlite.Error
	if errors.As(err, &lite) {
		return lite.Code() == sqlite3.SQLITE_CONSTRAINT_PRIMARYKEY || lite.Code() == sqlite3.SQLITE_CONSTRAINT_UNIQUE
	}
	var pg *pgconn.PgError
	return errors.As(err, &pg) && pg.Code == "23505"
}
