package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/bus"
	"github.com/tidewaiter/tidewaiter/services/ticketer/stub"
	"github.com/tidewaiter/tidewaiter/services/tidewaiter/allinone"
	"github.com/tidewaiter/tidewaiter/services/tidewaiter/sample"
)

// stepTicket is the step of the loop that is no event: the tracker has made a
// ticket, and has not answered yet.
const stepTicket = "ticket"

// killedAt are the steps at each of which the process is killed.
func killedAt() []string {
	return []string{
		contracts.AdvisoriesChangedV1, contracts.ImageRematchV1, contracts.ImageMatchedV1, contracts.ImageAttestedV1,
		contracts.FindingOpenedV1, stepTicket,
	}
}

// killer kills a process at the steps of the loop that are left.
type killer struct {
	mu      sync.Mutex
	process *os.Process // nil: nobody is to be killed now
	left    map[string]bool
	killed  chan string
}

func (k *killer) aim(p *os.Process) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.process = p
}

// see kills at the first sight of a step that is left.
func (k *killer) see(step string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.process == nil || !k.left[step] {
		return
	}
	delete(k.left, step)
	k.killed <- step                      // before anybody can notice in another way
	_ = k.process.Signal(syscall.SIGKILL) // whoever waits for the process sees whether it ended
	k.process = nil
}

// loop is a fleet under a changing archive of advisories.
type loop struct {
	*system
	up         *up
	advisories string // folder
	tracker    *stub.Tracker
	killer     *killer
	about      string // the package that the present round is about
	records    []osv
	pushed     []sample.Pushed
}

// day is when the advisories of a round were modified. The sequence of a
// snapshot comes of it, so it is the same in each run.
func day(n int) time.Time { return time.Date(2026, 5, n, 0, 0, 0, 0, time.UTC) }

func newsOf(round int) string { return fmt.Sprintf("news-%d", round) }

// startLoop starts a process whose listeners are those of like, so that images
// and problems have the same names in each run; like is nil for the first.
func startLoop(t *testing.T, like *up) *loop {
	t.Helper()
	dir := t.TempDir()
	l := &loop{advisories: filepath.Join(dir, "advisories"), killer: &killer{killed: make(chan string, 1)}}
	const secret = "of no use elsewhere"
	l.tracker = stub.New(secret, func(what string, ticket stub.Ticket) {
		if what == "opened" && strings.Contains(ticket.Title, "news-") {
			l.killer.see(stepTicket)
		}
	})
	server := httptest.NewServer(l.tracker)
	t.Cleanup(server.Close)
	config := fmt.Sprintf(`
advisor: {poll: 250ms}
matcher: {poll: 250ms}
ticketer:
  timeout: 1s
  settle: 1s
  trackers: [{name: stub, kind: github, url: %q, secretFile: %q, createPerMinute: 1000}]
  rules: [{tracker: stub, project: demo/security}]
`, server.URL+"/", filepath.Join(dir, "tracker.secret"))
	for name, content := range map[string]string{"tidewaiter.yaml": config, "tracker.secret": secret} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(l.advisories, 0o700); err != nil {
		t.Fatal(err)
	}
	l.system = &system{t: t}
	l.up = newUp(t, filepath.Join(dir, "data"))
	if like != nil {
		i, j := slices.Index(l.up.args, "--listen"), slices.Index(like.args, "--listen")
		l.up.args = append(l.up.args[:i:i], like.args[j:j+8]...)
	}
	l.up.args = append(l.up.args, "--config", filepath.Join(dir, "tidewaiter.yaml"), "--advisories", l.advisories)
	l.records = []osv{
		{id: "TEST-MINIMIST", name: "minimist", fixed: "1.2.6", modified: day(1).Format(time.RFC3339)},
		{id: "TEST-EXPRESS", name: "express", fixed: "4.0.0", modified: day(1).Format(time.RFC3339)},
	}
	writeOSV(t, l.advisories, l.records...)
	l.begin()
	return l
}

// begin starts the process, for the first time or again.
func (l *loop) begin() {
	l.t.Helper()
	l.AllInOne = &allinone.AllInOne{Addresses: l.up.start()}
	l.client = l.registryClient(l.RegistryHost())
}

// fleet pushes two images with the packages of all rounds, and one without.
func (l *loop) fleet(rounds int) {
	l.t.Helper()
	packages := [][2]string{}
	for r := range rounds {
		packages = append(packages, [2]string{newsOf(r), "1.0.0"})
	}
	amd := sample.Image{Platform: sample.AMD64}
	l.pushed = []sample.Pushed{
		l.push("team/one", "1", npmImage(l.t, amd, packages...)),
		l.push("team/two", "1", npmImage(l.t, amd, append(packages, [2]string{"express", "3.0.0"})...)),
		l.push("team/other", "1", npmImage(l.t, amd, [2]string{"minimist", "1.2.0"})),
	}
}

// publish puts the advisory of a round into the archive; the last round also
// withdraws one.
func (l *loop) publish(round int, last bool) {
	l.t.Helper()
	modified := day(2 + round).Format(time.RFC3339)
	l.about = newsOf(round)
	l.records = append(l.records, osv{id: "TEST-" + strings.ToUpper(l.about), name: l.about, fixed: "2.0.0", modified: modified})
	if last {
		l.records[1].withdrawn, l.records[1].modified = true, modified
	}
	writeOSV(l.t, l.advisories, l.records...)
}

// step says of which step of a round an event is; "" for none of them.
func (l *loop) step(round int, m bus.Tailed) string {
	at := func(s contracts.SnapshotRef, err error) bool { return err == nil && s.Sequence >= day(2+round).Unix() }
	name := strings.TrimPrefix(m.Event.Type(), contracts.TypePrefix)
	belongs := false
	switch name {
	case contracts.AdvisoriesChangedV1:
		d, err := bus.Decode[contracts.AdvisoriesChanged](m.Event)
		belongs = at(d.Snapshot, err)
	case contracts.ImageRematchV1:
		d, err := bus.Decode[contracts.ImageRematch](m.Event)
		belongs = at(d.Snapshot, err)
	case contracts.ImageMatchedV1:
		d, err := bus.Decode[contracts.ImageMatched](m.Event)
		belongs = at(d.Snapshot, err)
	case contracts.ImageAttestedV1:
		d, err := bus.Decode[contracts.ImageAttested](m.Event)
		belongs = at(d.Snapshot, err)
	case contracts.FindingOpenedV1:
		d, err := bus.Decode[contracts.Problem](m.Event)
		belongs = err == nil && d.Package == l.about
	case contracts.FindingClosedV1:
		belongs = true
	}
	if !belongs {
		return ""
	}
	return name
}

// disturb kills the process once at each of the steps of a round, whenever it
// is seen first, and starts it again.
func (l *loop) disturb(round int, steps []string) {
	l.t.Helper()
	l.killer.mu.Lock()
	l.killer.left = map[string]bool{}
	for _, s := range steps {
		l.killer.left[s] = true
	}
	l.killer.mu.Unlock()
	for range steps {
		began := time.Now()
		l.killer.aim(l.up.cmd.Process)
		if slices.ContainsFunc(l.tracker.Tickets(), func(t stub.Ticket) bool { return strings.Contains(t.Title, l.about) }) {
			l.killer.see(stepTicket) // it was made before we took aim
		}
		ctx, cancel := context.WithTimeout(l.t.Context(), patience)
		watched := make(chan error, 1)
		step := ""
		go func() { watched <- l.watch(ctx, round) }()
		var err error // that the connection to a killed process was lost is no news
		select {
		case step = <-l.killer.killed:
			cancel()
			err = <-watched
		case err = <-watched:
			cancel()
			select {
			case step = <-l.killer.killed:
			default:
			}
		}
		if step == "" {
			l.t.Fatalf("round %d: no step of %v was seen: %v\n%s", round, steps, err, l.up.out)
		}
		l.t.Logf("round %d: killed at %s, %s on", round, step, time.Since(began).Round(time.Millisecond))
		l.up.kill()
		l.begin()
	}
}

// watch reads the events of the process from their beginning until ctx ends.
func (l *loop) watch(ctx context.Context, round int) (err error) {
	b, err := bus.New(l.BusConfig(), "e2e", slog.New(slog.DiscardHandler), nil)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.Close()) }()
	names := slices.DeleteFunc(append(killedAt(), contracts.FindingClosedV1), func(s string) bool { return s == stepTicket })
	if err := b.EnsureTopics(ctx, names...); err != nil {
		return err
	}
	var topics []string
	for _, k := range contracts.Events() {
		if !slices.Contains(names, k.Name) {
			continue
		}
		topics = append(topics, k.Topic)
		if k.Bulk {
			topics = append(topics, k.Topic+contracts.BulkSuffix)
		}
	}
	return b.Tail(ctx, topics, true, func(m bus.Tailed) error {
		if m.Err != nil {
			return m.Err
		}
		l.killer.see(l.step(round, m))
		return nil
	})
}

// until waits until missing returns "".
func (l *loop) until(missing func() string) {
	l.t.Helper()
	for deadline := time.Now().Add(patience); ; {
		what := missing()
		if what == "" {
			return
		}
		if time.Now().After(deadline) {
			l.t.Fatalf("waited %s: %s\n%s", patience, what, l.up.out)
		}
		pause(l.t, 50*time.Millisecond)
	}
}

// all returns the problems in a state, without the times at which they changed.
func (l *loop) all(state string) []contracts.Problem {
	l.t.Helper()
	var answer struct {
		Problems []contracts.Problem `json:"problems"`
	}
	l.catalog("/v1/problems?limit=1000&state="+state, &answer)
	for i := range answer.Problems {
		answer.Problems[i].OpenedAt, answer.Problems[i].ChangedAt = time.Time{}, time.Time{}
	}
	return answer.Problems
}

// settled waits until images rest on a snapshot, and so many problems are open
// and closed, each with its ticket.
func (l *loop) settled(sequence int64, images []sample.Pushed, open, closed int) {
	l.t.Helper()
	l.until(func() string {
		for _, p := range images {
			v, err := l.verify(p.String())
			if err != nil || !v.Verified || len(v.Statements) != 2 {
				return fmt.Sprintf("%s: %+v, %v", p, v, err)
			}
			for _, s := range v.Statements {
				if s.Sequence != sequence {
					return fmt.Sprintf("%s rests on snapshot %d, not %d", p, s.Sequence, sequence)
				}
			}
		}
		for state, want := range map[string]int{"open": open, "closed": closed} {
			problems := l.all(state)
			if len(problems) != want {
				return fmt.Sprintf("%d problems are %s, not %d", len(problems), state, want)
			}
			for _, p := range problems {
				if !slices.ContainsFunc(l.tickets(p.Key), func(t stub.Ticket) bool { return t.Open == (state == "open") }) {
					return fmt.Sprintf("no %s ticket about %s in %s: %+v", state, p.Package, p.Owner, l.tickets(p.Key))
				}
			}
		}
		return ""
	})
}

// tickets returns all tickets about a problem.
func (l *loop) tickets(key string) []stub.Ticket {
	return slices.DeleteFunc(l.tracker.Tickets(), func(t stub.Ticket) bool { return !strings.Contains(t.Body, key) })
}

// outcome is what is left when everything is done.
type outcome struct {
	Reports    map[string]string // digest by image
	Referrers  map[string]int
	Statements map[string][]int64 // sequences
	Problems   []contracts.Problem
	Tickets    map[string][]string // by problem: project, title and whether it is open
}

func (l *loop) outcome() outcome {
	l.t.Helper()
	l.quiet()
	o := outcome{Reports: l.reportDigests(l.pushed), Referrers: map[string]int{}, Statements: map[string][]int64{}, Tickets: map[string][]string{}}
	for _, p := range l.pushed {
		o.Referrers[p.String()] = len(l.referrers(p.String()))
		v, err := l.verify(p.String())
		if err != nil {
			l.t.Fatal(err)
		}
		for _, s := range v.Statements {
			o.Statements[p.String()] = append(o.Statements[p.String()], s.Sequence)
		}
	}
	o.Problems = append(l.all("open"), l.all("closed")...)
	for _, p := range o.Problems {
		for _, t := range l.tickets(p.Key) {
			o.Tickets[p.Key] = append(o.Tickets[p.Key], fmt.Sprintf("%s %q open %t labels %v", t.Project, t.Title, t.Open, t.Labels))
		}
	}
	if total := len(l.tracker.Tickets()); total != len(o.Problems) {
		l.t.Errorf("%d tickets about %d problems", total, len(o.Problems))
	}
	return o
}

// The loop from a new advisory to a ticket, killed with -9 at every step: once
// at one step of each of several advisories, and at all steps of the last one,
// with which another advisory is withdrawn. Findings, statements, problems and tickets are those of an undisturbed run.
func TestLoopSurvivesKill(t *testing.T) {
	t.Parallel()
	var rounds [][]string
	for _, s := range killedAt() {
		rounds = append(rounds, []string{s})
	}
	rounds = append(rounds, append(killedAt(), contracts.FindingClosedV1))
	run := func(like *up, disturbed bool) (outcome, *up) {
		l := startLoop(t, like)
		l.fleet(len(rounds))
		l.settled(day(1).Unix(), l.pushed, 2, 0)
		for r, steps := range rounds {
			last := r == len(rounds)-1
			l.publish(r, last)
			if disturbed {
				l.disturb(r, steps)
			}
			open, closed := 2+2*(r+1), 0
			if last {
				open, closed = open-1, 1
			}
			l.settled(day(2+r).Unix(), l.pushed[:2], open, closed)
		}
		o := l.outcome()
		l.up.kill() // the next run needs its addresses
		for _, p := range l.pushed {
			sequence := day(1 + len(rounds)).Unix()
			if p.Ref.Repository == "team/other" {
				sequence = day(1).Unix()
			}
			if !slices.Equal(o.Statements[p.String()], []int64{sequence, sequence}) || o.Referrers[p.String()] != 4 {
				t.Errorf("%s: statements of %v, want of %d; %d referrers, want 4", p, o.Statements[p.String()], sequence, o.Referrers[p.String()])
			}
		}
		for _, p := range o.Problems {
			if len(o.Tickets[p.Key]) != 1 {
				t.Errorf("%d tickets about %s in %s: %q", len(o.Tickets[p.Key]), p.Package, p.Owner, o.Tickets[p.Key])
			}
		}
		return o, l.up
	}
	want, first := run(nil, false)
	got, _ := run(first, true)
	sameReports(t, got.Reports, want.Reports)
	if !maps.Equal(got.Referrers, want.Referrers) {
		t.Errorf("referrers %v, undisturbed %v", got.Referrers, want.Referrers)
	}
	for name, pair := range map[string][2]any{"problems": {got.Problems, want.Problems}, "tickets": {got.Tickets, want.Tickets}} {
		a, errA := json.MarshalIndent(pair[0], "", " ")
		b, errB := json.MarshalIndent(pair[1], "", " ")
		if errA != nil || errB != nil {
			t.Fatal(errA, errB)
		}
		if string(a) != string(b) {
			t.Errorf("%s:\n%s\nundisturbed:\n%s", name, a, b)
		}
	}
}
