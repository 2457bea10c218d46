package gatekeeper

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"
)

// rereadEvery bounds how often files are looked at for changes.
const rereadEvery = time.Second

// maxFile bounds a key, token or certificate file in bytes.
const maxFile = 1 << 20

// files is what was read from files, read again when one of them changes. While
// the changed ones cannot be used, what was read before stays in use.
type files[T any] struct {
	paths []string
	parse func(contents [][]byte) (T, error)
	log   *slog.Logger
	now   func() time.Time

	mu      sync.Mutex
	value   T
	stamps  []fileStamp
	checked time.Time
}

// fileStamp tells versions of a file apart.
type fileStamp struct {
	modified time.Time
	size     int64
}

func newFiles[T any](log *slog.Logger, parse func(contents [][]byte) (T, error), paths ...string) (*files[T], error) {
	f := &files[T]{paths: paths, parse: parse, log: log, now: time.Now}
	stamps, err := f.stat()
	if err != nil {
		return nil, err
	}
	f.stamps, f.checked = stamps, f.now()
	if f.value, err = f.read(); err != nil {
		return nil, err
	}
	return f, nil
}

func (f *files[T]) stat() ([]fileStamp, error) {
	out := make([]fileStamp, len(f.paths))
	for i, path := range f.paths {
		info, err := os.Stat(path)
		if err != nil {
			return nil, fmt.Errorf("look at file: %w", err)
		}
		if info.Size() > maxFile {
			return nil, fmt.Errorf("%s has %d bytes, at most %d are expected", path, info.Size(), maxFile)
		}
		out[i] = fileStamp{info.ModTime(), info.Size()}
	}
	return out, nil
}

func (f *files[T]) read() (T, error) {
	var zero T
	contents := make([][]byte, len(f.paths))
	for i, path := range f.paths {
		b, err := os.ReadFile(path) //nolint:gosec // files that the configuration names
		if err != nil {
			return zero, fmt.Errorf("read file: %w", err)
		}
		contents[i] = b
	}
	return f.parse(contents)
}

// get returns what the files hold now.
func (f *files[T]) get() T {
	f.mu.Lock()
	defer f.mu.Unlock()
	now := f.now()
	if now.Sub(f.checked) < rereadEvery {
		return f.value
	}
	f.checked = now
	stamps, err := f.stat()
	if err == nil && sameStamps(stamps, f.stamps) {
		return f.value
	}
	value, readErr := f.value, err
	if err == nil {
		value, readErr = f.read()
	}
	if readErr != nil {
		f.log.WarnContext(context.Background(), "changed files cannot be used, what was read before stays in use", slog.Any("error", readErr))
		return f.value
	}
	f.value, f.stamps = value, stamps
	return f.value
}

func sameStamps(a, b []fileStamp) bool {
	for i := range a {
		if a[i].size != b[i].size || !a[i].modified.Equal(b[i].modified) {
			return false
		}
	}
	return true
}
