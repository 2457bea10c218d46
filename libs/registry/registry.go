// Package registry talks to OCI registries. It is the only package that
// imports regclient. It connects only to registries that are configured, with
// deadlines, limits and dial-time rules of our own.
package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/contracts"
)

// Limits of what is read.
const (
	// MaxManifestBytes bounds a manifest, an index and a list of referrers
	// (distribution-spec, "Pushing Manifests", asks registries for 4 MiB).
	MaxManifestBytes = 4 << 20
	// MaxNesting bounds how deep indexes stand in indexes.
	MaxNesting = 3
)

// Host is one registry. YAML: an entry of "registries".
type Host struct {
	Name         string   `yaml:"host"`    // as in image names, with port
	Address      string   `yaml:"address"` // where to connect instead of Name, host:port
	PlainHTTP    bool     `yaml:"plainHTTP"`
	Username     string   `yaml:"username"`
	Password     string   `yaml:"-"`
	PasswordFile string   `yaml:"passwordFile"` // read again when it changes
	PasswordEnv  string   `yaml:"passwordEnv"`
	CAFile       string   `yaml:"caFile"`       // PEM, in addition to the system's; read at every connection, as the next two
	CertFile     string   `yaml:"certFile"`     // certificate that this registry, and only it, is shown (mTLS); PEM
	KeyFile      string   `yaml:"keyFile"`      // its private key; PEM
	AllowPrivate bool     `yaml:"allowPrivate"` // token realms and redirects may lead to private addresses
	Concurrency  int      `yaml:"concurrency"`  // requests at once; default 16
	PathPrefixes []string `yaml:"pathPrefixes"` // repositories that may be used; empty: all
	Rate         Rate     `yaml:"rate"`         // what may be asked of it
}

// Validate returns everything that is wrong with h.
func (h Host) Validate() error {
	var problems []error
	wrong := func(format string, args ...any) { problems = append(problems, fmt.Errorf(format, args...)) }
	if !contracts.ValidRegistry(h.Name) {
		wrong("host %q is no registry: %w, write it as in image names, host or host:port", h.Name, ErrInvalidName)
	}
	if h.Concurrency < 0 {
		wrong("concurrency is %d, it must not be negative", h.Concurrency)
	}
	if h.PlainHTTP && (h.CAFile != "" || h.CertFile != "") {
		wrong("plainHTTP: there is no TLS with it, keep it or the certificates")
	}
	for i, p := range h.PathPrefixes {
		if trimmed := strings.Trim(p, "/"); trimmed != "" && !contracts.ValidRepository(trimmed) {
			wrong("pathPrefixes[%d] is %q, write a repository or the path above some", i, p)
		}
	}
	if err := h.Rate.validate(); err != nil {
		problems = append(problems, err)
	}
	return errors.Join(problems...)
}

// Ref names a manifest: by digest where that is set, else by tag.
type Ref struct {
	Registry, Repository, Tag, Digest string
}

// String returns registry/repository@digest or registry/repository:tag.
func (r Ref) String() string {
	name := r.Registry + "/" + r.Repository
	if r.Digest != "" {
		return name + "@" + r.Digest
	}
	return name + ":" + r.Tag
}

func (r Ref) validate() error {
	switch {
	case !contracts.ValidRepository(r.Repository):
		return fmt.Errorf("repository %q: %w", r.Repository, ErrInvalidName)
	case r.Digest != "" && !contracts.ValidDigest(r.Digest):
		return fmt.Errorf("digest %q: %w", r.Digest, ErrInvalidName)
	case r.Digest == "" && !contracts.ValidTag(r.Tag):
		return fmt.Errorf("tag %q: %w", r.Tag, ErrInvalidName)
	}
	return nil
}

// Manifest is a manifest or index with its verified bytes.
type Manifest struct {
	Descriptor ocispec.Descriptor
	Body       []byte
}

// Client reads from and writes to registries.
type Client struct {
	hosts  map[string]*host
	layout *layout // instead of hosts: one image on disk
}

// reader is what can be asked of a registry and of an image on disk alike.
type reader interface {
	resolve(ctx context.Context, r Ref) (ocispec.Descriptor, error)
	manifest(ctx context.Context, r Ref) (Manifest, error)
	hasBlob(ctx context.Context, r Ref) (bool, error)
	blob(ctx context.Context, r Ref, size int64) (io.ReadCloser, error)
	referrers(ctx context.Context, r Ref, artifactType string) (list []ocispec.Descriptor, api bool, err error)
}

// New returns a client for the given hosts and no others. Files that hosts
// name (CA, password) must exist.
func New(hosts []Host, log *slog.Logger) (*Client, error) { return NewShared(hosts, nil, log) }

// NewShared is New for one of several clients that keep to the rates of hosts
// together. While budget is away each keeps to a part of them.
func NewShared(hosts []Host, budget Budget, log *slog.Logger) (*Client, error) {
	c := &Client{hosts: make(map[string]*host, len(hosts))}
	for _, cfg := range hosts {
		h, err := newHost(cfg, budget, log)
		if err != nil {
			return nil, fmt.Errorf("registry %q: %w", cfg.Name, err)
		}
		name := normalize(cfg.Name)
		if c.hosts[name] != nil {
			return nil, fmt.Errorf("registry %q is configured twice", cfg.Name)
		}
		c.hosts[name] = h
	}
	return c, nil
}

// Close ends idle connections and deletes what OpenArchive unpacked.
func (c *Client) Close() error {
	for _, h := range c.hosts {
		h.base.CloseIdleConnections()
	}
	if c.layout != nil {
		return c.layout.close()
	}
	return nil
}

// normalize maps the names that mean Docker Hub to the one in image names.
func normalize(name string) string {
	name = strings.ToLower(name)
	switch name {
	case "index.docker.io", "registry-1.docker.io":
		return "docker.io"
	}
	return name
}

// host returns the configured registry of a name, if the repository may be used.
func (c *Client) host(registry, repository string) (*host, error) {
	h := c.hosts[normalize(registry)]
	if h == nil {
		return nil, fmt.Errorf("registry %q: %w: add it under registries: in the configuration", registry, ErrNotConfigured)
	}
	if !under(repository, h.cfg.PathPrefixes) {
		return nil, fmt.Errorf("repository %s/%s: %w: it is outside of the registry's pathPrefixes", registry, repository, ErrNotConfigured)
	}
	return h, nil
}

// under says whether a repository is one of prefixes or below one.
func under(repository string, prefixes []string) bool {
	if len(prefixes) == 0 {
		return true
	}
	for _, p := range prefixes {
		p = strings.Trim(p, "/")
		if p == "" || repository == p || strings.HasPrefix(repository, p+"/") {
			return true
		}
	}
	return false
}

// Configured returns nil if the repository may be used, else an error that is
// ErrNotConfigured. Nothing is connected to.
func (c *Client) Configured(registry, repository string) error {
	if c.layout != nil {
		return nil
	}
	_, err := c.host(registry, repository)
	return err
}

// reader returns where r is read from, after checking r.
func (c *Client) reader(r Ref) (reader, error) {
	if err := r.validate(); err != nil {
		return nil, err
	}
	if c.layout != nil {
		return c.layout, nil
	}
	return c.host(r.Registry, r.Repository)
}

// Resolve asks (HEAD) what ref points at.
func (c *Client) Resolve(ctx context.Context, ref Ref) (ocispec.Descriptor, error) {
	r, err := c.reader(ref)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	return r.resolve(ctx, ref)
}

// Manifest fetches a manifest of at most MaxManifestBytes and verifies its
// digest. What is no manifest of a known kind is ErrUnknownManifest.
func (c *Client) Manifest(ctx context.Context, ref Ref) (Manifest, error) {
	r, err := c.reader(ref)
	if err != nil {
		return Manifest{}, err
	}
	return r.manifest(ctx, ref)
}

// HasBlob asks (HEAD) whether the repository has the blob.
func (c *Client) HasBlob(ctx context.Context, registry, repository, digest string) (bool, error) {
	ref := Ref{Registry: registry, Repository: repository, Digest: digest}
	r, err := c.reader(ref)
	if err != nil {
		return false, err
	}
	return r.hasBlob(ctx, ref)
}

// Blob opens a blob. Its digest and size (where not 0) are verified at the end
// of the stream: Read returns ErrDigestMismatch instead of io.EOF, so a caller
// must read to the end before it believes anything. Broken connections are
// resumed; a connection that stalls or trickles is given up (ErrUnavailable).
// The URLs of d are never followed.
func (c *Client) Blob(ctx context.Context, registry, repository string, d ocispec.Descriptor) (io.ReadCloser, error) {
	ref := Ref{Registry: registry, Repository: repository, Digest: d.Digest.String()}
	r, err := c.reader(ref)
	if err != nil {
		return nil, err
	}
	return r.blob(ctx, ref, d.Size)
}

// ReadBlob returns a whole blob of at most limit bytes, verified.
func (c *Client) ReadBlob(ctx context.Context, registry, repository string, d ocispec.Descriptor, limit int64) (content []byte, err error) {
	if d.Size > limit {
		return nil, fmt.Errorf("blob %s of %d bytes, allowed are %d: %w", d.Digest, d.Size, limit, ErrTooLarge)
	}
	ctx, cancel := context.WithTimeout(ctx, smallTimeout)
	defer cancel()
	for attempt := 1; ; attempt++ {
		content, err = c.readBlob(ctx, registry, repository, d, limit)
		// trouble has been waited for; bytes that are wrong may come right another time
		if !doubtful(err) || attempt == tries || !sleep(ctx, time.Duration(attempt)*100*time.Millisecond) {
			return content, err
		}
	}
}

func (c *Client) readBlob(ctx context.Context, registry, repository string, d ocispec.Descriptor, limit int64) (content []byte, err error) {
	rc, err := c.Blob(ctx, registry, repository, d)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, rc.Close()) }()
	content, err = io.ReadAll(io.LimitReader(rc, limit+1))
	if err != nil {
		return nil, fmt.Errorf("read blob %s/%s@%s: %w", registry, repository, d.Digest, err)
	}
	if int64(len(content)) > limit {
		return nil, fmt.Errorf("blob %s, allowed are %d bytes: %w", d.Digest, limit, ErrTooLarge)
	}
	return content, nil
}
