// Package bustest holds the promises of package bus as one suite, which must
// hold on every broker it is to run on.
package bustest

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"log/slog"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cloudevents/sdk-go/v2/event"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/bus"
)

// Broker is a running Kafka.
type Broker struct {
	// Config reaches it. Prefix and timings are set by the suite.
	Config bus.Config
	// Stop takes it away and Start brings it back with the same address and
	// data. Both may be nil: then the test that needs them is not run.
	Stop, Start func(t *testing.T)
}

// limit is how long the suite waits for anything.
const limit = time.Minute

// Run runs the suite. broker is called once a test; it may return the same
// broker each time, since every test has topics and groups of its own.
func Run(t *testing.T, broker func(t *testing.T) Broker) {
	tests := []struct {
		name string
		run  func(r *rig)
	}{
		{"outputs follow from their input", outputs},
		{"a replay gives the same outputs", replay},
		{"both content modes are read", contentModes},
		{"events that share a topic are told apart", sharedTopic},
		{"members leave and join in mid-flight", members},
		{"failures find their end", failures},
		{"a lost dead letter topic stops the partition", deadLetterFirst},
		{"later is out of the way", later},
		{"later is out of the way of those behind it", laterBehindMany},
		{"not yet is no attempt", notYet},
		{"an outage is waited for", unavailable},
		{"a stale commit is refused", staleCommit},
		{"the broker goes and comes back", brokerGone},
		{"bulk gets what fresh leaves and its share", lanes},
		{"batches", batches},
		{"a failing batch is taken apart", failingBatch},
		{"the event in hand is finished at a stop", drain},
		{"what does not finish in time is handled again", drainExceeded},
		{"dead letters are listed, read and replayed", deadLetters},
		{"replays at once send a letter once", replaysAtOnce},
		{"a killed replay is gone on with", replayKilled},
		{"dropped letters are out of sight", dropped},
		{"a summary counts kinds", summary},
		{"lag is what waits", lag},
		{"what was sent before a moment is read or not", readUpTo},
		{"what is too large is refused", tooLarge},
		{"what is too large to be deferred is a dead letter", tooLargeToDefer},
		{"many events at once are stored", manyAtOnce},
		{"tail reads without a group", tail},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			b := broker(t)
			r := &rig{T: t, broker: b, cfg: b.Config}
			r.cfg.Prefix = "t" + random() + "."
			r.cfg.Partitions = 4
			r.cfg.Attempts = 3
			r.cfg.RetryBackoff = 10 * time.Millisecond
			r.cfg.SessionTimeout = 6 * time.Second
			r.cfg.RebalanceTimeout = 6 * time.Second
			r.cfg.Drain = 4 * time.Second
			tt.run(r)
		})
	}
}

func random() string {
	b := make([]byte, 5)
	_, _ = rand.Read(b)
	return hex.EncodeToString(b)
}

// rig is what a test works with.
type rig struct {
	*testing.T
	broker Broker
	cfg    bus.Config
}

// bus returns a service's bus, closed at the end of the test.
func (r *rig) bus(service string) *bus.Bus {
	r.Helper()
	log := slog.New(slog.NewTextHandler(r.Output(), nil)).With("service", service)
	b, err := bus.New(r.cfg, service, log, prometheus.NewRegistry())
	r.must(err)
	r.Cleanup(func() {
		if err := b.Close(); err != nil {
			r.Errorf("close: %v", err)
		}
	})
	return b
}

func (r *rig) must(err error) {
	r.Helper()
	if err != nil {
		r.Fatal(err)
	}
}

// consume starts a consumer and returns what stops it and waits for its end.
func (r *rig) consume(b *bus.Bus, s bus.Subscription) (stop func()) {
	r.Helper()
	r.must(b.EnsureTopics(r.Context(), s.Events...))
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- b.Consume(ctx, s) }()
	stop = sync.OnceFunc(func() {
		cancel()
		select {
		case err := <-ended:
			if err != nil {
				r.Errorf("consume: %v", err)
			}
		case <-time.After(limit):
			r.Error("consume did not end")
		}
	})
	r.Cleanup(stop)
	// Every test starts from a member that has its partitions.
	r.eventually("joined", func() bool {
		select {
		case err := <-ended:
			r.Fatalf("consume ended: %v", err)
		default:
		}
		_, err := b.Lag(r.Context())
		return err == nil && b.Ready() == nil && b.Joined()
	})
	return stop
}

// eventually waits for a condition.
func (r *rig) eventually(what string, cond func() bool) {
	r.Helper()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	end := time.After(limit)
	for !cond() {
		select {
		case <-tick.C:
		case <-end:
			r.Fatalf("not reached: %s", what)
		}
	}
}

// caughtUp waits until nothing waits for the service any more.
func (r *rig) caughtUp(b *bus.Bus) {
	r.Helper()
	r.eventually("lag 0", func() bool {
		all, err := b.Lag(r.Context())
		if err != nil || len(all) == 0 {
			return false
		}
		for _, n := range all {
			if n != 0 {
				return false
			}
		}
		return true
	})
}

// pushed returns an image.pushed event.
func (r *rig) pushed(key string, n int, lane string) event.Event {
	r.Helper()
	ev, err := bus.NewEvent(contracts.ImagePushedV1, fmt.Sprintf("r.example/%s:%d", key, n), contracts.ImagePushed{
		Registry: "r.example", Repository: key, Tag: strconv.Itoa(n), Cause: "push",
	})
	r.must(err)
	bus.Key(&ev, "r.example/"+key)
	ev.SetExtension(contracts.ExtLane, lane)
	ev.SetID(fmt.Sprintf("%s-%d", key, n))
	return ev
}

// publish stores n events of each key, numbered from 0, in turns.
func (r *rig) publish(b *bus.Bus, lane string, n int, keys ...string) {
	r.Helper()
	r.must(b.EnsureTopics(r.Context(), contracts.ImagePushedV1))
	var evs []event.Event
	for i := range n {
		for _, k := range keys {
			evs = append(evs, r.pushed(k, i, lane))
		}
	}
	r.must(b.Publish(r.Context(), evs...))
}

// topic returns where events of a name and lane travel.
func (r *rig) topic(b *bus.Bus, name, lane string) string {
	r.Helper()
	topic, err := b.TopicOf(name, lane)
	r.must(err)
	return topic
}

// read returns everything that is in a topic now, in order of partition and offset.
func (r *rig) read(b *bus.Bus, topics ...string) []bus.Tailed {
	r.Helper()
	var all []bus.Tailed
	r.must(b.ReadAll(r.Context(), topics, func(m bus.Tailed) error {
		all = append(all, m)
		return nil
	}))
	slices.SortFunc(all, func(x, y bus.Tailed) int {
		if c := strings.Compare(x.Topic, y.Topic); c != 0 {
			return c
		}
		if x.Partition != y.Partition {
			return x.Partition - y.Partition
		}
		return int(x.Offset - y.Offset)
	})
	return all
}

// journal remembers what handlers saw.
type journal struct {
	mu   sync.Mutex
	seen []string
}

func (j *journal) add(s string) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.seen = append(j.seen, s)
}

func (j *journal) all() []string {
	j.mu.Lock()
	defer j.mu.Unlock()
	return slices.Clone(j.seen)
}

func (j *journal) len() int {
	j.mu.Lock()
	defer j.mu.Unlock()
	return len(j.seen)
}

func (j *journal) count(s string) int {
	n := 0
	for _, x := range j.all() {
		if x == s {
			n++
		}
	}
	return n
}

// distinct returns what was seen, each once, in order of the first time.
func (j *journal) distinct() []string {
	var out []string
	known := make(map[string]bool)
	for _, s := range j.all() {
		if !known[s] {
			known[s] = true
			out = append(out, s)
		}
	}
	return out
}

// ordered says which key was first seen out of order, "" when none was. What
// was seen is "key-number".
func (j *journal) ordered() string {
	next := make(map[string]int)
	for _, s := range j.distinct() {
		i := strings.LastIndex(s, "-")
		n, err := strconv.Atoi(s[i+1:])
		if err != nil || n != next[s[:i]] {
			return s
		}
		next[s[:i]]++
	}
	return ""
}
