package redis

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
	"pgregory.net/rapid"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	layer = "layer:sha256:aaaa:1"
	long  = time.Minute
	short = 60 * time.Millisecond
)

func open(t testing.TB, cfg Config) *Client {
	t.Helper()
	c, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

func acquire(t testing.TB, c *Client, holder string, ttl time.Duration) *Lease {
	t.Helper()
	l, err := c.Acquire(t.Context(), layer, holder, ttl)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// takeOver polls until the lease can be taken.
func takeOver(t testing.TB, c *Client, holder string, ttl time.Duration) *Lease {
	t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	for {
		l, err := c.Acquire(t.Context(), layer, holder, ttl)
		if err == nil {
			return l
		}
		if !errors.Is(err, ErrTaken) || time.Now().After(deadline) {
			t.Fatalf("take over: %v", err)
		}
		time.Sleep(time.Millisecond)
	}
}

func flush(t testing.TB, c *Client) {
	t.Helper()
	if err := c.rdb.FlushDB(t.Context()).Err(); err != nil {
		t.Fatal(err)
	}
}

func TestTakenSaysWhoAndHowLong(t *testing.T) {
	c := open(t, backend(t))
	acquire(t, c, "event-1", long)
	for _, holder := range []string{"event-2", "event-1"} { // a redelivery is no owner either
		_, err := c.Acquire(t.Context(), layer, holder, long)
		var taken *TakenError
		if !errors.Is(err, ErrTaken) || !errors.As(err, &taken) {
			t.Fatalf("%s: got %v, want a TakenError", holder, err)
		}
		if taken.Holder != "event-1" || taken.Key != layer || taken.TTL <= long/2 || taken.TTL > long {
			t.Errorf("%s: %+v", holder, taken)
		}
		if IsUnavailable(err) {
			t.Errorf("%s: a taken lease is not an outage", holder)
		}
	}
	if other, err := c.Acquire(t.Context(), layer+"0", "event-2", long); err != nil || other.Token == 0 {
		t.Errorf("another key: %+v, %v", other, err)
	}
}

func TestAcquireRepeatedAfterALostAnswer(t *testing.T) {
	c := open(t, backend(t))
	var tokens [2]string
	for i := range tokens {
		answer, err := acquireScript.Run(t.Context(), c.rdb, c.keys(layer), "event-1", 60_000, 60_000, "the same call").Slice()
		if err != nil || len(answer) != 2 {
			t.Fatalf("answer %v, %v", answer, err)
		}
		tokens[i] = fmt.Sprint(answer[1])
	}
	if tokens[0] != tokens[1] {
		t.Errorf("the repeated call got token %s, the first %s", tokens[1], tokens[0])
	}
}

func TestHolderDies(t *testing.T) {
	c := open(t, backend(t))
	dead := acquire(t, c, "event-1", short)
	next := takeOver(t, c, "event-2", long)
	if next.Token <= dead.Token {
		t.Errorf("token %d after %d", next.Token, dead.Token)
	}
	if err := c.Renew(t.Context(), dead, long); !errors.Is(err, ErrLost) {
		t.Errorf("the dead holder renews: %v", err)
	}
	if err := c.Release(t.Context(), dead); !errors.Is(err, ErrLost) {
		t.Errorf("the dead holder releases: %v", err)
	}
	if err := c.Renew(t.Context(), next, long); err != nil {
		t.Errorf("the new holder renews: %v", err)
	}
}

func TestFlushedInMidFlight(t *testing.T) {
	c := open(t, backend(t))
	first := acquire(t, c, "event-1", long) // it must not end before Hold begins
	started := make(chan struct{})
	held := make(chan error, 1)
	go func() {
		held <- c.Hold(t.Context(), first, short, func(ctx context.Context) error {
			close(started)
			<-ctx.Done()
			return nil // also work that thinks it is done has lost
		})
	}()
	<-started
	flush(t, c)
	second := takeOver(t, c, "event-2", long)
	if second.Token <= first.Token {
		t.Errorf("token %d after %d and a flush", second.Token, first.Token)
	}
	if err := <-held; !errors.Is(err, ErrLost) {
		t.Errorf("Hold: %v, want ErrLost", err)
	}
	// Its release at the end did not touch the new holder's lease.
	if err := c.Renew(t.Context(), second, long); err != nil {
		t.Errorf("the new holder renews: %v", err)
	}
}

func TestTwoFinish(t *testing.T) {
	c := open(t, backend(t))
	slow := acquire(t, c, "event-1", short)
	fast := takeOver(t, c, "event-1", long) // the redelivered event takes over
	if err := c.Release(t.Context(), slow); !errors.Is(err, ErrLost) {
		t.Errorf("release with the old token: %v", err)
	}
	if _, err := c.Acquire(t.Context(), layer, "event-3", long); !errors.Is(err, ErrTaken) {
		t.Errorf("the lease is gone: %v", err)
	}
	if err := c.Release(t.Context(), fast); err != nil {
		t.Errorf("release with the new token: %v", err)
	}
	if err := c.Release(t.Context(), fast); !errors.Is(err, ErrLost) {
		t.Errorf("second release: %v", err)
	}
	if third := acquire(t, c, "event-3", long); third.Token <= fast.Token {
		t.Errorf("token %d after %d", third.Token, fast.Token)
	}
}

func TestHoldRenewsAndReleases(t *testing.T) {
	const ttl = 10 * short // a machine that stands still for a moment loses no lease of this
	c := open(t, backend(t))
	failure := errors.New("broken layer")
	for _, want := range []error{nil, failure} {
		l := acquire(t, c, "event-1", ttl)
		err := c.Hold(t.Context(), l, ttl, func(ctx context.Context) error {
			for end := time.Now().Add(2 * ttl); time.Now().Before(end); time.Sleep(time.Millisecond) {
				if _, err := c.Acquire(ctx, layer, "event-2", long); !errors.Is(err, ErrTaken) {
					return fmt.Errorf("taken from the holder: %w", err)
				}
			}
			return want
		})
		if !errors.Is(err, want) {
			t.Fatalf("Hold: %v, want %v", err, want)
		}
		if next := acquire(t, c, "event-2", long); next.Token <= l.Token {
			t.Errorf("token %d after %d", next.Token, l.Token)
		} else if err := c.Release(t.Context(), next); err != nil {
			t.Fatal(err)
		}
	}
}

func TestHoldDoesNotStartWithoutTheLease(t *testing.T) {
	c := open(t, backend(t))
	l := acquire(t, c, "event-1", long)
	if err := c.Release(t.Context(), l); err != nil {
		t.Fatal(err)
	}
	err := c.Hold(t.Context(), l, long, func(context.Context) error {
		t.Error("work ran")
		return nil
	})
	if !errors.Is(err, ErrLost) {
		t.Errorf("got %v, want ErrLost", err)
	}
}

func TestLocksExclude(t *testing.T) {
	cfg := backend(t)
	var inside, runs atomic.Int32
	var wg sync.WaitGroup
	for i := range 8 {
		c := open(t, cfg)
		wg.Go(func() {
			err := c.WithLock(t.Context(), "referrers:team/app", fmt.Sprint(i), long, func(context.Context) error {
				if n := inside.Add(1); n != 1 {
					t.Errorf("%d inside", n)
				}
				runs.Add(1)
				inside.Add(-1)
				return nil
			})
			if err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if runs.Load() != 8 {
		t.Errorf("ran %d times, want 8", runs.Load())
	}
}

func TestWithLockWaitsUntilItsContextEnds(t *testing.T) {
	c := open(t, backend(t))
	acquire(t, c, "event-1", long)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	err := c.WithLock(ctx, layer, "event-2", long, func(context.Context) error { return errors.New("ran") })
	if !errors.Is(err, context.DeadlineExceeded) || !errors.Is(err, ErrTaken) {
		t.Errorf("got %v, want the deadline and who holds it", err)
	}
}

// Whatever happens in whatever order, also to all of Redis' data, at most one
// lease is good, and every token is higher than all before it.
func TestLeaseProperties(t *testing.T) {
	c := open(t, backend(t))
	n := 0
	rapid.Check(t, func(rt *rapid.T) {
		n++
		key := fmt.Sprintf("property:%d", n)
		var leases []*Lease
		var good *Lease
		some := func() *Lease {
			if len(leases) == 0 {
				rt.Skip("no lease yet")
			}
			return leases[rapid.IntRange(0, len(leases)-1).Draw(rt, "lease")]
		}
		check := func(what string, l *Lease, err error) {
			if l == good && err != nil {
				rt.Fatalf("%s of the good lease: %v", what, err)
			}
			if l != good && !errors.Is(err, ErrLost) {
				rt.Fatalf("%s of a lost lease: %v", what, err)
			}
		}
		rt.Repeat(map[string]func(*rapid.T){
			"acquire": func(rt *rapid.T) {
				holder := rapid.SampledFrom([]string{"a", "b"}).Draw(rt, "holder")
				l, err := c.Acquire(t.Context(), key, holder, long)
				if good != nil {
					var taken *TakenError
					if !errors.As(err, &taken) || taken.Holder != good.Holder {
						rt.Fatalf("acquire of a held lease: %v", err)
					}
					return
				}
				if err != nil {
					rt.Fatal(err)
				}
				if len(leases) > 0 && l.Token <= leases[len(leases)-1].Token {
					rt.Fatalf("token %d after %d", l.Token, leases[len(leases)-1].Token)
				}
				good = l
				leases = append(leases, l)
			},
			"renew": func(*rapid.T) { l := some(); check("renewal", l, c.Renew(t.Context(), l, long)) },
			"release": func(*rapid.T) {
				l := some()
				check("release", l, c.Release(t.Context(), l))
				if l == good {
					good = nil
				}
			},
			"expire": func(rt *rapid.T) {
				if err := c.rdb.Del(t.Context(), c.keys(key)[0]).Err(); err != nil {
					rt.Fatal(err)
				}
				good = nil
			},
			"lose everything": func(*rapid.T) { flush(t, c); good = nil },
		})
	})
}

// silence stands between a client and Redis, and can stop forwarding without
// closing anything, also for connections that are made then.
type silence struct {
	address string
	silent  atomic.Bool
}

func newSilence(t *testing.T, to string) *silence {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &silence{address: l.Addr().String()}
	var group sync.WaitGroup
	var mu sync.Mutex
	conns := []io.Closer{l}
	forward := func(to, from net.Conn) {
		b := make([]byte, 4096)
		for {
			n, err := from.Read(b)
			if err != nil {
				_ = to.Close()
				return
			}
			if s.silent.Load() {
				continue
			}
			if _, err := to.Write(b[:n]); err != nil {
				_ = from.Close()
				return
			}
		}
	}
	group.Go(func() {
		for {
			near, err := l.Accept()
			if err != nil {
				return
			}
			far, err := net.Dial("tcp", to)
			if err != nil {
				_ = near.Close()
				continue
			}
			mu.Lock()
			conns = append(conns, near, far)
			mu.Unlock()
			group.Go(func() { forward(far, near) })
			group.Go(func() { forward(near, far) })
		}
	})
	t.Cleanup(func() {
		_ = l.Close()
		mu.Lock()
		for _, c := range conns {
			_ = c.Close()
		}
		mu.Unlock()
		group.Wait()
	})
	return s
}

// A Redis that takes connections and never answers: the work has ended while
// the lease is still ours.
func TestWorkEndsBeforeItsLeaseWhenRedisIsSilent(t *testing.T) {
	cfg := backend(t)
	direct := open(t, cfg)
	u, err := url.Parse(cfg.URL)
	if err != nil {
		t.Fatal(err)
	}
	proxy := newSilence(t, u.Host)
	u.Host = proxy.address
	cfg.URL = u.String()
	c := open(t, cfg)
	const ttl = 3 * time.Second
	l := acquire(t, c, "event-1", ttl)
	err = c.Hold(t.Context(), l, ttl, func(ctx context.Context) error {
		proxy.silent.Store(true)
		<-ctx.Done()
		if _, err := direct.Acquire(t.Context(), layer, "event-2", ttl); !errors.Is(err, ErrTaken) {
			t.Errorf("when the work ended, the lease was gone already: %v", err)
		}
		return nil
	})
	if !errors.Is(err, ErrLost) {
		t.Errorf("Hold: %v, want ErrLost", err)
	}
}
