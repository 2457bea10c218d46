package registry

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/regclient/regclient"
	"github.com/regclient/regclient/types/descriptor"
	"github.com/regclient/regclient/types/errs"
	"github.com/regclient/regclient/types/manifest"
	"golang.org/x/sync/errgroup"

	"github.com/tidewaiter/tidewaiter/contracts"
)

// owner is the value of contracts.AnnotationOwner on what Attach pushes.
const owner = "tidewaiter"

// copyParallel is how many blobs of an image are copied at once.
const copyParallel = 4

// Artifact is content to attach to an image as a referrer (OCI 1.1).
type Artifact struct {
	Type        string // artifactType of the manifest
	MediaType   string // of the content
	Content     []byte
	Annotations map[string]string
}

// Referrers lists what refers to a manifest, through the referrers API or the
// fallback tag; artifactType "" lists all. The descriptors of a fallback tag
// are the claims of whoever wrote it: read the manifest before believing them.
func (c *Client) Referrers(ctx context.Context, ref Ref, artifactType string) ([]ocispec.Descriptor, error) {
	ref, r, err := c.digested(ctx, ref)
	if err != nil {
		return nil, err
	}
	list, _, err := r.referrers(ctx, ref, artifactType)
	return list, err
}

// HasReferrersAPI says whether the registry answers the referrers API for the repository.
func (c *Client) HasReferrersAPI(ctx context.Context, ref Ref) (bool, error) {
	ref, r, err := c.digested(ctx, ref)
	if err != nil {
		return false, err
	}
	_, api, err := r.referrers(ctx, ref, "")
	return api, err
}

// AllReferrers is Referrers of all types that also says whether the referrers
// API answered. Where it did not, the list is that of the fallback tag, which
// may name manifests that are gone.
func (c *Client) AllReferrers(ctx context.Context, ref Ref) (list []ocispec.Descriptor, api bool, err error) {
	ref, r, err := c.digested(ctx, ref)
	if err != nil {
		return nil, false, err
	}
	return r.referrers(ctx, ref, "")
}

// digested resolves the tag of ref where it has no digest.
func (c *Client) digested(ctx context.Context, ref Ref) (Ref, reader, error) {
	r, err := c.reader(ref)
	if err != nil || ref.Digest != "" {
		return ref, r, err
	}
	d, err := r.resolve(ctx, ref)
	if err != nil {
		return ref, nil, err
	}
	ref.Digest = d.Digest.String()
	return ref, r, nil
}

// writable returns the host of r, after checking r.
func (c *Client) writable(r Ref) (*host, error) {
	if err := r.validate(); err != nil {
		return nil, err
	}
	if c.layout != nil {
		return nil, ErrReadOnly
	}
	return c.host(r.Registry, r.Repository)
}

// artifactManifest returns the manifest that attaches a to subject. It holds
// no time, so that the same content gives the same digest.
func artifactManifest(subject ocispec.Descriptor, a Artifact) (Manifest, error) {
	annotations := map[string]string{contracts.AnnotationOwner: owner}
	maps.Copy(annotations, a.Annotations)
	config := ocispec.DescriptorEmptyJSON
	config.Data = nil // some registries refuse it; the blob is there
	m := ocispec.Manifest{
		Versioned:    specs.Versioned{SchemaVersion: 2},
		MediaType:    ocispec.MediaTypeImageManifest,
		ArtifactType: a.Type,
		Config:       config,
		Layers: []ocispec.Descriptor{{
			MediaType: a.MediaType, Digest: digest.FromBytes(a.Content), Size: int64(len(a.Content)),
		}},
		Subject:     &ocispec.Descriptor{MediaType: subject.MediaType, Digest: subject.Digest, Size: subject.Size},
		Annotations: annotations,
	}
	body, err := json.Marshal(m)
	if err != nil {
		return Manifest{}, fmt.Errorf("encode manifest of an artifact: %w", err)
	}
	return Manifest{
		Descriptor: ocispec.Descriptor{
			MediaType: ocispec.MediaTypeImageManifest, ArtifactType: a.Type,
			Digest: digest.FromBytes(body), Size: int64(len(body)), Annotations: annotations,
		},
		Body: body,
	}, nil
}

// Attach pushes an artifact as a referrer of subject and returns its
// descriptor. Where the registry has no referrers API, the fallback tag is
// updated, read again and repaired; callers hold a lock per subject then.
// Pushing the same again is a no-op.
func (c *Client) Attach(ctx context.Context, registry, repository string, subject ocispec.Descriptor, a Artifact) (ocispec.Descriptor, error) {
	at := Ref{Registry: registry, Repository: repository, Digest: subject.Digest.String()}
	h, err := c.writable(at)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	m, err := artifactManifest(subject, a)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	self := at
	self.Digest = m.Descriptor.Digest.String()
	_, err = h.resolve(ctx, self)
	if err == nil {
		listed, err := h.lists(ctx, at, m.Descriptor.Digest)
		if err != nil || listed {
			return m.Descriptor, err
		}
	} else if !errors.Is(err, ErrNotFound) {
		return ocispec.Descriptor{}, err
	}
	for _, content := range [][]byte{ocispec.DescriptorEmptyJSON.Data, a.Content} {
		if err := c.ensureBlob(ctx, registry, repository, content); err != nil {
			return ocispec.Descriptor{}, err
		}
	}
	for range tries {
		acknowledged, err := h.push(ctx, self, "", m)
		if err != nil {
			return ocispec.Descriptor{}, err
		}
		if acknowledged {
			return m.Descriptor, nil
		}
		// The fallback tag was written: somebody else may have written it too.
		listed, err := h.lists(ctx, at, m.Descriptor.Digest)
		if err != nil {
			return ocispec.Descriptor{}, err
		}
		if listed {
			return m.Descriptor, nil
		}
	}
	return ocispec.Descriptor{}, &Error{Kind: ErrUnavailable, What: "attach to " + at.String(), Detail: "the list of referrers does not keep the new one"}
}

// lists says whether at's referrers include d.
func (h *host) lists(ctx context.Context, at Ref, d digest.Digest) (bool, error) {
	list, _, err := h.referrers(ctx, at, "")
	if err != nil {
		return false, err
	}
	return slices.ContainsFunc(list, func(e ocispec.Descriptor) bool { return e.Digest == d }), nil
}

// ensureBlob uploads small content unless it is there. That it is there is
// believed of one of its size only: the page of a portal answers for anything.
func (c *Client) ensureBlob(ctx context.Context, registry, repository string, content []byte) error {
	d := ocispec.Descriptor{Digest: digest.FromBytes(content), Size: int64(len(content))}
	at := Ref{Registry: registry, Repository: repository, Digest: d.Digest.String()}
	h, err := c.writable(at)
	if err != nil {
		return err
	}
	size, have, err := h.headBlob(ctx, at)
	if err != nil || have && size == d.Size {
		return err
	}
	return c.PushBlob(ctx, registry, repository, d, bytes.NewReader(content))
}

// Detach deletes a referrer's manifest and repairs the fallback tag. What is
// gone already is no error.
func (c *Client) Detach(ctx context.Context, registry, repository string, subject, referrer ocispec.Descriptor) error {
	at := Ref{Registry: registry, Repository: repository, Digest: subject.Digest.String()}
	h, err := c.writable(at)
	if err != nil {
		return err
	}
	self := at
	self.Digest = referrer.Digest.String()
	if err := self.validate(); err != nil {
		return err
	}
	what := "delete " + self.String()
	o := &op{}
	err = h.do(ctx, what, o, smallTimeout, tries, func(ctx context.Context, rc *regclient.RegClient) error {
		return rc.ManifestDelete(ctx, h.ref(self))
	})
	if err != nil && !errors.Is(err, ErrNotFound) {
		var e *Error
		if errors.As(err, &e) && o.status == 405 {
			e.Detail = "deleting is switched off in this registry"
		}
		return err
	}
	_, api, err := h.referrers(ctx, at, "")
	if err != nil || api {
		return err
	}
	return h.unlist(ctx, at, referrer.Digest)
}

// Delete deletes a manifest by its digest, and with it the tags that point at
// it. What is gone already is no error.
func (c *Client) Delete(ctx context.Context, r Ref) error {
	h, err := c.writable(r)
	if err != nil {
		return err
	}
	if r.Digest == "" {
		return fmt.Errorf("delete %s: a digest is needed: %w", r, ErrInvalidName)
	}
	err = h.do(ctx, "delete "+r.String(), &op{}, smallTimeout, tries, func(ctx context.Context, rc *regclient.RegClient) error {
		return rc.ManifestDelete(ctx, h.ref(r))
	})
	if errors.Is(err, ErrNotFound) {
		return nil
	}
	return err
}

// fallbackTag is the tag of the list of referrers where there is no API
// (distribution-spec, "Referrers Tag Schema").
func fallbackTag(subject string) string { return strings.Replace(subject, ":", "-", 1) }

// unlist takes an entry out of the fallback tag. The list stays, empty, as
// registries of this kind cannot delete a tag alone.
func (h *host) unlist(ctx context.Context, at Ref, gone digest.Digest) error {
	tag := Ref{Registry: at.Registry, Repository: at.Repository, Tag: fallbackTag(at.Digest)}
	m, err := h.manifest(ctx, tag)
	if errors.Is(err, ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	var index ocispec.Index
	if err := json.Unmarshal(m.Body, &index); err != nil {
		return &Error{Kind: ErrUnknownManifest, What: "read the list of referrers " + tag.String()}
	}
	kept := slices.DeleteFunc(slices.Clone(index.Manifests), func(d ocispec.Descriptor) bool { return d.Digest == gone })
	if len(kept) == len(index.Manifests) {
		return nil
	}
	index.Manifests = kept
	if index.Manifests == nil {
		index.Manifests = []ocispec.Descriptor{}
	}
	body, err := json.Marshal(index)
	if err != nil {
		return fmt.Errorf("encode the list of referrers: %w", err)
	}
	_, err = h.push(ctx, tag, tag.Tag, Manifest{Descriptor: ocispec.Descriptor{MediaType: m.Descriptor.MediaType}, Body: body})
	return err
}

// ArtifactContent returns the single layer of an artifact's manifest, at most limit bytes.
func (c *Client) ArtifactContent(ctx context.Context, registry, repository, manifestDigest string, limit int64) (Artifact, error) {
	ref := Ref{Registry: registry, Repository: repository, Digest: manifestDigest}
	m, err := c.Manifest(ctx, ref)
	if err != nil {
		return Artifact{}, err
	}
	var v ocispec.Manifest
	if err := json.Unmarshal(m.Body, &v); err != nil || len(v.Layers) != 1 {
		return Artifact{}, &Error{Kind: ErrUnknownManifest, What: "read artifact " + ref.String(), Detail: "it has not exactly one layer"}
	}
	content, err := c.ReadBlob(ctx, registry, repository, v.Layers[0], limit)
	if err != nil {
		return Artifact{}, err
	}
	artifactType := v.ArtifactType
	if artifactType == "" {
		artifactType = v.Config.MediaType // image-spec, manifest.md, "Guidelines for Artifact Usage"
	}
	return Artifact{Type: artifactType, MediaType: v.Layers[0].MediaType, Content: content, Annotations: v.Annotations}, nil
}

// PushBlob uploads a blob of known digest and size. It is tried again after a
// failure only if content is an io.ReaderAt, which is read from its start.
func (c *Client) PushBlob(ctx context.Context, registry, repository string, d ocispec.Descriptor, content io.Reader) error {
	at := Ref{Registry: registry, Repository: repository, Digest: d.Digest.String()}
	h, err := c.writable(at)
	if err != nil {
		return err
	}
	// A try that failed may go on reading for a while: each has a reader of its
	// own, which regclient cannot set back for retries of its own.
	whole := func() io.Reader { return content }
	attempts := 1
	if again, ok := content.(io.ReaderAt); ok {
		whole = func() io.Reader { return struct{ io.Reader }{io.NewSectionReader(again, 0, d.Size)} }
		attempts = tries
	}
	timeout := smallTimeout + time.Duration(d.Size/minRate)*time.Second
	o := &op{kind: opUpload, size: d.Size}
	return h.do(ctx, "upload blob "+at.String(), o, timeout, attempts,
		func(ctx context.Context, rc *regclient.RegClient) error {
			put := func(size int64) error {
				_, err := rc.BlobPut(ctx, h.repo(at), descriptor.Descriptor{Digest: d.Digest, Size: size}, whole())
				return err
			}
			err := put(d.Size)
			if err == nil || attempts == 1 {
				return err
			}
			switch o.uploaded() {
			case http.StatusUnauthorized: // where the upload leads has asked for credentials, which it is given now
				return put(d.Size)
			case http.StatusRequestEntityTooLarge: // a proxy; without a size it goes in chunks
				return put(0)
			}
			return err
		})
}

// PushManifest uploads a manifest under its digest, and under tag too when that is set.
func (c *Client) PushManifest(ctx context.Context, registry, repository, tag string, m Manifest) error {
	at := Ref{Registry: registry, Repository: repository, Digest: contracts.DigestOf(m.Body)}
	h, err := c.writable(at)
	if err != nil {
		return err
	}
	if tag != "" && !contracts.ValidTag(tag) {
		return fmt.Errorf("tag %q: %w", tag, ErrInvalidName)
	}
	_, err = h.push(ctx, at, tag, m)
	return err
}

// push uploads m under its digest, or under tag where that is set. It says
// whether the registry acknowledged m's subject, that is keeps referrers itself.
func (h *host) push(ctx context.Context, at Ref, tag string, m Manifest) (acknowledged bool, err error) {
	if len(m.Body) > MaxManifestBytes {
		return false, fmt.Errorf("manifest of %d bytes for %s, allowed are %d: %w", len(m.Body), at, MaxManifestBytes, ErrTooLarge)
	}
	mediaType := m.Descriptor.MediaType
	to := Ref{Registry: at.Registry, Repository: at.Repository, Digest: contracts.DigestOf(m.Body)}
	if tag != "" {
		to.Tag, to.Digest = tag, ""
	}
	rm, err := manifest.New(manifest.WithRaw(m.Body), manifest.WithDesc(descriptor.Descriptor{MediaType: mediatypeOf(mediaType, m.Body)}))
	if err != nil {
		kind := ErrRefused
		if errors.Is(err, errs.ErrUnsupportedMediaType) {
			kind = ErrUnknownManifest
		}
		return false, &Error{Kind: kind, What: "upload manifest " + to.String(), Detail: "it cannot be parsed"}
	}
	o := &op{}
	err = h.do(ctx, "upload manifest "+to.String(), o, smallTimeout, tries, func(ctx context.Context, rc *regclient.RegClient) error {
		return rc.ManifestPut(ctx, h.ref(to), rm)
	})
	return o.subjectAck, err
}

// mediatypeOf returns mediaType, or what the body says where it is empty.
func mediatypeOf(mediaType string, body []byte) string {
	if mediaType != "" {
		return mediaType
	}
	var v struct {
		MediaType string `json:"mediaType"`
	}
	if json.Unmarshal(body, &v) != nil {
		return ""
	}
	return v.MediaType
}

// Copy copies an image with all platforms (not its referrers). to needs a
// repository; its tag may be empty, its digest is ignored. from may be in
// another client's registry: see CopyFrom.
func (c *Client) Copy(ctx context.Context, from, to Ref) (ocispec.Descriptor, error) {
	return c.CopyFrom(ctx, c, from, to)
}

// CopyFrom is Copy with a source that another client reads, for example an
// image layout.
func (c *Client) CopyFrom(ctx context.Context, source *Client, from, to Ref) (ocispec.Descriptor, error) {
	m, err := source.Manifest(ctx, from)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	if err := c.copyContent(ctx, source, from, to, m, 0); err != nil {
		return ocispec.Descriptor{}, err
	}
	if err := c.PushManifest(ctx, to.Registry, to.Repository, to.Tag, m); err != nil {
		return ocispec.Descriptor{}, err
	}
	return m.Descriptor, nil
}

// copyContent copies what m refers to.
func (c *Client) copyContent(ctx context.Context, source *Client, from, to Ref, m Manifest, depth int) error {
	if depth > MaxNesting {
		return &Error{Kind: ErrTooLarge, What: "copy " + from.String(), Detail: "indexes are nested too deep"}
	}
	var v struct {
		Config    *ocispec.Descriptor  `json:"config"`
		Layers    []ocispec.Descriptor `json:"layers"`
		Manifests []ocispec.Descriptor `json:"manifests"`
	}
	if err := json.Unmarshal(m.Body, &v); err != nil {
		return &Error{Kind: ErrUnknownManifest, What: "copy " + from.String()}
	}
	for _, d := range v.Manifests {
		at := Ref{Registry: from.Registry, Repository: from.Repository, Digest: d.Digest.String()}
		child, err := source.Manifest(ctx, at)
		if err != nil {
			return err
		}
		if err := c.copyContent(ctx, source, at, to, child, depth+1); err != nil {
			return err
		}
		if err := c.PushManifest(ctx, to.Registry, to.Repository, "", child); err != nil {
			return err
		}
	}
	blobs := v.Layers
	if v.Config != nil {
		blobs = append(blobs, *v.Config)
	}
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(copyParallel)
	seen := map[digest.Digest]bool{}
	for _, d := range blobs {
		if seen[d.Digest] || len(d.URLs) > 0 {
			continue // a foreign layer stays where it is
		}
		seen[d.Digest] = true
		g.Go(func() error { return c.copyBlob(ctx, source, from, to, d) })
	}
	return g.Wait()
}

func (c *Client) copyBlob(ctx context.Context, source *Client, from, to Ref, d ocispec.Descriptor) (err error) {
	have, err := c.HasBlob(ctx, to.Registry, to.Repository, d.Digest.String())
	if err != nil || have {
		return err
	}
	rc, err := source.Blob(ctx, from.Registry, from.Repository, d)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, rc.Close()) }()
	return c.PushBlob(ctx, to.Registry, to.Repository, d, struct{ io.Reader }{rc})
}
