// Package catalog remembers everything that happens to images: it tells an
// image's timeline, finds whom a finding concerns and opens, changes and closes
// problems, sees to it that every image reaches an end, and answers for the
// fleet over HTTP.
//
// What it knows is a function of the set of events it was given: each fact
// keeps the newest time or the highest sequence it was told, so that events may
// come in any order and more than once.
package catalog

import (
	"context"
	"embed"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"sync"
	"time"

	"github.com/cloudevents/sdk-go/v2/event"
	"golang.org/x/sync/errgroup"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/bus"
	"github.com/tidewaiter/tidewaiter/libs/credential"
	"github.com/tidewaiter/tidewaiter/libs/run"
	"github.com/tidewaiter/tidewaiter/libs/store"
)

// Name is the service's name: its consumer group, event source and table prefix.
const Name = "catalog"

// batchSize is how many events of a partition are recorded in one transaction.
const batchSize = 200

//go:embed migrations/*.sql
var migrations embed.FS

// Config is the section "catalog" of the configuration. Durations are written
// like "15m" or "6h".
type Config struct {
	// Listen is the host:port of the HTTP API; empty: none.
	Listen string `yaml:"listen"`
	// TokenFile or TokenEnv hold the bearer token that the API asks for; of two
	// lines each is one. The file is read for each request, so that the token can be
	// changed while running.
	TokenFile string `yaml:"tokenFile"`
	TokenEnv  string `yaml:"tokenEnv"`
	// Deadlines are how long after a push, and then after each repeated push, an
	// image may take to its end. After the last one it has failed.
	Deadlines []time.Duration `yaml:"deadlines"`
	// Tick is how often deadlines are looked at.
	Tick time.Duration `yaml:"tick"`
	// KeepBlobs is after how long blobs that no current image refers to are
	// deleted; KeepOutputs the same for remembered outputs of handled events and
	// KeepTimeline for the timeline and for what webhooks told of. Both must be
	// longer than Kafka keeps events.
	KeepBlobs    time.Duration `yaml:"keepBlobs"`
	KeepOutputs  time.Duration `yaml:"keepOutputs"`
	KeepTimeline time.Duration `yaml:"keepTimeline"`
	// KeepSnapshots is of how many advisory snapshots it is remembered what they
	// changed. What was matched before them all is matched again in any case.
	KeepSnapshots int `yaml:"keepSnapshots"`
}

// DefaultConfig returns what an absent section means.
func DefaultConfig() Config {
	const day = 24 * time.Hour
	return Config{
		Deadlines: []time.Duration{15 * time.Minute, time.Hour, 6 * time.Hour},
		Tick:      10 * time.Second,
		KeepBlobs: 30 * day, KeepOutputs: 30 * day, KeepTimeline: 90 * day,
		KeepSnapshots: 30,
	}
}

// Validate says what cannot work.
func (c Config) Validate() error {
	if c.Listen != "" && c.TokenFile == "" && c.TokenEnv == "" {
		return errors.New("listen is set without tokenFile or tokenEnv: the API does not work without a token")
	}
	if len(c.Deadlines) == 0 {
		return errors.New("deadlines is empty: images that are stuck would never reach an end")
	}
	if c.KeepSnapshots < 1 {
		return fmt.Errorf("keepSnapshots is %d, want at least 1", c.KeepSnapshots)
	}
	for _, d := range append([]time.Duration{c.Tick, c.KeepBlobs, c.KeepOutputs, c.KeepTimeline}, c.Deadlines...) {
		if d <= 0 {
			return fmt.Errorf("duration %s: want more than 0", d)
		}
	}
	return nil
}

// Publisher sends events and returns when all are stored.
type Publisher interface {
	Publish(ctx context.Context, events ...event.Event) error
}

// Service is the catalog.
type Service struct {
	cfg Config
	db  *store.DB
	bus Publisher
	log *slog.Logger

	sending sync.Mutex // one sender at a time, so that events leave in order
	// readUpTo says whether all pushes that were sent before a moment are recorded;
	// nil: they are.
	readUpTo  func(ctx context.Context, t time.Time) (bool, error)
	summaries summaryCache
	drawing   sync.Mutex    // one at a time draws the consequences of snapshots
	wake      chan struct{} // that there are some to draw
}

// New migrates the catalog's tables and returns the service. It sends what it
// decides through bus.
func New(ctx context.Context, cfg Config, db *store.DB, bus Publisher, log *slog.Logger) (*Service, error) {
	if err := db.Migrate(ctx, Name, migrations); err != nil {
		return nil, fmt.Errorf("migrate %s: %w", Name, err)
	}
	return &Service{cfg: cfg, db: db, bus: bus, log: log, summaries: summaryCache{items: map[string]summary{}}, wake: make(chan struct{}, 1)}, nil
}

// Consumes lists the events that Handle understands.
func Consumes() []string {
	return []string{
		contracts.ImagePushedV1, contracts.ImageDeletedV1, contracts.TagObservedV1, contracts.ImagePlannedV1,
		contracts.ImageUnsupportedV1, contracts.ImageGoneV1, contracts.ImageFailedV1,
		contracts.LayerAnalyzedV1, contracts.LayerFailedV1,
		contracts.ImageAssembledV1, contracts.ImageMatchedV1, contracts.ImageAttestedV1,
		contracts.AdvisoriesChangedV1,
	}
}

// Run is the service as a run.Service.
func Run(ctx context.Context, env *run.Env) error {
	cfg := DefaultConfig()
	if err := env.Section(&cfg); err != nil {
		return fmt.Errorf("configuration of %s: %w", Name, err)
	}
	db, err := env.DB(ctx)
	if err != nil {
		return fmt.Errorf("open database of %s: %w", Name, err)
	}
	b, err := env.Bus()
	if err != nil {
		return fmt.Errorf("open bus of %s: %w", Name, err)
	}
	s, err := New(ctx, cfg, db, b, env.Log)
	if err != nil {
		return err
	}
	s.readUpTo = func(ctx context.Context, t time.Time) (bool, error) {
		return b.ReadUpTo(ctx, t, contracts.ImagePushedV1)
	}
	produces := []string{contracts.FindingOpenedV1, contracts.FindingChangedV1, contracts.FindingClosedV1, contracts.ImageRematchV1}
	if err := b.EnsureTopics(ctx, append(produces, Consumes()...)...); err != nil {
		return fmt.Errorf("create topics of %s: %w", Name, err)
	}
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error {
		return b.Consume(ctx, bus.Subscription{Events: Consumes(), Handler: s.Handle, Batch: s.Batch, BatchSize: batchSize})
	})
	group.Go(func() error { return s.watch(ctx) })
	if cfg.Listen == "" {
		env.Started()
	} else {
		group.Go(func() error {
			return env.Serve(ctx, cfg.Listen, s.API(s.tokens), env.Listening(func(addr string) {
				env.Log.InfoContext(ctx, "catalog API is listening", "address", addr)
			}))
		})
	}
	if err := group.Wait(); err != nil {
		return fmt.Errorf("run %s: %w", Name, err)
	}
	return nil
}

// tokens returns the API's bearer tokens as they are configured now.
func (s *Service) tokens() ([]string, error) {
	return credential.Secret{File: s.cfg.TokenFile, Env: s.cfg.TokenEnv}.All(os.LookupEnv)
}

// watch looks at deadlines and at what is to be matched again at every tick, and
// cleans up once a day, until ctx ends. Of several replicas one does it at a
// time. Outages are logged and overcome at a later tick.
func (s *Service) watch(ctx context.Context) error {
	tick := time.NewTicker(s.cfg.Tick)
	defer tick.Stop()
	var cleaned time.Time
	for {
		_, err := s.db.Alone(ctx, "catalog watch", func(ctx context.Context) error {
			s.look(ctx, &cleaned)
			return nil
		})
		if err != nil && ctx.Err() == nil {
			s.log.WarnContext(ctx, "the database cannot be asked, trying again", "error", err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		case <-s.wake:
		}
	}
}

// look is one round of watch. cleaned is when it cleaned up last.
func (s *Service) look(ctx context.Context, cleaned *time.Time) {
	now := time.Now().UTC()
	if err := s.CheckDeadlines(ctx, now); err != nil && ctx.Err() == nil {
		s.log.WarnContext(ctx, "deadlines could not be checked, trying again", "error", err)
	}
	if err := s.Rematch(ctx, now); err != nil && ctx.Err() == nil {
		s.log.WarnContext(ctx, "images could not be asked for again, trying again", "error", err)
	}
	if now.Sub(*cleaned) < 24*time.Hour {
		return
	}
	err := s.CleanUp(ctx, now)
	switch {
	case err == nil:
		*cleaned = now
	case ctx.Err() == nil:
		s.log.WarnContext(ctx, "cleaning up failed, trying again", "error", err)
	}
}

// nudge lets watch look before its next tick.
func (s *Service) nudge() {
	select {
	case s.wake <- struct{}{}:
	default: // it will
	}
}

// API returns the HTTP API; tokens gives the bearer tokens of which one is asked for.
func (s *Service) API(tokens func() ([]string, error)) http.Handler { return newAPI(s, tokens) }
