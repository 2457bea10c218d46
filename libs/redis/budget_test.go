package redis

import (
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// rested gives a budget's bucket its rest: it is full.
func rested(t *testing.T, c *Client, key string) {
	t.Helper()
	if err := c.rdb.Set(t.Context(), c.budgetKeys(key)[0], "1", time.Hour).Err(); err != nil {
		t.Fatal(err)
	}
}

// What several take at once is never more than there is.
func TestTakeIsShared(t *testing.T) {
	const burst, clients, tries = 7, 3, 40
	cfg := backend(t)
	rested(t, open(t, cfg), "k")
	var got atomic.Int32
	var group sync.WaitGroup
	for range clients {
		c := open(t, cfg)
		group.Go(func() {
			for range tries {
				wait, taken, sharers, err := c.Take(t.Context(), "k", time.Hour, burst, 0)
				switch {
				case err != nil:
					t.Error(err)
				case sharers < 1 || sharers > clients:
					t.Errorf("%d sharers", sharers)
				case taken && wait > 0:
					t.Errorf("taken after %s without patience", wait)
				case taken:
					got.Add(1)
				case wait <= 0:
					t.Error("refused without a time")
				}
			}
		})
	}
	group.Wait()
	if got.Load() != burst {
		t.Errorf("%d were taken, there are %d", got.Load(), burst)
	}
	if _, _, sharers, err := open(t, cfg).Take(t.Context(), "k", time.Hour, burst, 0); err != nil || sharers != clients+1 {
		t.Errorf("%d sharers, %v", sharers, err)
	}
}

// Those who wait get their turns one after the other, and so do those who are
// told to come back.
func TestTurns(t *testing.T) {
	c := open(t, backend(t))
	const step = 20 * time.Second
	take := func(patience time.Duration) (time.Duration, bool) {
		t.Helper()
		wait, taken, _, err := c.Take(t.Context(), "k", step, 1, patience)
		if err != nil {
			t.Fatal(err)
		}
		return wait.Round(step), taken
	}
	for i, want := range []struct {
		wait, patience time.Duration
		taken          bool
	}{
		{0, 0, true}, // a bucket that is not known has one
		{step, MaxPatience, true},
		{2 * step, MaxPatience, true},
		{3 * step, time.Second, false},
		{4 * step, time.Second, false}, // not at the same time
	} {
		if wait, taken := take(want.patience); wait != want.wait || taken != want.taken {
			t.Errorf("%d: %s, %v; want %+v", i, wait, taken, want)
		}
	}
	for range 300 {
		if wait, taken := take(0); taken || wait > maxTurn+step {
			t.Fatalf("%s, %v: further than anybody will wait", wait, taken)
		}
	}
}

// A clock that is set back must not stop a budget for hours.
func TestClockSetBack(t *testing.T) {
	c := open(t, backend(t))
	future := time.Now().Add(1000 * time.Hour).UnixMicro()
	if err := c.rdb.Set(t.Context(), c.budgetKeys("k")[0], future, time.Hour).Err(); err != nil {
		t.Fatal(err)
	}
	if wait, taken, _, err := c.Take(t.Context(), "k", time.Second, 5, 0); err != nil || taken || wait > 2*MaxPatience {
		t.Errorf("%s, %v, %v", wait, taken, err)
	}
}

func TestQuiet(t *testing.T) {
	cfg := backend(t)
	a, b := open(t, cfg), open(t, cfg)
	if err := a.Quiet(t.Context(), "k", time.Hour); err != nil {
		t.Fatal(err)
	}
	if err := a.Quiet(t.Context(), "k", time.Minute); err != nil { // the longer one stays
		t.Fatal(err)
	}
	if wait, taken, _, err := b.Take(t.Context(), "k", 0, 0, time.Minute); err != nil || taken || wait < 59*time.Minute {
		t.Errorf("of a quiet budget: %s, %v, %v", wait, taken, err)
	}
	if _, taken, _, err := b.Take(t.Context(), "other", 0, 0, 0); err != nil || !taken {
		t.Errorf("of another: %v, %v", taken, err)
	}
	if err := a.Quiet(t.Context(), "short", 5*time.Millisecond); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(20 * time.Second); ; {
		if _, taken, _, err := b.Take(t.Context(), "short", 0, 0, 0); err != nil || taken {
			if err != nil {
				t.Fatal(err)
			}
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("the quiet does not end")
		}
	}
}

func TestLeft(t *testing.T) {
	cfg := backend(t)
	a, b := open(t, cfg), open(t, cfg)
	for _, n := range []int{3, 9} { // the lower one stays
		if err := a.Left(t.Context(), "k", n, time.Hour); err != nil {
			t.Fatal(err)
		}
	}
	got := 0
	for range 5 {
		for _, c := range []*Client{a, b} {
			wait, taken, _, err := c.Take(t.Context(), "k", 0, 0, 0)
			if err != nil {
				t.Fatal(err)
			}
			if taken {
				got++
			} else if wait < 59*time.Minute {
				t.Errorf("refused for %s", wait)
			}
		}
	}
	if got != 3 {
		t.Errorf("%d were taken of 3", got)
	}
}

// What Redis loses is not given out anew.
func TestLossGivesNoBurst(t *testing.T) {
	c := open(t, backend(t))
	flush(t, c)
	got := 0
	for range 10 {
		if _, taken, _, err := c.Take(t.Context(), "k", time.Hour, 100, 0); err != nil {
			t.Fatal(err)
		} else if taken {
			got++
		}
	}
	if got != 1 {
		t.Errorf("%d were given after a loss, want 1", got)
	}
}
