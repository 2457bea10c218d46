package store

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net/url"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/stdlib"
)

// postgresIdle is how long a connection that nobody uses is kept.
const postgresIdle = 5 * time.Minute

// CheckURL says what is wrong with a database URL, and with what is configured
// beside it. Its errors hold no password; nothing is connected to.
func (c Config) CheckURL() error {
	u, err := url.Parse(c.URL)
	if err != nil {
		return errors.New("url is no URL: want sqlite:///path/to/file.db or postgres://user@host/database") // the error could hold a password
	}
	switch u.Scheme {
	case "sqlite":
		if c.TLSSource != nil || c.PasswordSource != nil {
			return errors.New("url names SQLite, which has neither passwords nor TLS")
		}
		return nil
	case "postgres", "postgresql":
		_, err := c.parse()
		return err
	}
	return errors.New("url: want sqlite:///path/to/file.db or postgres://user@host/database")
}

// parse reads a PostgreSQL URL.
func (c Config) parse() (*pgx.ConnConfig, error) {
	u, err := url.Parse(c.URL)
	if err != nil {
		return nil, errors.New("url is no URL: want postgres://user@host/database") // the error could hold a password
	}
	query := u.Query()
	if _, own := u.User.Password(); (own || query.Has("password")) && c.PasswordSource != nil {
		return nil, errors.New("url holds a password, and another is configured beside it: keep one")
	}
	if c.TLSSource != nil {
		for _, name := range []string{"sslrootcert", "sslcert", "sslkey", "sslpassword"} {
			if query.Has(name) {
				return nil, fmt.Errorf("url has %s, and there is a section tls: keep one", name)
			}
		}
		switch mode := query.Get("sslmode"); mode {
		case "", "verify-full":
			query.Set("sslmode", "verify-full")
			u.RawQuery = query.Encode()
		default:
			return nil, fmt.Errorf("url has sslmode=%s, and there is a section tls, which means verify-full: keep one", mode)
		}
	}
	cfg, err := pgx.ParseConfig(u.String())
	if err != nil {
		return nil, fmt.Errorf("url: %w", err) // pgx leaves the password out
	}
	return cfg, nil
}

func (db *DB) openPostgres(cfg Config) error {
	parsed, err := cfg.parse()
	if err != nil {
		return fmt.Errorf("database %w", err)
	}
	// What is asked for at every connection is asked for once now: a file that
	// is not there is a mistake, not an outage.
	if err := cfg.renew(parsed.Copy()); err != nil {
		return err
	}
	db.DB, db.Dialect = stdlib.OpenDB(*parsed, stdlib.OptionBeforeConnect(func(_ context.Context, c *pgx.ConnConfig) error {
		return cfg.renew(c)
	})), Postgres
	db.SetMaxOpenConns(postgresConns)
	db.SetMaxIdleConns(postgresConns)
	db.SetConnMaxIdleTime(postgresIdle)
	return nil
}

// renew puts the password and certificates of now into what one connection is
// made with.
func (c Config) renew(into *pgx.ConnConfig) error {
	if c.PasswordSource != nil {
		password, err := c.PasswordSource()
		if err != nil {
			return fmt.Errorf("database password: %w", err)
		}
		into.Password = password
	}
	if c.TLSSource == nil {
		return nil
	}
	files, err := c.TLSSource()
	if err != nil {
		return fmt.Errorf("database tls: %w", err)
	}
	// With verify-full no address is tried without TLS, and each has its own name.
	into.TLSConfig = withFiles(into.TLSConfig, files)
	fallbacks := make([]*pgconn.FallbackConfig, len(into.Fallbacks)) // those of into are shared with other connections
	for i, f := range into.Fallbacks {
		fallbacks[i] = &pgconn.FallbackConfig{Host: f.Host, Port: f.Port, TLSConfig: withFiles(f.TLSConfig, files)}
	}
	into.Fallbacks = fallbacks
	return nil
}

// withFiles returns what pgx made of verify-full with authorities and
// certificates of ours; nil, a Unix socket, has no TLS.
func withFiles(parsed, files *tls.Config) *tls.Config {
	if parsed == nil {
		return nil
	}
	out := files.Clone()
	out.NextProtos = parsed.NextProtos
	if out.ServerName == "" {
		out.ServerName = parsed.ServerName
	}
	return out
}
