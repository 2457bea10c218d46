package ticketer_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cloudevents/sdk-go/v2/event"
	"pgregory.net/rapid"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/bus"
	"github.com/tidewaiter/tidewaiter/libs/store"
	"github.com/tidewaiter/tidewaiter/libs/store/storetest"
	"github.com/tidewaiter/tidewaiter/services/ticketer"
	"github.com/tidewaiter/tidewaiter/services/ticketer/tracker"
	"github.com/tidewaiter/tidewaiter/services/ticketer/trackertest"
)

var start = time.Date(2026, 11, 23, 8, 0, 0, 0, time.UTC)

// errKilled is what a killed service panics with.
var errKilled = errors.New("killed")

// world is a ticketer with its database and one tracker.
type world struct {
	t      testing.TB
	mu     sync.Mutex
	now    time.Time
	db     *store.DB
	server *trackertest.Server
	cfg    ticketer.Config
	env    map[string]string
	calls  int          // to the tracker, so far
	kill   map[int]bool // before (2n) or after (2n+1) call n
	s      *ticketer.Service
}

var kinds = map[string]func(testing.TB, func() time.Time) *trackertest.Server{
	ticketer.KindGitHub: trackertest.GitHub, ticketer.KindGitLab: trackertest.GitLab,
}

// onBoth runs a test on GitHub and on GitLab.
func onBoth(t *testing.T, f func(t *testing.T, w *world)) {
	for kind := range kinds {
		t.Run(kind, func(t *testing.T) { f(t, newWorld(t, kind)) })
	}
}

func newWorld(t testing.TB, kind string) *world {
	t.Helper()
	w := &world{t: t, now: start, db: storetest.Open(t), kill: map[int]bool{}, env: map[string]string{"TOKEN": trackertest.Token}}
	if err := ticketer.Migrate(t.Context(), w.db); err != nil {
		t.Fatal(err)
	}
	w.server = kinds[kind](t, w.clock)
	w.cfg = ticketer.DefaultConfig()
	w.cfg.Trackers = []ticketer.Tracker{{Name: "main", Kind: kind, URL: w.server.URL, SecretEnv: "TOKEN", CreatePerMinute: 5}}
	w.cfg.Rules = []ticketer.Rule{{Repositories: []string{"r.example/team/"}, Tracker: "main", Project: trackertest.Project, Labels: []string{"security"}}}
	w.restart()
	return w
}

func (w *world) clock() time.Time {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.now
}

func (w *world) advance(d time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.now = w.now.Add(d)
}

// restart starts a new service on the same database.
func (w *world) restart() {
	w.t.Helper()
	if err := w.cfg.Validate(); err != nil {
		w.t.Fatal(err)
	}
	trackers, webhooks, err := w.cfg.Connect(func(name string) (string, bool) { v, ok := w.env[name]; return v, ok }, w.clock)
	if err != nil {
		w.t.Fatal(err)
	}
	for name, t := range trackers {
		trackers[name] = mortal{t, w}
	}
	w.s = ticketer.New(w.cfg, ticketer.Deps{DB: w.db, Trackers: trackers, Webhooks: webhooks, Log: slog.New(slog.DiscardHandler), Now: w.clock})
}

// mortal is a tracker whose user may die before and after each call: between
// them and the writes to the database there is nothing else that lasts.
type mortal struct {
	tracker.Tracker
	w *world
}

func (m mortal) point() func() {
	n := m.w.calls
	m.w.calls++
	if m.w.kill[2*n] {
		panic(errKilled)
	}
	return func() {
		if m.w.kill[2*n+1] {
			panic(errKilled)
		}
	}
}

func (m mortal) Find(ctx context.Context, project, marker string, since time.Time) ([]tracker.Ticket, error) {
	defer m.point()()
	return m.Tracker.Find(ctx, project, marker, since)
}

func (m mortal) Get(ctx context.Context, project, id string) (tracker.Ticket, error) {
	defer m.point()()
	return m.Tracker.Get(ctx, project, id)
}

func (m mortal) Create(ctx context.Context, project string, d tracker.Draft) (tracker.Ticket, error) {
	defer m.point()()
	return m.Tracker.Create(ctx, project, d)
}

func (m mortal) Edit(ctx context.Context, project, id string, c tracker.Change) error {
	defer m.point()()
	return m.Tracker.Edit(ctx, project, id, c)
}

func (m mortal) Comment(ctx context.Context, project, id, text string) error {
	defer m.point()()
	return m.Tracker.Comment(ctx, project, id, text)
}

func (m mortal) Commented(ctx context.Context, project, id, marker string, since time.Time) (bool, error) {
	defer m.point()()
	return m.Tracker.Commented(ctx, project, id, marker, since)
}

func problem(revision int64) contracts.Problem {
	return contracts.Problem{
		Key: "0123456789abcdef0123456789abcdef", Revision: revision, State: "open", Owner: "r.example/team/app",
		Package: "org.apache.logging.log4j:log4j-core", Ecosystem: "Maven", Group: "fixable",
		Versions: []string{"2.14.1"}, FixedIn: []string{"2.17.1"}, Severity: contracts.SeverityHigh,
		Vulnerabilities: []string{"CVE-2021-44228", "GHSA-jfh8-c2jp-5v3q"},
		Images:          []string{"r.example/team/app@sha256:" + strings.Repeat("a", 64)}, ImageCount: 1, OpenedAt: start, ChangedAt: start,
	}
}

func ev(t testing.TB, p contracts.Problem) event.Event {
	t.Helper()
	name := contracts.FindingChangedV1
	if p.Revision == 1 {
		name = contracts.FindingOpenedV1
	}
	if p.State == "closed" {
		name = contracts.FindingClosedV1
	}
	e, err := bus.NewEvent(name, p.Key, p)
	if err != nil {
		t.Fatal(err)
	}
	e.SetID(fmt.Sprintf("%s-%d", p.Key, p.Revision))
	e.SetSource("/services/catalog")
	return e
}

// try handles an event once; a kill restarts the service.
func (w *world) try(p contracts.Problem) (err error) {
	defer func() {
		switch r := recover(); r {
		case nil:
		case errKilled:
			w.restart()
			err = errKilled
		default:
			panic(r)
		}
	}()
	out, err := w.s.Handle(w.t.Context(), ev(w.t, p))
	if len(out) > 0 {
		w.t.Errorf("emitted %v", out)
	}
	return err
}

// recheck looks for doubles once; a kill restarts the service.
func (w *world) recheck() (err error) {
	defer func() {
		if r := recover(); r != nil {
			w.restart()
			err = errKilled
		}
	}()
	_, err = w.s.Recheck(w.t.Context())
	return err
}

// handle handles an event until it is done, as the bus would: again after a
// kill, and not before the time it asks for.
func (w *world) handle(p contracts.Problem) {
	w.t.Helper()
	for range 300 {
		err := w.try(p)
		outcome, at := bus.Classify(err)
		switch {
		case err == nil:
			return
		case errors.Is(err, errKilled):
		case outcome == bus.OutcomeLater:
			w.advance(max(at.Sub(w.clock()), time.Millisecond))
		default:
			w.t.Fatalf("revision %d: %v: %v", p.Revision, outcome, err)
		}
	}
	w.t.Fatalf("revision %d has no end", p.Revision)
}

// one returns the one issue that there must be.
func (w *world) one() trackertest.Issue {
	w.t.Helper()
	issues := w.server.Issues()
	if len(issues) != 1 {
		w.t.Fatalf("%d issues: %+v", len(issues), issues)
	}
	return issues[0]
}

func TestLife(t *testing.T) {
	onBoth(t, func(t *testing.T, w *world) {
		p := problem(1)
		w.handle(p)
		i := w.one()
		if i.Title != "Update org.apache.logging.log4j:log4j-core to 2.17.1 in r.example/team/app" || !i.Open {
			t.Errorf("got %+v", i)
		}
		if want := []string{"security", "severity:high", "tidewaiter"}; !slices.Equal(i.Labels, want) {
			t.Errorf("labels %q", i.Labels)
		}
		for _, want := range []string{"update `org.apache.logging.log4j:log4j-core` (`Maven`) to `2.17.1`", "[`CVE-2021-44228`](https://nvd.nist.gov/vuln/detail/CVE-2021-44228)", "`" + p.Images[0] + "`", p.Key} {
			if !strings.Contains(i.Body, want) {
				t.Errorf("%q is not in %s", want, i.Body)
			}
		}

		// Humans write into it, rename it, add a label.
		w.server.Change(func(is []*trackertest.Issue) {
			is[0].Body = strings.ReplaceAll(is[0].Body, "\n", "\r\n") + "\r\nAlice is on it."
			is[0].Title, is[0].Labels = "log4shell!", append(is[0].Labels, "sprint 7")
		})
		p.Revision, p.Severity, p.KEV = 2, contracts.SeverityCritical, true
		p.FixedIn = []string{"2.17.2"}
		w.handle(p)
		i = w.one()
		if i.Title != "log4shell!" || !strings.Contains(i.Body, "Alice is on it.") || !strings.Contains(i.Body, "Fixed in: `2.17.2`") || strings.Contains(i.Body, "2.17.1") {
			t.Errorf("got %+v", i)
		}
		if want := []string{"known-exploited", "security", "severity:critical", "sprint 7", "tidewaiter"}; !slices.Equal(i.Labels, want) {
			t.Errorf("labels %q", i.Labels)
		}
		if len(i.Comments) != 1 || !strings.Contains(i.Comments[0].Body, "known to be exploited. The severity rose from high to critical.") {
			t.Errorf("comments %q", i.Comments)
		}

		// Nothing that shows: nothing is written.
		w.server.Requests()
		p.Revision, p.ChangedAt = 3, start.Add(time.Hour)
		w.handle(p)
		if got := w.server.Requests(); len(got) != 1 || !strings.HasPrefix(got[0], "GET") {
			t.Errorf("asked %q", got)
		}

		closed := p
		closed.Revision, closed.State, closed.Images, closed.ImageCount = 4, "closed", nil, 0
		w.handle(closed)
		if i = w.one(); i.Open || len(i.Comments) != 2 || !strings.HasPrefix(i.Comments[1].Body, "Done: no current image of `r.example/team/app`") {
			t.Errorf("got %+v", i)
		}

		p.Revision = 5
		w.handle(p)
		if i = w.one(); !i.Open || len(i.Comments) != 3 || !strings.HasPrefix(i.Comments[2].Body, "The problem is back") {
			t.Errorf("got %+v", i)
		}

		// A replay of everything asks the tracker nothing.
		w.server.Requests()
		for revision := range int64(5) {
			p.Revision = revision + 1
			w.handle(p)
		}
		if got := w.server.Requests(); len(got) != 0 {
			t.Errorf("asked %q", got)
		}
	})
}

// A ticket that a human closed stays so until the problem gets worse, or comes back.
func TestClosedByHuman(t *testing.T) {
	onBoth(t, func(t *testing.T, w *world) {
		p := problem(1)
		w.handle(p)
		human := func() { w.server.Change(func(is []*trackertest.Issue) { is[0].Open = false }) }
		human()
		p.Revision, p.Versions = 2, []string{"2.14.0", "2.14.1"}
		w.handle(p)
		if i := w.one(); i.Open || len(i.Comments) > 0 || strings.Contains(i.Body, "2.14.0") {
			t.Errorf("not worse: %+v", i)
		}
		p.Revision, p.Severity = 3, contracts.SeverityCritical
		w.handle(p)
		if i := w.one(); !i.Open || len(i.Comments) != 1 || !strings.HasPrefix(i.Comments[0].Body, "Opened again, since it got worse.") || !strings.Contains(i.Body, "2.14.0") {
			t.Errorf("worse: %+v", i)
		}
		human()
		closed := p
		closed.Revision, closed.State = 4, "closed"
		w.handle(closed)
		if i := w.one(); i.Open || len(i.Comments) != 1 {
			t.Errorf("closed twice: %+v", i)
		}
		p.Revision = 5
		w.handle(p)
		if i := w.one(); !i.Open {
			t.Errorf("it is back: %+v", i)
		}
	})
}

// A deleted ticket is as good as one that a human closed.
func TestDeleted(t *testing.T) {
	onBoth(t, func(t *testing.T, w *world) {
		p := problem(1)
		w.handle(p)
		w.server.Change(func(is []*trackertest.Issue) { is[0].Deleted = true })
		p.Revision = 2
		w.handle(p)
		if got := w.server.Issues(); len(got) != 0 {
			t.Errorf("got %+v", got)
		}
		p.Revision, p.KEV = 3, true
		w.handle(p)
		if i := w.one(); i.Number != 2 || !i.Open {
			t.Errorf("got %+v", i)
		}
	})
}

// story is what happens to a problem in the tests with faults.
func story() []contracts.Problem {
	var out []contracts.Problem
	for i, change := range []func(p *contracts.Problem){
		func(*contracts.Problem) {},
		func(p *contracts.Problem) { p.Severity = contracts.SeverityCritical },
		func(p *contracts.Problem) { p.Severity, p.State = contracts.SeverityCritical, "closed" },
		func(p *contracts.Problem) { p.Severity, p.KEV = contracts.SeverityCritical, true },
	} {
		p := problem(int64(i + 1))
		change(&p)
		out = append(out, p)
	}
	return out
}

// TestKilledAnywhere kills the service before and after each call to the
// tracker, once and twice in a row: the same ticket, the same comments.
func TestKilledAnywhere(t *testing.T) {
	onBoth(t, func(t *testing.T, w *world) {
		for _, p := range story() {
			w.handle(p)
		}
		want, points := w.one(), 2*w.calls
		kind := w.cfg.Trackers[0].Kind
		for point := range points {
			for _, twice := range []bool{false, true} {
				w := newWorld(t, kind)
				w.kill[point] = true
				if twice {
					w.kill[point+1], w.kill[point+2] = true, true
				}
				for _, p := range story() {
					w.handle(p)
				}
				got := w.one()
				if got.Open != want.Open || len(got.Comments) != len(want.Comments) || got.Title != want.Title || !slices.Equal(got.Labels, want.Labels) {
					t.Errorf("killed at %d, twice %v: got %+v, want %+v", point, twice, got, want)
				}
				for _, p := range story() {
					w.handle(p)
				}
				w.one()
			}
		}
		if points < 16 {
			t.Errorf("only %d points", points)
		}
	})
}

// TestLostAnswers: everything is carried out and no answer comes back.
func TestLostAnswers(t *testing.T) {
	onBoth(t, func(t *testing.T, w *world) {
		lost := map[string]bool{}
		w.server.SetFaults(func(r *http.Request) trackertest.Fault {
			key := r.Method + r.URL.Path + fmt.Sprint(w.clock().Unix()/3600)
			if r.Method == http.MethodGet || lost[key] {
				return trackertest.Fault{}
			}
			lost[key] = true
			return trackertest.Fault{Lost: true}
		})
		for _, p := range story() {
			w.handle(p)
			w.advance(time.Hour)
		}
		if i := w.one(); !i.Open || len(i.Comments) != 3 {
			t.Errorf("got %+v", i)
		}
		if len(lost) < 6 {
			t.Errorf("lost only %v", lost)
		}
	})
}

// TestLateCreation: the tracker carries a creation out long after it was given
// up. There is one double, and it is closed.
func TestLateCreation(t *testing.T) {
	onBoth(t, func(t *testing.T, w *world) {
		late := true
		w.server.SetFaults(func(r *http.Request) trackertest.Fault {
			now := late && r.Method == http.MethodPost
			late = late && !now
			return trackertest.Fault{Late: now}
		})
		w.handle(problem(1))
		first := w.one()
		w.server.Land()
		if got := w.server.Issues(); len(got) != 2 {
			t.Fatalf("got %+v", got)
		}
		recheck := func() {
			t.Helper()
			if _, err := w.s.Recheck(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		recheck()
		if got := w.server.Issues(); !got[1].Open {
			t.Errorf("before its time: %+v", got)
		}
		w.advance(11 * time.Minute)
		recheck()
		got := w.server.Issues()
		if len(got) != 2 || !got[0].Open || got[1].Open || got[0].Number != first.Number || !strings.Contains(got[1].Comments[0].Body, "double of #1") {
			t.Errorf("got %+v", got)
		}
		w.server.Requests()
		recheck()
		if asked := w.server.Requests(); len(asked) != 0 {
			t.Errorf("asked %q", asked)
		}
	})
}

// A creation that turns up after its problem was closed is closed too, and is
// the ticket when the problem is back.
func TestLateAndClosed(t *testing.T) {
	onBoth(t, func(t *testing.T, w *world) {
		w.server.SetFaults(func(r *http.Request) trackertest.Fault { return trackertest.Fault{Late: r.Method == http.MethodPost} })
		if outcome, _ := bus.Classify(w.try(problem(1))); outcome != bus.OutcomeLater {
			t.Fatalf("got %v", outcome)
		}
		w.server.SetFaults(nil)
		closed := problem(2)
		closed.State = "closed"
		w.handle(closed)
		w.server.Land()
		w.advance(11 * time.Minute)
		if _, err := w.s.Recheck(t.Context()); err != nil {
			t.Fatal(err)
		}
		if i := w.one(); i.Open {
			t.Errorf("got %+v", i)
		}
	})
}

// TestOutcomes: each kind of trouble asks for its own kind of retry, and none
// of them leads to a second ticket.
func TestOutcomes(t *testing.T) {
	reset := fmt.Sprint(start.Add(40 * time.Minute).Unix())
	for name, c := range map[string]struct {
		fault trackertest.Fault
		want  bus.Outcome
		at    time.Duration // from now
	}{
		"GitHub primary rate limit":     {trackertest.Fault{Status: 403, Header: map[string]string{"X-RateLimit-Remaining": "0", "X-RateLimit-Reset": reset}, Body: `{"message":"API rate limit exceeded"}`}, bus.OutcomeLater, 40 * time.Minute},
		"GitHub secondary rate limit":   {trackertest.Fault{Status: 403, Header: map[string]string{"Retry-After": "60"}, Body: `{"message":"You have exceeded a secondary rate limit"}`}, bus.OutcomeLater, time.Minute},
		"secondary without Retry-After": {trackertest.Fault{Status: 403, Body: `{"message":"You have exceeded a secondary rate limit"}`}, bus.OutcomeLater, time.Minute},
		"429":                           {trackertest.Fault{Status: 429, Header: map[string]string{"Retry-After": "17"}}, bus.OutcomeLater, 17 * time.Second},
		"429 of GitLab":                 {trackertest.Fault{Status: 429, Header: map[string]string{"RateLimit-Remaining": "0", "RateLimit-Reset": reset}}, bus.OutcomeLater, 40 * time.Minute},
		"a pause of a year":             {trackertest.Fault{Status: 429, Header: map[string]string{"Retry-After": "31536000"}}, bus.OutcomeLater, 2 * time.Hour},
		"a pause in the past":           {trackertest.Fault{Status: 429, Header: map[string]string{"Retry-After": "Mon, 01 Jan 2024 00:00:00 GMT"}}, bus.OutcomeLater, time.Second},
		"500":                           {trackertest.Fault{Status: 500}, bus.OutcomeLater, 30 * time.Second},
		"503 with Retry-After":          {trackertest.Fault{Status: 503, Header: map[string]string{"Retry-After": "300"}}, bus.OutcomeLater, 5 * time.Minute},
		"lost":                          {trackertest.Fault{Lost: true}, bus.OutcomeLater, 30 * time.Second},
		"not JSON":                      {trackertest.Fault{Status: 201, Body: "<html>"}, bus.OutcomeLater, 30 * time.Second},
		"nothing of a ticket":           {trackertest.Fault{Status: 201, Body: "{}"}, bus.OutcomeLater, 30 * time.Second},
		"401":                           {trackertest.Fault{Status: 401, Body: `{"message":"Bad credentials"}`}, bus.OutcomePermanent, 0},
		"403":                           {trackertest.Fault{Status: 403, Body: `{"message":"Resource not accessible by personal access token"}`}, bus.OutcomePermanent, 0},
		"404":                           {trackertest.Fault{Status: 404, Body: `{"message":"Not Found"}`}, bus.OutcomePermanent, 0},
		"issues disabled":               {trackertest.Fault{Status: 410, Body: `{"message":"Issues has been disabled in this repository."}`}, bus.OutcomePermanent, 0},
		"422":                           {trackertest.Fault{Status: 422, Body: `{"message":"Validation Failed","errors":[{"resource":"Issue","field":"assignees","code":"invalid"}]}`}, bus.OutcomePermanent, 0},
		"moved":                         {trackertest.Fault{Status: 301, Header: map[string]string{"Location": "/repositories/1/issues"}}, bus.OutcomePermanent, 0},
		"to another host":               {trackertest.Fault{Status: 307, Header: map[string]string{"Location": "https://evil.example/"}}, bus.OutcomePermanent, 0},
	} {
		t.Run(name, func(t *testing.T) {
			onBoth(t, func(t *testing.T, w *world) {
				w.server.SetFaults(func(*http.Request) trackertest.Fault { return c.fault })
				err := w.try(problem(1))
				outcome, at := bus.Classify(err)
				if outcome != c.want || outcome == bus.OutcomeLater && !at.Equal(start.Add(c.at)) {
					t.Errorf("got %v at %s: %v", outcome, at.Sub(start), err)
				}
				if strings.Contains(fmt.Sprint(err), trackertest.Token) {
					t.Errorf("the error holds the token: %v", err)
				}
				w.server.Requests()
				if outcome == bus.OutcomeLater {
					if again, _ := bus.Classify(w.try(problem(1))); again != bus.OutcomeLater || len(w.server.Requests()) > 0 {
						t.Errorf("asked again before the time")
					}
				}
				w.server.SetFaults(nil)
				w.handle(problem(1)) // later, or from the dead letters
				w.one()
			})
		})
	}
}

// A storm of problems is spread: a minute's worth at once, then one by one,
// and each event waits once.
func TestStorm(t *testing.T) {
	onBoth(t, func(t *testing.T, w *world) {
		var waiting []time.Time
		var problems []contracts.Problem
		for i := range 20 {
			p := problem(1)
			p.Key = fmt.Sprintf("%032x", i)
			problems = append(problems, p)
			outcome, at := bus.Classify(w.try(p))
			if outcome == bus.OutcomeLater {
				waiting = append(waiting, at)
			} else if outcome != bus.OutcomeOK {
				t.Fatalf("got %v", outcome)
			}
		}
		if n := len(w.server.Issues()); n != 5 || len(waiting) != 15 {
			t.Fatalf("%d issues, %d waiting", n, len(waiting))
		}
		for i, at := range waiting {
			if want := start.Add(time.Duration(i+1) * 12 * time.Second); !at.Equal(want) {
				t.Errorf("problem %d waits until %s, want %s", i, at.Sub(start), want.Sub(start))
			}
			// the tenth is gone before its turn
			if i == 9 {
				closed := problems[5+i]
				closed.Revision, closed.State = 2, "closed"
				w.handle(closed)
			}
		}
		for i, at := range waiting {
			w.advance(at.Sub(w.clock()))
			if err := w.try(problems[5+i]); err != nil {
				t.Errorf("problem %d: %v", i, err)
			}
		}
		if n := len(w.server.Issues()); n != 19 {
			t.Errorf("%d issues", n)
		}
	})
}

// A token that was changed is used at once.
func TestRotation(t *testing.T) {
	w := newWorld(t, ticketer.KindGitHub)
	w.server.SetToken("another")
	if outcome, _ := bus.Classify(w.try(problem(1))); outcome != bus.OutcomePermanent {
		t.Errorf("got %v", outcome)
	}
	w.env["TOKEN"] = "another"
	w.handle(problem(1))
	w.one()
}

// Two instances that meet at the same problem make one ticket.
func TestTwoInstances(t *testing.T) {
	onBoth(t, func(t *testing.T, w *world) {
		trackers, _, err := w.cfg.Connect(func(name string) (string, bool) { return w.env[name], true }, w.clock)
		if err != nil {
			t.Fatal(err)
		}
		var group sync.WaitGroup
		for range 2 {
			s := ticketer.New(w.cfg, ticketer.Deps{DB: w.db, Trackers: trackers, Log: slog.New(slog.DiscardHandler), Now: w.clock})
			group.Go(func() {
				_, err := s.Handle(t.Context(), ev(t, problem(1)))
				if outcome, _ := bus.Classify(err); outcome == bus.OutcomePermanent || outcome == bus.OutcomeUnavailable {
					t.Errorf("got %v", err)
				}
			})
		}
		group.Wait()
		w.handle(problem(1))
		w.one()
	})
}

// Two instances whose timers go off at once look for doubles once: a double is
// told and closed once.
func TestTwoInstancesRecheck(t *testing.T) {
	onBoth(t, func(t *testing.T, w *world) {
		late := true
		w.server.SetFaults(func(r *http.Request) trackertest.Fault {
			now := late && r.Method == http.MethodPost
			late = late && !now
			return trackertest.Fault{Late: now}
		})
		w.handle(problem(1))
		w.server.Land()
		w.advance(11 * time.Minute)
		trackers, _, err := w.cfg.Connect(func(name string) (string, bool) { return w.env[name], true }, w.clock)
		if err != nil {
			t.Fatal(err)
		}
		var group sync.WaitGroup
		for range 4 {
			s := ticketer.New(w.cfg, ticketer.Deps{DB: w.db, Trackers: trackers, Log: slog.New(slog.DiscardHandler), Now: w.clock})
			group.Go(func() {
				if _, err := s.Recheck(t.Context()); err != nil {
					t.Error(err)
				}
			})
		}
		group.Wait()
		got := w.server.Issues()
		if len(got) != 2 || !got[0].Open || got[1].Open || len(got[1].Comments) != 1 {
			t.Errorf("got %+v", got)
		}
	})
}

// A tracker that cannot be asked does not keep the others from being looked at.
func TestRecheckInTrouble(t *testing.T) {
	onBoth(t, func(t *testing.T, w *world) {
		w.kill[1] = true
		w.handle(problem(1)) // killed after the creation: uncertain
		w.advance(11 * time.Minute)
		w.server.SetFaults(func(*http.Request) trackertest.Fault { return trackertest.Fault{Status: 503} })
		if n, err := w.s.Recheck(t.Context()); n != 1 || err == nil {
			t.Errorf("looked at %d, %v", n, err)
		}
		if n, err := w.s.Recheck(t.Context()); n != 0 || err != nil {
			t.Errorf("looked at %d again, %v", n, err)
		}
		w.advance(11 * time.Minute)
		w.server.SetFaults(nil)
		for want := range 2 {
			if n, err := w.s.Recheck(t.Context()); n != 1-want || err != nil {
				t.Errorf("looked at %d, %v", n, err)
			}
		}
	})
}

// Recovery finds a ticket on any page, and takes no copy for it.
func TestRecoveryAmongOthers(t *testing.T) {
	onBoth(t, func(t *testing.T, w *world) {
		w.server.SetPageSize(2)
		for i := range 5 {
			w.server.AddIssue(fmt.Sprint("other ", i), "text")
		}
		w.kill[1] = true
		if err := w.try(problem(1)); !errors.Is(err, errKilled) {
			t.Fatal(err)
		}
		// Somebody copies the text of the ticket, marker included.
		w.server.Change(func(is []*trackertest.Issue) {
			is[2].Body = "<!-- tidewaiter problem=" + problem(1).Key + " claim=guess -->"
		})
		w.server.AddIssue("copy", w.server.Issues()[5].Body)
		w.handle(problem(1))
		for _, i := range w.server.Issues() {
			if i.Open != (i.Number != 7) {
				t.Errorf("got %+v", i)
			}
		}
		closed := problem(2)
		closed.State = "closed"
		w.handle(closed)
		if is := w.server.Issues(); is[5].Open || !is[2].Open || len(is) != 7 {
			t.Errorf("got %+v", is)
		}
	})
}

func TestRouting(t *testing.T) {
	w := newWorld(t, ticketer.KindGitHub)
	w.cfg.Rules = []ticketer.Rule{
		{Repositories: []string{"r.example/quiet"}, Tracker: ticketer.NoTracker},
		{Repositories: []string{"r.example/team"}, MinSeverity: contracts.SeverityCritical, Tracker: "main", Project: trackertest.Project, Labels: []string{"urgent"}},
		{OnlyFixable: true, MinSeverity: contracts.SeverityMedium, Tracker: "main", Project: trackertest.Project, Assignees: []string{"alice"}},
	}
	w.restart()
	for i, c := range []struct {
		owner, severity string
		fixed           []string
		kev             bool
		label, assignee string // "": no ticket
	}{
		{"r.example/quiet", contracts.SeverityCritical, []string{"1"}, true, "", ""},
		{"r.example/quiet/er", contracts.SeverityCritical, []string{"1"}, true, "", ""},
		{"r.example/quieter", contracts.SeverityCritical, []string{"1"}, false, "severity:critical", "alice"},
		{"r.example/team/a", contracts.SeverityCritical, nil, false, "urgent", ""},
		{"r.example/team/a", contracts.SeverityLow, nil, true, "urgent", ""},
		{"r.example/team/a", contracts.SeverityHigh, nil, false, "", ""},
		{"r.example/team/a", contracts.SeverityHigh, []string{"2"}, false, "severity:high", "alice"},
		{"r.example/team/a", contracts.SeverityLow, []string{"2"}, false, "", ""},
	} {
		p := problem(1)
		p.Key, p.Owner, p.Severity, p.FixedIn, p.KEV = fmt.Sprintf("%032x", i), c.owner, c.severity, c.fixed, c.kev
		before := len(w.server.Issues())
		w.handle(p)
		issues := w.server.Issues()[before:]
		if (len(issues) == 1) != (c.label != "") {
			t.Errorf("%+v: got %+v", c, issues)
			continue
		}
		if c.label != "" && (!slices.Contains(issues[0].Labels, c.label) || strings.Join(issues[0].Assignees, ",") != c.assignee) {
			t.Errorf("%+v: got %+v", c, issues)
		}
	}
	// What had no ticket gets one when a later revision is for one.
	before := len(w.server.Issues())
	p := problem(2)
	p.Key, p.FixedIn, p.Severity = fmt.Sprintf("%032x", 5), nil, contracts.SeverityCritical
	w.handle(p)
	if len(w.server.Issues()) != before+1 {
		t.Error("no ticket")
	}
}

func TestConfidentialAndAssigned(t *testing.T) {
	w := newWorld(t, ticketer.KindGitLab)
	w.cfg.Rules[0].Confidential, w.cfg.Rules[0].Assignees = true, []string{"alice", "nobody"}
	w.restart()
	w.handle(problem(1))
	if i := w.one(); !i.Secret || !slices.Equal(i.Assignees, []string{"7"}) {
		t.Errorf("got %+v", i)
	}
}

func TestBadEvents(t *testing.T) {
	w := newWorld(t, ticketer.KindGitHub)
	for name, change := range map[string]func(p *contracts.Problem){
		"key":      func(p *contracts.Problem) { p.Key = "--> @all" },
		"revision": func(p *contracts.Problem) { p.Revision = 0 },
		"state":    func(p *contracts.Problem) { p.State = "perhaps" },
	} {
		p := problem(1)
		change(&p)
		if outcome, _ := bus.Classify(w.try(p)); outcome != bus.OutcomePermanent {
			t.Errorf("%s: %v", name, outcome)
		}
	}
	if len(w.server.Requests()) > 0 {
		t.Error("the tracker was asked")
	}
}

func TestTrackerNoLongerConfigured(t *testing.T) {
	w := newWorld(t, ticketer.KindGitHub)
	w.handle(problem(1))
	w.cfg.Trackers[0].Name, w.cfg.Rules[0].Tracker = "other", "other"
	w.restart()
	if outcome, _ := bus.Classify(w.try(problem(2))); outcome != bus.OutcomePermanent {
		t.Errorf("got %v", outcome)
	}
}

func TestDatabaseGone(t *testing.T) {
	w := newWorld(t, ticketer.KindGitHub)
	if err := w.db.Close(); err != nil {
		t.Fatal(err)
	}
	if outcome, _ := bus.Classify(w.try(problem(1))); outcome != bus.OutcomeUnavailable {
		t.Errorf("got %v", outcome)
	}
}

// Events in any order, doubled anywhere, with kills and every fault anywhere:
// in the end one ticket that says what the last revision says, and whatever
// else came of it is closed.
func TestAnyOrderAnyFault(t *testing.T) {
	worlds := map[string]*world{}
	for kind := range kinds {
		worlds[kind] = newWorld(t, kind)
	}
	round := 0
	rapid.Check(t, func(rt *rapid.T) {
		w := worlds[rapid.SampledFrom([]string{ticketer.KindGitHub, ticketer.KindGitLab}).Draw(rt, "kind")]
		round++
		w.server.SetFaults(nil)
		w.server.Change(func(is []*trackertest.Issue) {
			for _, i := range is {
				i.Deleted = true
			}
		})
		w.advance(time.Hour)
		var events []contracts.Problem
		for i := range rapid.IntRange(1, 5).Draw(rt, "revisions") {
			p := problem(int64(i + 1))
			p.Key = fmt.Sprintf("%032x", round)
			p.State = rapid.SampledFrom([]string{"open", "open", "closed"}).Draw(rt, "state")
			p.Severity = rapid.SampledFrom([]string{contracts.SeverityLow, contracts.SeverityHigh, contracts.SeverityCritical}).Draw(rt, "severity")
			p.KEV = rapid.Bool().Draw(rt, "kev")
			events = append(events, p)
		}
		last := events[len(events)-1]
		order := rapid.SliceOfN(rapid.SampledFrom(events), 0, 4).Draw(rt, "order")
		order = append(order, events...)
		kills := rapid.SliceOfN(rapid.IntRange(0, 30), 0, 4).Draw(rt, "kills")
		w.kill = map[int]bool{}
		for _, k := range kills {
			w.kill[2*w.calls+k] = true
		}
		faults := rapid.SliceOfN(rapid.SampledFrom([]trackertest.Fault{
			{},
			{},
			{},
			{Lost: true},
			{Late: true},
			{Status: 502},
			{Status: 429, Header: map[string]string{"Retry-After": "5"}},
			{Status: 403, Body: `{"message":"secondary rate limit"}`},
		}), 0, 20).Draw(rt, "faults")
		late := 0
		w.server.SetFaults(func(r *http.Request) trackertest.Fault {
			if len(faults) == 0 {
				return trackertest.Fault{}
			}
			f := faults[0]
			faults = faults[1:]
			if f.Late {
				// Only a creation that comes late is a new ticket; edits that come late are not of this test.
				if f.Late = r.Method == http.MethodPost && strings.HasSuffix(r.URL.Path, "/issues"); f.Late {
					late++
				}
			}
			return f
		})
		for _, p := range order {
			w.handle(p)
		}
		w.server.Land()
		w.server.SetFaults(nil)
		w.advance(11 * time.Minute)
		for w.recheck() != nil {
			w.advance(11 * time.Minute)
		}
		issues := w.server.Issues()
		var open []trackertest.Issue
		for _, i := range issues {
			if i.Open {
				open = append(open, i)
			}
		}
		if last.State == "closed" && len(open) != 0 || last.State == "open" && len(open) != 1 || len(issues) > 1+late {
			rt.Fatalf("last %+v, %d late, got %+v", last, late, issues)
		}
		if last.State == "open" && (!slices.Contains(open[0].Labels, "severity:"+last.Severity) || slices.Contains(open[0].Labels, "known-exploited") != last.KEV) {
			rt.Fatalf("last %+v, got %+v", last, open[0])
		}
		asked := len(w.server.Requests())
		for _, p := range order {
			w.handle(p)
		}
		if again := len(w.server.Requests()); asked > 0 && again > 0 {
			rt.Fatalf("a replay asked %d times", again)
		}
	})
}
