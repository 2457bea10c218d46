// Package planner turns the hint that something was pushed or deleted into
// facts: where the tag points, what the image consists of, which layers are to
// be analysed, or that there is nothing to scan.
package planner

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	"github.com/cloudevents/sdk-go/v2/event"
	"github.com/goccy/go-yaml"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/bus"
	"github.com/tidewaiter/tidewaiter/libs/registry"
	"github.com/tidewaiter/tidewaiter/libs/run"
	"github.com/tidewaiter/tidewaiter/services/intake/scope"
	"github.com/tidewaiter/tidewaiter/services/planner/plan"
)

const service = "planner"

// DefaultAttempts is how often a registry that is throttled or down is asked,
// which with the pauses between (up to ten minutes) is most of a day.
const DefaultAttempts = 100

// ErrSource is returned for an event about an image that its source may not speak of.
var ErrSource = scope.ErrOutside

// Config is the section "planner".
type Config struct {
	// Platforms are the parts of an index that are scanned, os/architecture[/variant];
	// others are gaps. Empty: all.
	Platforms []string `yaml:"platforms"`
	// SourcePlatforms replaces Platforms for single sources, by their id. It goes
	// before the platforms in the section "sources".
	SourcePlatforms map[string][]string `yaml:"sourcePlatforms"`
	// Attempts is how often a registry that is throttled or down is asked
	// before an event goes to the dead letters; default DefaultAttempts.
	Attempts int `yaml:"attempts"`
	// Concurrency bounds how many partitions are handled at once; 0: all.
	Concurrency int `yaml:"concurrency"`
}

// DefaultConfig returns the configuration before any file is read.
func DefaultConfig() Config { return Config{Attempts: DefaultAttempts} }

// Validate returns everything that is wrong with c.
func (c Config) Validate() error {
	var problems []error
	lists := [][]string{c.Platforms}
	for _, l := range c.SourcePlatforms {
		lists = append(lists, l)
	}
	for _, p := range slices.Concat(lists...) {
		if !scope.ValidPlatform(p) {
			problems = append(problems, fmt.Errorf("platform %q is not os/architecture[/variant]", p))
		}
	}
	if c.Attempts < 1 {
		problems = append(problems, fmt.Errorf("attempts is %d, at least 1 is needed", c.Attempts))
	}
	if c.Concurrency < 0 {
		problems = append(problems, fmt.Errorf("concurrency is %d", c.Concurrency))
	}
	return errors.Join(problems...)
}

// internal are the sources that are services of our own, or a user at the
// command line: they may speak of any configured registry.
var internal = []string{"submit", "catalog", "sweeper", "gatekeeper", "demo"}

// Registry is what the planner needs of a registry.Client.
type Registry interface {
	plan.Source
	Resolve(ctx context.Context, ref registry.Ref) (ocispec.Descriptor, error)
}

// Planner handles image.pushed and image.deleted.
type Planner struct {
	cfg     Config
	sources map[string]*scope.Rules
	reg     Registry
	log     *slog.Logger
}

// New returns a planner that reads through reg. sources are what the configured
// sources are about, by id.
func New(cfg Config, sources map[string]scope.Scope, reg Registry, log *slog.Logger) (*Planner, error) {
	if err := cfg.Validate(); err != nil {
		return nil, fmt.Errorf("planner: %w", err)
	}
	p := &Planner{cfg: cfg, sources: map[string]*scope.Rules{}, reg: reg, log: log}
	for id, s := range sources {
		rules, err := scope.Compile(s)
		if err != nil {
			return nil, fmt.Errorf("planner: source %q: %w", id, err)
		}
		p.sources[id] = rules
	}
	return p, nil
}

// Handle is a bus.Handler.
func (p *Planner) Handle(ctx context.Context, in event.Event) ([]event.Event, error) {
	switch in.Type() {
	case contracts.TypePrefix + contracts.ImagePushedV1:
		return p.pushed(ctx, in)
	case contracts.TypePrefix + contracts.ImageDeletedV1:
		return p.deleted(ctx, in)
	}
	return nil, bus.Permanent(fmt.Errorf("planner does not handle events of type %s", in.Type()))
}

// hint is what image.pushed and image.deleted have in common.
type hint struct {
	source string
	ref    registry.Ref
}

func (h hint) tagged() registry.Ref {
	return registry.Ref{Registry: h.ref.Registry, Repository: h.ref.Repository, Tag: h.ref.Tag}
}

// check refuses what cannot be asked for, or not by this source. left says why
// the source's filters leave out what may be asked for; deletions are left out
// by their repository only.
func (p *Planner) check(h hint, deletion bool) (left string, err error) {
	r := h.ref
	switch {
	case !contracts.ValidRegistry(r.Registry):
		return "", fmt.Errorf("registry %q is not host[:port]", r.Registry)
	case !contracts.ValidRepository(r.Repository):
		return "", fmt.Errorf("repository %q is not a repository name", r.Repository)
	case r.Tag != "" && !contracts.ValidTag(r.Tag):
		return "", fmt.Errorf("tag %q is not a tag", r.Tag)
	case r.Digest != "" && !contracts.ValidDigest(r.Digest):
		return "", fmt.Errorf("digest %q is not a sha256 digest", r.Digest)
	case r.Tag == "" && r.Digest == "" && !deletion: // a deletion is of all of the repository then
		return "", errors.New("there is neither a tag nor a digest")
	}
	if slices.Contains(internal, h.source) {
		return "", nil
	}
	s, ok := p.sources[h.source]
	if !ok {
		return "", fmt.Errorf("source %q is not configured: %w", h.source, ErrSource)
	}
	if deletion {
		left, err = s.Delete(r.Registry, r.Repository)
	} else {
		left, err = s.Push(r.Registry, r.Repository, r.Tag)
	}
	if err != nil {
		return "", fmt.Errorf("source %q: %w", h.source, err)
	}
	return left, nil
}

func (p *Planner) pushed(ctx context.Context, in event.Event) ([]event.Event, error) {
	data, err := bus.Decode[contracts.ImagePushed](in)
	if err != nil {
		return nil, err
	}
	h := hint{source: data.Source, ref: registry.Ref{
		Registry: data.Registry, Repository: data.Repository, Tag: data.Tag, Digest: data.Digest,
	}}
	left, err := p.check(h, false)
	if err != nil {
		return nil, bus.Permanent(fmt.Errorf("%s: %w", in.Subject(), err))
	}
	out := &events{}
	at, err := p.observe(ctx, h, out)
	if err != nil {
		return nil, p.outcome(ctx, err)
	}
	// The digest that was named is what was pushed; the tag may have moved on.
	if h.ref.Digest == "" {
		if at == "" {
			return out.list, out.err // the tag is gone, and that has been said
		}
		h.ref.Digest = at
	}
	if left != "" {
		p.emit(ctx, h, plan.Filtered(h.ref, left), out)
		return out.list, out.err
	}
	res, err := plan.Image(ctx, p.reg, h.ref, plan.WithPlatforms(p.platforms(h.source)...))
	if err != nil {
		return nil, p.outcome(ctx, err)
	}
	p.emit(ctx, h, res, out)
	return out.list, out.err
}

func (p *Planner) platforms(source string) []string {
	if own, ok := p.cfg.SourcePlatforms[source]; ok {
		return own
	}
	if s, ok := p.sources[source]; ok && len(s.Platforms) > 0 {
		return s.Platforms
	}
	return p.cfg.Platforms
}

// emit says what an image was found to be.
func (p *Planner) emit(ctx context.Context, h hint, res plan.Result, out *events) {
	switch {
	case res.Gone != "":
		out.add(contracts.ImageGoneV1, res.Image.String(), res.Image.Digest,
			contracts.ImageGone{Image: res.Image, Source: h.source, Reason: res.Gone})
	case res.Unsupported != nil:
		u := *res.Unsupported
		u.Source, u.Tag = h.source, h.ref.Tag
		out.add(contracts.ImageUnsupportedV1, u.Image.String(), u.Image.Digest, u)
	default:
		for i, img := range res.Planned {
			img.Source = h.source
			if i == 0 {
				img.Tag = h.ref.Tag // parts of an index have no tag of their own
			}
			out.add(contracts.ImagePlannedV1, img.Image.String(), img.Image.Digest, img)
		}
		for _, l := range res.Layers {
			l.Source = h.source
			out.add(contracts.LayerRequestedV1, l.Digest, l.Digest, l)
		}
	}
	p.log.InfoContext(ctx, "image looked at", "image", res.Image.String(), "tag", h.ref.Tag, "source", h.source,
		"images", len(res.Planned), "layers", len(res.Layers), "unsupported", res.Unsupported != nil, "gone", res.Gone != "")
}

// observe says where the hint's tag points now, "" if it is gone or there is none.
func (p *Planner) observe(ctx context.Context, h hint, out *events) (digest string, err error) {
	if h.ref.Tag == "" {
		return "", nil
	}
	tag := h.tagged()
	asked := time.Now().UTC() // not after the answer: one that was slow is not the newer one
	d, err := p.reg.Resolve(ctx, tag)
	if err != nil && !errors.Is(err, registry.ErrNotFound) {
		return "", err
	}
	if err == nil {
		digest = d.Digest.String()
		if !contracts.ValidDigest(digest) {
			return "", fmt.Errorf("the registry says that %s is %q, which is not a sha256 digest: %w", tag, digest, registry.ErrInvalidName)
		}
	}
	repo := tag.Registry + "/" + tag.Repository
	out.add(contracts.TagObservedV1, tag.String(), repo, contracts.TagObserved{
		Source: h.source, Registry: tag.Registry, Repository: tag.Repository, Tag: tag.Tag,
		Digest: digest, ObservedAt: asked,
	})
	return digest, nil
}

// deleted confirms a deletion: what is still there is not believed to be gone.
func (p *Planner) deleted(ctx context.Context, in event.Event) ([]event.Event, error) {
	data, err := bus.Decode[contracts.ImageDeleted](in)
	if err != nil {
		return nil, err
	}
	h := hint{source: data.Source, ref: registry.Ref{
		Registry: data.Registry, Repository: data.Repository, Tag: data.Tag, Digest: data.Digest,
	}}
	left, err := p.check(h, true)
	if err != nil {
		return nil, bus.Permanent(fmt.Errorf("%s: %w", in.Subject(), err))
	}
	if left != "" {
		p.log.InfoContext(ctx, "deletion of what is not wanted", "image", h.ref.String(), "source", h.source, "reason", left)
		return nil, nil
	}
	if h.ref.Tag == "" && h.ref.Digest == "" {
		// What was in it only catalog knows; the sweeper asks it, and reports what is gone one by one.
		p.log.InfoContext(ctx, "deletion of a repository, which the sweeper confirms", "repository", h.ref.Registry+"/"+h.ref.Repository, "source", h.source)
		return nil, nil
	}
	out := &events{}
	if _, err := p.observe(ctx, h, out); err != nil {
		return nil, p.outcome(ctx, err)
	}
	if h.ref.Digest == "" {
		return out.list, out.err
	}
	_, err = p.reg.Resolve(ctx, h.ref)
	switch {
	case errors.Is(err, registry.ErrNotFound):
		img := contracts.Image{Registry: h.ref.Registry, Repository: h.ref.Repository, Digest: h.ref.Digest}
		out.add(contracts.ImageGoneV1, img.String(), img.Digest,
			contracts.ImageGone{Image: img, Source: h.source, Reason: "the manifest was deleted from the registry"})
	case err != nil:
		return nil, p.outcome(ctx, err)
	}
	return out.list, out.err
}

// outcome marks an error with what is to become of the event.
func (p *Planner) outcome(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return err
	}
	attempt := bus.Attempt(ctx)
	if at, again := registry.RetryAt(err, attempt); again {
		if registry.Held(err) {
			return bus.NotYet(err, at)
		}
		if attempt >= p.cfg.Attempts {
			return bus.Permanent(fmt.Errorf("given up after %d attempts: %w", attempt, err))
		}
		return bus.Later(err, at)
	}
	for _, fact := range []error{
		plan.ErrMissingLayer, registry.ErrNotConfigured, registry.ErrForbiddenHost, registry.ErrNotFound, registry.ErrUnauthorized,
		registry.ErrDigestMismatch, registry.ErrTooLarge, registry.ErrRefused, registry.ErrUnknownManifest, registry.ErrInvalidName,
	} {
		if errors.Is(err, fact) {
			return bus.Permanent(err)
		}
	}
	return err
}

// maxMessage bounds the reason in image.failed, in bytes.
const maxMessage = 1000

// Dead is a bus.Subscription's OnDead: the image of an event that goes to the
// dead letters has failed. Nothing is said of images that the event's source
// may not speak of, nor of events that cannot be read.
func (p *Planner) Dead(in event.Event, reason error) []event.Event {
	if in.Type() != contracts.TypePrefix+contracts.ImagePushedV1 || errors.Is(reason, ErrSource) {
		return nil
	}
	data, err := bus.Decode[contracts.ImagePushed](in)
	if err != nil {
		return nil
	}
	h := hint{source: data.Source, ref: registry.Ref{
		Registry: data.Registry, Repository: data.Repository, Tag: data.Tag, Digest: data.Digest,
	}}
	if _, err := p.check(h, false); err != nil {
		return nil
	}
	message := reason.Error()
	if len(message) > maxMessage {
		message = strings.ToValidUTF8(message[:maxMessage], "")
	}
	key := data.Digest
	if key == "" {
		key = data.Registry + "/" + data.Repository
	}
	out := &events{}
	out.add(contracts.ImageFailedV1, h.ref.String(), key, contracts.ImageFailed{
		Registry: data.Registry, Repository: data.Repository, Tag: data.Tag, Digest: data.Digest,
		Stage: service, Message: message,
	})
	if out.err != nil {
		return nil
	}
	return out.list
}

// events collects outputs; the first error ends it.
type events struct {
	list []event.Event
	err  error
}

func (e *events) add(name, subject, key string, data any) {
	if e.err != nil {
		return
	}
	ev, err := bus.NewEvent(name, subject, data)
	if err != nil {
		e.err = err
		return
	}
	bus.Key(&ev, key)
	e.list = append(e.list, ev)
}

// Consumes are the events that planner handles; Produces those that it sends.
var (
	consumes = []string{contracts.ImagePushedV1, contracts.ImageDeletedV1}
	produces = []string{
		contracts.TagObservedV1, contracts.ImagePlannedV1, contracts.ImageUnsupportedV1,
		contracts.ImageGoneV1, contracts.ImageFailedV1, contracts.LayerRequestedV1,
	}
)

// Run is a run.Service: it reads the sections "planner" and "sources".
func Run(ctx context.Context, env *run.Env) error {
	cfg := DefaultConfig()
	if err := env.Section(&cfg); err != nil {
		return err
	}
	var raw map[string]any
	if err := env.Shared("sources", &raw); err != nil {
		return err
	}
	reg, err := env.Registry()
	if err != nil {
		return err
	}
	sources, err := scopes(raw)
	if err != nil {
		return err
	}
	p, err := New(cfg, sources, reg, env.Log)
	if err != nil {
		return err
	}
	b, err := env.Bus()
	if err != nil {
		return err
	}
	if err := b.EnsureTopics(ctx, slices.Concat(consumes, produces)...); err != nil {
		return fmt.Errorf("create topics: %w", err)
	}
	env.Started()
	return b.Consume(ctx, bus.Subscription{
		Events: consumes, Handler: p.Handle, OnDead: p.Dead, Concurrency: cfg.Concurrency,
	})
}

// scopes reads of the section "sources" what planner needs; intake, whose
// section it is, reads and checks all of it.
func scopes(raw map[string]any) (map[string]scope.Scope, error) {
	text, err := yaml.Marshal(raw)
	if err != nil {
		return nil, fmt.Errorf("section \"sources\": %s: %w", yaml.FormatError(err, false, false), run.ErrConfig)
	}
	out := map[string]scope.Scope{}
	if err := yaml.Unmarshal(text, &out); err != nil {
		return nil, fmt.Errorf("section \"sources\": %s: %w", yaml.FormatError(err, false, false), run.ErrConfig)
	}
	return out, nil
}
