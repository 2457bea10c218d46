package registry

import (
	"errors"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/alicebob/miniredis/v2"

	"github.com/tidewaiter/tidewaiter/libs/redis"
)

// startRedis starts a Redis for several clients.
func startRedis(t *testing.T) *miniredis.Miniredis {
	t.Helper()
	m := miniredis.NewMiniRedis()
	m.ClockTTL(true)
	if err := m.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(m.Close)
	return m
}

// replica returns a client as a process of its own would have it.
func replica(t *testing.T, m *miniredis.Miniredis, hosts ...Host) *Client {
	t.Helper()
	budget, err := redis.Open(redis.Config{URL: "redis://" + m.Addr() + "/0"})
	if err != nil {
		t.Fatal(err)
	}
	c, err := NewShared(hosts, budget, slog.New(slog.NewTextHandler(t.Output(), nil)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(c.Close(), budget.Close()); err != nil {
			t.Error(err)
		}
	})
	return c
}

// counting starts a registry that counts what it is asked.
func counting(t *testing.T, answer http.HandlerFunc) (name string, asked *atomic.Int32) {
	t.Helper()
	asked = new(atomic.Int32)
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked.Add(1)
		answer(w, r)
	}))
	t.Cleanup(s.Close)
	return strings.TrimPrefix(s.URL, "http://"), asked
}

func tag(name string) Ref { return Ref{Registry: name, Repository: "a", Tag: "v"} }

// mustHold checks that err says that it was nobody's turn.
func mustHold(t *testing.T, err error, atLeast time.Duration) {
	t.Helper()
	at, again := RetryAt(err, 1)
	if !Held(err) || !errors.Is(err, ErrThrottled) || !again || time.Until(at) < atLeast-5*time.Second {
		t.Errorf("%v: held %v, again %v in %s, want at least %s", err, Held(err), again, time.Until(at), atLeast)
	}
}

// Two processes keep to one rate together: apart they would be done in half the time.
func TestRateIsShared(t *testing.T) {
	const each, workers, rate = 20, 2, 50
	name, asked := counting(t, manifestAnswer)
	m := startRedis(t)
	host := Host{Name: name, PlainHTTP: true, Rate: Rate{RequestsPerSecond: rate, Burst: 1}}
	began := time.Now()
	var group sync.WaitGroup
	for range 2 {
		c := replica(t, m, host)
		for range workers {
			group.Go(func() {
				for done := 0; done < each; {
					_, err := c.Resolve(t.Context(), tag(name))
					switch {
					case err == nil:
						done++
					case !Held(err):
						t.Error(err)
						return
					}
				}
			})
		}
	}
	group.Wait()
	const all = 2 * workers * each
	if asked.Load() != all {
		t.Errorf("asked %d times, want %d", asked.Load(), all)
	}
	if least := (all - 1) * time.Second / rate; time.Since(began) < least {
		t.Errorf("%d requests in %s, allowed are %d a second", all, time.Since(began), rate)
	}
}

// What one process is told, all keep to; other registries go on.
func TestRetryAfterIsShared(t *testing.T) {
	for _, status := range []int{http.StatusTooManyRequests, http.StatusServiceUnavailable} {
		name, asked := counting(t, func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Retry-After", "120")
			w.WriteHeader(status)
		})
		other, otherAsked := counting(t, manifestAnswer)
		m := startRedis(t)
		hosts := []Host{{Name: name, PlainHTTP: true}, {Name: other, PlainHTTP: true}}
		a, b := replica(t, m, hosts...), replica(t, m, hosts...)
		if _, err := a.Resolve(t.Context(), tag(name)); err == nil || Held(err) {
			t.Errorf("the first: %v", err)
		}
		for _, c := range []*Client{a, b} {
			_, err := c.Resolve(t.Context(), tag(name))
			mustHold(t, err, 2*time.Minute)
			if _, err := c.Resolve(t.Context(), tag(other)); err != nil {
				t.Errorf("the other registry: %v", err)
			}
		}
		if asked.Load() != 1 || otherAsked.Load() != 2 {
			t.Errorf("HTTP %d: asked %d times, the other %d; want 1 and 2", status, asked.Load(), otherAsked.Load())
		}
	}
}

// What a registry says is left is what all together take.
func TestRemainingIsShared(t *testing.T) {
	var left atomic.Int32
	left.Store(4)
	name, asked := counting(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("RateLimit-Limit", "4;w=480")
		w.Header().Set("RateLimit-Remaining", strconv.Itoa(max(0, int(left.Add(-1))))+";w=480")
		manifestAnswer(w, r)
	})
	m := startRedis(t)
	host := Host{Name: name, PlainHTTP: true}
	a, b := replica(t, m, host), replica(t, m, host)
	held := 0
	for range 5 {
		for _, c := range []*Client{a, b} {
			if _, err := c.Resolve(t.Context(), tag(name)); err != nil {
				mustHold(t, err, 110*time.Second)
				held++
			}
		}
	}
	if asked.Load() > 4 || held != 10-int(asked.Load()) {
		t.Errorf("asked %d times, 4 are allowed; %d held", asked.Load(), held)
	}
}

// A pull is a manifest that is fetched, as Docker Hub counts: looking up is none.
func TestPullsPerHour(t *testing.T) {
	name, asked := counting(t, manifestAnswer)
	m := startRedis(t)
	host := Host{Name: name, PlainHTTP: true, Rate: Rate{PullsPerHour: 1}}
	a, b := replica(t, m, host), replica(t, m, host)
	if _, err := a.Manifest(t.Context(), tag(name)); err != nil {
		t.Fatal(err)
	}
	_, err := b.Manifest(t.Context(), tag(name))
	mustHold(t, err, time.Hour)
	for range 5 {
		if _, err := b.Resolve(t.Context(), tag(name)); err != nil {
			t.Fatal(err)
		}
	}
	if asked.Load() != 6 {
		t.Errorf("asked %d times, want 6", asked.Load())
	}
}

// Without Redis work goes on, at a part of the rate and never above it.
func TestBudgetWithoutRedis(t *testing.T) {
	limited, limitedAsked := counting(t, manifestAnswer)
	free, _ := counting(t, manifestAnswer)
	m := startRedis(t)
	hosts := []Host{
		{Name: limited, PlainHTTP: true, Rate: Rate{RequestsPerSecond: 0.001, Burst: 10}},
		{Name: free, PlainHTTP: true},
	}
	a, b := replica(t, m, hosts...), replica(t, m, hosts...)
	if _, err := a.Resolve(t.Context(), tag(limited)); err != nil {
		t.Fatal(err)
	}
	m.Close()
	for _, c := range []*Client{a, b} {
		for range 3 {
			_, err := c.Resolve(t.Context(), tag(limited))
			mustHold(t, err, 10*time.Minute)
			if _, err := c.Resolve(t.Context(), tag(free)); err != nil {
				t.Errorf("without a rate: %v", err)
			}
		}
	}
	if limitedAsked.Load() != 1 {
		t.Errorf("asked %d times, 1 is allowed", limitedAsked.Load())
	}
	if err := m.Restart(); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		if _, err := a.Resolve(t.Context(), tag(free)); err != nil {
			t.Fatal(err)
		}
		p := a.hosts[free].rt.pace
		p.mu.Lock()
		lost := p.lost
		p.mu.Unlock()
		if !lost {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("the shared budget is not asked again")
		}
	}
}

// One process alone keeps to its rate too.
func TestRateAlone(t *testing.T) {
	name, asked := counting(t, manifestAnswer)
	c := newClient(t, Host{Name: name, PlainHTTP: true, Rate: Rate{RequestsPerSecond: 0.001, Burst: 3}})
	held := 0
	for range 10 {
		if _, err := c.Resolve(t.Context(), tag(name)); err != nil {
			mustHold(t, err, 10*time.Minute)
			held++
		}
	}
	if asked.Load() != 3 || held != 7 {
		t.Errorf("asked %d times, want 3; held %d", asked.Load(), held)
	}
}

// A registry that does not answer is left alone after a while: what it has is
// tried later, and takes up nobody's time.
func TestTroubleIsLeftAlone(t *testing.T) {
	var works atomic.Bool
	name, asked := counting(t, func(w http.ResponseWriter, r *http.Request) {
		if works.Load() {
			manifestAnswer(w, r)
			return
		}
		panic(http.ErrAbortHandler)
	})
	c := newClient(t, Host{Name: name, PlainHTTP: true})
	for range 10 {
		_, err := c.Resolve(t.Context(), tag(name))
		if Held(err) {
			mustHold(t, err, 0)
			break
		}
		if !errors.Is(err, ErrUnavailable) {
			t.Fatal(err)
		}
	}
	before := asked.Load()
	if _, err := c.Resolve(t.Context(), tag(name)); !Held(err) || asked.Load() != before {
		t.Errorf("it is asked on and on: %v, %d times", err, asked.Load())
	}
	works.Store(true)
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
		if _, err := c.Resolve(t.Context(), tag(name)); err == nil {
			break
		} else if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
}

func TestRemaining(t *testing.T) {
	now := time.Unix(1_800_000_000, 0)
	for _, tt := range []struct {
		name   string
		header map[string]string
		left   int
		within time.Duration
		ok     bool
	}{
		{"none", nil, 0, 0, false},
		{"Docker Hub", map[string]string{"ratelimit-limit": "100;w=21600", "ratelimit-remaining": "76;w=21600"}, 76, 216 * time.Second, true},
		{"seconds", map[string]string{"RateLimit-Limit": "10", "RateLimit-Remaining": "0", "RateLimit-Reset": "50"}, 0, 50 * time.Second, true},
		{"Unix time", map[string]string{"RateLimit-Remaining": "5", "RateLimit-Reset": "1800000090"}, 5, 90 * time.Second, true},
		{"GitHub", map[string]string{"X-RateLimit-Remaining": "12", "X-RateLimit-Reset": "1800000600"}, 12, 10 * time.Minute, true},
		{"one field", map[string]string{"RateLimit": `"default";r=50;t=30`}, 50, 30 * time.Second, true},
		{"one field, older", map[string]string{"RateLimit": "limit=100, remaining=7, reset=5"}, 7, 5 * time.Second, true},
		{"no time", map[string]string{"RateLimit-Remaining": "9"}, 9, leftDefault, true},
		{"past", map[string]string{"RateLimit-Remaining": "9", "RateLimit-Reset": "1700000000"}, 9, time.Second, true},
		{"too far", map[string]string{"RateLimit-Remaining": "9", "RateLimit-Reset": "99999999"}, 9, maxAfter, true},
		{"negative", map[string]string{"RateLimit-Remaining": "-1"}, 0, 0, false},
		{"words", map[string]string{"RateLimit-Remaining": "many", "RateLimit": "soon"}, 0, 0, false},
	} {
		h := http.Header{}
		for k, v := range tt.header {
			h.Set(k, v)
		}
		left, within, ok := remaining(h, now)
		if left != tt.left || within != tt.within || ok != tt.ok {
			t.Errorf("%s: %d within %s, %v; want %d within %s, %v", tt.name, left, within, ok, tt.left, tt.within, tt.ok)
		}
	}
}

func TestRateConfig(t *testing.T) {
	for _, tt := range []struct {
		rate Rate
		want string
	}{
		{Rate{}, ""},
		{Rate{RequestsPerSecond: 10, Burst: 20, PullsPerHour: 100}, ""},
		{Rate{RequestsPerSecond: -1}, "requestsPerSecond"},
		{Rate{RequestsPerSecond: 1e-9}, "one an hour"},
		{Rate{Burst: 5}, "needs rate.requestsPerSecond"},
		{Rate{RequestsPerSecond: 1, Burst: -1}, "burst"},
		{Rate{PullsPerHour: -1}, "pullsPerHour"},
	} {
		_, err := New([]Host{{Name: "registry.example", Rate: tt.rate}}, slog.New(slog.DiscardHandler))
		if (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%+v: %v, want %q", tt.rate, err, tt.want)
		}
	}
}

// No hour gets more pulls than its number.
func TestPullsOfAnHour(t *testing.T) {
	for _, n := range []int{1, 2, 7, 100, 5000} {
		b := Rate{PullsPerHour: n}.pulls("k")
		if got := b.burst + int((time.Hour-time.Nanosecond)/b.interval); got > n {
			t.Errorf("%d an hour: %d", n, got)
		}
	}
}
