package gatekeeper

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/bus"
	"github.com/tidewaiter/tidewaiter/libs/run"
	"github.com/tidewaiter/tidewaiter/services/attestor/statement"
	"github.com/tidewaiter/tidewaiter/services/matcher/policy"
)

// Deadlines of the webhook server. The API server waits at most 30 s.
const (
	headerTimeout = 5 * time.Second
	readTimeout   = 10 * time.Second
	writeTimeout  = 30 * time.Second
	idleTimeout   = 2 * time.Minute
	// reconnect is the pause before Kafka is tried again.
	reconnect = 2 * time.Second
)

// Run answers reviews until ctx ends. It is a run.Service.
func Run(ctx context.Context, env *run.Env) error { return Listening(nil)(ctx, env) }

// Listening is Run that calls ready with the address once reviews are answered.
func Listening(ready func(addr string)) run.Service {
	return func(ctx context.Context, env *run.Env) error {
		cfg := DefaultConfig()
		if err := env.Section(&cfg); err != nil {
			return fmt.Errorf("configuration of %s: %w", Name, err)
		}
		config := func(err error) error { return fmt.Errorf("%s: %w: %w", Name, err, run.ErrConfig) }
		if cfg.Policy != "" {
			p, err := policy.Load(cfg.Policy)
			if err != nil {
				return config(err)
			}
			cfg.Policy, cfg.PolicyDigest = "", p.Digest()
		}
		keys, err := newFiles(env.Log, func(contents [][]byte) ([]statement.Verifier, error) {
			return statement.LoadVerifiers(contents...)
		}, cfg.KeyFiles...)
		if err != nil {
			return config(err)
		}
		who, err := newCaller(cfg.Auth, env.Log)
		if err != nil {
			return config(err)
		}
		var background sync.WaitGroup
		defer background.Wait()
		ctx, stop := context.WithCancel(ctx)
		defer stop()
		certificate, err := certificates(ctx, cfg.TLS, env.Log, &background)
		if err != nil {
			return config(err)
		}
		deps := Deps{Keys: keys.get, Caller: who.may, Log: env.Log, Metrics: env.Metrics}
		b, err := connect(ctx, env, cfg, &deps)
		if err != nil {
			return err
		}
		g, err := New(cfg, deps)
		if err != nil {
			return config(err)
		}
		defer g.Close()
		// Reviews are answered without Kafka too: nobody could deploy what mends it.
		background.Go(func() { g.withKafka(ctx, b) })
		return serve(ctx, env.Log, cfg.Listen, serverTLS(certificate, who), g.Handler(), env.Listening(ready))
	}
}

// connect opens what reviews may go without: none of it makes the service
// unready, as a cluster whose webhook is away admits nothing.
func connect(ctx context.Context, env *run.Env, cfg Config, deps *Deps) (*bus.Bus, error) {
	client, err := env.Registry()
	if err != nil {
		return nil, fmt.Errorf("open registries of %s: %w", Name, err)
	}
	cache, err := env.Redis()
	if err != nil {
		return nil, fmt.Errorf("open redis of %s: %w", Name, err)
	}
	b, err := env.Bus()
	if err != nil {
		return nil, fmt.Errorf("open bus of %s: %w", Name, err)
	}
	deps.Registry, deps.Cache = client, cache
	if cfg.Bundles == FromDatabase {
		db, err := env.DB(ctx)
		if err != nil {
			return nil, fmt.Errorf("open database of %s: %w", Name, err)
		}
		deps.Blobs = db
	}
	for _, optional := range []string{"redis", "kafka", "database"} {
		env.Health.Check(Name+" "+optional, func() error { return nil })
	}
	return b, nil
}

// certificates returns the function that the TLS server asks for its certificate.
func certificates(ctx context.Context, cfg TLS, log *slog.Logger, background *sync.WaitGroup) (func() *tls.Certificate, error) {
	if cfg.Dir == "" {
		f, err := newFiles(log, parseKeyPair, cfg.CertFile, cfg.KeyFile)
		if err != nil {
			return nil, err
		}
		return f.get, nil
	}
	own, err := newOwnCertificate(cfg.Dir, cfg.Names, log, time.Now)
	if err != nil {
		return nil, err
	}
	background.Go(func() { own.run(ctx) })
	return own.current, nil
}

// withKafka publishes decisions and learns of new statements until ctx ends.
func (g *Gatekeeper) withKafka(ctx context.Context, b *bus.Bus) {
	var group sync.WaitGroup
	defer group.Wait()
	until := func(what string, work func() error) {
		for ctx.Err() == nil {
			if err := work(); err != nil && ctx.Err() == nil {
				g.Log.WarnContext(ctx, "Kafka does not help", slog.String("what", what), slog.Any("error", err))
			} else if err == nil {
				return
			}
			pause := time.NewTimer(reconnect)
			select {
			case <-pause.C:
			case <-ctx.Done():
				pause.Stop()
			}
		}
	}
	until("create topics", func() error {
		return b.EnsureTopics(ctx, contracts.AdmissionDecidedV1, contracts.ImagePushedV1, contracts.ImageAttestedV1)
	})
	group.Go(func() { g.queue.run(ctx, b) })
	group.Go(func() {
		until("consume", func() error {
			return b.Consume(ctx, bus.Subscription{Events: []string{contracts.ImageAttestedV1}, Handler: g.Handle})
		})
	})
	group.Go(func() {
		until("follow", func() error {
			return b.Tail(ctx, b.Topics(contracts.ImageAttestedV1), false, func(m bus.Tailed) error {
				if m.Err == nil {
					g.Announced(m.Event)
				}
				return nil
			})
		})
	})
}

// serve serves HTTPS on address until ctx ends, then lets requests in hand
// finish for run.DefaultDrain.
func serve(ctx context.Context, log *slog.Logger, address string, config *tls.Config, h http.Handler, ready func(string)) error {
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "tcp", address)
	if err != nil {
		return fmt.Errorf("listen on %s: %w", address, err)
	}
	server := &http.Server{
		Handler:           h,
		TLSConfig:         config,
		ReadHeaderTimeout: headerTimeout,
		ReadTimeout:       readTimeout,
		WriteTimeout:      writeTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    64 << 10,
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelDebug), // handshakes of whoever connects
		BaseContext:       func(net.Listener) context.Context { return context.WithoutCancel(ctx) },
	}
	stopped := make(chan error, 1)
	cancel := context.AfterFunc(ctx, func() {
		drain, done := context.WithTimeout(context.WithoutCancel(ctx), run.DefaultDrain)
		defer done()
		stopped <- server.Shutdown(drain)
	})
	defer cancel()
	if ready != nil {
		ready(l.Addr().String())
	}
	if err := server.ServeTLS(l, "", ""); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve on %s: %w", address, err)
	}
	if err := <-stopped; err != nil {
		return fmt.Errorf("stop serving on %s: %w", address, err)
	}
	return nil
}
