package redis

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/redis/go-redis/v9"
)

// MaxValue bounds what a cache holds under one key, in bytes. How much all of
// it may be is the server's to bound (maxmemory): losing an entry costs work,
// never truth.
const MaxValue = 4 << 20

// Errors of caches.
var (
	ErrMiss     = errors.New("not in the cache")
	ErrTooLarge = errors.New("too large for the cache")
)

// Get returns what Put stored under key: ErrMiss when it is not there or has
// expired. What comes from a cache was not verified by it.
func (c *Client) Get(ctx context.Context, key string) ([]byte, error) {
	value, err := c.rdb.Get(ctx, c.prefix+key).Bytes()
	if errors.Is(err, redis.Nil) {
		return nil, fmt.Errorf("cache entry %s: %w", key, ErrMiss)
	}
	if err != nil {
		return nil, fmt.Errorf("read cache entry %s: %w", key, err)
	}
	if len(value) > MaxValue { // somebody else wrote it
		return nil, fmt.Errorf("cache entry %s of %d bytes: %w", key, len(value), ErrTooLarge)
	}
	return value, nil
}

// Put stores value, at most MaxValue bytes, under key for ttl (at least a millisecond).
func (c *Client) Put(ctx context.Context, key string, value []byte, ttl time.Duration) error {
	if len(value) > MaxValue {
		return fmt.Errorf("cache entry %s of %d bytes: %w", key, len(value), ErrTooLarge)
	}
	if err := c.rdb.Set(ctx, c.prefix+key, value, time.Duration(milliseconds(ttl))*time.Millisecond).Err(); err != nil {
		return fmt.Errorf("write cache entry %s: %w", key, err)
	}
	return nil
}

// raiseScript: KEYS mark; ARGV value, ttl in ms. Keeps the greater of the value
// and what is stored, byte by byte, and returns it.
var raiseScript = redis.NewScript(`
local held = redis.call('GET', KEYS[1])
if held and held >= ARGV[1] then
	redis.call('PEXPIRE', KEYS[1], ARGV[2])
	return held
end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return ARGV[1]
`)

// Raise keeps the greatest of all values that were given for key within ttl of
// each other, compared byte by byte, and returns it. The empty value asks for
// what is kept: "" when there is nothing.
func (c *Client) Raise(ctx context.Context, key, value string, ttl time.Duration) (string, error) {
	if value == "" {
		held, err := c.Get(ctx, key)
		if errors.Is(err, ErrMiss) {
			return "", nil
		}
		return string(held), err
	}
	held, err := raiseScript.Run(ctx, c.rdb, []string{c.prefix + key}, value, milliseconds(ttl)).Text()
	if err != nil {
		return "", fmt.Errorf("raise mark %s: %w", key, err)
	}
	return held, nil
}
