//go:build !real

package redis

import (
	"testing"

	"github.com/alicebob/miniredis/v2"
)

// backend returns how to reach an empty Redis: miniredis, which lets keys
// expire by the clock like a real one.
func backend(t testing.TB) Config {
	t.Helper()
	m := miniredis.NewMiniRedis()
	m.ClockTTL(true)
	m.RequireUserAuth("analyzer", "s3cret")
	if err := m.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(m.Close)
	return Config{URL: "redis://analyzer@" + m.Addr() + "/0", Password: "s3cret", Prefix: "tw:"}
}
