package sweeper

import (
	"cmp"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/cloudevents/sdk-go/v2/event"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/bus"
	"github.com/tidewaiter/tidewaiter/libs/redis"
	"github.com/tidewaiter/tidewaiter/libs/registry"
	"github.com/tidewaiter/tidewaiter/services/catalog"
	"github.com/tidewaiter/tidewaiter/services/intake/hook"
	"github.com/tidewaiter/tidewaiter/services/sweeper/list"
)

const (
	chunk = 100 // tags that are compared, and stored, at once
	// maxPages bounds a listing, which a registry could make endless. maxStale
	// is how many pages in a row may hold nothing new.
	maxPages = 100_000
	maxStale = 3
	// ownPause is the pause where it is not the registry that fails.
	ownPause = 5 * time.Second
	// maxPauses is how often a sweep pauses where a registry cannot serve something
	// before it goes on without it. maxUnread is how many tags in a row are left
	// out like this before their repository is.
	maxPauses = 3
	maxUnread = 10
	// underway is how long what a webhook told of may take to planner; until then
	// it is not pushed once more.
	underway = time.Hour
)

var (
	// errEndless is returned for a listing that does not come to an end.
	errEndless = errors.New("the listing does not end")
	// errUnread is returned for a repository of which nothing is known but its tags' names.
	errUnread = errors.New("none of its tags can be read")
	// errListing ends a sweep of what is not listed any more.
	errListing = errors.New("the source lists something else now; another sweep begins")
)

// Turn does what is due for a source: it decides about webhooks that have had
// their time, and begins a sweep or goes on with one, until that is finished.
// While another process holds the registry nothing is done.
func (s *Sweeper) Turn(ctx context.Context, id string) error {
	src := s.sources[id]
	if src == nil {
		return fmt.Errorf("%q: %w", id, ErrUnknownSource)
	}
	due, err := s.due(ctx, src)
	if err != nil || !due {
		return err
	}
	lease, err := s.Leases.Acquire(ctx, "sweep:"+strings.ToLower(src.Registry), holder(id), leaseTTL)
	if errors.Is(err, redis.ErrTaken) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("take the registry's lease: %w", err)
	}
	return s.Leases.Hold(ctx, lease, leaseTTL, func(ctx context.Context) error { return s.work(ctx, src) })
}

func holder(source string) string {
	host, err := os.Hostname()
	if err != nil {
		host = "unknown"
	}
	return fmt.Sprintf("%s on %s (%d)", source, host, os.Getpid())
}

// due says whether there is anything to do, without a lease.
func (s *Sweeper) due(ctx context.Context, src *source) (bool, error) {
	now := s.Now()
	row, err := readSchedule(ctx, s.DB, src.id)
	if err != nil {
		return false, err
	}
	p, err := load(ctx, s.DB, src.id, 0)
	if err != nil || row.due(p, now) {
		return err == nil, err
	}
	tags, err := s.dueTags(ctx, src.id, now, 1)
	return len(tags) > 0, err
}

// work is Turn under the lease.
func (s *Sweeper) work(ctx context.Context, src *source) error {
	if err := s.settle(ctx, src, nil); err != nil {
		return err
	}
	p, err := s.current(ctx, src)
	if err != nil || p == nil {
		return err
	}
	src.pace.begin(s.Now(), p.Figures)
	defer src.pace.end()
	err = s.run(ctx, src, p)
	switch {
	case err == nil:
		return s.finish(ctx, src, p)
	case ctx.Err() != nil:
		return err
	}
	return s.pause(ctx, src, p, err)
}

// current returns the sweep to go on with or to begin; nil: none is due.
func (s *Sweeper) current(ctx context.Context, src *source) (*progress, error) {
	row, err := readSchedule(ctx, s.DB, src.id)
	if err != nil {
		return nil, err
	}
	p, err := load(ctx, s.DB, src.id, 0)
	if err != nil {
		return nil, err
	}
	switch {
	case !row.due(p, s.Now()):
		return nil, nil
	case p.running() && !row.elsewhere(src):
		return p, nil
	}
	return s.begin(ctx, src, p)
}

// begin begins a sweep after the last one, if there was any; one that is still
// running is given up, and what begins is of its kind.
func (s *Sweeper) begin(ctx context.Context, src *source, last *progress) (*progress, error) {
	start := s.Now().UnixNano()
	if last != nil {
		start = max(start, last.id+1)
	}
	p := &progress{source: src.id, id: start, state: contracts.SweepRunning}
	p.enter(phaseRepositories)
	err := s.DB.Tx(ctx, func(tx *sql.Tx) error {
		row, err := readSchedule(ctx, tx, src.id)
		if err != nil {
			return err
		}
		if last.running() {
			given := *last
			given.state, given.Message, given.FinishedAt = contracts.SweepFailed, errListing.Error(), s.Now().UTC()
			if err := given.save(ctx, tx.ExecContext); err != nil {
				return err
			}
			p.DryRun = last.DryRun
		} else {
			p.DryRun = row.take() == requestDryRun
		}
		if row.elsewhere(src) {
			row.completed = 0
			if err := disown(ctx, tx, src.id); err != nil {
				return err
			}
		}
		p.Baseline, row.resumeAt, row.listing = row.completed, 0, src.listing
		if err := saveSchedule(ctx, tx, src.id, row); err != nil {
			return err
		}
		return p.save(ctx, tx.ExecContext)
	})
	if err != nil {
		return nil, err
	}
	s.Log.InfoContext(ctx, "sweep begins", slog.String("source", src.id), slog.String("registry", src.Registry), slog.Bool("dryRun", p.DryRun))
	return p, nil
}

// run brings a sweep to its end.
func (s *Sweeper) run(ctx context.Context, src *source, p *progress) error {
	for p.Phase != phaseDone {
		var err error
		switch p.Phase {
		case phaseRepositories:
			err = s.repositories(ctx, src, p)
		case phaseTags:
			err = s.tags(ctx, src, p)
		case phaseStatements:
			err = s.statements(ctx, src, p)
		case phaseDeleted:
			err = s.deleted(ctx, src, p)
		default:
			err = fmt.Errorf("sweep of %s is in the unknown phase %q", src.id, p.Phase)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// finish ends a sweep.
func (s *Sweeper) finish(ctx context.Context, src *source, p *progress) error {
	p.state, p.Message, p.FinishedAt = contracts.SweepComplete, "", s.Now().UTC()
	if p.Figures.Unlisted > 0 {
		p.state = contracts.SweepIncomplete
		p.Message = fmt.Sprintf("%d repositories could not be listed", p.Figures.Unlisted)
	}
	return s.end(ctx, src, p)
}

func (s *Sweeper) end(ctx context.Context, src *source, p *progress) error {
	err := s.DB.Tx(ctx, func(tx *sql.Tx) error {
		row, err := readSchedule(ctx, tx, src.id)
		if err != nil {
			return err
		}
		if !p.DryRun {
			row.nextAt = s.Now().Add(src.sweep.Every).UnixNano()
			if p.state == contracts.SweepComplete {
				row.completed = p.id
			}
		}
		if err := saveSchedule(ctx, tx, src.id, row); err != nil {
			return err
		}
		return p.save(ctx, tx.ExecContext)
	})
	if err != nil {
		return err
	}
	s.metrics.sweeps.WithLabelValues(src.id, p.state).Inc()
	if p.state == contracts.SweepComplete && !p.DryRun {
		s.metrics.finished.WithLabelValues(src.id).Set(float64(p.started().Unix()))
	}
	s.Log.InfoContext(ctx, "sweep ended", slog.String("source", src.id), slog.String("state", p.state), slog.String("message", p.Message),
		slog.Bool("dryRun", p.DryRun), slog.Int("tags", p.Figures.Tags), slog.Int("missed", p.Figures.Missed),
		slog.Int("unstated", p.Figures.Unstated), slog.Int("deleted", p.Figures.Deleted), slog.Int("lost", p.Figures.Lost))
	return s.forget(ctx, src.id, s.Now())
}

// pause leaves a sweep for later where that can help, and ends it otherwise.
func (s *Sweeper) pause(ctx context.Context, src *source, p *progress, why error) error {
	at, again := registry.RetryAt(why, 1)
	wait := min(s.cfg.Pause, ownPause)
	if again {
		wait = max(s.cfg.Pause, time.Until(at))
	}
	switch {
	case fact(why):
		p.state, p.Message, p.FinishedAt = contracts.SweepFailed, why.Error(), s.Now().UTC()
		return errors.Join(why, s.end(ctx, src, p))
	case again && p.Phase == phaseTags && p.Inside && p.Pauses >= maxPauses:
		if err := s.unlisted(ctx, p, why); err != nil {
			return err
		}
		wait = 0
	case again:
		p.Pauses++
	}
	p.Message = "it goes on later: " + why.Error()
	at = s.Now().Add(wait)
	err := s.DB.Tx(ctx, func(tx *sql.Tx) error {
		_, err := tx.ExecContext(ctx, `UPDATE sweeper_sources SET resume_at = $1 WHERE source = $2`, at.UnixNano(), src.id)
		if err != nil {
			return fmt.Errorf("store pause: %w", err)
		}
		return p.save(ctx, tx.ExecContext)
	})
	return errors.Join(why, err)
}

// fact says whether an error of a registry is one that another try does not mend.
func fact(err error) bool {
	return slices.ContainsFunc([]error{
		registry.ErrUnauthorized, registry.ErrNotFound, registry.ErrRefused, registry.ErrTooLarge, registry.ErrForbiddenHost,
		registry.ErrDigestMismatch, registry.ErrUnknownManifest, registry.ErrNotConfigured, registry.ErrInvalidName,
		errEndless, list.ErrConfig,
	}, func(e error) bool { return errors.Is(err, e) })
}

// ask makes a request of a registry, again where it throttles or cannot serve.
func (s *Sweeper) ask(ctx context.Context, src *source, request func() error) error {
	for attempt := 1; ; attempt++ {
		err := request()
		if err == nil {
			return nil
		}
		at, again := registry.RetryAt(err, attempt)
		switch {
		case !again || ctx.Err() != nil:
			return err
		case registry.Held(err):
			attempt-- // nothing was asked
		case attempt >= s.cfg.Attempts:
			return err
		}
		s.Log.DebugContext(ctx, "registry is asked again later", slog.String("source", src.id), slog.Time("at", at), slog.Any("error", err))
		wait := time.NewTimer(time.Until(at))
		select {
		case <-ctx.Done():
			wait.Stop()
			return ctx.Err()
		case <-wait.C:
		}
	}
}

// walk follows a listing and refuses to turn in a circle with it.
type walk struct {
	seen  map[string]bool // positions
	stale int             // pages in a row without anything new
}

func newWalk(from string) *walk { return &walk{seen: map[string]bool{from: true}} }

// to says whether the listing can be followed to a position.
func (w *walk) to(p *progress, next string) error {
	p.Pages++
	if next == "" {
		return nil
	}
	if w.seen[next] || w.stale > maxStale || p.Pages > maxPages {
		return fmt.Errorf("page %d leads back, or to nothing new: %w", p.Pages, errEndless)
	}
	w.seen[next] = true
	return nil
}

// found counts what was new on a page of entries.
func (w *walk) found(fresh, entries int) {
	w.stale++
	if fresh > 0 || entries == 0 {
		w.stale = 0
	}
}

// repositories lists the registry's repositories.
func (s *Sweeper) repositories(ctx context.Context, src *source, p *progress) error {
	way := newWalk(p.Next)
	for {
		var page []list.Repository
		var next string
		err := s.ask(ctx, src, func() (err error) {
			page, next, err = src.lister.Repositories(ctx, p.Next)
			return err
		})
		if err != nil {
			return fmt.Errorf("list repositories: %w", err)
		}
		if err := way.to(p, next); err != nil {
			return fmt.Errorf("list repositories: %w", err)
		}
		page = slices.DeleteFunc(page, func(r list.Repository) bool { return !src.rules.Wanted(r.Name) })
		fresh := 0
		was := *p
		err = s.DB.Tx(ctx, func(tx *sql.Tx) error {
			*p = was
			var err error
			if fresh, err = saveRepositories(ctx, tx, p, page); err != nil {
				return err
			}
			p.Figures.Repositories += fresh
			p.Next, p.Pauses = next, 0
			if next == "" {
				p.enter(phaseTags)
			}
			return p.save(ctx, tx.ExecContext)
		})
		if err != nil || next == "" {
			return err
		}
		way.found(fresh, len(page))
	}
}

// tags lists the tags of every repository and compares them.
func (s *Sweeper) tags(ctx context.Context, src *source, p *progress) error {
	for {
		r, err := s.nextRepository(ctx, p)
		if err != nil {
			return err
		}
		if r == nil {
			p.enter(phaseStatements)
			if src.sweep.NoStatements {
				p.enter(phaseDeleted)
			}
			return p.save(ctx, s.DB.ExecContext)
		}
		if !p.Inside {
			p.Repository, p.Inside, p.Next, p.Pages, p.Listed, p.Unread, p.Pauses = r.Name, true, "", 0, 0, 0, 0
		}
		if err := s.settle(ctx, src, p); err != nil {
			return err
		}
		err = s.repository(ctx, src, p, r)
		if err != nil && fact(err) {
			err = s.unlisted(ctx, p, err)
		}
		if err != nil {
			return err
		}
	}
}

// unlisted goes on without the repository that the sweep is in: nothing is said of it.
func (s *Sweeper) unlisted(ctx context.Context, p *progress, why error) error {
	reason := why.Error()
	s.Log.WarnContext(ctx, "tags could not be listed, nothing is said of the repository",
		slog.String("source", p.source), slog.String("repository", p.Repository), slog.Any("error", why))
	was := *p
	return s.DB.Tx(ctx, func(tx *sql.Tx) error {
		*p = was
		_, err := tx.ExecContext(ctx, `UPDATE sweeper_repositories SET failure = $1 WHERE source = $2 AND repository = $3`, reason, p.source, p.Repository)
		if err != nil {
			return fmt.Errorf("store failure: %w", err)
		}
		p.Figures.Unlisted++
		p.Inside, p.Pauses = false, 0
		return p.save(ctx, tx.ExecContext)
	})
}

// repository lists the tags of one repository from where the sweep is.
func (s *Sweeper) repository(ctx context.Context, src *source, p *progress, r *repositoryRow) error {
	way := newWalk(p.Next)
	for {
		var page []list.Tag
		var next string
		err := s.ask(ctx, src, func() (err error) {
			page, next, err = src.lister.Tags(ctx, r.Repository, p.Next)
			return err
		})
		if err != nil {
			return fmt.Errorf("list tags of %s: %w", r.Name, err)
		}
		if err := way.to(p, next); err != nil {
			return fmt.Errorf("list tags of %s: %w", r.Name, err)
		}
		page = slices.DeleteFunc(page, func(t list.Tag) bool {
			left, err := src.rules.Push(src.Registry, r.Name, t.Name)
			return left != "" || err != nil
		})
		before := p.Listed + p.Unread
		for tags := range slices.Chunk(page, chunk) {
			if err := s.compare(ctx, src, p, r, tags); err != nil {
				return err
			}
		}
		way.found(p.Listed+p.Unread-before, len(page))
		p.Next = next
		if next == "" {
			if p.Listed == 0 && p.Unread > 0 {
				return s.unlisted(ctx, p, errUnread)
			}
			p.Inside = false
		}
		err = s.DB.Tx(ctx, func(tx *sql.Tx) error {
			if next == "" {
				_, err := tx.ExecContext(ctx, `UPDATE sweeper_repositories SET listed = $1, tags = $2, failure = '' WHERE source = $3 AND repository = $4`,
					p.id, p.Listed, src.id, r.Name)
				if err != nil {
					return fmt.Errorf("store repository: %w", err)
				}
			}
			return p.save(ctx, tx.ExecContext)
		})
		if err != nil || next == "" {
			return err
		}
	}
}

// look is a tag as it was listed, with what the look before found.
type look struct {
	list.Tag
	old tagRow
}

// finding is what became of one tag.
type finding struct {
	row     tagRow
	changed bool // since the last complete sweep
	heard   bool
	event   *event.Event // to be sent now
}

// compare compares tags with what is known of them, sends what was missed and
// remembers what was seen. What is sent is sent before it is remembered, with
// ids that a repetition has too. Tags that this sweep has looked at are left
// out. What was looked at before a registry failed counts.
func (s *Sweeper) compare(ctx context.Context, src *source, p *progress, r *repositoryRow, tags []list.Tag) error {
	looks, unread, failed := s.resolve(ctx, src, p, r.Name, tags)
	if len(looks)+len(unread) == 0 {
		return failed
	}
	known, err := s.Catalog.Known(ctx, query(src, r.Name, looks))
	if err != nil {
		return err
	}
	findings := make([]finding, 0, len(looks))
	var send []event.Event
	for i, l := range looks {
		f, err := s.judge(ctx, src, p, l, known[i])
		if err != nil {
			return err
		}
		if f.event != nil && !p.DryRun {
			send = append(send, *f.event)
		}
		findings = append(findings, f)
	}
	if err := s.publish(ctx, src, contracts.CauseSweep, send); err != nil {
		return err
	}
	was := *p
	err = s.DB.Tx(ctx, func(tx *sql.Tx) error {
		*p = was
		for _, f := range findings {
			if err := f.row.save(ctx, tx.ExecContext, src.id); err != nil {
				return err
			}
			p.count(f)
		}
		for _, row := range unread {
			if err := row.save(ctx, tx.ExecContext, src.id); err != nil {
				return err
			}
			p.Unread++
			p.Figures.Unread++
		}
		return p.save(ctx, tx.ExecContext)
	})
	if err != nil {
		return err
	}
	for _, f := range findings {
		if f.changed && f.heard && !p.DryRun {
			s.metrics.pushes.WithLabelValues(src.id, "heard").Inc()
		}
	}
	src.pace.advance(p.Figures)
	return failed
}

// query asks what is known of tags.
func query(src *source, repository string, tags []look) catalog.KnownQuery {
	q := catalog.KnownQuery{Registry: src.Registry, Repository: repository}
	for _, t := range tags {
		q.Tags = append(q.Tags, catalog.Tagged{Tag: t.Name, Digest: t.Digest})
	}
	return q
}

// resolve reads what the look before found of tags, and asks (HEAD) where those
// point of which the listing does not say. Tags that are gone meanwhile are
// left out, and those that this sweep has looked at; what cannot be read is
// returned by itself. What was done before an error is returned with it.
func (s *Sweeper) resolve(ctx context.Context, src *source, p *progress, repository string, tags []list.Tag) (looks []look, unread []tagRow, err error) {
	for _, t := range tags {
		old, err := readTag(ctx, s.DB, src.id, repository, t.Name)
		if err != nil {
			return looks, unread, err
		}
		if old.looked == p.id {
			continue
		}
		if t.Digest == "" {
			err = s.head(ctx, src, repository, &t)
		}
		switch {
		case err == nil:
			p.Pauses = 0
			looks = append(looks, look{Tag: t, old: old})
		case errors.Is(err, registry.ErrNotFound):
		case ctx.Err() == nil && (fact(err) || errors.Is(err, registry.ErrUnavailable) && p.Pauses >= maxPauses && p.Pauses < maxPauses+maxUnread):
			if !fact(err) {
				p.Pauses++
			}
			s.Log.WarnContext(ctx, "a tag cannot be read, nothing is said of it", slog.String("source", p.source),
				slog.String("repository", repository), slog.String("tag", t.Name), slog.Any("error", err))
			old.looked, old.failure = p.id, err.Error()
			unread = append(unread, old)
		default:
			return looks, unread, err
		}
	}
	return looks, unread, nil
}

// head asks where a tag points.
func (s *Sweeper) head(ctx context.Context, src *source, repository string, t *list.Tag) error {
	err := s.ask(ctx, src, func() error {
		if err := src.wait(ctx); err != nil {
			return err
		}
		d, err := s.Registry.Resolve(ctx, registry.Ref{Registry: src.Registry, Repository: repository, Tag: t.Name})
		t.Digest, t.MediaType = d.Digest.String(), d.MediaType
		return err
	})
	if err == nil && !contracts.ValidDigest(t.Digest) {
		return fmt.Errorf("tag %s of %s: its digest is no sha256 digest: %w", t.Name, repository, registry.ErrInvalidName)
	}
	return err
}

// judge says what a tag as it was listed means.
func (s *Sweeper) judge(ctx context.Context, src *source, p *progress, t look, k catalog.KnownTag) (finding, error) {
	old := t.old
	moved := old.digest != t.Digest
	if old.due > 0 && moved && !p.DryRun {
		// It moved on before its webhook's time was over.
		if err := s.settleThese(ctx, src, p, []tagRow{old}); err != nil {
			return finding{}, err
		}
	}
	f := finding{row: old}
	f.row.looked, f.row.failure = p.id, ""
	// A webhook that came before the tag was last seen, or before the last complete
	// sweep began, is about an earlier push.
	since := time.Unix(0, max(old.seen, p.Baseline)).Add(-src.sweep.Grace)
	f.heard = !k.HeardAt.Before(since)
	// Nothing is said of the webhooks of what nobody looked at before, or could
	// not, nor of signatures, which many registries do not tell of.
	f.changed = moved && p.Baseline > 0 && old.failure == "" && hook.TagHint(t.Name) == ""
	waits := f.changed && !f.heard
	if !p.DryRun {
		f.row.seen = p.id
		if moved {
			f.row.digest, f.row.found, f.row.since, f.row.due = t.Digest, p.id, 0, 0
			if waits {
				f.row.since, f.row.due = since.UnixNano(), s.Now().Add(src.sweep.Grace).UnixNano()
			}
		}
		if f.row.due > 0 {
			return f, nil // it is decided when it is due
		}
	}
	if missed(k, s.Now()) {
		ev, err := pushed(src, t.old.repository, t.Tag, contracts.CauseSweep, p.id, s.Now())
		if err != nil {
			return finding{}, err
		}
		f.event = &ev
	}
	return f, nil
}

// missed says whether nothing would happen to a tag unless it is pushed now.
func missed(k catalog.KnownTag, now time.Time) bool {
	switch {
	case k.State == catalog.StateGone:
		return true
	case k.State != "" && (!catalog.IsEnd(k.State) || k.At == k.Digest):
		return false // it is on its way, and has deadlines; or it is where it belongs
	}
	return now.Sub(k.HeardAt) > underway
}

// count adds a finding to the figures.
func (p *progress) count(f finding) {
	p.Listed++
	p.Figures.Tags++
	if f.event != nil {
		p.Figures.Missed++
	}
	if !f.changed {
		return
	}
	p.Figures.Changed++
	switch {
	case f.heard:
		p.Figures.Heard++
	default:
		p.Figures.Pending++
	}
}

// settle decides about webhooks that have had their time: one that came was
// not lost, and what none came for is pushed unless it is known by now. While
// catalog has not read what came until then, that waits for a later turn.
// current is the sweep that is under way; nil: none is.
func (s *Sweeper) settle(ctx context.Context, src *source, current *progress) error {
	read := int64(0) // until when catalog is known to have read
	for {
		due, err := s.dueTags(ctx, src.id, s.Now(), chunk)
		if err != nil || len(due) == 0 {
			return err
		}
		last := slices.MaxFunc(due, func(a, b tagRow) int { return cmp.Compare(a.due, b.due) }).due
		if last > read {
			ok, err := s.Catalog.ReadUpTo(ctx, time.Unix(0, last))
			if err != nil {
				return err
			}
			if !ok {
				s.Log.DebugContext(ctx, "catalog lags, webhooks are decided about later", slog.String("source", src.id))
				return nil
			}
			read = last
		}
		// One repository and one sweep at a time.
		same := slices.IndexFunc(due, func(r tagRow) bool { return r.repository != due[0].repository || r.found != due[0].found })
		if same > 0 {
			due = due[:same]
		}
		if err := s.settleThese(ctx, src, current, due); err != nil {
			return err
		}
	}
}

func (s *Sweeper) settleThese(ctx context.Context, src *source, current *progress, due []tagRow) error {
	repository := due[0].repository
	p, err := s.foundBy(ctx, src, current, due[0].found)
	if err != nil {
		return err
	}
	tags := make([]look, len(due))
	for i, r := range due {
		tags[i] = look{Tag: list.Tag{Name: r.tag, Digest: r.digest}, old: r}
	}
	known, err := s.Catalog.Known(ctx, query(src, repository, tags))
	if err != nil {
		return err
	}
	var send []event.Event
	heard, lacks := make([]bool, len(due)), make([]bool, len(due))
	for i, k := range known {
		heard[i], lacks[i] = !k.HeardAt.Before(time.Unix(0, due[i].since)), missed(k, s.Now())
		if !lacks[i] {
			continue
		}
		ev, err := pushed(src, repository, tags[i].Tag, contracts.CauseSweep, p.id, s.Now())
		if err != nil {
			return err
		}
		send = append(send, ev)
	}
	if err := s.publish(ctx, src, contracts.CauseSweep, send); err != nil {
		return err
	}
	was := *p
	err = s.DB.Tx(ctx, func(tx *sql.Tx) error {
		*p = was
		for i, r := range due {
			r.since, r.due = 0, 0
			if err := r.save(ctx, tx.ExecContext, src.id); err != nil {
				return err
			}
			p.Figures.Pending--
			if heard[i] {
				p.Figures.Heard++
			} else {
				p.Figures.Lost++
			}
			if lacks[i] {
				p.Figures.Missed++
			}
		}
		return p.save(ctx, tx.ExecContext)
	})
	if err != nil {
		return err
	}
	for _, told := range heard {
		webhook := "lost"
		if told {
			webhook = "heard"
		}
		s.metrics.pushes.WithLabelValues(src.id, webhook).Inc()
	}
	return nil
}

// foundBy returns the sweep that found something.
func (s *Sweeper) foundBy(ctx context.Context, src *source, current *progress, id int64) (*progress, error) {
	if current != nil && current.id == id {
		return current, nil
	}
	p, err := load(ctx, s.DB, src.id, id)
	if err == nil && p == nil { // forgotten
		p = &progress{source: src.id, id: id, state: contracts.SweepIncomplete}
	}
	return p, err
}

// pushed is the event about something that was missed. Its id is derived from
// the sweep that found it, so that a repetition sends the same.
func pushed(src *source, repository string, t list.Tag, cause string, sweep int64, now time.Time) (event.Event, error) {
	subject := src.Registry + "/" + repository
	if t.Name != "" {
		subject += ":" + t.Name
	}
	subject += "@" + t.Digest
	ev, err := bus.NewEvent(contracts.ImagePushedV1, subject, contracts.ImagePushed{
		Source: src.id, Registry: src.Registry, Repository: repository, Tag: t.Name, Digest: t.Digest, MediaType: t.MediaType,
		Cause: cause, Hint: hook.TagHint(t.Name), ReceivedAt: now.UTC(),
	})
	if err != nil {
		return ev, fmt.Errorf("event about %s: %w", subject, err)
	}
	mark(&ev, src, repository, cause, sweep, now)
	return ev, nil
}

// mark sets the attributes of an event that a sweep sends.
func mark(ev *event.Event, src *source, repository, cause string, sweep int64, now time.Time) {
	ev.SetID(contracts.OutputID(Name, src.id, fmt.Sprintf("%s %d", cause, sweep), ev.Type(), ev.Subject()))
	ev.SetTime(now.UTC())
	ev.SetExtension(contracts.ExtLane, contracts.LaneBulk)
	bus.Key(ev, src.Registry+"/"+repository)
}

func (s *Sweeper) publish(ctx context.Context, src *source, cause string, events []event.Event) error {
	if len(events) == 0 {
		return nil
	}
	if err := s.Bus.Publish(ctx, events...); err != nil {
		return fmt.Errorf("send what was missed: %w", err)
	}
	s.metrics.events.WithLabelValues(src.id, cause).Add(float64(len(events)))
	return nil
}
