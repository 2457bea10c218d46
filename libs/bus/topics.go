package bus

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/segmentio/kafka-go"

	"github.com/tidewaiter/tidewaiter/contracts"
)

const (
	retrySuffix      = ".retry"
	deadLetterSuffix = ".dlq"
	// deadLetterRetention is how long dead letters are kept.
	deadLetterRetention = 90 * 24 * time.Hour
	ensurePause         = 100 * time.Millisecond
)

// topic returns where events of a kind and lane travel.
func (b *Bus) topic(kind contracts.EventKind, lane string) string {
	if kind.Bulk && lane == contracts.LaneBulk {
		return b.cfg.Prefix + kind.Topic + contracts.BulkSuffix
	}
	return b.cfg.Prefix + kind.Topic
}

// retryTopic and deadLetterTopic belong to both lanes of a topic: base is the
// topic without the suffix of the bulk lane.
func (b *Bus) retryTopic(base string) string { return base + "." + b.service + retrySuffix }

func (b *Bus) deadLetterTopic(base string) string { return base + "." + b.service + deadLetterSuffix }

// kindNamed returns the event kind of a contracts name.
func (b *Bus) kindNamed(name string) (contracts.EventKind, error) {
	kind, ok := b.kinds[contracts.TypePrefix+name]
	if !ok {
		return contracts.EventKind{}, fmt.Errorf("event %q: %w", name, ErrUnknownEvent)
	}
	return kind, nil
}

// EnsureTopics creates the topics of the named events (contracts names) and
// their bulk lanes, and waits until they have leaders. Topics that exist are
// left as they are. The retry topics and dead letters of what a service
// consumes are created by Consume.
func (b *Bus) EnsureTopics(ctx context.Context, names ...string) error {
	var topics []kafka.TopicConfig
	seen := make(map[string]bool)
	for _, name := range names {
		kind, err := b.kindNamed(name)
		if err != nil {
			return err
		}
		for _, t := range b.topicsOf(kind) {
			if !seen[t] {
				seen[t] = true
				topics = append(topics, b.topicConfig(t))
			}
		}
	}
	return b.ensure(ctx, topics)
}

// topicsOf returns the topics of a kind, one a lane.
func (b *Bus) topicsOf(kind contracts.EventKind) []string {
	topics := []string{b.topic(kind, contracts.LaneFresh)}
	if kind.Bulk {
		topics = append(topics, b.topic(kind, contracts.LaneBulk))
	}
	return topics
}

func (b *Bus) topicConfig(topic string) kafka.TopicConfig {
	c := kafka.TopicConfig{
		Topic:             topic,
		NumPartitions:     b.cfg.Partitions,
		ReplicationFactor: b.cfg.Replication,
	}
	if strings.HasSuffix(topic, deadLetterSuffix) {
		c.NumPartitions = 1
		c.ConfigEntries = []kafka.ConfigEntry{
			{ConfigName: "retention.ms", ConfigValue: strconv.FormatInt(deadLetterRetention.Milliseconds(), 10)},
			{ConfigName: "max.message.bytes", ConfigValue: strconv.Itoa(MaxDeadLetterBytes + 128<<10)},
		}
	}
	return c
}

// ensure creates what is missing and returns when all topics have leaders. An
// outage of Kafka is waited for until ctx ends.
func (b *Bus) ensure(ctx context.Context, topics []kafka.TopicConfig) error {
	for attempt := 0; len(topics) > 0; attempt++ {
		missing, err := b.missing(ctx, topics)
		if err == nil && len(missing) == 0 {
			break
		}
		if err == nil {
			if err = b.create(ctx, missing); err == nil && attempt == 0 {
				continue
			}
		}
		if err != nil && !temporary(err) {
			return err
		}
		if err != nil {
			b.trouble("topics", err)
			b.log.WarnContext(ctx, "topics cannot be created yet", "error", err)
		}
		if !sleep(ctx, backoff(attempt, ensurePause, time.Second)) {
			return fmt.Errorf("create topics: %w", errors.Join(ctx.Err(), err))
		}
	}
	b.trouble("topics", nil)
	return nil
}

// missing returns the topics that do not exist or have a partition without a leader.
func (b *Bus) missing(ctx context.Context, topics []kafka.TopicConfig) ([]kafka.TopicConfig, error) {
	names := make([]string, len(topics))
	for i, t := range topics {
		names[i] = t.Topic
	}
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	meta, err := b.client.Metadata(ctx, &kafka.MetadataRequest{Topics: names})
	if err != nil {
		return nil, fmt.Errorf("read topics: %w", err)
	}
	led := make(map[string]bool)
	for _, t := range meta.Topics {
		led[t.Name] = t.Error == nil && len(t.Partitions) > 0
		for _, p := range t.Partitions {
			if p.Error != nil || p.Leader.Host == "" {
				led[t.Name] = false
			}
		}
	}
	var missing []kafka.TopicConfig
	for _, t := range topics {
		if !led[t.Topic] {
			missing = append(missing, t)
		}
	}
	return missing, nil
}

// create asks for topics; that one exists is no error. Asking also renews what
// the connection knows of topics.
func (b *Bus) create(ctx context.Context, topics []kafka.TopicConfig) error {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	res, err := b.client.CreateTopics(ctx, &kafka.CreateTopicsRequest{Topics: topics})
	if err != nil {
		return fmt.Errorf("create topics: %w", err)
	}
	for topic, err := range res.Errors {
		switch {
		case err == nil || errors.Is(err, kafka.TopicAlreadyExists):
		case errors.Is(err, kafka.TopicAuthorizationFailed) || errors.Is(err, kafka.ClusterAuthorizationFailed):
			return fmt.Errorf("topic %s is not there, or hidden, and this user may not create it; an administrator does (tidewaiter privileges kafka): %w", topic, err)
		default:
			return fmt.Errorf("create topic %s: %w", topic, err)
		}
	}
	return nil
}

// Topics returns the topics of the named events (contracts names) as they are
// called in Kafka, each lane's. Names that are no events are left out.
func (b *Bus) Topics(names ...string) []string {
	var out []string
	for _, name := range names {
		if kind, err := b.kindNamed(name); err == nil {
			out = append(out, b.topicsOf(kind)...)
		}
	}
	return out
}
