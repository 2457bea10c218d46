package worker

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// A frame is one byte of type, four bytes of length (big endian) and that many
// bytes. Parent to child: job, data…, then end or abort. Child to parent:
// ready once at the start, then one report or failure a job.
const (
	frameJob     = 'J' // layer.Options, JSON
	frameData    = 'D' // a piece of the compressed layer
	frameEnd     = 'E' // the layer is complete
	frameAbort   = 'X' // the layer could not be read: forget it
	frameReady   = 'Y'
	frameReport  = 'R' // result, JSON
	frameFailure = 'F' // text: the child itself failed
)

const (
	// pieceSize is how much of a layer goes into one frame.
	pieceSize = 256 << 10
	// maxPiece bounds a frame to the child.
	maxPiece = 1 << 20
	// maxResult bounds a frame from the child: a report of the largest layer.
	maxResult = 256 << 20
	headSize  = 5
)

var errFrame = errors.New("malformed frame")

// putHead writes the head of a frame into b.
func putHead(b []byte, kind byte, size int) {
	b[0] = kind
	binary.BigEndian.PutUint32(b[1:headSize], uint32(size)) //nolint:gosec // sizes are bounded by maxResult
}

// writeFrame writes a frame in one piece.
func writeFrame(w io.Writer, kind byte, payload []byte) error {
	b := make([]byte, headSize+len(payload))
	putHead(b, kind, len(payload))
	copy(b[headSize:], payload)
	_, err := w.Write(b)
	return err
}

// readHead reads the head of the next frame. A stream that ends between frames
// is io.EOF; a frame larger than limit is errFrame.
func readHead(r io.Reader, limit int) (kind byte, size int, err error) {
	var head [headSize]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return 0, 0, err
	}
	n := binary.BigEndian.Uint32(head[1:])
	if int64(n) > int64(limit) {
		return 0, 0, fmt.Errorf("%w: %d bytes", errFrame, n)
	}
	return head[0], int(n), nil
}

// readFrame reads a whole frame, growing with what really arrives.
func readFrame(r io.Reader, limit int) (kind byte, payload []byte, err error) {
	kind, size, err := readHead(r, limit)
	if err != nil {
		return 0, nil, err
	}
	payload, err = io.ReadAll(io.LimitReader(r, int64(size)))
	if err != nil {
		return 0, nil, err
	}
	if len(payload) < size {
		return 0, nil, io.ErrUnexpectedEOF
	}
	return kind, payload, nil
}

var errAborted = errors.New("layer was given up")

// layerReader reads the layer out of data frames, up to the end or abort frame.
type layerReader struct {
	r    io.Reader
	left int   // of the present data frame
	err  error // io.EOF, errAborted, or what broke the pipe
}

func (l *layerReader) Read(p []byte) (int, error) {
	for l.left == 0 {
		if l.err != nil {
			return 0, l.err
		}
		kind, size, err := readHead(l.r, maxPiece)
		switch {
		case err != nil:
			l.err = fmt.Errorf("read frame: %w", noEOF(err))
		case kind == frameData:
			l.left = size
		case kind == frameEnd && size == 0:
			l.err = io.EOF
		case kind == frameAbort && size == 0:
			l.err = errAborted
		default:
			l.err = fmt.Errorf("%w: type %q within a layer", errFrame, kind)
		}
	}
	n, err := l.r.Read(p[:min(len(p), l.left)])
	l.left -= n
	if err != nil {
		l.err, l.left = fmt.Errorf("read frame: %w", noEOF(err)), 0
		return n, l.err
	}
	return n, nil
}

// noEOF makes the end of the pipe an error: only frameEnd ends a layer.
func noEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}
