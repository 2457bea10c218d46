package tracker

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"strings"
	"time"
	"unicode"
)

const (
	maxBody      = 16 << 20      // bytes of an answer
	maxErrorBody = 64 << 10      // bytes of an answer that is an error
	maxMessage   = 300           // characters of what a tracker says
	pause        = time.Minute   // where a tracker asks for one and does not say how long
	maxPause     = 2 * time.Hour // longest pause that is believed
	maxPages     = 100           // of a list
	pageSize     = 100           // entries, the most that both vendors allow
	idleTimeout  = 90 * time.Second
)

// Options say how a tracker is reached.
type Options struct {
	URL     string                 // of the API, or of the webhook
	Secret  func() (string, error) // credentials, read anew for each request
	Timeout time.Duration          // of one request, its answer included
	CAFile  string                 // PEM, beside the system's
	Now     func() time.Time       // nil: the present
}

// newHTTP returns a client that talks to the host of o.URL alone. authorize
// sets the credentials of a request.
func newHTTP(o Options, authorize func(h http.Header, secret string)) (*http.Client, *url.URL, error) {
	base, err := url.Parse(o.URL)
	if err != nil || base.Host == "" || base.Scheme != "https" && base.Scheme != "http" {
		return nil, nil, errors.New("the address is no http or https URL")
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	pool, err := x509.SystemCertPool()
	if err != nil {
		pool = x509.NewCertPool()
	}
	if o.CAFile != "" {
		pem, err := os.ReadFile(o.CAFile)
		if err != nil {
			return nil, nil, fmt.Errorf("read caFile: %w", err)
		}
		if !pool.AppendCertsFromPEM(pem) {
			return nil, nil, fmt.Errorf("caFile %s holds no PEM certificate", o.CAFile)
		}
	}
	t := &transport{
		base: &http.Transport{
			TLSClientConfig: &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: pool},
			IdleConnTimeout: idleTimeout, MaxIdleConnsPerHost: 2, ForceAttemptHTTP2: true,
		},
		own: base, secret: o.Secret, authorize: authorize, now: o.Now,
	}
	return &http.Client{Transport: t, CheckRedirect: t.redirect, Timeout: o.Timeout}, base, nil
}

// transport holds every request to our rules and turns every answer that is no
// success into an *Error.
type transport struct {
	base      http.RoundTripper
	own       *url.URL
	secret    func() (string, error)
	authorize func(h http.Header, secret string)
	now       func() time.Time
}

func (t *transport) ours(u *url.URL) bool {
	return u.Scheme == t.own.Scheme && strings.EqualFold(u.Host, t.own.Host)
}

// redirect follows to the same host only, and only where the method stays.
func (t *transport) redirect(req *http.Request, via []*http.Request) error {
	switch {
	case !t.ours(req.URL):
		return &Error{Kind: ErrForeign, Message: "redirected to " + req.URL.Host}
	case req.Method != via[0].Method:
		return &Error{Kind: ErrInvalid, Message: "the project has moved; configure its new name"}
	case len(via) >= 5:
		return &Error{Kind: ErrInvalid, Message: "too many redirects"}
	}
	return nil
}

// RoundTrip sends one request.
func (t *transport) RoundTrip(req *http.Request) (*http.Response, error) {
	if !t.ours(req.URL) {
		return nil, &Error{Kind: ErrForeign, Message: "not asked: " + req.URL.Host}
	}
	secret, err := t.secret()
	if err != nil {
		return nil, &Error{Kind: ErrDenied, Message: err.Error()}
	}
	req = req.Clone(req.Context())
	t.authorize(req.Header, secret)
	resp, err := t.base.RoundTrip(req)
	if err != nil {
		if req.Context().Err() != nil {
			return nil, req.Context().Err()
		}
		return nil, &Error{Kind: ErrUnavailable, Message: clean(err.Error())}
	}
	if resp.StatusCode < 400 {
		resp.Body = &limited{io.LimitReader(resp.Body, maxBody), resp.Body}
		return resp, nil
	}
	defer resp.Body.Close()
	said, err := io.ReadAll(io.LimitReader(resp.Body, maxErrorBody))
	if err != nil && req.Context().Err() != nil {
		return nil, req.Context().Err()
	}
	return nil, refused(resp, said, t.now())
}

type limited struct {
	io.Reader
	io.Closer
}

// refused classifies an answer that is no success. GitHub says 403 for missing
// rights and for rate limits alike ("Rate limits for the REST API").
func refused(resp *http.Response, said []byte, now time.Time) *Error {
	e := &Error{Status: resp.StatusCode, Message: message(said)}
	at, asked := retryAt(resp.Header, now)
	lower := strings.ToLower(e.Message)
	switch s := resp.StatusCode; {
	case s == http.StatusTooManyRequests,
		s == http.StatusForbidden && (asked || strings.Contains(lower, "rate limit")):
		e.Kind, e.RetryAt = ErrThrottled, at
	case s >= 500, s == http.StatusRequestTimeout:
		e.Kind = ErrUnavailable
		if asked {
			e.RetryAt = at
		}
	case s == http.StatusUnauthorized, s == http.StatusForbidden:
		e.Kind = ErrDenied
	case s == http.StatusNotFound:
		e.Kind = ErrNotFound
	case s == http.StatusGone:
		e.Kind = ErrGone
	default:
		e.Kind = ErrInvalid
	}
	return e
}

// retryAt reads when to come again, and says whether the answer asked for it.
// Both vendors send Retry-After; GitHub x-ratelimit-remaining and -reset (Unix
// seconds), GitLab RateLimit-Remaining and -Reset.
func retryAt(h http.Header, now time.Time) (time.Time, bool) {
	bounded := func(t time.Time) time.Time {
		switch {
		case t.Before(now.Add(time.Second)):
			return now.Add(time.Second)
		case t.After(now.Add(maxPause)):
			return now.Add(maxPause)
		}
		return t
	}
	if v := h.Get("Retry-After"); v != "" {
		if seconds, err := strconv.ParseInt(v, 10, 32); err == nil && seconds >= 0 {
			return bounded(now.Add(time.Duration(seconds) * time.Second)), true
		}
		if t, err := http.ParseTime(v); err == nil {
			return bounded(t), true
		}
	}
	for _, prefix := range []string{"X-RateLimit-", "RateLimit-"} {
		if h.Get(prefix+"Remaining") != "0" {
			continue
		}
		if seconds, err := strconv.ParseInt(h.Get(prefix+"Reset"), 10, 64); err == nil {
			return bounded(time.Unix(seconds, 0)), true
		}
	}
	return now.Add(pause), false
}

// message returns what an error's body says: "message" of both vendors'
// errors with the fields that GitHub names, or nothing.
func message(body []byte) string {
	var m struct {
		Message any `json:"message"`
		Error   any `json:"error"`
		Errors  []struct {
			Field string `json:"field"`
			Code  string `json:"code"`
		} `json:"errors"`
	}
	if json.Unmarshal(body, &m) != nil {
		return ""
	}
	if m.Message == nil {
		m.Message = m.Error
	}
	var s string
	switch v := m.Message.(type) {
	case nil:
		return ""
	case string:
		s = v
	default:
		b, err := json.Marshal(v)
		if err != nil {
			return ""
		}
		s = string(b)
	}
	for _, e := range m.Errors {
		s += " (" + e.Field + ": " + e.Code + ")"
	}
	return clean(s)
}

// clean bounds a foreign text and makes it one line.
func clean(s string) string {
	s = strings.Map(func(r rune) rune {
		if unicode.IsControl(r) {
			return ' '
		}
		return r
	}, s)
	if r := []rune(s); len(r) > maxMessage {
		s = string(r[:maxMessage]) + "…"
	}
	return s
}

// failure returns err as an *Error, or as the error of ctx where that ended.
// doing says what was tried.
func failure(ctx context.Context, doing string, err error) error {
	if err == nil {
		return nil
	}
	if ctx.Err() != nil {
		return fmt.Errorf("%s: %w", doing, ctx.Err())
	}
	var e *Error
	if !errors.As(err, &e) {
		// A time-out, or an answer that is not what it should be.
		e = &Error{Kind: ErrUnavailable, Message: clean(err.Error())}
	}
	return fmt.Errorf("%s: %w", doing, e)
}
