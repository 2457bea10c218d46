package redis

import (
	"context"
	"fmt"
	"time"

	"github.com/redis/go-redis/v9"
)

const (
	// sharerTTL is how long somebody who asks for a budget counts as sharing it.
	sharerTTL = time.Minute
	// bucketTTL is how long the state of a bucket is kept after its last use.
	// A bucket that is not known (also: lost) begins with one, not full.
	bucketTTL = 24 * time.Hour
	// maxTurn bounds how far ahead turns are given to those who are refused.
	maxTurn = time.Hour
	// MaxPatience bounds the patience of Take.
	MaxPatience = time.Minute
)

// A budget is, under <prefix>{key}: and a name, "full": when its bucket will be
// full (microseconds); "quiet": nobody may take; "left": how many more may be
// taken while it lives; "turn": when the next one who is refused should ask
// again; "sharers": who asked when. The braces keep them in one slot of a cluster.
func (c *Client) budgetKeys(key string) []string {
	keys := []string{"full", "quiet", "left", "turn", "sharers"}
	for i, name := range keys {
		keys[i] = c.prefix + "budget:{" + key + "}:" + name
	}
	return keys
}

// takeScript: KEYS as budgetKeys; ARGV interval (0: no limit), burst, patience,
// who asks, how long sharers, buckets and turns are kept, and the greatest
// patience; times in microseconds, by Redis's clock. Returns {taken, wait, sharers}. A bucket is
// kept as the time at which it will be full (GCRA: ITU-T I.371, "virtual
// scheduling"). Those who are refused get turns one interval apart, so that
// they do not all come back at once. A time too far ahead is of a clock that
// was set back.
var takeScript = redis.NewScript(`
local t = redis.call('TIME')
local now = tonumber(t[1]) * 1000000 + tonumber(t[2])
local interval, burst, patience = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local function stamp(n) return string.format('%.0f', n) end
local function keep(key, value, ttl)
	redis.call('SET', key, stamp(value), 'PX', math.max(1, math.ceil(ttl / 1000)))
end
redis.call('ZADD', KEYS[5], stamp(now), ARGV[4])
redis.call('ZREMRANGEBYSCORE', KEYS[5], '-inf', stamp(now - tonumber(ARGV[5])))
redis.call('PEXPIRE', KEYS[5], math.ceil(tonumber(ARGV[5]) / 1000))
local sharers = redis.call('ZCARD', KEYS[5])

local quiet = redis.call('PTTL', KEYS[2])
if quiet > 0 then
	return {0, quiet * 1000, sharers}
end
local left = redis.call('GET', KEYS[3])
if left and tonumber(left) <= 0 then
	return {0, math.max(1, redis.call('PTTL', KEYS[3])) * 1000, sharers}
end
local wait = 0
if interval > 0 then
	local full = tonumber(redis.call('GET', KEYS[1]))
	if not full then
		full = now + (burst - 1) * interval
	end
	full = math.min(math.max(full, now), now + burst * interval + tonumber(ARGV[8])) + interval
	wait = math.max(0, full - burst * interval - now)
	if wait > patience then
		local furthest = now + tonumber(ARGV[7])
		local turn = math.max(tonumber(redis.call('GET', KEYS[4]) or '0'), now + wait)
		if turn > furthest then
			return {0, math.max(wait, tonumber(ARGV[7])), sharers}
		end
		keep(KEYS[4], turn + interval, turn + interval - now)
		return {0, turn - now, sharers}
	end
	keep(KEYS[1], full, tonumber(ARGV[6]) + full - now)
end
if left then
	redis.call('DECR', KEYS[3])
end
return {1, wait, sharers}
`)

// longerScript: KEYS key; ARGV ttl in ms. Makes the key live for at least that long.
var longerScript = redis.NewScript(`
if redis.call('PTTL', KEYS[1]) < tonumber(ARGV[1]) then
	redis.call('SET', KEYS[1], '1', 'PX', ARGV[1])
end
return 1
`)

// fewerScript: KEYS key; ARGV number, ttl in ms. Keeps the lower number.
var fewerScript = redis.NewScript(`
local held = redis.call('GET', KEYS[1])
if not held or tonumber(held) > tonumber(ARGV[1]) then
	redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
end
return 1
`)

// Take asks for one of key, which gains one every interval, up to burst (at
// least 1). taken: it may be used after wait, which is at most patience (and
// patience at most MaxPatience).
// Otherwise nothing was taken, and wait is when to ask again. An interval of 0
// sets no limit, but Quiet and Left hold. sharers is how many clients have
// asked for the key in the last minute. A key that Redis does not know, or has
// lost, begins with one.
func (c *Client) Take(ctx context.Context, key string, interval time.Duration, burst int, patience time.Duration) (wait time.Duration, taken bool, sharers int, err error) {
	step := interval.Microseconds()
	if interval > 0 {
		step = max(1, step)
	}
	patience = min(patience, MaxPatience)
	answer, err := takeScript.Run(ctx, c.rdb, c.budgetKeys(key), step, max(1, burst), patience.Microseconds(), c.id,
		sharerTTL.Microseconds(), bucketTTL.Microseconds(), maxTurn.Microseconds(), MaxPatience.Microseconds()).Int64Slice()
	if err != nil {
		return 0, false, 0, fmt.Errorf("take of budget %s: %w", key, err)
	}
	if len(answer) != 3 {
		return 0, false, 0, fmt.Errorf("take of budget %s: unexpected answer %v", key, answer)
	}
	return time.Duration(answer[1]) * time.Microsecond, answer[0] == 1, int(answer[2]), nil
}

// Quiet has nobody take of key for d; what holds longer already stays.
func (c *Client) Quiet(ctx context.Context, key string, d time.Duration) error {
	if err := longerScript.Run(ctx, c.rdb, c.budgetKeys(key)[1:2], milliseconds(d)).Err(); err != nil {
		return fmt.Errorf("quiet budget %s: %w", key, err)
	}
	return nil
}

// Left says that all together may take no more than n of key within d; what is
// less already stays.
func (c *Client) Left(ctx context.Context, key string, n int, d time.Duration) error {
	if err := fewerScript.Run(ctx, c.rdb, c.budgetKeys(key)[2:3], n, milliseconds(d)).Err(); err != nil {
		return fmt.Errorf("bound budget %s: %w", key, err)
	}
	return nil
}
