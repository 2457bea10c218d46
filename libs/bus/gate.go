package bus

import (
	"context"
	"sync"
	"time"

	"github.com/tidewaiter/tidewaiter/contracts"
)

const (
	// bulkEvery is how many fresh events may start between two bulk events when
	// both wait. One bulk event in 19 is a little more than the promised 5 %.
	bulkEvery = 18
	// bulkCreditMax bounds how many bulk events may start in a row on credit.
	bulkCreditMax = 16 * bulkEvery
	// freshIdle is how long fresh events may stand still (a long one in hand, an
	// outage) before bulk events go on beside them.
	freshIdle = time.Second
)

// gate decides which event may start, for all partitions that one consumer
// handles. Fresh events start whenever a slot is free; bulk events when no
// fresh event waits or is in hand, or when they have had less than their share.
type gate struct {
	mu         sync.Mutex
	limit      int // slots; 0: without limit
	running    int
	queued     int // fresh events fetched and not finished
	queuedBulk int // the same of bulk events
	bulkHeld   int // bulk events that wait or run, those of retry topics too
	credit     int // fresh events started while bulk had some
	lastFresh  time.Time
	fresh      []*waiter
	bulk       []*waiter
}

type waiter struct {
	n     int
	ready chan struct{}
}

func newGate(limit int) *gate { return &gate{limit: limit, lastFresh: time.Now()} }

// add counts fetched events of a lane; those of retry topics have none yet.
func (g *gate) add(lane string, n int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	switch lane {
	case contracts.LaneFresh:
		g.queued += n
	case contracts.LaneBulk:
		g.queuedBulk += n
	}
	g.grant()
}

// acquire waits for a slot for n events of a lane. It returns false when ctx
// ends first. After true, release must be called with the same lane and n.
func (g *gate) acquire(ctx context.Context, lane string, n int) bool {
	w := &waiter{n: n, ready: make(chan struct{})}
	g.mu.Lock()
	if lane == contracts.LaneFresh {
		g.fresh = append(g.fresh, w)
	} else {
		g.bulk = append(g.bulk, w)
		g.bulkHeld += n
	}
	g.grant()
	g.mu.Unlock()

	select {
	case <-w.ready:
		return true
	default:
	}
	idle := time.NewTicker(freshIdle)
	defer idle.Stop()
	for {
		select {
		case <-w.ready:
			return true
		case <-idle.C:
			g.mu.Lock()
			g.grant()
			g.mu.Unlock()
		case <-ctx.Done():
			if g.withdraw(w, lane) {
				return false
			}
			// It was granted in the meantime: give the slot back.
			g.release(lane, n)
			return false
		}
	}
}

// withdraw takes a waiter out and says whether it was still waiting.
func (g *gate) withdraw(w *waiter, lane string) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	list := &g.fresh
	if lane != contracts.LaneFresh {
		list = &g.bulk
	}
	for i, x := range *list {
		if x != w {
			continue
		}
		*list = append((*list)[:i], (*list)[i+1:]...)
		if lane != contracts.LaneFresh {
			g.bulkHeld -= w.n
		}
		return true
	}
	return false
}

// release gives a slot back.
func (g *gate) release(lane string, n int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.running--
	if lane != contracts.LaneFresh {
		g.bulkHeld -= n
	}
	g.grant()
}

// finish says that n fetched events of a lane are done with.
func (g *gate) finish(lane string, n int) { g.add(lane, -n) }

// grant starts what may start. The caller holds the lock.
func (g *gate) grant() {
	for g.limit == 0 || g.running < g.limit {
		switch {
		case len(g.bulk) > 0 && (g.credit >= bulkEvery || g.freshRests()):
			w := g.bulk[0]
			g.bulk = g.bulk[1:]
			g.credit = max(0, g.credit-bulkEvery*w.n)
			g.running++
			close(w.ready)
		case len(g.fresh) > 0:
			w := g.fresh[0]
			g.fresh = g.fresh[1:]
			if g.bulkHeld > 0 || g.queuedBulk > 0 {
				g.credit = min(g.credit+w.n, bulkCreditMax)
			} else {
				g.credit = 0
			}
			g.lastFresh = time.Now()
			g.running++
			close(w.ready)
		default:
			return
		}
	}
}

// freshRests says whether nothing fresh could go on now. The caller holds the lock.
func (g *gate) freshRests() bool {
	if len(g.fresh) > 0 {
		return false
	}
	return g.queued == 0 || time.Since(g.lastFresh) >= freshIdle
}
