package bus

import (
	"context"
	"slices"
	"time"
)

const (
	// waitingEvents bounds how many events of one partition of a retry topic
	// are kept in memory until they are due; what comes behind them waits longer.
	waitingEvents = 2000
	waitingBytes  = 32 << 20
)

// waiting is an event that is not due yet.
type waiting struct {
	rec record
	due time.Time
}

// retries handles one partition of a retry topic: each event when it is due,
// so that one that waits long holds up none behind it. Only what stands below
// the first unfinished event is committed.
func (w *work) retries(q *queue) {
	src := w.c.sources[q.topic]
	var (
		window []waiting // by offset
		bytes  int
		read   = int64(-1) // the offset after the last one that was read
	)
	for w.stop.Err() == nil {
		if len(window) < waitingEvents && bytes < waitingBytes {
			for _, rec := range q.take(waitingEvents - len(window)) {
				window = append(window, waiting{rec, dueOf(&rec)})
				bytes += rec.size()
				read = rec.Offset + 1
			}
		}
		i := earliest(window)
		if i < 0 || time.Until(window[i].due) > 0 {
			if !w.awaitDue(q, window, i) {
				return
			}
			continue
		}
		rec := window[i].rec
		if !w.handle(src, []record{rec}) {
			return
		}
		bytes -= rec.size()
		window = slices.Delete(window, i, i+1)
		next := read
		if len(window) > 0 {
			next = window[0].rec.Offset
		}
		if i == 0 {
			w.done.mark(q.position, next)
		}
	}
}

// earliest returns the index of the event that is due first, -1 without any.
func earliest(window []waiting) int {
	first := -1
	for i := range window {
		if first < 0 || window[i].due.Before(window[first].due) {
			first = i
		}
	}
	return first
}

// awaitDue waits until the event at i is due, or more arrive. It returns false
// when the work ends first.
func (w *work) awaitDue(q *queue, window []waiting, i int) bool {
	ctx := w.stop
	if i >= 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithDeadline(ctx, window[i].due)
		defer cancel()
	}
	filled := q.filled
	if len(window) >= waitingEvents {
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
