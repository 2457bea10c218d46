package bus

import (
	"context"
	"math"
	"slices"
	"time"
)

const (
	// waitingEvents bounds how many events of one partition of a retry topic
	// are known before they are due; what comes behind them waits longer.
	waitingEvents = 200_000
	// waitingBodies and waitingBytes bound how much of them is kept in memory;
	// the others are read again when they are due.
	waitingBodies = 2000
	waitingBytes  = 32 << 20
)

// waiting is an event that is not finished.
type waiting struct {
	offset int64
	due    time.Time
	rec    *record // nil: in Kafka alone
}

// window is what was read of one partition of a retry topic and is not
// finished, by offset.
type window struct {
	events []waiting
	bodies int
	bytes  int
	read   int64 // the offset after the last one that was read
}

// add appends events that were read. Beyond the bounds only those are kept in
// memory that are due: nothing is read while any is.
func (v *window) add(rs []record, now time.Time) {
	for i := range rs {
		v.events = append(v.events, waiting{offset: rs[i].Offset, due: dueOf(&rs[i])})
		last := len(v.events) - 1
		if v.bodies < waitingBodies && v.bytes < waitingBytes || !v.events[last].due.After(now) {
			v.keep(last, &rs[i])
		}
		v.read = rs[i].Offset + 1
	}
}

func (v *window) keep(i int, rec *record) {
	v.events[i].rec = rec
	v.bodies++
	v.bytes += rec.size()
}

// fill keeps of what was read again the event at i, and those behind it that are
// due too. It returns false when the event is not among them.
func (v *window) fill(i int, rs []record, now time.Time) bool {
	at := i
	for k := range rs {
		for at < len(v.events) && v.events[at].offset < rs[k].Offset {
			at++
		}
		if at == len(v.events) {
			break
		}
		e := &v.events[at]
		if e.offset == rs[k].Offset && e.rec == nil && !e.due.After(now) && (at == i || v.bytes < waitingBytes+fetchBytes) {
			v.keep(at, &rs[k])
		}
	}
	return v.events[i].rec != nil
}

// finish takes out the event at i and returns the offset below which all are
// finished.
func (v *window) finish(i int) int64 {
	if rec := v.events[i].rec; rec != nil {
		v.bodies--
		v.bytes -= rec.size()
	}
	v.events = slices.Delete(v.events, i, i+1)
	if len(v.events) > 0 {
		return v.events[0].offset
	}
	return v.read
}

// earliest returns the index of the event that is due first, -1 without any.
func (v *window) earliest() int {
	first := -1
	for i := range v.events {
		if first < 0 || v.events[i].due.Before(v.events[first].due) {
			first = i
		}
	}
	return first
}

// retries handles one partition of a retry topic: each event when it is due,
// so that those that wait long hold up none behind them. Only what stands below
// the first unfinished event is committed.
func (w *work) retries(q *queue) {
	src := w.c.sources[q.topic]
	var v window
	for w.stop.Err() == nil {
		i := v.earliest()
		if i < 0 || time.Until(v.events[i].due) > 0 {
			if rs := q.take(waitingEvents - len(v.events)); len(rs) > 0 {
				v.add(rs, time.Now())
			} else if !w.awaitDue(q, &v, i) {
				return
			}
			continue
		}
		if v.events[i].rec == nil && !w.readAgain(q.position, &v, i) {
			return
		}
		if rec := v.events[i].rec; rec != nil && !w.handle(src, []record{*rec}) {
			return
		}
		if next := v.finish(i); i == 0 {
			w.done.mark(q.position, next)
		}
	}
}

// readAgain reads the event at i, however long it takes. Without a record of it
// after, Kafka has deleted it. It returns false when the work ends first.
func (w *work) readAgain(p position, v *window, i int) bool {
	at := newQueue(p, v.events[i].offset)
	f := &fetcher{b: w.c.b, queues: []*queue{at}}
	for attempt := 0; ; attempt++ {
		err := f.fetch(w.stop, f.queues, fetchWait)
		if err == nil && at.next != v.events[i].offset { // before it: the log is another one
			break
		}
		if w.stop.Err() != nil {
			return false
		}
		w.c.b.log.WarnContext(w.stop, "an event that is due could not be read", "topic", p.topic, "partition", p.partition, "error", err)
		if !sleep(w.stop, backoff(attempt, fetchMinPause, maxBackoff)) {
			return false
		}
	}
	if !v.fill(i, at.take(math.MaxInt), time.Now()) {
		w.c.b.log.ErrorContext(w.stop, "a deferred event is gone from Kafka before it was due",
			"topic", p.topic, "partition", p.partition, "offset", v.events[i].offset)
	}
	return true
}

// awaitDue waits until the event at i is due, or more arrive. It returns false
// when the work ends first.
func (w *work) awaitDue(q *queue, v *window, i int) bool {
	ctx := w.stop
	if i >= 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithDeadline(ctx, v.events[i].due)
		defer cancel()
	}
	filled := q.filled
	if len(v.events) >= waitingEvents {
		filled = nil
	}
	select {
	case <-filled:
	case <-ctx.Done():
	}
	return w.stop.Err() == nil
}

// dueOf returns when an event of a retry topic is due; at once when it does not say.
func dueOf(rec *record) time.Time {
	due, err := time.Parse(time.RFC3339Nano, header(&rec.Message, headerDue))
	if err != nil {
		return time.Time{}
	}
	return due
}
