// Package advisortest holds what tests of advisor and of those who fetch its
// snapshots share.
package advisortest

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"sync"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/registry"
)

// Registry is a registry in memory, as far as publishing and fetching
// snapshots need one.
type Registry struct {
	mu        sync.Mutex
	blobs     map[string][]byte
	manifests map[string][]byte // by repository and digest
	tags      map[string]string // by repository and tag
	err       error
	fetched   int
}

// New returns an empty registry.
func New() *Registry {
	return &Registry{blobs: map[string][]byte{}, manifests: map[string][]byte{}, tags: map[string]string{}}
}

// Fail lets every request fail with err until it is nil.
func (r *Registry) Fail(err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.err = err
}

// Fetched returns how many blobs were read.
func (r *Registry) Fetched() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.fetched
}

// Manifests returns how many manifests there are.
func (r *Registry) Manifests() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.manifests)
}

// Replace changes every manifest's text, and what tags point at with it.
func (r *Registry) Replace(old, with string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for key, body := range maps.Clone(r.manifests) {
		name, digest, _ := strings.Cut(key, "@")
		changed := bytes.ReplaceAll(body, []byte(old), []byte(with))
		r.manifests[name+"@"+contracts.DigestOf(changed)] = changed
		for tag, at := range r.tags {
			if at == digest {
				r.tags[tag] = contracts.DigestOf(changed)
			}
		}
	}
}

// Break changes a byte in every blob of more than n bytes.
func (r *Registry) Break(n int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for digest, b := range r.blobs {
		if len(b) > n {
			b = slices.Clone(b)
			b[len(b)/2] ^= 1
			r.blobs[digest] = b
		}
	}
}

// HasBlob implements artefact.Pusher.
func (r *Registry) HasBlob(_ context.Context, _, _, digest string) (bool, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	_, ok := r.blobs[digest]
	return ok, r.err
}

// PushBlob implements artefact.Pusher.
func (r *Registry) PushBlob(_ context.Context, _, _ string, d ocispec.Descriptor, content io.Reader) error {
	b, err := io.ReadAll(content)
	if err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.err != nil {
		return r.err
	}
	if got := contracts.DigestOf(b); got != d.Digest.String() || int64(len(b)) != d.Size {
		return fmt.Errorf("pushed %s of %d bytes as %s: %w", got, len(b), d.Digest, registry.ErrDigestMismatch)
	}
	r.blobs[d.Digest.String()] = b
	return nil
}

// PushManifest implements artefact.Pusher.
func (r *Registry) PushManifest(_ context.Context, _, repository, tag string, m registry.Manifest) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.err != nil {
		return r.err
	}
	digest := contracts.DigestOf(m.Body)
	r.manifests[repository+"@"+digest] = m.Body
	if tag != "" {
		r.tags[repository+":"+tag] = digest
	}
	return nil
}

// Manifest implements artefact.Puller.
func (r *Registry) Manifest(_ context.Context, ref registry.Ref) (registry.Manifest, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.err != nil {
		return registry.Manifest{}, r.err
	}
	digest := ref.Digest
	if digest == "" {
		digest = r.tags[ref.Repository+":"+ref.Tag]
	}
	body, ok := r.manifests[ref.Repository+"@"+digest]
	if !ok {
		return registry.Manifest{}, fmt.Errorf("%s: %w", ref, registry.ErrNotFound)
	}
	return registry.Manifest{Body: body}, nil
}

// Blob implements artefact.Puller. Unlike the real client's, what it returns is
// not verified.
func (r *Registry) Blob(_ context.Context, _, _ string, d ocispec.Descriptor) (io.ReadCloser, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.err != nil {
		return nil, r.err
	}
	b, ok := r.blobs[d.Digest.String()]
	if !ok {
		return nil, fmt.Errorf("blob %s: %w", d.Digest, registry.ErrNotFound)
	}
	r.fetched++
	return io.NopCloser(bytes.NewReader(b)), nil
}

// Delete deletes a manifest.
func (r *Registry) Delete(_ context.Context, ref registry.Ref) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.err != nil {
		return r.err
	}
	delete(r.manifests, ref.Repository+"@"+ref.Digest)
	return nil
}
