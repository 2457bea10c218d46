package bus

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/cloudevents/sdk-go/v2/event"
	"github.com/segmentio/kafka-go"

	"github.com/tidewaiter/tidewaiter/contracts"
)

const (
	defaultBatchSize  = 100
	joinBackoff       = time.Second
	partitionWatch    = time.Minute
	commitPause       = 20 * time.Millisecond // between two commits, so that they carry more
	commitAttempts    = 5
	lagInterval       = 15 * time.Second
	heartbeatWhenDone = time.Second // while events in hand finish
)

// Handler does the work for one event and returns the events it caused.
//
//	nil error        out is sent, then in is committed
//	Permanent(err)   in goes to the dead letters, then is committed
//	Unavailable(err) tried again until it works; the service is not ready meanwhile
//	Later(err, t)    in goes to the service's retry topic until t, then is committed
//	NotYet(err, t)   the same, for what was not really tried: it does not count
//	any other error  tried again in place a bounded number of times, then as Permanent
//
// It may see an event twice. A panic counts as Permanent. Ids, source,
// traceparent and lane of out are filled in by the bus where they are empty.
type Handler func(ctx context.Context, in event.Event) (out []event.Event, err error)

// Subscription says what a service consumes.
type Subscription struct {
	Events  []string // contracts names; bulk lanes are consumed where they exist
	Handler Handler
	// Concurrency bounds how many partitions are handled at once; 0: all.
	Concurrency int
	// OnDead returns the events to emit when an event goes to the dead letters.
	OnDead func(in event.Event, reason error) []event.Event
	// Batch, when set, replaces Handler: it is given up to BatchSize events of
	// one partition at a time, in order; all of them succeed or fail together.
	// On a Permanent or exhausted failure they are retried one by one. Outputs
	// should be filled in with Bus.Complete and the input that caused each; what
	// is left empty follows from the first event of the batch.
	Batch     func(ctx context.Context, in []event.Event) (out []event.Event, err error)
	BatchSize int // 0: 100
}

// errNotJoined is why a consumer is not ready before it has its partitions.
var errNotJoined = errors.New("not yet joined the consumer group")

// source says what a topic of a subscription is.
type source struct {
	base  string // the topic without the suffix of a lane or of retries
	lane  string // "" for retry topics: each event has its own
	retry bool
}

// consumer is one call of Consume.
type consumer struct {
	b       *Bus
	s       Subscription
	name    string // begins the names of its troubles
	group   string
	types   map[string]bool   // CloudEvents types that are handled
	sources map[string]source // by topic
}

// Consume handles events until ctx ends, then finishes those in hand, commits
// and returns nil. The consumer group is the service's name, after the prefix.
// It creates the topics it needs, and waits for Kafka while it is away.
func (b *Bus) Consume(ctx context.Context, s Subscription) error {
	c := &consumer{
		b: b, s: s, name: "consumer of " + strings.Join(s.Events, ","), group: b.Group(),
		types: make(map[string]bool), sources: make(map[string]source),
	}
	defer b.endTroubles(c.name)
	if s.Handler == nil && s.Batch == nil {
		return errors.New("consume: neither Handler nor Batch is set")
	}
	if s.BatchSize <= 0 {
		c.s.BatchSize = defaultBatchSize
	}
	topics, err := c.topics()
	if err != nil {
		return err
	}
	b.trouble(c.name, errNotJoined)
	if err := b.ensure(ctx, topics); err != nil {
		if ctx.Err() != nil {
			return nil
		}
		return fmt.Errorf("consume: %w", err)
	}
	b.mu.Lock()
	for t := range c.sources {
		b.consumed[t] = true
	}
	b.mu.Unlock()

	var background sync.WaitGroup
	defer background.Wait()
	lagCtx, stopLag := context.WithCancel(ctx)
	defer stopLag()
	background.Go(func() { b.watchLag(lagCtx) })
	return c.run(ctx)
}

// Group returns the name of the service's consumer group.
func (b *Bus) Group() string { return b.cfg.Prefix + b.service }

// topics fills c.sources and returns how its topics are created.
func (c *consumer) topics() ([]kafka.TopicConfig, error) {
	if len(c.s.Events) == 0 {
		return nil, errors.New("consume: no events are named")
	}
	var topics []kafka.TopicConfig
	add := func(topic string, s *source) {
		if _, ok := c.sources[topic]; ok {
			return
		}
		if s != nil {
			c.sources[topic] = *s
		}
		topics = append(topics, c.b.topicConfig(topic))
	}
	for _, name := range c.s.Events {
		kind, err := c.b.kindNamed(name)
		if err != nil {
			return nil, fmt.Errorf("consume: %w", err)
		}
		c.types[kind.Type()] = true
		base := c.b.topic(kind, contracts.LaneFresh)
		if _, ok := c.sources[base]; ok {
			continue // another event of the same topic
		}
		add(base, &source{base: base, lane: contracts.LaneFresh})
		if kind.Bulk {
			add(c.b.topic(kind, contracts.LaneBulk), &source{base: base, lane: contracts.LaneBulk})
		}
		add(c.b.retryTopic(base), &source{base: base, retry: true})
		add(c.b.deadLetterTopic(base), nil)
	}
	return topics, nil
}

// run joins the group and handles one generation after the other.
func (c *consumer) run(ctx context.Context) error {
	names := make([]string, 0, len(c.sources))
	for t := range c.sources {
		names = append(names, t)
	}
	shares := &balancer{}
	group, err := kafka.NewConsumerGroup(kafka.ConsumerGroupConfig{
		ID:                     c.group,
		Brokers:                c.b.cfg.Brokers,
		Dialer:                 c.b.dialer,
		Topics:                 names,
		GroupBalancers:         []kafka.GroupBalancer{shares},
		HeartbeatInterval:      heartbeatInterval,
		SessionTimeout:         c.b.cfg.SessionTimeout,
		RebalanceTimeout:       c.b.cfg.RebalanceTimeout,
		JoinGroupBackoff:       joinBackoff,
		WatchPartitionChanges:  true,
		PartitionWatchInterval: partitionWatch,
		StartOffset:            kafka.FirstOffset,
		Timeout:                dialTimeout,
	})
	if err != nil {
		return fmt.Errorf("consume: join group %s: %w", c.group, err)
	}
	for ctx.Err() == nil {
		gen, err := group.Next(ctx)
		if ctx.Err() != nil {
			break
		}
		if err != nil {
			if !errors.Is(err, kafka.RebalanceInProgress) {
				c.b.trouble(c.name, err)
				c.b.log.WarnContext(ctx, "the consumer group cannot be joined", "group", c.group, "error", err)
			}
			continue
		}
		if missing := shares.unshared(); len(missing) > 0 {
			c.b.trouble(c.name, errUnknownTopics)
			c.b.log.WarnContext(ctx, "topics could not be shared out, the group joins again", "group", c.group, "topics", missing)
			gen.Start(func(genCtx context.Context) { // with its end, the generation ends
				select {
				case <-genCtx.Done():
				case <-time.After(joinBackoff):
				}
			})
			continue
		}
		c.b.endTroubles(c.name)
		done := make(chan struct{})
		gen.Start(func(genCtx context.Context) {
			c.generation(ctx, genCtx, gen)
			close(done)
			// The generation ends with this function. On a stop it is the
			// group's end that ends it, or the group would join once more
			// before it leaves.
			if ctx.Err() != nil {
				<-genCtx.Done()
			}
		})
		<-done
	}
	if err := group.Close(); err != nil {
		return fmt.Errorf("consume: leave group %s: %w", c.group, err)
	}
	return nil
}

// work is one generation: the partitions that this member has for a while.
type work struct {
	c    *consumer
	gate *gate
	stop context.Context //nolint:containedctx // two contexts of one lifetime: when to take nothing new,
	ctx  context.Context //nolint:containedctx // and when to give up what is in hand
	done *commits
}

// generation handles the partitions of gen until it or ctx ends, finishes what
// is in hand and commits it.
func (c *consumer) generation(ctx, genCtx context.Context, gen *kafka.Generation) {
	stop, cancelStop := context.WithCancel(ctx)
	defer cancelStop()
	defer context.AfterFunc(genCtx, cancelStop)()
	hand, cancelHand := context.WithCancel(context.WithoutCancel(ctx))
	defer cancelHand()

	w := &work{c: c, gate: newGate(c.s.Concurrency), stop: stop, ctx: hand, done: newCommits(gen)}
	f := &fetcher{b: c.b, name: c.name + " fetch"}
	f.pushed = func(q *queue, n int) { w.gate.add(c.sources[q.topic].lane, n) }
	for topic, parts := range gen.Assignments {
		for _, p := range parts {
			f.queues = append(f.queues, newQueue(position{topic, p.ID}, p.Offset))
		}
	}
	c.b.log.InfoContext(ctx, "partitions assigned", "group", c.group, "generation", gen.ID, "partitions", len(f.queues))

	c.b.member(1)
	defer c.b.member(-1)
	var workers, rest sync.WaitGroup
	for _, q := range f.queues {
		if c.sources[q.topic].retry {
			workers.Go(func() { w.retries(q) })
		} else {
			workers.Go(func() { w.partition(q) })
		}
	}
	finished := make(chan struct{})
	rest.Go(func() { f.run(stop) })
	rest.Go(func() { w.commit(finished, cancelStop) })
	rest.Go(func() { w.drain(gen, finished, cancelHand) })
	if len(f.queues) == 0 {
		<-stop.Done()
	}
	workers.Wait()
	close(finished)
	rest.Wait()
	c.b.endTroubles(c.name)
}

// drain gives the events in hand their time after a stop, and keeps the member
// alive meanwhile: the generation's own heartbeats have ended by then.
func (w *work) drain(gen *kafka.Generation, finished <-chan struct{}, cancelHand func()) {
	select {
	case <-finished:
		return
	case <-w.stop.Done():
	}
	limit := time.NewTimer(w.c.b.cfg.Drain)
	defer limit.Stop()
	beat := time.NewTicker(heartbeatWhenDone)
	defer beat.Stop()
	for {
		select {
		case <-finished:
			return
		case <-limit.C:
			cancelHand()
			w.c.b.log.WarnContext(w.ctx, "events in hand did not finish in time, they will be handled again", "drain", w.c.b.cfg.Drain)
			return
		case <-beat.C:
			ctx, cancel := context.WithTimeout(w.ctx, heartbeatWhenDone)
			// The answer says that the group rebalances, which is known.
			_, _ = w.c.b.client.Heartbeat(ctx, &kafka.HeartbeatRequest{
				GroupID: gen.GroupID, GenerationID: gen.ID, MemberID: gen.MemberID,
			})
			cancel()
		}
	}
}

// commits collects what may be committed: of each partition the offset below
// which everything is finished.
type commits struct {
	gen   *kafka.Generation
	mu    sync.Mutex
	next  map[string]map[int]int64
	dirty chan struct{} // capacity 1
}

func newCommits(gen *kafka.Generation) *commits {
	return &commits{gen: gen, next: make(map[string]map[int]int64), dirty: make(chan struct{}, 1)}
}

// mark says that everything of a partition below next is finished.
func (c *commits) mark(p position, next int64) {
	c.mu.Lock()
	parts := c.next[p.topic]
	if parts == nil {
		parts = make(map[int]int64)
		c.next[p.topic] = parts
	}
	parts[p.partition] = next
	c.mu.Unlock()
	signal(c.dirty)
}

// flush commits what was marked since the last time. What fails for the moment
// is tried again a few times; the broker refuses a generation that is over.
func (c *commits) flush() error {
	c.mu.Lock()
	offsets := c.next
	c.next = make(map[string]map[int]int64)
	c.mu.Unlock()
	if len(offsets) == 0 {
		return nil
	}
	var err error
	for attempt := range commitAttempts {
		if err = c.gen.CommitOffsets(offsets); err == nil || stale(err) {
			break
		}
		time.Sleep(backoff(attempt, 20*time.Millisecond, 200*time.Millisecond))
	}
	if err != nil {
		return fmt.Errorf("commit: %w", err)
	}
	return nil
}

// stale says whether the broker refused a commit because the member's
// partitions have been given away.
func stale(err error) bool {
	return errors.Is(err, kafka.IllegalGeneration) || errors.Is(err, kafka.UnknownMemberId) ||
		errors.Is(err, kafka.RebalanceInProgress) || errors.Is(err, kafka.FencedInstanceID)
}

// commit commits as events finish, until all workers have ended. A commit that
// is refused ends the generation: nothing more may be taken from it.
func (w *work) commit(finished <-chan struct{}, end func()) {
	for {
		over := false
		select {
		case <-w.done.dirty:
		case <-finished:
			over = true
		}
		if err := w.done.flush(); err != nil {
			w.c.b.log.WarnContext(w.ctx, "finished events could not be committed and may be handled again", "error", err)
			end()
		}
		if over {
			return
		}
		select {
		case <-finished:
		case <-time.After(commitPause):
		}
	}
}

// partition handles one partition's events in their order.
func (w *work) partition(q *queue) {
	src := w.c.sources[q.topic]
	n := 1
	if w.c.s.Batch != nil {
		n = w.c.s.BatchSize
	}
	for {
		rs := q.pop(w.stop, n)
		if len(rs) == 0 {
			return
		}
		if !w.handle(src, rs) {
			return
		}
		w.gate.finish(src.lane, len(rs))
		w.done.mark(q.position, rs[len(rs)-1].Offset+1)
	}
}
