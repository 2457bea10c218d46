// Package layer finds what one image layer holds, in one pass over its bytes.
//
// Bytes flow through gzip or zstd, sha256 (the diffID) and a tar walk. A file
// that an extractor wants is kept just as long as the extractor needs it: in a
// buffer, or in one unlinked temporary file where it is large. Everything else
// is skipped without being copied.
//
// The walk follows image-spec, layer.md: whiteouts, opaque directories, and the
// last of several entries of one name.
package layer

import (
	"archive/tar"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/tidewaiter/tidewaiter/contracts"
)

// Version is the version of the analysis. It is raised whenever the same layer
// would give another report, so that layers are analysed again.
const Version = "1"

// Limits of an analysis. Hitting one is a gap in the report, never an error.
const (
	// DefaultMaxBytes bounds the uncompressed size of a layer.
	DefaultMaxBytes = 64 << 30
	// DefaultMaxRatio bounds uncompressed ÷ compressed size, beyond the first
	// ratioGrace bytes. Real layers stay below 20.
	DefaultMaxRatio = 200
	// DefaultMaxEntries bounds the entries of the tar archive.
	DefaultMaxEntries = 1_000_000
	// DefaultMaxDepth bounds archives within archives.
	DefaultMaxDepth = 8
	// DefaultTimeout bounds the time for one layer.
	DefaultTimeout = 10 * time.Minute
	// DefaultMaxFile bounds a file that is kept for an extractor.
	DefaultMaxFile = 1 << 30
	// DefaultMaxMemory bounds the buffer for kept files, above which they go to
	// the temporary file; the process needs about 100 MiB more.
	DefaultMaxMemory = 48 << 20
	// DefaultMaxNested bounds the bytes that the archives within one archive
	// unpack to, all levels together.
	DefaultMaxNested = 1 << 30
)

// ratioGrace is how much may come out of any layer before the ratio counts:
// small layers of zeros do no harm.
const ratioGrace = 64 << 20

// maxGaps bounds the gaps of a report that name a path; the rest are counted.
const maxGaps = 200

// ErrDigest is returned when the compressed bytes do not have Options.Digest.
var ErrDigest = errors.New("layer does not have its digest")

// Options say how a layer is analysed. Zero limits mean the defaults.
type Options struct {
	Digest     string        `json:"digest"`           // of the compressed bytes; written into the report
	Verify     bool          `json:"verify,omitempty"` // compute the digest and compare; not needed where the reader does
	MaxBytes   int64         `json:"maxBytes,omitempty"`
	MaxRatio   int64         `json:"maxRatio,omitempty"`
	MaxEntries int           `json:"maxEntries,omitempty"`
	MaxDepth   int           `json:"maxDepth,omitempty"`
	Timeout    time.Duration `json:"timeout,omitempty"`
	MaxFile    int64         `json:"maxFile,omitempty"`
	MaxMemory  int64         `json:"maxMemory,omitempty"`
	MaxNested  int64         `json:"maxNested,omitempty"`
	TempDir    string        `json:"-"` // where large files are spilled; default os.TempDir()
}

func (o Options) withDefaults() Options {
	o.MaxBytes = orDefault(o.MaxBytes, DefaultMaxBytes)
	o.MaxRatio = orDefault(o.MaxRatio, DefaultMaxRatio)
	o.MaxEntries = orDefault(o.MaxEntries, DefaultMaxEntries)
	o.MaxDepth = orDefault(o.MaxDepth, DefaultMaxDepth)
	o.Timeout = orDefault(o.Timeout, DefaultTimeout)
	o.MaxFile = orDefault(o.MaxFile, DefaultMaxFile)
	o.MaxMemory = orDefault(o.MaxMemory, DefaultMaxMemory)
	o.MaxNested = orDefault(o.MaxNested, DefaultMaxNested)
	return o
}

func orDefault[T int | int64 | time.Duration](v, def T) T {
	if v <= 0 {
		return def
	}
	return v
}

// Analyze reads the layer r (gzip, zstd or plain tar, whatever its media type
// says) to its end and reports what it holds. What is wrong with the layer
// itself, and any limit it hits, are gaps in the report. Errors are only those
// of r, of ctx, of the temporary file, and ErrDigest.
//
// The same bytes give the same report.
func Analyze(ctx context.Context, r io.Reader, o Options) (*contracts.LayerReport, error) {
	o = o.withDefaults()
	quietExtractors()
	src := &source{ctx: ctx, r: r}
	if o.Verify {
		src.sum = sha256.New()
	}
	deadline := time.Now().Add(o.Timeout)
	a := &analysis{
		o: o,
		report: &contracts.LayerReport{
			Analyzer: Version,
			Digest:   o.Digest,
		},
		deadline: deadline,
		files:    map[string]*facts{},
		replaced: map[string]struct{}{},
		evidence: map[string]struct{}{},
		symlinks: map[string]string{},
		white:    map[string]struct{}{},
		opaque:   map[string]struct{}{},
		body:     &body{maxMemory: o.MaxMemory, dir: o.TempDir},
	}
	defer func() {
		for _, b := range append(a.nested, a.body) {
			b.close()
		}
	}()
	var err error
	if a.extractors, err = newExtractors(o); err != nil {
		return nil, err
	}

	// Extractors get the deadline through their context.
	ectx, cancel := context.WithDeadline(ctx, deadline)
	defer cancel()
	a.ctx = ectx

	if err := a.read(src); err != nil {
		return nil, err
	}
	if err := src.drain(); err != nil {
		return nil, fmt.Errorf("read layer: %w", err)
	}
	if o.Verify {
		if got := "sha256:" + hex.EncodeToString(src.sum.Sum(nil)); o.Digest != "" && got != o.Digest {
			return nil, fmt.Errorf("%w: got %s, want %s", ErrDigest, got, o.Digest)
		}
	}
	a.finish()
	return a.report, nil
}

// read walks the layer and sets the diffID if it could be read to its end.
// Only errors that are not the layer's own are returned.
func (a *analysis) read(src *source) error {
	s, err := newStream(src, a.o, a.deadline)
	if err != nil {
		if src.failed != nil {
			return fmt.Errorf("read layer: %w", src.failed)
		}
		a.gap("", reasonOf(err))
		return nil
	}
	defer s.close()
	a.stream = s

	err = a.walk(tar.NewReader(s))
	if err == nil || s.err == nil {
		// The archive ended, or cannot be followed further: the rest still
		// counts for the diffID.
		if derr := s.drain(); derr != nil && err == nil {
			err = derr
		}
	}
	switch {
	case src.failed != nil:
		return fmt.Errorf("read layer: %w", src.failed)
	case errors.Is(err, errTemp):
		return err
	case err != nil:
		a.gap("", reasonOf(err))
	}
	if s.err != nil && s.err != io.EOF && (err == nil || !errors.Is(err, s.err)) { //nolint:errorlint // EOF is stored as it is
		a.gap("", reasonOf(s.err))
	}
	a.report.Bytes = s.total
	if s.err == io.EOF { //nolint:errorlint // EOF is stored as it is
		a.report.DiffID = "sha256:" + hex.EncodeToString(s.sum.Sum(nil))
	}
	return nil
}

// limitError is a limit that was hit.
type limitError struct{ what string }

func (e *limitError) Error() string { return "limit: " + e.what }

func limit(format string, args ...any) error { return &limitError{fmt.Sprintf(format, args...)} }

// reasonOf turns an error of the layer itself into the reason of a gap.
func reasonOf(err error) string {
	var l *limitError
	if errors.As(err, &l) {
		return l.Error()
	}
	if errors.Is(err, context.DeadlineExceeded) || errors.Is(err, os.ErrDeadlineExceeded) {
		return "limit: time"
	}
	if errors.Is(err, io.ErrUnexpectedEOF) {
		return "corrupt: truncated"
	}
	return "corrupt: " + clip(err.Error())
}

// clip keeps a text that may hold what an attacker wrote short and printable.
func clip(s string) string {
	const most = 200
	out := make([]rune, 0, len(s))
	for _, r := range s {
		if r < ' ' || r == 0x7f || r == 0xfffd {
			r = '?'
		}
		if len(out) == most {
			out = append(out, '…')
			break
		}
		out = append(out, r)
	}
	return string(out)
}
