package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"text/tabwriter"

	"github.com/tidewaiter/tidewaiter/contracts"
)

// whereCmd prints an image's timeline.
type whereCmd struct {
	serverFlags
	Ref    string `arg:"" help:"registry/repository:tag, registry/repository@digest or a digest."`
	Tags   bool   `help:"Show where the tags of a repository, or one tag, pointed over time."`
	Output string `help:"table or json (one line an entry)." enum:"table,json" default:"table" short:"o"`
}

func (*whereCmd) Help() string {
	return "Examples:\n  tidewaiter where registry.example.com/team/app:1.2\n  tidewaiter where sha256:4afff5… --output json\n" +
		"  tidewaiter where registry.example.com/team/app --tags"
}

func (c *whereCmd) Run(ctx context.Context, s *streams) error {
	a, err := c.api(s)
	if err != nil {
		return err
	}
	if c.Tags {
		return c.history(ctx, s, a)
	}
	body, err := a.get(ctx, a.catalog, "/v1/timeline?ref="+url.QueryEscape(c.Ref))
	if err != nil {
		return err
	}
	defer body.Close()
	table := tabwriter.NewWriter(s.out, 0, 0, 2, ' ', 0)
	lines := bufio.NewScanner(body)
	lines.Buffer(nil, 1<<20)
	seen := false
	for lines.Scan() {
		var e contracts.TimelineEntry
		if err := json.Unmarshal(lines.Bytes(), &e); err != nil {
			return unavailable(fmt.Errorf("read answer: %w", err))
		}
		seen = true
		if c.Output == "json" {
			if err := printLine(s.out, e); err != nil {
				return err
			}
			continue
		}
		fmt.Fprintf(table, "%s\t%s\t%s\t%s\n", e.Time.Local().Format("2006-01-02 15:04:05.000"), e.Step, e.Service, e.Message)
	}
	if err := lines.Err(); err != nil {
		return unavailable(fmt.Errorf("read answer: %w", err))
	}
	if !seen {
		return usage(errors.New("nothing is known of " + c.Ref + " (was it pushed? tidewaiter submit sends a push event by hand)"))
	}
	return table.Flush()
}

// history prints where tags pointed, newest first.
func (c *whereCmd) history(ctx context.Context, s *streams, a *api) error {
	var answer struct {
		Periods []contracts.TagPeriod `json:"periods"`
	}
	if err := a.ask(ctx, a.catalog, "/v1/history?ref="+url.QueryEscape(c.Ref), &answer); err != nil {
		return err
	}
	if len(answer.Periods) == 0 {
		return usage(errors.New("no tag of " + c.Ref + " was ever looked at"))
	}
	table := tabwriter.NewWriter(s.out, 0, 0, 2, ' ', 0)
	for _, p := range answer.Periods {
		if c.Output == "json" {
			if err := printLine(s.out, p); err != nil {
				return err
			}
			continue
		}
		digest, until := "gone", "now"
		if p.Digest != nil {
			digest = *p.Digest
		}
		if p.Until != nil {
			until = moment(p.Until)
		}
		fmt.Fprintf(table, "%s:%s\t%s\t%s\t%s\n", p.Repository, p.Tag, moment(&p.From), until, digest)
	}
	return table.Flush()
}
