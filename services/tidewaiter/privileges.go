package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/tidewaiter/tidewaiter/libs/bus"
	"github.com/tidewaiter/tidewaiter/libs/run"
	"github.com/tidewaiter/tidewaiter/libs/store"
	"github.com/tidewaiter/tidewaiter/services/tidewaiter/access"
)

// privilegesCmd prints the least that each service must be allowed.
type privilegesCmd struct {
	Server  string `arg:"" help:"kafka, postgres, redis or registry." enum:"kafka,postgres,redis,registry"`
	User    string `help:"What users of Kafka and Redis are called." default:"tidewaiter-{service}"`
	Role    string `help:"What roles of PostgreSQL are called." default:"tidewaiter_{service}"`
	AdminDB string `name:"apply-with-env" help:"postgres: do it, with the URL of an owner that this environment variable holds; the common tables are made first." placeholder:"NAME"`
	Output  string `help:"script (for the server's own tools) or json (one line a permission)." enum:"script,json" default:"script" short:"o"`
}

func (*privilegesCmd) Help() string {
	return "What is printed makes topics, users and permissions with the servers' own tools; it holds no password.\n" +
		"deploy/security.md says how it is used.\n\n" +
		"Examples:\n  tidewaiter privileges kafka --config tidewaiter.yaml > kafka.sh\n  tidewaiter privileges postgres | psql"
}

func (c *privilegesCmd) Run(ctx context.Context, s *streams) error {
	cfg, err := run.Load(s.config, os.LookupEnv)
	if err != nil {
		return err
	}
	names := access.Names{Prefix: cfg.Kafka.Prefix, Keys: cfg.Redis.Prefix, User: c.User, Role: c.Role}
	if c.AdminDB != "" {
		return c.apply(ctx, names)
	}
	services := access.Services()
	if c.Output == "json" {
		return printLines(s, access.Permissions(c.Server, services, names, published(cfg)))
	}
	switch c.Server {
	case "kafka":
		partitions, replication := cmp.Or(cfg.Kafka.Partitions, bus.DefaultPartitions), cmp.Or(cfg.Kafka.Replication, bus.DefaultReplication)
		fmt.Fprint(s.out, access.Kafka(services, names, partitions, replication))
	case "postgres":
		fmt.Fprint(s.out, access.Postgres(services, names))
	case "redis":
		fmt.Fprint(s.out, access.Redis(services, names))
	default:
		fmt.Fprint(s.out, access.Registries(services, published(cfg)))
	}
	return nil
}

// published returns advisor's repository, without its registry.
func published(cfg *run.Config) string {
	publish, _ := cfg.Fill("advisor", map[string]any{})["publish"].(string)
	_, repository, ok := strings.Cut(publish, "/")
	if !ok {
		return "ADVISOR/REPOSITORY" // it is not configured
	}
	return repository
}

// apply makes the common tables and the roles.
func (c *privilegesCmd) apply(ctx context.Context, names access.Names) error {
	url := os.Getenv(c.AdminDB)
	switch {
	case c.Server != "postgres":
		return usage(errors.New("--apply-with-env is for postgres; run what is printed for the others"))
	case !strings.HasPrefix(url, "postgres"):
		return usage(fmt.Errorf("environment variable %s does not hold a postgres:// URL", c.AdminDB))
	}
	db, err := store.Open(ctx, url) // makes the common tables
	if err != nil {
		return unavailable(fmt.Errorf("open the database: %w", err))
	}
	_, err = db.ExecContext(ctx, access.Postgres(access.Services(), names))
	if err := errors.Join(err, db.Close()); err != nil {
		return unavailable(fmt.Errorf("make roles: %w", err))
	}
	return nil
}
