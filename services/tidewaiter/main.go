// Command tidewaiter is the command line of Tidewaiter and its all-in-one: it
// shows the pipeline (demo), runs it (up, run), asks it questions (where,
// report, dlq) and does its work once without servers (scan, match, verify).
//
// Machine output goes to stdout, everything else to stderr. Exit codes: 0 good,
// 1 a policy or threshold says no, 2 wrong use or bad input, 3 not verifiable,
// 4 something that is needed cannot be reached.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"

	"github.com/alecthomas/kong"

	"github.com/tidewaiter/tidewaiter/libs/run"
	"github.com/tidewaiter/tidewaiter/services/analyzer/worker"
)

// version is set at link time: -ldflags "-X main.version=…".
var version = "devel"

func main() {
	worker.Main() // returns at once unless this process is a parser's child
	ctx, stop := run.Signals(context.Background())
	code := Main(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// root is the command tree. Each command is a struct of flags with a Run method.
type root struct {
	Config   string           `help:"Configuration file (YAML)." type:"path" placeholder:"FILE" env:"TIDEWAITER_CONFIG"`
	LogLevel string           `help:"What to log: debug, info, warn or error; default: error, and info for up." enum:",debug,info,warn,error" default:"" env:"TIDEWAITER_LOG"`
	Version  kong.VersionFlag `help:"Print the version and exit."`

	Demo       demoCmd       `cmd:"" help:"Everything in one process, a real image pushed, the story told step by step."`
	Up         upCmd         `cmd:"" help:"Everything in one process on embedded servers, until stopped."`
	Run        runCmd        `cmd:"" help:"Run some services against real Kafka, Redis, database and registries."`
	Submit     submitCmd     `cmd:"" help:"Send a push event by hand, for registries that cannot reach Tidewaiter."`
	Rematch    rematchCmd    `cmd:"" help:"Have images matched again, as after a change of the policy."`
	Scan       scanCmd       `cmd:"" help:"Scan one image once, no servers needed."`
	Match      matchCmd      `cmd:"" help:"Match a CycloneDX or SPDX document with an advisory snapshot."`
	Verify     verifyCmd     `cmd:"" help:"Say whether an image carries a good attestation."`
	Where      whereCmd      `cmd:"" help:"Show the timeline of one image over all services."`
	Report     reportCmd     `cmd:"" help:"Show the fleet report: share vulnerable, share outdated, lag of each server."`
	Deployed   deployedCmd   `cmd:"" help:"Tell catalog which images run, so that they come first when advisories change."`
	Sweep      sweepCmd      `cmd:"" help:"Look through a source's registry now for pushes that no webhook told of."`
	Advisories advisoriesCmd `cmd:"" help:"Build an advisory snapshot, fetch a published one, or say how old one is."`
	Webhook    webhookCmd    `cmd:"" help:"Show what intake would make of a webhook."`
	Hooks      hooksCmd      `cmd:"" help:"Show what registries sent, what became of it, and why a webhook failed."`
	DLQ        dlqCmd        `cmd:"" name:"dlq" help:"List, show and replay dead letters."`
	ConfigCmd  configCmd     `cmd:"" name:"config" help:"Check a configuration file."`
	Privileges privilegesCmd `cmd:"" help:"Print the least that each service must be allowed: Kafka's ACLs, PostgreSQL's roles, Redis's users, registries."`
	Keys       keysCmd       `cmd:"" help:"Generate the key pair that signs attestations, or the one that signs advisory snapshots."`
}

// streams are what a command reads and writes.
type streams struct {
	in       io.Reader
	out, err io.Writer
	log      *slog.Logger
	config   string // path of the configuration file
	logLevel string // as asked for on the command line
}

// exitError carries the exit code an error stands for.
type exitError struct {
	code int
	err  error
}

func (e *exitError) Error() string { return e.err.Error() }
func (e *exitError) Unwrap() error { return e.err }

func usage(err error) error        { return &exitError{run.ExitUsage, err} }
func policyError(err error) error  { return &exitError{run.ExitPolicy, err} }
func unverifiable(err error) error { return &exitError{run.ExitUnverifiable, err} }
func unavailable(err error) error  { return &exitError{run.ExitUnavailable, err} }

// errParsed ends kong after it printed help or the version.
type errParsed int

// Main runs the command that args name and returns the exit code.
func Main(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) (code int) {
	defer func() {
		// kong prints help and version inside Parse and then calls Exit
		if r := recover(); r != nil {
			parsed, ok := r.(errParsed)
			if !ok {
				panic(r)
			}
			code = int(parsed)
		}
	}()
	var cmd root
	parser, err := newParser(&cmd, stdout, stderr)
	if err != nil {
		fmt.Fprintf(stderr, "tidewaiter: %v\n", err)
		return run.ExitUsage
	}
	if len(args) == 0 {
		args = []string{"--help"}
	}
	kctx, err := parser.Parse(args)
	if err != nil {
		fmt.Fprintf(stderr, "tidewaiter: %v\nTry: tidewaiter %s\n", err, helpFor(err))
		return run.ExitUsage
	}
	level := cmd.LogLevel
	if level == "" {
		level = "error"
	}
	log, err := run.NewLogger(run.LogConfig{Level: level, Format: "text"}, stderr)
	if err != nil {
		fmt.Fprintf(stderr, "tidewaiter: %v\n", err)
		return run.ExitUsage
	}
	kctx.BindTo(ctx, (*context.Context)(nil))
	err = kctx.Run(&streams{in: stdin, out: stdout, err: stderr, log: log, config: cmd.Config, logLevel: cmd.LogLevel})
	if err == nil {
		return run.ExitOK
	}
	fmt.Fprintf(stderr, "tidewaiter: %v\n", err)
	var exit *exitError
	switch {
	case errors.As(err, &exit):
		return exit.code
	case errors.Is(err, run.ErrConfig):
		return run.ExitUsage
	}
	return run.ExitUnavailable
}

// newParser returns what reads a command line into cmd.
func newParser(cmd *root, stdout, stderr io.Writer) (*kong.Kong, error) {
	return kong.New(cmd,
		kong.Name("tidewaiter"),
		kong.Description("Boards every container image on arrival: lists what is inside, says what is known to be wrong with it,\nsigns that statement and keeps it true. Start with: tidewaiter demo"),
		kong.UsageOnError(),
		kong.ConfigureHelp(kong.HelpOptions{Compact: true, WrapUpperBound: 110}),
		kong.Vars{"version": version},
		kong.Writers(stdout, stderr),
		kong.Exit(func(code int) { panic(errParsed(code)) }),
	)
}

func helpFor(err error) string {
	var parse *kong.ParseError
	if errors.As(err, &parse) && parse.Context != nil && parse.Context.Command() != "" {
		return parse.Context.Command() + " --help"
	}
	return "--help"
}
