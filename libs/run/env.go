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
	budget   *redis.Client // of the registries; the service works without it
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

// errStarting is why a process is not ready whose service has not said Started.
var errStarting = errors.New("it is starting")

func (e *Env) starting() { e.Health.Set(e.Service, errStarting) }

// Started says that the service does from now on what it is there for, and that
// whoever asks it something is answered.
func (e *Env) Started() { e.Health.Set(e.Service, nil) }

// Listening returns what Serve calls when it listens: Started, and then ready if
// it is not nil.
func (e *Env) Listening(ready func(addr string)) func(addr string) {
	return func(addr string) {
		e.Started()
		if ready != nil {
			ready(addr)
		}
	}
}

// Bus returns the service's connection to Kafka.
func (e *Env) Bus() (*bus.Bus, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.bus != nil {
		return e.bus, nil
	}
	cfg, err := e.cfg.BusConfig(e.Service)
	if err != nil {
		return nil, err
	}
	b, err := bus.New(cfg, e.Service, e.Log, e.Metrics)
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
	cfg, err := e.cfg.redisConfig(e.Service)
	if err != nil {
		return nil, err
	}
	c, err := redis.Open(cfg)
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
	cfg, err := e.cfg.storeConfig(e.Service)
	if err != nil {
		return nil, err
	}
	db, err := store.OpenConfig(ctx, cfg)
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

// Registry returns the client for the configured registries, whose rates all
// who use the same Redis and credential keep to together. Where Redis is not
// configured or away, each keeps to its part.
func (e *Env) Registry() (*registry.Client, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.registry != nil {
		return e.registry, nil
	}
	var budget registry.Budget
	if e.cfg.hasRedis(e.Service) {
		cfg, err := e.cfg.redisConfig(e.Service)
		if err != nil {
			return nil, err
		}
		// A connection of its own, which is no condition of being ready.
		if e.budget, err = redis.Open(cfg); err != nil {
			return nil, fmt.Errorf("redis: %w", err)
		}
		budget = e.budget
	}
	c, err := registry.NewShared(e.cfg.Hosts(e.Service), budget, e.Log)
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
	if e.registry != nil {
		errs = append(errs, e.registry.Close())
	}
	if e.budget != nil {
		errs = append(errs, e.budget.Close())
	}
	if e.db != nil {
		errs = append(errs, e.db.Close())
	}
	return errors.Join(errs...)
}
