// Package redis holds what Tidewaiter keeps in Redis: leases, locks, budgets
// and caches. It is the only package that imports go-redis. Losing Redis costs
// work, never truth.
package redis

import (
	"context"
	crand "crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/redis/go-redis/v9/maintnotifications"

	"github.com/tidewaiter/tidewaiter/libs/credential"
)

const (
	// dialTimeout, commandTimeout bound one attempt to reach Redis.
	dialTimeout    = 5 * time.Second
	commandTimeout = 3 * time.Second
	// commandRetries bounds how often a command is repeated when a connection
	// breaks. Every script gives the same answer when it is run again.
	commandRetries = 2
	keepAlive      = 5 * time.Minute
)

// Config says how Redis is reached: at one address (url), through Sentinel, or
// as a Cluster. YAML section "redis".
type Config struct {
	URL string `yaml:"url"` // redis://[user@]host:port[/db] or rediss:// (TLS)
	// Sentinel finds the master of a replicated Redis, and the next one when it
	// is gone.
	Sentinel *Sentinel `yaml:"sentinel"`
	// Cluster are host:port of some nodes of a Redis Cluster.
	Cluster  []string `yaml:"cluster"`
	Username string   `yaml:"username"` // of the ACL; empty: the URL's, or the default user
	DB       int      `yaml:"db"`       // with sentinel; a URL names its own, a cluster has only 0
	Prefix   string   `yaml:"prefix"`   // before every key
	Password string   `yaml:"-"`
	// TLS is used with rediss://, sentinel and cluster; nil means no TLS to
	// sentinels and clusters, and the system's authorities with rediss://.
	TLS *tls.Config `yaml:"-"`

	// TLSSource and PasswordSource, where set, are asked at every connection and
	// go before TLS and Password.
	TLSSource      func() (*tls.Config, error) `yaml:"-"`
	PasswordSource func() (string, error)      `yaml:"-"`
}

// Sentinel says where sentinels are and what they call the master. They have
// passwords of their own, which are read when the service starts.
type Sentinel struct {
	Master       string   `yaml:"master"`
	Addresses    []string `yaml:"addresses"` // host:port each
	Username     string   `yaml:"username"`
	Password     string   `yaml:"-"`
	PasswordFile string   `yaml:"passwordFile"`
	PasswordEnv  string   `yaml:"passwordEnv"`
}

// Validate says what is wrong with c. Errors hold no password.
func (c Config) Validate() error {
	var problems []error
	wrong := func(format string, args ...any) { problems = append(problems, fmt.Errorf(format, args...)) }
	ways := 0
	for _, set := range []bool{c.URL != "", c.Sentinel != nil, len(c.Cluster) > 0} {
		if set {
			ways++
		}
	}
	if ways != 1 {
		wrong("url: %d of url, sentinel and cluster are set, exactly one is needed", ways)
	}
	if c.URL != "" {
		if _, err := c.parseURL(); err != nil {
			problems = append(problems, err)
		}
	}
	if c.Sentinel != nil {
		if c.Sentinel.Master == "" {
			wrong("sentinel.master is empty: it is the name in the sentinels' configuration (sentinel monitor NAME …)")
		}
		if len(c.Sentinel.Addresses) == 0 {
			wrong("sentinel.addresses is empty: list the sentinels, host:port each")
		}
		for i, a := range c.Sentinel.Addresses {
			if _, _, err := net.SplitHostPort(a); err != nil {
				wrong("sentinel.addresses[%d] is %q, host:port is needed", i, a)
			}
		}
	}
	for i, a := range c.Cluster {
		if _, _, err := net.SplitHostPort(a); err != nil {
			wrong("cluster[%d] is %q, host:port is needed", i, a)
		}
	}
	if c.DB < 0 || c.DB > 0 && c.Sentinel == nil {
		wrong("db is %d: a database is chosen with sentinel only; a URL names its own (redis://host:port/%d), a cluster has none", c.DB, c.DB)
	}
	return errors.Join(problems...)
}

// parseURL returns what the URL says. Its errors never repeat the URL.
func (c Config) parseURL() (*redis.Options, error) {
	options, err := redis.ParseURL(c.URL)
	if err != nil {
		return nil, errors.New("url is not redis://[user@]host:port[/db] or rediss://") // the error could hold a password
	}
	switch {
	case options.Password != "":
		return nil, errors.New("url must not hold a password: URLs are logged; use passwordFile or passwordEnv")
	case options.Username != "" && c.Username != "" && options.Username != c.Username:
		return nil, errors.New("url and username name two users, keep one")
	case options.TLSConfig == nil && (c.TLS != nil || c.TLSSource != nil):
		return nil, errors.New("url begins with redis://, which is without TLS, but there is a section tls: write rediss://")
	}
	return options, nil
}

// Client is a connection to Redis. It is safe for concurrent use.
type Client struct {
	rdb    redis.UniversalClient
	prefix string
	id     string // tells those who share a budget apart
}

// Open connects; an unreachable server is an error only of later calls. A URL
// that holds a password is refused: URLs are logged.
func Open(cfg Config) (*Client, error) {
	if err := cfg.Validate(); err != nil {
		return nil, fmt.Errorf("redis: %w", err)
	}
	options := &redis.UniversalOptions{
		Addrs: cfg.Cluster, IsClusterMode: len(cfg.Cluster) > 0, DB: cfg.DB,
		DialTimeout: dialTimeout, ReadTimeout: commandTimeout, WriteTimeout: commandTimeout,
		ContextTimeoutEnabled:    true,
		MaxRetries:               commandRetries,
		DisableIdentity:          true, // nothing that an ACL would have to allow
		MaintNotificationsConfig: &maintnotifications.Config{Mode: maintnotifications.ModeDisabled},
	}
	username := cfg.Username
	encrypted := cfg.TLSSource != nil || cfg.TLS != nil
	if cfg.URL != "" {
		u, err := cfg.parseURL()
		if err != nil {
			return nil, fmt.Errorf("redis: %w", err)
		}
		options.Addrs, options.DB, encrypted = []string{u.Addr}, u.DB, u.TLSConfig != nil
		if username == "" {
			username = u.Username
		}
	}
	if s := cfg.Sentinel; s != nil {
		options.MasterName, options.Addrs = s.Master, s.Addresses
		options.SentinelUsername, options.SentinelPassword = s.Username, s.Password
	}
	options.Dialer = (&net.Dialer{Timeout: dialTimeout, KeepAlive: keepAlive}).DialContext
	if encrypted {
		options.Dialer = credential.Over(options.Dialer, cfg.tls())
	}
	password := cfg.PasswordSource
	if password == nil {
		password = func() (string, error) { return cfg.Password, nil }
	}
	options.CredentialsProviderContext = func(context.Context) (string, string, error) {
		p, err := password()
		if err != nil {
			return "", "", fmt.Errorf("password: %w", err)
		}
		return username, p, nil
	}
	return &Client{rdb: redis.NewUniversalClient(options), prefix: cfg.Prefix, id: crand.Text()}, nil
}

func (c Config) tls() func() (*tls.Config, error) {
	switch {
	case c.TLSSource != nil:
		return c.TLSSource
	case c.TLS != nil:
		return func() (*tls.Config, error) { return c.TLS, nil }
	}
	return credential.TLS{}.Source()
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
