package gatekeeper

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"strconv"
	"strings"
	"time"

	"github.com/tidewaiter/tidewaiter/libs/redis"
	"github.com/tidewaiter/tidewaiter/services/attestor/statement"
)

const (
	// cacheTimeout bounds a request to the cache; a slow one is as good as none.
	cacheTimeout = 100 * time.Millisecond
	// bundleTTL is how long a bundle is kept in the cache. It is looked for again
	// long before (Config.Recheck) unless the registry is away.
	bundleTTL = 7 * 24 * time.Hour
	// seenTTL is how long it is remembered how new an image's newest statement
	// was: longer than statements are valid.
	seenTTL = 90 * 24 * time.Hour
)

// Cache is what replicas share. It is not believed: what it holds is verified.
type Cache interface {
	Get(ctx context.Context, key string) ([]byte, error)
	Put(ctx context.Context, key string, value []byte, ttl time.Duration) error
	Raise(ctx context.Context, key, value string, ttl time.Duration) (string, error)
}

// cached is an item as the cache holds it.
type cached struct {
	Digest  string    `json:"digest"`
	Content []byte    `json:"content"`
	Fetched time.Time `json:"fetched"`
}

func bundleKey(image string) string { return "gatekeeper:bundle:" + image }
func seenKey(image string) string   { return "gatekeeper:seen:" + image }

// recall returns what is remembered of an image, in memory or in the cache.
func (g *Gatekeeper) recall(ctx context.Context, image string) item {
	if i, ok := g.memory.get(image); ok {
		return i
	}
	ctx, cancel := context.WithTimeout(ctx, cacheTimeout)
	defer cancel()
	i, err := g.fromCache(ctx, image)
	if err != nil {
		g.cacheTrouble(ctx, err)
		return i // not remembered: the cache may know more next time
	}
	if i.bundle != nil {
		g.memory.put(image, i)
	}
	return i
}

func (g *Gatekeeper) fromCache(ctx context.Context, image string) (item, error) {
	var i item
	mark, err := g.Cache.Raise(ctx, seenKey(image), "", seenTTL)
	if err != nil {
		return i, err
	}
	if i.seen, err = parseSeen(mark); err != nil {
		return i, err
	}
	value, err := g.Cache.Get(ctx, bundleKey(image))
	if errors.Is(err, redis.ErrMiss) {
		return i, nil
	}
	if err != nil {
		return i, err
	}
	var c cached
	if err := json.Unmarshal(value, &c); err != nil {
		return i, fmt.Errorf("decode cache entry of %s: %w", image, err)
	}
	if c.Fetched.After(g.Now()) {
		return i, fmt.Errorf("cache entry of %s was written in the future", image)
	}
	i.bundle, i.fetched = &statement.Bundle{Digest: c.Digest, Content: c.Content}, c.Fetched
	return i, nil
}

// remember keeps the statement that decides about an image, and returns how new
// the newest statement is that anybody remembers.
func (g *Gatekeeper) remember(ctx context.Context, image string, d statement.Decision) statement.Seen {
	ctx, cancel := context.WithTimeout(ctx, cacheTimeout)
	defer cancel()
	now := g.Now()
	i := item{seen: g.raise(ctx, image, d.Statement.Seen())}
	if known, ok := g.memory.get(image); ok && i.seen.Before(known.seen) {
		i.seen = known.seen
	}
	if !d.Statement.Seen().Before(i.seen) {
		i.bundle, i.fetched = &d.Bundle, now
		value, err := json.Marshal(cached{Digest: d.Bundle.Digest, Content: d.Bundle.Content, Fetched: now})
		if err == nil {
			err = g.Cache.Put(ctx, bundleKey(image), value, bundleTTL)
		}
		g.cacheTrouble(ctx, err)
	}
	g.memory.put(image, i)
	return i.seen
}

// raise tells the cache how new a statement is and returns the newest that it knows of.
func (g *Gatekeeper) raise(ctx context.Context, image string, s statement.Seen) statement.Seen {
	held, err := g.Cache.Raise(ctx, seenKey(image), formatSeen(s), seenTTL)
	if err != nil {
		g.cacheTrouble(ctx, err)
		return s
	}
	mark, err := parseSeen(held)
	if err != nil || mark.Before(s) {
		g.cacheTrouble(ctx, err)
		return s
	}
	return mark
}

func (g *Gatekeeper) cacheTrouble(ctx context.Context, err error) {
	if err == nil {
		return
	}
	g.metrics.cacheFailures.Inc()
	g.Log.DebugContext(ctx, "cache does not help", slog.Any("error", err))
}

// formatSeen writes s so that a newer one is greater byte by byte.
func formatSeen(s statement.Seen) string {
	return fmt.Sprintf("%019d.%019d", max(s.Sequence, 0), max(s.Time.UnixNano(), 0))
}

// parseSeen reads what formatSeen wrote; "" is nothing seen.
func parseSeen(text string) (statement.Seen, error) {
	if text == "" {
		return statement.Seen{}, nil
	}
	a, b, _ := strings.Cut(text, ".")
	sequence, err := strconv.ParseInt(a, 10, 64)
	if err != nil {
		return statement.Seen{}, fmt.Errorf("mark %q: %w", text, err)
	}
	nano, err := strconv.ParseInt(b, 10, 64)
	if err != nil {
		return statement.Seen{}, fmt.Errorf("mark %q: %w", text, err)
	}
	return statement.Seen{Sequence: sequence, Time: time.Unix(0, nano).UTC()}, nil
}
