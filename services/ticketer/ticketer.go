// Package ticketer follows the findings with tickets: one ticket a problem,
// opened, kept up to date and closed.
//
// The row of a problem is written before the tracker is asked for anything, and
// the ticket's body carries a hidden marker, so that a crash between the two is
// mended by listing. At most one double comes of a crash, and only where the
// tracker carries out a request long after it was sent; it is looked for and
// closed.
//
// A ticket that a human closed stays closed until the problem gets worse: its
// severity rises, it becomes known to be exploited, or it comes back after it
// was gone.
package ticketer

import (
	"context"
	"crypto/rand"
	"embed"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/maphash"
	"log/slog"
	"regexp"
	"strings"
	"sync"
	"time"

	"github.com/cloudevents/sdk-go/v2/event"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/bus"
	"github.com/tidewaiter/tidewaiter/libs/store"
	"github.com/tidewaiter/tidewaiter/services/ticketer/tracker"
)

// Name is the service's name.
const Name = "ticketer"

//go:embed migrations
var migrations embed.FS

const (
	// recheckAfter is when a ticket whose creation was uncertain is looked at
	// for doubles.
	recheckAfter = 10 * time.Minute
	// clockSkew is how far the tracker's clock may be behind ours.
	clockSkew = time.Hour
	// minBackoff and maxBackoff bound the wait after a tracker's failure.
	minBackoff = 15 * time.Second
	maxBackoff = 15 * time.Minute
	// recheckBatch is how many tickets one round of Recheck looks at.
	recheckBatch = 20
)

// Reasons to wait, and what cannot be worked with.
var (
	errPaced     = errors.New("the tracker's tickets of this minute are used up")
	errUnsettled = errors.New("a creation whose outcome is unknown may still happen")
	errBlocked   = errors.New("the tracker asked for a pause")
	errNoTracker = errors.New("the ticket's tracker is not configured any more")
	errBadEvent  = errors.New("finding event cannot be used")
)

// Deliverer takes finding events as they are.
type Deliverer interface {
	Deliver(ctx context.Context, ev event.Event) error
}

// Deps are what a Service works with.
type Deps struct {
	DB       *store.DB // migrated (Migrate)
	Trackers map[string]tracker.Tracker
	Webhooks map[string]Deliverer
	Log      *slog.Logger
	Now      func() time.Time // nil: the present
}

// Service handles the finding events.
type Service struct {
	Deps
	cfg  Config
	seed maphash.Seed
	keys [64]sync.Mutex // by hash of the problem key: a deferred event may meet a newer one

	mu      sync.Mutex
	blocked map[string]time.Time // trackers that asked for a pause
}

// New returns a Service.
func New(cfg Config, d Deps) *Service {
	if d.Now == nil {
		d.Now = time.Now
	}
	return &Service{Deps: d, cfg: cfg, seed: maphash.MakeSeed(), blocked: map[string]time.Time{}}
}

// Migrate creates and updates the service's tables.
func Migrate(ctx context.Context, db *store.DB) error { return db.Migrate(ctx, Name, migrations) }

var problemKey = regexp.MustCompile(`^[0-9a-f]{16,128}$`)

// Handle follows one finding event. It is a bus.Handler and emits nothing.
// Events with a revision not above the last one seen are ignored.
func (s *Service) Handle(ctx context.Context, in event.Event) ([]event.Event, error) {
	p, err := bus.Decode[contracts.Problem](in)
	if err != nil {
		return nil, err
	}
	if !problemKey.MatchString(p.Key) || p.Revision <= 0 || p.State != string(stateOpen) && p.State != string(stateClosed) {
		return nil, bus.Permanent(fmt.Errorf("problem %q, revision %d, state %q: %w", p.Key, p.Revision, p.State, errBadEvent))
	}
	defer s.lock(p.Key)()
	r, err := load(ctx, s.DB, p.Key)
	if err != nil {
		return nil, dbError(err)
	}
	if p.Revision <= r.Revision {
		return nil, nil
	}
	if r.State == stateNone {
		return nil, s.first(ctx, in, p, r)
	}
	if hook := s.Webhooks[r.Tracker]; hook != nil {
		return nil, s.deliver(ctx, hook, in, p, r)
	}
	t := s.Trackers[r.Tracker]
	if t == nil {
		return nil, bus.Permanent(fmt.Errorf("tracker %q, ticket %s#%s: %w", r.Tracker, r.Project, r.Ticket, errNoTracker))
	}
	if r.State == stateClaimed || r.State == stateCreating {
		return nil, s.create(ctx, t, p, r)
	}
	return nil, s.update(ctx, t, p, r)
}

// lock keeps others from the same problem until the returned function is called.
func (s *Service) lock(key string) (unlock func()) {
	m := &s.keys[maphash.String(s.seed, key)%uint64(len(s.keys))]
	m.Lock()
	return m.Unlock
}

// first handles a problem that has no ticket.
func (s *Service) first(ctx context.Context, in event.Event, p contracts.Problem, r *record) error {
	rule, wanted := s.cfg.route(p)
	if p.State == string(stateClosed) || !wanted {
		r.Revision = p.Revision
		return s.put(ctx, r)
	}
	if t := s.Trackers[r.Tracker]; t != nil && !r.RecheckAt.IsZero() {
		r.State = stateCreating // what was asked for before the problem was closed may still turn up
		return s.create(ctx, t, p, r)
	}
	r.State, r.Tracker, r.Project, r.Ticket = stateClaimed, rule.Tracker, strings.Trim(rule.Project, "/"), ""
	return s.renew(ctx, in, p, r)
}

// renew claims a new ticket for r and makes it.
func (s *Service) renew(ctx context.Context, in event.Event, p contracts.Problem, r *record) error {
	nonce := make([]byte, 12)
	if _, err := rand.Read(nonce); err != nil {
		return fmt.Errorf("claim a ticket: %w", err)
	}
	r.State, r.Ticket, r.AttemptAt = stateClaimed, "", time.Time{}
	r.body = body{Claim: hex.EncodeToString(nonce), ClaimedAt: s.Now().UTC()}
	if err := s.claim(ctx, r); err != nil {
		return err
	}
	if hook := s.Webhooks[r.Tracker]; hook != nil {
		return s.deliver(ctx, hook, in, p, r)
	}
	return s.create(ctx, s.Trackers[r.Tracker], p, r)
}

// deliver passes an event on to a webhook. That it may be delivered twice is
// the receiver's to see, by its id.
func (s *Service) deliver(ctx context.Context, hook Deliverer, in event.Event, p contracts.Problem, r *record) error {
	if r.State == stateClaimed {
		if p.State == string(stateClosed) {
			return s.forget(ctx, p, r) // it was never told of
		}
		if err := s.wait(r.start(), errPaced); err != nil {
			return err
		}
	}
	if err := s.wait(s.pause(r.Tracker), errBlocked); err != nil {
		return err
	}
	if err := hook.Deliver(ctx, in); err != nil {
		return s.trouble(ctx, r.Tracker, err)
	}
	r.Revision, r.State = p.Revision, state(p.State)
	s.Log.InfoContext(ctx, "problem delivered", slog.String("problem", p.Key), slog.String("tracker", r.Tracker), slog.String("state", p.State))
	return s.put(ctx, r)
}

// forget notes that a problem was closed before it had a ticket.
func (s *Service) forget(ctx context.Context, p contracts.Problem, r *record) error {
	r.State, r.Revision, r.Ticket = stateNone, p.Revision, ""
	return s.put(ctx, r)
}

// create makes the ticket that r claims, or finds the one that an earlier
// attempt made.
func (s *Service) create(ctx context.Context, t tracker.Tracker, p contracts.Problem, r *record) error {
	uncertain := r.State == stateCreating
	if !uncertain && p.State == string(stateClosed) {
		return s.forget(ctx, p, r)
	}
	if err := s.wait(s.pause(r.Tracker), errBlocked); err != nil {
		return err
	}
	if uncertain {
		if err := s.wait(r.AttemptAt.Add(s.cfg.Settle), errUnsettled); err != nil {
			return err
		}
		found, err := s.adopt(ctx, t, r)
		if err != nil {
			return s.trouble(ctx, r.Tracker, err)
		}
		r.RecheckAt = s.Now().Add(recheckAfter)
		if found {
			r.State = stateOpen
			if err := s.put(ctx, r); err != nil {
				return err
			}
			return s.update(ctx, t, p, r)
		}
		if p.State == string(stateClosed) {
			return s.forget(ctx, p, r)
		}
	}
	if err := s.wait(r.start(), errPaced); err != nil {
		return err
	}
	rule, _ := s.cfg.route(p) // the labels of the rule that fits now; the tracker is the one claimed
	draft := tracker.Draft{
		Title: title(p), Body: text(p, r.Claim) + "\n", Labels: labels(p, s.cfg.Label, rule), Assignees: rule.Assignees, Confidential: rule.Confidential,
	}
	r.State, r.AttemptAt = stateCreating, s.Now()
	r.Title, r.Labels, r.Severity, r.KEV = draft.Title, draft.Labels, p.Severity, p.KEV
	if err := s.put(ctx, r); err != nil {
		return err
	}
	made, err := t.Create(ctx, r.Project, draft)
	if err != nil {
		if !uncertain && refused(err) {
			r.State = stateClaimed
			if err := s.put(ctx, r); err != nil {
				return err
			}
		}
		return s.trouble(ctx, r.Tracker, err)
	}
	r.Ticket, r.URL, r.State, r.Revision = made.ID, made.URL, stateOpen, p.Revision
	s.Log.InfoContext(ctx, "ticket created", slog.String("problem", p.Key), slog.String("tracker", r.Tracker), slog.String("ticket", made.URL))
	return s.put(ctx, r)
}

// adopt looks for tickets that the claim of r made, takes the oldest and closes
// the others.
func (s *Service) adopt(ctx context.Context, t tracker.Tracker, r *record) (bool, error) {
	list, err := t.Find(ctx, r.Project, beginMarker(r.Key, r.Claim), r.ClaimedAt.Add(-clockSkew))
	if err != nil {
		return false, err
	}
	for _, found := range list {
		if r.Ticket == "" {
			r.Ticket, r.URL = found.ID, found.URL
			s.Log.InfoContext(ctx, "ticket found after an interruption", slog.String("problem", r.Key), slog.String("ticket", found.URL))
		}
		if found.ID == r.Ticket || !found.Open {
			continue
		}
		s.Log.WarnContext(ctx, "double closed", slog.String("problem", r.Key), slog.String("ticket", found.URL))
		if err := closeDouble(ctx, t, r, found); err != nil {
			return false, err
		}
	}
	return r.Ticket != "", nil
}

func closeDouble(ctx context.Context, t tracker.Tracker, r *record, double tracker.Ticket) error {
	text := "This is a double of #" + r.Ticket + ", made when the tracker did not answer in time."
	marker := commentMarker(r.Key, 0, text)
	done, err := t.Commented(ctx, r.Project, double.ID, marker, r.ClaimedAt.Add(-clockSkew))
	if err != nil {
		return err
	}
	if !done {
		if err := t.Comment(ctx, r.Project, double.ID, text+"\n\n"+marker); err != nil {
			return err
		}
	}
	open := false
	return t.Edit(ctx, r.Project, double.ID, tracker.Change{Open: &open})
}

// update brings an existing ticket to what the problem is now.
func (s *Service) update(ctx context.Context, t tracker.Tracker, p contracts.Problem, r *record) error {
	if err := s.wait(s.pause(r.Tracker), errBlocked); err != nil {
		return err
	}
	ticket, err := t.Get(ctx, r.Project, r.Ticket)
	if errors.Is(err, tracker.ErrGone) {
		return s.deleted(ctx, p, r)
	}
	if err != nil {
		return s.trouble(ctx, r.Tracker, err)
	}
	told := false
	if last := r.Pending; last != nil {
		if last.State == stateClosed && !ticket.Open {
			r.State = stateClosed // we closed it, and did not come to write that down
		}
		if last.Marker != "" {
			if told, err = t.Commented(ctx, r.Project, r.Ticket, last.Marker, last.Since.Add(-clockSkew)); err != nil {
				return s.trouble(ctx, r.Tracker, err)
			}
		}
		if told {
			r.Severity, r.KEV = last.Severity, last.KEV
			told = last.State == state(p.State)
		}
	}
	comment, change, visible := s.plan(p, r, ticket, told)
	if comment != "" || change != (tracker.Change{}) {
		if err := s.apply(ctx, t, p, r, told, comment, change); err != nil {
			return err
		}
	}
	r.Revision, r.State, r.Pending = p.Revision, state(p.State), nil
	if visible {
		r.Severity, r.KEV = p.Severity, p.KEV
		if now := title(p); change.Title != nil || ticket.Title == now {
			r.Title = now // also where an earlier attempt at this update set it
		}
		if p.State == string(stateOpen) {
			rule, _ := s.cfg.route(p)
			r.Labels = labels(p, s.cfg.Label, rule)
		}
	}
	s.Log.InfoContext(ctx, "ticket follows", slog.String("problem", p.Key), slog.Int64("revision", p.Revision),
		slog.String("ticket", r.URL), slog.String("state", p.State))
	return s.put(ctx, r)
}

// plan returns what to say and to change, and whether the ticket then shows
// what the problem is. told says that an earlier attempt said it already.
func (s *Service) plan(p contracts.Problem, r *record, ticket tracker.Ticket, told bool) (comment string, c tracker.Change, visible bool) {
	open := p.State == string(stateOpen)
	if ticket.Open != open {
		c.Open = &open
	}
	news := worse(r, p)
	switch {
	case !open && !ticket.Open:
		return "", c, false
	case !open:
		if !told {
			comment = "Done: no current image of " + code(p.Owner) + " has this problem any more."
		}
		return comment, c, false
	case ticket.Open, told:
		comment = strings.Join(news, " ")
	case r.State == stateClosed:
		comment = "The problem is back: " + strings.Join(append([]string{spread(p)}, news...), " ")
	case len(news) > 0:
		comment = "Opened again, since it got worse. " + strings.Join(news, " ")
	default:
		return "", tracker.Change{}, false // a human closed it
	}
	rule, _ := s.cfg.route(p)
	c.Labels = relabelled(ticket.Labels, r.Labels, labels(p, s.cfg.Label, rule))
	c.Body = rewritten(ticket.Body, r.Key, r.Claim, text(p, r.Claim))
	if now := title(p); ticket.Title == r.Title && now != r.Title {
		c.Title = &now
	}
	return comment, c, true
}

// spread says how many images have the problem.
func spread(p contracts.Problem) string {
	if n := max(p.ImageCount, len(p.Images)); n != 1 {
		return fmt.Sprintf("%d images have it.", n)
	}
	return "one image has it."
}

// apply notes what is to be written to the tracker, and writes it. told says
// that the comment of the update that is pending was made.
func (s *Service) apply(ctx context.Context, t tracker.Tracker, p contracts.Problem, r *record, told bool, comment string, c tracker.Change) error {
	next := &pending{Since: s.Now().UTC(), State: state(p.State), Severity: p.Severity, KEV: p.KEV}
	if told {
		next.Since, next.Marker = r.Pending.Since, r.Pending.Marker
	}
	r.Pending = next
	if comment != "" {
		r.Pending.Marker = commentMarker(p.Key, p.Revision, comment)
	}
	if err := s.put(ctx, r); err != nil {
		return err
	}
	if comment != "" {
		if err := t.Comment(ctx, r.Project, r.Ticket, comment+"\n\n"+r.Pending.Marker); err != nil {
			return s.trouble(ctx, r.Tracker, err)
		}
	}
	if c == (tracker.Change{}) {
		return nil
	}
	if err := t.Edit(ctx, r.Project, r.Ticket, c); err != nil {
		return s.trouble(ctx, r.Tracker, err)
	}
	return nil
}

// deleted handles a ticket that somebody deleted: as one that a human closed.
func (s *Service) deleted(ctx context.Context, p contracts.Problem, r *record) error {
	if p.State == string(stateClosed) {
		return s.forget(ctx, p, r)
	}
	if r.State == stateClosed || len(worse(r, p)) > 0 {
		return s.renew(ctx, event.Event{}, p, r)
	}
	r.Revision = p.Revision
	return s.put(ctx, r)
}

// Recheck looks at tickets whose creation was uncertain, some time later, and
// closes doubles. It returns how many it looked at; those that it could not
// look at come again later. Of several replicas one does it at a time.
func (s *Service) Recheck(ctx context.Context) (n int, err error) {
	_, alone := s.DB.Alone(ctx, Name+" recheck", func(ctx context.Context) error {
		n, err = s.recheckDue(ctx)
		return nil
	})
	if alone != nil {
		return 0, dbError(alone)
	}
	return n, err
}

func (s *Service) recheckDue(ctx context.Context) (int, error) {
	keys, err := s.due(ctx, recheckBatch)
	if err != nil {
		return 0, dbError(err)
	}
	var problems []error
	for _, key := range keys {
		if err := s.recheck(ctx, key); err != nil {
			problems = append(problems, fmt.Errorf("look for doubles of problem %s: %w", key, err))
		}
	}
	return len(keys), errors.Join(problems...)
}

func (s *Service) recheck(ctx context.Context, key string) error {
	defer s.lock(key)()
	r, err := load(ctx, s.DB, key)
	if err != nil {
		return dbError(err)
	}
	r.RecheckAt = time.Time{}
	if t := s.Trackers[r.Tracker]; t != nil && r.State != stateCreating {
		err = s.wait(s.pause(r.Tracker), errBlocked)
		if err == nil {
			err = s.closeOthers(ctx, t, r)
		}
		// What is refused for good would be refused again.
		if err != nil && (!refused(err) || errors.Is(err, tracker.ErrThrottled)) {
			r.RecheckAt = s.Now().Add(recheckAfter)
		}
	}
	return errors.Join(err, s.put(ctx, r))
}

// closeOthers closes what the claim of r made beside its ticket.
func (s *Service) closeOthers(ctx context.Context, t tracker.Tracker, r *record) error {
	if r.Ticket != "" {
		_, err := s.adopt(ctx, t, r)
		return err
	}
	// The problem was gone before it was known that there is a ticket.
	list, err := t.Find(ctx, r.Project, beginMarker(r.Key, r.Claim), r.ClaimedAt.Add(-clockSkew))
	if err != nil {
		return err
	}
	for _, found := range list {
		if !found.Open {
			continue
		}
		open := false
		if err := t.Edit(ctx, r.Project, found.ID, tracker.Change{Open: &open}); err != nil {
			return err
		}
	}
	return nil
}

// wait puts the event aside until a time, unless that has come.
func (s *Service) wait(until time.Time, why error) error {
	if s.Now().Before(until) {
		return bus.Later(why, until)
	}
	return nil
}

func (s *Service) pause(name string) time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.blocked[name]
}

// refused says whether a tracker's error means that nothing was done.
func refused(err error) bool {
	var e *tracker.Error
	return errors.As(err, &e) && !errors.Is(e.Kind, tracker.ErrUnavailable)
}

// trouble says what a tracker's error means for the event in hand: a pause and
// an outage put it aside, everything else is for a human to mend.
func (s *Service) trouble(ctx context.Context, name string, err error) error {
	err = fmt.Errorf("tracker %s: %w", name, err)
	var e *tracker.Error
	switch {
	case ctx.Err() != nil, !errors.As(err, &e):
		return err
	case errors.Is(e.Kind, tracker.ErrThrottled):
		s.mu.Lock()
		s.blocked[name] = e.RetryAt
		s.mu.Unlock()
		return bus.Later(err, e.RetryAt)
	case errors.Is(e.Kind, tracker.ErrUnavailable):
		wait := max(minBackoff, s.cfg.Settle) << min(max(bus.Attempt(ctx)-1, 0), 10)
		if wait <= 0 || wait > maxBackoff {
			wait = maxBackoff
		}
		at := s.Now().Add(wait)
		if e.RetryAt.After(at) {
			at = e.RetryAt
		}
		return bus.Later(err, at)
	default:
		return bus.Permanent(err)
	}
}
