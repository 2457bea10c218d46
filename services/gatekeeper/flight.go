package gatekeeper

import (
	"context"
	"errors"
	"sync"
)

// maxFlights bounds how much work of one kind runs at once.
const maxFlights = 512

// errBusy is returned when maxFlights run already.
var errBusy = errors.New("too much is asked of registries already")

// flights run one piece of work a key at a time: whoever asks while it runs
// waits for the same result. The work goes on when all have stopped waiting, so
// that the next one finds it done.
type flights[T any] struct {
	ctx context.Context // of the work

	mu      sync.Mutex
	running map[string]*flight[T]
	group   sync.WaitGroup
}

type flight[T any] struct {
	done  chan struct{}
	value T
	err   error
}

func newFlights[T any](ctx context.Context) *flights[T] {
	return &flights[T]{ctx: ctx, running: map[string]*flight[T]{}}
}

// do returns the result of work, or ctx's error when that ends first. Nothing
// is begun when it has ended already, nor when too much runs: errBusy.
func (f *flights[T]) do(ctx context.Context, key string, work func(ctx context.Context) (T, error)) (T, error) {
	var none T
	f.mu.Lock()
	w, ok := f.running[key]
	if !ok && (ctx.Err() != nil || len(f.running) >= maxFlights) {
		f.mu.Unlock()
		return none, errors.Join(ctx.Err(), errBusy)
	}
	if !ok {
		w = &flight[T]{done: make(chan struct{})}
		f.running[key] = w
		f.group.Go(func() {
			w.value, w.err = work(f.ctx)
			f.mu.Lock()
			delete(f.running, key)
			f.mu.Unlock()
			close(w.done)
		})
	}
	f.mu.Unlock()
	select {
	case <-w.done:
		return w.value, w.err
	case <-ctx.Done():
		return none, ctx.Err()
	}
}

// wait returns when all work has ended.
func (f *flights[T]) wait() { f.group.Wait() }
