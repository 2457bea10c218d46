package sweeper

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"testing"
	"time"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/registry"
	"github.com/tidewaiter/tidewaiter/services/catalog"
)

// refuses is a registry that does not list a repository; breaks one that cannot.
func refuses(repository string) func(string, string) error {
	return onlyFor(repository, &registry.Error{Kind: registry.ErrUnauthorized, Status: http.StatusForbidden})
}

func breaks(repository string) func(string, string) error {
	return onlyFor(repository, &registry.Error{Kind: registry.ErrUnavailable, Status: http.StatusBadGateway})
}

func onlyFor(repository string, err error) func(string, string) error {
	return func(of, _ string) error {
		if of == repository {
			return err
		}
		return nil
	}
}

// turns lets a sweeper go on after each pause until its sweep is finished.
func (w *world) turns(s *Sweeper, limit int) (last contracts.Sweep, pauses int) {
	w.t.Helper()
	for range limit {
		err := s.Turn(w.t.Context(), "main")
		if last = w.last(s); last.State != contracts.SweepRunning {
			return last, pauses
		}
		if err == nil {
			w.t.Fatalf("it is not finished, and does not say why: %+v", last)
		}
		pauses++
		w.pass(2 * w.cfg.Pause)
	}
	w.t.Fatalf("not finished after %d turns: %+v", limit, last)
	return last, pauses
}

// Images whose referrers the registry cannot serve, or not make sense of, are
// passed over, and what was found before them is sent.
func TestReferrersThatCannotBeServed(t *testing.T) {
	w := newWorld(t)
	w.cfg.Attempts = 1
	s := w.sweeper()
	standing := &pagedStandings{Catalog: w.api}
	s.Catalog = standing
	digests := make([]string, 6)
	for i := range digests {
		digests[i] = fmt.Sprintf("sha256:%064x", i)
		standing.images = append(standing.images, catalog.Standing{Repository: "team/app", Digest: digests[i], State: catalog.StateAttested, Statements: []string{}})
	}
	broken := map[string]error{
		digests[1]: registry.ErrUnavailable, digests[2]: registry.ErrUnavailable,
		digests[4]: registry.ErrDigestMismatch, digests[5]: registry.ErrUnknownManifest,
	}
	w.noRefs = func(digest string) error {
		if kind := broken[digest]; kind != nil {
			return &registry.Error{Kind: kind, Status: http.StatusBadGateway}
		}
		return nil
	}
	w.hold("team/app", "1")
	if err := s.Turn(t.Context(), "main"); !errors.Is(err, registry.ErrUnavailable) {
		t.Fatal(err)
	}
	if got := subjects(w.pushes(contracts.ImagePushedV1, contracts.CauseStatement)); !slices.Equal(got, []string{host + "/team/app@" + digests[0]}) {
		t.Errorf("sent before the pause: %v", got)
	}
	w.pass(2 * w.cfg.Pause)
	p, pauses := w.turns(s, 20)
	if p.State != contracts.SweepComplete || p.Figures.Checked != 6 || p.Figures.Unstated != 2 || p.Figures.Unasked != 4 {
		t.Errorf("%+v", p)
	}
	if pauses >= 2*maxPauses {
		t.Errorf("it paused %d times: once it has passed one over, the next is not waited for as long", pauses)
	}
	want := []string{host + "/team/app@" + digests[0], host + "/team/app@" + digests[3]}
	pushes := w.pushes(contracts.ImagePushedV1, contracts.CauseStatement)
	if got := subjects(pushes); !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
	for push, n := range pushes {
		if n != 1 {
			t.Errorf("%s was sent %d times", push, n)
		}
	}
}

// pagedStandings goes on after a position, as catalog does.
type pagedStandings struct {
	Catalog
	images []catalog.Standing
	away   bool
}

func (s *pagedStandings) Standings(_ context.Context, _, after string, limit int) ([]catalog.Standing, string, int, error) {
	if s.away {
		return nil, "", 0, errCatalog
	}
	left := slices.DeleteFunc(slices.Clone(s.images), func(i catalog.Standing) bool { return i.Position() <= after })
	if len(left) <= limit {
		return left, "", len(s.images), nil
	}
	return left[:limit], left[limit-1].Position(), len(s.images), nil
}

// A tag that the registry does not say the digest of is left out, and named; it
// is not gone, and its repository is listed without it.
func TestTagsThatCannotBeRead(t *testing.T) {
	for kind, waits := range map[error]bool{
		registry.ErrRefused: false, registry.ErrUnauthorized: false, registry.ErrUnknownManifest: false,
		registry.ErrDigestMismatch: false, registry.ErrUnavailable: true,
	} {
		t.Run(kind.Error(), func(t *testing.T) {
			w := newWorld(t)
			w.cfg.Attempts = 1
			w.sweep.NoStatements = true
			s := w.sweeper()
			tags := numbers(350) // of one page: more than are compared at once
			bad := tags[200:203]
			w.hold("team/app", tags...)
			for _, tag := range tags[:300] {
				w.known("team/app", tag)
			}
			w.full(s, false)
			w.noHead = func(_, tag string) error {
				if slices.Contains(bad, tag) {
					return &registry.Error{What: "resolve " + tag, Kind: kind, Status: http.StatusInternalServerError}
				}
				return nil
			}
			w.pass(2 * time.Hour)
			before := w.heads
			p, pauses := w.turns(s, 10)
			if p.State != contracts.SweepComplete || p.Figures.Tags != 347 || p.Figures.Unread != 3 || p.Figures.Deleted != 0 || p.Figures.Unlisted != 0 {
				t.Errorf("%+v", p)
			}
			want := contracts.Unlisted{Repository: "team/app", Tag: bad[0]}
			if len(p.Unlisted) != 3 || p.Unlisted[0].Repository != want.Repository || p.Unlisted[0].Tag != want.Tag || p.Unlisted[0].Reason == "" {
				t.Errorf("named: %+v", p.Unlisted)
			}
			if waits != (pauses == maxPauses) || !waits && pauses != 0 {
				t.Errorf("it paused %d times", pauses)
			}
			if asked := w.heads - before; asked != len(tags)+pauses {
				t.Errorf("%d HEADs of %d tags in %d turns: what was looked at is asked for again", asked, len(tags), pauses+1)
			}
			// when it can be read again nobody knows when it was pushed
			w.noHead = nil
			w.tags["team/app"][bad[0]] = digestOf("moved")
			if p := w.full(s, false); p.Figures.Tags != 350 || p.Figures.Unread != 0 || p.Figures.Changed != 0 || len(p.Unlisted) != 0 || !w.pushedTag(bad[0], digestOf("moved")) {
				t.Errorf("when it can be read: %+v", p)
			}
		})
	}
}

// Where nothing of a repository can be read, or too much in a row, it counts as not listed.
func TestRepositoriesThatCannotBeRead(t *testing.T) {
	for kind, figures := range map[error]contracts.SweepFigures{
		registry.ErrUnauthorized: {Unread: 30, Unlisted: 1, Tags: 1},
		registry.ErrUnavailable:  {Unread: maxUnread, Unlisted: 1, Tags: 1},
	} {
		t.Run(kind.Error(), func(t *testing.T) {
			w := newWorld(t)
			w.cfg.Attempts = 1
			s := w.sweeper()
			w.hold("team/closed", numbers(30)...)
			w.hold("team/open", "1")
			w.noHead = func(repository, _ string) error {
				if repository == "team/closed" {
					return &registry.Error{Kind: kind, Status: http.StatusForbidden}
				}
				return nil
			}
			p, _ := w.turns(s, 10)
			f := p.Figures
			if p.State != contracts.SweepIncomplete || f.Unread != figures.Unread || f.Unlisted != figures.Unlisted || f.Tags != figures.Tags || f.Missed != 1 {
				t.Errorf("%s, %+v", p.State, f)
			}
		})
	}
}

// That catalog cannot be asked is no pause of the registry's.
func TestOutagesOfCatalogAreNotTheRegistrys(t *testing.T) {
	w := newWorld(t)
	w.cfg.Attempts = 1
	s := w.sweeper()
	standing := &pagedStandings{Catalog: w.api, away: true}
	standing.images = []catalog.Standing{{Repository: "team/app", Digest: digestOf("a"), State: catalog.StateAttested, Statements: []string{}}}
	s.Catalog = standing
	for range maxPauses + 2 {
		if err := s.Turn(t.Context(), "main"); !errors.Is(err, errCatalog) {
			t.Fatal(err)
		}
		w.pass(time.Hour)
	}
	standing.away = false
	w.noRefs = func(string) error { return &registry.Error{Kind: registry.ErrUnavailable} }
	if err := s.Turn(t.Context(), "main"); !errors.Is(err, registry.ErrUnavailable) {
		t.Errorf("it was passed over at the first failure: %v, %+v", err, w.last(s).Figures)
	}
}

// A pause lasts as long as it was to, also while somebody waits for another
// sweep; what they wait for is not forgotten, and each kind has its turn.
func TestRequestsWhileASweepPauses(t *testing.T) {
	w := newWorld(t)
	w.cfg.Attempts = 1
	s := w.sweeper()
	w.hold("team/app", "1")
	asked := 0
	w.fault = func(repository, _ string) error {
		if repository == "team/app" {
			asked++
			return &registry.Error{Kind: registry.ErrThrottled, Status: http.StatusTooManyRequests, After: 30 * time.Minute}
		}
		return nil
	}
	if err := s.Turn(t.Context(), "main"); !errors.Is(err, registry.ErrThrottled) {
		t.Fatal(err)
	}
	dry, err := s.Request(t.Context(), "main", true)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Turn(t.Context(), "main"); !errors.Is(err, registry.ErrThrottled) { // whoever asks may look once
		t.Fatal(err)
	}
	for range 5 {
		w.pass(time.Minute)
		w.turn(s)
	}
	if asked != 2 {
		t.Errorf("the registry was asked %d times within its Retry-After, want 2", asked)
	}
	joined, err := s.Request(t.Context(), "main", false) // the one that is under way
	if err != nil {
		t.Fatal(err)
	}
	w.fault = nil
	w.turn(s) // ends the first
	after, err := s.Request(t.Context(), "main", false)
	if err != nil {
		t.Fatal(err)
	}
	w.turn(s) // the dry run
	w.turn(s) // the real one
	for name, c := range map[string]struct {
		after  time.Time
		dryRun bool
	}{"joined": {joined, false}, "dry run": {dry, true}, "real": {after, false}} {
		p, err := s.Asked(t.Context(), "main", c.dryRun, c.after)
		if err != nil || p == nil || p.State != contracts.SweepComplete || p.DryRun != c.dryRun || !p.StartedAt.After(c.after) {
			t.Errorf("%s: %+v, %v", name, p, err)
		}
	}
	if p, err := s.Asked(t.Context(), "main", true, w.now().Add(time.Hour)); err != nil || p != nil {
		t.Errorf("a sweep that nobody began: %+v, %v", p, err)
	}
}

// A dry run, also one that pauses, leaves alone when the next sweep is due.
func TestDryRunsMoveNoSweep(t *testing.T) {
	w := newWorld(t)
	w.cfg.Attempts = 1
	s := w.sweeper()
	w.hold("team/app", "1")
	w.full(s, false)
	due, err := readSchedule(t.Context(), w.db, "main")
	if err != nil {
		t.Fatal(err)
	}
	w.fault = breaks("team/app")
	w.pass(time.Second)
	if _, err := s.Request(t.Context(), "main", true); err != nil {
		t.Fatal(err)
	}
	if err := s.Turn(t.Context(), "main"); !errors.Is(err, registry.ErrUnavailable) {
		t.Fatal(err)
	}
	w.fault = nil
	w.pass(2 * w.cfg.Pause)
	w.turn(s)
	if p := w.last(s); !p.DryRun || p.State != contracts.SweepComplete {
		t.Errorf("%+v", p)
	}
	if now, err := readSchedule(t.Context(), w.db, "main"); err != nil || now.nextAt != due.nextAt {
		t.Errorf("the next sweep was due at %d, now at %d, %v", due.nextAt, now.nextAt, err)
	}
}

// A sweep that was asked for and killed goes on at once.
func TestKilledSweepGoesOnAtOnce(t *testing.T) {
	w := newWorld(t)
	s := w.sweeper()
	w.full(s, false)
	w.hold("team/app", "1")
	w.pass(time.Second)
	if _, err := s.Request(t.Context(), "main", false); err != nil {
		t.Fatal(err)
	}
	ctx, kill := context.WithCancel(t.Context())
	w.fault = func(string, string) error { kill(); return ctx.Err() }
	if err := s.Turn(ctx, "main"); err == nil {
		t.Fatal("it was not killed")
	}
	w.fault = nil
	w.turn(w.sweeper())
	if p := w.last(s); p.State != contracts.SweepComplete || p.Figures.Changed != 1 {
		t.Errorf("%+v", p)
	}
}
