// Package intake receives webhooks: one URL a configured source, answered when
// what it says is stored in Kafka. It never connects to a registry.
package intake

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"time"

	"github.com/cloudevents/sdk-go/v2/event"
	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/time/rate"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/bus"
	"github.com/tidewaiter/tidewaiter/libs/run"
	"github.com/tidewaiter/tidewaiter/libs/store"
	"github.com/tidewaiter/tidewaiter/services/intake/hook"
	"github.com/tidewaiter/tidewaiter/services/intake/scope"
)

// Name of the service.
const Name = "intake"

// Defaults of Config.
const (
	DefaultListen  = "127.0.0.1:8480"
	DefaultMaxBody = 1 << 20 // more than any registry sends for one push
	// DefaultAckTimeout stays below the second after which Distribution gives up.
	DefaultAckTimeout = 700 * time.Millisecond
	// DefaultKeep is how long deliveries are remembered.
	DefaultKeep = 30 * 24 * time.Hour
)

// seenIDs bounds the ids that are kept in memory to recognise repeated deliveries.
const seenIDs = 200_000

// Config is the section "intake".
type Config struct {
	Listen     string        `yaml:"listen"`     // host:port of the webhook server
	MaxBody    int64         `yaml:"maxBody"`    // bytes, at most bus.MaxDeadLetterBytes
	AckTimeout time.Duration `yaml:"ackTimeout"` // for storing a delivery; then the sender is told to try again
	Keep       time.Duration `yaml:"keep"`       // how long deliveries are remembered
	// Admin opens POST /v1/submit and the delivery log to whoever has its token;
	// absent: they are closed.
	Admin *BearerAuth `yaml:"admin"`
}

// DefaultConfig returns the defaults.
func DefaultConfig() Config {
	return Config{Listen: DefaultListen, MaxBody: DefaultMaxBody, AckTimeout: DefaultAckTimeout, Keep: DefaultKeep}
}

// Validate returns everything that is wrong with the configuration.
func (c Config) Validate() error {
	var problems []error
	if c.Listen == "" {
		problems = append(problems, errors.New("listen is empty"))
	}
	if c.MaxBody < 1 || c.MaxBody > bus.MaxDeadLetterBytes { // what cannot be read must fit into a dead letter
		problems = append(problems, fmt.Errorf("maxBody %d is not 1 to %d", c.MaxBody, bus.MaxDeadLetterBytes))
	}
	if c.AckTimeout <= 0 {
		problems = append(problems, fmt.Errorf("ackTimeout %s is not above 0", c.AckTimeout))
	}
	if c.Keep <= 0 {
		problems = append(problems, fmt.Errorf("keep %s is not above 0", c.Keep))
	}
	if c.Admin != nil {
		problems = append(problems, oneOf("admin.token", c.Admin.TokenFile, c.Admin.TokenEnv))
	}
	return errors.Join(problems...)
}

// Publisher stores events; a nil error means that they will not be lost.
type Publisher interface {
	Publish(ctx context.Context, events ...event.Event) error
	PublishDeadLetter(ctx context.Context, topic, reason string, body []byte, headers map[string]string) error
}

// source is a Source at work.
type source struct {
	Source
	id       string
	kind     hook.Kind
	mapper   *hook.Mapper // of kind generic
	rules    *scope.Rules
	verifier *verifier
	quota    *rate.Limiter
}

// Intake is the service.
type Intake struct {
	cfg     Config
	sources map[string]*source
	decoy   *source
	admin   *verifier // nil: submit is closed
	out     Publisher
	record  func(delivery)
	refused func(delivery)
	db      func() *store.DB // of the delivery log; nil until it is open
	seen    *seen
	log     *slog.Logger
	metrics *metrics
	now     func() time.Time
}

// New returns a service for the given sources. Their secrets are read here.
func New(cfg Config, sources Sources, out Publisher, log *slog.Logger, reg prometheus.Registerer) (*Intake, error) {
	return newIntake(cfg, sources, out, outwards(), log, reg)
}

// outwards returns what keys and certificates are fetched through, now and then,
// so that no connection is kept.
func outwards() *http.Transport {
	return &http.Transport{
		Proxy: http.ProxyFromEnvironment, DisableKeepAlives: true,
		TLSHandshakeTimeout: fetchTimeout, ResponseHeaderTimeout: fetchTimeout, MaxResponseHeaderBytes: 64 << 10,
	}
}

func newIntake(
	cfg Config, sources Sources, out Publisher, transport http.RoundTripper, log *slog.Logger, reg prometheus.Registerer,
) (*Intake, error) {
	if err := errors.Join(cfg.Validate(), sources.Validate()); err != nil {
		return nil, err
	}
	s := &Intake{
		cfg: cfg, sources: map[string]*source{}, decoy: &source{verifier: decoy()},
		out: out, record: func(delivery) {}, refused: func(delivery) {}, db: func() *store.DB { return nil },
		seen: newSeen(seenIDs), log: log, metrics: newMetrics(reg), now: time.Now,
	}
	for id, c := range sources {
		kind, _ := hook.Find(c.Kind)
		v, err := newVerifier(c.Auth, kind, transport, log)
		if err != nil {
			return nil, fmt.Errorf("source %q: auth: %w", id, err)
		}
		rules, err := c.Rules()
		if err != nil {
			return nil, fmt.Errorf("source %q: %w", id, err)
		}
		limit := rate.Inf
		if c.Quota > 0 {
			limit = rate.Limit(float64(c.Quota) / 60)
		}
		var mapper *hook.Mapper
		if c.Mapping != nil {
			if mapper, err = c.Mapping.Compile(); err != nil {
				return nil, fmt.Errorf("source %q: %w", id, err)
			}
		}
		s.sources[id] = &source{
			Source: c, id: id, kind: kind, mapper: mapper, rules: rules, verifier: v, quota: rate.NewLimiter(limit, max(c.Quota, 1)),
		}
	}
	if cfg.Admin != nil {
		secret, err := newSecret(cfg.Admin.TokenFile, cfg.Admin.TokenEnv, log)
		if err != nil {
			return nil, fmt.Errorf("admin: %w", err)
		}
		s.admin = bearer(secret)
	}
	return s, nil
}

// Run serves webhooks until ctx ends; it is a run.Service. Sections: "intake"
// and "sources".
func Run(ctx context.Context, env *run.Env) error { return Listening(nil)(ctx, env) }

// Listening is Run that calls ready with the address once webhooks are served,
// which is how the all-in-one learns of a free port.
func Listening(ready func(addr string)) run.Service {
	return func(ctx context.Context, env *run.Env) error {
		cfg, sources := DefaultConfig(), Sources{}
		if err := env.Section(&cfg); err != nil {
			return err
		}
		if err := env.Shared("sources", &sources); err != nil {
			return err
		}
		b, err := env.Bus()
		if err != nil {
			return err
		}
		s, err := New(cfg, sources, b, env.Log, env.Metrics)
		if err != nil {
			return fmt.Errorf("%w: %w", err, run.ErrConfig)
		}
		for _, w := range sources.Warnings() {
			env.Log.WarnContext(ctx, "configuration could be safer", "warning", w)
		}
		if err := b.EnsureTopics(ctx, contracts.ImagePushedV1, contracts.ImageDeletedV1); err != nil {
			return fmt.Errorf("create topics: %w", err)
		}
		rec := newRecorder(cfg.Keep, func(ctx context.Context) (*store.DB, error) { return openDB(ctx, env) },
			s.metrics.unrecorded.Inc, env.Log)
		s.record, s.refused, s.db = rec.record, rec.refuse, rec.db.Load
		// The recorder ends after the server, so that the last calls are remembered too.
		recording, stop := context.WithCancel(context.WithoutCancel(ctx))
		done := make(chan struct{})
		go func() {
			defer close(done)
			rec.run(recording)
		}()
		pulling, stopPulls := context.WithCancel(ctx)
		p := pulls{s: s, note: env.Health.Note}
		p.start(pulling)
		err = env.Serve(ctx, cfg.Listen, s.Handler(), env.Listening(ready))
		stopPulls()
		p.done.Wait()
		for _, src := range s.sources {
			if src.verifier.wait != nil {
				src.verifier.wait()
			}
		}
		stop()
		<-done
		return err
	}
}

func openDB(ctx context.Context, env *run.Env) (*store.DB, error) {
	db, err := env.DB(ctx)
	if err != nil {
		return nil, err
	}
	// Deliveries are a log: without a database pushes are still taken, so it does
	// not count against readiness.
	env.Health.Check(Name+" database", func() error { return nil })
	if err := migrate(ctx, db); err != nil {
		return nil, err
	}
	return db, nil
}

// metrics of the service.
type metrics struct {
	requests   *prometheus.CounterVec
	events     *prometheus.CounterVec
	seconds    prometheus.Histogram
	unrecorded prometheus.Counter
	pulled     *prometheus.CounterVec
	pullUp     *prometheus.GaugeVec
}

func newMetrics(reg prometheus.Registerer) *metrics {
	m := &metrics{
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "tidewaiter_intake_requests_total",
			Help: "Calls by source, status and reason.",
		}, []string{"source", "status", "reason"}),
		events: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "tidewaiter_intake_events_total",
			Help: "Events of calls by source and what became of them: pushed, deleted, ignored, filtered, duplicate, dead, over-quota.",
		}, []string{"source", "outcome"}),
		seconds: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:    "tidewaiter_intake_request_seconds",
			Help:    "Time from a call's header to its answer.",
			Buckets: prometheus.ExponentialBuckets(0.001, 2, 11),
		}),
		pulled: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "tidewaiter_intake_pulled_messages_total",
			Help: "Messages of queues by source and reason; what is not-stored stays in the queue.",
		}, []string{"source", "reason"}),
		pullUp: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "tidewaiter_intake_pull_up",
			Help: "Whether the queue of a source can be pulled (1) or not (0).",
		}, []string{"source"}),
		unrecorded: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "tidewaiter_intake_unrecorded_deliveries_total",
			Help: "Deliveries that were answered but not remembered, because the database was too slow or away.",
		}),
	}
	reg.MustRegister(m.requests, m.events, m.seconds, m.unrecorded, m.pulled, m.pullUp)
	return m
}
