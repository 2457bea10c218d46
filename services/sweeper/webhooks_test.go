package sweeper

import (
	"context"
	"slices"
	"testing"
	"time"

	"github.com/tidewaiter/tidewaiter/contracts"
)

// pushedTag says whether a sweep pushed a tag at a digest.
func (w *world) pushedTag(tag, digest string) bool {
	w.t.Helper()
	return slices.Contains(subjects(w.pushes(contracts.ImagePushedV1, contracts.CauseSweep)), host+"/team/app:"+tag+"@"+digest)
}

// A webhook of long ago tells nothing about a push of today: what is at its end
// and not where its tag is known to be is pushed.
func TestWebhooksOfEarlierPushes(t *testing.T) {
	a, b := digestOf("a"), digestOf("b")
	for name, before := range map[string]func(w *world){
		"rolled back": func(w *world) {
			w.webhookOf("team/app", "latest", a)
			w.webhookOf("team/app", "latest", b)
			w.observed("team/app", "latest", b)
			w.ended("team/app", a)
			w.ended("team/app", b)
		},
		"deleted and pushed again": func(w *world) {
			w.webhookOf("team/app", "latest", a)
			w.ended("team/app", a)
			w.observed("team/app", "latest", "")
		},
		"put on what was told of by its digest": func(w *world) {
			w.webhookOf("team/app", "", a)
			w.ended("team/app", a)
		},
		"in planner's dead letters": func(w *world) {
			w.webhookOf("team/app", "latest", a)
			w.tell(contracts.ImageFailedV1, "x", contracts.ImageFailed{Registry: host, Repository: "team/app", Tag: "latest", Digest: a, Stage: "planner"})
		},
		"told of by its tag, in planner's dead letters": func(w *world) {
			w.webhookOf("team/app", "latest", "")
			w.tell(contracts.ImageFailedV1, "x", contracts.ImageFailed{Registry: host, Repository: "team/app", Tag: "latest", Stage: "planner"})
		},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			w.hold("team/app")
			s := w.sweeper()
			before(w)
			w.tags["team/app"]["latest"] = a
			w.full(s, false)
			if w.pushedTag("latest", a) {
				t.Error("it was pushed while its webhook was under way")
			}
			w.pass(underway)
			if p := w.full(s, false); !w.pushedTag("latest", a) || p.Figures.Missed != 1 {
				t.Errorf("it was not pushed: %+v", p.Figures)
			}
		})
	}
}

// The same in the figure: a rollback whose webhook was lost is a lost one, for
// all that the digest was told of before.
func TestRollbackIsCountedAsLost(t *testing.T) {
	a, b := digestOf("a"), digestOf("b")
	for name, told := range map[string]func(w *world, digest string){
		"by tag and digest": func(w *world, digest string) { w.webhookOf("team/app", "latest", digest) },
		"by digest":         func(w *world, digest string) { w.webhookOf("team/app", "", digest) },
		"by tag":            func(w *world, _ string) { w.webhookOf("team/app", "latest", "") },
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			w.hold("team/app")
			s := w.sweeper()
			for _, at := range []string{a, b} {
				w.pass(time.Hour)
				told(w, at)
				w.observed("team/app", "latest", at)
				w.ended("team/app", at)
				w.tags["team/app"]["latest"] = at
				w.pass(2 * w.sweep.Grace)
				p := w.full(s, false)
				if at == b && p.Figures.Heard != 1 {
					t.Errorf("told of %s: %+v", at, p.Figures)
				}
			}
			w.pass(2 * time.Hour)
			w.tags["team/app"]["latest"] = a
			w.full(s, false)
			w.pass(2 * time.Minute)
			w.turn(s)
			if f := w.last(s).Figures; f.Changed != 1 || f.Lost != 1 || f.Heard != 0 {
				t.Errorf("rolled back: %+v", f)
			}
			if !w.pushedTag("latest", a) {
				t.Error("it was not pushed")
			}
		})
	}
}

// A webhook about a tag that was gone before the first sweep is not about the
// push that the second finds.
func TestWebhooksBeforeTheFirstSweep(t *testing.T) {
	w := newWorld(t)
	s := w.sweeper()
	w.hold("team/app")
	w.webhookOf("team/app", "1", "")
	w.pass(2 * w.sweep.Grace)
	w.full(s, false)
	w.hold("team/app", "1")
	if p := w.full(s, false); p.Figures.Changed != 1 || p.Figures.Pending != 1 {
		t.Errorf("%+v", p.Figures)
	}
}

// lagging is a catalog that has not read what came after a moment.
type lagging struct {
	Catalog
	read time.Time
}

func (l *lagging) ReadUpTo(_ context.Context, until time.Time) (bool, error) {
	return !until.After(l.read), nil
}

// A webhook that came and that catalog has not read yet is not lost.
func TestCatalogLags(t *testing.T) {
	w := newWorld(t)
	s := w.sweeper()
	w.hold("team/app", "old")
	w.full(s, false)
	w.pass(time.Hour)
	behind := &lagging{Catalog: w.api, read: w.now()}
	s.Catalog = behind
	w.hold("team/app", "told", "untold")
	w.full(s, false)
	for range 3 {
		w.pass(10 * time.Minute)
		w.turn(s)
		if f := w.last(s).Figures; f.Pending != 2 || f.Lost != 0 || len(w.pushes(contracts.ImagePushedV1, contracts.CauseSweep)) != 1 {
			t.Fatalf("while catalog lags: %+v", f)
		}
	}
	w.webhook("team/app", "told") // it comes to it now
	behind.read = w.now()
	w.turn(s)
	if f := w.last(s).Figures; f.Pending != 0 || f.Heard != 1 || f.Lost != 1 || !w.pushedTag("untold", digestOf("team/app:untold")) {
		t.Errorf("after it has read: %+v", f)
	}
}

// Where one repository can never be listed no sweep is complete any more. That
// a tag was seen bounds what webhooks are about all the same, and what every
// one of these sweeps found is in the figure of the next that is complete.
func TestFiguresOfIncompleteSweeps(t *testing.T) {
	w := newWorld(t)
	s := w.sweeper()
	w.hold("team/app", "tag-only", "other")
	w.hold("team/closed", "1")
	w.full(s, false)
	w.fault = refuses("team/closed")
	w.pass(time.Hour)
	w.webhookOf("team/app", "tag-only", "")
	w.tags["team/app"]["tag-only"] = digestOf("second")
	w.pass(2 * w.sweep.Grace)
	if p := w.full(s, false); p.State != contracts.SweepIncomplete || p.Figures.Heard != 1 {
		t.Errorf("the push that was told of: %s, %+v", p.State, p.Figures)
	}
	w.pass(time.Hour)
	w.tags["team/app"]["tag-only"] = digestOf("third")
	w.full(s, false)
	w.pass(2 * time.Minute)
	w.turn(s)
	want := contracts.SweepFigures{Changed: 2, Heard: 1, Lost: 1}
	if f := w.last(s).Figures; f.Changed != want.Changed || f.Heard != want.Heard || f.Lost != want.Lost {
		t.Errorf("the push that nobody told of: %+v", f)
	}
	w.fault = nil
	w.pass(time.Hour)
	w.webhookOf("team/app", "other", digestOf("other2"))
	w.tags["team/app"]["other"] = digestOf("other2")
	p := w.full(s, false)
	if f := p.Figures; p.State != contracts.SweepComplete || f.Changed != 3 || f.Heard != 2 || f.Lost != 1 || f.ShareLost == nil || *f.ShareLost != 1./3 {
		t.Errorf("the complete sweep: %s, %+v", p.State, f)
	}
	if p := w.full(s, false); p.Figures.Changed != 0 {
		t.Errorf("the one after it: %+v", p.Figures)
	}
}

// A source whose settings list something else begins anew: what was listed
// before is neither gone nor lost.
func TestSomethingElseIsListed(t *testing.T) {
	w := newWorld(t)
	w.sweep.Within = []string{"team/a", "team/b"}
	for _, r := range []string{"team/a", "team/b", "team/c"} {
		w.hold(r, "1")
		w.known(r, "1")
	}
	w.full(w.sweeper(), false)
	w.full(w.sweeper(), false)
	for _, within := range [][]string{{"team/a"}, {"team/a", "team/c"}} {
		w.sweep.Within = within
		s := w.sweeper()
		w.pass(time.Hour)
		if p := w.full(s, false); p.State != contracts.SweepComplete || p.Figures.Deleted != 0 || p.Figures.Changed != 0 {
			t.Errorf("%v: %+v", within, p)
		}
	}
	// from then on it counts as ever
	s := w.sweeper()
	w.hold("team/c", "2")
	delete(w.tags["team/a"], "1")
	if p := w.full(s, false); p.Figures.Deleted != 1 || p.Figures.Changed != 1 {
		t.Errorf("%+v", p.Figures)
	}
	// one that is under way is given up
	w.cfg.Attempts = 1
	s = w.sweeper()
	w.fault = breaks("team/c")
	w.pass(time.Second)
	if _, err := s.Request(t.Context(), "main", true); err != nil {
		t.Fatal(err)
	}
	if err := s.Turn(t.Context(), "main"); err == nil {
		t.Fatal("nothing is under way")
	}
	given := w.last(s)
	w.sweep.Within = []string{"team/b"}
	s = w.sweeper()
	w.pass(time.Hour)
	w.turn(s)
	if p := w.last(s); p.State != contracts.SweepComplete || !p.DryRun || !p.StartedAt.After(given.StartedAt) || p.Figures.Tags != 1 {
		t.Errorf("%+v", p)
	}
	if p, err := load(t.Context(), w.db, "main", given.StartedAt.UnixNano()); err != nil || p.state != contracts.SweepFailed {
		t.Errorf("the one that was under way: %+v, %v", p, err)
	}
}

// What is pushed while a sweep runs, after its repository's turn, is not gone.
func TestPushedWhileASweepRuns(t *testing.T) {
	w := newWorld(t)
	s := w.sweeper()
	w.hold("team/app", "old", "gone")
	w.known("team/app", "old")
	w.known("team/app", "gone")
	w.full(s, false)
	delete(w.tags["team/app"], "gone")
	w.hold("team/zoo", "1")
	w.fault = func(repository, _ string) error {
		if repository == "team/zoo" { // team/app has had its turn
			w.mu.Unlock()
			w.pass(time.Second)
			w.known("team/app", "new")
			w.mu.Lock()
		}
		return nil
	}
	p := w.full(s, false)
	if got := subjects(w.pushes(contracts.ImageDeletedV1, "")); p.Figures.Deleted != 1 || !slices.Equal(got, named("team/app", "gone")) {
		t.Errorf("%d are gone, %v", p.Figures.Deleted, got)
	}
}
