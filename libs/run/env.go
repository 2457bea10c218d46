package run

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/tidewaiter/tidewaiter/libs/bus"
	"github.com/tidewaiter/tidewaiter/libs/redis"
	"github.com/tidewaiter/tidewaiter/libs/registry"
	"github.com/tidewaiter/tidewaiter/libs/store"
)

// Env is what a service is given. Each connection is made when first asked for
// and closed after the service has returned.
type Env struct {
	Service string
	Log     *slog.Logger
	Metrics prometheus.Registerer
	Health  *Health

	cfg      *Config
	mu       sync.Mutex
	bus      *bus.Bus
	redis    *redis.Client
	db       *store.DB
	registry *registry.Client
}

// Env returns what the named service is given.
func (c *Config) Env(service string, log *slog.Logger, metrics prometheus.Registerer, health *Health) *Env {
	return &Env{Service: service, Log: log, Metrics: metrics, Health: health, cfg: c}
}

// Section decodes the service's own section of the configuration into the
// struct that into points at, over the defaults it already holds. Unknown keys
// are errors that name the line; if *into has a method Validate() error it is
// called. errors.Is(err, ErrConfig).
func (e *Env) Section(into any) error { return e.cfg.CheckSection(e.Service, into) }

// Shared is Section for a section that several services read, for example "sources".
func (e *Env) Shared(section string, into any) error { return e.cfg.CheckSection(section, into) }

// Bus returns the service's connection to Kafka.
func (e *Env) Bus() (*bus.Bus, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.bus != nil {
		return e.bus, nil
	}
	if len(e.cfg.Kafka.Brokers) == 0 {
		return nil, fmt.Errorf("kafka.brokers is empty, set it or TIDEWAITER_KAFKA_BROKERS: %w", ErrConfig)
	}
	b, err := bus.New(e.cfg.Kafka.Config, e.Service, e.Log, e.Metrics)
	if err != nil {
		return nil, fmt.Errorf("kafka: %w", err)
	}
	e.bus = b
	e.Health.Check(e.Service+" kafka", b.Ready)
	return b, nil
}

// Redis returns the service's connection to Redis.
func (e *Env) Redis() (*redis.Client, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.redis != nil {
		return e.redis, nil
	}
	if e.cfg.Redis.URL == "" {
		return nil, fmt.Errorf("redis.url is empty, set it or TIDEWAITER_REDIS_URL: %w", ErrConfig)
	}
	c, err := redis.Open(e.cfg.Redis.Config)
	if err != nil {
		return nil, fmt.Errorf("redis: %w", err)
	}
	e.redis = c
	e.Health.Check(e.Service+" redis", func() error {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		return c.Ping(ctx)
	})
	return c, nil
}

// DB returns the service's database; the service migrates its own tables.
func (e *Env) DB(ctx context.Context) (*store.DB, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.db != nil {
		return e.db, nil
	}
	if e.cfg.Database.URL == "" {
		return nil, fmt.Errorf("database.url is empty, set it or TIDEWAITER_DATABASE_URL: %w", ErrConfig)
	}
	db, err := store.Open(ctx, e.cfg.Database.URL)
	if err != nil {
		return nil, fmt.Errorf("database: %w", err)
	}
	e.db = db
	e.Health.Check(e.Service+" database", func() error {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		return db.PingContext(ctx)
	})
	return db, nil
}

// Registry returns the client for the configured registries.
func (e *Env) Registry() (*registry.Client, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.registry != nil {
		return e.registry, nil
	}
	c, err := registry.New(e.cfg.Registries, e.Log)
	if err != nil {
		return nil, fmt.Errorf("registries: %w", err)
	}
	e.registry = c
	return c, nil
}

// Close ends the connections that were made.
func (e *Env) Close() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	var errs []error
	if e.bus != nil {
		errs = append(errs, e.bus.Close())
	}
	if e.redis != nil {
		errs = append(errs, e.redis.Close())
	}
	if e.db != nil {
		errs = append(errs, e.db.Close())
	}
	return errors.Join(errs...)
}
