// Package sample builds real container images out of generated content, for
// the demo, the end-to-end tests and the benchmarks: a Debian base, libraries
// of several languages, servers outside any package manager. The content only
// carries what analysis looks at; no program in it runs, but our own.
package sample

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/klauspost/compress/gzip"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/libs/registry"
)

// File is one entry of a layer. Missing parent directories are made.
type File struct {
	Path string
	Body []byte
	Mode int64 // default 0644
}

// Whiteout returns the entry that removes path from lower layers
// (image-spec, layer.md, "Whiteouts").
func Whiteout(name string) File {
	dir, base := path.Split(name)
	return File{Path: dir + ".wh." + base}
}

// Layer is a compressed layer.
type Layer struct {
	Instruction string
	Descriptor  ocispec.Descriptor
	DiffID      digest.Digest
	Content     []byte // gzip
	Size        int64  // bytes uncompressed
}

// NewLayer packs files, in order, into a reproducible gzip layer.
func NewLayer(instruction string, files ...File) (Layer, error) {
	var plain bytes.Buffer
	w := tar.NewWriter(&plain)
	made := map[string]bool{"": true, ".": true}
	for _, f := range files {
		if err := parents(w, made, f.Path); err != nil {
			return Layer{}, err
		}
		mode := f.Mode
		if mode == 0 {
			mode = 0o644
		}
		header := &tar.Header{Typeflag: tar.TypeReg, Name: f.Path, Size: int64(len(f.Body)), Mode: mode, ModTime: epoch}
		if err := w.WriteHeader(header); err != nil {
			return Layer{}, fmt.Errorf("pack %s: %w", f.Path, err)
		}
		if _, err := w.Write(f.Body); err != nil {
			return Layer{}, fmt.Errorf("pack %s: %w", f.Path, err)
		}
	}
	if err := w.Close(); err != nil {
		return Layer{}, fmt.Errorf("pack layer: %w", err)
	}
	var packed bytes.Buffer
	z, err := gzip.NewWriterLevel(&packed, gzip.BestSpeed)
	if err != nil {
		return Layer{}, fmt.Errorf("compress layer: %w", err)
	}
	if _, err := z.Write(plain.Bytes()); err != nil {
		return Layer{}, fmt.Errorf("compress layer: %w", err)
	}
	if err := z.Close(); err != nil {
		return Layer{}, fmt.Errorf("compress layer: %w", err)
	}
	return Layer{
		Instruction: instruction,
		DiffID:      digest.FromBytes(plain.Bytes()),
		Content:     packed.Bytes(),
		Size:        int64(plain.Len()),
		Descriptor: ocispec.Descriptor{
			MediaType: ocispec.MediaTypeImageLayerGzip,
			Digest:    digest.FromBytes(packed.Bytes()),
			Size:      int64(packed.Len()),
		},
	}, nil
}

// epoch is the time of everything, so that the same content has the same digest.
var epoch = time.Unix(1_700_000_000, 0).UTC()

func parents(w *tar.Writer, made map[string]bool, name string) error {
	dir := path.Dir(name)
	if made[dir] {
		return nil
	}
	if err := parents(w, made, dir); err != nil {
		return err
	}
	made[dir] = true
	header := &tar.Header{Typeflag: tar.TypeDir, Name: dir + "/", Mode: 0o755, ModTime: epoch}
	if err := w.WriteHeader(header); err != nil {
		return fmt.Errorf("pack %s: %w", dir, err)
	}
	return nil
}

// Image is one platform of an image.
type Image struct {
	Platform ocispec.Platform
	Layers   []Layer
	// Annotations and Subject are for tests of what is an image and what is not.
	Annotations map[string]string
	Subject     *ocispec.Descriptor
}

// Pushed says what a push stored.
type Pushed struct {
	Ref       registry.Ref // with tag and digest
	Platforms []ocispec.Descriptor
	Layers    []string // distinct layer digests, sorted
}

// String returns registry/repository@digest.
func (p Pushed) String() string { return p.Ref.Registry + "/" + p.Ref.Repository + "@" + p.Ref.Digest }

// Push uploads images, as an index when there is more than one platform, as a
// client would: blobs, then manifests, then the tag.
func Push(ctx context.Context, c *registry.Client, ref registry.Ref, images ...Image) (Pushed, error) {
	out := Pushed{Ref: ref}
	for _, img := range images {
		tag := ""
		if len(images) == 1 {
			tag = ref.Tag
		}
		d, err := pushImage(ctx, c, ref, tag, img)
		if err != nil {
			return Pushed{}, err
		}
		out.Platforms = append(out.Platforms, d)
		for _, l := range img.Layers {
			out.Layers = append(out.Layers, l.Descriptor.Digest.String())
		}
	}
	slices.Sort(out.Layers)
	out.Layers = slices.Compact(out.Layers)
	if len(images) == 1 {
		out.Ref.Digest = out.Platforms[0].Digest.String()
		return out, nil
	}
	body, err := json.Marshal(ocispec.Index{
		Versioned: specs.Versioned{SchemaVersion: 2},
		MediaType: ocispec.MediaTypeImageIndex,
		Manifests: out.Platforms,
	})
	if err != nil {
		return Pushed{}, fmt.Errorf("encode index: %w", err)
	}
	m := manifest(ocispec.MediaTypeImageIndex, body)
	if err := c.PushManifest(ctx, ref.Registry, ref.Repository, ref.Tag, m); err != nil {
		return Pushed{}, fmt.Errorf("push index of %s: %w", ref.Repository, err)
	}
	out.Ref.Digest = m.Descriptor.Digest.String()
	return out, nil
}

func pushImage(ctx context.Context, c *registry.Client, ref registry.Ref, tag string, img Image) (ocispec.Descriptor, error) {
	config := ocispec.Image{Created: &epoch, Platform: img.Platform}
	config.Config.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
	config.RootFS.Type = "layers"
	var layers []ocispec.Descriptor
	for _, l := range img.Layers {
		config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, l.DiffID)
		config.History = append(config.History, ocispec.History{Created: &epoch, CreatedBy: l.Instruction})
		layers = append(layers, l.Descriptor)
		have, err := c.HasBlob(ctx, ref.Registry, ref.Repository, l.Descriptor.Digest.String())
		if err != nil {
			return ocispec.Descriptor{}, fmt.Errorf("look for layer: %w", err)
		}
		if have {
			continue
		}
		if err := c.PushBlob(ctx, ref.Registry, ref.Repository, l.Descriptor, bytes.NewReader(l.Content)); err != nil {
			return ocispec.Descriptor{}, fmt.Errorf("push layer: %w", err)
		}
	}
	configBody, err := json.Marshal(config)
	if err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("encode config: %w", err)
	}
	configDescriptor := manifest(ocispec.MediaTypeImageConfig, configBody).Descriptor
	if err := c.PushBlob(ctx, ref.Registry, ref.Repository, configDescriptor, bytes.NewReader(configBody)); err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("push config: %w", err)
	}
	body, err := json.Marshal(ocispec.Manifest{
		Versioned:   specs.Versioned{SchemaVersion: 2},
		MediaType:   ocispec.MediaTypeImageManifest,
		Config:      configDescriptor,
		Layers:      layers,
		Subject:     img.Subject,
		Annotations: img.Annotations,
	})
	if err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("encode manifest: %w", err)
	}
	m := manifest(ocispec.MediaTypeImageManifest, body)
	if err := c.PushManifest(ctx, ref.Registry, ref.Repository, tag, m); err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("push manifest of %s: %w", ref.Repository, err)
	}
	platform := img.Platform
	d := m.Descriptor
	d.Platform = &platform
	return d, nil
}

func manifest(mediaType string, body []byte) registry.Manifest {
	return registry.Manifest{
		Descriptor: ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(body), Size: int64(len(body))},
		Body:       body,
	}
}

// file is shorthand for a text file.
func file(name string, lines ...string) File {
	return File{Path: name, Body: []byte(strings.Join(lines, "\n") + "\n")}
}
