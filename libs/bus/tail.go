package bus

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/cloudevents/sdk-go/v2/event"
	"github.com/segmentio/kafka-go"
)

const (
	lagTimeout = 10 * time.Second
	tailPause  = 100 * time.Millisecond // before offsets are asked for again
)

// Tailed is a message that Tail read.
type Tailed struct {
	Topic     string
	Partition int
	Offset    int64
	Time      time.Time
	Key       string
	Headers   map[string]string
	Value     []byte
	Event     event.Event
	Err       error // why Value is no event; Event is empty then
}

// Tail reads topics (with prefix) without a group, from their beginning or
// their present end, and calls fn with each message, one at a time; the order
// holds within a partition. It ends with nil when ctx does, and with fn's error
// when that is not nil. The topics must exist.
func (b *Bus) Tail(ctx context.Context, topics []string, fromBeginning bool, fn func(Tailed) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	f := &fetcher{b: b, name: "tail"}
	defer b.trouble("tail", nil)
	parts, err := b.partitions(ctx, func(topic string) bool { return contains(topics, topic) })
	if ctx.Err() != nil {
		return nil //nolint:nilerr // it was asked to end before it had begun
	}
	if err != nil {
		return fmt.Errorf("tail: %w", err)
	}
	for p := range parts {
		first, end, err := b.settledOffsets(ctx, p)
		if ctx.Err() != nil {
			return nil //nolint:nilerr // as above
		}
		if err != nil {
			return fmt.Errorf("tail: %w", err)
		}
		if !fromBeginning {
			first = end
		}
		f.queues = append(f.queues, newQueue(p, first))
	}
	if len(f.queues) == 0 {
		return fmt.Errorf("tail %v: %w", topics, kafka.UnknownTopicOrPartition)
	}
	var (
		mu     sync.Mutex
		failed error
		group  sync.WaitGroup
	)
	group.Go(func() { f.run(ctx) })
	for _, q := range f.queues {
		group.Go(func() {
			for {
				rs := q.pop(ctx, queueEvents)
				if len(rs) == 0 {
					return
				}
				mu.Lock()
				for i := range rs {
					if failed == nil {
						failed = fn(tailed(ctx, &rs[i].Message))
					}
				}
				if failed != nil {
					cancel()
				}
				mu.Unlock()
			}
		})
	}
	group.Wait()
	return failed
}

func contains(list []string, s string) bool {
	for _, x := range list {
		if x == s {
			return true
		}
	}
	return false
}

// settledOffsets is offsets for a topic that may just have been made: its
// partitions have no leader for a moment.
func (b *Bus) settledOffsets(ctx context.Context, p position) (first, end int64, err error) {
	limit := time.Now().Add(lagTimeout)
	for {
		first, end, err = b.offsets(ctx, p)
		var kafkaErr kafka.Error
		if !errors.As(err, &kafkaErr) || !kafkaErr.Temporary() || time.Now().After(limit) {
			return first, end, err
		}
		select {
		case <-ctx.Done():
			return first, end, err
		case <-time.After(tailPause):
		}
	}
}

func tailed(ctx context.Context, m *kafka.Message) Tailed {
	t := Tailed{
		Topic: m.Topic, Partition: m.Partition, Offset: m.Offset, Time: m.Time,
		Key: string(m.Key), Value: m.Value, Headers: make(map[string]string),
	}
	for _, h := range m.Headers {
		t.Headers[h.Key] = string(h.Value)
	}
	t.Event, t.Err = decodeEvent(ctx, m)
	return t
}

// TopicOf returns the topic (with prefix) that events of a contracts name and
// lane travel in.
func (b *Bus) TopicOf(name, lane string) (string, error) {
	kind, err := b.kindNamed(name)
	if err != nil {
		return "", err
	}
	return b.topic(kind, lane), nil
}

// ReadAll reads topics (with prefix) from their beginning up to the end that
// they have now, without a group, and calls fn with each message.
func (b *Bus) ReadAll(ctx context.Context, topics []string, fn func(Tailed) error) error {
	return b.scan(ctx, topics, func(m kafka.Message) error { return fn(tailed(ctx, &m)) })
}

// scan reads whole topics up to their present end.
func (b *Bus) scan(ctx context.Context, topics []string, fn func(kafka.Message) error) error {
	parts, err := b.partitions(ctx, func(topic string) bool { return contains(topics, topic) })
	if err != nil {
		return err
	}
	for p := range parts {
		first, end, err := b.offsets(ctx, p)
		if err != nil {
			return err
		}
		if err := b.scanPartition(ctx, newQueue(p, first), end, fn); err != nil {
			return err
		}
	}
	return nil
}

func (b *Bus) scanPartition(ctx context.Context, q *queue, end int64, fn func(kafka.Message) error) error {
	f := &fetcher{b: b, queues: []*queue{q}}
	for failures := 0; q.next < end; {
		err := f.fetch(ctx, f.queues, fetchWait)
		if err != nil {
			failures++
			if failures > 5 || !temporary(err) || !sleep(ctx, backoff(failures, fetchMinPause, time.Second)) {
				return errors.Join(err, ctx.Err())
			}
			continue
		}
		for rs := q.take(queueEvents); len(rs) > 0; rs = q.take(queueEvents) {
			for i := range rs {
				if err := fn(rs[i].Message); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// Lag returns, by topic, how many events of the service's subscriptions wait,
// as the broker says: its committed offsets against the ends of the topics.
// Retry topics are among them.
func (b *Bus) Lag(ctx context.Context) (map[string]int64, error) {
	b.mu.Lock()
	var topics []string
	for t := range b.consumed {
		topics = append(topics, t)
	}
	b.mu.Unlock()
	if len(topics) == 0 {
		return map[string]int64{}, nil
	}
	parts, err := b.partitions(ctx, func(topic string) bool { return contains(topics, topic) })
	if err != nil {
		return nil, fmt.Errorf("lag: %w", err)
	}
	asked := make(map[string][]kafka.OffsetRequest)
	for p := range parts {
		asked[p.topic] = append(asked[p.topic], kafka.FirstOffsetOf(p.partition), kafka.LastOffsetOf(p.partition))
	}
	ctx, cancel := context.WithTimeout(ctx, lagTimeout)
	defer cancel()
	ends, err := b.client.ListOffsets(ctx, &kafka.ListOffsetsRequest{Topics: asked})
	if err != nil {
		return nil, fmt.Errorf("lag: %w", err)
	}
	at, err := b.committed(ctx, parts)
	if err != nil {
		return nil, fmt.Errorf("lag: %w", err)
	}
	lag := make(map[string]int64, len(topics))
	for topic, ps := range ends.Topics {
		for _, p := range ps {
			if p.Error != nil {
				return nil, fmt.Errorf("lag of %s/%d: %w", topic, p.Partition, p.Error)
			}
			next, ok := at[position{topic, p.Partition}]
			if !ok {
				next = p.FirstOffset
			}
			lag[topic] += max(0, p.LastOffset-next)
		}
	}
	return lag, nil
}

// committed returns the offsets that the service has committed, of partitions
// of which it has committed any.
func (b *Bus) committed(ctx context.Context, parts map[position]int) (map[position]int64, error) {
	asked := &kafka.OffsetFetchRequest{GroupID: b.Group(), Topics: make(map[string][]int)}
	for p := range parts {
		asked.Topics[p.topic] = append(asked.Topics[p.topic], p.partition)
	}
	answer, err := b.client.OffsetFetch(ctx, asked)
	if err == nil {
		err = answer.Error
	}
	if err != nil {
		return nil, fmt.Errorf("committed offsets of %s: %w", b.Group(), err)
	}
	at := make(map[position]int64)
	for topic, ps := range answer.Topics {
		for _, p := range ps {
			if p.Error == nil && p.CommittedOffset >= 0 {
				at[position{topic, p.Partition}] = p.CommittedOffset
			}
		}
	}
	return at, nil
}

// ReadUpTo says whether the service has handled all named events (contracts
// names) that were sent before a moment, in both lanes, as the broker says: the
// offsets that it committed against those of the first message from then on.
// What waits in its retry topics counts as handled.
func (b *Bus) ReadUpTo(ctx context.Context, t time.Time, names ...string) (bool, error) {
	var topics []string
	for _, name := range names {
		kind, err := b.kindNamed(name)
		if err != nil {
			return false, err
		}
		topics = append(topics, b.topicsOf(kind)...)
	}
	parts, err := b.partitions(ctx, func(topic string) bool { return contains(topics, topic) })
	if err != nil {
		return false, fmt.Errorf("read up to %s: %w", t, err)
	}
	asked := make(map[string][]kafka.OffsetRequest)
	for p := range parts {
		asked[p.topic] = append(asked[p.topic], kafka.FirstOffsetOf(p.partition), kafka.LastOffsetOf(p.partition), kafka.TimeOffsetOf(p.partition, t))
	}
	ctx, cancel := context.WithTimeout(ctx, lagTimeout)
	defer cancel()
	offsets, err := b.client.ListOffsets(ctx, &kafka.ListOffsetsRequest{Topics: asked})
	if err != nil {
		return false, fmt.Errorf("read up to %s: %w", t, err)
	}
	at, err := b.committed(ctx, parts)
	if err != nil {
		return false, fmt.Errorf("read up to %s: %w", t, err)
	}
	for topic, ps := range offsets.Topics {
		for _, p := range ps {
			if p.Error != nil {
				return false, fmt.Errorf("read up to %s: offsets of %s/%d: %w", t, topic, p.Partition, p.Error)
			}
			until := p.LastOffset
			for offset := range p.Offsets {
				if offset >= 0 { // there is a message from then on
					until = offset
				}
			}
			if max(at[position{topic, p.Partition}], p.FirstOffset) < until {
				return false, nil
			}
		}
	}
	return true, nil
}

// watchLag keeps the lag metric until ctx ends.
func (b *Bus) watchLag(ctx context.Context) {
	for sleep(ctx, lagInterval) {
		lag, err := b.Lag(ctx)
		if err != nil {
			b.log.DebugContext(ctx, "lag is not known", "error", err)
			continue
		}
		for topic, n := range lag {
			b.metrics.lag.WithLabelValues(topic).Set(float64(n))
		}
	}
}
