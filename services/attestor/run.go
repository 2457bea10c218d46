package attestor

import (
	"context"
	"fmt"
	"log/slog"
	"os"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/bus"
	"github.com/tidewaiter/tidewaiter/libs/run"
	"github.com/tidewaiter/tidewaiter/services/matcher/policy"
)

// Run runs the service until ctx ends. It is a run.Service.
func Run(ctx context.Context, env *run.Env) error {
	cfg := DefaultConfig()
	if err := env.Section(&cfg); err != nil {
		return fmt.Errorf("configuration of %s: %w", Name, err)
	}
	rules, err := loadPolicy(cfg.Policy)
	if err != nil {
		return err
	}
	signer, err := cfg.Signer(os.LookupEnv)
	if err != nil {
		return err
	}
	db, err := env.DB(ctx)
	if err != nil {
		return fmt.Errorf("open database of %s: %w", Name, err)
	}
	if err := Migrate(ctx, db); err != nil {
		return err
	}
	registries, err := env.Registry()
	if err != nil {
		return fmt.Errorf("open registries of %s: %w", Name, err)
	}
	locks, err := env.Redis()
	if err != nil {
		return fmt.Errorf("open redis of %s: %w", Name, err)
	}
	b, err := env.Bus()
	if err != nil {
		return fmt.Errorf("open bus of %s: %w", Name, err)
	}
	err = b.EnsureTopics(ctx, contracts.ImageMatchedV1, contracts.ImageAttestedV1, contracts.ImageFailedV1)
	if err != nil {
		return fmt.Errorf("create topics of %s: %w", Name, err)
	}
	env.Log.InfoContext(ctx, "signing", slog.String("signer", signer.ID()), slog.String("policy", rules.Digest()), slog.Duration("validity", cfg.Validity))
	a := New(cfg, Deps{DB: db, Registry: registries, Locks: locks, Signer: signer, Policy: rules, Log: env.Log})
	env.Started()
	err = b.Consume(ctx, bus.Subscription{Events: []string{contracts.ImageMatchedV1}, Handler: a.Handle, OnDead: a.OnDead})
	if err != nil {
		return fmt.Errorf("consume as %s: %w", Name, err)
	}
	return nil
}

func loadPolicy(path string) (*policy.Policy, error) {
	if path == "" {
		return policy.Default(), nil
	}
	p, err := policy.Load(path)
	if err != nil {
		return nil, fmt.Errorf("attestor.policy: %w: %w", err, run.ErrConfig)
	}
	return p, nil
}
