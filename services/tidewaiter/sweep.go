package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/url"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/services/sweeper"
)

// sweepCmd asks sweeper for a look through a registry.
type sweepCmd struct {
	serverFlags
	Source string `required:"" help:"Id of a source that has a sweep in the configuration." placeholder:"ID"`
	DryRun bool   `help:"Say what would be pushed; nothing is sent."`
	Detach bool   `help:"Do not wait for the end."`
	Output string `help:"table or json." enum:"table,json" default:"table" short:"o"`
}

func (*sweepCmd) Help() string {
	return "What the registry holds and Tidewaiter does not know is pushed into the bulk lane. Progress goes to stderr. An\n" +
		"interrupted sweep goes on where it was.\n\n" +
		"Examples:\n  tidewaiter sweep --source main\n  tidewaiter sweep --source main --dry-run --output json"
}

func (c *sweepCmd) Run(ctx context.Context, s *streams) error {
	a, err := c.api(s)
	if err != nil {
		return err
	}
	path := "/v1/sweeps/" + url.PathEscape(c.Source)
	request := path
	if c.DryRun {
		request += "?dryRun=true"
	}
	body, err := a.post(ctx, a.sweeper, request, struct{}{})
	if err != nil {
		return err
	}
	var asked struct {
		After time.Time `json:"after"`
	}
	if err := decode(body, &asked); err != nil {
		return err
	}
	if c.Detach {
		fmt.Fprintf(s.err, "a sweep of %s is asked for\n", c.Source)
		return nil
	}
	sweep, err := c.follow(ctx, s.err, a, path, asked.After)
	if err != nil {
		return err
	}
	if c.Output == "json" {
		err = printJSON(s.out, sweep)
	} else {
		err = printSweep(s.out, *sweep)
	}
	if err != nil {
		return err
	}
	if sweep.State != contracts.SweepComplete {
		return unavailable(fmt.Errorf("the sweep of %s is %s: %s", c.Source, sweep.State, sweep.Message))
	}
	return nil
}

// follow tells how far the sweep that began after a moment is, until it is finished.
func (c *sweepCmd) follow(ctx context.Context, w io.Writer, a *api, path string, after time.Time) (*contracts.Sweep, error) {
	query := url.Values{"after": {after.Format(time.RFC3339Nano)}}
	if c.DryRun {
		query.Set("dryRun", "true")
	}
	tick := time.NewTicker(500 * time.Millisecond)
	defer tick.Stop()
	told := ""
	for {
		var now sweeper.SourceSweeps
		if err := a.ask(ctx, a.sweeper, path+"?"+query.Encode(), &now); err != nil {
			return nil, err
		}
		if l := now.Last; l != nil && l.StartedAt.After(after) && l.DryRun == c.DryRun {
			if l.State != contracts.SweepRunning {
				return l, nil
			}
			if line := sweepLine(*l); line != told {
				fmt.Fprintln(w, line)
				told = line
			}
		}
		select {
		case <-ctx.Done():
			return nil, unavailable(errors.New("interrupted; the sweep goes on without this command"))
		case <-tick.C:
		}
	}
}

// sweepLine is one line about a sweep that is under way.
func sweepLine(p contracts.Sweep) string {
	f := p.Figures
	var line string
	switch p.Phase {
	case "repositories":
		line = plural(f.Repositories, "repository")
		line = strings.Replace(line, "repositorys", "repositories", 1) + " listed"
	case "statements":
		line = fmt.Sprintf("statements of %s looked for, %d lacking", plural(f.Checked, "image"), f.Unstated)
	default:
		line = fmt.Sprintf("%s looked at, %d missed", plural(f.Tags, "tag"), f.Missed)
	}
	if p.SecondsLeft != nil {
		line += fmt.Sprintf(", about %s left", time.Duration(*p.SecondsLeft)*time.Second)
	}
	if p.Message != "" {
		line += "; " + p.Message
	}
	return line
}

func printSweep(w io.Writer, p contracts.Sweep) error {
	f := p.Figures
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	state := p.State
	if p.DryRun {
		state += " (dry run: nothing was sent)"
	}
	fmt.Fprintf(t, "sweep of %s\t%s\n", p.Registry, state)
	fmt.Fprintf(t, "listed\t%d repositories, %d tags\n", f.Repositories, f.Tags)
	fmt.Fprintf(t, "missed\t%d\n", f.Missed)
	fmt.Fprintf(t, "gone\t%d\n", f.Deleted)
	fmt.Fprintf(t, "statements\t%d looked for, %d lacking, %d not known\n", f.Checked, f.Unstated, f.Unasked)
	fmt.Fprintf(t, "events lost\t%s\n", lostText(p))
	for _, u := range p.Unlisted {
		name := u.Repository
		if u.Tag != "" {
			name += ":" + u.Tag
		}
		fmt.Fprintf(t, "not listed\t%s: %s\n", name, u.Reason)
	}
	if err := t.Flush(); err != nil {
		return fmt.Errorf("write output: %w", err)
	}
	return nil
}

// lostText says how many events a registry lost.
func lostText(p contracts.Sweep) string {
	f := p.Figures
	text := "unknown (nothing was pushed since the sweep before, or there was none)"
	if f.ShareLost != nil {
		text = fmt.Sprintf("%.1f %% (%d of %d pushes)", *f.ShareLost*100, f.Lost, f.Lost+f.Heard)
	}
	if f.Pending > 0 {
		text += fmt.Sprintf(", %d not decided yet", f.Pending)
	}
	return text
}
