package gatekeeper

import (
	"context"
	"sync"
)

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

// do returns the result of work, or ctx's error when that ends first.
func (f *flights[T]) do(ctx context.Context, key string, work func(ctx context.Context) (T, error)) (T, error) {
	f.mu.Lock()
	w, ok := f.running[key]
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
		var none T
		return none, ctx.Err()
	}
}

// wait returns when all work has ended.
func (f *flights[T]) wait() { f.group.Wait() }
