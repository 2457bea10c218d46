// Package analyzer analyses each layer once in the whole fleet, however many
// images share it.
//
// A lease in Redis keeps two instances from working on one layer at a time; the
// database alone says what is done. Without Redis layers may be analysed twice,
// and nothing is lost.
package analyzer

import (
	"context"
	"database/sql"
	"embed"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"runtime"
	"strings"
	"sync"
	"time"

	"github.com/cloudevents/sdk-go/v2/event"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/bus"
	"github.com/tidewaiter/tidewaiter/libs/redis"
	"github.com/tidewaiter/tidewaiter/libs/registry"
	"github.com/tidewaiter/tidewaiter/libs/run"
	"github.com/tidewaiter/tidewaiter/libs/store"
	"github.com/tidewaiter/tidewaiter/services/analyzer/layer"
	"github.com/tidewaiter/tidewaiter/services/analyzer/worker"
)

// Name is the service's name: its consumer group, event source and table prefix.
const Name = "analyzer"

const (
	// DefaultLeaseTTL is how long a layer stays claimed by an instance that died.
	DefaultLeaseTTL = 30 * time.Second
	// DefaultAttempts is how often a registry that is throttled or down is asked
	// for a layer before the layer counts as unreadable through it.
	DefaultAttempts = 20
	// waitEvery is how often a redelivered event looks whether the lease of its
	// first delivery has ended.
	waitEvery = 250 * time.Millisecond
	// maxTouched bounds the reports of which it is remembered when they were used.
	maxTouched = 10_000
	// maxMessage bounds the text of layer.failed, in bytes.
	maxMessage = 1000
)

// Reasons of layer.failed.
const (
	ReasonNotFound       = "not-found"
	ReasonUnauthorized   = "unauthorized"
	ReasonDigestMismatch = "digest-mismatch"
	ReasonTooLarge       = "too-large"
	ReasonNotConfigured  = "not-configured"
	ReasonForbiddenHost  = "forbidden-host"
	ReasonRefused        = "refused"
	ReasonUnavailable    = "unavailable" // the registry, for longer than was waited
	ReasonInternal       = "internal"    // ours, not the repository's
)

//go:embed migrations/*.sql
var migrations embed.FS

// Config is the section "analyzer". Zero limits mean the defaults of package layer.
type Config struct {
	Workers     int           `yaml:"workers"`     // child processes; default one a CPU
	MemoryMiB   int           `yaml:"memoryMiB"`   // resident memory a child
	LeaseTTL    time.Duration `yaml:"leaseTTL"`    // default DefaultLeaseTTL
	Attempts    int           `yaml:"attempts"`    // default DefaultAttempts
	Concurrency int           `yaml:"concurrency"` // partitions handled at once; default twice Workers
	Limits      Limits        `yaml:"limits"`
}

// Limits of one layer. Hitting one is a gap in its report.
type Limits struct {
	CompressedBytes int64         `yaml:"compressedBytes"` // a larger layer is not fetched; 0: no limit
	Bytes           int64         `yaml:"bytes"`           // uncompressed
	Ratio           int64         `yaml:"ratio"`           // uncompressed ÷ compressed
	Entries         int           `yaml:"entries"`
	Nesting         int           `yaml:"nesting"` // archives within archives
	Time            time.Duration `yaml:"time"`
	FileBytes       int64         `yaml:"fileBytes"`   // of a file that an extractor looks at
	NestedBytes     int64         `yaml:"nestedBytes"` // that the archives within one archive unpack to
}

// DefaultConfig returns what an absent section means.
func DefaultConfig() Config {
	return Config{
		Workers: runtime.NumCPU(), MemoryMiB: worker.DefaultMemory >> 20,
		LeaseTTL: DefaultLeaseTTL, Attempts: DefaultAttempts,
	}
}

// Validate returns everything that is wrong with c.
func (c Config) Validate() error {
	var problems []error
	if c.Workers < 1 {
		problems = append(problems, fmt.Errorf("workers is %d, at least 1 is needed", c.Workers))
	}
	if c.MemoryMiB < 128 {
		problems = append(problems, fmt.Errorf("memoryMiB is %d, a worker needs at least 128", c.MemoryMiB))
	}
	if c.LeaseTTL < time.Second {
		problems = append(problems, fmt.Errorf("leaseTTL is %s, at least 1s is needed", c.LeaseTTL))
	}
	if c.Attempts < 1 {
		problems = append(problems, fmt.Errorf("attempts is %d, at least 1 is needed", c.Attempts))
	}
	l := c.Limits
	if min(l.CompressedBytes, l.Bytes, l.Ratio, int64(l.Entries), int64(l.Nesting), int64(l.Time), l.FileBytes, l.NestedBytes, int64(c.Concurrency)) < 0 {
		problems = append(problems, errors.New("a limit is negative"))
	}
	return errors.Join(problems...)
}

func (l Limits) options(digest string) layer.Options {
	return layer.Options{
		Digest: digest, MaxBytes: l.Bytes, MaxRatio: l.Ratio, MaxEntries: l.Entries, MaxDepth: l.Nesting,
		Timeout: l.Time, MaxFile: l.FileBytes, MaxNested: l.NestedBytes,
	}
}

// Registry is what the analyzer needs of a registry.Client.
type Registry interface {
	Blob(ctx context.Context, registry, repository string, d ocispec.Descriptor) (io.ReadCloser, error)
}

// Leases is what the analyzer needs of a redis.Client.
type Leases interface {
	Acquire(ctx context.Context, key, holder string, ttl time.Duration) (*redis.Lease, error)
	Hold(ctx context.Context, l *redis.Lease, ttl time.Duration, work func(ctx context.Context) error) error
}

// Analyze is worker.Pool's method of that name.
type Analyze func(ctx context.Context, r io.Reader, o layer.Options) (*contracts.LayerReport, time.Duration, error)

// Service is the analyzer.
type Service struct {
	cfg     Config
	db      *store.DB
	leases  Leases
	reg     Registry
	analyze Analyze
	log     *slog.Logger

	mu      sync.Mutex
	touched map[string]time.Time // when a report's age was last renewed

	layers  *prometheus.CounterVec // by what became of the request
	bytes   prometheus.Counter
	seconds prometheus.Counter
	gaps    prometheus.Counter
}

// New migrates the analyzer's tables and returns the service.
func New(ctx context.Context, cfg Config, db *store.DB, leases Leases, reg Registry, analyze Analyze, log *slog.Logger, metrics prometheus.Registerer) (*Service, error) {
	if err := cfg.Validate(); err != nil {
		return nil, fmt.Errorf("configuration of %s: %w", Name, err)
	}
	if err := db.Migrate(ctx, Name, migrations); err != nil {
		return nil, fmt.Errorf("migrate %s: %w", Name, err)
	}
	s := &Service{
		cfg: cfg, db: db, leases: leases, reg: reg, analyze: analyze, log: log, touched: map[string]time.Time{},
		layers: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "tidewaiter_analyzer_layers_total", Help: "Layer requests by what became of them.",
		}, []string{"result"}),
		bytes: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "tidewaiter_analyzer_bytes_total", Help: "Uncompressed bytes of analysed layers.",
		}),
		seconds: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "tidewaiter_analyzer_cpu_seconds_total", Help: "CPU time of the workers.",
		}),
		gaps: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "tidewaiter_analyzer_gaps_total", Help: "Gaps in the reports of analysed layers.",
		}),
	}
	for _, c := range []prometheus.Collector{s.layers, s.bytes, s.seconds, s.gaps} {
		if err := metrics.Register(c); err != nil {
			return nil, fmt.Errorf("register metrics of %s: %w", Name, err)
		}
	}
	return s, nil
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
	leases, err := env.Redis()
	if err != nil {
		return fmt.Errorf("open redis of %s: %w", Name, err)
	}
	reg, err := env.Registry()
	if err != nil {
		return fmt.Errorf("open registries of %s: %w", Name, err)
	}
	b, err := env.Bus()
	if err != nil {
		return fmt.Errorf("open bus of %s: %w", Name, err)
	}
	pool, err := worker.New(worker.Config{Workers: cfg.Workers, Memory: int64(cfg.MemoryMiB) << 20}, env.Log)
	if err != nil {
		return fmt.Errorf("make workers of %s: %w", Name, err)
	}
	defer pool.Close()
	s, err := New(ctx, cfg, db, leases, reg, pool.Analyze, env.Log, env.Metrics)
	if err != nil {
		return err
	}
	if err := b.EnsureTopics(ctx, contracts.LayerRequestedV1, contracts.LayerAnalyzedV1, contracts.LayerFailedV1); err != nil {
		return fmt.Errorf("create topics of %s: %w", Name, err)
	}
	concurrency := cfg.Concurrency
	if concurrency == 0 {
		concurrency = 2 * cfg.Workers // while one layer is looked up, another is read
	}
	env.Started()
	err = b.Consume(ctx, bus.Subscription{
		Events: []string{contracts.LayerRequestedV1}, Handler: s.Handle, OnDead: s.Dead, Concurrency: concurrency,
	})
	if err != nil {
		return fmt.Errorf("consume as %s: %w", Name, err)
	}
	return nil
}

// Handle analyses the layer that a layer.requested asks for, unless that is
// done or being done. It is a bus.Handler.
func (s *Service) Handle(ctx context.Context, in event.Event) ([]event.Event, error) {
	req, err := bus.Decode[contracts.LayerRequested](in)
	if err != nil {
		return nil, err
	}
	if err := check(req); err != nil {
		return nil, bus.Permanent(fmt.Errorf("layer.requested %s: %w", in.ID(), err))
	}
	// The key names the version: a newer analyzer analyses again.
	key := "layer/" + layer.Version + "/" + req.Digest
	for {
		done, err := s.done(ctx, req.Digest)
		if err != nil {
			return nil, outage(err)
		}
		if done != nil {
			return s.again(ctx, in, req, done)
		}
		lease, err := s.leases.Acquire(ctx, key, in.ID(), s.cfg.LeaseTTL)
		var taken *redis.TakenError
		switch {
		case err == nil:
			return s.hold(ctx, in, req, lease)
		case errors.As(err, &taken) && taken.Holder != in.ID():
			// Another event has it: its layer.analyzed serves all who wait.
			s.layers.WithLabelValues("taken").Inc()
			s.log.DebugContext(ctx, "layer is being analysed already", "layer", req.Digest, "holder", taken.Holder)
			return nil, nil
		case errors.As(err, &taken):
			// We ourselves, in an earlier delivery that may still be at work.
			if err := wait(ctx, min(max(taken.TTL, time.Millisecond), waitEvery)); err != nil {
				return nil, err
			}
		case ctx.Err() != nil:
			return nil, ctx.Err()
		default:
			s.log.WarnContext(ctx, "analysing a layer without a lease", "layer", req.Digest, "error", err)
			return s.work(ctx, in, req, 0)
		}
	}
}

func check(req contracts.LayerRequested) error {
	if !contracts.ValidDigest(req.Digest) {
		return fmt.Errorf("%q is not a sha256 digest", req.Digest)
	}
	if err := req.Image.Validate(); err != nil {
		return err
	}
	if req.Size < 0 {
		return fmt.Errorf("size is %d", req.Size)
	}
	return nil
}

func wait(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// outage marks what the database says when it is away.
func outage(err error) error {
	if store.IsUnavailable(err) {
		return bus.Unavailable(err)
	}
	return err
}

// record is a row of analyzer_layers.
type record struct {
	report              contracts.Blob
	bytes               int64
	packages, gaps, cpu int64
}

type querier interface {
	QueryRowContext(ctx context.Context, query string, args ...any) *sql.Row
}

func (s *Service) record(ctx context.Context, q querier, digest string) (*record, error) {
	var r record
	err := q.QueryRowContext(ctx, `SELECT report, report_size, bytes, packages, gaps, cpu_ms FROM analyzer_layers
		WHERE layer = $1 AND analyzer = $2`, digest, layer.Version).
		Scan(&r.report.Digest, &r.report.Size, &r.bytes, &r.packages, &r.gaps, &r.cpu)
	if errors.Is(err, sql.ErrNoRows) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("look up layer %s: %w", digest, err)
	}
	return &r, nil
}

// done returns what is known of a layer whose report is stored, else nil.
func (s *Service) done(ctx context.Context, digest string) (*record, error) {
	r, err := s.record(ctx, s.db, digest)
	if err != nil || r == nil {
		return nil, err
	}
	has, err := s.db.HasBlob(ctx, r.report.Digest)
	if err != nil || !has {
		return nil, err
	}
	return r, nil
}

// again announces a report that is stored already.
func (s *Service) again(ctx context.Context, in event.Event, req contracts.LayerRequested, r *record) ([]event.Event, error) {
	// The event that had it analysed is answered as it was then.
	out, stored, err := s.db.Stored(ctx, Name, in)
	if err == nil && !stored {
		err = s.touch(ctx, r.report.Digest)
	}
	if err == nil && !stored {
		out, err = announce(req, r, true)
	}
	if err != nil {
		return nil, outage(fmt.Errorf("announce layer %s: %w", req.Digest, err))
	}
	s.layers.WithLabelValues("reused").Inc()
	s.log.InfoContext(ctx, "layer was analysed before", "layer", req.Digest)
	return out, nil
}

// touch gives whoever is told of a report now its full time to read it. Once an
// hour is enough, where blobs live for days.
func (s *Service) touch(ctx context.Context, report string) error {
	const often = time.Hour
	now := time.Now()
	s.mu.Lock()
	fresh := now.Sub(s.touched[report]) < often
	s.mu.Unlock()
	if fresh {
		return nil
	}
	if err := s.db.TouchBlobs(ctx, report); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.touched) >= maxTouched {
		clear(s.touched)
	}
	s.touched[report] = now
	return nil
}

func announce(req contracts.LayerRequested, r *record, reused bool) ([]event.Event, error) {
	data := contracts.LayerAnalyzed{
		Digest: req.Digest, Report: r.report, Analyzer: layer.Version, Reused: reused,
		Packages: clampInt(r.packages), Gaps: clampInt(r.gaps), Bytes: r.bytes,
	}
	if !reused {
		data.CPUMs = r.cpu
	}
	ev, err := bus.NewEvent(contracts.LayerAnalyzedV1, req.Digest, data)
	if err != nil {
		return nil, err
	}
	ev.SetExtension(contracts.ExtDataRef, data.Report.Digest)
	bus.Key(&ev, req.Digest)
	return []event.Event{ev}, nil
}

func clampInt(n int64) int { return int(min(n, math.MaxInt32)) }

// hold works while the lease is renewed.
func (s *Service) hold(ctx context.Context, in event.Event, req contracts.LayerRequested, lease *redis.Lease) ([]event.Event, error) {
	var out []event.Event
	err := s.leases.Hold(ctx, lease, s.cfg.LeaseTTL, func(ctx context.Context) error {
		// Its last holder may have finished since we looked.
		done, err := s.done(ctx, req.Digest)
		if err != nil {
			return outage(err)
		}
		if done != nil {
			out, err = s.again(ctx, in, req, done)
			return err
		}
		out, err = s.work(ctx, in, req, lease.Token)
		return err
	})
	return out, err
}

// work reads and analyses the layer, and stores what it found.
func (s *Service) work(ctx context.Context, in event.Event, req contracts.LayerRequested, token int64) ([]event.Event, error) {
	if most := s.cfg.Limits.CompressedBytes; most > 0 && req.Size > most {
		return s.failed(req, ReasonTooLarge, fmt.Errorf("layer of %d bytes, allowed are %d", req.Size, most))
	}
	started := time.Now()
	report, cpu, err := s.read(ctx, req)
	if err == nil && crashed(report) {
		// It may not happen again; what happens twice is the layer's own doing.
		s.log.WarnContext(ctx, "analysing a layer once more after a crash", "layer", req.Digest, "reason", report.Gaps[0].Reason)
		report, cpu, err = s.read(ctx, req)
	}
	if err != nil {
		return s.unread(ctx, req, err)
	}
	out, err := s.finish(ctx, in, req, report, cpu, token)
	if err != nil {
		return nil, fmt.Errorf("store report of layer %s: %w", req.Digest, err)
	}
	s.layers.WithLabelValues("analyzed").Inc()
	s.bytes.Add(float64(report.Bytes))
	s.seconds.Add(cpu.Seconds())
	s.gaps.Add(float64(len(report.Gaps)))
	s.log.InfoContext(ctx, "layer analysed", "layer", req.Digest, "repository", req.Image.Repo(), "bytes", report.Bytes,
		"packages", packages(report), "gaps", len(report.Gaps), "cpu", cpu, "took", time.Since(started))
	return out, nil
}

func crashed(r *contracts.LayerReport) bool {
	return len(r.Gaps) == 1 && strings.HasPrefix(r.Gaps[0].Reason, worker.CrashReason)
}

// read analyses the layer through the repository of the request.
func (s *Service) read(ctx context.Context, req contracts.LayerRequested) (*contracts.LayerReport, time.Duration, error) {
	blob := &lazyBlob{open: func() (io.ReadCloser, error) {
		return s.reg.Blob(ctx, req.Image.Registry, req.Image.Repository, ocispec.Descriptor{
			MediaType: req.MediaType, Digest: digest.Digest(req.Digest), Size: req.Size,
		})
	}}
	// The registry client verifies the digest at the end of the stream.
	report, cpu, err := s.analyze(ctx, blob, s.cfg.Limits.options(req.Digest))
	if cerr := blob.close(); err == nil && cerr != nil {
		err = fmt.Errorf("close layer: %w", cerr)
	}
	return report, cpu, err
}

// lazyBlob is opened when it is first read, so that no connection waits for a
// free worker.
type lazyBlob struct {
	open func() (io.ReadCloser, error)
	rc   io.ReadCloser
	err  error
}

func (l *lazyBlob) Read(p []byte) (int, error) {
	if l.rc == nil && l.err == nil {
		l.rc, l.err = l.open()
	}
	if l.err != nil {
		return 0, l.err
	}
	return l.rc.Read(p)
}

func (l *lazyBlob) close() error {
	if l.rc == nil {
		return nil
	}
	return l.rc.Close()
}

func packages(r *contracts.LayerReport) int64 {
	n := int64(len(r.Packages))
	for _, d := range r.Databases {
		n += int64(len(d.Packages))
	}
	return n
}

// finish stores report, row and output in one transaction. Where another
// instance finished first, its report stays and is announced.
func (s *Service) finish(ctx context.Context, in event.Event, req contracts.LayerRequested, report *contracts.LayerReport, cpu time.Duration, token int64) ([]event.Event, error) {
	content, err := json.Marshal(report)
	if err != nil {
		return nil, bus.Permanent(fmt.Errorf("encode report: %w", err))
	}
	return s.db.Once(ctx, Name, in, func(ctx context.Context, tx *sql.Tx) ([]event.Event, error) {
		r := &record{
			report: contracts.Blob{Digest: contracts.DigestOf(content), Size: int64(len(content))},
			bytes:  report.Bytes, packages: packages(report), gaps: int64(len(report.Gaps)), cpu: cpu.Milliseconds(),
		}
		first, err := s.record(ctx, tx, req.Digest)
		if err != nil {
			return nil, err
		}
		if first != nil {
			has, err := s.db.HasBlob(ctx, first.report.Digest)
			if err != nil {
				return nil, err
			}
			if has {
				first.cpu = r.cpu
				r = first
			}
		}
		if r != first {
			if _, err := s.db.PutBlob(ctx, content); err != nil {
				return nil, err
			}
		} else if err := s.db.TouchBlobs(ctx, r.report.Digest); err != nil {
			return nil, err
		}
		_, err = tx.ExecContext(ctx, `INSERT INTO analyzer_layers
			(layer, analyzer, report, report_size, diff_id, bytes, packages, gaps, cpu_ms, token, analyzed_at)
			VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)
			ON CONFLICT (layer, analyzer) DO UPDATE SET report = excluded.report, report_size = excluded.report_size,
				token = CASE WHEN analyzer_layers.token > excluded.token THEN analyzer_layers.token ELSE excluded.token END`,
			req.Digest, layer.Version, r.report.Digest, r.report.Size, report.DiffID, r.bytes, r.packages, r.gaps, r.cpu, token, time.Now().UnixMilli())
		if err != nil {
			return nil, fmt.Errorf("store layer: %w", err)
		}
		return announce(req, r, false)
	})
}

// unread decides what becomes of a layer that could not be read.
func (s *Service) unread(ctx context.Context, req contracts.LayerRequested, err error) ([]event.Event, error) {
	if ctx.Err() != nil {
		return nil, err
	}
	attempt := bus.Attempt(ctx)
	if at, again := registry.RetryAt(err, attempt); again {
		if registry.Held(err) {
			return nil, bus.NotYet(err, at)
		}
		if attempt < s.cfg.Attempts {
			return nil, bus.Later(err, at)
		}
		return s.failed(req, ReasonUnavailable, fmt.Errorf("given up after %d attempts: %w", attempt, err))
	}
	if reason := reasonOf(err); reason != "" {
		s.log.WarnContext(ctx, "layer cannot be read", "layer", req.Digest, "repository", req.Image.Repo(), "reason", reason, "error", err)
		return s.failed(req, reason, err)
	}
	return nil, err
}

// reasonOf names what a registry's error says about the repository; "" means
// that it is no fact about it.
func reasonOf(err error) string {
	for _, fact := range []struct {
		err    error
		reason string
	}{
		// A mismatch first: it may wrap others.
		{registry.ErrDigestMismatch, ReasonDigestMismatch},
		{layer.ErrDigest, ReasonDigestMismatch},
		{registry.ErrNotFound, ReasonNotFound},
		{registry.ErrUnauthorized, ReasonUnauthorized},
		{registry.ErrTooLarge, ReasonTooLarge},
		{registry.ErrNotConfigured, ReasonNotConfigured},
		{registry.ErrForbiddenHost, ReasonForbiddenHost},
		{registry.ErrRefused, ReasonRefused},
		{registry.ErrInvalidName, ReasonRefused},
	} {
		if errors.Is(err, fact.err) {
			return fact.reason
		}
	}
	return ""
}

// failed says that the layer could not be read through the request's repository.
func (s *Service) failed(req contracts.LayerRequested, reason string, err error) ([]event.Event, error) {
	s.layers.WithLabelValues("failed").Inc()
	message := err.Error()
	if len(message) > maxMessage {
		message = strings.ToValidUTF8(message[:maxMessage], "")
	}
	ev, err := bus.NewEvent(contracts.LayerFailedV1, req.Digest, contracts.LayerFailed{
		Digest: req.Digest, Image: req.Image, Attempt: req.Attempt, Reason: reason, Message: message,
	})
	if err != nil {
		return nil, err
	}
	bus.Key(&ev, req.Digest)
	return []event.Event{ev}, nil
}

// Dead is a bus.Subscription's OnDead: the layer of an event that goes to the
// dead letters has failed. Of an event that cannot be read nothing can be said.
func (s *Service) Dead(in event.Event, reason error) []event.Event {
	req, err := bus.Decode[contracts.LayerRequested](in)
	if err != nil || check(req) != nil {
		return nil
	}
	out, err := s.failed(req, ReasonInternal, reason)
	if err != nil {
		return nil
	}
	return out
}
