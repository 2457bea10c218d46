package registry

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"net"
	"net/http"
	"net/netip"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/tidewaiter/tidewaiter/libs/credential"
)

// Deadlines and limits of connections.
const (
	dialTimeout      = 10 * time.Second
	headerTimeout    = 30 * time.Second // from request to response headers
	smallTimeout     = 60 * time.Second // for a whole small request
	tokenTimeout     = 20 * time.Second // for a token realm
	maxErrorBody     = 64 << 10
	maxTokenBody     = 1 << 20
	maxListBody      = MaxManifestBytes + 1 // one more than is allowed, so that too much is seen
	transportReadBuf = 64 << 10             // bytes a read from the socket; small reads of callers are served from it
)

// opKind says what an operation reads or writes.
type opKind int

const (
	opSmall  opKind = iota // manifests, HEAD, lists
	opBlob                 // body of any length, resumed
	opUpload               // blob upload
	opList                 // one page of a list
)

// op is one operation through regclient. The transport finds it in the context
// of its requests, tells it what regclient does not pass on, and ends it when
// another try is for us to decide and not for regclient.
type op struct {
	kind   opKind
	size   int64  // expected size of a blob; 0: unknown
	query  string // of the page of a list; empty: the first
	digest string // expected digest of a small body; "": unknown
	cancel context.CancelFunc

	mu           sync.Mutex
	err          *Error
	status       int       // of the last response
	put          int       // the same, to a PUT
	link         []string  // of a list: the Link headers
	referrersAPI bool      // the referrers API answered
	subjectAck   bool      // the registry said that it keeps referrers itself (OCI-Subject)
	sum          hash.Hash // of the last body, where a digest is expected
}

type opKey struct{}

func opFrom(ctx context.Context) *op {
	o, _ := ctx.Value(opKey{}).(*op)
	return o
}

// fail ends the operation with e.
func (o *op) fail(e *Error) {
	if o == nil {
		return
	}
	o.mu.Lock()
	if o.err == nil {
		o.err = e
	}
	o.mu.Unlock()
	o.cancel()
}

// failure returns what ended the operation.
func (o *op) failure() *Error {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.err
}

// succeeded says whether the last response was a success.
func (o *op) succeeded() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.status >= 200 && o.status < 300
}

// uploaded returns the status of the last answer to content, 0 without any.
func (o *op) uploaded() int {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.put
}

// read sums up a body whose digest is expected.
func (o *op) read(p []byte) {
	if o == nil {
		return
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.sum != nil {
		_, _ = o.sum.Write(p) // never fails
	}
}

// swapped says whether the body that was read has another digest than expected.
func (o *op) swapped() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.sum != nil && "sha256:"+hex.EncodeToString(o.sum.Sum(nil)) != o.digest
}

// answeredReferrers says whether the referrers API answered.
func (o *op) answeredReferrers() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.referrersAPI
}

// newBase returns the transport that dials for one host by our rules.
func newBase(cfg Host, authority string) (*http.Transport, error) {
	d := newDialer(cfg, authority)
	if _, err := d.certificates(true); err != nil {
		return nil, err
	}
	return &http.Transport{
		DialContext:           d.dial,
		DialTLSContext:        d.dialTLS,
		ResponseHeaderTimeout: headerTimeout,
		MaxIdleConnsPerHost:   cfg.Concurrency,
		IdleConnTimeout:       90 * time.Second,
		DisableCompression:    true, // bytes must be those that the digest names
		ReadBufferSize:        transportReadBuf,
	}, nil
}

// dialer connects to the configured host wherever that is, and to others
// (token realms, redirects) only at public addresses unless configured.
type dialer struct {
	own          string // host:port of the configured host
	address      string // where it is
	allowPrivate bool
	dialer       net.Dialer
	files        func() (*tls.Config, error)
}

func newDialer(cfg Host, authority string) *dialer {
	d := &dialer{
		allowPrivate: cfg.AllowPrivate, dialer: net.Dialer{Timeout: dialTimeout, KeepAlive: 30 * time.Second},
		files: credential.TLS{CAFile: cfg.CAFile, CertFile: cfg.CertFile, KeyFile: cfg.KeyFile, BesideSystem: true}.Source(),
	}
	d.own = withPort(authority, cfg.PlainHTTP)
	d.address = d.own
	if cfg.Address != "" {
		d.address = withPort(cfg.Address, cfg.PlainHTTP)
	}
	return d
}

// withPort appends the scheme's port where host has none.
func withPort(host string, plain bool) string {
	if _, _, err := net.SplitHostPort(host); err == nil {
		return host
	}
	port := "443"
	if plain {
		port = "80"
	}
	return net.JoinHostPort(strings.Trim(host, "[]"), port)
}

func (d *dialer) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	if strings.EqualFold(addr, d.own) {
		return d.dialer.DialContext(ctx, network, d.address)
	}
	name, port, err := net.SplitHostPort(addr)
	if err != nil {
		return nil, fmt.Errorf("address %q: %w", addr, err)
	}
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	ips, err := net.DefaultResolver.LookupNetIP(ctx, "ip", name)
	if err != nil {
		return nil, fmt.Errorf("look up %s: %w", name, err)
	}
	// The address that was checked is the one that is dialled, so that a name
	// cannot point elsewhere in between.
	var last error
	for _, ip := range ips {
		if !d.allowPrivate && !public(ip) {
			return nil, &Error{Kind: ErrForbiddenHost, Detail: fmt.Sprintf(
				"registry %s leads to %s, which is the private address %s; set allowPrivate on this registry if that is right", d.own, name, ip)}
		}
		conn, err := d.dialer.DialContext(ctx, network, net.JoinHostPort(ip.String(), port))
		if err == nil {
			return conn, nil
		}
		last = err
	}
	if last == nil {
		last = fmt.Errorf("%s has no address", name)
	}
	return nil, last
}

// dialTLS is dial with TLS on top. The certificate is for the registry alone:
// token realms and redirects are not shown it.
func (d *dialer) dialTLS(ctx context.Context, network, addr string) (net.Conn, error) {
	config, err := d.certificates(strings.EqualFold(addr, d.own))
	if err != nil {
		return nil, err
	}
	raw, err := d.dial(ctx, network, addr)
	if err != nil {
		return nil, err
	}
	conn, err := credential.Handshake(ctx, raw, config, addr)
	if err != nil {
		return nil, err
	}
	return conn, nil
}

func (d *dialer) certificates(own bool) (*tls.Config, error) {
	config, err := d.files()
	if err != nil {
		return nil, err
	}
	if !own {
		config.Certificates = nil
	}
	return config, nil
}

// special are address blocks that are not reachable on the Internet (IANA
// special-purpose registries) beyond those that netip knows.
var special = []netip.Prefix{
	netip.MustParsePrefix("0.0.0.0/8"),
	netip.MustParsePrefix("100.64.0.0/10"),
	netip.MustParsePrefix("192.0.0.0/24"),
	netip.MustParsePrefix("198.18.0.0/15"),
	netip.MustParsePrefix("240.0.0.0/4"),
	netip.MustParsePrefix("fec0::/10"),
}

var (
	nat64  = netip.MustParsePrefix("64:ff9b::/96")
	sixTo4 = netip.MustParsePrefix("2002::/16")
)

// public says whether an address is one of the open Internet.
func public(ip netip.Addr) bool {
	ip = ip.Unmap()
	if ip.Is6() {
		b := ip.As16()
		if nat64.Contains(ip) {
			return public(netip.AddrFrom4([4]byte(b[12:16])))
		}
		if sixTo4.Contains(ip) {
			return public(netip.AddrFrom4([4]byte(b[2:6])))
		}
	}
	if ip.IsLoopback() || ip.IsPrivate() || ip.IsLinkLocalUnicast() || ip.IsMulticast() || ip.IsUnspecified() {
		return false
	}
	for _, p := range special {
		if p.Contains(ip) {
			return false
		}
	}
	return true
}

// transport applies our rules to every request of one host's client: those to
// the registry, to its token realm, and to where it redirects.
type transport struct {
	base      http.RoundTripper
	authority string
	cfg       Host
	reads     chan struct{} // slots; uploads have their own, as they may wait for a read
	writes    chan struct{}
	pace      *pacer
	idle      time.Duration // longest wait for bytes of a body
}

func (t *transport) own(host string) bool { return strings.EqualFold(host, t.authority) }

// RoundTrip sends one request.
func (t *transport) RoundTrip(req *http.Request) (*http.Response, error) {
	o := opFrom(req.Context())
	req, err := t.rules(req)
	if err != nil {
		return nil, t.failed(o, err)
	}
	if o == nil {
		return t.token(req)
	}
	req = o.continued(req)

	if err := t.await(req); err != nil {
		return nil, t.failed(o, err)
	}
	release, err := t.acquire(req)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(req.Context())
	done := func() { cancel(); release() }
	resp, err := t.base.RoundTrip(req.WithContext(ctx))
	if err != nil {
		done()
		t.unanswered(req, err)
		return nil, t.failed(o, err)
	}
	o.note(req, resp)
	o.keepLink(req, resp)
	t.learn(resp)
	if resp.StatusCode < 200 || resp.StatusCode > 299 {
		defer done()
		if err := t.answered(o, resp); err != nil {
			return nil, err
		}
		return resp, nil
	}
	if req.Method == http.MethodHead || resp.Body == http.NoBody {
		done()
		return resp, nil
	}
	if o.kind != opBlob || req.Method != http.MethodGet {
		resp.Body = &limitedBody{t: t, op: o, body: resp.Body, left: maxListBody, done: done}
		return resp, nil
	}
	if o.size > 0 && resp.StatusCode == http.StatusOK && resp.ContentLength >= 0 && resp.ContentLength != o.size {
		_ = resp.Body.Close() // nothing of it was used
		done()
		e := &Error{Kind: ErrDigestMismatch, Detail: fmt.Sprintf("%d bytes instead of the %d that its manifest names", resp.ContentLength, o.size)}
		o.fail(e)
		return nil, e
	}
	resp.Body = newBlobBody(t, o, req, resp, cancel, release)
	return resp, nil
}

// await waits for the turn of a request to the registry; where it redirects to
// has no budget.
func (t *transport) await(req *http.Request) error {
	if !t.own(req.URL.Host) {
		return nil
	}
	return t.pace.await(req)
}

// learn has the pacer read an answer of the registry.
func (t *transport) learn(resp *http.Response) {
	if resp.Request == nil || !t.own(resp.Request.URL.Host) {
		return
	}
	t.pace.answered(resp.Request, resp)
	if resp.StatusCode >= 500 {
		t.pace.troubled()
	}
}

// unanswered counts a request that the registry did not answer. What our own
// rules or the caller ended is none.
func (t *transport) unanswered(req *http.Request, err error) {
	var own *Error
	if t.own(req.URL.Host) && req.Context().Err() == nil && !errors.As(err, &own) {
		t.pace.troubled()
	}
}

// rules returns the request as it may be sent: TLS unless plain HTTP is
// configured, and no Authorization across hosts.
func (t *transport) rules(req *http.Request) (*http.Request, error) {
	if req.URL.Scheme != "https" && (req.URL.Scheme != "http" || !t.cfg.PlainHTTP) {
		return nil, &Error{Kind: ErrForbiddenHost, Detail: fmt.Sprintf(
			"registry %s leads to %s without TLS", t.authority, req.URL.Host)}
	}
	auth := req.Header.Get("Authorization")
	if auth == "" || t.own(req.URL.Host) {
		return req, nil
	}
	// Only the token realm of the challenge is given credentials (basic); a
	// redirect is given none, and a token is for the registry alone.
	if req.Response != nil || !strings.HasPrefix(auth, "Basic ") {
		req = req.Clone(req.Context())
		req.Header.Del("Authorization")
	}
	return req, nil
}

// redirect is the CheckRedirect of the client: what carries credentials in its
// body does not follow to another host.
func (t *transport) redirect(req *http.Request, via []*http.Request) error {
	if len(via) >= 5 {
		return &Error{Kind: ErrUnavailable, Detail: "more than 5 redirects"}
	}
	if first := via[0]; first.Body != nil && first.URL.Host != req.URL.Host {
		return &Error{Kind: ErrForbiddenHost, Detail: "an upload is redirected to " + req.URL.Host}
	}
	return nil
}

// token sends a request to a token realm, which regclient makes without a context of its own.
func (t *transport) token(req *http.Request) (*http.Response, error) {
	ctx, cancel := context.WithTimeout(req.Context(), tokenTimeout)
	resp, err := t.base.RoundTrip(req.WithContext(ctx))
	if err != nil {
		cancel()
		return nil, t.failed(nil, err)
	}
	if resp.StatusCode == http.StatusTooManyRequests || resp.StatusCode >= 500 {
		defer cancel()
		if err := t.answered(nil, resp); err != nil {
			return nil, err
		}
		return resp, nil
	}
	resp.Body = &limitedBody{t: t, body: resp.Body, left: maxTokenBody, done: cancel}
	return resp, nil
}

// acquire waits for a slot.
func (t *transport) acquire(req *http.Request) (release func(), err error) {
	slots := t.reads
	if req.Method != http.MethodGet && req.Method != http.MethodHead {
		slots = t.writes
	}
	select {
	case slots <- struct{}{}:
		return sync.OnceFunc(func() { <-slots }), nil
	case <-req.Context().Done():
		return nil, req.Context().Err()
	}
}

// failed makes an Error of what kept a request from an answer.
func (t *transport) failed(o *op, err error) error {
	var e *Error
	if !errors.As(err, &e) {
		e = &Error{Kind: ErrUnavailable, Detail: netDetail(err)}
		var cert *tls.CertificateVerificationError
		if errors.As(err, &cert) {
			e.Detail += "; set caFile on this registry if it has a private certificate authority"
		}
	}
	o.fail(e)
	return e
}

// answered handles an answer that is no success: an error if another try is
// for us to decide. The body is read at once, so that a slot is never held
// while regclient asks a token realm.
func (t *transport) answered(o *op, resp *http.Response) error {
	body, _ := io.ReadAll(io.LimitReader(resp.Body, maxErrorBody)) // what cannot be read is not needed
	_ = resp.Body.Close()
	resp.Body = io.NopCloser(bytes.NewReader(body))
	after := retryAfter(resp.Header.Get("Retry-After"), time.Now())
	// regclient would sleep for as long as it is told to; we decide.
	resp.Header.Del("Retry-After")
	kind := fromStatus(resp.StatusCode)
	if !errors.Is(kind, ErrThrottled) && !errors.Is(kind, ErrUnavailable) {
		return nil
	}
	e := &Error{Kind: kind, Status: resp.StatusCode, Detail: errorCode(body), After: after}
	if errors.Is(kind, ErrThrottled) && after > 0 && (resp.Request == nil || !t.own(resp.Request.URL.Host)) {
		t.pace.hush(context.Background(), after) // its token realm, or where it keeps its blobs
	}
	o.fail(e)
	return e
}

// note records what regclient does not pass on.
func (o *op) note(req *http.Request, resp *http.Response) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.status = resp.StatusCode
	if req.Method == http.MethodPut {
		o.put = resp.StatusCode
	}
	if o.sum = nil; resp.StatusCode == http.StatusOK && req.Method == http.MethodGet && strings.HasPrefix(o.digest, "sha256:") {
		o.sum = sha256.New()
	}
	if resp.StatusCode == http.StatusOK && strings.Contains(req.URL.Path, "/referrers/") {
		o.referrersAPI = true
	}
	if resp.Header.Get("OCI-Subject") != "" {
		o.subjectAck = true
	}
}

// retryAfter reads a Retry-After header (RFC 9110, 10.2.3): seconds or a date.
func retryAfter(v string, now time.Time) time.Duration {
	if v == "" {
		return 0
	}
	if s, err := strconv.ParseInt(v, 10, 32); err == nil {
		return time.Duration(max(s, 0)) * time.Second
	}
	if at, err := http.ParseTime(v); err == nil {
		return max(at.Sub(now), 0)
	}
	return 0
}

var errorCodePattern = regexp.MustCompile(`^[A-Z_]{1,40}$`)

// errorCode returns the code in a registry's error body (distribution-spec,
// "Error Codes"). The message is not kept: it is free text of a stranger.
func errorCode(body []byte) string {
	var v struct {
		Errors []struct {
			Code string `json:"code"`
		} `json:"errors"`
	}
	if json.Unmarshal(body, &v) != nil || len(v.Errors) == 0 || !errorCodePattern.MatchString(v.Errors[0].Code) {
		return ""
	}
	return v.Errors[0].Code
}

// limitedBody ends with ErrTooLarge beyond its limit.
type limitedBody struct {
	t    *transport
	op   *op // nil for a token realm
	body io.ReadCloser
	left int64
	done func()
}

func (b *limitedBody) Read(p []byte) (int, error) {
	if b.left <= 0 {
		return 0, b.t.failed(b.op, &Error{Kind: ErrTooLarge})
	}
	if int64(len(p)) > b.left {
		p = p[:b.left]
	}
	n, err := b.body.Read(p)
	b.left -= int64(n)
	b.op.read(p[:n])
	if err != nil && !errors.Is(err, io.EOF) {
		// Left as it is, regclient would take it for the end or resume on its own.
		err = b.t.failed(b.op, err)
	}
	return n, err
}

func (b *limitedBody) Close() error {
	defer b.done()
	return b.body.Close()
}
