package matcher

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

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
// replaced or a newer one is published. Who uses a snapshot keeps it open until
// it is released.
type holder struct {
	path      string
	policy    *policy.Policy
	published *published // nil: only the file counts

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
// any) and a function to call when done with it. One that is not here yet is
// fetched from location first. Errors: errOlder, errNoSnapshot.
func (h *holder) acquire(ctx context.Context, sequence int64, location string) (*loaded, func(), error) {
	var fetch error
	if !h.has(sequence) {
		_, fetch = h.refresh(ctx, sequence, location)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	l := h.current
	if l == nil {
		return nil, nil, errors.Join(h.problem, fetch)
	}
	if have := l.snapshot.Sequence(); have < sequence {
		return nil, nil, errors.Join(fmt.Errorf("sequence %d, asked for %d: %w", have, sequence, errOlder), fetch)
	}
	l.users++
	return l, func() { h.release(l) }, nil
}

// has says whether the snapshot in use is of at least the given sequence.
func (h *holder) has(sequence int64) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.current != nil && h.current.snapshot.Sequence() >= sequence
}

// refresh looks at the file and then, unless it suffices, at what is published.
func (h *holder) refresh(ctx context.Context, sequence int64, location string) (changed bool, err error) {
	if h.path != "" || h.published == nil {
		changed, err = h.reload()
	}
	if h.published == nil || changed && h.has(sequence) {
		return changed, err
	}
	fetched, errFetch := h.fetch(ctx, sequence, location)
	return changed || fetched, errors.Join(err, errFetch)
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
	h.mu.Lock()
	defer h.mu.Unlock()
	h.file = info
	if h.published != nil && h.current != nil && h.current.snapshot.Sequence() >= s.Sequence() {
		return false, s.Close() // what was published since is newer
	}
	h.use(s)
	return true, nil
}

// use takes a snapshot into use. The caller holds the lock.
func (h *holder) use(s *snapshot.Snapshot) {
	next := &loaded{snapshot: s, matcher: match.New(s, h.policy)}
	if old := h.current; old != nil {
		old.replaced = true
		old.closeIfUnused()
	}
	h.current, h.problem = next, nil
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

// newest returns a metric that says how new the advisories in use are.
func (h *holder) newest() prometheus.Collector {
	return prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "tidewaiter_matcher_advisories_newest_timestamp_seconds",
		Help: "When the newest advisory of the snapshot in use was modified, in Unix seconds; 0: there is none, or it does not say.",
	}, func() float64 {
		h.mu.Lock()
		defer h.mu.Unlock()
		if h.current == nil || h.current.snapshot.Newest().IsZero() {
			return 0
		}
		return float64(h.current.snapshot.Newest().Unix())
	})
}

// watch looks at the file every now and then, and more seldom at what is
// published, until ctx ends.
func (h *holder) watch(ctx context.Context, every, poll time.Duration, log *slog.Logger) {
	h.mu.Lock()
	if h.current != nil {
		log.InfoContext(ctx, "advisory snapshot in use", "snapshot", h.current.snapshot.Digest(), "sequence", h.current.snapshot.Sequence())
	}
	h.mu.Unlock()
	tick := time.NewTicker(every)
	defer tick.Stop()
	last := ""
	var polled time.Time
	for {
		var changed bool
		var err error
		switch {
		case h.published != nil && time.Since(polled) >= poll:
			polled = time.Now()
			changed, err = h.refresh(ctx, 0, "")
		case h.path != "" || h.published == nil:
			changed, err = h.reload()
		}
		switch {
		case ctx.Err() != nil:
			return
		case err != nil && err.Error() != last:
			last = err.Error()
			log.WarnContext(ctx, "advisory snapshot cannot be used", "error", err)
		case err == nil && changed:
			last = ""
			h.mu.Lock()
			log.InfoContext(ctx, "advisory snapshot in use", "snapshot", h.current.snapshot.Digest(), "sequence", h.current.snapshot.Sequence())
			h.mu.Unlock()
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
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
