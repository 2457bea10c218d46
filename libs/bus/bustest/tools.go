package bustest

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"sync/atomic"
	"time"

	"github.com/cloudevents/sdk-go/v2/event"

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
	if _, err := tool.ReplayDeadLetters(r.Context(), bus.DeadLetterFilter{IDs: []string{raw.ID}}, false); !errors.Is(err, bus.ErrNotReplayable) {
		r.Errorf("replay of a raw body: %v", err)
	}

	mended.Store(true)
	replay := func(f bus.DeadLetterFilter, force bool, want int) {
		r.Helper()
		n, err := tool.ReplayDeadLetters(r.Context(), f, force)
		r.must(err)
		if n != want {
			r.Errorf("replayed %d, want %d", n, want)
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
		if l.Replayed != (l.Service == "planner") {
			r.Errorf("replayed is %v in %+v", l.Replayed, l)
		}
	}
	if bulk := r.read(b, r.topic(b, contracts.ImagePushedV1, contracts.LaneBulk)); len(bulk) != 2 {
		r.Errorf("%d events in the bulk topic, want 2: a replay goes where it came from", len(bulk))
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
