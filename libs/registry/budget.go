package registry

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"math/rand/v2"
	"net/http"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"time"
)

// Rate bounds what is asked of a registry with one credential: by all replicas
// of all services together where they share a Budget.
type Rate struct {
	RequestsPerSecond float64 `yaml:"requestsPerSecond"` // 0: no limit
	Burst             int     `yaml:"burst"`             // requests at once after a rest; default: a second's worth, at least 10
	PullsPerHour      int     `yaml:"pullsPerHour"`      // manifests that are fetched, as Docker Hub counts pulls; 0: no limit
}

// Limits of Rate.
const (
	maxRequestsPerSecond = 100_000
	maxPullsPerHour      = 1_000_000
	defaultBurst         = 10
)

func (r Rate) validate() error {
	switch {
	case r.RequestsPerSecond < 0 || r.RequestsPerSecond > maxRequestsPerSecond || math.IsNaN(r.RequestsPerSecond):
		return fmt.Errorf("rate.requestsPerSecond must be from 0 (no limit) to %d", maxRequestsPerSecond)
	case r.PullsPerHour < 0 || r.PullsPerHour > maxPullsPerHour:
		return fmt.Errorf("rate.pullsPerHour must be from 0 (no limit) to %d", maxPullsPerHour)
	case r.Burst < 0 || r.Burst > maxRequestsPerSecond:
		return fmt.Errorf("rate.burst must be from 0 (the default) to %d", maxRequestsPerSecond)
	case r.Burst > 0 && r.RequestsPerSecond == 0:
		return errors.New("rate.burst needs rate.requestsPerSecond")
	case r.RequestsPerSecond > 0 && r.RequestsPerSecond < 1.0/3600:
		return errors.New("rate.requestsPerSecond must not be below one an hour (0.00028)")
	}
	return nil
}

// bucket is one limit: one more every interval, up to burst at once. An
// interval of 0 is no limit.
type bucket struct {
	key      string
	interval time.Duration
	burst    int
}

func (r Rate) requests(key string) bucket {
	if r.RequestsPerSecond == 0 {
		return bucket{key: key}
	}
	burst := r.Burst
	if burst == 0 {
		burst = max(defaultBurst, int(r.RequestsPerSecond))
	}
	return bucket{key, time.Duration(float64(time.Second) / r.RequestsPerSecond), burst}
}

// pulls gives no hour more than its number: a tenth of it at once, and the rest
// spread over the hour.
func (r Rate) pulls(key string) bucket {
	if r.PullsPerHour == 0 {
		return bucket{key: key}
	}
	burst := max(1, r.PullsPerHour/10)
	return bucket{key, time.Hour / time.Duration(max(1, r.PullsPerHour-burst)), burst}
}

// Budget is kept by all who use one credential at a registry together;
// libs/redis has one. Keys hold no secret.
type Budget interface {
	// Take asks for one of key, which gains one every interval, up to burst.
	// taken: it may be used after wait, which is at most patience. Otherwise
	// nothing was taken, and wait is when to ask again. An interval of 0 sets no
	// limit, but Quiet and Left hold. sharers is how many use the key, the caller among them.
	Take(ctx context.Context, key string, interval time.Duration, burst int, patience time.Duration) (wait time.Duration, taken bool, sharers int, err error)
	// Quiet has nobody take of key for d; what holds longer already stays.
	Quiet(ctx context.Context, key string, d time.Duration) error
	// Left says that all together may take no more than n of key within d.
	Left(ctx context.Context, key string, n int, d time.Duration) error
}

const (
	// patience is how long a request waits for its turn; the event of one that
	// would wait longer makes room for others.
	patience = 2 * time.Second
	// sharedTimeout bounds a question to the shared budget, sharedPause is how
	// long it is left alone after it did not answer.
	sharedTimeout = 250 * time.Millisecond
	sharedPause   = time.Second
	// assumedSharers divide the budget while the shared one was never reached.
	assumedSharers = 8
	// fewLeft is from where on everybody is told how many requests a registry
	// says are left.
	fewLeft = 200
	// leftDefault is how long that holds where the registry does not say.
	leftDefault = time.Minute
	// Pauses after a refusal (429) that does not say how long.
	minQuiet = 200 * time.Millisecond
	maxQuiet = time.Minute
	// troubles is how many failures in a row it takes until a registry is left
	// alone for a while, so that its events do not each wait for its time-outs.
	troubles        = 8
	minTroubleQuiet = 5 * time.Second
	maxTroubleQuiet = 15 * time.Second
)

// pacer keeps to the budget of one registry and credential. It never asks for
// more than the shared budget gives; while that is away it gives its part of it.
type pacer struct {
	shared Budget // nil: nobody shares
	local  *localBudget
	rate   Rate
	log    *slog.Logger
	name   string // of the registry

	mu      sync.Mutex
	key     string
	sharers int
	away    time.Time // the shared budget is not asked before
	lost    bool
	refused int // 429 in a row
	failed  int // failures in a row
}

func newPacer(name string, rate Rate, shared Budget, log *slog.Logger) *pacer {
	p := &pacer{shared: shared, rate: rate, log: log, name: name, sharers: 1, local: newLocalBudget(shared != nil)}
	if shared != nil {
		p.sharers = assumedSharers
	}
	p.as("")
	return p
}

// as says whose credential is used.
func (p *pacer) as(user string) {
	sum := sha256.Sum256([]byte(p.name + "\x00" + user))
	p.mu.Lock()
	defer p.mu.Unlock()
	p.key = "registry:" + hex.EncodeToString(sum[:8])
}

func (p *pacer) keys() (requests, pulls string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.key, p.key + ":pulls"
}

// isPull says whether a request is what Docker Hub counts as a pull.
func isPull(req *http.Request) bool {
	return req.Method == http.MethodGet && strings.Contains(req.URL.Path, "/manifests/")
}

// await waits until a request may be sent. An Error that is Held says that it
// may not be sent soon, and for how long.
func (p *pacer) await(req *http.Request) error {
	requests, pulls := p.keys()
	buckets := []bucket{p.rate.requests(requests)}
	if isPull(req) {
		buckets = append(buckets, p.rate.pulls(pulls))
	}
	for _, b := range buckets {
		if err := p.take(req.Context(), b); err != nil {
			return err
		}
	}
	return nil
}

// take waits for one of a bucket.
func (p *pacer) take(ctx context.Context, b bucket) error {
	for deadline := time.Now().Add(patience); ; {
		wait, taken := p.ask(ctx, b, max(0, time.Until(deadline)))
		if taken && wait <= 0 {
			return ctx.Err()
		}
		if !taken && wait > time.Until(deadline) {
			return &Error{Kind: ErrThrottled, Detail: "not asked: its budget is used up, or it wants to be left alone", After: wait, Held: true}
		}
		if !sleep(ctx, wait) {
			return ctx.Err()
		}
		if taken {
			return nil
		}
	}
}

// ask asks the shared budget, and the local one while that is away.
func (p *pacer) ask(ctx context.Context, b bucket, patience time.Duration) (wait time.Duration, taken bool) {
	if wait := p.local.quiet(b.key); wait > 0 {
		return wait, false // also what the shared budget could not be told
	}
	var answered bool
	p.withShared(ctx, func(ctx context.Context) (err error) {
		var sharers int
		wait, taken, sharers, err = p.shared.Take(ctx, b.key, b.interval, b.burst, patience)
		if answered = err == nil; answered {
			p.mu.Lock()
			if b.key == p.key { // everybody asks for requests, few for pulls
				p.sharers = max(1, sharers)
			}
			p.mu.Unlock()
		}
		return err
	})
	if answered {
		return wait, taken
	}
	p.mu.Lock()
	n := p.sharers
	p.mu.Unlock()
	return p.local.take(b.key, b.interval*time.Duration(n), max(1, b.burst/n), patience)
}

// withShared asks the shared budget, unless it did not answer a moment ago.
func (p *pacer) withShared(ctx context.Context, ask func(ctx context.Context) error) {
	if p.shared == nil {
		return
	}
	p.mu.Lock()
	away := time.Now().Before(p.away)
	p.mu.Unlock()
	if away {
		return
	}
	short, cancel := context.WithTimeout(ctx, sharedTimeout)
	defer cancel()
	err := ask(short)
	if ctx.Err() != nil {
		return
	}
	p.mu.Lock()
	before := p.lost
	p.lost = err != nil
	if err != nil {
		p.away = time.Now().Add(sharedPause)
	}
	sharers := p.sharers
	p.mu.Unlock()
	switch {
	case err != nil && !before:
		p.log.WarnContext(ctx, "the shared budget of a registry cannot be asked, a part of it is kept to", "registry", p.name, "part", sharers, "error", err)
	case err == nil && before:
		p.log.InfoContext(ctx, "the shared budget of a registry is back", "registry", p.name)
	}
}

// hush has everybody leave the registry alone for d.
func (p *pacer) hush(ctx context.Context, d time.Duration) {
	key, pulls := p.keys()
	d = min(d, maxAfter)
	for _, k := range []string{key, pulls} {
		p.local.hush(k, d)
	}
	p.withShared(context.WithoutCancel(ctx), func(ctx context.Context) error { return p.shared.Quiet(ctx, key, d) })
}

// answered learns from an answer.
func (p *pacer) answered(req *http.Request, resp *http.Response) {
	after := retryAfter(resp.Header.Get("Retry-After"), time.Now())
	p.mu.Lock()
	if resp.StatusCode < 500 {
		p.failed = 0
	}
	if resp.StatusCode == http.StatusTooManyRequests {
		if after == 0 {
			after = min(minQuiet<<min(p.refused, 20), maxQuiet)
		}
		p.refused++
	} else {
		p.refused = 0
	}
	p.mu.Unlock()
	if after > 0 && (resp.StatusCode == http.StatusTooManyRequests || resp.StatusCode == http.StatusServiceUnavailable) {
		p.hush(req.Context(), after)
		return
	}
	left, within, ok := remaining(resp.Header, time.Now())
	if !ok || left > fewLeft {
		return
	}
	key, pulls := p.keys()
	if p.name == dockerHub { // it counts pulls, and sends these headers with them alone
		key = pulls
	}
	p.local.left(key, left, within)
	p.withShared(context.WithoutCancel(req.Context()), func(ctx context.Context) error { return p.shared.Left(ctx, key, left, within) })
}

// troubled counts a request without an answer, or with one that says that the
// registry does not work. After several in a row this process leaves it alone
// for a while; it may be its own network, so nobody else is told.
func (p *pacer) troubled() {
	p.mu.Lock()
	p.failed++
	n := p.failed - troubles
	key := p.key
	p.mu.Unlock()
	if n >= 0 {
		p.local.hush(key, min(minTroubleQuiet<<min(n, 4), maxTroubleQuiet))
	}
}

// held returns how long the registry is left alone, for requests that have not begun.
func (p *pacer) held() time.Duration {
	key, _ := p.keys()
	wait := p.local.quiet(key)
	if wait <= patience {
		return 0 // the request waits for it
	}
	return wait
}

var (
	rateRemaining = regexp.MustCompile(`(?i)\b(?:r|remaining)=(\d{1,9})\b`)
	rateReset     = regexp.MustCompile(`(?i)\b(?:t|reset)=(\d{1,9})\b`)
	rateWindow    = regexp.MustCompile(`(?i)\bw=(\d{1,9})\b`)
)

// remaining reads how many requests a registry says are left, and for how long
// that holds: RateLimit-Remaining with Docker Hub's window ("76;w=21600"; of a
// window that slides, the time in which one more comes free on average), with
// RateLimit-Reset (draft-polli-ratelimit-headers; seconds, or a Unix time as
// GitLab and GitHub send it), or the one RateLimit field
// (draft-ietf-httpapi-ratelimit-headers).
func remaining(h http.Header, now time.Time) (left int, within time.Duration, ok bool) {
	first := func(names ...string) string {
		for _, n := range names {
			if v := h.Get(n); v != "" {
				return v
			}
		}
		return ""
	}
	if field := h.Get("RateLimit"); field != "" {
		m := rateRemaining.FindStringSubmatch(field)
		if m == nil {
			return 0, 0, false
		}
		left, _ = strconv.Atoi(m[1]) // at most nine digits
		within = leftDefault
		if t := rateReset.FindStringSubmatch(field); t != nil {
			within = seconds(t[1])
		}
		return left, min(within, maxAfter), true
	}
	number, _, _ := strings.Cut(first("RateLimit-Remaining", "X-RateLimit-Remaining"), ";")
	left, err := strconv.Atoi(strings.TrimSpace(number))
	if err != nil || left < 0 {
		return 0, 0, false
	}
	within = leftDefault
	limitField := first("RateLimit-Limit", "X-RateLimit-Limit")
	limitNumber, _, _ := strings.Cut(limitField, ";")
	limit, _ := strconv.Atoi(strings.TrimSpace(limitNumber)) // absent: 0
	if w := rateWindow.FindStringSubmatch(limitField); w != nil && limit > 0 {
		within = max(time.Second, seconds(w[1])/time.Duration(limit))
	}
	if reset, err := strconv.ParseInt(first("RateLimit-Reset", "X-RateLimit-Reset"), 10, 64); err == nil && reset >= 0 {
		const someYears = 100_000_000 // seconds: more is a Unix time
		if reset > someYears {
			within = time.Unix(reset, 0).Sub(now)
		} else {
			within = time.Duration(reset) * time.Second
		}
	}
	return left, min(max(within, time.Second), maxAfter), true
}

func seconds(digits string) time.Duration {
	n, _ := strconv.Atoi(digits) // at most nine digits
	return time.Duration(n) * time.Second
}

// localBudget is a budget within this process. It holds two keys a registry.
type localBudget struct {
	mu      sync.Mutex
	empty   bool // buckets begin empty: what was taken elsewhere is not known
	buckets map[string]*localBucket
}

type localBucket struct {
	full       time.Time // when the bucket will be full
	quietUntil time.Time
	left       int
	leftUntil  time.Time
}

func newLocalBudget(empty bool) *localBudget {
	return &localBudget{empty: empty, buckets: make(map[string]*localBucket)}
}

// get returns a bucket; the caller holds the lock.
func (l *localBudget) get(key string) (b *localBucket, fresh bool) {
	b = l.buckets[key]
	if b == nil {
		b = &localBucket{}
		l.buckets[key] = b
	}
	return b, b.full.IsZero()
}

func (l *localBudget) take(key string, interval time.Duration, burst int, patience time.Duration) (wait time.Duration, taken bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Now()
	b, fresh := l.get(key)
	if d := b.quietUntil.Sub(now); d > 0 {
		return d, false
	}
	counted := b.leftUntil.After(now)
	if counted && b.left <= 0 {
		return b.leftUntil.Sub(now), false
	}
	if interval > 0 {
		full := b.full
		if fresh && l.empty {
			full = now.Add(time.Duration(burst) * interval)
		}
		if full.Before(now) {
			full = now
		}
		full = full.Add(interval)
		wait = max(0, full.Add(-time.Duration(burst)*interval).Sub(now))
		if fresh {
			b.full = full.Add(-interval)
		}
		if wait > patience {
			return wait, false
		}
		b.full = full
	}
	if counted {
		b.left--
	}
	return wait, true
}

// quiet returns for how long nobody may take of key.
func (l *localBudget) quiet(key string) time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	b, _ := l.get(key)
	return max(0, time.Until(b.quietUntil))
}

func (l *localBudget) hush(key string, d time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	b, _ := l.get(key)
	if until := time.Now().Add(d); until.After(b.quietUntil) {
		b.quietUntil = until
	}
}

func (l *localBudget) left(key string, n int, d time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	b, _ := l.get(key)
	now := time.Now()
	if b.leftUntil.After(now) && b.left <= n {
		return
	}
	b.left, b.leftUntil = n, now.Add(d)
}

// heldUntil returns when to try again what was held: not much later than it
// may be sent, and not all at once.
func heldUntil(e *Error) time.Time {
	after := min(e.After, maxAfter)
	return time.Now().Add(after + time.Duration(rand.Int64N(int64(after)/4+int64(time.Second)))) //nolint:gosec // jitter needs no secrecy
}
