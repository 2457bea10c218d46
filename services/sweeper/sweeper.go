// Package sweeper lists registries and compares them with what catalog knows:
// it pushes what was missed into the bulk lane, reports what is gone, has
// images attested again whose statements are not in the registry any more, and
// measures how many events a registry loses.
//
// A source is swept by one replica at a time, which holds the lease of its
// registry. How far a sweep is stands in the database, so that it goes on where
// it was whoever goes on with it.
package sweeper

import (
	"context"
	"embed"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/url"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/cloudevents/sdk-go/v2/event"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"
	"golang.org/x/time/rate"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/credential"
	"github.com/tidewaiter/tidewaiter/libs/redis"
	"github.com/tidewaiter/tidewaiter/libs/registry"
	"github.com/tidewaiter/tidewaiter/libs/run"
	"github.com/tidewaiter/tidewaiter/libs/store"
	"github.com/tidewaiter/tidewaiter/services/catalog"
	"github.com/tidewaiter/tidewaiter/services/intake"
	"github.com/tidewaiter/tidewaiter/services/intake/scope"
	"github.com/tidewaiter/tidewaiter/services/sweeper/list"
)

// Name is the service's name.
const Name = "sweeper"

//go:embed migrations/*.sql
var migrations embed.FS

// Defaults of Config.
const (
	DefaultTick     = 5 * time.Second
	DefaultAttempts = 6
	DefaultPause    = 10 * time.Minute
	DefaultKeep     = 90 * 24 * time.Hour
)

// leaseTTL is how long the lease on a registry outlives its holder.
const leaseTTL = 30 * time.Second

// Config is the section "sweeper". What is swept stands with each source, in
// its field sweep.
type Config struct {
	// Listen is the host:port of the HTTP API; empty: none. TokenFile or TokenEnv
	// hold its bearer token, of two lines each is one; they are read for each request.
	Listen    string `yaml:"listen"`
	TokenFile string `yaml:"tokenFile"`
	TokenEnv  string `yaml:"tokenEnv"`
	// Catalog is the address of catalog's API, CatalogTokenFile or
	// CatalogTokenEnv hold its token.
	Catalog          string `yaml:"catalog"`
	CatalogTokenFile string `yaml:"catalogTokenFile"`
	CatalogTokenEnv  string `yaml:"catalogTokenEnv"`
	// Tick is how often it is looked whether a sweep is due.
	Tick time.Duration `yaml:"tick"`
	// Attempts is how often a request is made that a registry throttles or
	// cannot serve; then the sweep pauses and goes on after Pause.
	Attempts int           `yaml:"attempts"`
	Pause    time.Duration `yaml:"pause"`
	// Keep is how long finished sweeps are remembered.
	Keep time.Duration `yaml:"keep"`
}

// DefaultConfig returns the configuration before anything is set.
func DefaultConfig() Config {
	return Config{Tick: DefaultTick, Attempts: DefaultAttempts, Pause: DefaultPause, Keep: DefaultKeep}
}

// Validate returns everything that is wrong with the configuration.
func (c Config) Validate() error {
	var problems []error
	if c.Listen != "" && (c.TokenFile == "") == (c.TokenEnv == "") {
		problems = append(problems, errors.New("listen needs tokenFile or tokenEnv, one of them: the API does not work without a token"))
	}
	if u, err := url.Parse(c.Catalog); err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" || u.User != nil {
		problems = append(problems, errors.New("catalog is not the http:// or https:// address of catalog's API"))
	}
	if (c.CatalogTokenFile == "") == (c.CatalogTokenEnv == "") {
		problems = append(problems, errors.New("catalogTokenFile or catalogTokenEnv: exactly one is needed"))
	}
	for name, d := range map[string]time.Duration{"tick": c.Tick, "pause": c.Pause, "keep": c.Keep} {
		if d <= 0 {
			problems = append(problems, fmt.Errorf("%s is %s, it must be above 0", name, d))
		}
	}
	if c.Attempts < 1 {
		problems = append(problems, fmt.Errorf("attempts is %d, at least 1 is needed", c.Attempts))
	}
	return errors.Join(problems...)
}

// CheckSources returns everything that is wrong with the sweeps of sources.
func CheckSources(sources intake.Sources) error {
	var problems []error
	for _, id := range slices.Sorted(maps.Keys(sources)) {
		if s := sources[id]; s.Sweep != nil {
			if err := list.Check(options(s)); err != nil {
				problems = append(problems, fmt.Errorf("source %q: sweep: %w", id, err))
			}
		}
	}
	return errors.Join(problems...)
}

func options(s intake.Source) list.Options {
	w := s.Sweep.Defaulted()
	return list.Options{
		API: w.API, Registry: s.Registry, URL: w.URL, Within: w.Within, Region: w.Region, Username: w.Username, CAFile: w.CAFile,
	}
}

// Registry is what sweeper needs of a registry.Client.
type Registry interface {
	list.Registry
	Resolve(ctx context.Context, ref registry.Ref) (ocispec.Descriptor, error)
	AllReferrers(ctx context.Context, ref registry.Ref) (list []ocispec.Descriptor, api bool, err error)
}

// Catalog is what sweeper asks catalog.
type Catalog interface {
	Known(ctx context.Context, q catalog.KnownQuery) ([]catalog.KnownTag, error)
	ReadUpTo(ctx context.Context, until time.Time) (bool, error)
	Standings(ctx context.Context, registry, after string, limit int) (page []catalog.Standing, next string, total int, err error)
	Tags(ctx context.Context, registry, after string, limit int) (page []catalog.RepositoryTag, next string, err error)
}

// Publisher stores events; a nil error means that they will not be lost.
type Publisher interface {
	Publish(ctx context.Context, events ...event.Event) error
}

// Leases are held by one process at a time.
type Leases interface {
	Acquire(ctx context.Context, key, holder string, ttl time.Duration) (*redis.Lease, error)
	Hold(ctx context.Context, l *redis.Lease, ttl time.Duration, work func(ctx context.Context) error) error
}

// Deps are what a Sweeper works with.
type Deps struct {
	DB       *store.DB // migrated (Migrate)
	Registry Registry
	Catalog  Catalog
	Bus      Publisher
	Leases   Leases
	Log      *slog.Logger
	Metrics  prometheus.Registerer
	Now      func() time.Time // nil: the present
	// Listers replace those of package list, by source; for tests.
	Listers map[string]list.Lister
}

// source is a source at work.
type source struct {
	intake.Source
	rules  *scope.Rules // which of its pushes are wanted, as intake and planner decide it
	id     string
	sweep  intake.Sweep // with defaults
	lister list.Lister
	budget *rate.Limiter
	wake   chan struct{} // somebody asked for a sweep
	pace   *pace
	// listing is a digest of the settings that say what is listed.
	listing string
}

// Sweeper is the service.
type Sweeper struct {
	Deps
	cfg     Config
	sources map[string]*source
	metrics *metrics
}

// Migrate creates and updates the service's tables.
func Migrate(ctx context.Context, db *store.DB) error { return db.Migrate(ctx, Name, migrations) }

// New returns a sweeper of those of the given sources that have a sweep.
func New(cfg Config, sources intake.Sources, d Deps) (*Sweeper, error) {
	if err := errors.Join(sources.Validate(), CheckSources(sources)); err != nil {
		return nil, fmt.Errorf("%w: %w", err, run.ErrConfig)
	}
	if d.Now == nil {
		d.Now = time.Now
	}
	s := &Sweeper{Deps: d, cfg: cfg, sources: map[string]*source{}, metrics: newMetrics(d.Metrics)}
	budgets := map[string]*rate.Limiter{} // by registry: it is the registry that is spared
	for _, id := range slices.Sorted(maps.Keys(sources)) {
		c := sources[id]
		if c.Sweep == nil {
			continue
		}
		rules, err := c.Rules()
		if err != nil {
			return nil, fmt.Errorf("source %q: %w: %w", id, err, run.ErrConfig)
		}
		src := &source{Source: c, rules: rules, id: id, sweep: c.Sweep.Defaulted(), wake: make(chan struct{}, 1), pace: &pace{}}
		if src.listing, err = listed(src); err != nil {
			return nil, fmt.Errorf("source %q: %w", id, err)
		}
		host := strings.ToLower(c.Registry)
		limit := rate.Limit(src.sweep.Rate)
		if budgets[host] == nil {
			budgets[host] = rate.NewLimiter(limit, 1)
		}
		src.budget = budgets[host]
		src.budget.SetLimit(min(src.budget.Limit(), limit))
		if src.lister, err = s.lister(src); err != nil {
			return nil, fmt.Errorf("source %q: sweep: %w: %w", id, err, run.ErrConfig)
		}
		s.sources[id] = src
	}
	return s, nil
}

// listed digests the settings that say what of a registry is listed.
func listed(src *source) (string, error) {
	text, err := json.Marshal([]any{
		src.Registry, src.sweep.API, src.sweep.URL, src.sweep.Within, src.sweep.Region, src.Paths, src.Repositories, src.Tags,
	})
	if err != nil {
		return "", fmt.Errorf("encode what is listed: %w", err)
	}
	return contracts.DigestOf(text), nil
}

func (s *Sweeper) lister(src *source) (list.Lister, error) {
	if l := s.Listers[src.id]; l != nil {
		return l, nil
	}
	o := options(src.Source)
	o.Client, o.Wait, o.Now = s.Registry, src.wait, s.Now
	if src.sweep.SecretFile != "" || src.sweep.SecretEnv != "" {
		o.Secret = func() (string, error) {
			secret, err := run.Secret("sources."+src.id+".sweep", src.sweep.SecretFile, src.sweep.SecretEnv, os.LookupEnv)
			return strings.TrimSpace(secret), err
		}
		if _, err := o.Secret(); err != nil {
			return nil, err
		}
	}
	return list.New(o)
}

// wait blocks until the registry may be asked again.
func (src *source) wait(ctx context.Context) error {
	if err := src.budget.Wait(ctx); err != nil {
		return fmt.Errorf("wait for the rate budget: %w", err)
	}
	return nil
}

// Run sweeps until ctx ends; it is a run.Service. Sections: "sweeper" and "sources".
func Run(ctx context.Context, env *run.Env) error {
	cfg, sources := DefaultConfig(), intake.Sources{}
	if err := env.Section(&cfg); err != nil {
		return err
	}
	if err := env.Shared("sources", &sources); err != nil {
		return err
	}
	db, err := env.DB(ctx)
	if err != nil {
		return err
	}
	if err := Migrate(ctx, db); err != nil {
		return err
	}
	registries, err := env.Registry()
	if err != nil {
		return err
	}
	leases, err := env.Redis()
	if err != nil {
		return err
	}
	b, err := env.Bus()
	if err != nil {
		return err
	}
	if err := b.EnsureTopics(ctx, contracts.ImagePushedV1, contracts.ImageDeletedV1); err != nil {
		return fmt.Errorf("create topics: %w", err)
	}
	s, err := New(cfg, sources, Deps{
		DB: db, Registry: registries, Bus: b, Leases: leases, Log: env.Log, Metrics: env.Metrics,
		Catalog: newCatalogAPI(cfg.Catalog, func() (string, error) {
			return credential.Secret{File: cfg.CatalogTokenFile, Env: cfg.CatalogTokenEnv}.First(os.LookupEnv)
		}),
	})
	if err != nil {
		return err
	}
	group, ctx := errgroup.WithContext(ctx)
	if cfg.Listen == "" {
		env.Started()
	} else {
		group.Go(func() error { return env.Serve(ctx, cfg.Listen, s.API(), env.Listening(nil)) })
	}
	group.Go(func() error { return s.Sweep(ctx) })
	return group.Wait()
}

// Sweep sweeps every source when it is due, until ctx ends.
func (s *Sweeper) Sweep(ctx context.Context) error {
	var group errgroup.Group
	for _, src := range s.sources {
		group.Go(func() error {
			s.sweepForever(ctx, src)
			return nil
		})
	}
	<-ctx.Done()
	return group.Wait()
}

// sweepForever sweeps one source when it is due. That it fails is no reason to stop.
func (s *Sweeper) sweepForever(ctx context.Context, src *source) {
	tick := time.NewTicker(s.cfg.Tick)
	defer tick.Stop()
	for {
		if err := s.Turn(ctx, src.id); err != nil && ctx.Err() == nil {
			s.Log.WarnContext(ctx, "sweep is interrupted, it goes on later", slog.String("source", src.id), slog.Any("error", err))
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		case <-src.wake:
		}
	}
}

// metrics of the service.
type metrics struct {
	events   *prometheus.CounterVec
	pushes   *prometheus.CounterVec
	sweeps   *prometheus.CounterVec
	finished *prometheus.GaugeVec
}

func newMetrics(reg prometheus.Registerer) *metrics {
	m := &metrics{
		events: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "tidewaiter_sweeper_events_total",
			Help: "Events sent, by source and cause: sweep, statement, deleted.",
		}, []string{"source", "cause"}),
		pushes: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "tidewaiter_sweeper_registry_pushes_total",
			Help: "Pushes that a registry holds, by source and whether a webhook told of them in time: heard, lost.",
		}, []string{"source", "webhook"}),
		sweeps: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "tidewaiter_sweeper_sweeps_total",
			Help: "Finished sweeps by source and end: complete, incomplete, failed.",
		}, []string{"source", "state"}),
		finished: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "tidewaiter_sweeper_last_complete_timestamp_seconds",
			Help: "When the last complete sweep of a source began.",
		}, []string{"source"}),
	}
	if reg != nil {
		reg.MustRegister(m.events, m.pushes, m.sweeps, m.finished)
	}
	return m
}
