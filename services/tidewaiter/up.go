package main

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/tidewaiter/tidewaiter/libs/run"
	"github.com/tidewaiter/tidewaiter/services/tidewaiter/allinone"
)

// upCmd runs everything in one process on embedded servers.
type upCmd struct {
	Data           string `help:"Where everything is kept; created when absent." type:"path" default:"./tidewaiter-data" env:"TIDEWAITER_DATA" placeholder:"DIR"`
	Advisories     string `help:"Advisory snapshot (see: advisories build), or a folder or URL of OSV archives that is followed; default: what --config says, else the small built-in set." placeholder:"FILE|DIR|URL"`
	Policy         string `help:"Policy file; default: the default policy." type:"path" placeholder:"FILE"`
	Listen         string `help:"Where intake takes webhooks, host:port; default: intake.listen of --config, else 127.0.0.1:8480." placeholder:"ADDRESS"`
	CatalogListen  string `help:"Where catalog's API listens; default: catalog.listen of --config, else 127.0.0.1:8481." placeholder:"ADDRESS"`
	MonitorListen  string `help:"Where /healthz, /readyz and /metrics are; default: http.listen of --config, else 127.0.0.1:8482." placeholder:"ADDRESS"`
	Gatekeeper     string `help:"Where gatekeeper answers AdmissionReviews (HTTPS), host:port; default: it does not run." placeholder:"ADDRESS"`
	RegistryListen string `help:"Where the embedded registry listens (loopback only)." default:"127.0.0.1:8485"`
}

func (*upCmd) Help() string {
	return "A configuration file (--config) adds registries, sources of webhooks, addresses, limits and optional services. Kafka, Redis,\n" +
		"the API's token and the keys that sign are always those in DIR; so is the database, unless the file names a PostgreSQL.\n" +
		"Registries on other machines reach intake only if it does not listen on loopback: --listen :8480.\n\n" +
		"Examples:\n  tidewaiter up\n  tidewaiter up --data /var/lib/tidewaiter --config tidewaiter.yaml --advisories advisories.db"
}

func (c *upCmd) Run(ctx context.Context, s *streams) error {
	cfg, err := run.Load(s.config, os.LookupEnv)
	if err != nil {
		return err
	}
	log, err := serviceLog(s, cfg)
	if err != nil {
		return err
	}
	file, follow, err := advisoriesFrom(c.Advisories)
	if err != nil {
		return err
	}
	all, err := allinone.Start(ctx, allinone.Options{
		Dir: c.Data, Config: cfg, Advisories: file, Follow: follow, Policy: c.Policy, Log: log, GatekeeperListen: c.Gatekeeper,
		IntakeListen:  cmp.Or(c.Listen, listen(cfg, "intake"), "127.0.0.1:8480"),
		CatalogListen: cmp.Or(c.CatalogListen, listen(cfg, "catalog"), "127.0.0.1:8481"),
		MonitorListen: cmp.Or(c.MonitorListen, cfg.HTTP.Listen, "127.0.0.1:8482"), RegistryListen: c.RegistryListen,
	})
	if err != nil {
		return err
	}
	if all.BuiltIn {
		fmt.Fprintln(s.err, "Advisories: the small built-in set. For all that is known: tidewaiter advisories build, then --advisories FILE.")
	}
	fmt.Fprintf(s.err, `Tidewaiter is up; interrupt to stop.
  webhooks   %s/hooks/<source id>
  registry   %s (user %s, password in %s/secrets/registry.password)
  catalog    %s
  health     %s/readyz
  public key %s/secrets/attestor.pub
`, all.Intake, all.Registry.Host, all.Registry.Username, c.Data, all.Catalog, all.Monitor, c.Data)
	<-ctx.Done()
	return all.Wait()
}

// listen returns where a section of the file has its service listen.
func listen(cfg *run.Config, section string) string {
	if at := cfg.Fill(section, map[string]any{})["listen"]; at != nil {
		return fmt.Sprint(at)
	}
	return ""
}

// advisoriesFrom says what a user named: a snapshot file, or something to follow.
func advisoriesFrom(name string) (file string, follow []string, err error) {
	if name == "" || strings.HasPrefix(name, "http://") || strings.HasPrefix(name, "https://") {
		return "", slices.DeleteFunc([]string{name}, func(s string) bool { return s == "" }), nil
	}
	info, err := os.Stat(name)
	if err != nil {
		return "", nil, usage(fmt.Errorf("advisories: %w", err))
	}
	path, err := filepath.Abs(name)
	if err != nil {
		return "", nil, usage(fmt.Errorf("advisories: %w", err))
	}
	if info.IsDir() {
		return "", []string{path}, nil
	}
	return path, nil, nil
}

// runCmd runs some services against real servers.
type runCmd struct {
	Services []string `arg:"" help:"intake, planner, analyzer, assembler, matcher, attestor, catalog, advisor, ticketer, gatekeeper, sweeper; or all (the optional ones where they are configured)." name:"service"`
}

func (*runCmd) Help() string {
	return "Kafka, Redis, PostgreSQL and the registries come from the configuration file and the environment.\n\n" +
		"Examples:\n  tidewaiter run all --config tidewaiter.yaml\n  tidewaiter run analyzer --config tidewaiter.yaml"
}

func (c *runCmd) Run(ctx context.Context, s *streams) error {
	cfg, err := checked(s, c.Services)
	if err != nil {
		return err
	}
	log, err := serviceLog(s, cfg)
	if err != nil {
		return err
	}
	services, err := chosen(c.Services, cfg)
	if err != nil {
		return err
	}
	return run.All(ctx, cfg, log, services...)
}

// chosen returns the named services; "all" are those of the pipeline and those
// others that are configured.
func chosen(names []string, cfg *run.Config) ([]run.Named, error) {
	all := append(allinone.Services(), allinone.Optional()...)
	if slices.Contains(names, "all") {
		return slices.DeleteFunc(all, func(s run.Named) bool {
			return !cfg.Has(s.Name) && slices.ContainsFunc(allinone.Optional(), func(o run.Named) bool { return o.Name == s.Name })
		}), nil
	}
	var out []run.Named
	for _, name := range names {
		i := slices.IndexFunc(all, func(s run.Named) bool { return s.Name == name })
		if i < 0 {
			return nil, usage(fmt.Errorf("there is no service %q", name))
		}
		out = append(out, all[i])
	}
	return out, nil
}

// serviceLog is what services log to: as the command line says, else as the
// configuration does.
func serviceLog(s *streams, cfg *run.Config) (*slog.Logger, error) {
	c := cfg.Log
	if s.logLevel != "" {
		c.Level = s.logLevel
	}
	return run.NewLogger(c, s.err)
}
