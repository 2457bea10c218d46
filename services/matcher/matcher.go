// Package matcher says what is known to be wrong with an image: it matches
// inventories with the advisory snapshot that it holds and evaluates the policy.
package matcher

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/cloudevents/sdk-go/v2/event"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/bus"
	"github.com/tidewaiter/tidewaiter/libs/run"
	"github.com/tidewaiter/tidewaiter/libs/store"
	"github.com/tidewaiter/tidewaiter/services/advisor/artefact"
	"github.com/tidewaiter/tidewaiter/services/matcher/policy"
)

// Name is the service's name.
const Name = "matcher"

const (
	// DefaultReload is how often the snapshot file is looked at.
	DefaultReload = 5 * time.Second
	// DefaultPoll is how often the registry is asked for a newer snapshot.
	DefaultPoll = 30 * time.Second
	// waitForSnapshot is how long a request waits that names a newer snapshot than the one here.
	waitForSnapshot = 15 * time.Second
)

// Config is the section "matcher".
type Config struct {
	// Advisories is the snapshot file (`tidewaiter advisories build`). It is
	// opened again when another is put in its place.
	Advisories string `yaml:"advisories"`
	// Snapshots is the registry/repository in which advisor publishes snapshots;
	// the highest sequence is used, be it from there or from Advisories.
	Snapshots string `yaml:"snapshots"`
	// SnapshotKeys is a PEM file with the public keys of advisor, at least one of
	// which must have signed a published snapshot.
	SnapshotKeys string `yaml:"snapshotKeys"`
	// Cache is the folder in which fetched snapshots are kept, the last two of them.
	Cache string `yaml:"cache"`
	// Poll is how often the registry is asked for a newer snapshot; default DefaultPoll.
	Poll time.Duration `yaml:"poll"`
	// Policy is the policy file; empty: the default policy.
	Policy string `yaml:"policy"`
	// Reload is how often the snapshot file is looked at; default DefaultReload.
	Reload time.Duration `yaml:"reload"`
	// Concurrency bounds how many partitions are handled at once; 0: all.
	Concurrency int `yaml:"concurrency"`
}

// DefaultConfig returns the configuration before any file is read.
func DefaultConfig() Config { return Config{Reload: DefaultReload, Poll: DefaultPoll} }

// Validate returns everything that is wrong with c.
func (c Config) Validate() error {
	var problems []error
	if c.Reload <= 0 {
		problems = append(problems, fmt.Errorf("reload is %s, it must be above 0", c.Reload))
	}
	if c.Poll <= 0 {
		problems = append(problems, fmt.Errorf("poll is %s, it must be above 0", c.Poll))
	}
	if c.Snapshots != "" {
		if _, err := artefact.ParseRepository(c.Snapshots); err != nil {
			problems = append(problems, fmt.Errorf("snapshots: %w", err))
		}
		if c.SnapshotKeys == "" || c.Cache == "" {
			problems = append(problems, errors.New("snapshots needs snapshotKeys and cache: unsigned advisories are not used"))
		}
	}
	if c.Concurrency < 0 {
		problems = append(problems, fmt.Errorf("concurrency is %d", c.Concurrency))
	}
	return errors.Join(problems...)
}

// Blobs is what the matcher needs of the database.
type Blobs interface {
	Blob(ctx context.Context, digest string) ([]byte, error)
	PutBlob(ctx context.Context, content []byte) (digest string, err error)
}

// Service handles image.assembled and image.rematch.
type Service struct {
	cfg    Config
	policy *policy.Policy
	blobs  Blobs
	holder *holder
	log    *slog.Logger
	now    func() time.Time
}

// New returns a matcher that reads inventories from and writes reports to
// blobs, and fetches snapshots with puller, which may be nil where the
// configuration names none. It works without a snapshot, and then answers everything with
// Unavailable: without knowledge nothing is clean.
func New(cfg Config, blobs Blobs, puller artefact.Puller, log *slog.Logger) (*Service, error) {
	if err := cfg.Validate(); err != nil {
		return nil, fmt.Errorf("matcher: %w", err)
	}
	pol := policy.Default()
	if cfg.Policy != "" {
		var err error
		if pol, err = policy.Load(cfg.Policy); err != nil {
			return nil, fmt.Errorf("matcher: %w: %w", err, run.ErrConfig)
		}
	}
	h := newHolder(cfg.Advisories, pol)
	if cfg.Snapshots != "" {
		published, err := newPublished(cfg, puller)
		if err != nil {
			return nil, fmt.Errorf("matcher: %w: %w", err, run.ErrConfig)
		}
		h.published = published
		h.cached()
	}
	return &Service{cfg: cfg, policy: pol, blobs: blobs, holder: h, log: log, now: time.Now}, nil
}

// Close gives the snapshot back. Nothing may be handled any more.
func (s *Service) Close() error { return s.holder.close() }

// job is what image.assembled and image.rematch have in common.
type job struct {
	image     contracts.Image
	source    string
	tag       string
	kind      string
	platform  *contracts.Platform
	inventory contracts.Blob
	sequence  int64 // of the snapshot that is asked for, at least
	location  string
}

func decode(in event.Event) (job, error) {
	switch in.Type() {
	case contracts.TypePrefix + contracts.ImageAssembledV1:
		a, err := bus.Decode[contracts.ImageAssembled](in)
		return job{image: a.Image, source: a.Source, tag: a.Tag, kind: a.Kind, platform: a.Platform, inventory: a.Inventory}, err
	case contracts.TypePrefix + contracts.ImageRematchV1:
		r, err := bus.Decode[contracts.ImageRematch](in)
		return job{
			image: r.Image, source: r.Source, kind: r.Kind, platform: r.Platform, inventory: r.Inventory,
			sequence: r.Snapshot.Sequence, location: r.Location,
		}, err
	}
	return job{}, bus.Permanent(fmt.Errorf("matcher does not handle events of type %s", in.Type()))
}

// Handle is a bus.Handler.
func (s *Service) Handle(ctx context.Context, in event.Event) ([]event.Event, error) {
	j, err := decode(in)
	if err != nil {
		return nil, err
	}
	if err := j.image.Validate(); err != nil {
		return nil, bus.Permanent(fmt.Errorf("match: %w", err))
	}
	m, release, err := s.holder.acquire(ctx, j.sequence, j.location)
	switch {
	case errors.Is(err, errOlder):
		// However long the registry of snapshots is away, the request must not die of it.
		return nil, bus.NotYet(fmt.Errorf("match %s: %w", j.image, err), s.now().Add(waitForSnapshot))
	case err != nil:
		return nil, bus.Unavailable(fmt.Errorf("match %s: %w", j.image, err))
	}
	defer release()
	return s.match(ctx, in, j, m)
}

func (s *Service) match(ctx context.Context, in event.Event, j job, m *loaded) ([]event.Event, error) {
	inv, err := s.inventory(ctx, j.inventory.Digest)
	if err != nil {
		return nil, fmt.Errorf("match %s: %w", j.image, err)
	}
	report, err := m.matcher.Match(ctx, inv, s.inventory)
	if err != nil {
		return nil, fmt.Errorf("match %s: %w", j.image, err)
	}
	report.Inventory = j.inventory.Digest // the same, unless an older program wrote the inventory
	content, err := json.Marshal(report)
	if err != nil {
		return nil, bus.Permanent(fmt.Errorf("encode report on %s: %w", j.image, err))
	}
	digest, err := s.blobs.PutBlob(ctx, content)
	if err != nil {
		return nil, outage(fmt.Errorf("store report on %s: %w", j.image, err))
	}
	out, err := bus.NewEvent(contracts.ImageMatchedV1, j.image.String(), contracts.ImageMatched{
		Image: j.image, Source: j.source, Tag: j.tag, Kind: j.kind, Platform: j.platform, Inventory: j.inventory,
		Report:       contracts.Blob{Digest: digest, Size: int64(len(content))},
		Snapshot:     contracts.SnapshotRef{Digest: m.snapshot.Digest(), Sequence: m.snapshot.Sequence()},
		SnapshotTime: m.snapshot.Newest(),
		MatchedAt:    s.now().UTC().Truncate(time.Millisecond), Policy: report.Policy, Verdict: report.Verdict, Reasons: report.Reasons,
		Counts: report.Counts, Packages: report.Packages, Gaps: len(report.Gaps),
	})
	if err != nil {
		return nil, bus.Permanent(err)
	}
	// What was judged is a part of the id: the same input is another judgement
	// once there are other advisories or another policy, which stands in the report.
	out.SetID(contracts.OutputID(Name, in.Source(), in.ID(), out.Type(), out.Subject()+" "+m.snapshot.Digest()+" "+digest))
	out.SetExtension(contracts.ExtDataRef, digest)
	bus.Key(&out, j.image.Digest)
	s.log.InfoContext(ctx, "image matched", "image", j.image.String(), "verdict", report.Verdict, "findings", len(report.Findings),
		"gaps", len(report.Gaps), "sequence", m.snapshot.Sequence())
	return []event.Event{out}, nil
}

// inventory loads an inventory by the digest of its blob.
func (s *Service) inventory(ctx context.Context, digest string) (*contracts.Inventory, error) {
	content, err := s.blobs.Blob(ctx, digest)
	switch {
	case errors.Is(err, store.ErrNotFound) || errors.Is(err, store.ErrCorrupt):
		return nil, bus.Permanent(fmt.Errorf("inventory %s: %w", digest, err))
	case err != nil:
		return nil, outage(fmt.Errorf("inventory %s: %w", digest, err))
	}
	var inv contracts.Inventory
	if err := json.Unmarshal(content, &inv); err != nil {
		return nil, bus.Permanent(fmt.Errorf("inventory %s: %w", digest, err))
	}
	return &inv, nil
}

func outage(err error) error {
	if store.IsUnavailable(err) {
		return bus.Unavailable(err)
	}
	return err
}

// dead says of an image whose event went to the dead letters that it has come to its end.
func (s *Service) dead(in event.Event, reason error) []event.Event {
	j, err := decode(in)
	if err != nil {
		return nil // nobody's event
	}
	return bus.GivenUp(Name, j.image, j.tag, reason)
}

// Run is a run.Service.
func Run(ctx context.Context, env *run.Env) error {
	cfg := DefaultConfig()
	if err := env.Section(&cfg); err != nil {
		return fmt.Errorf("matcher: %w", err)
	}
	db, err := env.DB(ctx)
	if err != nil {
		return fmt.Errorf("matcher: %w", err)
	}
	b, err := env.Bus()
	if err != nil {
		return fmt.Errorf("matcher: %w", err)
	}
	var puller artefact.Puller
	if cfg.Snapshots != "" {
		if puller, err = env.Registry(); err != nil {
			return fmt.Errorf("matcher: %w", err)
		}
	}
	s, err := New(cfg, db, puller, env.Log)
	if err != nil {
		return err
	}
	defer func() { _ = s.Close() }()
	env.Health.Check("matcher advisories", s.holder.ready)
	newest := s.holder.newest()
	if err := env.Metrics.Register(newest); err != nil {
		return fmt.Errorf("matcher: register metrics: %w", err)
	}
	defer env.Metrics.Unregister(newest)
	consumed := []string{contracts.ImageAssembledV1, contracts.ImageRematchV1}
	if err := b.EnsureTopics(ctx, append(consumed, contracts.ImageMatchedV1, contracts.ImageFailedV1)...); err != nil {
		return fmt.Errorf("matcher: %w", err)
	}
	watch, stop := context.WithCancel(ctx)
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		s.holder.watch(watch, cfg.Reload, cfg.Poll, env.Log)
	}()
	defer func() { stop(); <-watched }()
	env.Started()
	if err := b.Consume(ctx, bus.Subscription{Events: consumed, Handler: s.Handle, OnDead: s.dead, Concurrency: cfg.Concurrency}); err != nil {
		return fmt.Errorf("matcher: %w", err)
	}
	return nil
}
