package gatekeeper

import (
	"context"
	"log/slog"
	"time"

	"github.com/cloudevents/sdk-go/v2/event"
)

const (
	queueEvents = 10_000 // waiting to be published
	queueBatch  = 100    // published at once
	// queueDrain bounds publishing what waits when the service stops.
	queueDrain = 5 * time.Second
	// queuePause is the pause after Kafka could not be reached.
	queuePause = time.Second
)

// queue publishes events beside the reviews: no review waits for Kafka. When it
// is full, events are dropped and counted.
type queue struct {
	events  chan event.Event
	metrics *metrics
	log     *slog.Logger
}

func newQueue(m *metrics, log *slog.Logger) *queue {
	return &queue{events: make(chan event.Event, queueEvents), metrics: m, log: log}
}

func (q *queue) add(ev event.Event) {
	select {
	case q.events <- ev:
	default:
		q.metrics.dropped.Inc()
	}
}

// run publishes until ctx ends, then what is left for a moment longer.
func (q *queue) run(ctx context.Context, to Publisher) {
	for {
		select {
		case <-ctx.Done():
			drain, cancel := context.WithTimeout(context.WithoutCancel(ctx), queueDrain)
			defer cancel()
			for batch := q.take(nil); len(batch) > 0; batch = q.take(nil) {
				q.publish(drain, to, batch)
			}
			return
		case ev := <-q.events:
			q.publish(ctx, to, q.take([]event.Event{ev}))
		}
	}
}

// take adds to batch what waits already.
func (q *queue) take(batch []event.Event) []event.Event {
	for len(batch) < queueBatch {
		select {
		case ev := <-q.events:
			batch = append(batch, ev)
		default:
			return batch
		}
	}
	return batch
}

// publish tries until it works or ctx ends; then the events are lost.
func (q *queue) publish(ctx context.Context, to Publisher, batch []event.Event) {
	for {
		err := to.Publish(ctx, batch...)
		if err == nil {
			return
		}
		q.log.WarnContext(ctx, "decisions cannot be published", slog.Int("events", len(batch)), slog.Any("error", err))
		pause := time.NewTimer(queuePause)
		select {
		case <-pause.C:
		case <-ctx.Done():
			pause.Stop()
			q.metrics.dropped.Add(float64(len(batch)))
			return
		}
	}
}
