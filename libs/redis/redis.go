// Package redis holds what Tidewaiter keeps in Redis: leases, locks, budgets
// and caches. It is the only package that imports go-redis. Losing Redis costs
// work, never truth.
package redis

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/redis/go-redis/v9/maintnotifications"
)

const (
	// dialTimeout, commandTimeout bound one attempt to reach Redis.
	dialTimeout    = 5 * time.Second
	commandTimeout = 3 * time.Second
	// commandRetries bounds how often a command is repeated when a connection
	// breaks. Every script gives the same answer when it is run again.
	commandRetries = 2
)

// Config says how Redis is reached. YAML section "redis".
type Config struct {
	URL      string `yaml:"url"`    // redis://[user]@host:port/db or rediss:// (TLS)
	Prefix   string `yaml:"prefix"` // before every key
	Password string `yaml:"-"`
	// TLS is used with rediss://; nil means the system's authorities.
	TLS *tls.Config `yaml:"-"`
}

// Client is a connection to Redis. It is safe for concurrent use.
type Client struct {
	rdb    *redis.Client
	prefix string
}

// Open connects; an unreachable server is an error only of later calls. A URL
// that holds a password is refused: URLs are logged.
func Open(cfg Config) (*Client, error) {
	options, err := redis.ParseURL(cfg.URL)
	if err != nil {
		return nil, errors.New("redis: want redis://[user@]host:port[/db] or rediss://") // the error could hold a password
	}
	if options.Password != "" {
		return nil, errors.New("redis: the URL must not hold a password")
	}
	options.Password = cfg.Password
	if options.TLSConfig != nil && cfg.TLS != nil {
		own := cfg.TLS.Clone()
		if own.ServerName == "" {
			own.ServerName = options.TLSConfig.ServerName
		}
		options.TLSConfig = own
	}
	options.DialTimeout, options.ReadTimeout, options.WriteTimeout = dialTimeout, commandTimeout, commandTimeout
	options.ContextTimeoutEnabled = true
	options.MaxRetries = commandRetries
	options.DisableIdentity = true // nothing that an ACL would have to allow
	options.MaintNotificationsConfig = &maintnotifications.Config{Mode: maintnotifications.ModeDisabled}
	return &Client{rdb: redis.NewClient(options), prefix: cfg.Prefix}, nil
}

// Close ends the connections.
func (c *Client) Close() error { return c.rdb.Close() }

// Ping returns nil if Redis answers.
func (c *Client) Ping(ctx context.Context) error {
	if err := c.rdb.Ping(ctx).Err(); err != nil {
		return fmt.Errorf("ping redis: %w", err)
	}
	return nil
}

// IsUnavailable says whether err, which must come from this package, means
// that Redis cannot be reached or does not serve now: refused, broken or timed
// out connections, loading, read-only, out of memory, credentials that it does
// not take (yet). ErrTaken, ErrLost, ErrMiss and an ended context are not outages.
func IsUnavailable(err error) bool {
	if err == nil || errors.Is(err, ErrTaken) || errors.Is(err, ErrLost) || errors.Is(err, ErrMiss) || errors.Is(err, context.Canceled) {
		return false
	}
	var answer redis.Error
	if errors.As(err, &answer) {
		return serverUnavailable(answer.Error())
	}
	var dial *net.OpError
	if errors.As(err, &dial) {
		return true // before the deadline: a connection that times out is an outage too
	}
	if errors.Is(err, context.DeadlineExceeded) {
		return false
	}
	var network net.Error
	return errors.As(err, &network) || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) ||
		errors.Is(err, redis.ErrClosed) || errors.Is(err, redis.ErrPoolTimeout) || errors.Is(err, redis.ErrPoolExhausted)
}

// serverUnavailable knows the error codes that Redis and Valkey answer with
// while they cannot work; all others are the fault of the request.
func serverUnavailable(message string) bool {
	for _, code := range []string{
		"LOADING", "READONLY", "MASTERDOWN", "CLUSTERDOWN", "TRYAGAIN", "BUSY", "OOM", "MISCONF", "NOREPLICAS",
		"NOAUTH", "WRONGPASS", "NOPERM", "ERR max number of clients", "ERR invalid password", "UNKILLABLE",
	} {
		if strings.HasPrefix(message, code) {
			return true
		}
	}
	return false
}
