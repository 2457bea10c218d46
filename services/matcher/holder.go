package matcher

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"

	"github.com/tidewaiter/tidewaiter/services/advisor/snapshot"
	"github.com/tidewaiter/tidewaiter/services/matcher/match"
	"github.com/tidewaiter/tidewaiter/services/matcher/policy"
)

var (
	// errNoSnapshot is why nothing can be matched yet.
	errNoSnapshot = errors.New("no advisory snapshot")
	// errOlder is why a request for a newer snapshot must wait.
	errOlder = errors.New("the advisory snapshot here is older than the one asked for")
)

// holder holds the snapshot in use and takes the next one when its file is
// replaced. Who uses a snapshot keeps it open until it is released.
type holder struct {
	path   string
	policy *policy.Policy

	mu      sync.Mutex
	current *loaded
	file    os.FileInfo // of current
	problem error       // why the newest file is not in use
}

// loaded is a snapshot with its matcher.
type loaded struct {
	snapshot *snapshot.Snapshot
	matcher  *match.Matcher
	users    int  // guarded by holder.mu
	replaced bool // guarded by holder.mu
}

// newHolder returns a holder with the snapshot at path, if there is one.
func newHolder(path string, pol *policy.Policy) *holder {
	h := &holder{path: path, policy: pol, problem: errNoSnapshot}
	_, _ = h.reload() // its error is in problem, and told by ready
	return h
}

// acquire returns the matcher of a snapshot of at least the given sequence (0:
// any) and a function to call when done with it. Errors: errOlder, errNoSnapshot.
func (h *holder) acquire(sequence int64) (*loaded, func(), error) {
	h.mu.Lock()
	stale := h.current == nil || h.current.snapshot.Sequence() < sequence
	h.mu.Unlock()
	if stale {
		if _, err := h.reload(); err != nil && h.ready() != nil {
			return nil, nil, err
		}
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	l := h.current
	if l == nil {
		return nil, nil, h.problem
	}
	if have := l.snapshot.Sequence(); have < sequence {
		return nil, nil, fmt.Errorf("sequence %d, asked for %d: %w", have, sequence, errOlder)
	}
	l.users++
	return l, func() { h.release(l) }, nil
}

func (h *holder) release(l *loaded) {
	h.mu.Lock()
	defer h.mu.Unlock()
	l.users--
	l.closeIfUnused()
}

// closeIfUnused gives back a replaced snapshot after its last user.
func (l *loaded) closeIfUnused() {
	if l.replaced && l.users == 0 {
		_ = l.snapshot.Close() // unmapping what was mapped does not fail
	}
}

// reload takes the file's snapshot if it is another than the one in use. A file
// that cannot be used leaves the one in use where it is.
func (h *holder) reload() (changed bool, err error) {
	if h.path == "" {
		return false, fmt.Errorf("matcher.advisories is not set: %w", errNoSnapshot)
	}
	info, err := os.Stat(h.path)
	if err != nil {
		return false, h.fail(fmt.Errorf("look at advisory snapshot: %w", err))
	}
	h.mu.Lock()
	same := h.file != nil && os.SameFile(h.file, info) && h.file.ModTime().Equal(info.ModTime()) && h.file.Size() == info.Size()
	h.mu.Unlock()
	if same {
		return false, nil
	}
	s, err := snapshot.Open(h.path)
	if err != nil {
		return false, h.fail(err)
	}
	next := &loaded{snapshot: s, matcher: match.New(s, h.policy)}
	h.mu.Lock()
	defer h.mu.Unlock()
	if old := h.current; old != nil {
		old.replaced = true
		old.closeIfUnused()
	}
	h.current, h.file, h.problem = next, info, nil
	return true, nil
}

func (h *holder) fail(err error) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.problem = err
	return err
}

// ready returns nil while there is a snapshot to match with.
func (h *holder) ready() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.current != nil {
		return nil
	}
	return h.problem
}

// watch looks at the file until ctx ends.
func (h *holder) watch(ctx context.Context, every time.Duration, log *slog.Logger) {
	h.mu.Lock()
	if h.current != nil {
		log.InfoContext(ctx, "advisory snapshot in use", "snapshot", h.current.snapshot.Digest(), "sequence", h.current.snapshot.Sequence())
	}
	h.mu.Unlock()
	tick := time.NewTicker(every)
	defer tick.Stop()
	last := ""
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		changed, err := h.reload()
		switch {
		case err != nil && err.Error() != last:
			last = err.Error()
			log.WarnContext(ctx, "advisory snapshot cannot be used", "error", err)
		case err == nil && changed:
			last = ""
			h.mu.Lock()
			log.InfoContext(ctx, "advisory snapshot in use", "snapshot", h.current.snapshot.Digest(), "sequence", h.current.snapshot.Sequence())
			h.mu.Unlock()
		}
	}
}

func (h *holder) close() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.current == nil {
		return nil
	}
	l := h.current
	h.current = nil
	l.replaced = true
	if l.users > 0 {
		return nil // its last user closes it
	}
	return l.snapshot.Close()
}
