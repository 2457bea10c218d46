package redis

import (
	"context"
	crand "crypto/rand"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/redis/go-redis/v9"
)

// ErrTaken is returned when somebody else holds a lease. See TakenError.
var ErrTaken = errors.New("lease is taken")

// ErrLost is returned when a lease is no longer ours.
var ErrLost = errors.New("lease was lost")

// errStopped ends the work of Hold when the lease is lost.
var errStopped = fmt.Errorf("stopped: %w", ErrLost)

const (
	// tokenTTL is how long the last token of a key is remembered. Tokens go up
	// without it too, by the clock; it only covers a clock that is set back.
	tokenTTL = 24 * time.Hour
	// lockWait and lockMaxWait bound the time between two tries of WithLock.
	lockWait    = 10 * time.Millisecond
	lockMaxWait = 500 * time.Millisecond
	// releaseTimeout bounds the release after the work's context ended.
	releaseTimeout = 3 * time.Second
)

// TakenError says who holds a lease. errors.Is(err, ErrTaken) holds.
type TakenError struct {
	Key    string
	Holder string        // the holder's event id
	TTL    time.Duration // until it expires unless renewed
}

func (e *TakenError) Error() string {
	return fmt.Sprintf("lease %s is held by %q for another %s", e.Key, e.Holder, e.TTL)
}

func (e *TakenError) Unwrap() error { return ErrTaken }

// Lease is a claim on a key with an expiry and a fencing token.
type Lease struct {
	Key    string
	Holder string
	Token  int64 // higher than any token handed out for the key before, even if Redis lost its data in between
}

// A lease is a hash {holder, token, claim} with an expiry under <prefix>{key}. The
// last token of the key is under <prefix>{key}:token and outlives it. The
// braces keep the two in one slot of a cluster.
func (c *Client) keys(key string) []string {
	return []string{c.prefix + "{" + key + "}", c.prefix + "{" + key + "}:token"}
}

// acquireScript: KEYS lease, token; ARGV holder, ttl in ms, ttl of the token in
// ms, a name for this call: when the client repeats it, because the connection
// broke before the answer, it gets what it was given. Returns {1, token} or
// {0, holder, ttl in ms}. The token is the time in
// microseconds, or one more than the last where that is higher: after a loss of
// all data it is still higher than any before. It is less than 2^53, which is
// what Lua's numbers hold; it is formatted because Lua would round it in a string.
var acquireScript = redis.NewScript(`
local holder = redis.call('HGET', KEYS[1], 'holder')
if holder then
	if redis.call('HGET', KEYS[1], 'claim') == ARGV[4] then
		return {1, redis.call('HGET', KEYS[1], 'token')}
	end
	return {0, holder, redis.call('PTTL', KEYS[1])}
end
local now = redis.call('TIME')
local token = tonumber(now[1]) * 1000000 + tonumber(now[2])
local last = tonumber(redis.call('GET', KEYS[2]) or '0')
if token <= last then
	token = last + 1
end
token = string.format('%.0f', token)
redis.call('HSET', KEYS[1], 'holder', ARGV[1], 'token', token, 'claim', ARGV[4])
redis.call('PEXPIRE', KEYS[1], ARGV[2])
redis.call('SET', KEYS[2], token, 'PX', ARGV[3])
return {1, token}
`)

// renewScript: KEYS lease; ARGV token, ttl in ms. Returns 1, or 0 when the
// lease is not the token's any more.
var renewScript = redis.NewScript(`
if redis.call('HGET', KEYS[1], 'token') ~= ARGV[1] then
	return 0
end
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return 1
`)

// releaseScript: KEYS lease; ARGV token. Returns 1, or 0 as renewScript.
var releaseScript = redis.NewScript(`
if redis.call('HGET', KEYS[1], 'token') ~= ARGV[1] then
	return 0
end
redis.call('DEL', KEYS[1])
return 1
`)

// Acquire takes the lease for ttl, at least a millisecond. It returns a
// *TakenError if it is held, by whatever holder (also by the same one: the
// caller decides whether to wait).
func (c *Client) Acquire(ctx context.Context, key, holder string, ttl time.Duration) (*Lease, error) {
	answer, err := acquireScript.Run(ctx, c.rdb, c.keys(key), holder, milliseconds(ttl), tokenTTL.Milliseconds(), crand.Text()).Slice()
	if err != nil {
		return nil, fmt.Errorf("acquire lease %s: %w", key, err)
	}
	if len(answer) == 3 {
		holder, _ := answer[1].(string)
		left, _ := answer[2].(int64)
		return nil, &TakenError{Key: key, Holder: holder, TTL: time.Duration(max(left, 0)) * time.Millisecond}
	}
	if len(answer) == 2 {
		var token int64
		if _, err := fmt.Sscan(fmt.Sprint(answer[1]), &token); err == nil {
			return &Lease{Key: key, Holder: holder, Token: token}, nil
		}
	}
	return nil, fmt.Errorf("acquire lease %s: unexpected answer %v", key, answer)
}

// Renew extends the lease to ttl from now, or returns ErrLost.
func (c *Client) Renew(ctx context.Context, l *Lease, ttl time.Duration) error {
	ok, err := renewScript.Run(ctx, c.rdb, c.keys(l.Key)[:1], l.Token, milliseconds(ttl)).Bool()
	if err != nil {
		return fmt.Errorf("renew lease %s: %w", l.Key, err)
	}
	if !ok {
		return fmt.Errorf("renew lease %s: %w", l.Key, ErrLost)
	}
	return nil
}

// Release gives the lease back if it is still ours, or returns ErrLost.
func (c *Client) Release(ctx context.Context, l *Lease) error {
	ok, err := releaseScript.Run(ctx, c.rdb, c.keys(l.Key)[:1], l.Token).Bool()
	if err != nil {
		return fmt.Errorf("release lease %s: %w", l.Key, err)
	}
	if !ok {
		return fmt.Errorf("release lease %s: %w", l.Key, ErrLost)
	}
	return nil
}

// Hold renews the lease, then runs work while renewing it every ttl/3. work's
// context ends when the lease is lost, or is about to expire because Redis is
// away; then Hold returns ErrLost, whatever work made of it. Otherwise it
// returns what work returned. The lease is released after. Hold returns when
// work has returned; it does not run work if the first renewal fails.
func (c *Client) Hold(ctx context.Context, l *Lease, ttl time.Duration, work func(ctx context.Context) error) error {
	started := time.Now()
	if err := c.Renew(ctx, l, ttl); err != nil {
		return err
	}
	workCtx, cancel := context.WithCancelCause(ctx)
	renewed := make(chan struct{})
	go func() {
		defer close(renewed)
		c.renewUntil(workCtx, cancel, l, ttl, started.Add(ttl))
	}()
	defer func() {
		cancel(nil)
		<-renewed
		release, done := context.WithTimeout(context.WithoutCancel(ctx), releaseTimeout)
		defer done()
		// What cannot be released expires.
		_ = c.Release(release, l)
	}()
	err := work(workCtx)
	if errors.Is(context.Cause(workCtx), ErrLost) {
		return fmt.Errorf("hold lease %s: %w", l.Key, ErrLost)
	}
	return err
}

// renewUntil renews until ctx ends, and ends it when the lease is lost. The
// lease counts as lost half a period before it expires, whether or not Redis
// answers: what is going on needs time to stop.
func (c *Client) renewUntil(ctx context.Context, lost context.CancelCauseFunc, l *Lease, ttl time.Duration, expires time.Time) {
	period := max(ttl/3, time.Millisecond)
	last := expires.Add(-period / 2)
	timer := time.NewTimer(min(period, time.Until(last)))
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		}
		started := time.Now()
		attempt, done := context.WithTimeout(ctx, min(period, time.Until(last)))
		err := c.Renew(attempt, l, ttl)
		done()
		switch {
		case err == nil:
			last = started.Add(ttl - period/2)
			timer.Reset(min(period, time.Until(last)))
		case errors.Is(err, ErrLost) || time.Until(last) <= 0:
			lost(errStopped)
			return
		default: // Redis is away; it may be back in time
			timer.Reset(min(period/4, time.Until(last)))
		}
	}
}

// WithLock runs work while holding key, waiting for it until ctx ends. It
// returns ErrLost, wrapped, when the lock was lost while work ran; see Hold.
func (c *Client) WithLock(ctx context.Context, key, holder string, ttl time.Duration, work func(ctx context.Context) error) error {
	wait := lockWait
	for {
		lease, err := c.Acquire(ctx, key, holder, ttl)
		if err == nil {
			return c.Hold(ctx, lease, ttl, work)
		}
		if !errors.Is(err, ErrTaken) {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait for lock: %w", errors.Join(ctx.Err(), err))
		case <-time.After(wait/2 + rand.N(wait)): // #nosec G404 -- jitter
		}
		wait = min(2*wait, lockMaxWait)
	}
}

// milliseconds rounds up: a lease of nothing would be held for ever.
func milliseconds(d time.Duration) int64 {
	return max(1, int64((d+time.Millisecond-1)/time.Millisecond))
}
