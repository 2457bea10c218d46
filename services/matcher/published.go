package matcher

import (
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/tidewaiter/tidewaiter/libs/registry"
	"github.com/tidewaiter/tidewaiter/services/advisor/artefact"
	"github.com/tidewaiter/tidewaiter/services/advisor/snapshot"
)

const (
	// keepFiles is how many fetched snapshots are kept.
	keepFiles = 2
	// fetchTimeout bounds the fetching of one snapshot.
	fetchTimeout = 10 * time.Minute
)

// published is where snapshots are fetched from.
type published struct {
	puller artefact.Puller
	from   artefact.Repository
	keys   []ed25519.PublicKey
	dir    string
	turn   sync.Mutex // one fetches, the others wait and find it done
}

func newPublished(cfg Config, puller artefact.Puller) (*published, error) {
	from, err := artefact.ParseRepository(cfg.Snapshots)
	if err != nil {
		return nil, err
	}
	keys, err := artefact.LoadPublicKeys(cfg.SnapshotKeys)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(cfg.Cache, 0o700); err != nil {
		return nil, fmt.Errorf("make cache of snapshots: %w", err)
	}
	return &published{puller: puller, from: from, keys: keys, dir: cfg.Cache}, nil
}

// files returns the fetched snapshots, oldest first.
func (p *published) files() []string {
	files, _ := filepath.Glob(filepath.Join(strings.NewReplacer(`\`, `\\`, `*`, `\*`, `?`, `\?`, `[`, `\[`).Replace(p.dir), "*.db")) // the pattern is well-formed
	slices.Sort(files)
	return files
}

// cached takes the newest fetched snapshot into use, so that matching goes on
// after a restart while the registry is away. The folder is as trusted as the
// program's own files; that a file is whole is verified.
func (h *holder) cached() {
	files := h.published.files()
	for _, file := range slices.Backward(files) {
		if h.open(file) == nil {
			return
		}
	}
}

// open takes a snapshot file into use unless what is in use is as new.
func (h *holder) open(file string) error {
	s, err := snapshot.Open(file)
	if err != nil {
		return err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.current != nil && h.current.snapshot.Sequence() >= s.Sequence() {
		return s.Close()
	}
	h.use(s)
	return nil
}

// fetch takes the snapshot at location ("": the newest that is published) into
// use if it is newer than the one in use. An older one never replaces it. Where
// the named one is gone already, the newest is taken.
func (h *holder) fetch(ctx context.Context, sequence int64, location string) (changed bool, err error) {
	p := h.published
	p.turn.Lock()
	defer p.turn.Unlock()
	if sequence > 0 && h.has(sequence) {
		return true, nil // somebody else fetched it
	}
	ctx, cancel := context.WithTimeout(ctx, fetchTimeout)
	defer cancel()
	found, err := artefact.Look(ctx, p.puller, p.from, location, p.keys)
	var named error // why the named one cannot be had
	if err != nil && location != "" {
		named = err
		found, err = artefact.Look(ctx, p.puller, p.from, "", p.keys)
	}
	if errors.Is(err, registry.ErrNotFound) && sequence == 0 && h.ready() == nil {
		return false, nil // nothing is published yet, and what there is suffices
	}
	if err != nil {
		return false, h.missing(errors.Join(named, err))
	}
	if h.has(found.Snapshot.Sequence) {
		return false, named
	}
	file, err := artefact.Fetch(ctx, p.puller, p.from, found, p.dir)
	if err != nil {
		return false, h.missing(err)
	}
	if err := h.open(file); err != nil {
		return false, h.missing(err)
	}
	if files := p.files(); len(files) > keepFiles {
		for _, old := range files[:len(files)-keepFiles] {
			_ = os.Remove(old) // it is tried again after the next one
		}
	}
	return true, nil
}

// missing keeps why there is no snapshot, while there is none.
func (h *holder) missing(err error) error {
	err = fmt.Errorf("published advisories: %w", err)
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.current == nil {
		h.problem = err
	}
	return err
}
