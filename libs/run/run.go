// Package run starts a service: configuration, logs, metrics, health, signals
// and draining in one call, and the connections a service asks for.
package run

import (
	"context"
	"errors"
	"log/slog"
	"net/http"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/tidewaiter/tidewaiter/libs/bus"
	"github.com/tidewaiter/tidewaiter/libs/redis"
	"github.com/tidewaiter/tidewaiter/libs/registry"
	"github.com/tidewaiter/tidewaiter/libs/store"
)

var errUnbuilt = errors.New("unbuilt")

// Service runs until its context ends, then drains and returns nil.
type Service func(ctx context.Context, env *Env) error

// Env is what a service is given. Each connection is made when first asked for
// and closed by the caller of the service.
type Env struct {
	Service string
	Log     *slog.Logger
	Metrics prometheus.Registerer
	Health  *Health
}

// Section decodes the service's own section of the configuration into the
// struct into points at, over the defaults that it already holds. Unknown keys are errors
// that name the line. If *into has a method Validate() error, it is called.
func (e *Env) Section(into any) error { return errUnbuilt }

// Bus returns the service's connection to Kafka.
func (e *Env) Bus() (*bus.Bus, error) { return nil, errUnbuilt }

// Redis returns the service's connection to Redis.
func (e *Env) Redis() (*redis.Client, error) { return nil, errUnbuilt }

// DB returns the service's database, migrated by nobody yet.
func (e *Env) DB(ctx context.Context) (*store.DB, error) { return nil, errUnbuilt }

// Registry returns the client for the configured registries.
func (e *Env) Registry() (*registry.Client, error) { return nil, errUnbuilt }

// Serve serves HTTP on address until ctx ends, then lets requests in hand
// finish. ready is called with the address once it listens.
func (e *Env) Serve(ctx context.Context, address string, h http.Handler, ready func(addr string)) error {
	return errUnbuilt
}

// Health collects what keeps a service from working.
type Health struct{}

// Set records the state of one dependency; nil is good.
func (h *Health) Set(what string, err error) {}

// Main runs one service as a process: flags, signals, exit code.
func Main(name string, s Service) {}
