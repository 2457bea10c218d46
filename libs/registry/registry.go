// Package registry talks to OCI registries. It is the only package that
// imports regclient. It connects only to registries that are configured, with
// deadlines, limits and dial-time rules of our own.
package registry

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Errors. ErrThrottled and ErrUnavailable are worth another try later (see
// RetryAt); the others are facts about the repository.
var (
	ErrNotConfigured  = errors.New("registry is not configured")
	ErrForbiddenHost  = errors.New("connection is not allowed")
	ErrNotFound       = errors.New("not found in registry")
	ErrUnauthorized   = errors.New("registry refused the credentials")
	ErrDigestMismatch = errors.New("content does not have its digest")
	ErrThrottled      = errors.New("registry asks to slow down")
	ErrUnavailable    = errors.New("registry is unavailable")
	ErrTooLarge       = errors.New("larger than allowed")
)

// RetryAt says whether err is worth another try and when (Retry-After is
// obeyed, with a minimum of backoff and some jitter).
func RetryAt(err error, attempt int) (time.Time, bool) { return time.Time{}, false }

// Host is one registry. YAML: an entry of "registries".
type Host struct {
	Name         string   `yaml:"host"`    // as in image names, with port
	Address      string   `yaml:"address"` // where to connect instead of Name, host:port
	PlainHTTP    bool     `yaml:"plainHTTP"`
	Username     string   `yaml:"username"`
	Password     string   `yaml:"-"`
	PasswordFile string   `yaml:"passwordFile"`
	PasswordEnv  string   `yaml:"passwordEnv"`
	CAFile       string   `yaml:"caFile"`
	AllowPrivate bool     `yaml:"allowPrivate"` // token realms and redirects may lead to private addresses
	Concurrency  int      `yaml:"concurrency"`  // requests at once; default 16
	PathPrefixes []string `yaml:"pathPrefixes"`
}

// Ref names a manifest: by digest where that is set, else by tag.
type Ref struct {
	Registry, Repository, Tag, Digest string
}

// Manifest is a manifest or index with its verified bytes.
type Manifest struct {
	Descriptor ocispec.Descriptor
	Body       []byte
}

// Client reads from and writes to registries.
type Client struct{}

// New returns a client for the given hosts and no others.
func New(hosts []Host, log *slog.Logger) (*Client, error) { return nil, nil }

// Resolve asks (HEAD) what ref points at.
func (c *Client) Resolve(ctx context.Context, ref Ref) (ocispec.Descriptor, error) {
	return ocispec.Descriptor{}, nil
}

// Manifest fetches a manifest of at most 4 MiB and verifies its digest.
func (c *Client) Manifest(ctx context.Context, ref Ref) (Manifest, error) { return Manifest{}, nil }

// HasBlob asks (HEAD) whether the repository has the blob.
func (c *Client) HasBlob(ctx context.Context, registry, repository, digest string) (bool, error) {
	return false, nil
}

// Blob opens a blob. Its digest is verified at the end of the stream: Read
// returns ErrDigestMismatch instead of io.EOF. Broken connections are resumed.
func (c *Client) Blob(ctx context.Context, registry, repository string, d ocispec.Descriptor) (io.ReadCloser, error) {
	return nil, nil
}

// Referrers lists what refers to a manifest, through the referrers API or the
// fallback tag; artifactType "" lists all.
func (c *Client) Referrers(ctx context.Context, ref Ref, artifactType string) ([]ocispec.Descriptor, error) {
	return nil, nil
}

// Artifact is content to attach to an image as a referrer (OCI 1.1).
type Artifact struct {
	Type        string // artifactType of the manifest
	MediaType   string // of the content
	Content     []byte
	Annotations map[string]string
}

// Attach pushes an artifact as a referrer of subject and returns its
// descriptor. Where the registry has no referrers API, the fallback tag is
// updated; callers hold a lock per subject then. Pushing the same again is a no-op.
func (c *Client) Attach(ctx context.Context, registry, repository string, subject ocispec.Descriptor, a Artifact) (ocispec.Descriptor, error) {
	return ocispec.Descriptor{}, nil
}

// HasReferrersAPI says whether the registry answers the referrers API for the repository.
func (c *Client) HasReferrersAPI(ctx context.Context, ref Ref) (bool, error) { return false, nil }

// Detach deletes a referrer's manifest and repairs the fallback tag.
func (c *Client) Detach(ctx context.Context, registry, repository string, subject, referrer ocispec.Descriptor) error {
	return nil
}

// ArtifactContent returns the single layer of an artifact's manifest, at most limit bytes.
func (c *Client) ArtifactContent(ctx context.Context, registry, repository, manifestDigest string, limit int64) (Artifact, error) {
	return Artifact{}, nil
}

// PushBlob uploads a blob of known digest and size.
func (c *Client) PushBlob(ctx context.Context, registry, repository string, d ocispec.Descriptor, content io.Reader) error {
	return nil
}

// PushManifest uploads a manifest under its digest, and under tag too when that is set.
func (c *Client) PushManifest(ctx context.Context, registry, repository, tag string, m Manifest) error {
	return nil
}

// Copy copies an image with all platforms (not its referrers).
func (c *Client) Copy(ctx context.Context, from, to Ref) (ocispec.Descriptor, error) {
	return ocispec.Descriptor{}, nil
}
