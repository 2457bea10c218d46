package bus_test

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"testing"
	"time"

	"github.com/cloudevents/sdk-go/v2/event"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/bus"
)

// replicaOfMatcher is a consumer that notes the order of what it handles.
type replicaOfMatcher struct {
	mu    sync.Mutex
	lanes []byte // 'f' or 'b', in the order of their starts
}

func (m *replicaOfMatcher) handle(_ context.Context, in event.Event) ([]event.Event, error) {
	lane, _ := in.Extensions()[contracts.ExtLane].(string)
	m.mu.Lock()
	m.lanes = append(m.lanes, lane[0])
	m.mu.Unlock()
	time.Sleep(time.Millisecond) // the work
	out, err := bus.NewEvent(contracts.ImageMatchedV1, in.Subject(), contracts.ImageMatched{})
	return []event.Event{out}, err
}

// share returns how many of the events between the first and the last fresh one
// were bulk, in per cent. The first twentieth is left out: what is fetched
// first is a matter of chance.
func (m *replicaOfMatcher) share() (fresh, bulk int, percent float64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	first, last := -1, -1
	for i, lane := range m.lanes {
		if lane == 'f' {
			if last = i; first < 0 {
				first = i
			}
		}
	}
	if first < 0 {
		return 0, 0, 0
	}
	for _, lane := range m.lanes[first+(last-first)/20 : last+1] {
		if lane == 'f' {
			fresh++
		} else {
			bulk++
		}
	}
	return fresh, bulk, 100 * float64(bulk) / float64(fresh+bulk)
}

// TestLanesUnderLoad: 100,000 re-matches wait at two replicas. While more fresh
// events come than they can handle, each of them gives bulk its 5 % and hardly
// more; what follows from an event stays in its lane. Shares are counted; how
// long a fresh event takes, beside what it takes with nothing waiting, is printed.
func TestLanesUnderLoad(t *testing.T) {
	if testing.Short() {
		t.Skip("100,000 events")
	}
	const waiting, pushes, probes = 100_000, 6_000, 20
	f := &fake{dir: t.TempDir()}
	f.start(t)
	t.Cleanup(func() { f.stop(t) })
	ctx, cancel := context.WithCancel(context.Background())
	log := slog.New(slog.DiscardHandler)
	open := func(service string) *bus.Bus {
		b, err := bus.New(bus.Config{Brokers: f.cluster.ListenAddrs(), Partitions: 4}, service, log, nil)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	catalog := open("catalog")
	if err := catalog.EnsureTopics(ctx, contracts.ImageRematchV1, contracts.ImageAssembledV1, contracts.ImageMatchedV1); err != nil {
		t.Fatal(err)
	}
	publish := func(name, lane string, from, n int) {
		t.Helper()
		for at := from; at < from+n; at += 2000 {
			var events []event.Event
			for i := at; i < min(at+2000, from+n); i++ {
				ev, err := bus.NewEvent(name, fmt.Sprintf("r.example/app@%s", contracts.DigestOf(fmt.Append(nil, i))), contracts.ImageRematch{})
				if err != nil {
					t.Fatal(err)
				}
				ev.SetExtension(contracts.ExtLane, lane)
				events = append(events, ev)
			}
			if err := catalog.Publish(ctx, events...); err != nil {
				t.Fatal(err)
			}
		}
	}
	replicas := []*replicaOfMatcher{{}, {}}
	var group sync.WaitGroup
	var buses []*bus.Bus
	for _, m := range replicas {
		b := open("matcher")
		buses = append(buses, b)
		group.Go(func() {
			err := b.Consume(ctx, bus.Subscription{
				Events: []string{contracts.ImageAssembledV1, contracts.ImageRematchV1}, Concurrency: 2, Handler: m.handle,
			})
			if err != nil {
				t.Error(err)
			}
		})
	}
	t.Cleanup(func() {
		cancel()
		group.Wait()
		for _, b := range append(buses, catalog) {
			if err := b.Close(); err != nil {
				t.Error(err)
			}
		}
	})
	count := func(lane byte) (n int) {
		for _, m := range replicas {
			m.mu.Lock()
			for _, l := range m.lanes {
				if l == lane {
					n++
				}
			}
			m.mu.Unlock()
		}
		return n
	}
	until := func(what string, done func() bool) {
		t.Helper()
		for deadline := time.Now().Add(5 * time.Minute); !done(); time.Sleep(2 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("not reached: %s", what)
			}
		}
	}
	until("both have partitions", func() bool { return buses[0].Joined() && buses[1].Joined() })
	fresh := 0
	probe := func() time.Duration {
		began := time.Now()
		for range probes {
			publish(contracts.ImageAssembledV1, contracts.LaneFresh, fresh, 1)
			fresh++
			until("a fresh event", func() bool { return count('f') == fresh })
		}
		return time.Since(began) / probes
	}
	idle := probe()
	publish(contracts.ImageRematchV1, contracts.LaneBulk, 1_000_000, waiting)
	until("bulk is under way", func() bool { return count('b') > 100 })
	loaded := probe()
	t.Logf("a fresh event takes %s with nothing waiting, %s with %d re-matches waiting", idle, loaded, waiting)

	for _, m := range replicas { // the share is counted from here
		m.mu.Lock()
		m.lanes = nil
		m.mu.Unlock()
	}
	publish(contracts.ImageAssembledV1, contracts.LaneFresh, fresh, pushes)
	until("the pushes", func() bool { return count('f') == pushes })
	for i, m := range replicas {
		n, bulk, percent := m.share()
		t.Logf("replica %d: %d fresh, %d bulk: %.1f %%", i, n, bulk, percent)
		if n == 0 || percent < 5 {
			t.Errorf("replica %d gave bulk %.1f %% (%d of %d), 5 %% are promised", i, percent, bulk, n+bulk)
		}
		if percent > 25 {
			t.Errorf("replica %d gave bulk %.1f %% while fresh events waited", i, percent)
		}
	}
	topic, err := catalog.TopicOf(contracts.ImageMatchedV1, contracts.LaneFresh)
	if err != nil {
		t.Fatal(err)
	}
	matched := 0
	until("what follows is in its lane", func() bool {
		matched = 0
		err := catalog.ReadAll(ctx, []string{topic}, func(m bus.Tailed) error {
			if m.Event.Extensions()[contracts.ExtLane] != contracts.LaneFresh {
				t.Errorf("%s is in the fresh lane", m.Event.Subject())
			}
			matched++
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		return matched >= pushes+2*probes
	})
	if matched != pushes+2*probes {
		t.Errorf("%d events in the fresh lane, want %d", matched, pushes+2*probes)
	}
}

// TestQuotaKeepsOthersFresh: a source pushes 10,000 times at once, then another
// source once. All in one lane, the one waits for nearly all of them; with a
// quota of 600, whose rest intake puts into the bulk lane, for little more than
// those. Counted are the events that are handled before it.
func TestQuotaKeepsOthersFresh(t *testing.T) {
	for _, tt := range []struct{ quota, least, most int }{
		{10_000, 8_000, 10_000},
		{600, 0, 1_200},
	} {
		f := &fake{dir: t.TempDir()}
		f.start(t)
		ctx, cancel := context.WithCancel(context.Background())
		b, err := bus.New(bus.Config{Brokers: f.cluster.ListenAddrs(), Partitions: 4}, "planner", slog.New(slog.DiscardHandler), nil)
		if err != nil {
			t.Fatal(err)
		}
		if err := b.EnsureTopics(ctx, contracts.ImagePushedV1); err != nil {
			t.Fatal(err)
		}
		var events []event.Event
		push := func(repository, lane string) {
			ev, err := bus.NewEvent(contracts.ImagePushedV1, "r.example/"+repository, contracts.ImagePushed{})
			if err != nil {
				t.Fatal(err)
			}
			bus.Key(&ev, ev.Subject())
			ev.SetExtension(contracts.ExtLane, lane)
			events = append(events, ev)
		}
		for i := range 10_000 {
			lane := contracts.LaneFresh
			if i >= tt.quota {
				lane = contracts.LaneBulk
			}
			push(fmt.Sprint("busy/", i%500), lane)
		}
		push("quiet/one", contracts.LaneFresh)
		if err := b.Publish(ctx, events...); err != nil {
			t.Fatal(err)
		}
		var mu sync.Mutex
		handled := 0
		before := make(chan int, 1)
		ended := make(chan error, 1)
		go func() {
			ended <- b.Consume(ctx, bus.Subscription{
				Events: []string{contracts.ImagePushedV1}, Concurrency: 4,
				Handler: func(_ context.Context, in event.Event) ([]event.Event, error) {
					mu.Lock()
					if handled++; in.Subject() == "r.example/quiet/one" {
						before <- handled - 1
					}
					mu.Unlock()
					time.Sleep(100 * time.Microsecond) // the work
					return nil, nil
				},
			})
		}()
		select {
		case n := <-before:
			t.Logf("quota %d: %d events of the busy source before the one of the other", tt.quota, n)
			if n < tt.least || n > tt.most {
				t.Errorf("quota %d: %d events before it, want %d to %d", tt.quota, n, tt.least, tt.most)
			}
		case <-time.After(3 * time.Minute):
			t.Error("it is not handled")
		}
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
		if err := b.Close(); err != nil {
			t.Error(err)
		}
		f.stop(t)
	}
}
