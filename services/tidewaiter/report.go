package main

import (
	"context"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/services/sweeper"
)

// reportCmd prints the fleet report.
type reportCmd struct {
	serverFlags
	Output string `help:"table or json." enum:"table,json" default:"table" short:"o"`
}

func (*reportCmd) Help() string {
	return "Example:\n  tidewaiter report --output json | jq .shareVulnerable"
}

func (c *reportCmd) Run(ctx context.Context, s *streams) error {
	a, err := c.api(s)
	if err != nil {
		return err
	}
	var r contracts.FleetReport
	if err := a.ask(ctx, a.catalog, "/v1/report", &r); err != nil {
		return err
	}
	if r.Registries, err = sweeps(ctx, a); err != nil {
		fmt.Fprintf(s.err, "sweeper does not answer, so nothing is said of lost events: %v\n", err)
	}
	if c.Output == "json" {
		return printJSON(s.out, r)
	}
	return printFleet(s.out, r)
}

// sweeps returns the last complete sweep of each source; none where no sweeper is known.
func sweeps(ctx context.Context, a *api) ([]contracts.Sweep, error) {
	if a.sweeper.url == "" {
		return nil, nil
	}
	var all struct {
		Sweeps []sweeper.SourceSweeps `json:"sweeps"`
	}
	if err := a.ask(ctx, a.sweeper, "/v1/sweeps", &all); err != nil {
		return nil, err
	}
	var complete []contracts.Sweep
	for _, source := range all.Sweeps {
		if source.Complete != nil {
			complete = append(complete, *source.Complete)
		}
	}
	return complete, nil
}

func printFleet(w io.Writer, r contracts.FleetReport) error {
	share := func(n, of int, f *float64) string {
		if f == nil {
			return "unknown (nothing measured yet)"
		}
		return fmt.Sprintf("%.0f %% (%d of %d)", *f*100, n, of)
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintf(t, "images with a verdict\t%d (pass %d, warn %d, fail %d)\n", r.Images, r.Verdicts.Pass, r.Verdicts.Warn, r.Verdicts.Fail)
	fmt.Fprintf(t, "share vulnerable\t%s\n", share(r.Vulnerable, r.Images, r.ShareVuln))
	fmt.Fprintf(t, "share outdated\t%s\n", share(r.Outdated, r.WithServers, r.ShareOutdated))
	fmt.Fprintf(t, "open problems\t%d\n", r.Open)
	if r.Unfinished > 0 {
		fmt.Fprintf(t, "not yet at an end\t%d\n", r.Unfinished)
	}
	if err := t.Flush(); err != nil {
		return fmt.Errorf("write output: %w", err)
	}
	if len(r.Registries) > 0 {
		t = tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
		fmt.Fprintln(t, "\nSOURCE\tREGISTRY\tLAST SWEEP\tTAGS\tMISSED\tEVENTS LOST")
		for _, p := range r.Registries {
			fmt.Fprintf(t, "%s\t%s\t%s\t%d\t%d\t%s\n", p.Source, p.Registry, p.StartedAt.Format(time.RFC3339), p.Figures.Tags, p.Figures.Missed, lostText(p))
		}
		if err := t.Flush(); err != nil {
			return fmt.Errorf("write output: %w", err)
		}
	}
	if len(r.Servers) == 0 {
		return nil
	}
	t = tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "\nPRODUCT\tIMAGES\tOUTDATED\tEND OF LIFE\tOLDEST\tLATEST\tBEHIND")
	for _, l := range r.Servers {
		behind := behindText(l)
		latest := l.Latest
		if latest == "" {
			latest = "unknown"
		}
		fmt.Fprintf(t, "%s\t%d\t%d\t%d\t%s\t%s\t%s\n", l.Product, l.Images, l.Outdated, l.EOL, l.Oldest, latest, behind)
	}
	if err := t.Flush(); err != nil {
		return fmt.Errorf("write output: %w", err)
	}
	return nil
}

// behindText says how far the worst of a product's versions runs behind: by
// release lines, and by days where the data tells.
func behindText(l contracts.ServerLag) string {
	if l.Outdated == 0 && l.EOL == 0 {
		return "-"
	}
	var parts []string
	if l.WorstLines != nil && *l.WorstLines > 0 {
		parts = append(parts, plural(*l.WorstLines, "release line"))
	}
	if l.WorstDays != nil && *l.WorstDays > 0 {
		parts = append(parts, fmt.Sprintf("at least %d days", *l.WorstDays))
	}
	if len(parts) == 0 {
		return "within its release line"
	}
	return strings.Join(parts, ", ")
}

func plural(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}
