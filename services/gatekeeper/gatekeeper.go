// Package gatekeeper admits workloads to a cluster, or refuses them, by the
// signed statements about their images. It answers AdmissionReviews of the
// Kubernetes API server over HTTPS.
//
// What it remembers are signed bundles, which are verified again at every
// review, never answers; and how new each image's newest statement was, so that
// an older one that somebody puts back is refused. A remembered image costs no
// call to anybody.
package gatekeeper

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"time"

	"github.com/cloudevents/sdk-go/v2/event"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/bus"
	"github.com/tidewaiter/tidewaiter/libs/registry"
	"github.com/tidewaiter/tidewaiter/libs/store"
	"github.com/tidewaiter/tidewaiter/services/attestor/statement"
)

// Name of the service.
const Name = "gatekeeper"

// Registry is what gatekeeper needs of registries.
type Registry interface {
	statement.RegistryReader
	Configured(registry, repository string) error
}

// Blobs is where announced bundles are read from.
type Blobs interface {
	Blob(ctx context.Context, digest string) ([]byte, error)
}

// Publisher stores events.
type Publisher interface {
	Publish(ctx context.Context, events ...event.Event) error
}

// Deps are what a Gatekeeper works with.
type Deps struct {
	Registry Registry
	Cache    Cache
	Blobs    Blobs                       // nil: announced bundles are read from the registry
	Keys     func() []statement.Verifier // whose statements count now
	Caller   func(r *http.Request) bool  // whether who calls may ask; nil: everybody
	Log      *slog.Logger
	Metrics  prometheus.Registerer
	Now      func() time.Time // nil: the present
}

// Gatekeeper is the service.
type Gatekeeper struct {
	Deps
	cfg        Config
	exempt     map[string]bool
	memory     *memory
	statements *flights[statement.Decision]
	tags       *flights[string]
	submitted  *memory
	absent     *memory // images without a statement, and when that was seen
	queue      *queue
	metrics    *metrics
	stop       context.CancelFunc
}

// New returns a Gatekeeper; Close ends it. Of cfg, what is opened (keys,
// certificates, callers) is taken from d.
func New(cfg Config, d Deps) (*Gatekeeper, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	if d.Now == nil {
		d.Now = time.Now
	}
	if d.Metrics == nil {
		d.Metrics = prometheus.NewRegistry()
	}
	ctx, stop := context.WithCancel(context.Background())
	g := &Gatekeeper{
		Deps: d, cfg: cfg, exempt: map[string]bool{}, stop: stop,
		memory:     newMemory(cfg.CacheEntries, cfg.CacheBytes),
		submitted:  newMemory(cfg.CacheEntries, cfg.CacheBytes),
		absent:     newMemory(cfg.CacheEntries, cfg.CacheBytes),
		statements: newFlights[statement.Decision](ctx), tags: newFlights[string](ctx),
		metrics: newMetrics(d.Metrics),
	}
	g.queue = newQueue(g.metrics, d.Log)
	for _, n := range cfg.Exempt {
		g.exempt[n] = true
	}
	return g, nil
}

// Close ends what still runs in the background and waits for it.
func (g *Gatekeeper) Close() {
	g.stop()
	g.statements.wait()
	g.tags.wait()
}

// Handle remembers the statements that image.attested announces, once they are
// verified; nothing of the event itself is believed. It is a bus.Handler.
func (g *Gatekeeper) Handle(ctx context.Context, in event.Event) ([]event.Event, error) {
	a, err := bus.Decode[contracts.ImageAttested](in)
	if err != nil {
		return nil, err
	}
	if err := a.Image.Validate(); err != nil {
		return nil, bus.Permanent(fmt.Errorf("image of image.attested: %w", err))
	}
	if g.Registry.Configured(a.Image.Registry, a.Image.Repository) != nil {
		return nil, nil // no workload with it is admitted by its statement
	}
	if bundles := g.stored(ctx, a); len(bundles) > 0 {
		if _, err = g.learn(ctx, a.Image, bundles); err == nil || errors.Is(err, statement.ErrVerdict) {
			return nil, nil
		}
	}
	before, _ := g.memory.get(a.Image.String())
	_, err = g.ask(ctx, a.Image, before.bundle)
	if at, again := registry.RetryAt(err, bus.Attempt(ctx)); again {
		if registry.Held(err) {
			return nil, bus.NotYet(err, at)
		}
		return nil, bus.Later(err, at)
	}
	if err != nil {
		g.Log.DebugContext(ctx, "announced statement is not remembered", slog.String("image", a.Image.String()), slog.Any("error", err))
	}
	return nil, nil
}

// Announced has an image's statement looked for again at its next review if the
// event is newer than what is remembered. Every replica is told of every event.
func (g *Gatekeeper) Announced(in event.Event) {
	a, err := bus.Decode[contracts.ImageAttested](in)
	if err != nil || a.Image.Validate() != nil {
		return // Handle says so where it is committed
	}
	seen := statement.Seen{Sequence: a.Snapshot.Sequence, Time: a.SignedAt}
	g.memory.due(a.Image.String(), seen)
	g.absent.due(a.Image.String(), seen)
}

// stored returns the announced bundles that the database has.
func (g *Gatekeeper) stored(ctx context.Context, a contracts.ImageAttested) []statement.Bundle {
	if g.Blobs == nil {
		return nil
	}
	var out []statement.Bundle
	for _, s := range a.Statements[:min(len(a.Statements), statement.MaxBundles)] {
		if s.Bundle == "" {
			continue
		}
		content, err := g.Blobs.Blob(ctx, s.Bundle)
		if err != nil {
			if !errors.Is(err, store.ErrNotFound) {
				g.Log.WarnContext(ctx, "announced statement cannot be read from the database, the registry is asked", slog.Any("error", err))
			}
			return nil
		}
		out = append(out, statement.Bundle{Digest: s.Digest, Content: content})
	}
	return out
}

var _ Registry = (*registry.Client)(nil)
