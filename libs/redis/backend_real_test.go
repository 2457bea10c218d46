//go:build real

package redis

import (
	"net/url"
	"os"
	"testing"
)

// backend returns how to reach the real Redis or Valkey that TIDEWAITER_REDIS
// names, which is emptied.
func backend(t testing.TB) Config {
	t.Helper()
	u, err := url.Parse(os.Getenv("TIDEWAITER_REDIS"))
	if err != nil || u.Host == "" {
		t.Fatal("TIDEWAITER_REDIS must hold redis://[user:password@]host:port/db")
	}
	password, _ := u.User.Password()
	if u.User != nil {
		u.User = url.User(u.User.Username())
	}
	cfg := Config{URL: u.String(), Password: password, Prefix: "tw:"}
	c, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	if err := c.rdb.FlushDB(t.Context()).Err(); err != nil {
		t.Fatal(err)
	}
	return cfg
}
