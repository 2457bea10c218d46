package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/regclient/regclient/types/blob"
	"github.com/regclient/regclient/types/errs"
)

// What a download may do before it is given up.
const (
	idleTimeout = 30 * time.Second // longest wait for the next bytes
	rateGrace   = time.Minute      // of waiting, before the rate counts
	minRate     = 16 << 10         // bytes a second of waiting
	maxBreaks   = 20               // broken connections a download
	maxStuck    = 5                // of them one after the other without a byte between
)

// blobBody is the body of a blob's GET. It resumes where a connection broke
// (Range), and gives up when nothing comes for a while or too little over all.
// Only the time spent waiting for bytes counts, not what the caller does
// between reads.
type blobBody struct {
	t       *transport
	op      *op
	req     *http.Request
	release func()

	body   io.ReadCloser
	cancel atomic.Pointer[context.CancelFunc] // of the request in hand
	timer  *time.Timer

	start  int64 // where in the blob the first response began
	off    int64 // bytes delivered since start
	size   int64 // bytes to deliver; -1: unknown
	skip   int64 // bytes to drop, of a server that ignores Range
	breaks int
	stuck  int // breaks since the last byte
	waited time.Duration
	err    error // for the next Read
}

func newBlobBody(t *transport, o *op, req *http.Request, resp *http.Response, cancel context.CancelFunc, release func()) *blobBody {
	b := &blobBody{t: t, op: o, req: req, release: release, body: resp.Body, size: resp.ContentLength}
	b.start = rangeStart(resp)
	b.cancel.Store(&cancel)
	b.timer = time.AfterFunc(t.idle, b.stall)
	b.timer.Stop()
	return b
}

// stall ends the request in hand; the read that waits for it then fails.
func (b *blobBody) stall() { (*b.cancel.Load())() }

// rangeStart returns where a 206's content begins (RFC 9110, 14.4); 0 without.
func rangeStart(resp *http.Response) int64 {
	v, ok := strings.CutPrefix(resp.Header.Get("Content-Range"), "bytes ")
	first, _, ok2 := strings.Cut(v, "-")
	if !ok || !ok2 {
		return 0
	}
	n, err := strconv.ParseInt(first, 10, 64)
	if err != nil {
		return 0
	}
	return n
}

// Read reads on, over broken connections.
func (b *blobBody) Read(p []byte) (int, error) {
	if b.err != nil {
		return 0, b.err
	}
	for {
		n, err := b.readOnce(p)
		if n > 0 || err == nil {
			b.off += int64(n)
			b.stuck = 0
			b.err = b.next(err)
			return n, nil
		}
		if b.err = b.next(err); b.err != nil {
			return 0, b.err
		}
	}
}

// next decides what follows a read that returned err: nil to read on.
func (b *blobBody) next(err error) error {
	if b.waited > rateGrace && float64(b.start+b.off) < minRate*b.waited.Seconds() {
		return b.give(&Error{Kind: ErrUnavailable, Detail: fmt.Sprintf(
			"%d bytes in %s are too slow", b.off, b.waited.Round(time.Second))})
	}
	if err == nil {
		return nil
	}
	if errors.Is(err, io.EOF) && (b.size < 0 || b.off >= b.size) {
		return io.EOF
	}
	var e *Error
	if errors.As(err, &e) {
		return b.give(e)
	}
	if caller := b.req.Context().Err(); caller != nil {
		return caller
	}
	for {
		b.breaks++
		b.stuck++
		if b.breaks > maxBreaks || b.stuck > maxStuck {
			return b.give(&Error{Kind: ErrUnavailable, Detail: fmt.Sprintf(
				"the connection broke %d times, last: %s", b.breaks, netDetail(err))})
		}
		if !sleep(b.req.Context(), time.Duration(b.stuck-1)*20*time.Millisecond) {
			return b.req.Context().Err()
		}
		again, rerr := b.resume()
		if rerr == nil {
			return nil
		}
		if !again {
			return rerr
		}
		err = rerr
	}
}

// give ends the operation with e.
func (b *blobBody) give(e *Error) error {
	b.op.fail(e)
	return e
}

// readOnce reads from the connection in hand, with a deadline.
func (b *blobBody) readOnce(p []byte) (int, error) {
	began := time.Now()
	b.timer.Reset(b.t.idle)
	defer func() {
		b.timer.Stop()
		b.waited += time.Since(began)
	}()
	for b.skip > 0 {
		q := p
		if int64(len(q)) > b.skip {
			q = q[:b.skip]
		}
		n, err := b.body.Read(q)
		b.skip -= int64(n)
		if err != nil {
			return 0, err
		}
	}
	return b.body.Read(p)
}

// resume asks for the rest. again says that another try may help.
func (b *blobBody) resume() (again bool, err error) {
	_ = b.body.Close() // broken
	(*b.cancel.Load())()
	ctx, cancel := context.WithCancel(b.req.Context())
	b.cancel.Store(&cancel)
	req := b.req.Clone(ctx)
	b.skip = 0
	at := b.start + b.off
	if at > 0 {
		req.Header.Set("Range", fmt.Sprintf("bytes=%d-", at))
	}
	if err := b.t.await(req); err != nil {
		b.body = http.NoBody
		return false, b.t.failed(b.op, err)
	}
	resp, err := b.t.base.RoundTrip(req)
	if err != nil {
		b.t.unanswered(req, err)
		b.body = http.NoBody
		var e *Error
		return !errors.As(err, &e), err
	}
	b.t.learn(resp)
	b.body = resp.Body
	switch {
	case resp.StatusCode == http.StatusPartialContent && rangeStart(resp) == at:
		return false, nil
	case resp.StatusCode == http.StatusOK:
		b.skip = at
		return false, nil
	case resp.StatusCode == http.StatusUnauthorized || resp.StatusCode == http.StatusForbidden:
		// The token, or the signed URL of a redirect, has expired meanwhile:
		// regclient starts again at the registry, with a Range of its own.
		return false, io.ErrUnexpectedEOF
	case resp.StatusCode >= 500:
		return true, fmt.Errorf("HTTP %d", resp.StatusCode)
	}
	if err = b.t.answered(b.op, resp); err == nil {
		err = b.give(&Error{Kind: fromStatus(resp.StatusCode), Status: resp.StatusCode, Detail: "while resuming a download"})
	}
	return false, err
}

// Close ends the request.
func (b *blobBody) Close() error {
	b.timer.Stop()
	err := b.body.Close()
	(*b.cancel.Load())()
	b.release()
	return err
}

// blobReader maps the errors of regclient's reader, which verifies the digest.
type blobReader struct {
	r      blob.Reader
	what   string
	op     *op
	parent context.Context //nolint:containedctx // tells the caller's end from ours
	close  func()
}

func (b *blobReader) Read(p []byte) (int, error) {
	n, err := b.r.Read(p)
	if err == nil || err == io.EOF { //nolint:errorlint // a mismatch wraps io.EOF and must not pass for the end
		return n, err
	}
	return n, b.translate(err)
}

func (b *blobReader) translate(err error) error {
	if b.parent.Err() != nil {
		return fmt.Errorf("%s: %w", b.what, b.parent.Err())
	}
	if errors.Is(err, errs.ErrDigestMismatch) || errors.Is(err, errs.ErrSizeLimitExceeded) || errors.Is(err, errs.ErrShortRead) {
		return &Error{Kind: ErrDigestMismatch, What: b.what}
	}
	if e := b.op.failure(); e != nil {
		return translate(b.what, e)
	}
	var e *Error
	if !errors.As(err, &e) {
		err = &Error{Kind: ErrUnavailable, Detail: netDetail(err)}
	}
	return translate(b.what, err)
}

// Close ends the download.
func (b *blobReader) Close() error {
	err := b.r.Close()
	b.close()
	if err != nil && b.parent.Err() == nil && b.op.failure() == nil {
		return fmt.Errorf("close %s: %w", b.what, err)
	}
	return nil
}

// sleep waits, unless ctx ends first.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}
