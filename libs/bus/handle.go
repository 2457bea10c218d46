package bus

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"strconv"
	"time"

	"github.com/cloudevents/sdk-go/v2/event"
	"github.com/segmentio/kafka-go"

	"github.com/tidewaiter/tidewaiter/contracts"
)

// Headers of retry topics and dead letters.
const (
	headerDue             = "tidewaiter-due"      // RFC 3339: not before
	headerAttempts        = "tidewaiter-attempts" // so far
	headerDeferrals       = "tidewaiter-deferrals"
	headerOriginTopic     = "tidewaiter-origin-topic"
	headerOriginPartition = "tidewaiter-origin-partition"
	headerOriginOffset    = "tidewaiter-origin-offset"
	headerReason          = "tidewaiter-reason"
	headerService         = "tidewaiter-service"
	headerTime            = "tidewaiter-time"
	headerEventType       = "tidewaiter-event-type"
	headerSubject         = "tidewaiter-subject"

	// Of markers, which say what was done with a dead letter: the first four
	// hold its partition/offset.
	headerClaimed  = "tidewaiter-claimed"
	headerReleased = "tidewaiter-released"
	headerReplayed = "tidewaiter-replayed"
	headerDropped  = "tidewaiter-dropped"
	headerRun      = "tidewaiter-run"   // of the replay
	headerBy       = "tidewaiter-by"    // who did it
	headerForce    = "tidewaiter-force" // the claim takes what was replayed or dropped

	headerReplayOf  = "tidewaiter-replay-of" // of a replayed event: the id of the dead letter
	headerPrefixOwn = "tidewaiter-"
)

// maxDeferrals is how often an event may go through the retry topic; then its
// reason is taken as lasting.
const maxDeferrals = 200

// errPanic marks a handler's panic.
var errPanic = errors.New("handler panicked")

// delivery is one event in hand.
type delivery struct {
	rec       record
	ev        event.Event
	lane      string
	origin    origin
	attempts  int // all of them, those before a deferral included
	deferrals int
	failures  int // ordinary ones of this delivery
	outages   int
}

// origin is where a message was first read.
type origin struct {
	topic     string
	partition int
	offset    int64
}

// newDelivery reads what stands in a record. An error means that it is no event.
func newDelivery(ctx context.Context, src source, rec record) (*delivery, error) {
	d := &delivery{rec: rec, lane: src.lane, origin: origin{rec.Topic, rec.Partition, rec.Offset}}
	if src.retry {
		d.origin = originOf(&rec.Message)
		d.attempts = headerInt(&rec.Message, headerAttempts)
		d.deferrals = headerInt(&rec.Message, headerDeferrals)
	}
	ev, err := decodeEvent(ctx, &rec.Message)
	if err != nil {
		return d, err
	}
	d.ev = ev
	if d.lane == "" {
		d.lane = contracts.LaneFresh
		if extension(&ev, contracts.ExtLane) == contracts.LaneBulk {
			d.lane = contracts.LaneBulk
		}
	}
	return d, nil
}

// handle brings records of one partition to their end, in order. It returns
// false when it had to let go of them: then nothing of them may be committed.
func (w *work) handle(src source, rs []record) bool {
	ds := make([]*delivery, 0, len(rs))
	for _, rec := range rs {
		d, err := newDelivery(w.ctx, src, rec)
		if err != nil {
			d.attempts++
			w.c.b.metrics.handled.WithLabelValues("", OutcomePermanent.String()).Inc()
			if !w.bury(d, false, err) {
				return false
			}
			continue
		}
		if !w.c.types[d.ev.Type()] {
			continue // another event of the same topic
		}
		ds = append(ds, d)
	}
	if w.c.s.Batch != nil && len(ds) > 1 {
		done, abandoned := w.batch(ds)
		if done || abandoned {
			return done
		}
	}
	for _, d := range ds {
		if !w.one(d) {
			return false
		}
	}
	return true
}

// one brings a single event to its end, or returns false when it had to let go.
func (w *work) one(d *delivery) bool {
	for {
		sent, ok, err := w.attempt(d)
		if !ok {
			return false
		}
		outcome, due := Classify(err)
		if outcome == OutcomeRetry {
			d.failures++
			if d.failures >= w.c.b.cfg.Attempts {
				err = fmt.Errorf("after %d attempts: %w", d.attempts, err)
				outcome = OutcomePermanent
			}
		}
		if untried(err) {
			d.attempts--
			d.deferrals--
		}
		if outcome == OutcomeLater && d.deferrals >= maxDeferrals {
			err = fmt.Errorf("after %d deferrals: %w", d.deferrals, err)
			outcome = OutcomePermanent
		}
		if outcome != OutcomeUnavailable {
			w.c.b.trouble(w.outage(d), nil)
		}
		switch outcome {
		case OutcomeOK:
			w.gate.release(d.lane, 1)
			return sent
		case OutcomePermanent:
			done := w.bury(d, true, err)
			w.gate.release(d.lane, 1)
			return done
		case OutcomeLater:
			done := w.postpone(d, due, err)
			w.gate.release(d.lane, 1)
			return done
		}
		w.gate.release(d.lane, 1)
		if !w.pause(d, outcome, err) {
			return false
		}
	}
}

// attempt waits for a slot, calls the handler once and sends its output. With
// ok the slot is held; without, the work ends and the event is let go. err is
// the handler's, or why its output can never be sent. sent says, where there is
// no err, whether all output is stored: it is not when there was no time for it.
func (w *work) attempt(d *delivery) (sent, ok bool, err error) {
	if !w.gate.acquire(w.stop, d.lane, 1) {
		return false, false, nil
	}
	d.attempts++
	ctx := w.span(d)
	out, err := w.call(ctx, d.ev.Type(), func(ctx context.Context) ([]event.Event, error) {
		if w.c.s.Handler == nil {
			return w.c.s.Batch(ctx, []event.Event{d.ev})
		}
		return w.c.s.Handler(ctx, d.ev)
	})
	if err != nil && w.ctx.Err() != nil {
		// The time to drain is over: that is no failure of the event.
		w.gate.release(d.lane, 1)
		return false, false, nil
	}
	if err != nil {
		return false, true, err
	}
	msgs, err := w.outputs(ctx, d.ev, out)
	if err != nil {
		return false, true, Permanent(err)
	}
	return w.send(msgs), true, nil
}

// span returns the context of one attempt: the hop's trace and the attempt's number.
func (w *work) span(d *delivery) context.Context {
	t, ok := parseTrace(header(&d.rec.Message, headerTraceparent))
	if !ok {
		t, ok = parseTrace(extension(&d.ev, contracts.ExtTraceparent))
	}
	if !ok {
		t = newTrace()
	}
	ctx := context.WithValue(w.ctx, traceKey{}, t.child())
	return context.WithValue(ctx, attemptKey{}, d.attempts)
}

// call runs the service's code, measures it and turns a panic into a Permanent error.
func (w *work) call(ctx context.Context, eventType string, f func(context.Context) ([]event.Event, error)) (out []event.Event, err error) {
	started := time.Now()
	defer func() {
		if p := recover(); p != nil {
			w.c.b.log.ErrorContext(ctx, "handler panicked", "type", eventType, "panic", fmt.Sprint(p), "stack", string(debug.Stack()))
			out, err = nil, Permanent(fmt.Errorf("%w: %v", errPanic, p))
		}
		outcome, _ := Classify(err)
		w.c.b.metrics.seconds.WithLabelValues(eventType).Observe(time.Since(started).Seconds())
		w.c.b.metrics.handled.WithLabelValues(eventType, outcome.String()).Inc()
	}()
	return f(ctx)
}

// outputs completes and encodes what in caused.
func (w *work) outputs(ctx context.Context, in event.Event, out []event.Event) ([]kafka.Message, error) {
	msgs := make([]kafka.Message, 0, len(out))
	for i := range out {
		ev := out[i].Clone()
		w.c.b.complete(ctx, &ev, &in)
		m, err := w.c.b.encode(ctx, &ev)
		if err != nil {
			return nil, fmt.Errorf("output: %w", err)
		}
		msgs = append(msgs, m)
	}
	return msgs, nil
}

// send stores messages, however long it takes. It returns false when it had to
// give up: the service stops, and Kafka did not take them.
func (w *work) send(msgs []kafka.Message) bool {
	if len(msgs) == 0 {
		return true
	}
	for attempt := 0; ; attempt++ {
		ctx, cancel := context.WithTimeout(w.ctx, publishTimeout)
		err := w.c.b.write(ctx, msgs)
		cancel()
		if err == nil {
			if attempt > 0 {
				w.c.b.trouble(w.c.name+" output", nil)
			}
			return true
		}
		w.c.b.trouble(w.c.name+" output", err)
		w.c.b.log.WarnContext(w.ctx, "output cannot be stored", "error", err, "attempt", attempt+1)
		if !sleep(w.stop, backoff(attempt, 100*time.Millisecond, maxBackoff)) {
			return false
		}
	}
}

// pause waits before the next attempt at an event that failed in an ordinary
// way or because of an outage. It returns false when the work ends first.
func (w *work) pause(d *delivery, outcome Outcome, err error) bool {
	if outcome == OutcomeUnavailable {
		d.outages++
		w.c.b.trouble(w.outage(d), err)
		w.c.b.log.WarnContext(w.ctx, "waiting for something the service cannot work without",
			"type", d.ev.Type(), "subject", d.ev.Subject(), "id", d.ev.ID(), "attempt", d.attempts, "error", Redact(err.Error()))
		return sleep(w.stop, backoff(d.outages-1, 100*time.Millisecond, maxBackoff))
	}
	w.c.b.log.WarnContext(w.ctx, "attempt failed",
		"type", d.ev.Type(), "subject", d.ev.Subject(), "id", d.ev.ID(), "attempt", d.attempts, "error", Redact(err.Error()))
	delay := w.c.b.cfg.RetryBackoff
	for range d.failures - 1 {
		delay *= 3
	}
	return sleep(w.stop, delay)
}

// outage names the trouble of an event that waits for something.
func (w *work) outage(d *delivery) string {
	return w.c.name + " handler of " + d.rec.Topic + "/" + strconv.Itoa(d.rec.Partition)
}

// batch hands all events to Batch at once. Without done they are to be handled
// one by one; when abandoned, not at all.
func (w *work) batch(ds []*delivery) (done, abandoned bool) {
	events := make([]event.Event, len(ds))
	for i, d := range ds {
		events[i] = d.ev
	}
	lane := ds[0].lane
	for failures, outages := 0, 0; ; {
		if !w.gate.acquire(w.stop, lane, len(ds)) {
			return false, true
		}
		for _, d := range ds {
			d.attempts++
		}
		ctx := w.span(ds[0])
		out, err := w.call(ctx, "batch", func(ctx context.Context) ([]event.Event, error) {
			return w.c.s.Batch(ctx, events)
		})
		if err == nil {
			var msgs []kafka.Message
			if msgs, err = w.outputs(ctx, events[0], out); err == nil {
				sent := w.send(msgs)
				w.gate.release(lane, len(ds))
				w.c.b.trouble(w.outage(ds[0]), nil)
				return sent, !sent
			}
			err = Permanent(err)
		}
		w.gate.release(lane, len(ds))
		if w.ctx.Err() != nil {
			return false, true
		}
		outcome, _ := Classify(err)
		if outcome == OutcomeUnavailable {
			ds[0].outages = outages
			if !w.pause(ds[0], outcome, err) {
				return false, true
			}
			outages++
			continue
		}
		w.c.b.trouble(w.outage(ds[0]), nil)
		failures++
		if outcome != OutcomeRetry || failures >= w.c.b.cfg.Attempts {
			w.c.b.log.WarnContext(w.ctx, "a batch failed, its events are handled one by one", "events", len(ds), "error", Redact(err.Error()))
			return false, false
		}
		ds[0].failures = failures
		if !w.pause(ds[0], outcome, err) {
			return false, true
		}
		ds[0].failures = 0
	}
}

// postpone puts an event into the service's retry topic. One that a foreign
// producer made too large for it goes to the dead letters.
func (w *work) postpone(d *delivery, due time.Time, reason error) bool {
	if n := len(d.rec.Value) + len(d.rec.Key); n > MaxMessageBytes {
		return w.bury(d, true, fmt.Errorf("%d bytes cannot be deferred, at most %d can (%w): %w", n, MaxMessageBytes, ErrTooLarge, reason))
	}
	w.c.b.log.InfoContext(w.ctx, "event deferred",
		"type", d.ev.Type(), "subject", d.ev.Subject(), "id", d.ev.ID(), "due", due, "attempt", d.attempts, "reason", Redact(reason.Error()))
	m := kafka.Message{
		Topic:   w.c.b.retryTopic(w.c.sources[d.rec.Topic].base),
		Key:     d.rec.Key,
		Value:   d.rec.Value,
		Headers: foreignHeaders(&d.rec.Message),
	}
	m.Headers = append(m.Headers, originHeaders(d.origin)...)
	m.Headers = append(m.Headers,
		kafka.Header{Key: headerDue, Value: []byte(due.UTC().Format(time.RFC3339Nano))},
		kafka.Header{Key: headerAttempts, Value: []byte(strconv.Itoa(d.attempts))},
		kafka.Header{Key: headerDeferrals, Value: []byte(strconv.Itoa(d.deferrals + 1))},
	)
	return w.send([]kafka.Message{m})
}

// bury emits what OnDead says, then puts a message into the dead letters.
func (w *work) bury(d *delivery, isEvent bool, reason error) bool {
	w.c.b.log.ErrorContext(w.ctx, "event goes to the dead letters",
		"topic", d.origin.topic, "partition", d.origin.partition, "offset", d.origin.offset,
		"type", eventType(d, isEvent), "attempts", d.attempts, "reason", Redact(reason.Error()))
	if isEvent && w.c.s.OnDead != nil && !w.send(w.lastWords(d, reason)) {
		return false
	}
	base := w.c.sources[d.rec.Topic].base
	m := kafka.Message{
		Topic:   w.c.b.deadLetterTopic(base),
		Key:     d.rec.Key,
		Value:   d.rec.Value,
		Headers: foreignHeaders(&d.rec.Message),
	}
	m.Headers = append(m.Headers, originHeaders(d.origin)...)
	m.Headers = append(m.Headers, w.c.b.deadLetterHeaders(reason.Error(), d.attempts)...)
	if isEvent {
		m.Headers = append(m.Headers,
			kafka.Header{Key: headerEventType, Value: []byte(d.ev.Type())},
			kafka.Header{Key: headerSubject, Value: []byte(d.ev.Subject())})
	}
	if !w.send([]kafka.Message{m}) {
		return false
	}
	w.c.b.metrics.deadLetters.WithLabelValues(base).Inc()
	return true
}

func eventType(d *delivery, isEvent bool) string {
	if !isEvent {
		return ""
	}
	return d.ev.Type()
}

// lastWords returns the messages that OnDead asks for. What cannot be sent at
// all is left out: the dead letter itself must not wait for it.
func (w *work) lastWords(d *delivery, reason error) []kafka.Message {
	ctx := w.span(d)
	out, err := w.call(ctx, d.ev.Type(), func(context.Context) ([]event.Event, error) {
		return w.c.s.OnDead(d.ev, reason), nil
	})
	if err != nil {
		return nil
	}
	var msgs []kafka.Message
	for i := range out {
		m, err := w.outputs(ctx, d.ev, out[i:i+1])
		if err != nil {
			w.c.b.log.ErrorContext(ctx, "an event about a dead letter cannot be sent", "error", err)
			continue
		}
		msgs = append(msgs, m...)
	}
	return msgs
}
