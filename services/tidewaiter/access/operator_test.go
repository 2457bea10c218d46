package access_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/cloudevents/sdk-go/v2/event"
	"github.com/twmb/franz-go/pkg/kfake"
	"github.com/twmb/franz-go/pkg/kgo"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/bus"
	"github.com/tidewaiter/tidewaiter/services/tidewaiter/access"
	"github.com/tidewaiter/tidewaiter/services/tidewaiter/access/accesstest"
)

// The embedded Kafka says the same of an operator as a real one (TestPrincipalsInKafka).
func TestOperator(t *testing.T) {
	const password = "of a principal"
	cluster, err := kfake.NewCluster(kfake.NumBrokers(1), kfake.EnableSASL(), kfake.EnableACLs(), kfake.Superuser(bus.ScramSHA512, "admin", password))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(cluster.Close)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	admin, err := accesstest.Client(cluster.ListenAddrs(), nil, "admin", password)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(admin.Close)
	cfg := bus.Config{Brokers: cluster.ListenAddrs(), Prefix: "tw.", Username: "tidewaiter-cli", Password: password}
	for _, s := range access.Services() {
		if err := accesstest.Users(ctx, admin, password, "tidewaiter-"+s.Name); err != nil {
			t.Fatal(err)
		}
	}
	if err := accesstest.Run(ctx, admin, access.Kafka(access.Services(), access.Names{Prefix: cfg.Prefix}, 1, 1)); err != nil {
		t.Fatal(err)
	}
	intake, _ := access.Find("intake")
	own := cfg
	own.Username = "tidewaiter-intake"
	b, err := bus.New(own, "intake", slog.New(slog.DiscardHandler), nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = b.Close() })
	dead(ctx, t, b, intake)
	operate(ctx, t, admin, cfg, "intake")
}

// operate checks what deploy/security.md says that an operator's user needs for
// dead letters: Read lists, Write drops, Delete purges; to replay, Read and Write
// on the topic that an event came from.
func operate(ctx context.Context, t *testing.T, admin *kgo.Client, cfg bus.Config, own string) {
	t.Helper()
	if err := accesstest.Users(ctx, admin, cfg.Password, cfg.Username); err != nil {
		t.Fatal(err)
	}
	topic := cfg.Prefix + "image.pushed.v1." + own + ".dlq"
	b, err := bus.New(cfg, "cli", slog.New(slog.DiscardHandler), nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = b.Close() })
	list := func() int {
		letters, err := b.ListDeadLetters(ctx, bus.DeadLetterFilter{})
		if err != nil {
			t.Fatalf("list: %v", err)
		}
		return len(letters)
	}
	allow := func(operation string) {
		t.Helper()
		script := fmt.Sprintf("topic %s --partitions 1 --replication-factor 1\nallow --allow-principal User:%s --topic %[1]s --operation %[3]s\n", topic, cfg.Username, operation)
		if err := accesstest.Run(ctx, admin, script); err != nil {
			t.Fatal(err)
		}
	}
	if n := list(); n != 0 {
		t.Errorf("who may nothing sees %d dead letters", n)
	}
	allow("Read")
	if n := list(); n == 0 {
		t.Error("who may read sees no dead letter")
	}
	drop := func(purge bool) error {
		_, err := b.DropDeadLetters(ctx, bus.DeadLetterFilter{}, "e", "looked at", purge)
		return err
	}
	if err := drop(false); err == nil || !strings.Contains(err.Error(), "Topic Authorization Failed") {
		t.Errorf("who may only read drops: %v", err)
	}
	allow("Write")
	if err := drop(false); err != nil {
		t.Errorf("who may write drops: %v", err)
	}
	if err := drop(true); err == nil || !strings.Contains(err.Error(), "needs the Delete operation") {
		t.Errorf("who may not delete purges: %v", err)
	}
	allow("Delete")
	if err := drop(true); err != nil {
		t.Errorf("who may delete purges: %v", err)
	}

	topic = cfg.Prefix + "image.pushed.v1.planner.dlq"
	allow("Read")
	allow("Write")
	refuse(ctx, t, cfg, list)
	replay := func(limit int) (bus.ReplayResult, error) {
		return b.ReplayDeadLetters(ctx, bus.DeadLetterFilter{Limit: limit}, "e", false)
	}
	topic = cfg.Prefix + "image.pushed.v1"
	allow("Read")
	if res, err := replay(1); res.Sent != 0 || err == nil || !strings.Contains(err.Error(), "Topic Authorization Failed") {
		t.Errorf("who may not write where the letter came from replays it: %+v, %v", res, err)
	}
	allow("Write")
	if res, err := replay(0); err != nil || res.Sent == 0 { // without the one that the other has in hand still
		t.Errorf("who may read and write there replays nothing: %+v, %v", res, err)
	}
}

// refuse has planner give up on events until there are two dead letters.
func refuse(ctx context.Context, t *testing.T, cfg bus.Config, letters func() int) {
	t.Helper()
	as := func(service string) *bus.Bus {
		own := cfg
		own.Username = strings.TrimSuffix(cfg.Username, "cli") + service
		b, err := bus.New(own, service, slog.New(slog.DiscardHandler), nil)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = b.Close() })
		return b
	}
	if err := as("intake").Publish(ctx, newEvent(t, contracts.ImagePushedV1), newEvent(t, contracts.ImagePushedV1)); err != nil {
		t.Fatal(err)
	}
	planner := as("planner")
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	ended := make(chan error, 1)
	go func() {
		ended <- planner.Consume(ctx, bus.Subscription{
			Events: []string{contracts.ImagePushedV1, contracts.ImageDeletedV1},
			Handler: func(context.Context, event.Event) ([]event.Event, error) {
				return nil, bus.Permanent(errors.New("refused"))
			},
		})
	}()
	for letters() < 2 {
		select {
		case err := <-ended:
			t.Fatalf("planner cannot consume: %v", err)
		case <-ctx.Done():
			t.Fatal("planner gave up on nothing")
		case <-time.After(50 * time.Millisecond):
		}
	}
	stop()
	if err := <-ended; err != nil {
		t.Errorf("planner: %v", err)
	}
}
