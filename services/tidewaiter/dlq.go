package main

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/user"
	"slices"
	"text/tabwriter"
	"time"
	"unicode/utf8"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/bus"
	"github.com/tidewaiter/tidewaiter/libs/run"
	"github.com/tidewaiter/tidewaiter/services/tidewaiter/allinone"
)

// dlqCmd holds the commands about dead letters.
type dlqCmd struct {
	List   dlqListCmd   `cmd:"" help:"List dead letters, or count them by what is wrong."`
	Show   dlqShowCmd   `cmd:"" help:"Show one dead letter with its headers and body."`
	Replay dlqReplayCmd `cmd:"" help:"Send dead letters again to where they came from; each only once unless forced."`
	Drop   dlqDropCmd   `cmd:"" help:"Mark dead letters as done with: they are no longer listed nor replayed."`
}

// kafkaFlags say which Kafka a command talks to: the one of --config, or that of
// one that runs on a data directory.
type kafkaFlags struct {
	Data string `help:"Data directory of a running 'tidewaiter up', where --config names no Kafka." type:"path" default:"./tidewaiter-data" env:"TIDEWAITER_DATA" placeholder:"DIR"`
}

func (f kafkaFlags) open(s *streams) (*bus.Bus, error) {
	cfg, err := run.Load(s.config, os.LookupEnv)
	if err != nil {
		return nil, err
	}
	var b *bus.Bus
	if len(cfg.Kafka.Brokers) > 0 {
		b, err = cfg.Env("cli", s.log, prometheus.NewRegistry(), run.NewHealth()).Bus()
		if errors.Is(err, run.ErrConfig) {
			return nil, usage(err)
		}
	} else {
		var a allinone.Addresses
		if a, err = allinone.ReadAddresses(f.Data); err != nil {
			return nil, unavailable(fmt.Errorf("%w; to ask another Kafka: --config FILE with kafka.brokers", err))
		}
		b, err = bus.New(a.BusConfig(), "cli", s.log, nil)
	}
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
	Limit   int           `help:"At most this many, the oldest first."`
}

func (f filterFlags) filter() bus.DeadLetterFilter {
	return bus.DeadLetterFilter{
		Topic: f.Topic, Service: f.Service, Reason: f.Reason, Older: f.Before, Younger: f.Since, Limit: f.Limit,
	}
}

// check refuses what selects nothing by mistake.
func (f filterFlags) check() error {
	if f.Limit < 0 || f.Since < 0 || f.Before < 0 {
		return usage(errors.New("--limit, --since and --before must not be negative"))
	}
	return nil
}

// chooseFlags select what is changed; nothing at all is no choice.
type chooseFlags struct {
	kafkaFlags
	filterFlags
	IDs    []string `arg:"" optional:"" name:"id" help:"Ids of dead letters, as 'dlq list' prints them; without any, all that the filters select."`
	All    bool     `help:"Every dead letter (asked for when neither ids nor filters are given)."`
	By     string   `help:"Who does it, as it is remembered; the user and host unless given."`
	Output string   `help:"table or json." enum:"table,json" default:"table" short:"o"`
}

// choose connects to Kafka and returns what is chosen there.
func (f chooseFlags) choose(s *streams, verb string) (*bus.Bus, bus.DeadLetterFilter, error) {
	if err := f.check(); err != nil {
		return nil, bus.DeadLetterFilter{}, err
	}
	if len(f.IDs) == 0 && f.filterFlags == (filterFlags{}) && !f.All {
		return nil, bus.DeadLetterFilter{}, usage(fmt.Errorf("name what to %s: ids, filters or --all", verb))
	}
	filter := f.filter()
	filter.IDs = f.IDs
	b, err := f.open(s)
	return b, filter, err
}

// who returns who does something.
func (f chooseFlags) who() string {
	if f.By != "" {
		return f.By
	}
	name, host := "unknown", "unknown"
	if u, err := user.Current(); err == nil {
		name = u.Username
	}
	if h, err := os.Hostname(); err == nil {
		host = h
	}
	return name + "@" + host
}

type dlqListCmd struct {
	kafkaFlags
	filterFlags
	Dropped bool   `help:"Also those that were dropped."`
	Summary bool   `help:"Count them by topic, service and kind of reason."`
	Output  string `help:"table or json (one line a letter, or a count)." enum:"table,json" default:"table" short:"o"`
}

func (*dlqListCmd) Help() string {
	return "Examples:\n  tidewaiter dlq list --summary\n  tidewaiter dlq list --service analyzer --since 24h --limit 20 --output json"
}

func (c *dlqListCmd) Run(ctx context.Context, s *streams) error {
	if err := c.check(); err != nil {
		return err
	}
	b, err := c.open(s)
	if err != nil {
		return err
	}
	defer b.Close() //nolint:errcheck // nothing was written
	filter := c.filter()
	filter.Dropped = c.Dropped
	letters, err := b.ListDeadLetters(ctx, filter)
	if err != nil {
		return unavailable(err)
	}
	if c.Summary {
		return printSummary(s, bus.SummarizeDeadLetters(letters), c.Output)
	}
	if c.Output == "json" {
		return printLines(s, letters)
	}
	if len(letters) == 0 {
		fmt.Fprintln(s.err, "no dead letters")
		return nil
	}
	t := tabwriter.NewWriter(s.out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "ID\tTIME\tSERVICE\tATTEMPTS\tSTATE\tSUBJECT\tREASON")
	for i := range letters {
		l := &letters[i]
		fmt.Fprintf(t, "%s\t%s\t%s\t%d\t%s\t%s\t%s\n", l.ID, l.Time.Local().Format(time.DateTime), l.Service, l.Attempts, state(l), l.Subject, l.Reason)
	}
	return t.Flush()
}

// state says in a word what was done with a dead letter.
func state(l *contracts.DeadLetter) string {
	switch {
	case l.Dropped:
		return "dropped"
	case l.Replayed:
		return "replayed"
	}
	return "waiting"
}

func printLines[T any](s *streams, list []T) error {
	for i := range list {
		if err := printLine(s.out, list[i]); err != nil {
			return err
		}
	}
	return nil
}

func printSummary(s *streams, sums []contracts.DeadLetterSummary, output string) error {
	if output == "json" {
		return printLines(s, sums)
	}
	if len(sums) == 0 {
		fmt.Fprintln(s.err, "no dead letters")
		return nil
	}
	t := tabwriter.NewWriter(s.out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "COUNT\tREPLAYED\tDROPPED\tSERVICE\tTOPIC\tNEWEST\tREASON")
	for _, c := range sums {
		fmt.Fprintf(t, "%d\t%d\t%d\t%s\t%s\t%s\t%s\n", c.Count, c.Replayed, c.Dropped, c.Service, c.Topic, c.Newest.Local().Format(time.DateTime), c.Reason)
	}
	return t.Flush()
}

type dlqShowCmd struct {
	kafkaFlags
	ID     string `arg:"" help:"Id of the dead letter, as 'dlq list' prints it."`
	Output string `help:"table (the letter as JSON, headers, and the body as it is) or json." enum:"table,json" default:"table" short:"o"`
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
	if c.Output == "json" {
		content := contracts.DeadLetterContent{Letter: letter, Headers: headers}
		if text := string(body); utf8.ValidString(text) {
			content.Body = &text
		} else {
			content.BodyBase64 = base64.StdEncoding.EncodeToString(body)
		}
		return printJSON(s.out, content)
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
	chooseFlags
	Force bool `help:"Replay those again that were replayed or dropped before."`
}

func (*dlqReplayCmd) Help() string {
	return "It may be repeated and run by two at once: each letter is sent once.\n\nExamples:\n  tidewaiter dlq replay layer.requested.v1.analyzer.dlq/0/17\n  tidewaiter dlq replay --service planner --reason 'not configured'"
}

func (c *dlqReplayCmd) Run(ctx context.Context, s *streams) error {
	b, filter, err := c.choose(s, "replay")
	if err != nil {
		return err
	}
	defer b.Close() //nolint:errcheck // publishing waits for its acknowledgement
	res, err := b.ReplayDeadLetters(ctx, filter, c.who(), c.Force)
	if c.Output == "json" {
		return errors.Join(printJSON(s.out, contracts.DeadLetterReplay(res)), dlqError(err))
	}
	fmt.Fprintf(s.err, "replayed %d\n", res.Sent)
	for _, left := range []struct {
		n   int
		why string
	}{
		{res.Found, "sent already by a replay that was interrupted; now marked so"},
		{res.Replayed, "left out: replayed before (--force replays them again)"},
		{res.Dropped, "left out: dropped (--force replays them)"},
		{res.Busy, "left out: another replay has them in hand; if it was killed, repeat this in five minutes"},
		{res.Raw, "left out: bodies that never were events (see 'dlq show'); the sender must send them again"},
		{res.Gone, "left out: Kafka has deleted them in the meantime"},
	} {
		if left.n > 0 {
			fmt.Fprintf(s.err, "%d %s\n", left.n, left.why)
		}
	}
	return dlqError(err)
}

type dlqDropCmd struct {
	chooseFlags
	Why   string `help:"Why, for those who look at it later ('dlq list --dropped')."`
	Purge bool   `help:"Have Kafka delete at once what stands before the first letter that was not dropped (it can delete nothing else)."`
}

func (*dlqDropCmd) Help() string {
	return "What was dropped is kept out of sight until Kafka's retention deletes it; 'dlq list --dropped' shows it with when and by whom.\n\n" +
		"Examples:\n  tidewaiter dlq drop image.pushed.v1.intake.dlq/0/17 --why 'a test by hand'\n  tidewaiter dlq drop --service intake --before 720h --purge"
}

func (c *dlqDropCmd) Run(ctx context.Context, s *streams) error {
	b, filter, err := c.choose(s, "drop")
	if err != nil {
		return err
	}
	defer b.Close() //nolint:errcheck // publishing waits for its acknowledgement
	res, err := b.DropDeadLetters(ctx, filter, c.who(), c.Why, c.Purge)
	if c.Output == "json" {
		return errors.Join(printJSON(s.out, contracts.DeadLetterDrop(res)), dlqError(err))
	}
	fmt.Fprintf(s.err, "dropped %d\n", res.Dropped)
	if res.Before > 0 {
		fmt.Fprintf(s.err, "%d left out: dropped before\n", res.Before)
	}
	if c.Purge {
		fmt.Fprintf(s.err, "%d deleted from Kafka\n", res.Purged)
	}
	return dlqError(err)
}

// dlqError gives an error of the dead letter functions its exit code.
func dlqError(err error) error {
	switch {
	case errors.Is(err, bus.ErrNotFound), errors.Is(err, bus.ErrNotReplayable), errors.Is(err, bus.ErrDropped):
		return usage(err)
	case err != nil:
		return unavailable(err)
	}
	return nil
}
