package main

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/tidewaiter/tidewaiter/libs/registry"
	"github.com/tidewaiter/tidewaiter/libs/run"
	"github.com/tidewaiter/tidewaiter/services/advisor"
	"github.com/tidewaiter/tidewaiter/services/analyzer"
	"github.com/tidewaiter/tidewaiter/services/assembler"
	"github.com/tidewaiter/tidewaiter/services/attestor"
	"github.com/tidewaiter/tidewaiter/services/catalog"
	"github.com/tidewaiter/tidewaiter/services/gatekeeper"
	"github.com/tidewaiter/tidewaiter/services/intake"
	"github.com/tidewaiter/tidewaiter/services/matcher"
	"github.com/tidewaiter/tidewaiter/services/planner"
	"github.com/tidewaiter/tidewaiter/services/sweeper"
	"github.com/tidewaiter/tidewaiter/services/ticketer"
)

// configCmd holds the commands about configuration.
type configCmd struct {
	Check configCheckCmd `cmd:"" help:"Report every mistake in a configuration file, with its line; nothing is connected to."`
}

type configCheckCmd struct {
	File string `arg:"" help:"Configuration file." type:"path"`
}

func (*configCheckCmd) Help() string {
	return "Prints what was understood, without any secret.\n\nExample:\n  tidewaiter config check tidewaiter.yaml"
}

func (c *configCheckCmd) Run(s *streams) error {
	cfg, err := run.Load(c.File, os.LookupEnv)
	if err != nil {
		return usage(err)
	}
	var problems []error
	var sources intake.Sources
	for _, section := range []struct {
		name string
		into any
	}{
		{"sources", &sources},
		{"intake", ptr(intake.DefaultConfig())},
		{"planner", ptr(planner.DefaultConfig())},
		{"analyzer", ptr(analyzer.DefaultConfig())},
		{"assembler", ptr(assembler.DefaultConfig())},
		{"matcher", ptr(matcher.DefaultConfig())},
		{"attestor", ptr(attestor.DefaultConfig())},
		{"catalog", ptr(catalog.DefaultConfig())},
		{"advisor", ptr(advisor.DefaultConfig())},
		{"ticketer", ptr(ticketer.DefaultConfig())},
		{"gatekeeper", ptr(gatekeeper.DefaultConfig())},
		{"sweeper", ptr(sweeper.DefaultConfig())},
	} {
		if !cfg.Has(section.name) {
			continue // a process runs some services; what it does not name it does not need
		}
		problems = append(problems, cfg.CheckSection(section.name, section.into))
		if sources, ok := section.into.(*intake.Sources); ok {
			if err := sweeper.CheckSources(*sources); err != nil {
				problems = append(problems, fmt.Errorf("%s: section \"sources\": %w", c.File, err))
			}
		}
	}
	if _, err := registry.New(cfg.Registries, s.log); err != nil {
		problems = append(problems, fmt.Errorf("%s: section \"registries\": %w", c.File, err))
	}
	if err := errors.Join(problems...); err != nil {
		return usage(err)
	}
	for _, w := range sources.Warnings() {
		fmt.Fprintf(s.err, "warning: %s\n", w)
	}
	password := func(file, env string) string {
		if file == "" && env == "" {
			return "no password"
		}
		return "password set"
	}
	fmt.Fprintf(s.out, "%s is good\n", c.File)
	k, r := cfg.Kafka, cfg.Redis
	fmt.Fprintf(s.out, "  kafka       %s, user %q, %s, prefix %q\n", strings.Join(k.Brokers, ","), k.Username, password(k.PasswordFile, k.PasswordEnv), k.Prefix)
	fmt.Fprintf(s.out, "  redis       %s, %s\n", run.RedactURL(r.URL), password(r.PasswordFile, r.PasswordEnv))
	fmt.Fprintf(s.out, "  database    %s\n", run.RedactURL(cfg.Database.URL))
	for _, h := range cfg.Registries {
		fmt.Fprintf(s.out, "  registry    %s, user %q\n", h.Name, h.Username)
	}
	return nil
}

func ptr[T any](v T) *T { return &v }
