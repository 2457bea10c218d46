package layer

import (
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
)

// errTemp is a failure of the temporary file: ours, not the layer's.
var errTemp = errors.New("temporary file")

// body holds the content of one file at a time: in memory, or in one unlinked
// temporary file where it is larger. Both are used again for the next file.
type body struct {
	maxMemory int64
	dir       string
	mem       []byte
	file      *os.File
	spilled   bool
	size      int64
}

// reset forgets the content; size is what is about to be written.
func (b *body) reset(size int64) error {
	b.mem = b.mem[:0]
	b.size = 0
	b.spilled = size > b.maxMemory
	if !b.spilled {
		b.mem = slices.Grow(b.mem, int(size)) // at most maxMemory
		return nil
	}
	if b.file == nil {
		f, err := os.CreateTemp(b.dir, "tidewaiter-layer-*")
		if err != nil {
			return fmt.Errorf("%w: %w", errTemp, err)
		}
		b.file = f
		// Unlinked at once: whatever ends this process, no file stays behind.
		if err := os.Remove(f.Name()); err != nil {
			return fmt.Errorf("%w: %w", errTemp, err)
		}
	}
	if _, err := b.file.Seek(0, io.SeekStart); err != nil {
		return fmt.Errorf("%w: %w", errTemp, err)
	}
	return nil
}

func (b *body) Write(p []byte) (int, error) {
	if !b.spilled {
		b.mem = append(b.mem, p...)
		b.size += int64(len(p))
		return len(p), nil
	}
	n, err := b.file.Write(p)
	b.size += int64(n)
	if err != nil {
		return n, fmt.Errorf("%w: %w", errTemp, err)
	}
	return n, nil
}

// ReadAt implements io.ReaderAt, which extractors ask for.
func (b *body) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 || off >= b.size {
		return 0, io.EOF
	}
	if b.spilled {
		n, err := b.file.ReadAt(p[:min(int64(len(p)), b.size-off)], off)
		if err == nil && n < len(p) {
			err = io.EOF
		}
		return n, err
	}
	n := copy(p, b.mem[off:])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// reader returns a reader of the whole content.
func (b *body) reader() *io.SectionReader { return io.NewSectionReader(b, 0, b.size) }

// bytes returns the content if it is at most limit bytes.
func (b *body) bytes(limit int64) ([]byte, error) {
	if b.size > limit {
		return nil, io.ErrShortBuffer
	}
	if !b.spilled {
		return b.mem, nil
	}
	p := make([]byte, b.size)
	_, err := io.ReadFull(b.reader(), p)
	return p, err
}

func (b *body) close() {
	if b.file != nil {
		_ = b.file.Close() // unlinked: nothing can be lost
	}
}
