// Package bus carries CloudEvents over Kafka. It is the only package that
// imports kafka-go.
package bus

import (
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"time"

	"github.com/cloudevents/sdk-go/v2/event"
	"github.com/prometheus/client_golang/prometheus"
)

// Handler does the work for one event and returns the events it caused.
//
//	nil error        out is sent, then in is committed
//	Permanent(err)   in goes to the dead letters, then is committed
//	Unavailable(err) tried again until it works; the service is not ready meanwhile
//	Later(err, t)    in goes to the service's retry topic until t, then is committed
//	any other error  tried again in place a bounded number of times, then as Permanent
//
// It may see an event twice. A panic counts as Permanent. Ids, source,
// traceparent and lane of out are filled in by the bus where they are empty.
type Handler func(ctx context.Context, in event.Event) (out []event.Event, err error)

var errUnbuilt = errors.New("unbuilt")

// Permanent marks err as not worth another try.
func Permanent(err error) error { return err }

// Unavailable marks err as the outage of something the service cannot work without.
func Unavailable(err error) error { return err }

// Later marks err as something to try again at or after t, out of the way of other events.
func Later(err error, t time.Time) error { return err }

// Outcome classifies a handler's error. For Later it also returns the time.
type Outcome int

const (
	OutcomeOK Outcome = iota
	OutcomePermanent
	OutcomeUnavailable
	OutcomeLater
	OutcomeRetry
)

// Classify returns the outcome that err asks for.
func Classify(err error) (Outcome, time.Time) { return OutcomeOK, time.Time{} }

// Config says how Kafka is reached. YAML section "kafka".
type Config struct {
	Brokers     []string    `yaml:"brokers"`
	Prefix      string      `yaml:"prefix"`      // before every topic
	Partitions  int         `yaml:"partitions"`  // of topics that are created
	Replication int         `yaml:"replication"` // of topics that are created
	TLS         *tls.Config `yaml:"-"`
	Username    string      `yaml:"username"` // SASL/SCRAM-SHA-512
	Password    string      `yaml:"-"`
}

// Bus is a connection to Kafka for one service.
type Bus struct{}

// New returns a bus for the named service; nothing is connected yet.
func New(cfg Config, service string, log *slog.Logger, reg prometheus.Registerer) (*Bus, error) {
	return nil, errUnbuilt
}

// Close ends the publisher's connections.
func (b *Bus) Close() error { return nil }

// EnsureTopics creates the topics of the named events (contracts names), their
// bulk lanes, and where a service consumes them its retry topics and dead
// letters. Topics that exist are left as they are.
func (b *Bus) EnsureTopics(ctx context.Context, names ...string) error { return errUnbuilt }

// Publish sends events and returns when all are stored (acks=all). The topic
// follows from the event's type and lane, the key from its partitionkey
// extension, or its subject where that is absent.
func (b *Bus) Publish(ctx context.Context, events ...event.Event) error { return errUnbuilt }

// PublishDeadLetter stores raw bytes that could not be understood in
// <topic>.<service>.dlq. headers must hold no credentials.
func (b *Bus) PublishDeadLetter(ctx context.Context, topic, reason string, body []byte, headers map[string]string) error {
	return errUnbuilt
}

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
	// On a Permanent or exhausted failure they are retried one by one.
	Batch     func(ctx context.Context, in []event.Event) (out []event.Event, err error)
	BatchSize int
}

// Consume handles events until ctx ends, then finishes those in hand, commits
// and returns nil. The consumer group is the service's name.
func (b *Bus) Consume(ctx context.Context, s Subscription) error { return errUnbuilt }

// Ready returns nil, or why the consumer cannot work now (for the health check).
func (b *Bus) Ready() error { return errUnbuilt }

// Lag returns, by topic, how many events of the service's subscriptions wait, as the broker says.
func (b *Bus) Lag(ctx context.Context) (map[string]int64, error) { return nil, errUnbuilt }
