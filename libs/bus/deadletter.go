package bus

import (
	"cmp"
	"context"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/segmentio/kafka-go"

	"github.com/tidewaiter/tidewaiter/contracts"
)

const (
	maxReasonBytes = 1024
	// maxHeaderBytes bounds a foreign header that is kept with a dead letter.
	maxHeaderBytes = 4096
)

var (
	userinfoPattern    = regexp.MustCompile(`://[^/@\s"']+@`)
	credentialsPattern = regexp.MustCompile(`(?i)\b(bearer|basic)\s+[A-Za-z0-9._~+/=-]{6,}`)
	parameterPattern   = regexp.MustCompile(`(?i)\b(password|passwd|secret|token|access_token|api[_-]?key|signature)=[^&\s"']+`)
	secretHeader       = regexp.MustCompile(`(?i)auth|cookie|token|secret|passw|signature|credential|api-?key`)
)

// Redact takes what looks like a credential out of a text and bounds its
// length to 1 KiB. The bus does it to the reasons of dead letters.
func Redact(s string) string {
	s = userinfoPattern.ReplaceAllString(s, "://***@")
	s = credentialsPattern.ReplaceAllString(s, "$1 ***")
	s = parameterPattern.ReplaceAllString(s, "$1=***")
	s = strings.ToValidUTF8(s, "\uFFFD")
	for len(s) > maxReasonBytes {
		_, n := utf8.DecodeLastRuneInString(s[:maxReasonBytes+1])
		s = s[:maxReasonBytes+1-n]
	}
	return s
}

// header returns a header's value, "" where it is absent.
func header(m *kafka.Message, key string) string {
	for _, h := range m.Headers {
		if h.Key == key {
			return string(h.Value)
		}
	}
	return ""
}

func headerInt(m *kafka.Message, key string) int {
	n, err := strconv.Atoi(header(m, key))
	if err != nil {
		return 0
	}
	return n
}

// foreignHeaders returns the headers that are not ours.
func foreignHeaders(m *kafka.Message) []kafka.Header {
	var kept []kafka.Header
	for _, h := range m.Headers {
		if !strings.HasPrefix(h.Key, headerPrefixOwn) {
			kept = append(kept, h)
		}
	}
	return kept
}

func originHeaders(o origin) []kafka.Header {
	return []kafka.Header{
		{Key: headerOriginTopic, Value: []byte(o.topic)},
		{Key: headerOriginPartition, Value: []byte(strconv.Itoa(o.partition))},
		{Key: headerOriginOffset, Value: []byte(strconv.FormatInt(o.offset, 10))},
	}
}

// originOf reads what originHeaders wrote.
func originOf(m *kafka.Message) origin {
	offset, err := strconv.ParseInt(header(m, headerOriginOffset), 10, 64)
	if err != nil {
		offset = -1
	}
	return origin{header(m, headerOriginTopic), headerInt(m, headerOriginPartition), offset}
}

func (b *Bus) deadLetterHeaders(reason string, attempts int) []kafka.Header {
	return []kafka.Header{
		{Key: headerReason, Value: []byte(Redact(reason))},
		{Key: headerAttempts, Value: []byte(strconv.Itoa(attempts))},
		{Key: headerService, Value: []byte(b.service)},
		{Key: headerTime, Value: []byte(time.Now().UTC().Format(time.RFC3339Nano))},
	}
}

// PublishDeadLetter stores raw bytes that could not be understood in
// <topic>.<service>.dlq, where topic is a contracts name. headers must hold no
// credentials; those that look like one are left out. The body is at most
// MaxDeadLetterBytes: ErrTooLarge.
func (b *Bus) PublishDeadLetter(ctx context.Context, topic, reason string, body []byte, headers map[string]string) error {
	if len(body) > MaxDeadLetterBytes {
		return fmt.Errorf("dead letter of %d bytes, at most %d: %w", len(body), MaxDeadLetterBytes, ErrTooLarge)
	}
	base := b.cfg.Prefix + topic
	m := kafka.Message{Topic: b.deadLetterTopic(base), Value: body}
	for name, value := range headers {
		if secretHeader.MatchString(name) || strings.HasPrefix(name, headerPrefixOwn) || len(value) > maxHeaderBytes {
			continue
		}
		m.Headers = append(m.Headers, kafka.Header{Key: name, Value: []byte(Redact(value))})
	}
	slices.SortFunc(m.Headers, func(x, y kafka.Header) int { return cmp.Compare(x.Key, y.Key) })
	m.Headers = append(m.Headers, b.deadLetterHeaders(reason, 1)...)

	ctx, cancel := context.WithTimeout(ctx, publishTimeout)
	defer cancel()
	if err := b.ensure(ctx, []kafka.TopicConfig{b.topicConfig(m.Topic)}); err != nil {
		return fmt.Errorf("dead letter: %w", err)
	}
	err := b.write(ctx, []kafka.Message{m})
	b.published(err)
	if err != nil {
		return fmt.Errorf("dead letter: %w", err)
	}
	b.metrics.deadLetters.WithLabelValues(base).Inc()
	return nil
}

// DeadLetterFilter selects dead letters; the zero value selects all.
type DeadLetterFilter struct {
	IDs     []string      // these only
	Topic   string        // the topic they came from, with or without prefix and lane
	Service string        // that gave up
	Reason  string        // part of the reason
	Older   time.Duration // at least this old
	Younger time.Duration // at most this old
	Waiting bool          // only those that were not replayed
}

func (f DeadLetterFilter) matches(prefix string, d contracts.DeadLetter, now time.Time) bool {
	age := now.Sub(d.Time)
	switch {
	case len(f.IDs) > 0 && !slices.Contains(f.IDs, d.ID):
		return false
	case f.Service != "" && f.Service != d.Service:
		return false
	case f.Reason != "" && !strings.Contains(d.Reason, f.Reason):
		return false
	case f.Older > 0 && age < f.Older, f.Younger > 0 && age > f.Younger:
		return false
	case f.Waiting && d.Replayed:
		return false
	}
	if f.Topic == "" {
		return true
	}
	base := strings.TrimSuffix(strings.TrimSuffix(d.Topic, deadLetterSuffix), "."+d.Service)
	originTopic, _, _ := strings.Cut(d.Origin, "/")
	for _, t := range []string{base, originTopic, d.Topic} {
		if t == f.Topic || t == prefix+f.Topic {
			return true
		}
	}
	return false
}

// deadLetter is a dead letter with the message that it is.
type deadLetter struct {
	contracts.DeadLetter
	message kafka.Message
	origin  origin
}

// ListDeadLetters returns the dead letters of all services that the filter
// selects, oldest first.
func (b *Bus) ListDeadLetters(ctx context.Context, f DeadLetterFilter) ([]contracts.DeadLetter, error) {
	letters, err := b.deadLetters(ctx, f)
	if err != nil {
		return nil, err
	}
	out := make([]contracts.DeadLetter, len(letters))
	for i := range letters {
		out[i] = letters[i].DeadLetter
	}
	return out, nil
}

// ReadDeadLetter returns one dead letter by its id, with its headers and the
// bytes of the message. ErrNotFound when there is none.
func (b *Bus) ReadDeadLetter(ctx context.Context, id string) (contracts.DeadLetter, map[string]string, []byte, error) {
	letters, err := b.deadLetters(ctx, DeadLetterFilter{IDs: []string{id}})
	if err != nil {
		return contracts.DeadLetter{}, nil, nil, err
	}
	if len(letters) == 0 {
		return contracts.DeadLetter{}, nil, nil, fmt.Errorf("%s: %w", id, ErrNotFound)
	}
	headers := make(map[string]string)
	for _, h := range letters[0].message.Headers {
		headers[h.Key] = string(h.Value)
	}
	return letters[0].DeadLetter, headers, letters[0].message.Value, nil
}

// ReplayDeadLetters puts the messages that the filter selects back into the
// topics they came from and returns how many. What was replayed before is left
// out unless force is set. Raw bodies, which never were in a topic, are left
// out too; when one is named by its id, that is ErrNotReplayable, and an id
// that does not exist is ErrNotFound. A crash may replay a message twice.
func (b *Bus) ReplayDeadLetters(ctx context.Context, f DeadLetterFilter, force bool) (int, error) {
	letters, err := b.deadLetters(ctx, f)
	if err != nil {
		return 0, err
	}
	if len(f.IDs) > 0 {
		for _, id := range f.IDs {
			i := slices.IndexFunc(letters, func(l deadLetter) bool { return l.ID == id })
			if i < 0 {
				return 0, fmt.Errorf("%s: %w", id, ErrNotFound)
			}
			if letters[i].origin.topic == "" {
				return 0, fmt.Errorf("%s is a body that was never an event: %w", id, ErrNotReplayable)
			}
		}
	}
	n := 0
	for i := range letters {
		l := &letters[i]
		if l.origin.topic == "" || (l.Replayed && !force) {
			continue
		}
		again := kafka.Message{
			Topic:   l.origin.topic,
			Key:     l.message.Key,
			Value:   l.message.Value,
			Headers: foreignHeaders(&l.message),
		}
		if err := b.write(ctx, []kafka.Message{again}); err != nil {
			return n, fmt.Errorf("replay %s: %w", l.ID, err)
		}
		n++
		marker := kafka.Message{Topic: l.Topic, Headers: []kafka.Header{
			{Key: headerReplayed, Value: fmt.Appendf(nil, "%d/%d", l.Partition, l.Offset)},
			{Key: headerTime, Value: []byte(time.Now().UTC().Format(time.RFC3339Nano))},
		}}
		if err := b.write(ctx, []kafka.Message{marker}); err != nil {
			return n, fmt.Errorf("remember the replay of %s: %w", l.ID, err)
		}
	}
	return n, nil
}

// deadLetters reads all dead letter topics and returns what the filter selects.
func (b *Bus) deadLetters(ctx context.Context, f DeadLetterFilter) ([]deadLetter, error) {
	topics, err := b.topicsThat(ctx, func(topic string) bool {
		return strings.HasPrefix(topic, b.cfg.Prefix) && strings.HasSuffix(topic, deadLetterSuffix)
	})
	if err != nil {
		return nil, fmt.Errorf("dead letters: %w", err)
	}
	var letters []deadLetter
	replayed := make(map[string]bool)
	err = b.scan(ctx, topics, func(m kafka.Message) error {
		if marker := header(&m, headerReplayed); marker != "" {
			replayed[m.Topic+"/"+marker] = true
			return nil
		}
		letters = append(letters, newDeadLetter(m))
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("dead letters: %w", err)
	}
	now := time.Now()
	var out []deadLetter
	for _, l := range letters {
		l.Replayed = replayed[l.ID]
		if f.matches(b.cfg.Prefix, l.DeadLetter, now) {
			out = append(out, l)
		}
	}
	slices.SortStableFunc(out, func(x, y deadLetter) int {
		return cmp.Or(x.Time.Compare(y.Time), cmp.Compare(x.Topic, y.Topic), cmp.Compare(x.Offset, y.Offset))
	})
	return out, nil
}

func newDeadLetter(m kafka.Message) deadLetter {
	at, err := time.Parse(time.RFC3339Nano, header(&m, headerTime))
	if err != nil {
		at = m.Time
	}
	l := deadLetter{message: m, origin: originOf(&m)}
	l.DeadLetter = contracts.DeadLetter{
		ID:        fmt.Sprintf("%s/%d/%d", m.Topic, m.Partition, m.Offset),
		Topic:     m.Topic,
		Service:   header(&m, headerService),
		Partition: m.Partition,
		Offset:    m.Offset,
		Time:      at,
		Reason:    header(&m, headerReason),
		Attempts:  headerInt(&m, headerAttempts),
		EventType: header(&m, headerEventType),
		Subject:   header(&m, headerSubject),
	}
	if l.origin.topic != "" {
		l.Origin = fmt.Sprintf("%s/%d/%d", l.origin.topic, l.origin.partition, l.origin.offset)
	}
	return l
}

// topicsThat returns the names of the topics that exist and are asked for.
func (b *Bus) topicsThat(ctx context.Context, want func(string) bool) ([]string, error) {
	if err := b.refresh(ctx); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	meta, err := b.client.Metadata(ctx, &kafka.MetadataRequest{})
	if err != nil {
		return nil, fmt.Errorf("read topics: %w", err)
	}
	var names []string
	for _, t := range meta.Topics {
		if t.Error == nil && want(t.Name) {
			names = append(names, t.Name)
		}
	}
	return names, nil
}
