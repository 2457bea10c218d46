package registry

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"net"
	"net/url"
	"strings"
	"time"

	"github.com/regclient/regclient/types/errs"
)

// Errors. ErrThrottled and ErrUnavailable are worth another try later (see
// RetryAt); the others are facts about the repository.
var (
	ErrNotConfigured   = errors.New("registry is not configured")
	ErrForbiddenHost   = errors.New("connection is not allowed")
	ErrNotFound        = errors.New("not found in registry")
	ErrUnauthorized    = errors.New("registry refused the credentials")
	ErrDigestMismatch  = errors.New("content does not have its digest")
	ErrThrottled       = errors.New("registry asks to slow down")
	ErrUnavailable     = errors.New("registry is unavailable")
	ErrTooLarge        = errors.New("larger than allowed")
	ErrRefused         = errors.New("registry refused the request")
	ErrUnknownManifest = errors.New("not a manifest of a known kind")
	ErrInvalidName     = errors.New("not a valid name")
	ErrAmbiguous       = errors.New("more than one image")
	ErrReadOnly        = errors.New("an image on disk is only read")
)

// Error is what a registry, or the way to it, answered. errors.Is finds its
// Kind. Its text holds neither credentials nor signed URLs.
type Error struct {
	Kind   error         // one of the errors of this package
	What   string        // what was being done, to what
	Status int           // of HTTP; 0: no answer
	Detail string        // what else is known
	After  time.Duration // how long the registry asks to wait; 0: it does not say
	Held   bool          // nothing was asked: see Held
}

func (e *Error) Error() string {
	var b strings.Builder
	if e.What != "" {
		b.WriteString(e.What + ": ")
	}
	b.WriteString(e.Kind.Error())
	if e.Status != 0 {
		fmt.Fprintf(&b, " (HTTP %d)", e.Status)
	}
	if e.Detail != "" {
		b.WriteString(": " + e.Detail)
	}
	if e.After > 0 {
		fmt.Fprintf(&b, ", try again in %s", e.After.Round(time.Second))
	}
	return b.String()
}

// Unwrap returns the kind.
func (e *Error) Unwrap() error { return e.Kind }

// Held says whether err only means that it was nobody's turn: the budget of the
// registry is used up, or it is left alone for a while. That is no failed
// attempt. RetryAt says when to try again.
func Held(err error) bool {
	var e *Error
	return errors.As(err, &e) && e.Held
}

// errUnclear is an answer that makes no sense: no JSON, a header missing.
var errUnclear = fmt.Errorf("%w: its answer was not understood", ErrRefused)

// doubtful says whether err may be the way's doing and not the registry's: a
// broken proxy, a login page instead of an answer. It is a fact only when it
// happens again and again.
func doubtful(err error) bool {
	var e *Error
	if !errors.As(err, &e) {
		return false // we ourselves refused
	}
	for _, kind := range []error{ErrDigestMismatch, ErrTooLarge, ErrUnknownManifest, errUnclear} {
		if errors.Is(e, kind) {
			return true
		}
	}
	return false
}

// doubtTries is how often RetryAt has doubtful answers asked for, which with
// the pauses between takes seven seconds.
const doubtTries = 4

// Backoff of RetryAt.
const (
	minBackoff = time.Second
	maxBackoff = 10 * time.Minute
	maxAfter   = time.Hour // a longer Retry-After is not believed
)

// RetryAt says whether err is worth another try and when. attempt counts the
// tries made so far, from 1. Content that is not what it should be is asked for
// a few times, trouble for as long as the caller likes. Retry-After is obeyed (up to an hour), with a
// minimum that doubles with every attempt up to ten minutes, and up to a
// quarter more so that not everybody comes back at once. What is Held has no minimum.
func RetryAt(err error, attempt int) (time.Time, bool) {
	trouble := errors.Is(err, ErrThrottled) || errors.Is(err, ErrUnavailable)
	if !trouble && (!doubtful(err) || attempt >= doubtTries) {
		return time.Time{}, false
	}
	var e *Error
	if errors.As(err, &e) && e.Held {
		return heldUntil(e), true
	}
	wait := maxBackoff
	if attempt < 1 {
		attempt = 1
	}
	if attempt < 10 {
		wait = minBackoff << (attempt - 1)
	}
	if e != nil {
		wait = max(wait, min(e.After, maxAfter))
	}
	jitter := time.Duration(rand.Int64N(int64(wait)/4 + 1)) //nolint:gosec // jitter needs no secrecy
	return time.Now().Add(wait + jitter), true
}

// fromStatus returns the kind of a failed HTTP status.
func fromStatus(status int) error {
	switch {
	case status == 401 || status == 403:
		return ErrUnauthorized
	case status == 404:
		return ErrNotFound
	case status == 429:
		return ErrThrottled
	case status == 408 || status >= 500:
		return ErrUnavailable
	}
	return ErrRefused
}

// translate turns what regclient returned into an error of this package.
// Texts of regclient are not kept: they may hold signed URLs and bodies.
func translate(what string, err error) error {
	var e *Error
	if errors.As(err, &e) {
		c := *e
		c.What = what
		return &c
	}
	kind := ErrRefused
	detail := ""
	switch {
	// The mismatch also satisfies errors.Is(err, io.EOF), so it comes first.
	case errors.Is(err, errs.ErrDigestMismatch), errors.Is(err, errs.ErrShortRead):
		kind = ErrDigestMismatch
	case errors.Is(err, errs.ErrSizeLimitExceeded):
		kind = ErrTooLarge
	case errors.Is(err, errs.ErrHTTPRedirectRefused):
		kind, detail = ErrForbiddenHost, "redirect or token realm on a local address or without TLS"
	case errors.Is(err, errs.ErrHTTPUnauthorized), errors.Is(err, errs.ErrEmptyChallenge),
		errors.Is(err, errs.ErrInvalidChallenge), errors.Is(err, errs.ErrNoNewChallenge):
		kind, detail = ErrUnauthorized, "check username and password of this registry in the configuration, and what they may do"
	case errors.Is(err, errs.ErrNotFound), errors.Is(err, fs.ErrNotExist):
		kind = ErrNotFound
	case errors.Is(err, errs.ErrHTTPRateLimit):
		kind = ErrThrottled
	case errors.Is(err, errs.ErrUnsupportedMediaType):
		kind = ErrUnknownManifest
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, context.Canceled), errors.Is(err, errs.ErrCanceled):
		kind, detail = ErrUnavailable, "no answer in time"
	case errors.Is(err, errs.ErrHTTPStatus):
	case errors.Is(err, errs.ErrRetryLimitExceeded), errors.Is(err, errs.ErrBackoffLimit), errors.Is(err, errs.ErrAllRequestsFailed):
		kind = ErrUnavailable
	default:
		kind = errUnclear
	}
	return &Error{Kind: kind, What: what, Detail: detail}
}

// netDetail says what went wrong on the network, without the URL.
func netDetail(err error) string {
	var u *url.Error
	if errors.As(err, &u) {
		err = u.Err
	}
	var ne net.Error
	if errors.As(err, &ne) && ne.Timeout() {
		return "no answer in time"
	}
	if errors.Is(err, context.Canceled) {
		return "no answer in time"
	}
	return err.Error()
}
