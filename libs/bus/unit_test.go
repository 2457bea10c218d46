package bus

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cloudevents/sdk-go/v2/binding"
	bindingtest "github.com/cloudevents/sdk-go/v2/binding/test"
	"github.com/cloudevents/sdk-go/v2/event"
	cetest "github.com/cloudevents/sdk-go/v2/test"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/segmentio/kafka-go"
	"pgregory.net/rapid"

	"github.com/tidewaiter/tidewaiter/contracts"
)

func TestClassify(t *testing.T) {
	due := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	for _, tt := range []struct {
		name string
		err  error
		want Outcome
		due  time.Time
	}{
		{"nil", nil, OutcomeOK, time.Time{}},
		{"plain", io.ErrUnexpectedEOF, OutcomeRetry, time.Time{}},
		{"permanent", Permanent(io.ErrUnexpectedEOF), OutcomePermanent, time.Time{}},
		{"unavailable", Unavailable(io.ErrUnexpectedEOF), OutcomeUnavailable, time.Time{}},
		{"later", Later(io.ErrUnexpectedEOF, due), OutcomeLater, due},
		{"wrapped", fmt.Errorf("do: %w", Later(io.ErrUnexpectedEOF, due)), OutcomeLater, due},
		{"the outermost counts", Permanent(fmt.Errorf("do: %w", Unavailable(io.ErrUnexpectedEOF))), OutcomePermanent, time.Time{}},
		{"joined", errors.Join(io.ErrUnexpectedEOF, Unavailable(io.EOF)), OutcomeUnavailable, time.Time{}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, at := Classify(tt.err)
			if got != tt.want || !at.Equal(tt.due) {
				t.Errorf("got %v %v, want %v %v", got, at, tt.want, tt.due)
			}
			if tt.err != nil && !errors.Is(tt.err, io.ErrUnexpectedEOF) {
				t.Errorf("%v hides what it wraps", tt.err)
			}
		})
	}
	if Permanent(nil) != nil || Unavailable(nil) != nil || Later(nil, due) != nil {
		t.Error("nil does not stay nil")
	}
}

func TestParseTrace(t *testing.T) {
	const id, span = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
	for _, tt := range []struct {
		in string
		ok bool
	}{
		{"00-" + id + "-" + span + "-01", true},
		{"cc-" + id + "-" + span + "-01-what-the-future-brings", true},
		{"00-" + id + "-" + span + "-01-extra", false},
		{"ff-" + id + "-" + span + "-01", false},
		{"00-" + strings.Repeat("0", 32) + "-" + span + "-01", false},
		{"00-" + id + "-" + strings.Repeat("0", 16) + "-01", false},
		{"00-" + strings.ToUpper(id) + "-" + span + "-01", false},
		{"00-" + id + "-" + span, false},
		{"00-" + id + "-" + span + "-1", false},
		{"", false},
	} {
		got, ok := parseTrace(tt.in)
		if ok != tt.ok {
			t.Errorf("%q: %v, want %v", tt.in, ok, tt.ok)
		}
		if ok && (got.id != id || got.span != span || got.flags != "01") {
			t.Errorf("%q: read %v", tt.in, got)
		}
	}
	ctx := WithTraceparent(t.Context(), "00-"+id+"-"+span+"-01")
	if got := Traceparent(ctx); got != "00-"+id+"-"+span+"-01" {
		t.Errorf("traceparent %q", got)
	}
	if got := Traceparent(WithTraceparent(t.Context(), "nonsense")); got != "" {
		t.Errorf("traceparent %q of nonsense", got)
	}
}

func FuzzParseTrace(f *testing.F) {
	f.Add("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
	f.Add("01-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00-x")
	f.Fuzz(func(t *testing.T, s string) {
		tr, ok := parseTrace(s)
		if !ok {
			return
		}
		again, ok := parseTrace(tr.child().String())
		if !ok || again.id != tr.id || again.span == tr.span {
			t.Errorf("%q: child %v", s, again)
		}
	})
}

// The SDK's own events go through our binding in every mode unchanged.
func TestBinding(t *testing.T) {
	cetest.EachEvent(t, cetest.Events(), func(t *testing.T, ev event.Event) {
		ev = cetest.ConvertEventExtensionsToString(t, ev)
		ctx := t.Context()
		for _, tt := range []struct {
			name string
			ctx  context.Context //nolint:containedctx // the SDK takes the wanted encoding from it
			in   binding.Message
			want binding.Encoding
		}{
			{"structured stays structured", ctx, bindingtest.MustCreateMockStructuredMessage(t, ev), binding.EncodingStructured},
			{"binary stays binary", ctx, bindingtest.MustCreateMockBinaryMessage(ev), binding.EncodingBinary},
			{"forced structured", binding.WithForceStructured(ctx), binding.ToMessage(&ev), binding.EncodingStructured},
			{"forced binary", binding.WithForceBinary(ctx), binding.ToMessage(&ev), binding.EncodingBinary},
		} {
			t.Run(tt.name, func(t *testing.T) {
				var m kafka.Message
				if err := writeMessage(tt.ctx, tt.in, &m); err != nil {
					t.Fatal(err)
				}
				read := newMessage(&m)
				if got := read.ReadEncoding(); got != tt.want {
					t.Errorf("encoding %v, want %v", got, tt.want)
				}
				cetest.AssertEventEquals(t, ev, cetest.ConvertEventExtensionsToString(t, cetest.MustToEvent(t, ctx, read)))
			})
		}
	})
	if got := newMessage(&kafka.Message{Value: []byte("x")}).ReadEncoding(); got != binding.EncodingUnknown {
		t.Errorf("no event has encoding %v", got)
	}
}

func TestEncodeEvent(t *testing.T) {
	ev := cetest.MinEvent()
	ev.SetSubject("a subject")
	for _, tt := range []struct{ name, key, want string }{
		{"subject", "", "a subject"},
		{"partitionkey", "a key", "a key"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			ev := ev.Clone()
			if tt.key != "" {
				Key(&ev, tt.key)
			}
			m, err := encodeEvent(t.Context(), &ev)
			if err != nil {
				t.Fatal(err)
			}
			if string(m.Key) != tt.want || header(&m, headerContentType) != event.ApplicationCloudEventsJSON {
				t.Errorf("key %q, headers %v", m.Key, m.Headers)
			}
			var binary kafka.Message
			if err := writeMessage(binding.WithForceBinary(t.Context()), binding.ToMessage(&ev), &binary); err != nil {
				t.Fatal(err)
			}
			if string(binary.Key) != tt.key {
				t.Errorf("binary key %q, want %q", binary.Key, tt.key)
			}
		})
	}
	ev.SetID("")
	if _, err := encodeEvent(t.Context(), &ev); err == nil {
		t.Error("an event without an id was encoded")
	}
}

func FuzzDecodeEvent(f *testing.F) {
	f.Add("application/cloudevents+json", "", []byte(`{"specversion":"1.0","id":"1","source":"/x","type":"t","data":{}}`))
	f.Add("application/json", "1.0", []byte(`{}`))
	f.Add("application/cloudevents-batch+json", "", []byte(`[]`))
	f.Fuzz(func(t *testing.T, contentType, version string, value []byte) {
		m := kafka.Message{Value: value, Headers: []kafka.Header{
			{Key: "content-type", Value: []byte(contentType)},
			{Key: "ce_specversion", Value: []byte(version)},
			{Key: "ce_id", Value: []byte("1")},
			{Key: "ce_source", Value: []byte("/x")},
			{Key: "ce_type", Value: []byte("t")},
		}}
		ev, err := decodeEvent(context.Background(), &m)
		if err != nil {
			return
		}
		if ev.ID() == "" || ev.Source() == "" || ev.Type() == "" {
			t.Errorf("an event that is not valid was accepted: %v", ev)
		}
	})
}

func TestRedact(t *testing.T) {
	for _, tt := range []struct{ in, want string }{
		{"GET https://joe:hunter2@r.example/v2/: 401", "GET https://***@r.example/v2/: 401"},
		{"Authorization: Bearer eyJhbGciOi.x.y refused", "Authorization: Bearer *** refused"},
		{"GET /token?service=r&password=hunter2&x=1", "GET /token?service=r&password=***&x=1"},
		{"basic trouble", "basic ***"}, // rather too much than too little
		{"a plain reason", "a plain reason"},
		{"two\r\nlines, \x1b[31mred\x00\n", "two  lines,  [31mred"},
	} {
		if got := Redact(tt.in); got != tt.want {
			t.Errorf("%q: %q, want %q", tt.in, got, tt.want)
		}
	}
	if got := Redact(strings.Repeat("é", 2000)); len(got) > maxReasonBytes || strings.ContainsRune(got, '\uFFFD') {
		t.Errorf("%d bytes", len(got))
	}
}

func TestConfig(t *testing.T) {
	good := Config{Brokers: []string{"127.0.0.1:9092"}}
	if err := good.Validate(); err != nil {
		t.Error(err)
	}
	for name, change := range map[string]func(*Config){
		"no brokers":             func(c *Config) { c.Brokers = nil },
		"negative":               func(c *Config) { c.Partitions = -1 },
		"drain over rebalance":   func(c *Config) { c.Drain = time.Minute },
		"a password alone":       func(c *Config) { c.Password = "x" },
		"a prefix with a blank":  func(c *Config) { c.Prefix = "a b" },
		"a negative duration":    func(c *Config) { c.RetryBackoff = -1 },
		"a negative replication": func(c *Config) { c.Replication = -1 },
	} {
		c := good
		change(&c)
		if c.Validate() == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	if _, err := New(good, "a.b", slog.New(slog.DiscardHandler), nil); err == nil {
		t.Error("a service name with a dot was accepted")
	}
}

func TestRegistererIsShared(t *testing.T) {
	reg := prometheus.NewRegistry()
	for _, service := range []string{"planner", "planner", "matcher"} {
		newMetrics(reg, service).handled.WithLabelValues("t", "ok").Inc()
	}
	want := `
# HELP tidewaiter_bus_events_handled_total Attempts at events, by what came of them.
# TYPE tidewaiter_bus_events_handled_total counter
tidewaiter_bus_events_handled_total{outcome="ok",service="matcher",type="t"} 1
tidewaiter_bus_events_handled_total{outcome="ok",service="planner",type="t"} 2
`
	if err := testutil.GatherAndCompare(reg, strings.NewReader(want), "tidewaiter_bus_events_handled_total"); err != nil {
		t.Error(err)
	}
}

func TestPublishTroubleIsForgotten(t *testing.T) {
	b, err := New(Config{Brokers: []string{"127.0.0.1:1"}}, "intake", slog.New(slog.DiscardHandler), nil)
	if err != nil {
		t.Fatal(err)
	}
	b.published(io.ErrUnexpectedEOF)
	if err := b.Ready(); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("ready: %v", err)
	}
	b.troubles["publish"] = trouble{err: io.EOF, until: time.Now().Add(-time.Second)}
	if err := b.Ready(); err != nil {
		t.Errorf("ready: %v", err)
	}
}

// Whatever is asked of the gate in whatever order: the limit holds, nobody waits
// while there is room and nothing stands before it, and bulk has its share.
func TestGate(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		limit := rapid.IntRange(0, 4).Draw(t, "limit")
		g := newGate(limit)
		// Neither lane runs out.
		g.add(contracts.LaneFresh, 1_000_000)
		g.add(contracts.LaneBulk, 1_000_000)
		type slot struct {
			lane string
			w    *waiter
		}
		var waiting, running []slot
		started := map[string]int{}
		ask := func(lane string) {
			w := &waiter{n: 1, ready: make(chan struct{})}
			g.mu.Lock()
			if lane == contracts.LaneFresh {
				g.fresh = append(g.fresh, w)
			} else {
				g.bulk = append(g.bulk, w)
				g.bulkHeld++
			}
			g.grant()
			g.mu.Unlock()
			waiting = append(waiting, slot{lane, w})
		}
		collect := func() {
			var still []slot
			for _, s := range waiting {
				select {
				case <-s.w.ready:
					running = append(running, s)
					started[s.lane]++
				default:
					still = append(still, s)
				}
			}
			waiting = still
		}
		for range 3 {
			ask(contracts.LaneFresh)
		}
		for range rapid.IntRange(1, 5).Draw(t, "bulk partitions") {
			ask(contracts.LaneBulk)
		}
		var away []int // rounds until a bulk partition, which commits and fetches, asks again
		for range 400 {
			collect()
			if limit > 0 && len(running) > limit {
				t.Fatalf("%d run, the limit is %d", len(running), limit)
			}
			if len(running) == 0 {
				t.Fatalf("nothing runs, %d wait", len(waiting))
			}
			i := rapid.IntRange(0, len(running)-1).Draw(t, "ends")
			s := running[i]
			running = append(running[:i], running[i+1:]...)
			g.release(s.lane, 1)
			if s.lane == contracts.LaneFresh {
				ask(s.lane)
			} else {
				away = append(away, rapid.IntRange(0, 4).Draw(t, "away for"))
			}
			var still []int
			for _, rounds := range away {
				if rounds > 0 {
					still = append(still, rounds-1)
				} else {
					ask(contracts.LaneBulk)
				}
			}
			away = still
		}
		total := started[contracts.LaneFresh] + started[contracts.LaneBulk]
		if bulk := started[contracts.LaneBulk]; bulk*20 < total-20*len(running) {
			t.Fatalf("bulk had %d of %d", bulk, total)
		}
	})
}

func TestGateLetsGo(t *testing.T) {
	g := newGate(1)
	if !g.acquire(t.Context(), contracts.LaneFresh, 1) {
		t.Fatal("a free slot was refused")
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for _, lane := range []string{contracts.LaneFresh, contracts.LaneBulk} {
		if g.acquire(ctx, lane, 1) {
			t.Errorf("%s: a slot was given after the end", lane)
		}
	}
	g.release(contracts.LaneFresh, 1)
	if g.running != 0 || g.bulkHeld != 0 || len(g.fresh)+len(g.bulk) != 0 {
		t.Errorf("left behind: %+v", g)
	}
}

// Whatever becomes due in whatever order: what is due first comes first, with
// its body, which is read again where there was no room for it; and no offset
// is passed before all below it are finished.
func TestWindow(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		now := time.Unix(1_000, 0)
		full := rapid.Bool().Draw(t, "full")
		v := &window{}
		if full {
			v.bodies, v.bytes = waitingBodies, waitingBytes
		}
		bodies, size := v.bodies, v.bytes
		n := rapid.IntRange(1, 30).Draw(t, "events")
		log := make([]record, n)
		open := make(map[int64]bool)
		for i := range log {
			due := now.Add(time.Duration(rapid.IntRange(-3, 3).Draw(t, "due")) * time.Second)
			log[i].Offset = int64(2 * i) // offsets have gaps
			log[i].Headers = []kafka.Header{{Key: headerDue, Value: []byte(due.Format(time.RFC3339Nano))}}
			open[log[i].Offset] = true
		}
		v.add(slices.Clone(log), now)
		for last := (time.Time{}); len(v.events) > 0; {
			i := v.earliest()
			e := v.events[i]
			if e.due.Before(last) {
				t.Fatalf("due at %s, after what is due at %s", e.due, last)
			}
			if last = e.due; e.due.After(now) {
				now = e.due
			}
			if e.rec == nil {
				if !full {
					t.Fatalf("offset %d was let go with room for it", e.offset)
				}
				from := slices.IndexFunc(log, func(r record) bool { return r.Offset == e.offset })
				to := min(n, from+rapid.IntRange(1, n).Draw(t, "read again"))
				if !v.fill(i, slices.Clone(log[from:to]), now) {
					t.Fatalf("offset %d was read again and is not there", e.offset)
				}
			}
			if rec := v.events[i].rec; rec.Offset != e.offset {
				t.Fatalf("offset %d has the body of %d", e.offset, rec.Offset)
			}
			delete(open, e.offset)
			next := v.finish(i)
			for offset := range open {
				if offset < next {
					t.Fatalf("%d is passed and not finished, what is below %d is", offset, next)
				}
			}
		}
		if v.read != log[n-1].Offset+1 || v.bodies != bodies || v.bytes != size {
			t.Fatalf("left behind: %+v", v)
		}
	})
}

// What retention has deleted is not found again, whatever stands behind it.
func TestWindowWithoutWhatWasDeleted(t *testing.T) {
	v := &window{bodies: waitingBodies}
	now := time.Unix(1_000, 0)
	log := make([]record, 3)
	for i := range log {
		log[i].Offset = int64(i)
		log[i].Headers = []kafka.Header{{Key: headerDue, Value: []byte(now.Add(time.Second).Format(time.RFC3339Nano))}}
	}
	v.add(slices.Clone(log), now)
	now = now.Add(time.Minute)
	if v.fill(0, slices.Clone(log[2:]), now) || v.events[0].rec != nil || v.events[2].rec == nil {
		t.Errorf("%+v", v.events)
	}
	if v.fill(0, nil, now) {
		t.Error("found in nothing")
	}
}

// The loop of one leader is not woken for another's: it would wait on, and
// the other's queue be found full.
func TestDrainedTellsItsOwnLeader(t *testing.T) {
	queues := []*queue{newQueue(position{"t", 0}, 0), newQueue(position{"t", 1}, 0)}
	first, second := watch(queues[:1]), watch(queues[1:])
	for _, q := range queues {
		q.push(make([]record, queueEvents))
	}
	queues[1].take(1)
	select {
	case <-first:
		t.Error("the loop of the first was woken")
	case <-second:
	default:
		t.Error("nobody was woken")
	}
}
