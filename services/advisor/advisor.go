// Package advisor keeps advisory snapshots: it compiles them from what the
// databases of advisories export, publishes each that differs from the last as a
// signed artefact in a registry, and says what changed.
package advisor

import (
	"context"
	"crypto/ed25519"
	"database/sql"
	"embed"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/cloudevents/sdk-go/v2/event"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/bus"
	"github.com/tidewaiter/tidewaiter/libs/registry"
	"github.com/tidewaiter/tidewaiter/libs/run"
	"github.com/tidewaiter/tidewaiter/libs/store"
	"github.com/tidewaiter/tidewaiter/services/advisor/artefact"
	"github.com/tidewaiter/tidewaiter/services/advisor/delta"
	"github.com/tidewaiter/tidewaiter/services/advisor/snapshot"
)

// Name is the service's name.
const Name = "advisor"

// Defaults of Config.
const (
	DefaultPoll = 10 * time.Minute
	DefaultKeep = 10
)

//go:embed migrations/*.sql
var migrations embed.FS

// Config is the section "advisor".
type Config struct {
	// From are the sources, each overlaid on those before: a folder (see
	// compile.Build), a zip archive of OSV records, an http(s) URL below which
	// <Ecosystem>/all.zip lie; or one snapshot file alone.
	From []string `yaml:"from"`
	// Ecosystems are looked for below each URL of From; default DefaultEcosystems.
	Ecosystems []string `yaml:"ecosystems"`
	// KEV, EPSS and EOL are http(s) URLs of CISA's catalog (JSON), FIRST's scores
	// (CSV, gzip) and a zip of endoflife.date's files; empty: none.
	KEV  string `yaml:"kev"`
	EPSS string `yaml:"epss"`
	EOL  string `yaml:"eol"`
	// Work is the folder for downloads and the newest snapshots.
	Work string `yaml:"work"`
	// Publish is the registry/repository in which snapshots are published.
	Publish string `yaml:"publish"`
	// KeyFile is the PEM file with the Ed25519 key that signs them (artefact.GenerateKey).
	KeyFile string `yaml:"keyFile"`
	// Poll is how often the sources are looked at; default DefaultPoll.
	Poll time.Duration `yaml:"poll"`
	// Keep is how many snapshots stay in the registry; default DefaultKeep.
	Keep int `yaml:"keep"`
}

// DefaultEcosystems are those that packages of images belong to.
func DefaultEcosystems() []string {
	return []string{
		"AlmaLinux", "Alpine", "Bitnami", "Chainguard", "crates.io", "Debian", "Go", "Maven", "npm", "NuGet", "Packagist", "PyPI",
		"Red Hat", "Rocky Linux", "RubyGems", "SUSE", "Ubuntu", "Wolfi",
	}
}

// DefaultConfig returns the configuration before any file is read.
func DefaultConfig() Config {
	return Config{Ecosystems: DefaultEcosystems(), Poll: DefaultPoll, Keep: DefaultKeep}
}

// Validate returns everything that is wrong with c.
func (c Config) Validate() error {
	var problems []error
	if len(c.From) == 0 {
		problems = append(problems, errors.New("from is empty: there is nothing to make snapshots of"))
	}
	for name, value := range map[string]string{"work": c.Work, "keyFile": c.KeyFile} {
		if value == "" {
			problems = append(problems, fmt.Errorf("%s is not set", name))
		}
	}
	for _, source := range append([]string{c.KEV, c.EPSS, c.EOL}, c.From...) {
		if !isURL(source) {
			continue
		}
		if u, err := url.Parse(source); err != nil || u.Host == "" || u.User != nil {
			problems = append(problems, fmt.Errorf("%s is no URL of a host, without credentials", run.RedactURL(source)))
		}
	}
	if _, err := artefact.ParseRepository(c.Publish); err != nil {
		problems = append(problems, fmt.Errorf("publish: %w", err))
	}
	if c.Poll <= 0 || c.Keep < 2 {
		problems = append(problems, fmt.Errorf("poll is %s and keep %d; they must be above 0 and 1", c.Poll, c.Keep))
	}
	return errors.Join(problems...)
}

func isURL(s string) bool { return strings.HasPrefix(s, "http://") || strings.HasPrefix(s, "https://") }

// Registry is what the advisor needs of a registry client.
type Registry interface {
	artefact.Pusher
	artefact.Puller
	Delete(ctx context.Context, r registry.Ref) error
}

// Publisher sends events and returns when all are stored.
type Publisher interface {
	Publish(ctx context.Context, events ...event.Event) error
}

// Service is the advisor. Its methods are for one goroutine.
type Service struct {
	cfg      Config
	db       *store.DB
	registry Registry
	bus      Publisher
	log      *slog.Logger
	to       artefact.Repository
	key      ed25519.PrivateKey
	sources  *sources
	now      func() time.Time
	built    string // what the sources were when they were last compiled
}

// New migrates the advisor's tables and returns the service.
func New(ctx context.Context, cfg Config, db *store.DB, registry Registry, bus Publisher, log *slog.Logger) (*Service, error) {
	if err := cfg.Validate(); err != nil {
		return nil, fmt.Errorf("advisor: %w: %w", err, run.ErrConfig)
	}
	to, err := artefact.ParseRepository(cfg.Publish)
	if err != nil {
		return nil, fmt.Errorf("advisor: %w: %w", err, run.ErrConfig)
	}
	key, err := artefact.LoadKey(cfg.KeyFile)
	if err != nil {
		return nil, fmt.Errorf("advisor: %w: %w", err, run.ErrConfig)
	}
	if err := os.MkdirAll(filepath.Join(cfg.Work, "snapshots"), 0o700); err != nil {
		return nil, fmt.Errorf("advisor: make work folder: %w", err)
	}
	if err := db.Migrate(ctx, Name, migrations); err != nil {
		return nil, fmt.Errorf("migrate %s: %w", Name, err)
	}
	return &Service{
		cfg: cfg, db: db, registry: registry, bus: bus, log: log, to: to, key: key,
		sources: newSources(cfg, db, log), now: time.Now,
	}, nil
}

// record is one row of advisor_snapshots.
type record struct {
	contracts.SnapshotRef
	location string
	event    string
	sent     bool
}

// Poll looks at the sources once and publishes a snapshot if they changed. What
// a stop in between leaves undone, the next call does. Of several replicas one
// does it at a time; the others find what it has published.
func (s *Service) Poll(ctx context.Context) (published bool, err error) {
	_, err = s.db.Alone(ctx, Name+" poll", func(ctx context.Context) error {
		published, err = s.poll(ctx)
		return err
	})
	return published, err
}

func (s *Service) poll(ctx context.Context) (published bool, err error) {
	last, err := s.last(ctx)
	if err != nil {
		return false, err
	}
	if err := s.send(ctx); err != nil {
		return false, err
	}
	state, err := s.sources.refresh(ctx)
	if err != nil {
		return false, err
	}
	if state == s.built && last != nil {
		return false, nil
	}
	next := filepath.Join(s.cfg.Work, "next.db")
	defer func() { _ = os.Remove(next) }() // renamed when it was published
	if err := s.sources.compile(ctx, next); err != nil {
		return false, err
	}
	published, err = s.publish(ctx, next, last)
	if err != nil {
		return false, err
	}
	s.built = state
	if !published {
		return false, nil
	}
	if err := s.send(ctx); err != nil {
		return true, err
	}
	s.forget(ctx)
	return true, nil
}

// last returns the newest published snapshot; nil: there is none. Where the
// database does not know, the registry does.
func (s *Service) last(ctx context.Context) (*record, error) {
	var r record
	var sent int
	err := s.db.QueryRowContext(ctx, `SELECT sequence, digest, location, event, sent FROM advisor_snapshots
		ORDER BY sequence DESC LIMIT 1`).Scan(&r.Sequence, &r.Digest, &r.location, &r.event, &sent)
	if err == nil {
		r.sent = sent == 1
		return &r, nil
	}
	if !errors.Is(err, sql.ErrNoRows) {
		return nil, fmt.Errorf("read last snapshot: %w", err)
	}
	found, err := artefact.Look(ctx, s.registry, s.to, "", s.public())
	if errors.Is(err, registry.ErrNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	_, err = s.db.ExecContext(ctx, `INSERT INTO advisor_snapshots (sequence, digest, location, event, sent) VALUES ($1, $2, $3, '', 1)
		ON CONFLICT DO NOTHING`, found.Snapshot.Sequence, found.Snapshot.Digest, found.Location)
	if err != nil {
		return nil, fmt.Errorf("store last snapshot: %w", err)
	}
	return &record{SnapshotRef: found.Snapshot, location: found.Location, sent: true}, nil
}

func (s *Service) public() []ed25519.PublicKey {
	public, _ := s.key.Public().(ed25519.PublicKey) // it is one, see crypto/ed25519
	return []ed25519.PublicKey{public}
}

func (s *Service) folder() string { return filepath.Join(s.cfg.Work, "snapshots") }

// publish publishes the snapshot in file next unless it says what the last one
// does. Its sequence is raised above the last one's.
func (s *Service) publish(ctx context.Context, next string, last *record) (bool, error) {
	fresh, err := snapshot.Open(next)
	if err != nil {
		return false, fmt.Errorf("open what was compiled: %w", err)
	}
	defer func() { // it may be another one by then
		if fresh != nil {
			_ = fresh.Close() // unmapping what was mapped does not fail
		}
	}()
	var old *snapshot.Snapshot
	if last != nil {
		if old, err = s.open(ctx, *last); err != nil {
			return false, fmt.Errorf("open last snapshot: %w", err)
		}
		defer func() { _ = old.Close() }() // unmapping what was mapped does not fail
		if fresh.SameContent(old) {
			return false, nil
		}
		if fresh, err = s.raise(ctx, fresh, next, last.Sequence); err != nil {
			return false, err
		}
	}
	ref := contracts.SnapshotRef{Digest: fresh.Digest(), Sequence: fresh.Sequence()}
	data := contracts.AdvisoriesChanged{
		Snapshot: ref, Records: fresh.Stats().Records, Newest: fresh.Newest(), PublishedAt: s.now().UTC().Truncate(time.Millisecond),
	}
	if old != nil {
		if err := s.compare(ctx, old, fresh, &data); err != nil {
			return false, err
		}
	}
	if data.Location, err = artefact.Push(ctx, s.registry, s.to, next, s.key); err != nil {
		return false, err
	}
	if err := os.Rename(next, filepath.Join(s.folder(), artefact.FileName(ref))); err != nil {
		return false, fmt.Errorf("keep snapshot: %w", err)
	}
	if err := s.store(ctx, data); err != nil {
		return false, err
	}
	s.log.InfoContext(ctx, "advisory snapshot published", "snapshot", ref.Digest, "sequence", ref.Sequence, "location", data.Location,
		"records", data.Records, "changed", data.Changed)
	return true, nil
}

// raise gives a snapshot a sequence above the last one's, and above that of one
// which was published before a crash kept it from being remembered.
func (s *Service) raise(ctx context.Context, fresh *snapshot.Snapshot, file string, last int64) (*snapshot.Snapshot, error) {
	if fresh.Sequence() <= last {
		stamped, err := stamp(fresh, file, last+1)
		if err != nil {
			return fresh, err
		}
		_ = fresh.Close() // unmapping what was mapped does not fail
		fresh = stamped
	}
	top, err := artefact.Look(ctx, s.registry, s.to, "", s.public())
	if errors.Is(err, registry.ErrNotFound) || err == nil && (top.Snapshot.Sequence < fresh.Sequence() || top.Snapshot.Digest == fresh.Digest()) {
		return fresh, nil
	}
	if err != nil {
		return fresh, err
	}
	stamped, err := stamp(fresh, file, top.Snapshot.Sequence+1)
	if err != nil {
		return fresh, err
	}
	_ = fresh.Close() // unmapping what was mapped does not fail
	return stamped, nil
}

// stamp writes a snapshot under another sequence over its own file.
func stamp(s *snapshot.Snapshot, file string, sequence int64) (*snapshot.Snapshot, error) {
	f, err := os.Create(file + ".stamped") //nolint:gosec // in the work folder
	if err != nil {
		return nil, fmt.Errorf("raise sequence: %w", err)
	}
	if err := errors.Join(s.Stamp(f, sequence), f.Sync(), f.Close()); err != nil {
		return nil, fmt.Errorf("raise sequence: %w", err)
	}
	if err := os.Rename(f.Name(), file); err != nil {
		return nil, fmt.Errorf("raise sequence: %w", err)
	}
	return snapshot.Open(file)
}

// open returns a published snapshot, from the work folder or the registry.
func (s *Service) open(ctx context.Context, r record) (*snapshot.Snapshot, error) {
	found, err := snapshot.Open(filepath.Join(s.folder(), artefact.FileName(r.SnapshotRef)))
	if err == nil && found.Digest() == r.Digest {
		return found, nil
	}
	p, err := artefact.Look(ctx, s.registry, s.to, r.location, s.public())
	if err != nil {
		return nil, err
	}
	file, err := artefact.Fetch(ctx, s.registry, s.to, p, s.folder())
	if err != nil {
		return nil, err
	}
	return snapshot.Open(file)
}

// compare stores what differs and adds it to the event.
func (s *Service) compare(ctx context.Context, old, next *snapshot.Snapshot, data *contracts.AdvisoriesChanged) error {
	d, err := delta.Compare(ctx, old, next)
	if err != nil {
		return err
	}
	content, err := json.Marshal(d)
	if err != nil {
		return fmt.Errorf("encode delta: %w", err)
	}
	digest, err := s.db.PutBlob(ctx, content)
	if err != nil {
		return fmt.Errorf("store delta: %w", err)
	}
	data.Previous, data.Delta, data.Changed = &d.Previous, &contracts.Blob{Digest: digest, Size: int64(len(content))}, len(d.Packages)
	return nil
}

// store remembers a published snapshot and the event that says so.
func (s *Service) store(ctx context.Context, data contracts.AdvisoriesChanged) error {
	ev, err := bus.NewEvent(contracts.AdvisoriesChangedV1, data.Snapshot.Digest, data)
	if err != nil {
		return err
	}
	ev.SetSource("/services/" + Name)
	ev.SetID(contracts.JoinID(ev.Type(), ev.Subject(), fmt.Sprint(data.Snapshot.Sequence)))
	ev.SetTime(data.PublishedAt)
	if data.Delta != nil {
		ev.SetExtension(contracts.ExtDataRef, data.Delta.Digest)
	}
	bus.Key(&ev, "advisories")
	encoded, err := json.Marshal(ev)
	if err != nil {
		return fmt.Errorf("encode event: %w", err)
	}
	_, err = s.db.ExecContext(ctx, `INSERT INTO advisor_snapshots (sequence, digest, location, event, sent) VALUES ($1, $2, $3, $4, 0)`,
		data.Snapshot.Sequence, data.Snapshot.Digest, data.Location, string(encoded))
	if err != nil {
		return fmt.Errorf("store snapshot: %w", err)
	}
	return nil
}

// send sends the events that were not, in order.
func (s *Service) send(ctx context.Context) error {
	for {
		var sequence int64
		var encoded string
		err := s.db.QueryRowContext(ctx, `SELECT sequence, event FROM advisor_snapshots WHERE sent = 0 ORDER BY sequence LIMIT 1`).Scan(&sequence, &encoded)
		if errors.Is(err, sql.ErrNoRows) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read event to send: %w", err)
		}
		var ev event.Event
		if err := json.Unmarshal([]byte(encoded), &ev); err != nil {
			return fmt.Errorf("decode event: %w", err)
		}
		if err := s.bus.Publish(ctx, ev); err != nil {
			return fmt.Errorf("send %s: %w", ev.Type(), err)
		}
		if _, err := s.db.ExecContext(ctx, `UPDATE advisor_snapshots SET sent = 1 WHERE sequence = $1`, sequence); err != nil {
			return fmt.Errorf("store that it was sent: %w", err)
		}
	}
}

// forget deletes snapshots beyond those that are kept. What fails is tried
// again after the next one.
func (s *Service) forget(ctx context.Context) {
	rows, err := s.db.QueryContext(ctx, `SELECT sequence, digest, location FROM advisor_snapshots ORDER BY sequence DESC`)
	if err != nil {
		s.log.WarnContext(ctx, "old snapshots cannot be read", "error", err)
		return
	}
	var old []record
	for n := 0; rows.Next(); n++ {
		var r record
		if err = rows.Scan(&r.Sequence, &r.Digest, &r.location); err != nil {
			break
		}
		if n > 0 {
			_ = os.Remove(filepath.Join(s.folder(), artefact.FileName(r.SnapshotRef))) // only the last is compared with
		}
		if n >= s.cfg.Keep {
			old = append(old, r)
		}
	}
	if err := errors.Join(err, rows.Err(), rows.Close()); err != nil {
		s.log.WarnContext(ctx, "old snapshots cannot be read", "error", err)
		return
	}
	for _, r := range old {
		im, err := contracts.ParseImage(r.location)
		if err == nil {
			err = s.registry.Delete(ctx, registry.Ref{Registry: im.Registry, Repository: im.Repository, Digest: im.Digest})
		}
		if err == nil {
			_, err = s.db.ExecContext(ctx, `DELETE FROM advisor_snapshots WHERE sequence = $1`, r.Sequence)
		}
		if err != nil {
			s.log.WarnContext(ctx, "old snapshot cannot be deleted", "snapshot", r.Digest, "error", err)
		}
	}
}

// Run is a run.Service.
func Run(ctx context.Context, env *run.Env) error {
	cfg := DefaultConfig()
	if err := env.Section(&cfg); err != nil {
		return fmt.Errorf("advisor: %w", err)
	}
	db, err := env.DB(ctx)
	if err != nil {
		return fmt.Errorf("advisor: %w", err)
	}
	b, err := env.Bus()
	if err != nil {
		return fmt.Errorf("advisor: %w", err)
	}
	r, err := env.Registry()
	if err != nil {
		return fmt.Errorf("advisor: %w", err)
	}
	s, err := New(ctx, cfg, db, r, b, env.Log)
	if err != nil {
		return err
	}
	if err := b.EnsureTopics(ctx, contracts.AdvisoriesChangedV1); err != nil {
		return fmt.Errorf("advisor: %w", err)
	}
	env.Started()
	tick := time.NewTicker(cfg.Poll)
	defer tick.Stop()
	problem := ""
	for {
		_, err := s.Poll(ctx)
		if err == nil || s.built == "" { // later troubles age the advisories, which is seen in them
			env.Health.Set("advisor sources", err)
		}
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil && err.Error() != problem:
			problem = err.Error()
			env.Log.WarnContext(ctx, "advisories could not be brought up to date, trying again", "error", err)
		case err == nil:
			problem = ""
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}
