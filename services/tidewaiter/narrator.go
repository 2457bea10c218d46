package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/term"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/registry"
	"github.com/tidewaiter/tidewaiter/services/ticketer/stub"
	"github.com/tidewaiter/tidewaiter/services/tidewaiter/allinone"
	"github.com/tidewaiter/tidewaiter/services/tidewaiter/format"
	"github.com/tidewaiter/tidewaiter/services/tidewaiter/sample"
)

// narrator prints the demo's story: JSON lines for machines, plain lines
// otherwise, with a line that moves on a terminal.
type narrator struct {
	mu       sync.Mutex
	out, err io.Writer
	json     bool
	terminal bool
	start    time.Time
	now      string // what the moving line says
	stop     chan struct{}
	stopped  sync.WaitGroup
}

func newNarrator(out, errOut io.Writer, asJSON bool) *narrator {
	n := &narrator{out: out, err: errOut, json: asJSON, start: time.Now(), stop: make(chan struct{})}
	if f, ok := out.(*os.File); ok && !asJSON {
		n.terminal = term.IsTerminal(int(f.Fd()))
	}
	if n.terminal {
		n.stopped.Go(n.move)
	}
	return n
}

// move redraws the line that shows that something is going on.
func (n *narrator) move() {
	tick := time.NewTicker(120 * time.Millisecond)
	defer tick.Stop()
	const frames = `|/-\`
	for i := 0; ; i++ {
		select {
		case <-n.stop:
			return
		case <-tick.C:
			n.mu.Lock()
			fmt.Fprintf(n.out, "\r\033[K%c %s", frames[i%len(frames)], n.now)
			n.mu.Unlock()
		}
	}
}

func (n *narrator) close() {
	if !n.terminal {
		return
	}
	close(n.stop)
	n.stopped.Wait()
	fmt.Fprint(n.out, "\r\033[K")
	n.terminal = false
}

// say prints one step.
func (n *narrator) say(e contracts.TimelineEntry, line string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if e.Time.IsZero() {
		e.Time = time.Now()
	}
	e.Time = e.Time.UTC()
	if n.json {
		e.Message = line
		_ = printLine(n.out, e) // a broken pipe shows at the end
		return
	}
	n.print("%7.2fs  %-12s  %s", e.Time.Sub(n.start).Seconds(), e.Step, line)
}

// print writes a line above the moving one.
func (n *narrator) print(layout string, args ...any) {
	line := fmt.Sprintf(layout, args...)
	if n.terminal {
		fmt.Fprint(n.out, "\r\033[K")
		n.now = line
	}
	fmt.Fprintln(n.out, line)
}

func (n *narrator) chapter(title string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if !n.json {
		n.print("\n== %s", title)
	}
}

func short(digest string) string {
	if len(digest) > 19 {
		return digest[:19]
	}
	return digest
}

func (n *narrator) pushed(p sample.Pushed) {
	what := "" // of a copied image nothing is known yet
	if len(p.Platforms) > 0 {
		what = fmt.Sprintf(" (%s, %s)", plural(len(p.Platforms), "platform"), plural(len(p.Layers), "distinct layer"))
	}
	n.say(contracts.TimelineEntry{Step: contracts.StepPushed, Subject: p.String(), Registry: p.Ref.Registry, Image: p.String()},
		fmt.Sprintf("%s:%s %s%s", p.Ref.Repository, p.Ref.Tag, short(p.Ref.Digest), what))
}

func (n *narrator) planned(at time.Time, e contracts.ImagePlanned) {
	line := fmt.Sprintf("%s %s: %d layers", name(e.Image, e.Platform), short(e.Image.Digest), len(e.Layers))
	if e.Kind == contracts.KindIndex {
		line = fmt.Sprintf("%s %s: an index of %d platforms", e.Image.Repository, short(e.Image.Digest), len(e.Parts))
	}
	n.say(contracts.TimelineEntry{Time: at, Step: contracts.StepPlanned, Service: "planner", Subject: e.Image.String()}, line)
}

func name(i contracts.Image, p *contracts.Platform) string {
	if p == nil {
		return i.Repository
	}
	return i.Repository + " " + p.String()
}

func (n *narrator) analyzed(at time.Time, e contracts.LayerAnalyzed) {
	n.say(contracts.TimelineEntry{Time: at, Step: contracts.StepAnalyzed, Service: "analyzer", Subject: e.Digest},
		fmt.Sprintf("layer %s: %s in %s, %d ms of CPU%s", short(e.Digest), plural(e.Packages, "package"), bytesText(e.Bytes), e.CPUMs, gapsText(e.Gaps)))
}

func (n *narrator) deduplicated(at time.Time, e contracts.LayerAnalyzed) {
	n.say(contracts.TimelineEntry{Time: at, Step: contracts.StepDeduplicated, Service: "analyzer", Subject: e.Digest},
		fmt.Sprintf("layer %s: known already, nothing was read", short(e.Digest)))
}

func (n *narrator) layerFailed(at time.Time, e contracts.LayerFailed) {
	n.say(contracts.TimelineEntry{Time: at, Step: contracts.StepFailed, Service: "analyzer", Subject: e.Digest},
		fmt.Sprintf("layer %s: %s", short(e.Digest), e.Message))
}

func (n *narrator) assembled(at time.Time, e contracts.ImageAssembled) {
	n.say(contracts.TimelineEntry{Time: at, Step: contracts.StepAssembled, Service: "assembler", Subject: e.Image.String()},
		fmt.Sprintf("%s %s: %s%s", name(e.Image, e.Platform), short(e.Image.Digest), plural(e.Packages, "package"), gapsText(e.Gaps)))
}

func (n *narrator) matched(at time.Time, e contracts.ImageMatched) {
	n.say(contracts.TimelineEntry{Time: at, Step: contracts.StepMatched, Service: "matcher", Subject: e.Image.String()},
		fmt.Sprintf("%s %s: %s; %s", name(e.Image, e.Platform), short(e.Image.Digest), e.Verdict, countsText(e.Counts)))
}

func (n *narrator) attested(at time.Time, e contracts.ImageAttested) {
	n.say(contracts.TimelineEntry{Time: at, Step: contracts.StepAttested, Service: "attestor", Subject: e.Image.String()},
		fmt.Sprintf("%s %s: %s, %d statements, valid until %s", name(e.Image, e.Platform), short(e.Image.Digest), e.Verdict,
			len(e.Statements), e.ValidUntil.Format(time.DateOnly)))
}

func (n *narrator) verified(ref registry.Ref, v contracts.Verification) {
	line := fmt.Sprintf("%s:%s is let in", ref.Repository, ref.Tag)
	if !v.Verified {
		line = fmt.Sprintf("%s:%s is refused: %s", ref.Repository, ref.Tag, v.Reason)
	}
	n.say(contracts.TimelineEntry{
		Step: contracts.StepVerified, Service: "verify", Subject: ref.Registry + "/" + ref.Repository + "@" + ref.Digest, OK: &v.Verified,
	}, line)
}

func (n *narrator) admitted(ref registry.Ref, a admission) {
	line := fmt.Sprintf("a Pod with %s:%s is admitted", ref.Repository, ref.Tag)
	if !a.Allowed {
		line = fmt.Sprintf("a Pod with %s:%s is refused: %s", ref.Repository, ref.Tag, strings.TrimSpace(a.Status.Message))
	}
	n.say(contracts.TimelineEntry{
		Step: contracts.StepVerified, Service: "gatekeeper", Subject: ref.Registry + "/" + ref.Repository + "@" + ref.Digest, OK: &a.Allowed,
	}, line)
}

func (n *narrator) advised(at time.Time, e contracts.AdvisoriesChanged) {
	if e.Previous == nil {
		return // the snapshot that everything begins with
	}
	n.say(contracts.TimelineEntry{Time: at, Step: stepAdvised, Service: "advisor", Subject: e.Snapshot.Digest},
		fmt.Sprintf("snapshot %s, signed and published, replaces %s: only what it touches is matched again", short(e.Snapshot.Digest), short(e.Previous.Digest)))
}

func (n *narrator) ticket(t stub.Ticket) {
	n.say(contracts.TimelineEntry{Step: stepTicketed, Service: "ticketer", Subject: fmt.Sprintf("%s#%d", t.Project, t.Number)},
		fmt.Sprintf("%s#%d in a local stub of a tracker: %s", t.Project, t.Number, t.Title))
}

func (n *narrator) followed(took time.Duration) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if !n.json {
		n.print("\n%.1f seconds from the advisory to the refusal, without reading a layer again", took.Seconds())
	}
}

// Steps that only the demo tells of, beside the contract's.
const (
	stepAdvised  = "advised"
	stepTicketed = "ticketed"
)

func (n *narrator) ratio(layers int) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if !n.json {
		n.print("\n%d distinct layers so far, each analysed once", layers)
	}
}

func (n *narrator) findings(r *contracts.Report) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.json {
		return
	}
	n.print("")
	if err := format.Findings(n.out, r.Findings, format.Options{}); err != nil {
		n.print("the table could not be printed: %v", err)
	}
}

func (n *narrator) fleet(r contracts.FleetReport) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.json {
		return nil
	}
	if n.terminal {
		fmt.Fprint(n.out, "\r\033[K")
	}
	return printFleet(n.out, r)
}

// done prints the last line.
func (n *narrator) done(image string, all *allinone.AllInOne, err error) {
	n.close()
	ok := err == nil
	if n.json {
		e := contracts.TimelineEntry{Step: contracts.StepDone, OK: &ok, Registry: all.Registry.Host, Image: image, PublicKey: all.PublicKey}
		n.say(e, strings.TrimSpace(errText(err)))
		return
	}
	if ok {
		fmt.Fprint(n.out, tryNext)
	}
}

const tryNext = `
What to try next
  tidewaiter demo --keep               leave it running, and push an image of your own into its registry
  tidewaiter scan IMAGE                the same analysis once, without servers
  tidewaiter up --data ./tidewaiter-data   run it for good; point your registry's webhooks at it
  tidewaiter advisories build --from DIR --out FILE   use all of OSV's advisories instead of the built-in set
`

// addresses prints what --keep leaves running.
func (n *narrator) addresses(dir string, all *allinone.AllInOne) {
	fmt.Fprintf(n.err, `
Everything is running; interrupt to stop.
  registry   %s   (pull: anyone; push: user %s, password in %s/addresses.json)
  intake     %s/hooks/%s
  catalog    %s
  metrics    %s/metrics

  tidewaiter where --data %s %s/demo/shop:1.0
  tidewaiter report --data %s
`, all.Registry.Host, all.Registry.Username, dir, all.Intake, allinone.Source, all.Catalog, all.Monitor, dir, all.Registry.Host, dir)
}

func errText(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

func bytesText(n int64) string {
	switch {
	case n >= 1<<20:
		return fmt.Sprintf("%.1f MiB", float64(n)/(1<<20))
	case n >= 1<<10:
		return fmt.Sprintf("%.1f KiB", float64(n)/(1<<10))
	}
	return fmt.Sprintf("%d bytes", n)
}

func gapsText(gaps int) string {
	if gaps == 0 {
		return ""
	}
	return ", " + plural(gaps, "gap")
}

func countsText(c contracts.Counts) string {
	text := plural(c.Total(), "finding")
	if c.Total() > 0 {
		text += fmt.Sprintf(" (%d critical, %d high, %d medium, %d low, %d unknown; %d with a fix, %d known to be exploited)",
			c.Critical, c.High, c.Medium, c.Low, c.Unknown, c.Fixable, c.KEV)
	}
	return text
}

func decodeReport(b []byte) (*contracts.Report, error) {
	var r contracts.Report
	if err := json.Unmarshal(b, &r); err != nil {
		return nil, fmt.Errorf("read the report: %w", err)
	}
	return &r, nil
}
