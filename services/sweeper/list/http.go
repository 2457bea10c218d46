package list

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/tidewaiter/tidewaiter/libs/registry"
)

const (
	requestTimeout = 60 * time.Second
	// maxAnswer bounds an answer, in bytes: a page of a hundred entries of a
	// vendor that says a lot of each.
	maxAnswer = 16 << 20
	// maxRefusal bounds what is read of a refusal, in bytes.
	maxRefusal = 4 << 10
	// limitPause is how long GitHub wants to be left alone where a limit is reached
	// of which its headers do not tell ("Exceeding the rate limit": secondary).
	limitPause = time.Minute
	// rateReset is the header with the Unix time at which GitHub's, GitLab's and
	// Docker Hub's limits end.
	rateReset = "X-Ratelimit-Reset"
)

// client makes the requests of one API.
type client struct {
	base *url.URL
	http *http.Client
	wait func(ctx context.Context) error
	now  func() time.Time
	// limit is what the body of a 403 holds that means a limit; empty: none does.
	limit string
	// authorize sets the credentials of a request; nil: there are none.
	authorize func(ctx context.Context, h http.Header) error
}

// newClient returns a client of the API at o.URL or, where that is empty, at vendor.
func newClient(o Options, vendor string) (*client, error) {
	u, err := base(o.URL, vendor)
	if err != nil {
		return nil, err
	}
	transport := &http.Transport{
		Proxy:                 http.ProxyFromEnvironment,
		DialContext:           (&net.Dialer{Timeout: 10 * time.Second}).DialContext,
		TLSHandshakeTimeout:   10 * time.Second,
		ResponseHeaderTimeout: 30 * time.Second,
		MaxIdleConnsPerHost:   2,
		IdleConnTimeout:       90 * time.Second,
		ForceAttemptHTTP2:     true,
	}
	if o.CAFile != "" {
		if transport.TLSClientConfig, err = trusting(o.CAFile); err != nil {
			return nil, err
		}
	}
	return &client{
		base: u, wait: o.Wait, now: o.Now,
		http: &http.Client{
			Timeout: requestTimeout, Transport: transport,
			// Credentials go to the API that was configured and nowhere else.
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		},
	}, nil
}

// trusting also trusts the authorities in a PEM file.
func trusting(caFile string) (*tls.Config, error) {
	pool, err := x509.SystemCertPool()
	if err != nil {
		pool = x509.NewCertPool()
	}
	pem, err := os.ReadFile(caFile) //nolint:gosec // a file that the configuration names
	if err != nil {
		return nil, fmt.Errorf("read caFile: %w: %w", err, ErrConfig)
	}
	if !pool.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("caFile %s holds no PEM certificate: %w", caFile, ErrConfig)
	}
	return &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: pool}, nil
}

// base reads the address of an API: https, or http on this machine.
func base(configured, vendor string) (*url.URL, error) {
	if configured == "" {
		configured = vendor
	}
	u, err := url.Parse(strings.TrimSuffix(configured, "/"))
	if err != nil || u.Host == "" || u.RawQuery != "" || u.Fragment != "" {
		return nil, fmt.Errorf("url is not the https:// address of an API: %w", ErrConfig)
	}
	ip := net.ParseIP(u.Hostname())
	local := u.Hostname() == "localhost" || ip != nil && ip.IsLoopback()
	switch {
	case u.User != nil:
		return nil, fmt.Errorf("url holds credentials; they belong in secretFile or secretEnv: %w", ErrConfig)
	case u.Scheme != "https" && (u.Scheme != "http" || !local):
		return nil, fmt.Errorf("url must begin with https://: %w", ErrConfig)
	}
	return u, nil
}

// get fetches one document below the API's address. path is escaped already.
func (c *client) get(ctx context.Context, what, path string, query url.Values, into any) (http.Header, error) {
	return c.do(ctx, what, http.MethodGet, path, query, nil, into, true)
}

func (c *client) do(ctx context.Context, what, method, path string, query url.Values, body io.Reader, into any, authorized bool) (http.Header, error) {
	if err := c.wait(ctx); err != nil {
		return nil, err
	}
	address := c.base.String() + path
	if len(query) > 0 {
		address += "?" + query.Encode()
	}
	req, err := http.NewRequestWithContext(ctx, method, address, body)
	if err != nil {
		return nil, fmt.Errorf("%s: make request: %w", what, err)
	}
	req.Header.Set("Accept", "application/json")
	req.Header.Set("User-Agent", "tidewaiter")
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	if authorized && c.authorize != nil {
		if err := c.authorize(ctx, req.Header); err != nil {
			return nil, err
		}
	}
	resp, err := c.http.Do(req)
	if err != nil {
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		return nil, &registry.Error{Kind: registry.ErrUnavailable, What: what, Detail: cause(err)}
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, c.failed(what, resp)
	}
	content, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer+1))
	if err != nil {
		return nil, &registry.Error{Kind: registry.ErrUnavailable, What: what, Detail: "its answer broke off: " + cause(err)}
	}
	if len(content) > maxAnswer {
		return nil, &registry.Error{Kind: registry.ErrTooLarge, What: what}
	}
	if err := json.Unmarshal(content, into); err != nil {
		return nil, refused(what, "its answer is not the JSON that is documented")
	}
	return resp.Header, nil
}

// failed makes an error of an answer without success. The body is not kept: it
// is free text of a stranger.
func (c *client) failed(what string, resp *http.Response) error {
	e := &registry.Error{What: what, Status: resp.StatusCode, After: c.after(resp.Header)}
	spent := resp.Header.Get("X-Ratelimit-Remaining") == "0"
	if e.After == 0 && (spent || resp.StatusCode == http.StatusTooManyRequests) {
		e.After = c.reset(resp.Header)
	}
	switch s := resp.StatusCode; {
	case s == http.StatusTooManyRequests,
		// GitHub says 403 where a limit is reached ("Exceeding the rate limit").
		s == http.StatusForbidden && (spent || resp.Header.Get("Retry-After") != ""):
		e.Kind = registry.ErrThrottled
	case s == http.StatusForbidden && c.limited(resp.Body):
		e.Kind, e.After = registry.ErrThrottled, limitPause
	case s == http.StatusUnauthorized, s == http.StatusForbidden:
		e.Kind, e.Detail = registry.ErrUnauthorized, "check the sweep's credentials and what they may list"
	case s == http.StatusNotFound:
		e.Kind = registry.ErrNotFound
	case s == http.StatusRequestTimeout, s >= 500:
		e.Kind = registry.ErrUnavailable
	default:
		e.Kind = registry.ErrRefused
	}
	return e
}

// after says how long the API asks to be left alone.
func (c *client) after(h http.Header) time.Duration {
	if v := h.Get("Retry-After"); v != "" {
		if s, err := strconv.ParseInt(v, 10, 32); err == nil {
			return time.Duration(max(s, 0)) * time.Second
		}
		if at, err := http.ParseTime(v); err == nil {
			return max(at.Sub(c.now()), 0)
		}
	}
	return 0
}

// reset says how long it is until a limit that is reached begins anew.
func (c *client) reset(h http.Header) time.Duration {
	if s, err := strconv.ParseInt(h.Get(rateReset), 10, 64); err == nil {
		return max(time.Unix(s, 0).Sub(c.now()), 0)
	}
	return 0
}

// limited says whether the body of a 403 speaks of a limit.
func (c *client) limited(body io.Reader) bool {
	if c.limit == "" {
		return false
	}
	text, err := io.ReadAll(io.LimitReader(body, maxRefusal))
	return err == nil && bytes.Contains(bytes.ToLower(text), []byte(c.limit))
}

// cause says what went wrong on the network, without the address.
func cause(err error) string {
	var u *url.Error
	if errors.As(err, &u) {
		err = u.Err
	}
	var n net.Error
	if errors.As(err, &n) && n.Timeout() {
		return "no answer in time"
	}
	return err.Error()
}

// bearer authorizes with the secret as a token.
func bearer(secret func() (string, error)) func(context.Context, http.Header) error {
	if secret == nil {
		return nil
	}
	return func(_ context.Context, h http.Header) error {
		token, err := secret()
		if err != nil {
			return err
		}
		h.Set("Authorization", "Bearer "+token)
		return nil
	}
}

// pages is the position in a listing of numbered pages below several places:
// "<place>:<page>".
type pages struct{ place, page int }

func parsePages(next string, places int) (pages, error) {
	if next == "" {
		return pages{0, 1}, nil
	}
	place, page, ok := strings.Cut(next, ":")
	p := pages{}
	var err1, err2 error
	p.place, err1 = strconv.Atoi(place)
	p.page, err2 = strconv.Atoi(page)
	if !ok || err1 != nil || err2 != nil || p.place < 0 || p.place >= places || p.page < 1 {
		return p, fmt.Errorf("the listing's position %q is none: %w", next, ErrConfig)
	}
	return p, nil
}

// following returns where to go on after this page: more says whether the place has another.
func (p pages) following(more bool, places int) string {
	switch {
	case more:
		return fmt.Sprintf("%d:%d", p.place, p.page+1)
	case p.place+1 < places:
		return fmt.Sprintf("%d:1", p.place+1)
	}
	return ""
}
