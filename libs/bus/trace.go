package bus

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"strings"
)

// headerTraceparent is the Kafka header that carries one hop's own parent. The
// starting trace travels in the CloudEvents extension of the same name.
const headerTraceparent = "traceparent"

// trace is a W3C trace context (w3.org/TR/trace-context-1, "traceparent").
type trace struct {
	id    string // 32 hex digits
	span  string // 16 hex digits
	flags string // 2 hex digits
}

// String returns the trace as version 00 writes it.
func (t trace) String() string { return "00-" + t.id + "-" + t.span + "-" + t.flags }

// child returns the same trace with a span of its own.
func (t trace) child() trace {
	t.span = randomHex(8)
	return t
}

// newTrace starts a trace; it is sampled, so that later tooling may follow it.
func newTrace() trace {
	return trace{id: randomHex(16), span: randomHex(8), flags: "01"}
}

// parseTrace reads a traceparent. Versions above 00 may carry more fields,
// which are ignored, as the specification asks.
func parseTrace(s string) (trace, bool) {
	parts := strings.SplitN(s, "-", 5)
	if len(parts) < 4 {
		return trace{}, false
	}
	version := parts[0]
	if !lowerHex(version, 2) || version == "ff" || (version == "00" && len(parts) != 4) {
		return trace{}, false
	}
	t := trace{id: parts[1], span: parts[2], flags: parts[3]}
	if !lowerHex(t.id, 32) || !lowerHex(t.span, 16) || !lowerHex(t.flags, 2) {
		return trace{}, false
	}
	if strings.Trim(t.id, "0") == "" || strings.Trim(t.span, "0") == "" {
		return trace{}, false
	}
	return t, true
}

func lowerHex(s string, n int) bool {
	if len(s) != n {
		return false
	}
	for i := range len(s) {
		c := s[i]
		if (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return false
		}
	}
	return true
}

func randomHex(n int) string {
	b := make([]byte, n)
	_, _ = rand.Read(b) // never fails (crypto/rand, Go 1.24)
	return hex.EncodeToString(b)
}

type traceKey struct{}

// WithTraceparent returns a context in which published events belong to the
// given W3C traceparent; one that is not valid is ignored.
func WithTraceparent(ctx context.Context, traceparent string) context.Context {
	t, ok := parseTrace(traceparent)
	if !ok {
		return ctx
	}
	return context.WithValue(ctx, traceKey{}, t)
}

// Traceparent returns the W3C traceparent of the work that ctx belongs to, or
// "". In a handler it is the span of this attempt.
func Traceparent(ctx context.Context) string {
	t, ok := ctx.Value(traceKey{}).(trace)
	if !ok {
		return ""
	}
	return t.String()
}

type attemptKey struct{}

// Attempt returns which attempt at the event this is, 1 being the first; tries
// before a deferral to the retry topic are counted. Outside a handler it is 0.
func Attempt(ctx context.Context) int {
	n, _ := ctx.Value(attemptKey{}).(int)
	return n
}
