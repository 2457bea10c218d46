package matcher

import (
	"context"
	"log/slog"
	"os"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cloudevents/sdk-go/v2/event"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/bus"
	"github.com/tidewaiter/tidewaiter/libs/embedded"
)

// TestRequestOutlivesAnOutage: a request for a snapshot that cannot be had waits
// for longer than deferrals are counted, and is answered when it is there.
func TestRequestOutlivesAnOutage(t *testing.T) {
	const deferrals = 220 // the bus gives up after 200 that count
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	log := slog.New(slog.DiscardHandler)
	servers, err := embedded.Start(ctx, embedded.Options{Dir: t.TempDir()}, log)
	if err != nil {
		t.Fatal(err)
	}
	b, err := bus.New(bus.Config{
		Brokers: []string{servers.KafkaAddress}, Username: servers.KafkaUsername, Password: servers.KafkaPassword, Partitions: 1,
	}, Name, log, nil)
	if err != nil {
		t.Fatal(err)
	}
	blobs, inventory := stored(t)
	path := builtinFile(t)
	replace(t, path, 100)
	newer := path + ".newer"
	replace(t, newer, 200)
	s := newService(t, blobs, path)
	s.now = func() time.Time { return time.Now().Add(-waitForSnapshot) } // nothing is waited for
	if err := b.EnsureTopics(ctx, contracts.ImageRematchV1, contracts.ImageMatchedV1, contracts.ImageFailedV1); err != nil {
		t.Fatal(err)
	}
	request := newEvent(t, contracts.ImageRematchV1, contracts.ImageRematch{
		Image: image(), Kind: "image", Inventory: inventory, Snapshot: contracts.SnapshotRef{Sequence: 200}, Reason: contracts.RematchAdvisories,
	})
	if err := b.Publish(ctx, request); err != nil {
		t.Fatal(err)
	}
	var handled atomic.Int32
	ended, died := make(chan error, 1), make(chan error, 1)
	answered, stop := context.WithCancel(ctx)
	go func() {
		ended <- b.Consume(answered, bus.Subscription{
			Events: []string{contracts.ImageRematchV1},
			Handler: func(ctx context.Context, in event.Event) ([]event.Event, error) {
				if handled.Add(1) == deferrals {
					if err := os.Rename(newer, path); err != nil {
						return nil, bus.Permanent(err)
					}
				}
				out, err := s.Handle(ctx, in)
				if err == nil {
					stop()
				}
				return out, err
			},
			OnDead: func(_ event.Event, reason error) []event.Event {
				died <- reason
				return nil
			},
		})
	}()
	select {
	case err := <-ended:
		if err != nil || handled.Load() < deferrals {
			t.Errorf("ended after %d deliveries: %v", handled.Load(), err)
		}
	case reason := <-died:
		t.Errorf("dead after %d deliveries: %v", handled.Load(), reason)
		stop()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	case <-ctx.Done():
		t.Errorf("%d deliveries, no answer", handled.Load())
	}
	if err := b.Close(); err != nil {
		t.Error(err)
	}
	cancel()
	if err := servers.Wait(); err != nil {
		t.Error(err)
	}
}
