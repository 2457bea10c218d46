package bus

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/segmentio/kafka-go"
	"github.com/segmentio/kafka-go/protocol"
	"github.com/segmentio/kafka-go/protocol/fetch"
)

const (
	fetchWait           = 500 * time.Millisecond // how long a broker may wait for events
	fetchWaitPaused     = 50 * time.Millisecond  // the same while a partition is left out
	fetchPartitionBytes = 256 << 10
	fetchBytes          = 4 << 20
	fetchMinPause       = 100 * time.Millisecond
	queueEvents         = 200       // a partition with more is not fetched
	queueBytes          = 256 << 10 // the same in bytes
)

// record is a message of a partition.
type record struct {
	kafka.Message
}

func (r *record) size() int { return len(r.Key) + len(r.Value) + 64 }

// position names a partition.
type position struct {
	topic     string
	partition int
}

// queue holds what was fetched of one partition and not yet handled.
type queue struct {
	position
	mu      sync.Mutex
	records []record
	bytes   int
	next    int64           // offset to fetch; guarded by the fetcher
	filled  chan struct{}   // capacity 1: something was pushed
	drained chan<- struct{} // told when the queue was full and is taken from; nil: nobody waits
}

func newQueue(p position, offset int64) *queue {
	return &queue{position: p, next: offset, filled: make(chan struct{}, 1)}
}

// watch returns what tells when one of some queues was full and is taken from.
func watch(queues []*queue) <-chan struct{} {
	drained := make(chan struct{}, 1)
	for _, q := range queues {
		q.mu.Lock()
		q.drained = drained
		q.mu.Unlock()
	}
	return drained
}

func (q *queue) full() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return len(q.records) >= queueEvents || q.bytes >= queueBytes
}

func (q *queue) push(rs []record) {
	q.mu.Lock()
	for i := range rs {
		q.bytes += rs[i].size()
	}
	q.records = append(q.records, rs...)
	q.mu.Unlock()
	signal(q.filled)
}

// take returns up to n records that are there, perhaps none.
func (q *queue) take(n int) []record {
	q.mu.Lock()
	defer q.mu.Unlock()
	n = min(n, len(q.records))
	if n == 0 {
		return nil
	}
	wasFull := len(q.records) >= queueEvents || q.bytes >= queueBytes
	out := append([]record(nil), q.records[:n]...)
	q.records = q.records[n:]
	for i := range out {
		q.bytes -= out[i].size()
	}
	if wasFull {
		signal(q.drained)
	}
	return out
}

// pop waits for records and returns up to n; none when ctx ends.
func (q *queue) pop(ctx context.Context, n int) []record {
	for ctx.Err() == nil {
		if rs := q.take(n); len(rs) > 0 {
			return rs
		}
		select {
		case <-q.filled:
		case <-ctx.Done():
		}
	}
	return nil
}

func signal(c chan<- struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// fetcher keeps the queues of some partitions filled, with one request at a
// time to each broker that leads any of them.
type fetcher struct {
	b      *Bus
	name   string // of its trouble
	queues []*queue
	pushed func(q *queue, n int)
}

// run fetches until ctx ends. Kafka being gone is waited for.
func (f *fetcher) run(ctx context.Context) {
	if len(f.queues) == 0 {
		return
	}
	for attempt := 0; ctx.Err() == nil; attempt++ {
		started := time.Now()
		err := f.session(ctx)
		if ctx.Err() != nil {
			return
		}
		if time.Since(started) > maxBackoff {
			attempt = 0
		}
		f.b.log.WarnContext(ctx, "fetching from Kafka was interrupted", "error", err)
		if attempt > 2 {
			f.b.trouble(f.name, err)
		}
		sleep(ctx, backoff(attempt, fetchMinPause, maxBackoff/2))
	}
}

// session fetches from the present leaders until one of them fails or is
// no longer the leader.
func (f *fetcher) session(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if err := f.resolve(ctx); err != nil {
		return err
	}
	leaders, err := f.leaders(ctx)
	if err != nil {
		return err
	}
	f.b.trouble(f.name, nil)
	failed := make(chan error, len(leaders))
	var group sync.WaitGroup
	for _, queues := range leaders {
		group.Go(func() {
			failed <- f.poll(ctx, queues)
			cancel()
		})
	}
	group.Wait()
	return <-failed
}

// resolve finds the first offset of partitions that have none yet.
func (f *fetcher) resolve(ctx context.Context) error {
	for _, q := range f.queues {
		if q.next >= 0 {
			continue
		}
		first, _, err := f.b.offsets(ctx, q.position)
		if err != nil {
			return err
		}
		q.next = first
	}
	return nil
}

// leaders groups the queues by the broker that leads their partition.
func (f *fetcher) leaders(ctx context.Context) (map[int][]*queue, error) {
	parts, err := f.b.partitions(ctx, func(topic string) bool {
		for _, q := range f.queues {
			if q.topic == topic {
				return true
			}
		}
		return false
	})
	if err != nil {
		return nil, err
	}
	leaders := make(map[int][]*queue)
	for _, q := range f.queues {
		leader, ok := parts[q.position]
		if !ok {
			return nil, fmt.Errorf("partition %d of %s: %w", q.partition, q.topic, kafka.LeaderNotAvailable)
		}
		leaders[leader] = append(leaders[leader], q)
	}
	return leaders, nil
}

// partitions returns the leaders of all partitions of the topics that are asked for.
func (b *Bus) partitions(ctx context.Context, want func(topic string) bool) (map[position]int, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	meta, err := b.client.Metadata(ctx, &kafka.MetadataRequest{})
	if err != nil {
		return nil, fmt.Errorf("read partitions: %w", err)
	}
	parts := make(map[position]int)
	for _, t := range meta.Topics {
		if t.Error != nil || !want(t.Name) {
			continue
		}
		for _, p := range t.Partitions {
			if p.Leader.Host != "" {
				parts[position{t.Name, p.ID}] = p.Leader.ID
			}
		}
	}
	return parts, nil
}

// refresh renews what the connection knows of topics: it keeps that for a few
// seconds, and offers no other way than a request that creates topics, here none.
func (b *Bus) refresh(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	if _, err := b.client.CreateTopics(ctx, &kafka.CreateTopicsRequest{}); err != nil {
		return fmt.Errorf("read topics: %w", err)
	}
	return nil
}

// offsets returns the first offset of a partition and the one after its last.
//
// A partition that has just been made, or whose broker has just died, has no
// leader for a moment: that is waited for, as long as for an answer.
func (b *Bus) offsets(ctx context.Context, p position) (first, end int64, err error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	for attempt := 0; ; attempt++ {
		first, end, err = b.offsetsNow(ctx, p)
		moved := errors.Is(err, kafka.NotLeaderForPartition) || errors.Is(err, kafka.LeaderNotAvailable)
		if !moved || !sleep(ctx, backoff(attempt, 50*time.Millisecond, time.Second)) {
			return first, end, err
		}
		if refreshed := b.refresh(ctx); refreshed != nil {
			return 0, 0, refreshed
		}
	}
}

func (b *Bus) offsetsNow(ctx context.Context, p position) (first, end int64, err error) {
	res, err := b.client.ListOffsets(ctx, &kafka.ListOffsetsRequest{Topics: map[string][]kafka.OffsetRequest{
		p.topic: {kafka.FirstOffsetOf(p.partition), kafka.LastOffsetOf(p.partition)},
	}})
	if err != nil {
		return 0, 0, fmt.Errorf("offsets of %s/%d: %w", p.topic, p.partition, err)
	}
	for _, o := range res.Topics[p.topic] {
		if o.Partition != p.partition {
			continue
		}
		if o.Error != nil {
			return 0, 0, fmt.Errorf("offsets of %s/%d: %w", p.topic, p.partition, o.Error)
		}
		return o.FirstOffset, o.LastOffset, nil
	}
	return 0, 0, fmt.Errorf("offsets of %s/%d: %w", p.topic, p.partition, kafka.UnknownTopicOrPartition)
}

// poll fetches the given partitions, which one broker leads, until something fails.
func (f *fetcher) poll(ctx context.Context, queues []*queue) error {
	drained := watch(queues)
	for ctx.Err() == nil {
		wait := fetchWait
		var wanted []*queue
		for _, q := range queues {
			if q.full() {
				wait = fetchWaitPaused
				continue
			}
			wanted = append(wanted, q)
		}
		if len(wanted) == 0 {
			select {
			case <-drained:
			case <-time.After(fetchWait):
			case <-ctx.Done():
			}
			continue
		}
		if err := f.fetch(ctx, wanted, wait); err != nil {
			return err
		}
	}
	return ctx.Err()
}

// fetch makes one request and fills the queues from its answer.
func (f *fetcher) fetch(ctx context.Context, queues []*queue, wait time.Duration) error {
	res, err := f.b.fetch(ctx, queues, wait)
	if err != nil {
		return err
	}
	byPosition := make(map[position]*queue, len(queues))
	for _, q := range queues {
		byPosition[q.position] = q
	}
	for _, t := range res.Topics {
		for i := range t.Partitions {
			p := &t.Partitions[i]
			q := byPosition[position{t.Topic, int(p.Partition)}]
			if q == nil {
				continue
			}
			if err := f.accept(ctx, q, p); err != nil {
				return err
			}
		}
	}
	return nil
}

// accept takes one partition's share of an answer.
func (f *fetcher) accept(ctx context.Context, q *queue, p *fetch.ResponsePartition) error {
	if code := kafka.Error(p.ErrorCode); code == kafka.OffsetOutOfRange {
		// The log was cut (retention) or is another one: what is left of it is
		// handled from its start. Handlers see events twice at worst.
		first, _, err := f.b.offsets(ctx, q.position)
		if err != nil {
			return err
		}
		f.b.log.ErrorContext(ctx, "offset is out of range, events may be lost to retention",
			"topic", q.topic, "partition", q.partition, "offset", q.next, "first", first)
		q.next = first
		return nil
	} else if code != 0 {
		return fmt.Errorf("fetch %s/%d: %w", q.topic, q.partition, code)
	}
	rs, err := readRecords(q.position, q.next, p.RecordSet.Records)
	if err != nil {
		return fmt.Errorf("fetch %s/%d: %w", q.topic, q.partition, err)
	}
	if len(rs) == 0 {
		return nil
	}
	q.next = rs[len(rs)-1].Offset + 1
	if f.pushed != nil {
		f.pushed(q, len(rs))
	}
	q.push(rs)
	return nil
}

// fetch asks a broker for events of partitions that it leads.
func (b *Bus) fetch(ctx context.Context, queues []*queue, wait time.Duration) (*fetch.Response, error) {
	req := &fetch.Request{
		ReplicaID:    -1,
		MaxWaitTime:  int32(wait.Milliseconds()), //nolint:gosec // at most half a second
		MinBytes:     1,
		MaxBytes:     fetchBytes,
		SessionID:    -1,
		SessionEpoch: -1,
	}
	for _, q := range queues {
		part := fetch.RequestPartition{
			Partition:          int32(q.partition), //nolint:gosec // Kafka's partitions are int32
			CurrentLeaderEpoch: -1,
			FetchOffset:        q.next,
			LogStartOffset:     -1,
			PartitionMaxBytes:  fetchPartitionBytes,
		}
		if n := len(req.Topics); n > 0 && req.Topics[n-1].Topic == q.topic {
			req.Topics[n-1].Partitions = append(req.Topics[n-1].Partitions, part)
			continue
		}
		req.Topics = append(req.Topics, fetch.RequestTopic{Topic: q.topic, Partitions: []fetch.RequestPartition{part}})
	}
	ctx, cancel := context.WithTimeout(ctx, wait+requestTimeout)
	defer cancel()
	m, err := b.transport.RoundTrip(ctx, b.client.Addr, req)
	if err != nil {
		return nil, fmt.Errorf("fetch from Kafka: %w", err)
	}
	res, ok := m.(*fetch.Response)
	if !ok {
		return nil, fmt.Errorf("fetch from Kafka: unexpected answer %T", m)
	}
	if res.ErrorCode != 0 {
		return nil, fmt.Errorf("fetch from Kafka: %w", kafka.Error(res.ErrorCode))
	}
	return res, nil
}

// readRecords copies the records from offset on out of an answer. Brokers send
// whole batches, which may begin before the offset that was asked for.
func readRecords(p position, offset int64, records protocol.RecordReader) ([]record, error) {
	if records == nil {
		return nil, nil
	}
	var out []record
	for {
		rec, err := records.ReadRecord()
		if errors.Is(err, io.EOF) {
			return out, nil
		}
		if err != nil && len(out) > 0 {
			return out, nil // a batch that was cut off: it is fetched again
		}
		if err != nil {
			return nil, err
		}
		r := record{kafka.Message{Topic: p.topic, Partition: p.partition, Offset: rec.Offset, Time: rec.Time}}
		if r.Key, err = protocol.ReadAll(rec.Key); err == nil {
			r.Value, err = protocol.ReadAll(rec.Value)
		}
		for _, c := range []protocol.Bytes{rec.Key, rec.Value} {
			if c != nil {
				_ = c.Close()
			}
		}
		if err != nil {
			return nil, err
		}
		r.Headers = append(r.Headers, rec.Headers...)
		if rec.Offset >= offset {
			out = append(out, r)
		}
	}
}
