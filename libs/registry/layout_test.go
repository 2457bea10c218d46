package registry

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// writeLayout writes an image layout with the given images, of one layer each.
func writeLayout(t *testing.T, dir string, layers ...[]byte) []Manifest {
	t.Helper()
	blobs := filepath.Join(dir, "blobs", "sha256")
	if err := os.MkdirAll(blobs, 0o750); err != nil {
		t.Fatal(err)
	}
	write := func(path string, b []byte) {
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	blob := func(mediaType string, b []byte) ocispec.Descriptor {
		d := descriptorOf(mediaType, b)
		write(filepath.Join(blobs, d.Digest.Encoded()), b)
		return d
	}
	index := ocispec.Index{MediaType: ocispec.MediaTypeImageIndex}
	index.SchemaVersion = 2
	var out []Manifest
	for i, l := range layers {
		m := ocispec.Manifest{
			MediaType: ocispec.MediaTypeImageManifest,
			Config:    blob(ocispec.MediaTypeImageConfig, []byte(`{"os":"linux","architecture":"amd64"}`)),
			Layers:    []ocispec.Descriptor{blob(ocispec.MediaTypeImageLayerGzip, l)},
		}
		m.SchemaVersion = 2
		body := encode(t, m)
		d := blob(ocispec.MediaTypeImageManifest, body)
		out = append(out, Manifest{Descriptor: d, Body: body})
		d.Annotations = map[string]string{ocispec.AnnotationRefName: fmt.Sprint("v", i+1)}
		index.Manifests = append(index.Manifests, d)
	}
	write(filepath.Join(dir, "index.json"), encode(t, index))
	write(filepath.Join(dir, "oci-layout"), []byte(`{"imageLayoutVersion":"1.0.0"}`))
	return out
}

func TestLayout(t *testing.T) {
	dir := t.TempDir()
	layer := random(t, 100_000)
	m := writeLayout(t, dir, layer)[0]
	for _, path := range []string{dir, "ocidir://" + dir, "ocidir://" + dir + "@" + m.Descriptor.Digest.String()} {
		c, ref, err := OpenLayout(path)
		if err != nil {
			t.Fatalf("%s: %v", path, err)
		}
		got, err := c.Manifest(t.Context(), ref)
		if err != nil || !bytes.Equal(got.Body, m.Body) || got.Descriptor.MediaType != ocispec.MediaTypeImageManifest {
			t.Errorf("%s: %+v, %v", path, got.Descriptor, err)
		}
		b, err := readAll(t, c, ref.Registry, ref.Repository, descriptorOf("", layer))
		if err != nil || !bytes.Equal(b, layer) {
			t.Errorf("%s: %d bytes, %v", path, len(b), err)
		}
		if have, err := c.HasBlob(t.Context(), ref.Registry, ref.Repository, digest.FromString("no").String()); have || err != nil {
			t.Errorf("%v, %v", have, err)
		}
		if d, err := c.Resolve(t.Context(), Ref{Registry: ref.Registry, Repository: ref.Repository, Tag: "v1"}); err != nil || d.Digest != m.Descriptor.Digest {
			t.Errorf("tag: %v, %v", d, err)
		}
		if err := c.PushManifest(t.Context(), ref.Registry, ref.Repository, "", m); !errors.Is(err, ErrReadOnly) {
			t.Errorf("push: %v", err)
		}
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	}
}

func TestLayoutThatIsNotAsItSays(t *testing.T) {
	t.Run("several images", func(t *testing.T) {
		dir := t.TempDir()
		m := writeLayout(t, dir, []byte("one"), []byte("two"))
		_, _, err := OpenLayout(dir)
		if !errors.Is(err, ErrAmbiguous) || !strings.Contains(err.Error(), "@"+m[1].Descriptor.Digest.String()) {
			t.Errorf("%v", err)
		}
		c, ref, err := OpenLayout(dir + "@" + m[1].Descriptor.Digest.String())
		if err != nil || ref.Digest != m[1].Descriptor.Digest.String() {
			t.Fatalf("%v, %v", ref, err)
		}
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	t.Run("none", func(t *testing.T) {
		if _, _, err := OpenLayout(filepath.Join(t.TempDir(), "none")); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%v", err)
		}
		if _, _, err := OpenLayout(t.TempDir()); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%v", err)
		}
	})
	t.Run("changed blobs", func(t *testing.T) {
		dir := t.TempDir()
		layer := []byte("layer")
		m := writeLayout(t, dir, layer)[0]
		c, ref, err := OpenLayout(dir)
		if err != nil {
			t.Fatal(err)
		}
		blob := func(d ocispec.Descriptor) string { return filepath.Join(dir, blobPath(d.Digest.String())) }
		for _, content := range []string{"Layer", "longer layer"} {
			if err := os.WriteFile(blob(descriptorOf("", layer)), []byte(content), 0o600); err != nil {
				t.Fatal(err)
			}
			if _, err := readAll(t, c, ref.Registry, ref.Repository, descriptorOf("", layer)); !errors.Is(err, ErrDigestMismatch) {
				t.Errorf("blob: %v", err)
			}
		}
		if err := os.WriteFile(blob(m.Descriptor), []byte("{}"), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := c.Manifest(t.Context(), ref); !errors.Is(err, ErrDigestMismatch) {
			t.Errorf("manifest: %v", err)
		}
		// A link cannot lead out of the layout.
		if err := os.Remove(blob(m.Descriptor)); err != nil {
			t.Fatal(err)
		}
		outside := filepath.Join(t.TempDir(), "outside")
		if err := errors.Join(os.WriteFile(outside, m.Body, 0o600), os.Symlink(outside, blob(m.Descriptor))); err != nil {
			t.Fatal(err)
		}
		if _, err := c.Manifest(t.Context(), ref); err == nil {
			t.Error("a link led out of the layout")
		}
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
}

// tarOf writes files into a tar file, gzip if the name ends so.
func tarOf(t *testing.T, path string, files map[string][]byte, order ...string) {
	t.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, name := range order {
		if err := w.WriteHeader(&tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o644, Size: int64(len(files[name]))}); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(files[name]); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	content := buf.Bytes()
	if strings.HasSuffix(path, ".gz") {
		var z bytes.Buffer
		g := gzip.NewWriter(&z)
		if _, err := g.Write(content); err != nil {
			t.Fatal(err)
		}
		if err := g.Close(); err != nil {
			t.Fatal(err)
		}
		content = z.Bytes()
	}
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestArchive(t *testing.T) {
	dir := t.TempDir()
	layer := []byte("a layer")

	layout := filepath.Join(dir, "layout")
	writeLayout(t, layout, layer)
	files := map[string][]byte{}
	var order []string
	err := filepath.WalkDir(layout, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		name, err := filepath.Rel(layout, path)
		if err != nil {
			return err
		}
		files[name], err = os.ReadFile(path)
		order = append(order, name)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	tarOf(t, filepath.Join(dir, "oci.tar"), files, order...)
	tarOf(t, filepath.Join(dir, "oci.tar.gz"), files, order...)

	cfg := []byte(`{"os":"linux","architecture":"amd64","rootfs":{"type":"layers","diff_ids":["` + digest.FromBytes(layer).String() + `"]}}`)
	docker := map[string][]byte{
		"manifest.json": []byte(`[{"Config":"` + digest.FromBytes(cfg).Encoded() + `.json","RepoTags":["app:v1"],"Layers":["abc/layer.tar"]}]`),
		digest.FromBytes(cfg).Encoded() + ".json": cfg,
		"abc/layer.tar": layer,
	}
	tarOf(t, filepath.Join(dir, "docker.tar"), docker, "manifest.json", digest.FromBytes(cfg).Encoded()+".json", "abc/layer.tar")
	// docker save writes manifest.json last.
	tarOf(t, filepath.Join(dir, "docker.tar.gz"), docker, "abc/layer.tar", digest.FromBytes(cfg).Encoded()+".json", "manifest.json")

	for _, name := range []string{"oci.tar", "oci.tar.gz", "docker.tar", "docker.tar.gz"} {
		t.Run(name, func(t *testing.T) {
			tmp := t.TempDir()
			c, ref, err := OpenArchive(filepath.Join(dir, name), tmp)
			if err != nil {
				t.Fatal(err)
			}
			m, err := c.Manifest(t.Context(), ref)
			if err != nil {
				t.Fatal(err)
			}
			var v ocispec.Manifest
			if err := json.Unmarshal(m.Body, &v); err != nil || len(v.Layers) != 1 {
				t.Fatalf("%s, %v", m.Body, err)
			}
			if _, err := readAll(t, c, ref.Registry, ref.Repository, v.Layers[0]); err != nil {
				t.Fatal(err)
			}
			if err := c.Close(); err != nil {
				t.Error(err)
			}
			left, err := os.ReadDir(tmp)
			if err != nil || len(left) != 0 {
				t.Errorf("left behind: %v, %v", left, err)
			}
		})
	}
}

func TestArchiveThatIsNone(t *testing.T) {
	dir := t.TempDir()
	tarOf(t, filepath.Join(dir, "other.tar"), map[string][]byte{"a": []byte("x")}, "a")
	if err := os.WriteFile(filepath.Join(dir, "text"), []byte("no archive"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "broken.gz"), []byte{0x1f, 0x8b, 1, 2, 3}, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "empty"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"other.tar", "text", "broken.gz", "empty", "none"} {
		tmp := t.TempDir()
		if _, _, err := OpenArchive(filepath.Join(dir, name), tmp); err == nil {
			t.Errorf("%s: no error", name)
		}
		if left, err := os.ReadDir(tmp); err != nil || len(left) != 0 {
			t.Errorf("%s: left behind: %v, %v", name, left, err)
		}
	}
}

func TestCopy(t *testing.T) {
	_, from := olaregServer(t, true)
	_, to := olaregServer(t, false)
	c := newClient(t, Host{Name: from, PlainHTTP: true, Concurrency: 1}, Host{Name: to, PlainHTTP: true, Concurrency: 1})
	shared := random(t, 200_000)
	var index ocispec.Index
	index.SchemaVersion = 2
	index.MediaType = ocispec.MediaTypeImageIndex
	for range 2 {
		m := pushImage(t, c, from, "app", "", shared, random(t, 10_000))
		index.Manifests = append(index.Manifests, m.Descriptor)
	}
	body := encode(t, index)
	m := Manifest{Descriptor: descriptorOf(ocispec.MediaTypeImageIndex, body), Body: body}
	if err := c.PushManifest(t.Context(), from, "app", "v1", m); err != nil {
		t.Fatal(err)
	}
	// Between registries, and between repositories of one.
	for _, target := range []Ref{{Registry: to, Repository: "copy", Tag: "v2"}, {Registry: from, Repository: "copy", Tag: "v2"}} {
		d, err := c.Copy(t.Context(), Ref{Registry: from, Repository: "app", Tag: "v1"}, target)
		if err != nil || d.Digest != m.Descriptor.Digest {
			t.Fatalf("%v, %v", d, err)
		}
		got, err := c.Resolve(t.Context(), target)
		if err != nil || got.Digest != m.Descriptor.Digest {
			t.Errorf("%v, %v", got, err)
		}
		if b, err := readAll(t, c, target.Registry, target.Repository, descriptorOf("", shared)); err != nil || !bytes.Equal(b, shared) {
			t.Errorf("%d bytes, %v", len(b), err)
		}
	}
	t.Run("from a layout", func(t *testing.T) {
		dir := t.TempDir()
		m := writeLayout(t, dir, []byte("layer"))[0]
		source, ref, err := OpenLayout(dir)
		if err != nil {
			t.Fatal(err)
		}
		d, err := c.CopyFrom(t.Context(), source, ref, Ref{Registry: to, Repository: "layout", Tag: "v1"})
		if err != nil || d.Digest != m.Descriptor.Digest {
			t.Errorf("%v, %v", d, err)
		}
		if err := source.Close(); err != nil {
			t.Error(err)
		}
	})
}

// FuzzIndex: whatever an index.json holds, a layout opens or says why not.
func FuzzIndex(f *testing.F) {
	f.Add([]byte(`{"schemaVersion":2,"manifests":[{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"` + digest.FromString("x").String() + `","size":1}]}`))
	f.Add([]byte(`{"manifests":[{"digest":"sha256:../../../etc/passwd"}]}`))
	f.Fuzz(func(t *testing.T, index []byte) {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, "index.json"), index, 0o600); err != nil {
			t.Fatal(err)
		}
		c, ref, err := OpenLayout(dir)
		if err != nil {
			return
		}
		if _, err := c.Manifest(t.Context(), ref); !errors.Is(err, ErrNotFound) {
			t.Errorf("%v", err)
		}
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
}
