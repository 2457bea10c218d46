package main

import (
	"context"
	"fmt"
	"io"
	"maps"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/services/intake"
)

// hooksCmd holds the commands about what senders sent.
type hooksCmd struct {
	Log    hooksLogCmd    `cmd:"" help:"List the calls of registries, what became of them and what to do about it."`
	Status hooksStatusCmd `cmd:"" help:"Sum up the calls of each source: how they went, the last one, the last trouble."`
}

type hooksLogCmd struct {
	serverFlags
	Source string `help:"Only of this source; unknown: calls to no source." placeholder:"ID"`
	Reason string `help:"Only with this reason code." placeholder:"CODE"`
	Since  string `help:"Only since then: 1h, or a time like 2026-05-04T03:02:01Z." placeholder:"TIME"`
	Limit  int    `help:"At most this many, the newest." default:"100"`
	Output string `help:"table or json (one line a call)." enum:"table,json" default:"table" short:"o"`
}

func (*hooksLogCmd) Help() string {
	return "Examples:\n  tidewaiter hooks log --source main-registry --since 1h\n  tidewaiter hooks log --reason unauthorized --output json"
}

func (c *hooksLogCmd) Run(ctx context.Context, s *streams) error {
	if c.Limit < 1 {
		return usage(fmt.Errorf("--limit %d is below 1", c.Limit))
	}
	a, err := c.api(s)
	if err != nil {
		return err
	}
	deliveries, err := c.fetch(ctx, a)
	if err != nil {
		return err
	}
	if c.Output == "json" {
		for _, d := range deliveries {
			if err := printLine(s.out, d); err != nil {
				return err
			}
		}
		return nil
	}
	if len(deliveries) == 0 {
		fmt.Fprintln(s.err, "no calls; tidewaiter hooks status names the sources and their last calls")
		return nil
	}
	return deliveriesTable(s.out, deliveries)
}

// page is how many entries are asked for at once.
const page = 500

func (c *hooksLogCmd) fetch(ctx context.Context, a *api) ([]contracts.Delivery, error) {
	query := url.Values{"source": {c.Source}, "reason": {c.Reason}, "since": {c.Since}}
	var out []contracts.Delivery
	for {
		query.Set("limit", strconv.Itoa(min(page, c.Limit-len(out))))
		var answer intake.Deliveries
		if err := a.ask(ctx, a.intake, "/v1/deliveries?"+query.Encode(), &answer); err != nil {
			return nil, err
		}
		out = append(out, answer.Deliveries...)
		if answer.Next == nil || len(out) >= c.Limit {
			return out, nil
		}
		query.Set("after", *answer.Next)
	}
}

// deliveriesTable prints calls, and below each reason that occurs what it means.
func deliveriesTable(w io.Writer, deliveries []contracts.Delivery) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "TIME\tSOURCE\tSTATUS\tREASON\tCALLS\tWHAT")
	reasons := map[string]contracts.Delivery{}
	for _, d := range deliveries {
		fmt.Fprintf(t, "%s\t%s\t%d\t%s\t%d\t%s\n", d.Time.Local().Format(time.DateTime), d.Source, d.Status, d.Reason, d.Calls, what(d))
		reasons[d.Reason] = d
	}
	if err := t.Flush(); err != nil {
		return fmt.Errorf("write output: %w", err)
	}
	fmt.Fprintln(w)
	for _, code := range slices.Sorted(maps.Keys(reasons)) {
		fmt.Fprintf(w, "%s: %s\n", code, strings.TrimSpace(reasons[code].Means+" "+reasons[code].Action))
	}
	return nil
}

// what a call was about, in few words.
func what(d contracts.Delivery) string {
	parts := slices.Clone(d.Subjects)
	if more := d.Published - len(d.Subjects); more > 0 {
		parts = append(parts, fmt.Sprintf("%d more", more))
	}
	for _, n := range []struct {
		count int
		text  string
	}{
		{d.Ignored, "ignored"}, {d.Filtered, "filtered"}, {d.Duplicates, "duplicate"}, {d.Dead, "to the dead letters"}, {d.OverQuota, "over the quota"},
	} {
		if n.count > 0 {
			parts = append(parts, fmt.Sprintf("%d %s", n.count, n.text))
		}
	}
	if d.Trouble != "" {
		parts = append(parts, d.Trouble)
	}
	return strings.Join(parts, ", ")
}

type hooksStatusCmd struct {
	serverFlags
	Source string `help:"Only this source." placeholder:"ID"`
	Since  string `help:"Calls since then: 24h, or a time; counted by whole hours." default:"24h" placeholder:"TIME"`
	Output string `help:"table or json (one line a source)." enum:"table,json" default:"table" short:"o"`
}

func (*hooksStatusCmd) Help() string {
	return "Examples:\n  tidewaiter hooks status\n  tidewaiter hooks status --source main-registry --since 168h --output json"
}

func (c *hooksStatusCmd) Run(ctx context.Context, s *streams) error {
	a, err := c.api(s)
	if err != nil {
		return err
	}
	var answer intake.SourceStatuses
	query := url.Values{"source": {c.Source}, "since": {c.Since}}
	if err := a.ask(ctx, a.intake, "/v1/sources?"+query.Encode(), &answer); err != nil {
		return err
	}
	if c.Output == "json" {
		for _, st := range answer.Sources {
			if err := printLine(s.out, st); err != nil {
				return err
			}
		}
		return nil
	}
	t := tabwriter.NewWriter(s.out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "SOURCE\tKIND\tCALLS\tLAST CALL\tLAST STORED\tREASONS")
	for _, st := range answer.Sources {
		var reasons []string
		for _, code := range slices.Sorted(maps.Keys(st.Reasons)) {
			reasons = append(reasons, fmt.Sprintf("%s %d", code, st.Reasons[code]))
		}
		kind := st.Kind
		if !st.Configured {
			kind = "-"
		}
		fmt.Fprintf(t, "%s\t%s\t%d\t%s\t%s\t%s\n", st.Source, kind, st.Calls, moment(st.LastCall), moment(st.LastStored), strings.Join(reasons, ", "))
	}
	if err := t.Flush(); err != nil {
		return fmt.Errorf("write output: %w", err)
	}
	for _, st := range answer.Sources {
		if f := st.LastFailure; f != nil {
			fmt.Fprintf(s.out, "\n%s, last trouble at %s: %s\n", st.Source, f.Time.Local().Format(time.DateTime),
				strings.Join(strings.Fields(strings.Join([]string{f.Reason + ".", f.Means, what(*f), f.Action}, " ")), " "))
		}
	}
	return nil
}

func moment(t *time.Time) string {
	if t == nil {
		return "-"
	}
	return t.Local().Format(time.DateTime)
}
