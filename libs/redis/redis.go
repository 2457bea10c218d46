// Package redis holds what Tidewaiter keeps in Redis: leases, locks, budgets
// and caches. It is the only package that imports go-redis. Losing Redis costs
// work, never truth.
package redis

import (
	"context"
	"errors"
	"time"
)

// ErrTaken is returned when somebody else holds a lease. See TakenError.
var ErrTaken = errors.New("lease is taken")

// ErrLost is returned when a lease is no longer ours.
var ErrLost = errors.New("lease was lost")

// TakenError says who holds a lease. errors.Is(err, ErrTaken) holds.
type TakenError struct {
	Key    string
	Holder string        // the holder's event id
	TTL    time.Duration // until it expires unless renewed
}

func (e *TakenError) Error() string { return "" }
func (e *TakenError) Unwrap() error { return ErrTaken }

// Config says how Redis is reached. YAML section "redis".
type Config struct {
	URL      string `yaml:"url"`    // redis://[user]@host:port/db or rediss://
	Prefix   string `yaml:"prefix"` // before every key
	Password string `yaml:"-"`
}

// Client is a connection to Redis.
type Client struct{}

// Open connects; an unreachable server is an error only of later calls.
func Open(cfg Config) (*Client, error) { return nil, nil }

// Close ends the connections.
func (c *Client) Close() error { return nil }

// Ping returns nil if Redis answers.
func (c *Client) Ping(ctx context.Context) error { return nil }

// Lease is a claim on a key with an expiry and a fencing token.
type Lease struct {
	Key    string
	Holder string
	Token  int64 // higher than any token handed out for the key before, even if Redis lost its data in between
}

// Acquire takes the lease for ttl. It returns a *TakenError if it is held, by
// whatever holder (also by the same one: the caller decides whether to wait).
func (c *Client) Acquire(ctx context.Context, key, holder string, ttl time.Duration) (*Lease, error) {
	return nil, nil
}

// Hold runs work while renewing the lease every ttl/3; work's context ends when
// the lease is lost (then Hold returns ErrLost) and the lease is released after.
func (c *Client) Hold(ctx context.Context, l *Lease, ttl time.Duration, work func(ctx context.Context) error) error {
	return nil
}

// Renew extends the lease, or returns ErrLost.
func (c *Client) Renew(ctx context.Context, l *Lease, ttl time.Duration) error { return nil }

// Release gives the lease back if it is still ours.
func (c *Client) Release(ctx context.Context, l *Lease) error { return nil }

// WithLock runs work while holding key, waiting for it until ctx ends.
func (c *Client) WithLock(ctx context.Context, key, holder string, ttl time.Duration, work func(ctx context.Context) error) error {
	return nil
}
