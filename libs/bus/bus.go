// Package bus carries CloudEvents over Kafka. It is the only package that
// imports kafka-go.
//
// Delivery is at least once: outputs are stored before their input is
// committed, and only the contiguous prefix of a partition is committed.
package bus

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/cloudevents/sdk-go/v2/event"
	"github.com/cloudevents/sdk-go/v2/types"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/segmentio/kafka-go"

	"github.com/tidewaiter/tidewaiter/contracts"
)

// Errors that Publish and the dead letter functions wrap.
var (
	// ErrTooLarge is returned for an event over MaxMessageBytes and a dead
	// letter over MaxDeadLetterBytes.
	ErrTooLarge = errors.New("too large for Kafka")
	// ErrUnknownEvent is returned for an event whose type contracts does not list.
	ErrUnknownEvent = errors.New("unknown event")
	// ErrNotFound is returned when there is no such dead letter.
	ErrNotFound = errors.New("no such dead letter")
	// ErrNotReplayable is returned for a dead letter that never was an event of a topic.
	ErrNotReplayable = errors.New("not replayable")
	// ErrDropped is returned for a dead letter that was dropped.
	ErrDropped = errors.New("was dropped")
)

// Limits of what is stored.
const (
	// MaxMessageBytes bounds an encoded event: its data and room for its attributes.
	MaxMessageBytes = contracts.MaxEventBytes + 16<<10
	// MaxDeadLetterBytes bounds the body of a dead letter.
	MaxDeadLetterBytes = 4 << 20
)

// Defaults of Config.
const (
	// DefaultPartitions is how many partitions a topic is created with.
	DefaultPartitions = 4
	// DefaultReplication is how many replicas a topic is created with.
	DefaultReplication = 1
	// DefaultAttempts is how often an ordinary failure is tried before the dead letters.
	DefaultAttempts = 5
	// DefaultRetryBackoff is the pause after the first ordinary failure; it triples each time.
	DefaultRetryBackoff = 250 * time.Millisecond
	// DefaultSessionTimeout is after how long without a heartbeat a member counts as dead.
	DefaultSessionTimeout = 10 * time.Second
	// DefaultRebalanceTimeout is how long the group waits for a member to let go of its partitions.
	DefaultRebalanceTimeout = 30 * time.Second
	// DefaultDrain is how long an event in hand may take to finish after a stop
	// or a rebalance. It is less than DefaultRebalanceTimeout.
	DefaultDrain = 25 * time.Second
)

const (
	publishTimeout = 30 * time.Second
	publishTrouble = 10 * time.Second
	batchTimeout   = 2 * time.Millisecond
	batchSize      = 500
	// Kafka measures a whole batch against the topic's max.message.bytes: one of
	// events must stay below the default of 1,048,588 bytes, and holds at least
	// one; only topics of dead letters take more.
	eventBatchBytes   = 900 << 10
	letterBatchBytes  = MaxDeadLetterBytes + 64<<10
	maxBackoff        = 5 * time.Second
	heartbeatInterval = 500 * time.Millisecond
	metadataTTL       = 5 * time.Second
	dialTimeout       = 5 * time.Second
	requestTimeout    = 10 * time.Second
)

// Config says how Kafka is reached. YAML section "kafka".
type Config struct {
	Brokers     []string    `yaml:"brokers"`
	Prefix      string      `yaml:"prefix"`      // before every topic and group
	Partitions  int         `yaml:"partitions"`  // of topics that are created
	Replication int         `yaml:"replication"` // of topics that are created
	TLS         *tls.Config `yaml:"-"`
	Mechanism   string      `yaml:"mechanism"` // of SASL: SCRAM-SHA-512 (default), SCRAM-SHA-256, PLAIN (over TLS only)
	Username    string      `yaml:"username"`  // of SASL; empty: none
	Password    string      `yaml:"-"`

	// TLSSource and PasswordSource, where set, are asked at every connection and
	// go before TLS and Password.
	TLSSource      func() (*tls.Config, error) `yaml:"-"`
	PasswordSource func() (string, error)      `yaml:"-"`

	Attempts         int           `yaml:"attempts"`         // at an event that fails in an ordinary way
	RetryBackoff     time.Duration `yaml:"retryBackoff"`     // after the first such failure
	SessionTimeout   time.Duration `yaml:"sessionTimeout"`   // of a member without heartbeats
	RebalanceTimeout time.Duration `yaml:"rebalanceTimeout"` // of a member that must let go
	Drain            time.Duration `yaml:"drain"`            // for the event in hand; below rebalanceTimeout
}

// withDefaults returns c with defaults in place of zero values.
func (c Config) withDefaults() Config {
	setDefault(&c.Partitions, DefaultPartitions)
	setDefault(&c.Replication, DefaultReplication)
	setDefault(&c.Mechanism, ScramSHA512)
	setDefault(&c.Attempts, DefaultAttempts)
	setDefault(&c.RetryBackoff, DefaultRetryBackoff)
	setDefault(&c.SessionTimeout, DefaultSessionTimeout)
	setDefault(&c.RebalanceTimeout, DefaultRebalanceTimeout)
	if c.Drain == 0 {
		c.Drain = min(DefaultDrain, c.RebalanceTimeout*5/6)
	}
	return c
}

func setDefault[T comparable](v *T, to T) {
	var zero T
	if *v == zero {
		*v = to
	}
}

// Validate says what is wrong with the configuration.
func (c Config) Validate() error {
	c = c.withDefaults()
	switch {
	case c.Mechanism != ScramSHA512 && c.Mechanism != ScramSHA256 && c.Mechanism != Plain:
		return fmt.Errorf("kafka: mechanism %q is none of %s, %s, %s", c.Mechanism, ScramSHA512, ScramSHA256, Plain)
	case c.Mechanism == Plain && c.TLS == nil && c.TLSSource == nil:
		return errors.New("kafka: mechanism PLAIN hands the password over, it needs tls")
	case len(c.Brokers) == 0:
		return errors.New("kafka: brokers is empty")
	case c.Partitions < 0 || c.Replication < 0 || c.Attempts < 0:
		return errors.New("kafka: partitions, replication and attempts must not be negative")
	case c.RetryBackoff < 0 || c.SessionTimeout < 0 || c.RebalanceTimeout < 0 || c.Drain < 0:
		return errors.New("kafka: durations must not be negative")
	case c.Drain >= c.RebalanceTimeout:
		return fmt.Errorf("kafka: drain (%s) must be below rebalanceTimeout (%s)", c.Drain, c.RebalanceTimeout)
	case c.Username == "" && c.Password != "":
		return errors.New("kafka: a password without a username")
	}
	for _, r := range c.Prefix {
		if (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') && !strings.ContainsRune("._-", r) {
			return fmt.Errorf("kafka: prefix %q: only letters, digits, '.', '_' and '-'", c.Prefix)
		}
	}
	return nil
}

// trouble is something that keeps the bus from working.
type trouble struct {
	err   error
	until time.Time // not zero: forgotten then, unless it is seen again
}

// Bus is a connection to Kafka for one service. It is safe for concurrent use.
type Bus struct {
	cfg       Config
	service   string
	log       *slog.Logger
	kinds     map[string]contracts.EventKind // by CloudEvents type
	conns     *connections
	transport *kafka.Transport
	client    *kafka.Client
	events    *kafka.Writer // to all topics but those of dead letters
	letters   *kafka.Writer // to the dead letters
	dialer    *kafka.Dialer
	metrics   *metrics

	mu       sync.Mutex
	troubles map[string]trouble // what keeps the bus from working, by what
	consumed map[string]bool    // topics of all subscriptions
	members  int                // subscriptions that have their partitions now
}

// New returns a bus for the named service; nothing is connected yet. reg may be
// nil, and several buses may share one.
func New(cfg Config, service string, log *slog.Logger, reg prometheus.Registerer) (*Bus, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	if service == "" || strings.ContainsAny(service, ". /") {
		return nil, fmt.Errorf("service name %q: must not be empty nor hold '.', '/' or a blank", service)
	}
	cfg = cfg.withDefaults()
	clientID := "tidewaiter-" + service
	mechanism, err := newLogin(cfg)
	if err != nil {
		return nil, err
	}
	conns := &connections{open: make(map[*connection]struct{})}
	transport := &kafka.Transport{
		Dial:        secured(conns.dial, cfg),
		DialTimeout: dialTimeout,
		MetadataTTL: metadataTTL,
		ClientID:    clientID,
		SASL:        mechanism,
	}
	dialer := &kafka.Dialer{ClientID: clientID, Timeout: dialTimeout, DialFunc: secured(dialPlain, cfg), SASLMechanism: mechanism}
	addr := kafka.TCP(cfg.Brokers...)
	b := &Bus{
		cfg:       cfg,
		service:   service,
		log:       log.With("component", "bus"),
		kinds:     make(map[string]contracts.EventKind),
		conns:     conns,
		transport: transport,
		client:    &kafka.Client{Addr: addr, Timeout: requestTimeout, Transport: transport},
		events:    newWriter(addr, transport, eventBatchBytes),
		letters:   newWriter(addr, transport, letterBatchBytes),
		dialer:    dialer,
		metrics:   newMetrics(reg, service),
		troubles:  make(map[string]trouble),
		consumed:  make(map[string]bool),
	}
	for _, k := range contracts.Events() {
		b.kinds[k.Type()] = k
	}
	return b, nil
}

func newWriter(addr net.Addr, transport *kafka.Transport, batchBytes int64) *kafka.Writer {
	return &kafka.Writer{
		Addr:         addr,
		Balancer:     &kafka.Hash{},
		RequiredAcks: kafka.RequireAll,
		BatchTimeout: batchTimeout,
		BatchSize:    batchSize,
		BatchBytes:   batchBytes,
		MaxAttempts:  5,
		Transport:    transport,
	}
}

// Close ends the publisher's connections. Consume must have returned before.
func (b *Bus) Close() error {
	err := errors.Join(b.events.Close(), b.letters.Close())
	b.transport.CloseIdleConnections()
	b.conns.close()
	return err
}

// Ready returns nil, or why the consumer cannot work now (for the health
// check): Kafka cannot be reached, or a handler reports an outage.
func (b *Bus) Ready() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	whats := make([]string, 0, len(b.troubles))
	for what, t := range b.troubles {
		if !t.until.IsZero() && time.Now().After(t.until) {
			delete(b.troubles, what)
			continue
		}
		whats = append(whats, what)
	}
	if len(whats) == 0 {
		return nil
	}
	slices.Sort(whats)
	return fmt.Errorf("%s: %w", whats[0], b.troubles[whats[0]].err)
}

// Joined says whether a subscription has been given its partitions.
func (b *Bus) Joined() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.members > 0
}

func (b *Bus) member(n int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.members += n
}

// trouble records what keeps the bus from working; nil ends it.
func (b *Bus) trouble(what string, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if err == nil {
		delete(b.troubles, what)
		return
	}
	b.troubles[what] = trouble{err: err}
}

// published records how publishing went. A failure is forgotten after a while:
// a service that only publishes gets no work, and so no chance to succeed,
// while it is not ready.
func (b *Bus) published(err error) {
	b.trouble("publish", err)
	if err == nil {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.troubles["publish"] = trouble{err: err, until: time.Now().Add(publishTrouble)}
}

// endTroubles forgets the troubles whose names begin with prefix.
func (b *Bus) endTroubles(prefix string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for what := range b.troubles {
		if strings.HasPrefix(what, prefix) {
			delete(b.troubles, what)
		}
	}
}

// Publish sends events and returns when all are stored (acks=all). The topic
// follows from the event's type and lane, the key from its partitionkey
// extension, or its subject where that is absent. An empty id becomes a random
// one, an empty source the service's; id, source, time, lane and traceparent of
// the events given are not changed where they are set.
//
// It tries for 30 s, or until ctx ends. After an error some or all of the
// events may be stored nevertheless.
func (b *Bus) Publish(ctx context.Context, events ...event.Event) error {
	msgs := make([]kafka.Message, 0, len(events))
	for i := range events {
		ev := events[i].Clone()
		b.complete(ctx, &ev, nil)
		m, err := b.encode(ctx, &ev)
		if err != nil {
			return err
		}
		msgs = append(msgs, m)
	}
	ctx, cancel := context.WithTimeout(ctx, publishTimeout)
	defer cancel()
	err := b.write(ctx, msgs)
	b.published(err)
	return err
}

// Complete fills in what a handler left empty in the events that in caused: id
// (contracts.OutputID), source, time, lane and the starting traceparent. The
// bus does it to whatever a handler returns; services that store their output
// before they send it call it themselves.
func (b *Bus) Complete(ctx context.Context, in event.Event, out []event.Event) {
	for i := range out {
		b.complete(ctx, &out[i], &in)
	}
}

// complete fills in one event; in is nil for an event that nothing caused.
func (b *Bus) complete(ctx context.Context, ev, in *event.Event) {
	if ev.ID() == "" {
		if in != nil {
			ev.SetID(contracts.OutputID(b.service, in.Source(), in.ID(), ev.Type(), ev.Subject()))
		} else {
			ev.SetID(randomHex(16))
		}
	}
	if ev.Source() == "" {
		ev.SetSource("/services/" + b.service)
	}
	if ev.Time().IsZero() {
		ev.SetTime(time.Now().UTC())
	}
	if extension(ev, contracts.ExtLane) == "" {
		lane := contracts.LaneFresh
		if in != nil && extension(in, contracts.ExtLane) != "" {
			lane = extension(in, contracts.ExtLane)
		}
		ev.SetExtension(contracts.ExtLane, lane)
	}
	if extension(ev, contracts.ExtTraceparent) != "" {
		return
	}
	if in != nil && extension(in, contracts.ExtTraceparent) != "" {
		ev.SetExtension(contracts.ExtTraceparent, extension(in, contracts.ExtTraceparent))
		return
	}
	t, ok := ctx.Value(traceKey{}).(trace)
	if !ok {
		t = newTrace()
	}
	ev.SetExtension(contracts.ExtTraceparent, t.String())
}

// extension returns an extension attribute as a string, "" where it is absent.
func extension(ev *event.Event, name string) string {
	v, ok := ev.Extensions()[name]
	if !ok {
		return ""
	}
	s, err := types.Format(v)
	if err != nil {
		return ""
	}
	return s
}

// encode returns the message of a completed event, with its topic and the
// traceparent of this hop. Errors are lasting ones.
func (b *Bus) encode(ctx context.Context, ev *event.Event) (kafka.Message, error) {
	kind, ok := b.kinds[ev.Type()]
	if !ok {
		return kafka.Message{}, fmt.Errorf("publish %q: %w", ev.Type(), ErrUnknownEvent)
	}
	m, err := encodeEvent(ctx, ev)
	if err != nil {
		return kafka.Message{}, err
	}
	if n := len(m.Value) + len(m.Key); n > MaxMessageBytes {
		return kafka.Message{}, fmt.Errorf("publish %s %s: %d bytes, at most %d; big things go by digest: %w",
			ev.Type(), ev.ID(), n, MaxMessageBytes, ErrTooLarge)
	}
	m.Topic = b.topic(kind, extension(ev, contracts.ExtLane))
	hop, ok := ctx.Value(traceKey{}).(trace)
	if !ok {
		hop, ok = parseTrace(extension(ev, contracts.ExtTraceparent))
	}
	if !ok {
		hop = newTrace()
	}
	m.Headers = append(m.Headers, kafka.Header{Key: headerTraceparent, Value: []byte(hop.child().String())})
	return m, nil
}

// write stores messages, dead letters behind all others, and tries again what
// Kafka refused for the moment until ctx ends.
func (b *Bus) write(ctx context.Context, msgs []kafka.Message) error {
	var events, letters []kafka.Message
	for i := range msgs {
		if strings.HasSuffix(msgs[i].Topic, deadLetterSuffix) {
			letters = append(letters, msgs[i])
		} else {
			events = append(events, msgs[i])
		}
	}
	if err := b.store(ctx, b.events, events); err != nil {
		return err
	}
	return b.store(ctx, b.letters, letters)
}

func (b *Bus) store(ctx context.Context, writer *kafka.Writer, msgs []kafka.Message) error {
	for attempt := 0; len(msgs) > 0; attempt++ {
		err := writer.WriteMessages(ctx, msgs...)
		if err == nil {
			return nil
		}
		var each kafka.WriteErrors
		if errors.As(err, &each) && len(each) == len(msgs) {
			var failed []kafka.Message
			for i, e := range each {
				if e != nil {
					failed = append(failed, msgs[i])
					err = e
				}
			}
			msgs = failed
		}
		b.metrics.publishFailures.Add(float64(len(msgs)))
		if ctx.Err() != nil || !temporary(err) || !sleep(ctx, backoff(attempt, 50*time.Millisecond, time.Second)) {
			return fmt.Errorf("store %d events in Kafka: %w", len(msgs), err)
		}
	}
	return nil
}

// temporary says whether another try may help.
func temporary(err error) bool {
	var tooLarge kafka.MessageTooLargeError
	if errors.As(err, &tooLarge) {
		return false
	}
	var code kafka.Error
	if !errors.As(err, &code) {
		return true // the network
	}
	switch code {
	case kafka.UnknownTopicOrPartition, // not yet known to the broker asked
		kafka.SASLAuthenticationFailed: // a password that is being changed
		return true
	default:
		return code.Temporary()
	}
}

// backoff returns the pause after the given attempt, 0 being the first: base,
// doubled each time, at most limit.
func backoff(attempt int, base, limit time.Duration) time.Duration {
	d := base
	for range min(attempt, 30) {
		if d *= 2; d >= limit {
			return limit
		}
	}
	return d
}

// sleep waits for d and returns false when ctx ends first.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}
