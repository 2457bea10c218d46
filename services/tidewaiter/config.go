package main

import (
	"fmt"
	"os"
	"strings"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/run"
)

// configCmd holds the commands about configuration.
type configCmd struct {
	Check configCheckCmd `cmd:"" help:"Report every mistake in a configuration file, with its line and its cure; nothing is connected to."`
}

type configCheckCmd struct {
	File      string   `arg:"" help:"Configuration file." type:"path"`
	Services  []string `arg:"" optional:"" help:"The services that shall run with it, as of 'tidewaiter run'; default: all where the file names a Kafka or Redis, else it is for 'tidewaiter up'." name:"service"`
	Elsewhere bool     `help:"The file is for another machine: the files and environment variables that it names are not looked for."`
	Output    string   `help:"text or json." enum:"text,json" default:"text"`
}

func (*configCheckCmd) Help() string {
	return "Exit code 2 when there are mistakes; warnings alone are 0. Secrets are never printed.\n\n" +
		"Examples:\n  tidewaiter config check tidewaiter.yaml\n  tidewaiter config check tidewaiter.yaml planner analyzer --output json"
}

func (c *configCheckCmd) Run(s *streams) error {
	checked, err := check(c.File, c.Services, c.Elsewhere, os.LookupEnv)
	if err != nil {
		return err
	}
	bad := checked.Err()
	if c.Output == "json" {
		list := checked.Problems
		if list == nil {
			list = []contracts.ConfigProblem{}
		}
		if err := printJSON(s.out, list); err != nil {
			return err
		}
	} else {
		for _, p := range checked.Problems {
			fmt.Fprintln(s.out, run.Line(p))
		}
	}
	if bad != nil {
		return usage(fmt.Errorf("%s cannot be used: %s", c.File, counted(checked.Problems)))
	}
	if c.Output == "text" {
		understood(s, c.File, checked)
	}
	return nil
}

// understood prints what the file means, without any secret.
func understood(s *streams, file string, cfg *run.Checked) {
	good := " is good"
	if len(cfg.Problems) > 0 {
		good += ", with " + counted(cfg.Problems)
	}
	fmt.Fprintf(s.out, "%s%s\n", file, good)
	password := func(file, env string) string {
		if file == "" && env == "" {
			return "no password"
		}
		return "password set"
	}
	k, r := cfg.Kafka, cfg.Redis
	fmt.Fprintf(s.out, "  kafka       %s, user %q, %s, prefix %q\n", strings.Join(k.Brokers, ","), k.Username, password(k.PasswordFile, k.PasswordEnv), k.Prefix)
	at := run.RedactURL(r.URL)
	switch {
	case r.Sentinel != nil:
		at = fmt.Sprintf("%q by sentinels %s", r.Sentinel.Master, strings.Join(r.Sentinel.Addresses, ","))
	case len(r.Cluster) > 0:
		at = "cluster " + strings.Join(r.Cluster, ",")
	}
	fmt.Fprintf(s.out, "  redis       %s, %s\n", at, password(r.PasswordFile, r.PasswordEnv))
	database := run.RedactURL(cfg.Database.URL)
	if env := cfg.Database.URLEnv; env != "" {
		database = "as " + env + " in the environment says"
	}
	fmt.Fprintf(s.out, "  database    %s\n", database)
	for _, h := range cfg.Registries {
		fmt.Fprintf(s.out, "  registry    %s, user %q\n", h.Name, h.Username)
	}
}

// counted says how many problems there are, of each kind.
func counted(list []contracts.ConfigProblem) string {
	mistakes := 0
	for _, p := range list {
		if p.Severity == contracts.ConfigError {
			mistakes++
		}
	}
	var parts []string
	for _, n := range []struct {
		count     int
		one, many string
	}{{mistakes, "mistake", "mistakes"}, {len(list) - mistakes, "warning", "warnings"}} {
		switch n.count {
		case 0:
		case 1:
			parts = append(parts, "1 "+n.one)
		default:
			parts = append(parts, fmt.Sprintf("%d %s", n.count, n.many))
		}
	}
	return strings.Join(parts, " and ")
}
