// Package assembler joins the plan of an image with the reports of its layers:
// when all of them are there, the image has an inventory.
//
// Everything that arrives is recorded, and whatever it touches is asked "is
// everything there?". Nothing is counted down, so that events may come in any
// order and more than once. There is no timer: an image that waits too long is
// pushed again by catalog.
package assembler

import (
	"context"
	"database/sql"
	"embed"
	"errors"
	"fmt"
	"log/slog"

	"github.com/cloudevents/sdk-go/v2/event"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/bus"
	"github.com/tidewaiter/tidewaiter/libs/run"
	"github.com/tidewaiter/tidewaiter/libs/store"
)

// Name is the service's name: its consumer group, event source and table prefix.
const Name = "assembler"

//go:embed migrations/*.sql
var migrations embed.FS

// errUnprepared rolls a transaction back whose inventories have to be made
// first, outside of it.
var errUnprepared = errors.New("inventories are not prepared")

// maxPasses bounds how often one event is tried: a pass for images, one for
// the indexes above them, one for what changed meanwhile, and some to spare.
const maxPasses = 10

// Config is the section "assembler" of the configuration.
type Config struct {
	// MaxAttempts is after how many failures of one repository that another try
	// might mend a layer becomes a gap of that repository's images.
	MaxAttempts int `yaml:"maxAttempts"`
	// CacheBytes bounds the layer reports kept in memory, in bytes of their JSON.
	CacheBytes int `yaml:"cacheBytes"`
}

// DefaultConfig returns what an absent section means.
func DefaultConfig() Config { return Config{MaxAttempts: 3, CacheBytes: 32 << 20} }

// Validate says what cannot work.
func (c Config) Validate() error {
	if c.MaxAttempts < 1 {
		return fmt.Errorf("maxAttempts is %d, want at least 1", c.MaxAttempts)
	}
	if c.CacheBytes < 0 {
		return fmt.Errorf("cacheBytes is %d, want 0 or more", c.CacheBytes)
	}
	return nil
}

// Service is the assembler.
type Service struct {
	cfg     Config
	db      *store.DB
	log     *slog.Logger
	reports *reportCache

	assembled prometheus.Counter
	asked     prometheus.Counter
}

// New migrates the assembler's tables and returns the service.
func New(ctx context.Context, cfg Config, db *store.DB, log *slog.Logger, metrics prometheus.Registerer) (*Service, error) {
	if err := db.Migrate(ctx, Name, migrations); err != nil {
		return nil, fmt.Errorf("migrate %s: %w", Name, err)
	}
	s := &Service{cfg: cfg, db: db, log: log, reports: newReportCache(cfg.CacheBytes)}
	var err error
	if s.assembled, err = counter(metrics, "tidewaiter_assembler_assembled_total", "Inventories announced."); err != nil {
		return nil, err
	}
	if s.asked, err = counter(metrics, "tidewaiter_assembler_layers_asked_again_total", "Layers requested again after a failure or a loss."); err != nil {
		return nil, err
	}
	return s, nil
}

// counter registers a counter, or returns the one that an earlier run of the
// service in this process registered.
func counter(metrics prometheus.Registerer, name, help string) (prometheus.Counter, error) {
	c := prometheus.NewCounter(prometheus.CounterOpts{Name: name, Help: help})
	err := metrics.Register(c)
	var already prometheus.AlreadyRegisteredError
	if errors.As(err, &already) {
		if old, ok := already.ExistingCollector.(prometheus.Counter); ok {
			return old, nil
		}
	}
	if err != nil {
		return nil, fmt.Errorf("register %s: %w", name, err)
	}
	return c, nil
}

// Consumes lists the events that Handle understands.
func Consumes() []string {
	return []string{
		contracts.ImagePlannedV1, contracts.LayerAnalyzedV1, contracts.LayerFailedV1,
		contracts.ImageUnsupportedV1, contracts.ImageGoneV1, contracts.ImageFailedV1,
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
	s, err := New(ctx, cfg, db, env.Log, env.Metrics)
	if err != nil {
		return err
	}
	produces := []string{contracts.ImageAssembledV1, contracts.LayerRequestedV1, contracts.ImageFailedV1}
	if err := b.EnsureTopics(ctx, append(produces, Consumes()...)...); err != nil {
		return fmt.Errorf("create topics of %s: %w", Name, err)
	}
	env.Started()
	if err := b.Consume(ctx, bus.Subscription{Events: Consumes(), Handler: s.Handle, OnDead: dead}); err != nil {
		return fmt.Errorf("consume as %s: %w", Name, err)
	}
	return nil
}

// Handle records one event and returns the inventories that are complete with
// it, and the layers to ask for again. It is a bus.Handler.
func (s *Service) Handle(ctx context.Context, in event.Event) ([]event.Event, error) {
	apply, err := s.record(in)
	if err != nil {
		return nil, err
	}
	if apply == nil {
		return nil, nil
	}
	if stored, known, err := s.noNews(ctx, in); err != nil || known {
		return stored, err
	}
	prepared := map[string]inventory{}
	for range maxPasses {
		var j *join
		out, err := s.db.Once(ctx, Name, in, func(ctx context.Context, tx *sql.Tx) ([]event.Event, error) {
			j = &join{s: s, tx: tx, prepared: prepared, asked: map[string]bool{}}
			if err := apply(ctx, j); err != nil {
				return nil, err
			}
			if len(j.todo) > 0 {
				return nil, errUnprepared
			}
			return j.out, nil
		})
		if err == nil {
			s.count(out)
			return out, nil
		}
		if !errors.Is(err, errUnprepared) {
			return nil, fmt.Errorf("join %s %s: %w", in.Type(), in.Subject(), err)
		}
		for _, w := range j.todo {
			prepared[w.key], err = s.prepare(ctx, w)
			if err != nil {
				return nil, outage(fmt.Errorf("assemble %s: %w", w.plan.Image, err))
			}
		}
	}
	return nil, fmt.Errorf("join %s %s: inputs changed %d times meanwhile", in.Type(), in.Subject(), maxPasses)
}

// noNews answers the event that a fleet sends most, a layer.analyzed that says
// what is recorded already, without a transaction. If it was the one that
// brought the news, what it led to is sent again.
func (s *Service) noNews(ctx context.Context, in event.Event) ([]event.Event, bool, error) {
	if in.Type() != contracts.TypePrefix+contracts.LayerAnalyzedV1 {
		return nil, false, nil
	}
	d, err := bus.Decode[contracts.LayerAnalyzed](in)
	if err != nil {
		return nil, false, err
	}
	var report string
	err = s.db.QueryRowContext(ctx, `SELECT report FROM assembler_layers WHERE layer = $1 AND analyzer = $2`, d.Digest, d.Analyzer).Scan(&report)
	if errors.Is(err, sql.ErrNoRows) || err == nil && report != d.Report.Digest {
		return nil, false, nil
	}
	if err != nil {
		return nil, false, outage(fmt.Errorf("look up layer %s: %w", d.Digest, err))
	}
	stored, _, err := s.db.Stored(ctx, Name, in)
	if err != nil {
		return nil, false, outage(fmt.Errorf("look up %s %s: %w", in.Type(), in.ID(), err))
	}
	return stored, true, nil
}

func (s *Service) count(out []event.Event) {
	for _, ev := range out {
		switch ev.Type() {
		case contracts.TypePrefix + contracts.ImageAssembledV1:
			s.assembled.Inc()
		case contracts.TypePrefix + contracts.LayerRequestedV1:
			s.asked.Inc()
		}
	}
}

// outage marks an error of the database as such.
func outage(err error) error {
	if store.IsUnavailable(err) {
		return bus.Unavailable(err)
	}
	return err
}

// record returns what an event changes, to be applied in a transaction; nil
// where it changes nothing here.
func (s *Service) record(in event.Event) (func(ctx context.Context, j *join) error, error) {
	switch in.Type() {
	case contracts.TypePrefix + contracts.ImagePlannedV1:
		d, err := bus.Decode[contracts.ImagePlanned](in)
		if err != nil {
			return nil, err
		}
		if err := d.Image.Validate(); err != nil {
			return nil, bus.Permanent(fmt.Errorf("plan: %w", err))
		}
		return func(ctx context.Context, j *join) error { return j.planned(ctx, d, in) }, nil

	case contracts.TypePrefix + contracts.LayerAnalyzedV1:
		d, err := bus.Decode[contracts.LayerAnalyzed](in)
		if err != nil {
			return nil, err
		}
		if !contracts.ValidDigest(d.Digest) || !contracts.ValidDigest(d.Report.Digest) {
			return nil, bus.Permanent(fmt.Errorf("layer %q with report %q: not digests", d.Digest, d.Report.Digest))
		}
		return func(ctx context.Context, j *join) error { return j.analyzed(ctx, d) }, nil

	case contracts.TypePrefix + contracts.LayerFailedV1:
		d, err := bus.Decode[contracts.LayerFailed](in)
		if err != nil {
			return nil, err
		}
		return func(ctx context.Context, j *join) error { return j.failed(ctx, d) }, nil

	case contracts.TypePrefix + contracts.ImageUnsupportedV1:
		d, err := bus.Decode[contracts.ImageUnsupported](in)
		if err != nil {
			return nil, err
		}
		return func(ctx context.Context, j *join) error { return j.ended(ctx, d.Image, "part unsupported: "+d.Reason) }, nil

	case contracts.TypePrefix + contracts.ImageGoneV1:
		d, err := bus.Decode[contracts.ImageGone](in)
		if err != nil {
			return nil, err
		}
		return func(ctx context.Context, j *join) error { return j.ended(ctx, d.Image, "part gone: "+d.Reason) }, nil

	case contracts.TypePrefix + contracts.ImageFailedV1:
		d, err := bus.Decode[contracts.ImageFailed](in)
		if err != nil {
			return nil, err
		}
		if d.Digest == "" {
			return nil, nil // a tag that could never be resolved is no part of anything
		}
		image := contracts.Image{Registry: d.Registry, Repository: d.Repository, Digest: d.Digest}
		return func(ctx context.Context, j *join) error { return j.ended(ctx, image, "part failed: "+d.Message) }, nil
	}
	return nil, bus.Permanent(fmt.Errorf("%s is not for %s", in.Type(), Name))
}

// dead says of an image whose plan went to the dead letters that it has come to
// its end. Of a layer nobody here can say which images need it: those wait for
// catalog's deadlines.
func dead(in event.Event, reason error) []event.Event {
	if in.Type() != contracts.TypePrefix+contracts.ImagePlannedV1 {
		return nil
	}
	d, err := bus.Decode[contracts.ImagePlanned](in)
	if err != nil {
		return nil // nobody's event
	}
	return bus.GivenUp(Name, d.Image, d.Tag, reason)
}
