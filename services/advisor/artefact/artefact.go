// Package artefact keeps advisory snapshots in a registry: an OCI artefact each,
// named by its digest and signed with advisor's own key (Ed25519, RFC 8032),
// which matchers verify with the standard library alone.
package artefact

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/registry"
	"github.com/tidewaiter/tidewaiter/services/advisor/snapshot"
)

// Latest is the tag that points at the newest snapshot: a hint where to look,
// of which nothing is believed. What counts is the signed sequence.
const Latest = "latest"

// MaxBytes bounds a snapshot.
const MaxBytes = 4 << 30

// Annotations of a snapshot's manifest.
const (
	annotationSequence  = "dev.tidewaiter.advisories.sequence"
	annotationSignature = "dev.tidewaiter.advisories.signature" // base64, over message
)

var (
	// ErrSignature is returned for a snapshot that none of the keys has signed.
	ErrSignature = errors.New("signature of the advisory snapshot does not hold")
	// ErrForeign is returned for content that is no published snapshot, or not what its manifest says.
	ErrForeign = errors.New("not a published advisory snapshot")
)

// Repository is where snapshots are published.
type Repository struct{ Registry, Repository string }

// ParseRepository reads registry/repository.
func ParseRepository(s string) (Repository, error) {
	host, repository, ok := strings.Cut(s, "/")
	if !ok || host == "" || !contracts.ValidRepository(repository) {
		return Repository{}, fmt.Errorf("%q is not registry/repository", s)
	}
	return Repository{Registry: host, Repository: repository}, nil
}

// String returns registry/repository.
func (r Repository) String() string { return r.Registry + "/" + r.Repository }

// Location returns registry/repository@digest.
func (r Repository) Location(digest string) string { return r.String() + "@" + digest }

// ref returns where a location lies; "" is the newest. Another repository is ErrForeign.
func (r Repository) ref(location string) (registry.Ref, error) {
	ref := registry.Ref{Registry: r.Registry, Repository: r.Repository, Tag: Latest}
	if location == "" {
		return ref, nil
	}
	im, err := contracts.ParseImage(location)
	if err != nil {
		return ref, fmt.Errorf("location of an advisory snapshot: %w", err)
	}
	if im.Registry != r.Registry || im.Repository != r.Repository {
		return ref, fmt.Errorf("location %s is outside of %s: %w", location, r, ErrForeign)
	}
	return registry.Ref{Registry: r.Registry, Repository: r.Repository, Digest: im.Digest}, nil
}

// message is what is signed: which content has which sequence.
func message(s contracts.SnapshotRef) []byte {
	return fmt.Appendf(nil, "tidewaiter advisories v1\n%s\n%d\n", s.Digest, s.Sequence)
}

// Pusher is what publishing needs of a registry client.
type Pusher interface {
	HasBlob(ctx context.Context, registry, repository, digest string) (bool, error)
	PushBlob(ctx context.Context, registry, repository string, d ocispec.Descriptor, content io.Reader) error
	PushManifest(ctx context.Context, registry, repository, tag string, m registry.Manifest) error
}

// Push publishes the snapshot in file and returns its location. The same
// snapshot and key give the same location, so that publishing again is harmless.
func Push(ctx context.Context, c Pusher, to Repository, file string, key ed25519.PrivateKey) (location string, err error) {
	s, err := snapshot.Open(file)
	if err != nil {
		return "", fmt.Errorf("publish: %w", err)
	}
	ref, newest := contracts.SnapshotRef{Digest: s.Digest(), Sequence: s.Sequence()}, s.Newest()
	if err := s.Close(); err != nil {
		return "", fmt.Errorf("publish: %w", err)
	}
	f, err := os.Open(file) //nolint:gosec // advisor's own file
	if err != nil {
		return "", fmt.Errorf("publish: %w", err)
	}
	defer func() { _ = f.Close() }()
	info, err := f.Stat()
	if err != nil {
		return "", fmt.Errorf("publish: %w", err)
	}
	config := ocispec.DescriptorEmptyJSON
	config.Data = nil
	layer := ocispec.Descriptor{MediaType: contracts.MediaTypeAdvisories, Digest: digest.Digest(ref.Digest), Size: info.Size()}
	for _, b := range []struct {
		d       ocispec.Descriptor
		content io.Reader
	}{{config, bytes.NewReader(ocispec.DescriptorEmptyJSON.Data)}, {layer, f}} {
		have, err := c.HasBlob(ctx, to.Registry, to.Repository, b.d.Digest.String())
		if err == nil && !have {
			err = c.PushBlob(ctx, to.Registry, to.Repository, b.d, b.content)
		}
		if err != nil {
			return "", fmt.Errorf("publish: %w", err)
		}
	}
	body, err := json.Marshal(ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest,
		ArtifactType: contracts.MediaTypeAdvisories, Config: config, Layers: []ocispec.Descriptor{layer},
		Annotations: map[string]string{
			contracts.AnnotationOwner: "tidewaiter", ocispec.AnnotationCreated: newest.Format(time.RFC3339),
			annotationSequence:  strconv.FormatInt(ref.Sequence, 10),
			annotationSignature: base64.StdEncoding.EncodeToString(ed25519.Sign(key, message(ref))),
		},
	})
	if err != nil {
		return "", fmt.Errorf("publish: encode manifest: %w", err)
	}
	m := registry.Manifest{Body: body, Descriptor: ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest}}
	// A tag of its own keeps the snapshot from being collected; the newest has a second one.
	for _, tag := range []string{"s" + strconv.FormatInt(ref.Sequence, 10), Latest} {
		if err := c.PushManifest(ctx, to.Registry, to.Repository, tag, m); err != nil {
			return "", fmt.Errorf("publish: %w", err)
		}
	}
	return to.Location(contracts.DigestOf(body)), nil
}

// Puller is what fetching needs of a registry client.
type Puller interface {
	Manifest(ctx context.Context, ref registry.Ref) (registry.Manifest, error)
	Blob(ctx context.Context, registry, repository string, d ocispec.Descriptor) (io.ReadCloser, error)
}

// Published is a snapshot in a registry whose signature holds. Nothing of its
// content has been read.
type Published struct {
	Location string
	Snapshot contracts.SnapshotRef
	layer    ocispec.Descriptor
}

// Look reads what is published at a location ("": the newest) and verifies its
// signature. Errors: ErrSignature, ErrForeign, those of the registry.
func Look(ctx context.Context, c Puller, from Repository, location string, keys []ed25519.PublicKey) (Published, error) {
	ref, err := from.ref(location)
	if err != nil {
		return Published{}, err
	}
	m, err := c.Manifest(ctx, ref)
	if err != nil {
		return Published{}, fmt.Errorf("look for advisory snapshot: %w", err)
	}
	var doc ocispec.Manifest
	if err := json.Unmarshal(m.Body, &doc); err != nil {
		return Published{}, fmt.Errorf("manifest of %s: %w: %w", ref, err, ErrForeign)
	}
	if doc.ArtifactType != contracts.MediaTypeAdvisories || len(doc.Layers) != 1 || doc.Layers[0].MediaType != contracts.MediaTypeAdvisories {
		return Published{}, fmt.Errorf("%s is of type %q: %w", ref, doc.ArtifactType, ErrForeign)
	}
	p := Published{Location: from.Location(contracts.DigestOf(m.Body)), layer: doc.Layers[0]}
	p.Snapshot.Digest = p.layer.Digest.String()
	if p.Snapshot.Sequence, err = strconv.ParseInt(doc.Annotations[annotationSequence], 10, 64); err != nil || !contracts.ValidDigest(p.Snapshot.Digest) {
		return Published{}, fmt.Errorf("%s has no sequence or digest: %w", ref, ErrForeign)
	}
	signature, err := base64.StdEncoding.DecodeString(doc.Annotations[annotationSignature])
	if err != nil {
		return Published{}, fmt.Errorf("%s: %w", ref, ErrSignature)
	}
	for _, key := range keys {
		if ed25519.Verify(key, message(p.Snapshot), signature) {
			return p, nil
		}
	}
	return Published{}, fmt.Errorf("%s: %w", ref, ErrSignature)
}

// FileName returns how the file of a snapshot is called in a folder of snapshots.
func FileName(s contracts.SnapshotRef) string {
	return fmt.Sprintf("%020d-%s.db", s.Sequence, strings.TrimPrefix(s.Digest, "sha256:"))
}

// Fetch downloads a published snapshot into dir and returns its file, which is
// complete and what was signed. One that is there already is verified and used.
func Fetch(ctx context.Context, c Puller, from Repository, p Published, dir string) (file string, err error) {
	file = filepath.Join(dir, FileName(p.Snapshot))
	if verify(file, p.Snapshot) == nil {
		return file, nil
	}
	if p.layer.Size <= 0 || p.layer.Size > MaxBytes {
		return "", fmt.Errorf("advisory snapshot of %d bytes, allowed are %d: %w", p.layer.Size, int64(MaxBytes), ErrForeign)
	}
	body, err := c.Blob(ctx, from.Registry, from.Repository, p.layer)
	if err != nil {
		return "", fmt.Errorf("fetch advisory snapshot: %w", err)
	}
	defer func() { _ = body.Close() }()
	f, err := os.CreateTemp(dir, ".fetch-*")
	if err != nil {
		return "", fmt.Errorf("fetch advisory snapshot: %w", err)
	}
	defer func() { _ = os.Remove(f.Name()) }() // gone already when all went well
	_, err = io.Copy(f, io.LimitReader(body, p.layer.Size+1))
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return "", fmt.Errorf("fetch advisory snapshot: %w", err)
	}
	if err := verify(f.Name(), p.Snapshot); err != nil {
		return "", err
	}
	if err := os.Rename(f.Name(), file); err != nil {
		return "", fmt.Errorf("keep advisory snapshot: %w", err)
	}
	return file, nil
}

// verify says whether a file is the snapshot.
func verify(file string, want contracts.SnapshotRef) error {
	s, err := snapshot.Open(file)
	if err != nil {
		return fmt.Errorf("fetched advisory snapshot: %w", err)
	}
	defer func() { _ = s.Close() }()
	if s.Digest() != want.Digest || s.Sequence() != want.Sequence {
		return fmt.Errorf("content is %s with sequence %d, signed were %s and %d: %w",
			s.Digest(), s.Sequence(), want.Digest, want.Sequence, ErrForeign)
	}
	return nil
}
