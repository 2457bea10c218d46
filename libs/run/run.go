// Package run starts services: configuration, logs, metrics, health, signals
// and draining in one call, and the connections a service asks for.
package run

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"golang.org/x/sync/errgroup"
)

// Exit codes of every Tidewaiter program.
const (
	ExitOK           = 0
	ExitPolicy       = 1 // a policy or threshold says no
	ExitUsage        = 2 // wrong use or bad input
	ExitUnverifiable = 3 // no statement, or a bad, foreign or too old one
	ExitUnavailable  = 4 // something that is needed cannot be reached
)

// DefaultDrain bounds how long requests in hand may take once a server stops.
const DefaultDrain = 10 * time.Second

// Service runs until its context ends, then drains and returns nil.
type Service func(ctx context.Context, env *Env) error

// Main runs one service as a process and does not return.
func Main(name string, s Service) {
	ctx, stop := Signals(context.Background())
	code := run(ctx, name, s, os.Args[1:], os.Stderr)
	stop()
	os.Exit(code)
}

func run(ctx context.Context, name string, s Service, args []string, stderr io.Writer) int {
	flags := flag.NewFlagSet(name, flag.ContinueOnError)
	flags.SetOutput(stderr)
	path := flags.String("config", os.Getenv("TIDEWAITER_CONFIG"), "configuration `file` (YAML); also TIDEWAITER_CONFIG")
	if err := flags.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return ExitOK
		}
		return ExitUsage
	}
	cfg, err := Load(*path, os.LookupEnv)
	if err != nil {
		fmt.Fprintf(stderr, "%s: %v\n", name, err)
		return ExitUsage
	}
	log, err := NewLogger(cfg.Log, stderr)
	if err != nil {
		fmt.Fprintf(stderr, "%s: %v\n", name, err)
		return ExitUsage
	}
	if err := All(ctx, cfg, log, Named{name, s}); err != nil {
		log.ErrorContext(ctx, "service stopped", "service", name, "error", err)
		if errors.Is(err, ErrConfig) {
			return ExitUsage
		}
		return ExitUnavailable
	}
	return ExitOK
}

// Signals returns a context that ends at SIGINT or SIGTERM. A second signal
// ends the process at once, as a user who is tired of waiting expects.
func Signals(parent context.Context) (context.Context, context.CancelFunc) {
	ctx, stop := signal.NotifyContext(parent, os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // from here on the default action is back
	return ctx, stop
}

// Named is a service and its name, which is its consumer group, its section of
// the configuration and the prefix of its tables.
type Named struct {
	Name string
	Run  Service
}

// All runs services in this process until ctx ends or one of them fails, with
// one HTTP server for /healthz, /readyz and /metrics (where cfg asks for it).
// It returns when all have drained, with the first error.
func All(ctx context.Context, cfg *Config, log *slog.Logger, services ...Named) error {
	metrics := prometheus.NewRegistry()
	metrics.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	health := NewHealth()
	group, ctx := errgroup.WithContext(ctx)
	if cfg.HTTP.Listen != "" {
		group.Go(func() error {
			return serve(ctx, log, cfg.HTTP.Listen, Monitor(health, metrics), nil)
		})
	}
	for _, s := range services {
		env := cfg.Env(s.Name, log.With("service", s.Name), metrics, health)
		env.starting()
		group.Go(func() error {
			if err := errors.Join(Ended(ctx, s.Run(ctx, env)), env.Close()); err != nil {
				return fmt.Errorf("service %s: %w", s.Name, err)
			}
			return nil
		})
	}
	return group.Wait()
}

// Ended says what it means that a service has returned err: nothing if it was
// asked to stop, also while it was still starting; a failure otherwise.
func Ended(ctx context.Context, err error) error {
	switch {
	case ctx.Err() == nil && err == nil:
		return errors.New("ended before it was asked to")
	case ctx.Err() != nil && errors.Is(err, context.Canceled):
		return nil
	}
	return err
}

// Monitor serves /healthz (the process runs), /readyz (every dependency of
// every service works; 503 with the reasons otherwise) and /metrics.
func Monitor(health *Health, metrics prometheus.Gatherer) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprintln(w, "ok")
	})
	mux.Handle("GET /readyz", health)
	mux.Handle("GET /metrics", promhttp.HandlerFor(metrics, promhttp.HandlerOpts{}))
	return mux
}

// Serve serves HTTP on address (host:port) until ctx ends, then lets requests
// in hand finish for DefaultDrain. ready, if not nil, is called with the
// address once it listens.
func (e *Env) Serve(ctx context.Context, address string, h http.Handler, ready func(addr string)) error {
	return serve(ctx, e.Log, address, h, ready)
}

func serve(ctx context.Context, log *slog.Logger, address string, h http.Handler, ready func(string)) error {
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "tcp", address)
	if err != nil {
		return fmt.Errorf("listen on %s: %w", address, err)
	}
	server := &http.Server{
		Handler:           h,
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       30 * time.Second,
		WriteTimeout:      60 * time.Second,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    64 << 10,
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelWarn),
		BaseContext:       func(net.Listener) context.Context { return context.WithoutCancel(ctx) },
	}
	stopped := make(chan error, 1)
	cancel := context.AfterFunc(ctx, func() {
		drain, done := context.WithTimeout(context.WithoutCancel(ctx), DefaultDrain)
		defer done()
		stopped <- server.Shutdown(drain)
	})
	defer cancel()
	if ready != nil {
		ready(l.Addr().String())
	}
	if err := server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve on %s: %w", address, err)
	}
	if err := <-stopped; err != nil {
		return fmt.Errorf("stop serving on %s: %w", address, err)
	}
	return nil
}

// NewLogger returns a logger that writes to w as cfg says.
func NewLogger(cfg LogConfig, w io.Writer) (*slog.Logger, error) {
	var level slog.Level
	if cfg.Level != "" {
		if err := level.UnmarshalText([]byte(cfg.Level)); err != nil {
			return nil, fmt.Errorf("log.level %q is not debug, info, warn or error: %w", cfg.Level, ErrConfig)
		}
	}
	options := &slog.HandlerOptions{Level: level}
	switch cfg.Format {
	case "", "json":
		return slog.New(slog.NewJSONHandler(w, options)), nil
	case "text":
		return slog.New(slog.NewTextHandler(w, options)), nil
	default:
		return nil, fmt.Errorf("log.format %q is not json or text: %w", cfg.Format, ErrConfig)
	}
}
