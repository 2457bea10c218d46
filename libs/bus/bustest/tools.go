package bustest

import (
	"bytes"
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

func deadLetters(r *rig) {
	b := r.bus("planner")
	var mended atomic.Bool
	var seen journal
	r.consume(b, bus.Subscription{Events: []string{contracts.ImagePushedV1}, Handler: func(_ context.Context, in event.Event) ([]event.Event, error) {
		if !mended.Load() {
			return nil, bus.Permanent(errors.New("broken " + in.ID()))
		}
		seen.add(in.ID())
		return nil, nil
	}})
	r.publish(b, contracts.LaneFresh, 2, "a")
	r.publish(b, contracts.LaneBulk, 1, "b")
	tool := r.bus("cli")
	list := func(f bus.DeadLetterFilter) []contracts.DeadLetter {
		letters, err := tool.ListDeadLetters(r.Context(), f)
		r.must(err)
		return letters
	}
	r.eventually("three dead letters", func() bool { return len(list(bus.DeadLetterFilter{})) == 3 })
	r.caughtUp(b)
	intake := r.bus("intake")
	body := []byte("\x00not json")
	r.must(intake.PublishDeadLetter(r.Context(), contracts.ImagePushedV1, "unexpected end", body, map[string]string{ //nolint:gosec // no real password: it must not be stored
		"user-agent": "registry/2", "Authorization": "Bearer abcdefgh", "X-Hub-Signature": "sha256=00", "x-url": "http://u:p@h/",
	}))

	for _, tt := range []struct {
		name string
		f    bus.DeadLetterFilter
		want int
	}{
		{"all", bus.DeadLetterFilter{}, 4},
		{"topic", bus.DeadLetterFilter{Topic: contracts.ImagePushedV1}, 4},
		{"lane", bus.DeadLetterFilter{Topic: contracts.ImagePushedV1 + contracts.BulkSuffix}, 1},
		{"other topic", bus.DeadLetterFilter{Topic: contracts.LayerRequestedV1}, 0},
		{"service", bus.DeadLetterFilter{Service: "planner"}, 3},
		{"reason", bus.DeadLetterFilter{Reason: "a-1"}, 1},
		{"old", bus.DeadLetterFilter{Older: time.Hour}, 0},
		{"young", bus.DeadLetterFilter{Younger: time.Hour}, 4},
		{"waiting", bus.DeadLetterFilter{Waiting: true}, 4},
	} {
		if got := list(tt.f); len(got) != tt.want {
			r.Errorf("%s: %d dead letters, want %d", tt.name, len(got), tt.want)
		}
	}

	raw := list(bus.DeadLetterFilter{Service: "intake"})[0]
	_, headers, stored, err := tool.ReadDeadLetter(r.Context(), raw.ID)
	r.must(err)
	if !bytes.Equal(stored, body) || headers["user-agent"] != "registry/2" || headers["x-url"] != "http://***@h/" {
		r.Errorf("read %q with %v", stored, headers)
	}
	for name := range headers {
		if name == "Authorization" || name == "X-Hub-Signature" {
			r.Errorf("header %s was stored", name)
		}
	}
	if _, _, _, err := tool.ReadDeadLetter(r.Context(), raw.ID+"0"); !errors.Is(err, bus.ErrNotFound) {
		r.Errorf("read of nothing: %v", err)
	}
	if _, err := tool.ReplayDeadLetters(r.Context(), bus.DeadLetterFilter{IDs: []string{raw.ID}}, "ada", false); !errors.Is(err, bus.ErrNotReplayable) {
		r.Errorf("replay of a raw body: %v", err)
	}

	mended.Store(true)
	replay := func(f bus.DeadLetterFilter, force bool, want int) {
		r.Helper()
		res, err := tool.ReplayDeadLetters(r.Context(), f, "ada", force)
		r.must(err)
		if res.Sent != want || res.Found+res.Busy+res.Gone != 0 {
			r.Errorf("replayed %+v, want %d", res, want)
		}
	}
	replay(bus.DeadLetterFilter{Reason: "a-1"}, false, 1)
	r.eventually("replayed", func() bool { return seen.count("a-1") == 1 })
	replay(bus.DeadLetterFilter{}, false, 2)
	r.eventually("the others", func() bool { return seen.len() == 3 })
	replay(bus.DeadLetterFilter{}, false, 0)
	replay(bus.DeadLetterFilter{Reason: "a-1"}, true, 1)
	r.eventually("again", func() bool { return seen.count("a-1") == 2 })
	for _, l := range list(bus.DeadLetterFilter{}) {
		if l.Replayed != (l.Service == "planner") || l.Replayed != (l.ReplayedBy == "ada" && l.ReplayedAt != nil) {
			r.Errorf("replayed is %v in %+v", l.Replayed, l)
		}
	}
	if bulk := r.read(b, r.topic(b, contracts.ImagePushedV1, contracts.LaneBulk)); len(bulk) != 2 {
		r.Errorf("%d events in the bulk topic, want 2: a replay goes where it came from", len(bulk))
	}
}

// bury puts n events into planner's dead letters and returns their ids, oldest first.
func (r *rig) bury(b *bus.Bus, n int) []string {
	r.Helper()
	stop := r.consume(b, bus.Subscription{Events: []string{contracts.ImagePushedV1}, Handler: func(_ context.Context, in event.Event) ([]event.Event, error) {
		return nil, bus.Permanent(fmt.Errorf("no manifest for %q at 10.0.0.7:5000", in.Subject()))
	}})
	r.publish(b, contracts.LaneFresh, n, "a")
	r.eventually("dead letters", func() bool {
		letters, err := b.ListDeadLetters(r.Context(), bus.DeadLetterFilter{})
		r.must(err)
		return len(letters) == n
	})
	r.caughtUp(b)
	stop()
	letters, err := b.ListDeadLetters(r.Context(), bus.DeadLetterFilter{})
	r.must(err)
	ids := make([]string, n)
	for i, l := range letters {
		ids[i] = l.ID
	}
	return ids
}

// replaysAtOnce: what several replay at the same time is sent once.
func replaysAtOnce(r *rig) {
	const letters, operators = 250, 3
	r.bury(r.bus("planner"), letters)
	results := make([]bus.ReplayResult, operators)
	var group sync.WaitGroup
	for i := range operators {
		tool := r.bus("cli")
		group.Go(func() {
			var err error
			results[i], err = tool.ReplayDeadLetters(r.Context(), bus.DeadLetterFilter{}, fmt.Sprint("operator ", i), false)
			if err != nil {
				r.Error(err)
			}
		})
	}
	group.Wait()
	sent := 0
	for _, res := range results {
		sent += res.Sent
		if res.Sent+res.Replayed+res.Busy != letters {
			r.Errorf("%d letters, but %+v", letters, res)
		}
	}
	b := r.bus("cli")
	if got := len(r.read(b, r.topic(b, contracts.ImagePushedV1, contracts.LaneFresh))); sent != letters || got != 2*letters {
		r.Errorf("%d sent, %d in the topic, want %d and %d: %+v", sent, got, letters, 2*letters, results)
	}
	if res, err := b.ReplayDeadLetters(r.Context(), bus.DeadLetterFilter{}, "ada", false); err != nil || res.Replayed != letters || res.Sent != 0 {
		r.Errorf("once more: %+v, %v", res, err)
	}
}

// marker writes what a replay that was killed has left behind a letter.
func (r *rig) marker(id, what, run string, age time.Duration) {
	r.Helper()
	topic, letter, _ := strings.Cut(id, "/")
	at := time.Now().Add(-age).UTC()
	r.write(kafka.Message{Topic: topic, Key: []byte(letter), Headers: []kafka.Header{
		{Key: what, Value: []byte(letter)},
		{Key: "tidewaiter-run", Value: []byte(run)},
		{Key: "tidewaiter-by", Value: []byte("a killed one")},
		{Key: "tidewaiter-time", Value: []byte(at.Format(time.RFC3339Nano))},
	}})
}

// replayKilled: a replay that was killed is gone on with; what it had sent is
// not sent again, and while it may still be at work nobody interferes.
func replayKilled(r *rig) {
	b := r.bus("planner")
	ids := r.bury(b, 4)
	topic := r.topic(b, contracts.ImagePushedV1, contracts.LaneFresh)
	const old, young = 10 * time.Minute, time.Second
	r.marker(ids[0], "tidewaiter-claimed", "one", old) // killed before it sent
	r.marker(ids[1], "tidewaiter-claimed", "one", old) // killed after
	r.write(kafka.Message{Topic: topic, Value: []byte("{}"), Headers: []kafka.Header{{Key: "tidewaiter-replay-of", Value: []byte(ids[1])}}})
	r.marker(ids[2], "tidewaiter-claimed", "two", young) // perhaps at work
	r.marker(ids[3], "tidewaiter-claimed", "two", young) // given back
	r.marker(ids[3], "tidewaiter-released", "two", young)
	before := len(r.read(b, topic))

	res, err := b.ReplayDeadLetters(r.Context(), bus.DeadLetterFilter{}, "ada", false)
	r.must(err)
	if want := (bus.ReplayResult{Sent: 2, Found: 1, Busy: 1}); res != want {
		r.Errorf("replayed %+v, want %+v", res, want)
	}
	if n := len(r.read(b, topic)) - before; n != 2 {
		r.Errorf("%d events were sent, want 2", n)
	}
	letters, err := b.ListDeadLetters(r.Context(), bus.DeadLetterFilter{})
	r.must(err)
	for _, l := range letters {
		if l.Replayed != (l.ID != ids[2]) {
			r.Errorf("%s: replayed is %v", l.ID, l.Replayed)
		}
	}
	// What the killed one has sent long ago does not stand in the way of a
	// replay that is asked for.
	res, err = b.ReplayDeadLetters(r.Context(), bus.DeadLetterFilter{IDs: ids[1:2]}, "ada", true)
	r.must(err)
	if want := (bus.ReplayResult{Sent: 1}); res != want {
		r.Errorf("replayed again %+v, want %+v", res, want)
	}
}

// dropped: what was dropped is out of sight and not replayed; a whole prefix of
// it is deleted when that is asked for, and nothing else.
func dropped(r *rig) {
	b := r.bus("planner")
	ids := r.bury(b, 5)
	drop := func(f bus.DeadLetterFilter, purge bool, want bus.DropResult) {
		r.Helper()
		res, err := b.DropDeadLetters(r.Context(), f, "ada@ops", "seen; token=abcdef", purge)
		r.must(err)
		if res != want {
			r.Errorf("drop %+v, want %+v", res, want)
		}
	}
	list := func(f bus.DeadLetterFilter) []string {
		r.Helper()
		letters, err := b.ListDeadLetters(r.Context(), f)
		r.must(err)
		var got []string
		for _, l := range letters {
			got = append(got, l.ID)
			if l.Dropped != (l.DroppedBy == "ada@ops" && l.DroppedAt != nil && l.DropReason == "seen; token=***") {
				r.Errorf("who and why is not said: %+v", l)
			}
		}
		return got
	}
	same := func(what string, got []string, want ...string) {
		r.Helper()
		if !slices.Equal(got, want) {
			r.Errorf("%s: %q, want %q", what, got, want)
		}
	}
	drop(bus.DeadLetterFilter{IDs: []string{ids[0], ids[1], ids[3]}}, false, bus.DropResult{Dropped: 3})
	same("listed", list(bus.DeadLetterFilter{}), ids[2], ids[4])
	same("with the dropped", list(bus.DeadLetterFilter{Dropped: true}), ids...)
	same("the oldest", list(bus.DeadLetterFilter{Dropped: true, Limit: 2}), ids[:2]...)
	if _, err := b.ReplayDeadLetters(r.Context(), bus.DeadLetterFilter{IDs: ids[3:4]}, "ada", false); !errors.Is(err, bus.ErrDropped) {
		r.Errorf("replay of a dropped letter: %v", err)
	}
	res, err := b.ReplayDeadLetters(r.Context(), bus.DeadLetterFilter{Limit: 1}, "ada", false)
	r.must(err)
	if want := (bus.ReplayResult{Sent: 1, Dropped: 3}); res != want {
		r.Errorf("replay of all %+v, want %+v", res, want)
	}
	if res, err = b.ReplayDeadLetters(r.Context(), bus.DeadLetterFilter{IDs: ids[3:4]}, "ada", true); err != nil || res.Sent != 1 {
		r.Errorf("forced replay of a dropped letter: %+v, %v", res, err)
	}
	if _, err := b.DropDeadLetters(r.Context(), bus.DeadLetterFilter{IDs: []string{ids[0] + "0"}}, "ada", "", true); !errors.Is(err, bus.ErrNotFound) {
		r.Errorf("drop of nothing: %v", err)
	}

	drop(bus.DeadLetterFilter{IDs: ids[:1]}, true, bus.DropResult{Before: 1, Purged: 2})
	same("the prefix is gone", list(bus.DeadLetterFilter{Dropped: true}), ids[2:]...)
	drop(bus.DeadLetterFilter{}, true, bus.DropResult{Dropped: 2, Before: 1, Purged: 3})
	same("all are gone", list(bus.DeadLetterFilter{Dropped: true}))
	r.must(b.PublishDeadLetter(r.Context(), contracts.ImagePushedV1, "not JSON", []byte("x"), nil))
	if after := list(bus.DeadLetterFilter{}); len(after) != 1 {
		r.Errorf("what comes after a purge: %q", after)
	}
}

// summary: failures of one kind count as one.
func summary(r *rig) {
	b := r.bus("planner")
	ids := r.bury(b, 3)
	_, err := b.DropDeadLetters(r.Context(), bus.DeadLetterFilter{IDs: ids[:1]}, "ada", "", false)
	r.must(err)
	r.must(r.bus("intake").PublishDeadLetter(r.Context(), contracts.ImagePushedV1, "not JSON", []byte("x"), nil))
	letters, err := b.ListDeadLetters(r.Context(), bus.DeadLetterFilter{Dropped: true})
	r.must(err)
	sums := bus.SummarizeDeadLetters(letters)
	if len(sums) != 2 {
		r.Fatalf("%d kinds, want 2: %+v", len(sums), sums)
	}
	if s := sums[0]; s.Count != 3 || s.Dropped != 1 || s.Replayed != 0 || s.Service != "planner" || s.Reason != "no manifest for … at …" ||
		s.Topic != letters[0].Topic || s.Newest.Before(s.Oldest) {
		r.Errorf("summary %+v", s)
	}
	if s := sums[1]; s.Count != 1 || s.Reason != "not JSON" || s.Service != "intake" {
		r.Errorf("summary %+v", s)
	}
}

func lag(r *rig) {
	b := r.bus("planner")
	hold, held := make(chan struct{}), make(chan struct{}, 100)
	r.consume(b, bus.Subscription{Events: []string{contracts.ImagePushedV1}, Handler: func(ctx context.Context, _ event.Event) ([]event.Event, error) {
		held <- struct{}{}
		select {
		case <-hold:
			return nil, nil
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}})
	r.publish(b, contracts.LaneFresh, 10, "a")
	<-held
	all, err := b.Lag(r.Context())
	r.must(err)
	if n := all[r.topic(b, contracts.ImagePushedV1, "")]; n != 10 {
		r.Errorf("lag %v, want 10", all)
	}
	close(hold)
	r.caughtUp(b)
}

// readUpTo holds the last of three events back, which were sent one after the other.
func readUpTo(r *rig) {
	b := r.bus("planner")
	hold, held := make(chan struct{}), make(chan struct{}, 1)
	r.consume(b, bus.Subscription{Events: []string{contracts.ImagePushedV1}, Handler: func(ctx context.Context, in event.Event) ([]event.Event, error) {
		if !strings.HasSuffix(in.ID(), "a-2") {
			return nil, nil
		}
		held <- struct{}{}
		select {
		case <-hold:
			return nil, nil
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}})
	read := func(at time.Time) bool {
		r.Helper()
		read, err := b.ReadUpTo(r.Context(), at, contracts.ImagePushedV1)
		r.must(err)
		return read
	}
	if !read(time.Now()) {
		r.Error("nothing was sent, and it is not read")
	}
	r.must(b.Publish(r.Context(), r.pushed("a", 0, contracts.LaneFresh), r.pushed("a", 1, contracts.LaneBulk)))
	r.caughtUp(b)
	if !read(time.Now()) {
		r.Error("everything was handled, and it is not read")
	}
	before := time.Now()
	r.must(b.Publish(r.Context(), r.pushed("a", 2, contracts.LaneBulk)))
	<-held
	after := time.Now().Add(time.Second)
	if !read(before) || read(after) {
		r.Errorf("while one is handled: up to the moment before it %v, want true; after it %v, want false", read(before), read(after))
	}
	close(hold)
	r.caughtUp(b)
	if !read(after) {
		r.Error("it was handled, and is not read")
	}
	if _, err := b.ReadUpTo(r.Context(), after, "nothing.v1"); !errors.Is(err, bus.ErrUnknownEvent) {
		r.Errorf("an unknown event: %v", err)
	}
}

func tooLarge(r *rig) {
	b := r.bus("planner")
	r.must(b.EnsureTopics(r.Context(), contracts.ImagePushedV1))
	ev := r.pushed("a", 0, contracts.LaneFresh)
	r.must(ev.SetData(event.ApplicationJSON, contracts.ImagePushed{Hint: strings.Repeat("x", bus.MaxMessageBytes)}))
	if err := b.Publish(r.Context(), ev); !errors.Is(err, bus.ErrTooLarge) {
		r.Errorf("publish: %v", err)
	}
	ev.SetType("dev.example.unknown")
	if err := b.Publish(r.Context(), ev); !errors.Is(err, bus.ErrUnknownEvent) {
		r.Errorf("publish: %v", err)
	}
	big := bytes.Repeat([]byte{'x'}, bus.MaxDeadLetterBytes)
	r.must(b.PublishDeadLetter(r.Context(), contracts.ImagePushedV1, "big", big, nil))
	if err := b.PublishDeadLetter(r.Context(), contracts.ImagePushedV1, "big", append(big, 'x'), nil); !errors.Is(err, bus.ErrTooLarge) {
		r.Errorf("dead letter: %v", err)
	}
	letters, err := b.ListDeadLetters(r.Context(), bus.DeadLetterFilter{})
	r.must(err)
	if len(letters) != 1 {
		r.Fatalf("%d dead letters, want 1", len(letters))
	}
	_, _, body, err := b.ReadDeadLetter(r.Context(), letters[0].ID)
	r.must(err)
	if !bytes.Equal(body, big) {
		r.Errorf("read %d bytes, want %d", len(body), len(big))
	}
	// The output of a handler is a lasting failure then, not an endless one.
	r.must(b.EnsureTopics(r.Context(), contracts.TagObservedV1))
	r.consume(b, bus.Subscription{Events: []string{contracts.ImagePushedV1}, Handler: func(_ context.Context, in event.Event) ([]event.Event, error) {
		out, err := bus.NewEvent(contracts.TagObservedV1, in.Subject(), contracts.TagObserved{Tag: strings.Repeat("x", bus.MaxMessageBytes)})
		return []event.Event{out}, err
	}})
	r.publish(b, contracts.LaneFresh, 1, "a")
	r.eventually("a dead letter", func() bool {
		l, err := b.ListDeadLetters(r.Context(), bus.DeadLetterFilter{Reason: "too large"})
		return err == nil && len(l) == 1
	})
}

// tooLargeToDefer: Kafka would never take what a foreign producer made larger
// than an event may be and its handler defers.
func tooLargeToDefer(r *rig) {
	b := r.bus("planner")
	r.consume(b, bus.Subscription{Events: []string{contracts.ImagePushedV1}, Handler: func(context.Context, event.Event) ([]event.Event, error) {
		return nil, bus.Later(errTrouble, time.Now().Add(time.Hour))
	}})
	value := `{"specversion":"1.0","id":"1","source":"/x","type":"` + contracts.TypePrefix + contracts.ImagePushedV1 + `","data":{"hint":"` + strings.Repeat("x", 1_048_300) + `"}}`
	r.write(kafka.Message{
		Topic: r.topic(b, contracts.ImagePushedV1, contracts.LaneFresh), Value: []byte(value),
		Headers: []kafka.Header{{Key: "content-type", Value: []byte("application/cloudevents+json")}},
	})
	r.eventually("a dead letter", func() bool {
		l, err := b.ListDeadLetters(r.Context(), bus.DeadLetterFilter{Reason: "cannot be deferred"})
		return err == nil && len(l) == 1
	})
	r.caughtUp(b)
}

// manyAtOnce: what one call publishes to one partition is more than Kafka takes
// in one batch.
func manyAtOnce(r *rig) {
	const events, size = 500, 14 << 10
	b := r.bus("catalog")
	r.must(b.EnsureTopics(r.Context(), contracts.ImagePushedV1))
	evs := make([]event.Event, events)
	for i := range evs {
		evs[i] = r.pushed("a", i, contracts.LaneFresh)
		r.must(evs[i].SetData(event.ApplicationJSON, contracts.ImagePushed{Hint: strings.Repeat("x", size)}))
	}
	r.must(b.Publish(r.Context(), evs...))
	got := r.read(b, r.topic(b, contracts.ImagePushedV1, contracts.LaneFresh))
	if len(got) != events {
		r.Fatalf("%d events stored, want %d", len(got), events)
	}
	for i := range got {
		if got[i].Event.ID() != evs[i].ID() {
			r.Fatalf("event %d is %s, want %s", i, got[i].Event.ID(), evs[i].ID())
		}
	}
}

func tail(r *rig) {
	b := r.bus("planner")
	r.publish(b, contracts.LaneFresh, 5, "a", "b")
	topic := r.topic(b, contracts.ImagePushedV1, contracts.LaneFresh)
	var seen journal
	end := errors.New("enough")
	err := b.Tail(r.Context(), []string{topic}, true, func(m bus.Tailed) error {
		if m.Err != nil {
			return m.Err
		}
		seen.add(m.Event.ID())
		if seen.len() == 10 {
			return end
		}
		return nil
	})
	if !errors.Is(err, end) {
		r.Errorf("tail: %v", err)
	}
	if key := seen.ordered(); key != "" || seen.len() != 10 {
		r.Errorf("saw %v", seen.all())
	}
	ctx, cancel := context.WithCancel(r.Context())
	done := make(chan error, 1)
	fresh := make(chan string, 10)
	go func() {
		done <- b.Tail(ctx, []string{topic}, false, func(m bus.Tailed) error {
			fresh <- m.Event.ID()
			return nil
		})
	}()
	// Where the end is taken cannot be seen from outside: publish until it is heard.
	n := 5
	r.eventually("a new event", func() bool {
		r.must(b.Publish(r.Context(), r.pushed("a", n, contracts.LaneFresh)))
		n++
		select {
		case id := <-fresh:
			return id >= "a-5"
		case <-time.After(100 * time.Millisecond):
			return false
		}
	})
	cancel()
	r.must(<-done)
}
