package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/regclient/regclient"
	"github.com/regclient/regclient/config"
	"github.com/regclient/regclient/scheme"
	"github.com/regclient/regclient/scheme/reg"
	"github.com/regclient/regclient/types/descriptor"
	"github.com/regclient/regclient/types/errs"
	"github.com/regclient/regclient/types/manifest"
	"github.com/regclient/regclient/types/mediatype"
	"github.com/regclient/regclient/types/ref"
)

const (
	defaultConcurrency = 16
	credentialsAge     = 5 * time.Second // how long a password that was read is used unchecked
	tries              = 3               // of a request that can be repeated
	maxWait            = 3 * time.Second // longest wait between them; longer ones are the caller's
	dockerHub          = "docker.io"
	dockerHubHost      = "registry-1.docker.io"
)

// host is one configured registry.
type host struct {
	cfg  Host
	name string
	log  *slog.Logger
	base *http.Transport
	rt   *transport

	mu      sync.Mutex
	rc      *regclient.RegClient
	lister  *regclient.RegClient // lists referrers; see forget
	user    string
	pass    string
	checked time.Time // when the credentials were read
}

func newHost(cfg Host, budget Budget, log *slog.Logger) (*host, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	if cfg.Concurrency <= 0 {
		cfg.Concurrency = defaultConcurrency
	}
	h := &host{cfg: cfg, name: normalize(cfg.Name), log: log}
	authority := h.name
	if h.name == dockerHub {
		authority = dockerHubHost
	}
	base, err := newBase(cfg, authority)
	if err != nil {
		return nil, err
	}
	h.base = base
	h.rt = &transport{
		base: base, authority: authority, cfg: cfg, idle: idleTimeout,
		pace:   newPacer(h.name, cfg.Rate, budget, log),
		reads:  make(chan struct{}, cfg.Concurrency),
		writes: make(chan struct{}, cfg.Concurrency),
	}
	if _, err := h.client(); err != nil {
		return nil, err
	}
	return h, nil
}

// credentials reads the user and the password as they are now.
func (h *host) credentials() (user, pass string, err error) {
	if h.cfg.PasswordEnv != "" && h.cfg.PasswordFile != "" {
		return "", "", errors.New("the password is named by passwordFile and by passwordEnv, keep one")
	}
	pass = h.cfg.Password
	if h.cfg.PasswordEnv != "" {
		pass = os.Getenv(h.cfg.PasswordEnv)
		if pass == "" {
			return "", "", fmt.Errorf("passwordEnv: %s is not set", h.cfg.PasswordEnv)
		}
	}
	if h.cfg.PasswordFile != "" {
		b, err := os.ReadFile(h.cfg.PasswordFile)
		if err != nil {
			return "", "", fmt.Errorf("read passwordFile: %w", err)
		}
		pass = strings.TrimRight(string(b), "\r\n")
	}
	return h.cfg.Username, pass, nil
}

// client returns regclient with the credentials of now. It is made anew when
// they change, as regclient keeps tokens that the old ones were given.
func (h *host) client() (*regclient.RegClient, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.rc != nil && time.Since(h.checked) < credentialsAge {
		return h.rc, nil
	}
	user, pass, err := h.credentials()
	if err != nil {
		return nil, fmt.Errorf("credentials of registry %s: %w", h.name, err)
	}
	h.checked = time.Now()
	if h.rc == nil || user != h.user || pass != h.pass {
		h.user, h.pass = user, pass
		h.rc, h.lister = h.build(user, pass), nil
		h.rt.pace.as(user)
	}
	return h.rc, nil
}

// renewed says whether the credentials have changed since they were read last.
func (h *host) renewed() bool {
	h.mu.Lock()
	before := h.rc
	h.checked = time.Time{}
	h.mu.Unlock()
	after, err := h.client()
	return err == nil && after != before
}

// referrersClient returns the client that lists referrers.
func (h *host) referrersClient() *regclient.RegClient {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.lister == nil {
		h.lister = h.build(h.user, h.pass)
	}
	return h.lister
}

// forget drops the client that lists referrers. regclient takes any failure of
// the referrers API, also for a manifest that is not there, to mean that the
// repository has none, and asks the fallback tag alone for the next minutes:
// statements that are there would not be seen.
func (h *host) forget() {
	h.mu.Lock()
	h.lister = nil
	h.mu.Unlock()
}

func (h *host) build(user, pass string) *regclient.RegClient {
	tls := config.TLSEnabled
	if h.cfg.PlainHTTP {
		tls = config.TLSDisabled
	}
	return regclient.New(
		regclient.WithSlog(slog.New(slog.DiscardHandler)), // it logs bodies and URLs
		regclient.WithUserAgent("tidewaiter"),
		regclient.WithConfigHost(config.Host{
			Name: h.name, TLS: tls, User: user, Pass: pass,
			// Every break in the middle of a body leaks one of these; our own
			// slots are what limits.
			ReqConcurrent: 1 << 20,
			RepoAuth:      true, // a token is good for one repository only
		}),
		regclient.WithRegOpts(
			reg.WithHTTPClient(&http.Client{Transport: h.rt, CheckRedirect: h.rt.redirect}),
			reg.WithManifestMax(MaxManifestBytes, MaxManifestBytes),
			// Retries are ours; regclient's limit is only kept out of the way.
			reg.WithDelay(time.Millisecond, time.Millisecond),
			reg.WithRetryLimit(100),
		),
	)
}

// do runs one operation. It is tried again up to attempts times in all when the
// registry or the network fails and the wait is short.
func (h *host) do(ctx context.Context, what string, o *op, timeout time.Duration, attempts int,
	work func(ctx context.Context, rc *regclient.RegClient) error,
) error {
	return h.repeat(ctx, what, attempts, func() error { return h.once(ctx, what, o, timeout, work) })
}

// repeat runs try until it works, up to attempts times, as long as another try
// can help, the wait is short, and it does not take long to fail.
func (h *host) repeat(ctx context.Context, what string, attempts int, try func() error) error {
	for attempt := 1; ; attempt++ {
		began := time.Now()
		err := try()
		if err == nil {
			return nil
		}
		if time.Since(began) > maxWait {
			return err // whoever waits behind us has waited long enough
		}
		if errors.Is(err, ErrUnauthorized) && attempt == 1 && h.renewed() {
			continue
		}
		wait, again := pause(err, attempt)
		if !again || attempt >= attempts || ctx.Err() != nil {
			return err
		}
		h.log.DebugContext(ctx, "registry request is repeated", "what", what, "attempt", attempt, "error", err)
		if !sleep(ctx, wait) {
			return err
		}
	}
}

// pause returns how long to wait before a request is repeated in place.
func pause(err error, attempt int) (time.Duration, bool) {
	var e *Error
	if !errors.As(err, &e) || e.Held || !errors.Is(e, ErrThrottled) && !errors.Is(e, ErrUnavailable) && !doubtful(e) {
		return 0, false
	}
	wait := max(e.After, time.Duration(attempt*attempt)*100*time.Millisecond)
	return wait, wait <= maxWait
}

func (h *host) once(ctx context.Context, what string, o *op, timeout time.Duration,
	work func(ctx context.Context, rc *regclient.RegClient) error,
) error {
	if err := h.held(what); err != nil {
		return err
	}
	rc, err := h.client()
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	octx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	*o = op{kind: o.kind, size: o.size, digest: o.digest, query: o.query, cancel: cancel}
	err = work(context.WithValue(octx, opKey{}, o), rc)
	return h.result(ctx, what, o, err)
}

// held returns an error while the registry is left alone for longer than a
// request would wait.
func (h *host) held(what string) error {
	if wait := h.rt.pace.held(); wait > 0 {
		return &Error{Kind: ErrThrottled, What: what, Detail: "not asked: it is left alone for now", After: wait, Held: true}
	}
	return nil
}

// result translates the error of one try.
func (h *host) result(ctx context.Context, what string, o *op, err error) error {
	if err == nil {
		return nil
	}
	if ctx.Err() != nil {
		return fmt.Errorf("%s: %w", what, ctx.Err())
	}
	if e := o.failure(); e != nil {
		return translate(what, e)
	}
	if errors.Is(err, errs.ErrHTTPStatus) && o.succeeded() {
		return &Error{Kind: errUnclear, What: what} // a success, but of something else
	}
	return translate(what, err)
}

// ref returns regclient's form of r.
func (h *host) ref(r Ref) ref.Ref {
	out := ref.Ref{Scheme: "reg", Registry: h.name, Repository: r.Repository, Digest: r.Digest}
	if r.Digest == "" {
		out.Tag = r.Tag
	}
	out.Reference = out.CommonName()
	return out
}

// repo returns regclient's form of r's repository.
func (h *host) repo(r Ref) ref.Ref {
	return ref.Ref{Scheme: "reg", Reference: r.Registry + "/" + r.Repository, Registry: h.name, Repository: r.Repository}
}

func (h *host) resolve(ctx context.Context, r Ref) (ocispec.Descriptor, error) {
	var d ocispec.Descriptor
	err := h.do(ctx, "look up "+r.String(), &op{}, smallTimeout, tries, func(ctx context.Context, rc *regclient.RegClient) error {
		m, err := rc.ManifestHead(ctx, h.ref(r), regclient.WithManifestRequireDigest())
		if err != nil {
			return err
		}
		d = toOCI(m.GetDescriptor())
		return nil
	})
	return d, err
}

func (h *host) manifest(ctx context.Context, r Ref) (Manifest, error) {
	var out Manifest
	what := "read manifest " + r.String()
	o := &op{digest: r.Digest}
	err := h.do(ctx, what, o, smallTimeout, tries, func(ctx context.Context, rc *regclient.RegClient) error {
		m, err := rc.ManifestGet(ctx, h.ref(r))
		if err != nil && o.swapped() {
			return &Error{Kind: ErrDigestMismatch, What: what} // whatever else is wrong with it
		}
		if err != nil {
			return err
		}
		out, err = checked(what, r, m)
		return err
	})
	return out, err
}

// checked returns a manifest's bytes if they have the digest that was asked for.
func checked(what string, r Ref, m manifest.Manifest) (Manifest, error) {
	body, err := m.RawBody()
	if err != nil {
		return Manifest{}, err
	}
	d := toOCI(m.GetDescriptor())
	// The digest of a signed schema 1 manifest leaves its signatures out;
	// regclient has computed it, and we never scan one.
	if d.MediaType != mediatype.Docker1ManifestSigned {
		d.Digest, d.Size = digest.FromBytes(body), int64(len(body))
	}
	if r.Digest != "" && d.Digest.String() != r.Digest {
		return Manifest{}, &Error{Kind: ErrDigestMismatch, What: what}
	}
	return Manifest{Descriptor: d, Body: body}, nil
}

func (h *host) hasBlob(ctx context.Context, r Ref) (bool, error) {
	_, have, err := h.headBlob(ctx, r)
	return have, err
}

// headBlob says whether a blob is there, and of how many bytes the registry says it is.
func (h *host) headBlob(ctx context.Context, r Ref) (size int64, have bool, err error) {
	err = h.do(ctx, "look up blob "+r.String(), &op{}, smallTimeout, tries, func(ctx context.Context, rc *regclient.RegClient) error {
		b, err := rc.BlobHead(ctx, h.repo(r), descriptor.Descriptor{Digest: digest.Digest(r.Digest)})
		if err != nil {
			return err
		}
		size = b.GetDescriptor().Size
		return b.Close()
	})
	if errors.Is(err, ErrNotFound) {
		return 0, false, nil
	}
	return size, err == nil, err
}

func (h *host) blob(ctx context.Context, r Ref, size int64) (io.ReadCloser, error) {
	what := "read blob " + r.String()
	var out io.ReadCloser
	// The operation goes on after this call, until the reader is closed, so it
	// has no deadline as a whole: blobBody has one for every read.
	open := func() error {
		if err := h.held(what); err != nil {
			return err
		}
		rc, err := h.client()
		if err != nil {
			return fmt.Errorf("%s: %w", what, err)
		}
		octx, cancel := context.WithCancel(ctx)
		o := &op{kind: opBlob, size: size, cancel: cancel}
		b, err := rc.BlobGet(context.WithValue(octx, opKey{}, o), h.repo(r),
			descriptor.Descriptor{Digest: digest.Digest(r.Digest), Size: size})
		if err != nil {
			err = h.result(ctx, what, o, err)
			cancel()
			return err
		}
		out = &blobReader{r: b, what: what, op: o, parent: ctx, close: cancel}
		return nil
	}
	err := h.repeat(ctx, what, tries, open)
	return out, err
}

func (h *host) referrers(ctx context.Context, r Ref, artifactType string) (list []ocispec.Descriptor, api bool, err error) {
	o := &op{}
	err = h.do(ctx, "list referrers of "+r.String(), o, smallTimeout, tries, func(ctx context.Context, _ *regclient.RegClient) error {
		rl, err := h.referrersClient().ReferrerList(ctx, h.ref(r), scheme.WithReferrerMatchOpt(descriptor.MatchOpt{ArtifactType: artifactType}))
		if err != nil && !errors.Is(err, errs.ErrNotFound) {
			h.forget()
			return err
		}
		list = list[:0]
		for _, d := range rl.Descriptors {
			list = append(list, toOCI(d))
		}
		if len(list) == 0 && !o.answeredReferrers() {
			h.forget()
		}
		return nil
	})
	return list, o.answeredReferrers(), err
}

// toOCI converts regclient's descriptor.
func toOCI(d descriptor.Descriptor) ocispec.Descriptor {
	out := ocispec.Descriptor{
		MediaType: d.MediaType, Digest: d.Digest, Size: d.Size, URLs: d.URLs,
		Annotations: d.Annotations, Data: d.Data, ArtifactType: d.ArtifactType,
	}
	if d.Platform != nil {
		out.Platform = &ocispec.Platform{
			OS: d.Platform.OS, Architecture: d.Platform.Architecture, Variant: d.Platform.Variant,
			OSVersion: d.Platform.OSVersion, OSFeatures: d.Platform.OSFeatures,
		}
	}
	return out
}
