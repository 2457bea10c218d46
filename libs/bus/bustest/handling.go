package bustest

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cloudevents/sdk-go/v2/event"
	"github.com/segmentio/kafka-go"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/bus"
)

var errTrouble = errors.New("trouble")

// observe is the handler that makes a tag.observed of each image.pushed.
func observe(_ context.Context, in event.Event) ([]event.Event, error) {
	push, err := bus.Decode[contracts.ImagePushed](in)
	if err != nil {
		return nil, err
	}
	out, err := bus.NewEvent(contracts.TagObservedV1, in.Subject(), contracts.TagObserved{
		Registry: push.Registry, Repository: push.Repository, Tag: push.Tag,
	})
	if err != nil {
		return nil, err
	}
	bus.Key(&out, push.Registry+"/"+push.Repository)
	return []event.Event{out}, nil
}

func outputs(r *rig) {
	b := r.bus("planner")
	r.must(b.EnsureTopics(r.Context(), contracts.ImagePushedV1, contracts.TagObservedV1))
	r.consume(b, bus.Subscription{Events: []string{contracts.ImagePushedV1}, Handler: observe})
	in := r.pushed("app", 7, contracts.LaneBulk)
	start := "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
	in.SetExtension(contracts.ExtTraceparent, start)
	r.must(b.Publish(r.Context(), in))

	topic := r.topic(b, contracts.TagObservedV1, contracts.LaneBulk)
	var got []bus.Tailed
	r.eventually("the output", func() bool { got = r.read(b, topic); return len(got) == 1 })
	out := got[0]
	if out.Err != nil {
		r.Fatal(out.Err)
	}
	want := contracts.OutputID("planner", "/services/planner", "app-7", contracts.TypePrefix+contracts.TagObservedV1, in.Subject())
	for _, c := range []struct{ what, got, want string }{
		{"id", out.Event.ID(), want},
		{"source", out.Event.Source(), "/services/planner"},
		{"subject", out.Event.Subject(), in.Subject()},
		{"lane", fmt.Sprint(out.Event.Extensions()[contracts.ExtLane]), contracts.LaneBulk},
		{"starting trace", fmt.Sprint(out.Event.Extensions()[contracts.ExtTraceparent]), start},
		{"key", out.Key, "r.example/app"},
		{"content type", out.Headers["content-type"], "application/cloudevents+json"},
		{"trace of the hop", out.Headers["traceparent"][:36], start[:36]},
	} {
		if c.got != c.want {
			r.Errorf("%s: %q, want %q", c.what, c.got, c.want)
		}
	}
	if out.Headers["traceparent"] == start {
		r.Error("the hop has no span of its own")
	}
	bulk := r.read(b, r.topic(b, contracts.ImagePushedV1, contracts.LaneBulk))
	if len(bulk) != 1 {
		r.Errorf("%d events in the bulk lane, want 1", len(bulk))
	}
}

func replay(r *rig) {
	b := r.bus("planner")
	r.must(b.EnsureTopics(r.Context(), contracts.ImagePushedV1, contracts.TagObservedV1))
	r.consume(b, bus.Subscription{Events: []string{contracts.ImagePushedV1}, Handler: observe})
	r.publish(b, contracts.LaneFresh, 5, "a", "b")
	r.publish(b, contracts.LaneFresh, 5, "a", "b")
	var got []bus.Tailed
	topic := r.topic(b, contracts.TagObservedV1, contracts.LaneFresh)
	r.eventually("all outputs", func() bool { got = r.read(b, topic); return len(got) == 20 })
	ids := make(map[string]int)
	for _, m := range got {
		ids[m.Event.ID()]++
	}
	if len(ids) != 10 {
		r.Errorf("%d distinct ids, want 10: %v", len(ids), ids)
	}
}

// kafkaWriter writes messages as foreign producers would.
func (r *rig) write(msgs ...kafka.Message) {
	r.Helper()
	w := &kafka.Writer{
		Addr: kafka.TCP(r.cfg.Brokers...), Balancer: &kafka.Hash{}, RequiredAcks: kafka.RequireAll,
		BatchTimeout: time.Millisecond, Transport: &kafka.Transport{TLS: r.cfg.TLS},
	}
	defer func() {
		r.must(w.Close())
		w.Transport.(*kafka.Transport).CloseIdleConnections() //nolint:forcetypeassert // set above
	}()
	r.must(w.WriteMessages(r.Context(), msgs...))
}

func contentModes(r *rig) {
	b := r.bus("planner")
	var seen journal
	r.consume(b, bus.Subscription{Events: []string{contracts.ImagePushedV1}, Handler: func(_ context.Context, in event.Event) ([]event.Event, error) {
		push, err := bus.Decode[contracts.ImagePushed](in)
		if err != nil {
			return nil, err
		}
		seen.add(in.ID() + " " + in.Subject() + " " + push.Repository)
		return nil, nil
	}})
	typ := contracts.TypePrefix + contracts.ImagePushedV1
	topic := r.topic(b, contracts.ImagePushedV1, contracts.LaneFresh)
	r.write(
		kafka.Message{
			Topic: topic, Value: []byte(`{"repository":"binary"}`),
			Headers: []kafka.Header{
				{Key: "ce_specversion", Value: []byte("1.0")},
				{Key: "ce_id", Value: []byte("1")},
				{Key: "ce_source", Value: []byte("/x")},
				{Key: "ce_type", Value: []byte(typ)},
				{Key: "ce_subject", Value: []byte("s")},
				{Key: "content-type", Value: []byte("application/json")},
			},
		},
		kafka.Message{
			Topic:   topic,
			Value:   []byte(`{"specversion":"1.0","id":"2","source":"/x","type":"` + typ + `","subject":"s","data":{"repository":"structured"}}`),
			Headers: []kafka.Header{{Key: "Content-Type", Value: []byte("application/cloudevents+json; charset=utf-8")}},
		},
	)
	r.eventually("both", func() bool { return seen.len() == 2 })
	got := seen.all()
	slices.Sort(got)
	if want := []string{"1 s binary", "2 s structured"}; !slices.Equal(got, want) {
		r.Errorf("got %q, want %q", got, want)
	}
}

// sharedTopic: the finding events share a topic, and a service may want one of them.
func sharedTopic(r *rig) {
	b := r.bus("ticketer")
	var seen journal
	r.consume(b, bus.Subscription{
		Events: []string{contracts.FindingOpenedV1, contracts.FindingClosedV1},
		Handler: func(_ context.Context, in event.Event) ([]event.Event, error) {
			seen.add(in.Type())
			return nil, nil
		},
	})
	names := []string{contracts.FindingOpenedV1, contracts.FindingChangedV1, contracts.FindingClosedV1}
	for _, name := range names {
		ev, err := bus.NewEvent(name, "problem", contracts.Problem{Key: "problem"})
		r.must(err)
		r.must(b.Publish(r.Context(), ev))
	}
	r.caughtUp(b)
	want := []string{contracts.TypePrefix + contracts.FindingOpenedV1, contracts.TypePrefix + contracts.FindingClosedV1}
	if got := seen.all(); !slices.Equal(got, want) {
		r.Errorf("handled %v, want %v", got, want)
	}
}

func members(r *rig) {
	const each = 25
	keys := []string{"a", "b", "c", "d", "e", "f", "g", "h", "i", "j"}
	total := each * len(keys)
	first := r.bus("planner")
	r.must(first.EnsureTopics(r.Context(), contracts.ImagePushedV1, contracts.TagObservedV1))
	var seen journal
	s := bus.Subscription{Events: []string{contracts.ImagePushedV1}, Handler: func(ctx context.Context, in event.Event) ([]event.Event, error) {
		// Work that takes a while, so that stops and joins meet it.
		select {
		case <-time.After(3 * time.Millisecond):
		case <-ctx.Done():
			return nil, ctx.Err()
		}
		seen.add(in.ID())
		return observe(ctx, in)
	}}
	r.publish(first, contracts.LaneFresh, each, keys...)
	stopFirst := r.consume(first, s)
	r.eventually("a start", func() bool { return seen.len() > total/10 })
	second := r.bus("planner")
	r.consume(second, s)
	r.eventually("some more", func() bool { return seen.len() > total/3 })
	stopFirst()
	third := r.bus("planner")
	r.consume(third, s)
	r.eventually("all events", func() bool { return len(seen.distinct()) == total })
	r.caughtUp(third)
	if key := seen.ordered(); key != "" {
		r.Errorf("%s was handled out of order", key)
	}
	ids := make(map[string]bool)
	for _, m := range r.read(third, r.topic(third, contracts.TagObservedV1, contracts.LaneFresh)) {
		ids[m.Event.ID()] = true
	}
	if len(ids) != total {
		r.Errorf("%d distinct outputs, want %d", len(ids), total)
	}
	r.Logf("%d events, %d handled again", total, seen.len()-total)
}

func failures(r *rig) {
	b := r.bus("planner")
	r.must(b.EnsureTopics(r.Context(), contracts.ImagePushedV1, contracts.ImageFailedV1))
	var seen journal
	var dead atomic.Int32
	r.consume(b, bus.Subscription{
		Events: []string{contracts.ImagePushedV1},
		Handler: func(ctx context.Context, in event.Event) ([]event.Event, error) {
			seen.add(in.ID())
			switch in.ID() {
			case "a-1": // works at the third attempt
				if bus.Attempt(ctx) < 3 {
					return nil, errTrouble
				}
			case "a-2":
				return nil, bus.Permanent(fmt.Errorf("read https://joe:hunter2@r.example/v2/: %w", errTrouble))
			case "a-3":
				panic("a bug")
			case "a-4":
				return nil, errTrouble
			}
			return nil, nil
		},
		OnDead: func(in event.Event, reason error) []event.Event {
			dead.Add(1)
			ev, err := bus.NewEvent(contracts.ImageFailedV1, in.Subject(), contracts.ImageFailed{Stage: "planner", Message: reason.Error()})
			if err != nil {
				return nil
			}
			return []event.Event{ev}
		},
	})
	topic := r.topic(b, contracts.ImagePushedV1, contracts.LaneFresh)
	r.publish(b, contracts.LaneFresh, 5, "a")
	garbage := [][]byte{nil, []byte("no event"), []byte(`{"specversion":"1.0","id":""}`), {0xff, 0xfe, 0}}
	for i, g := range garbage {
		m := kafka.Message{Topic: topic, Key: []byte("r.example/a"), Value: g}
		if i%2 == 0 {
			m.Headers = []kafka.Header{{Key: "content-type", Value: []byte("application/cloudevents+json")}}
		}
		r.write(m)
	}
	r.must(b.Publish(r.Context(), r.pushed("a", 5, contracts.LaneFresh)))
	r.eventually("the last event", func() bool { return seen.count("a-5") == 1 })
	r.caughtUp(b)
	for id, want := range map[string]int{"a-0": 1, "a-1": 3, "a-2": 1, "a-3": 1, "a-4": 3, "a-5": 1} {
		if got := seen.count(id); got != want {
			r.Errorf("%s: %d attempts, want %d", id, got, want)
		}
	}
	if key := seen.ordered(); key != "" {
		r.Errorf("%s was handled out of order", key)
	}
	letters, err := b.ListDeadLetters(r.Context(), bus.DeadLetterFilter{})
	r.must(err)
	if len(letters) != 3+len(garbage) {
		r.Fatalf("%d dead letters, want %d: %+v", len(letters), 3+len(garbage), letters)
	}
	byID := make(map[string]contracts.DeadLetter)
	for _, l := range letters {
		byID[l.Subject+"|"+l.Origin] = l
		if l.Service != "planner" || !strings.HasPrefix(l.Origin, topic+"/") || time.Since(l.Time) > limit {
			r.Errorf("dead letter %+v", l)
		}
		if strings.Contains(l.Reason, "hunter2") {
			r.Errorf("a credential in %q", l.Reason)
		}
	}
	for i, want := range []struct {
		reason   string
		attempts int
	}{{"r.example/v2/: trouble", 1}, {"handler panicked: a bug", 1}, {"after 3 attempts: trouble", 3}} {
		l := letters[i]
		if !strings.Contains(l.Reason, want.reason) || l.Attempts != want.attempts || l.Subject != fmt.Sprintf("r.example/a:%d", i+2) {
			r.Errorf("dead letter %+v, want %+v", l, want)
		}
	}
	if failed := r.read(b, r.topic(b, contracts.ImageFailedV1, "")); len(failed) != 3 || dead.Load() != 3 {
		r.Errorf("%d events about dead letters, want 3", len(failed))
	}
}

func deadLetterFirst(r *rig) {
	b := r.bus("planner")
	var seen journal
	r.consume(b, bus.Subscription{Events: []string{contracts.ImagePushedV1}, Handler: func(_ context.Context, in event.Event) ([]event.Event, error) {
		seen.add(in.ID())
		return nil, bus.Permanent(errTrouble)
	}})
	topic := r.topic(b, contracts.ImagePushedV1, contracts.LaneFresh)
	transport := &kafka.Transport{TLS: r.cfg.TLS}
	defer transport.CloseIdleConnections()
	admin := &kafka.Client{Addr: kafka.TCP(r.cfg.Brokers...), Transport: transport}
	res, err := admin.DeleteTopics(r.Context(), &kafka.DeleteTopicsRequest{Topics: []string{topic + ".planner.dlq"}})
	r.must(err)
	for _, err := range res.Errors {
		r.must(err)
	}
	r.publish(b, contracts.LaneFresh, 1, "a")
	r.eventually("the handler gives up", func() bool { return seen.len() == 1 })
	all, err := b.Lag(r.Context())
	r.must(err)
	if all[topic] != 1 {
		r.Errorf("lag %v: the event was committed without its dead letter", all)
	}
	created, err := admin.CreateTopics(r.Context(), &kafka.CreateTopicsRequest{Topics: []kafka.TopicConfig{
		{Topic: topic + ".planner.dlq", NumPartitions: 1, ReplicationFactor: 1},
	}})
	r.must(err)
	for _, err := range created.Errors {
		r.must(err)
	}
	r.caughtUp(b)
	letters, err := b.ListDeadLetters(r.Context(), bus.DeadLetterFilter{})
	r.must(err)
	if len(letters) != 1 || seen.len() != 1 {
		r.Errorf("%d dead letters after %d attempts, want 1 and 1", len(letters), seen.len())
	}
}

func later(r *rig) {
	b := r.bus("planner")
	var (
		mu   sync.Mutex
		when = make(map[string]time.Time)
		seen journal
	)
	started := time.Now()
	delays := map[string]time.Duration{"a-0": 1500 * time.Millisecond, "a-1": 300 * time.Millisecond}
	r.consume(b, bus.Subscription{Events: []string{contracts.ImagePushedV1}, Handler: func(ctx context.Context, in event.Event) ([]event.Event, error) {
		if d, ok := delays[in.ID()]; ok && bus.Attempt(ctx) == 1 {
			mu.Lock()
			when[in.ID()] = time.Now().Add(d)
			mu.Unlock()
			return nil, bus.Later(errTrouble, time.Now().Add(d))
		}
		mu.Lock()
		defer mu.Unlock()
		if due, ok := when[in.ID()]; ok && (time.Now().Before(due) || bus.Attempt(ctx) != 2) {
			seen.add("early " + in.ID())
		}
		seen.add(in.ID())
		return nil, nil
	}})
	r.publish(b, contracts.LaneFresh, 3, "a")
	r.eventually("all", func() bool { return seen.len() == 3 })
	if got, want := seen.all(), []string{"a-2", "a-1", "a-0"}; !slices.Equal(got, want) {
		r.Errorf("handled %v, want %v", got, want)
	}
	r.caughtUp(b)
	if letters, err := b.ListDeadLetters(r.Context(), bus.DeadLetterFilter{}); err != nil || len(letters) != 0 {
		r.Errorf("dead letters %v, %v", letters, err)
	}
	r.Logf("took %s", time.Since(started))
}

// laterBehindMany: a registry whose events wait for an hour, more of them than
// are kept in memory, stops no event of another.
func laterBehindMany(r *rig) {
	const many = 5_000
	b := r.bus("planner")
	s := bus.Subscription{Events: []string{contracts.ImagePushedV1}}
	handler := func(seen *journal) bus.Handler {
		return func(_ context.Context, in event.Event) ([]event.Event, error) {
			seen.add(in.ID())
			return nil, nil
		}
	}
	r.must(b.EnsureTopics(r.Context(), s.Events...))
	retry := r.topic(b, contracts.ImagePushedV1, contracts.LaneFresh) + ".planner.retry"
	deferred := func(id string, due time.Time) kafka.Message {
		value := `{"specversion":"1.0","id":"` + id + `","source":"/x","type":"` + contracts.TypePrefix + contracts.ImagePushedV1 + `","data":{}}`
		return kafka.Message{Topic: retry, Key: []byte("one partition"), Value: []byte(value), Headers: []kafka.Header{
			{Key: "content-type", Value: []byte("application/cloudevents+json")},
			{Key: "tidewaiter-due", Value: []byte(due.UTC().Format(time.RFC3339Nano))},
		}}
	}
	var first journal
	s.Handler = handler(&first)
	stop := r.consume(b, s)
	hour := time.Now().Add(time.Hour)
	msgs := make([]kafka.Message, 0, many+3)
	for i := range many {
		msgs = append(msgs, deferred(fmt.Sprint("waits-", i), hour))
	}
	now := time.Now()
	msgs = append(msgs, deferred("soon", now.Add(time.Second)), deferred("now", now), deferred("at once", time.Time{}))
	r.write(msgs...)
	r.eventually("what is due", func() bool { return first.len() >= 3 })
	stop()
	got := first.all()
	slices.Sort(got)
	if want := []string{"at once", "now", "soon"}; !slices.Equal(got, want) {
		r.Errorf("handled %v, want %v", got, want)
	}
	// Nothing that waits was passed: who takes over reads all of it again.
	lag, err := b.Lag(r.Context())
	r.must(err)
	if lag[retry] != many+3 {
		r.Errorf("%d events wait, want %d", lag[retry], many+3)
	}
	var second journal
	s.Handler = handler(&second)
	r.consume(b, s)
	r.write(deferred("one more", time.Now()))
	r.eventually("what is due after a restart", func() bool { return second.count("one more") == 1 })
}

// notYet: what was not its turn is no attempt, however often.
func notYet(r *rig) {
	b := r.bus("planner")
	const times = 210 // more than an event may be deferred
	var turns atomic.Int32
	var seen journal
	r.consume(b, bus.Subscription{Events: []string{contracts.ImagePushedV1}, Handler: func(ctx context.Context, in event.Event) ([]event.Event, error) {
		if turns.Add(1) <= times {
			return nil, bus.NotYet(errTrouble, time.Now())
		}
		seen.add(fmt.Sprint("attempt ", bus.Attempt(ctx)))
		return nil, nil
	}})
	r.publish(b, contracts.LaneFresh, 1, "a")
	r.eventually("handled", func() bool { return seen.len() == 1 })
	if got := seen.all(); got[0] != "attempt 1" {
		r.Errorf("handled as %v", got)
	}
	r.caughtUp(b)
	if letters, err := b.ListDeadLetters(r.Context(), bus.DeadLetterFilter{}); err != nil || len(letters) != 0 {
		r.Errorf("dead letters %v, %v", letters, err)
	}
}

func unavailable(r *rig) {
	b := r.bus("planner")
	var gone atomic.Bool
	gone.Store(true)
	var attempts atomic.Int32
	var seen journal
	r.consume(b, bus.Subscription{Events: []string{contracts.ImagePushedV1}, Handler: func(_ context.Context, in event.Event) ([]event.Event, error) {
		attempts.Add(1)
		if gone.Load() {
			return nil, bus.Unavailable(errTrouble)
		}
		seen.add(in.ID())
		return nil, nil
	}})
	r.publish(b, contracts.LaneFresh, 3, "a")
	r.eventually("more attempts than an ordinary failure gets", func() bool { return attempts.Load() > 5 })
	if err := b.Ready(); !errors.Is(err, errTrouble) {
		r.Errorf("ready: %v", err)
	}
	gone.Store(false)
	r.eventually("all", func() bool { return seen.len() == 3 })
	r.caughtUp(b)
	if err := b.Ready(); err != nil {
		r.Errorf("ready: %v", err)
	}
	if key := seen.ordered(); key != "" {
		r.Errorf("%s was handled out of order", key)
	}
}
