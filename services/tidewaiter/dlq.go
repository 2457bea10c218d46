package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"text/tabwriter"
	"time"

	"github.com/tidewaiter/tidewaiter/libs/bus"
	"github.com/tidewaiter/tidewaiter/libs/run"
)

// dlqCmd holds the commands about dead letters.
type dlqCmd struct {
	List   dlqListCmd   `cmd:"" help:"List dead letters."`
	Show   dlqShowCmd   `cmd:"" help:"Show one dead letter with its headers and body."`
	Replay dlqReplayCmd `cmd:"" help:"Send dead letters again to where they came from; each only once unless forced."`
}

// kafkaFlags say which Kafka a command talks to.
type kafkaFlags struct {
	serverFlags
}

func (f kafkaFlags) open(s *streams) (*bus.Bus, error) {
	cfg, err := run.Load(s.config, os.LookupEnv)
	if err != nil {
		return nil, err
	}
	config := cfg.Kafka.Config
	if len(config.Brokers) == 0 {
		a, err := f.addresses()
		if err != nil {
			return nil, err
		}
		config = a.BusConfig()
	}
	b, err := bus.New(config, "cli", s.log, nil)
	if err != nil {
		return nil, unavailable(fmt.Errorf("kafka: %w", err))
	}
	return b, nil
}

// filterFlags select dead letters.
type filterFlags struct {
	Topic   string        `help:"Only of this topic, for example layer.requested.v1."`
	Service string        `help:"Only of this service."`
	Reason  string        `help:"Only those whose reason contains this text."`
	Since   time.Duration `help:"Only those younger than this." placeholder:"DURATION"`
	Before  time.Duration `help:"Only those older than this." placeholder:"DURATION"`
}

func (f filterFlags) filter() bus.DeadLetterFilter {
	return bus.DeadLetterFilter{
		Topic: f.Topic, Service: f.Service, Reason: f.Reason, Older: f.Before, Younger: f.Since,
	}
}

type dlqListCmd struct {
	kafkaFlags
	filterFlags
	Output string `help:"table or json (one line a letter)." enum:"table,json" default:"table" short:"o"`
}

func (*dlqListCmd) Help() string {
	return "Examples:\n  tidewaiter dlq list\n  tidewaiter dlq list --service analyzer --since 24h --output json"
}

func (c *dlqListCmd) Run(ctx context.Context, s *streams) error {
	b, err := c.open(s)
	if err != nil {
		return err
	}
	defer b.Close() //nolint:errcheck // nothing was written
	letters, err := b.ListDeadLetters(ctx, c.filter())
	if err != nil {
		return unavailable(err)
	}
	if c.Output == "json" {
		for _, l := range letters {
			if err := printLine(s.out, l); err != nil {
				return err
			}
		}
		return nil
	}
	if len(letters) == 0 {
		fmt.Fprintln(s.err, "no dead letters")
		return nil
	}
	t := tabwriter.NewWriter(s.out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "ID\tTIME\tSERVICE\tATTEMPTS\tREPLAYED\tSUBJECT\tREASON")
	for _, l := range letters {
		fmt.Fprintf(t, "%s\t%s\t%s\t%d\t%t\t%s\t%s\n", l.ID, l.Time.Local().Format(time.DateTime), l.Service, l.Attempts, l.Replayed, l.Subject, l.Reason)
	}
	return t.Flush()
}

type dlqShowCmd struct {
	kafkaFlags
	ID string `arg:"" help:"Id of the dead letter, as 'dlq list' prints it."`
}

func (c *dlqShowCmd) Run(ctx context.Context, s *streams) error {
	b, err := c.open(s)
	if err != nil {
		return err
	}
	defer b.Close() //nolint:errcheck // nothing was written
	letter, headers, body, err := b.ReadDeadLetter(ctx, c.ID)
	if errors.Is(err, bus.ErrNotFound) {
		return usage(err)
	}
	if err != nil {
		return unavailable(err)
	}
	if err := printJSON(s.out, letter); err != nil {
		return err
	}
	for _, k := range slices.Sorted(maps.Keys(headers)) {
		fmt.Fprintf(s.out, "%s: %s\n", k, headers[k])
	}
	fmt.Fprintf(s.out, "\n%s\n", body)
	return nil
}

type dlqReplayCmd struct {
	kafkaFlags
	filterFlags
	IDs   []string `arg:"" optional:"" help:"Ids of dead letters; without any, all that the filters select."`
	All   bool     `help:"Replay every dead letter (asked for when neither ids nor filters are given)."`
	Force bool     `help:"Replay those again that were replayed before."`
}

func (*dlqReplayCmd) Help() string {
	return "Examples:\n  tidewaiter dlq replay layer.requested.v1.analyzer.dlq/0/17\n  tidewaiter dlq replay --service planner --reason 'not configured'"
}

func (c *dlqReplayCmd) Run(ctx context.Context, s *streams) error {
	if len(c.IDs) == 0 && c.filterFlags == (filterFlags{}) && !c.All {
		return usage(errors.New("name what to replay: ids, filters or --all"))
	}
	b, err := c.open(s)
	if err != nil {
		return err
	}
	defer b.Close() //nolint:errcheck // publishing waits for its acknowledgement
	filter := c.filter()
	filter.IDs = c.IDs
	replayed, err := b.ReplayDeadLetters(ctx, filter, c.Force)
	fmt.Fprintf(s.err, "replayed %d\n", replayed)
	switch {
	case errors.Is(err, bus.ErrNotFound), errors.Is(err, bus.ErrNotReplayable):
		return usage(err)
	case err != nil:
		return unavailable(err)
	}
	return nil
}
