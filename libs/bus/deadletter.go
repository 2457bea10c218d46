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
	"unicode"
	"unicode/utf8"

	"github.com/segmentio/kafka-go"
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

// Redact takes what looks like a credential, and control characters, out of a
// text and bounds its length to 1 KiB. The bus does it to the reasons of dead letters.
func Redact(s string) string {
	s = userinfoPattern.ReplaceAllString(s, "://***@")
	s = credentialsPattern.ReplaceAllString(s, "$1 ***")
	s = parameterPattern.ReplaceAllString(s, "$1=***")
	s = strings.ToValidUTF8(s, "\uFFFD")
	s = strings.TrimSpace(strings.Map(func(r rune) rune {
		if unicode.IsControl(r) { // a line of a log, or of a terminal, is to stay one
			return ' '
		}
		return r
	}, s))
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
