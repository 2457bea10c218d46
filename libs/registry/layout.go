package registry

import (
	"archive/tar"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/regclient/regclient"
	"github.com/regclient/regclient/types/manifest"
	"github.com/regclient/regclient/types/mediatype"
	"github.com/regclient/regclient/types/ref"

	"github.com/tidewaiter/tidewaiter/contracts"
)

// Where an image on disk is said to be, as every image has a registry and a
// repository. The name is one that cannot exist (RFC 6761).
const (
	LayoutRegistry   = "disk.invalid"
	LayoutRepository = "image"
)

// Limits of an archive.
const (
	maxArchiveBytes   = 64 << 30 // unpacked
	maxArchiveEntries = 100_000
)

// layout is an OCI image layout on disk (image-spec, image-layout.md).
type layout struct {
	root   *os.Root // blobs cannot lead outside of it
	path   string
	top    []ocispec.Descriptor
	remove bool // delete the directory at the end
}

// OpenLayout returns a client that reads one OCI image layout directory and
// the reference of its image. path is DIR, DIR@digest, or either after
// "ocidir://". A layout with several images needs the digest: ErrAmbiguous.
func OpenLayout(path string) (*Client, Ref, error) {
	dir := strings.TrimPrefix(path, "ocidir://")
	want := ""
	if at := strings.LastIndex(dir, "@"); at >= 0 && contracts.ValidDigest(dir[at+1:]) {
		dir, want = dir[:at], dir[at+1:]
	}
	l, err := openLayout(dir)
	if err != nil {
		return nil, Ref{}, err
	}
	r := Ref{Registry: LayoutRegistry, Repository: LayoutRepository, Digest: want}
	if want == "" {
		if r.Digest, err = l.only(); err != nil {
			return nil, Ref{}, errors.Join(err, l.close())
		}
	}
	return &Client{layout: l}, r, nil
}

func openLayout(dir string) (*layout, error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, fmt.Errorf("open image layout: %w", err)
	}
	l := &layout{root: root, path: dir}
	if err := l.load(); err != nil {
		return nil, errors.Join(err, root.Close())
	}
	return l, nil
}

func (l *layout) load() error {
	body, err := l.small("index.json")
	if err != nil {
		return fmt.Errorf("image layout %s: read index.json: %w", l.path, err)
	}
	var index ocispec.Index
	if err := json.Unmarshal(body, &index); err != nil {
		return fmt.Errorf("image layout %s: index.json: %w", l.path, ErrUnknownManifest)
	}
	l.top = index.Manifests
	return nil
}

// only returns the digest of the layout's single image.
func (l *layout) only() (string, error) {
	var found []string
	for _, d := range l.top {
		if s := d.Digest.String(); !slices.Contains(found, s) {
			found = append(found, s)
		}
	}
	switch len(found) {
	case 0:
		return "", fmt.Errorf("image layout %s holds no image: %w", l.path, ErrNotFound)
	case 1:
		if !contracts.ValidDigest(found[0]) {
			return "", fmt.Errorf("image layout %s: digest %q: %w", l.path, found[0], ErrInvalidName)
		}
		return found[0], nil
	}
	shown := found[:min(len(found), 5)]
	return "", fmt.Errorf("image layout %s holds %d images: %w: add one of @%s", l.path, len(found), ErrAmbiguous, strings.Join(shown, " @"))
}

func (l *layout) close() error {
	err := l.root.Close()
	if l.remove {
		err = errors.Join(err, os.RemoveAll(l.path))
	}
	return err
}

// small reads a file of at most MaxManifestBytes.
func (l *layout) small(name string) (body []byte, err error) {
	f, err := l.root.Open(name)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	body, err = io.ReadAll(io.LimitReader(f, MaxManifestBytes+1))
	if err == nil && len(body) > MaxManifestBytes {
		err = ErrTooLarge
	}
	return body, err
}

func blobPath(d string) string {
	return filepath.Join("blobs", "sha256", strings.TrimPrefix(d, "sha256:"))
}

// find turns a tag (org.opencontainers.image.ref.name) into a digest.
func (l *layout) find(r Ref) (string, error) {
	if r.Digest != "" {
		return r.Digest, nil
	}
	for _, d := range l.top {
		if d.Annotations[ocispec.AnnotationRefName] == r.Tag && contracts.ValidDigest(d.Digest.String()) {
			return d.Digest.String(), nil
		}
	}
	return "", &Error{Kind: ErrNotFound, What: "look up " + r.Tag + " in image layout " + l.path}
}

func (l *layout) resolve(ctx context.Context, r Ref) (ocispec.Descriptor, error) {
	m, err := l.manifest(ctx, r)
	return m.Descriptor, err
}

func (l *layout) manifest(_ context.Context, r Ref) (Manifest, error) {
	d, err := l.find(r)
	if err != nil {
		return Manifest{}, err
	}
	what := "read manifest " + d + " of image layout " + l.path
	body, err := l.small(blobPath(d))
	if err != nil {
		return Manifest{}, l.failed(what, err)
	}
	if contracts.DigestOf(body) != d {
		return Manifest{}, &Error{Kind: ErrDigestMismatch, What: what}
	}
	// regclient tells the kind of a manifest that does not say it.
	m, err := manifest.New(manifest.WithRaw(body))
	if err != nil {
		return Manifest{}, &Error{Kind: ErrUnknownManifest, What: what}
	}
	return Manifest{Descriptor: ocispec.Descriptor{
		MediaType: m.GetDescriptor().MediaType, Digest: digest.Digest(d), Size: int64(len(body)),
	}, Body: body}, nil
}

// failed translates an error of the file system.
func (l *layout) failed(what string, err error) error {
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return &Error{Kind: ErrNotFound, What: what}
	case errors.Is(err, ErrTooLarge):
		return &Error{Kind: ErrTooLarge, What: what}
	}
	return fmt.Errorf("%s: %w", what, err)
}

func (l *layout) hasBlob(_ context.Context, r Ref) (bool, error) {
	info, err := l.root.Stat(blobPath(r.Digest))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("look up blob in image layout %s: %w", l.path, err)
	}
	return info.Mode().IsRegular(), nil
}

func (l *layout) blob(ctx context.Context, r Ref, size int64) (io.ReadCloser, error) {
	what := "read blob " + r.Digest + " of image layout " + l.path
	f, err := l.root.Open(blobPath(r.Digest))
	if err != nil {
		return nil, l.failed(what, err)
	}
	info, err := f.Stat()
	if err == nil && size > 0 && info.Size() != size {
		err = &Error{Kind: ErrDigestMismatch, What: what, Detail: fmt.Sprintf("%d bytes instead of %d", info.Size(), size)}
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return &verified{ctx: ctx, f: f, sum: sha256.New(), want: r.Digest, what: what}, nil
}

// verified reads a file and compares its digest at the end.
type verified struct {
	ctx  context.Context //nolint:containedctx // a reader has no other way to end early
	f    io.ReadCloser
	sum  hash.Hash
	want string
	what string
}

func (v *verified) Read(p []byte) (int, error) {
	if err := v.ctx.Err(); err != nil {
		return 0, fmt.Errorf("%s: %w", v.what, err)
	}
	n, err := v.f.Read(p)
	v.sum.Write(p[:n])
	if errors.Is(err, io.EOF) && "sha256:"+hex.EncodeToString(v.sum.Sum(nil)) != v.want {
		return n, &Error{Kind: ErrDigestMismatch, What: v.what}
	}
	return n, err
}

func (v *verified) Close() error { return v.f.Close() }

// referrers lists the entries of index.json that name the subject; a layout
// has no other list.
func (l *layout) referrers(ctx context.Context, r Ref, artifactType string) ([]ocispec.Descriptor, bool, error) {
	var list []ocispec.Descriptor
	for _, d := range l.top {
		if !contracts.ValidDigest(d.Digest.String()) {
			continue
		}
		m, err := l.manifest(ctx, Ref{Digest: d.Digest.String()})
		if err != nil {
			continue // not there, or not a manifest: refers to nothing
		}
		var v ocispec.Manifest
		if json.Unmarshal(m.Body, &v) != nil || v.Subject == nil || v.Subject.Digest.String() != r.Digest {
			continue
		}
		m.Descriptor.ArtifactType, m.Descriptor.Annotations = v.ArtifactType, v.Annotations
		if artifactType == "" || v.ArtifactType == artifactType {
			list = append(list, m.Descriptor)
		}
	}
	return list, false, nil
}

// OpenArchive returns a client that reads an image in a tar file, plain or
// gzip: what `docker save` writes, or an OCI image layout. It is unpacked into
// a directory of its own below tmpDir, which Client.Close deletes.
func OpenArchive(path, tmpDir string) (client *Client, image Ref, err error) {
	dir, err := os.MkdirTemp(tmpDir, "archive-*")
	if err != nil {
		return nil, Ref{}, fmt.Errorf("make a directory for %s: %w", path, err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.RemoveAll(dir))
		}
	}()
	if err := importArchive(path, dir); err != nil {
		return nil, Ref{}, fmt.Errorf("read image archive %s: %w", path, err)
	}
	client, image, err = OpenLayout(dir)
	if err != nil {
		return nil, Ref{}, fmt.Errorf("image archive %s: %w", path, err)
	}
	client.layout.remove = true
	return client, image, nil
}

// importArchive unpacks an archive into the image layout dir.
func importArchive(path, dir string) (err error) {
	f, err := os.Open(path) //nolint:gosec // the user's own file
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	plain, err := decompressed(f, dir)
	if err != nil {
		return err
	}
	if plain != f {
		defer func() { err = errors.Join(err, plain.Close(), os.Remove(plain.Name())) }()
	}
	if err := checkArchive(plain); err != nil {
		return err
	}
	if _, err := plain.Seek(0, io.SeekStart); err != nil {
		return err
	}
	rc := regclient.New()
	to := ref.Ref{Scheme: "ocidir", Path: dir, Reference: "ocidir://" + dir, Tag: "latest"}
	if err := rc.ImageImport(context.Background(), to, plain); err != nil {
		return fmt.Errorf("it is neither an OCI image layout nor written by docker save: %w", err)
	}
	return nil
}

// decompressed returns f, or a temporary file with what gzip made of it.
func decompressed(f *os.File, dir string) (*os.File, error) {
	magic := make([]byte, 2)
	n, err := io.ReadFull(f, magic)
	if err != nil && !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, io.EOF) {
		return nil, err
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return nil, err
	}
	if n < 2 || magic[0] != 0x1f || magic[1] != 0x8b {
		return f, nil
	}
	z, err := gzip.NewReader(f)
	if err != nil {
		return nil, fmt.Errorf("gunzip: %w", err)
	}
	out, err := os.CreateTemp(dir, "archive-*.tar")
	if err != nil {
		return nil, err
	}
	written, err := io.Copy(out, io.LimitReader(z, maxArchiveBytes+1))
	if err == nil && written > maxArchiveBytes {
		err = ErrTooLarge
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("gunzip: %w", err), out.Close())
	}
	if _, err := out.Seek(0, io.SeekStart); err != nil {
		return nil, errors.Join(err, out.Close())
	}
	return out, nil
}

// checkArchive reads the headers of a tar file: sparse entries can be far
// bigger than the file.
func checkArchive(f io.Reader) error {
	t := tar.NewReader(f)
	var bytes int64
	for entries := 0; ; entries++ {
		hdr, err := t.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("tar: %w", err)
		}
		bytes += hdr.Size
		if bytes > maxArchiveBytes || entries > maxArchiveEntries {
			return fmt.Errorf("tar: %w", ErrTooLarge)
		}
	}
}

// docker's schema 1 has no descriptor of its own in the image spec.
const (
	MediaTypeDockerSchema1       = mediatype.Docker1Manifest
	MediaTypeDockerSchema1Signed = mediatype.Docker1ManifestSigned
)
