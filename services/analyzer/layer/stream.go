package layer

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"time"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
)

const (
	// chunk is how much is decompressed and hashed at a time: it stays in the
	// second-level cache between the two.
	chunk = 256 << 10
	// compressedBuffer is what is read from the source at a time.
	compressedBuffer = 128 << 10
	// maxWindow bounds the memory that a zstd frame may ask for.
	maxWindow = 64 << 20
)

// source is the compressed layer as the caller gives it. It counts and
// optionally hashes, and remembers an error that is not the layer's own.
type source struct {
	ctx    context.Context
	r      io.Reader
	n      int64
	sum    hash.Hash
	failed error
}

func (s *source) Read(p []byte) (int, error) {
	if s.failed != nil {
		return 0, s.failed
	}
	if err := s.ctx.Err(); err != nil {
		s.failed = err
		return 0, err
	}
	n, err := s.r.Read(p)
	s.n += int64(n)
	if s.sum != nil {
		s.sum.Write(p[:n])
	}
	// A digest mismatch at the end of a download may wrap io.EOF, so that only
	// the bare one is the end.
	if err != nil && err != io.EOF {
		s.failed = err
	}
	return n, err
}

// drain reads to the end, so that whoever checks the digest at the end of the
// stream does.
func (s *source) drain() error {
	if s.failed != nil {
		return s.failed
	}
	buf := make([]byte, compressedBuffer)
	for {
		_, err := s.Read(buf)
		if err == io.EOF { //nolint:errorlint // see Read
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// stream is the uncompressed layer: decompressed and hashed chunk by chunk.
// It implements io.Seeker for moves forward, which archive/tar uses to skip
// files without copying them.
type stream struct {
	src      *source
	r        io.Reader
	release  func()
	sum      hash.Hash
	buf      []byte
	at, end  int
	pos      int64 // of at
	total    int64 // bytes that came out so far
	max      int64
	ratio    int64
	deadline time.Time
	err      error // that ended the stream; io.EOF: its regular end
}

// newStream finds out how the layer is compressed: media types lie.
func newStream(src *source, o Options, deadline time.Time) (*stream, error) {
	in := bufio.NewReaderSize(src, compressedBuffer) // which the gzip reader has a fast path for
	head, err := in.Peek(4)
	if err != nil && err != io.EOF { // a bare EOF is the end, see source.Read
		return nil, err
	}
	s := &stream{
		src: src, r: in, release: func() {}, sum: sha256.New(), buf: make([]byte, chunk),
		max: o.MaxBytes, ratio: o.MaxRatio, deadline: deadline,
	}
	switch {
	case len(head) == 0:
		return nil, errors.New("empty")
	case bytes.HasPrefix(head, []byte{0x1f, 0x8b}):
		z, err := gzip.NewReader(in)
		if err != nil {
			return nil, fmt.Errorf("gzip: %w", err)
		}
		s.r = z
	case bytes.HasPrefix(head, []byte{0x28, 0xb5, 0x2f, 0xfd}), isSkippable(head):
		z, err := zstd.NewReader(in, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true),
			zstd.WithDecoderMaxWindow(maxWindow), zstd.WithDecoderMaxMemory(1<<62))
		if err != nil {
			return nil, fmt.Errorf("zstd: %w", err)
		}
		s.r, s.release = z, z.Close
	}
	return s, nil
}

// isSkippable recognises a zstd skippable frame (RFC 8878, 3.1.2), with which a
// zstd layer may begin.
func isSkippable(head []byte) bool {
	return len(head) == 4 && head[0]&0xf0 == 0x50 && head[1] == 0x2a && head[2] == 0x4d && head[3] == 0x18
}

func (s *stream) close() { s.release() }

// fill reads and hashes the next chunk once the present one is used up.
func (s *stream) fill() error {
	if s.err != nil {
		return s.err
	}
	s.at, s.end = 0, 0
	for s.end < len(s.buf) && s.err == nil {
		var n int
		n, s.err = s.r.Read(s.buf[s.end:])
		s.end += n
	}
	s.sum.Write(s.buf[:s.end])
	s.total += int64(s.end)
	switch {
	case s.total > s.max:
		s.err = limit("more than %d bytes uncompressed", s.max)
	case s.total > ratioGrace && s.src.n > 0 && s.total/s.src.n > s.ratio:
		s.err = limit("uncompressed more than %d times the compressed size", s.ratio)
	case time.Now().After(s.deadline):
		s.err = limit("time")
	case errors.Is(s.err, zstd.ErrWindowSizeExceeded), errors.Is(s.err, zstd.ErrDecoderSizeExceeded):
		s.err = limit("memory: zstd window")
	}
	if s.end == 0 {
		return s.err
	}
	return nil
}

func (s *stream) Read(p []byte) (int, error) {
	if s.at == s.end {
		if err := s.fill(); err != nil {
			return 0, err
		}
	}
	n := copy(p, s.buf[s.at:s.end])
	s.at += n
	s.pos += int64(n)
	return n, nil
}

// Seek moves forward from where the stream is; nothing else is possible.
func (s *stream) Seek(offset int64, whence int) (int64, error) {
	if whence != io.SeekCurrent || offset < 0 {
		return -1, errors.New("only forward")
	}
	for offset > 0 {
		if s.at == s.end {
			err := s.fill()
			if err == io.EOF { //nolint:errorlint // as fill stores it
				err = io.ErrUnexpectedEOF
			}
			if err != nil {
				return s.pos, err
			}
		}
		n := min(offset, int64(s.end-s.at))
		s.at += int(n)
		s.pos += n
		offset -= n
	}
	return s.pos, nil
}

// drain reads to the end. A regular end is no error.
func (s *stream) drain() error {
	for {
		s.pos += int64(s.end - s.at)
		s.at = s.end
		err := s.fill()
		if err == io.EOF { //nolint:errorlint // as fill stores it
			return nil
		}
		if err != nil {
			return err
		}
	}
}
