package ticketer

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/bus"
	"github.com/tidewaiter/tidewaiter/libs/run"
)

// recheckTick is how often Run looks for tickets to look at again.
const recheckTick = time.Minute

// Run runs the service until ctx ends. It is a run.Service.
func Run(ctx context.Context, env *run.Env) error {
	cfg := DefaultConfig()
	if err := env.Section(&cfg); err != nil {
		return fmt.Errorf("configuration of %s: %w", Name, err)
	}
	if len(cfg.Rules) == 0 {
		// Nothing is read, so that the first rules find every problem there is.
		env.Log.InfoContext(ctx, "no rules, so there are no tickets")
		<-ctx.Done()
		return nil
	}
	trackers, webhooks, err := cfg.Connect(os.LookupEnv, nil)
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
	b, err := env.Bus()
	if err != nil {
		return fmt.Errorf("open bus of %s: %w", Name, err)
	}
	findings := []string{contracts.FindingOpenedV1, contracts.FindingChangedV1, contracts.FindingClosedV1}
	if err := b.EnsureTopics(ctx, findings...); err != nil {
		return fmt.Errorf("create topics of %s: %w", Name, err)
	}
	env.Log.InfoContext(ctx, "ticketing", slog.Int("trackers", len(trackers)), slog.Int("webhooks", len(webhooks)), slog.Int("rules", len(cfg.Rules)))
	s := New(cfg, Deps{DB: db, Trackers: trackers, Webhooks: webhooks, Log: env.Log})
	env.Started()
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error {
		s.recheckForever(ctx)
		return nil
	})
	group.Go(func() error {
		if err := b.Consume(ctx, bus.Subscription{Events: findings, Handler: s.Handle}); err != nil {
			return fmt.Errorf("consume as %s: %w", Name, err)
		}
		return nil
	})
	return group.Wait()
}

// recheckForever runs Recheck now and then, until ctx ends. That it fails is
// no reason to stop: it is tried again.
func (s *Service) recheckForever(ctx context.Context) {
	tick := time.NewTicker(recheckTick)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if _, err := s.Recheck(ctx); err != nil && ctx.Err() == nil {
			s.Log.WarnContext(ctx, "look for double tickets", slog.Any("error", err))
		}
	}
}
