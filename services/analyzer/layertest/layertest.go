// Package layertest builds image layers for tests and demonstrations.
package layertest

import (
	"archive/tar"
	"archive/zip"
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"sort"
	"strings"
	"time"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
)

// epoch is the modification time of everything built, so that the same input
// gives the same bytes.
var epoch = time.Unix(1700000000, 0)

// Option adds to a layer.
type Option func(w *tar.Writer) error

// File adds a regular file with mode 0644.
func File(name string, content []byte) Option { return FileMode(name, content, 0o644) }

// Text adds a regular file with mode 0644.
func Text(name, content string) Option { return FileMode(name, []byte(content), 0o644) }

// Executable adds a regular file with mode 0755.
func Executable(name string, content []byte) Option { return FileMode(name, content, 0o755) }

// FileMode adds a regular file.
func FileMode(name string, content []byte, mode int64) Option {
	return func(w *tar.Writer) error {
		h := &tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: mode, Size: int64(len(content)), ModTime: epoch}
		if err := w.WriteHeader(h); err != nil {
			return err
		}
		_, err := w.Write(content)
		return err
	}
}

// Dir adds a directory.
func Dir(name string) Option {
	return Header(tar.Header{Typeflag: tar.TypeDir, Name: strings.TrimSuffix(name, "/") + "/", Mode: 0o755, ModTime: epoch})
}

// Symlink adds a symbolic link to target.
func Symlink(name, target string) Option {
	return Header(tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: target, Mode: 0o777, ModTime: epoch})
}

// Hardlink adds a hard link to target, a path in the layer.
func Hardlink(name, target string) Option {
	return Header(tar.Header{Typeflag: tar.TypeLink, Name: name, Linkname: target, Mode: 0o644, ModTime: epoch})
}

// Whiteout removes a path of lower layers (image-spec, layer.md, "Whiteouts").
func Whiteout(name string) Option {
	dir, base := "", name
	if i := strings.LastIndexByte(name, '/'); i >= 0 {
		dir, base = name[:i+1], name[i+1:]
	}
	return File(dir+".wh."+base, nil)
}

// Opaque hides what lower layers have in a directory.
func Opaque(dir string) Option { return File(strings.TrimSuffix(dir, "/")+"/.wh..wh..opq", nil) }

// Header adds an entry without content.
func Header(h tar.Header) Option {
	return func(w *tar.Writer) error { return w.WriteHeader(&h) }
}

// Layer is a built layer.
type Layer struct {
	Tar        []byte // uncompressed
	Compressed []byte
	MediaType  string
	Digest     string // of Compressed
	DiffID     string // of Tar
}

// Tar returns the uncompressed layer. It panics on what cannot be written, as
// only tests and demonstrations call it, with content of their own.
func Tar(options ...Option) []byte {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, o := range options {
		if err := o(w); err != nil {
			panic(fmt.Sprintf("build layer: %v", err))
		}
	}
	if err := w.Close(); err != nil {
		panic(fmt.Sprintf("build layer: %v", err))
	}
	return b.Bytes()
}

// Gzip returns a layer compressed with gzip.
func Gzip(options ...Option) Layer {
	t := Tar(options...)
	return newLayer(t, GzipBytes(t), "application/vnd.oci.image.layer.v1.tar+gzip")
}

// Zstd returns a layer compressed with zstd.
func Zstd(options ...Option) Layer {
	t := Tar(options...)
	return newLayer(t, ZstdBytes(t), "application/vnd.oci.image.layer.v1.tar+zstd")
}

// Plain returns a layer that is not compressed.
func Plain(options ...Option) Layer {
	t := Tar(options...)
	return newLayer(t, t, "application/vnd.oci.image.layer.v1.tar")
}

func newLayer(t, compressed []byte, mediaType string) Layer {
	return Layer{Tar: t, Compressed: compressed, MediaType: mediaType, Digest: Digest(compressed), DiffID: Digest(t)}
}

// Digest returns the sha256 digest of b as OCI writes it.
func Digest(b []byte) string {
	sum := sha256.Sum256(b)
	return "sha256:" + hex.EncodeToString(sum[:])
}

// GzipBytes compresses b.
func GzipBytes(b []byte) []byte {
	var out bytes.Buffer
	w := gzip.NewWriter(&out)
	if _, err := w.Write(b); err != nil {
		panic(fmt.Sprintf("gzip: %v", err))
	}
	if err := w.Close(); err != nil {
		panic(fmt.Sprintf("gzip: %v", err))
	}
	return out.Bytes()
}

// ZstdBytes compresses b.
func ZstdBytes(b []byte) []byte {
	var out bytes.Buffer
	w, err := zstd.NewWriter(&out, zstd.WithEncoderConcurrency(1))
	if err != nil {
		panic(fmt.Sprintf("zstd: %v", err))
	}
	if _, err := w.Write(b); err != nil {
		panic(fmt.Sprintf("zstd: %v", err))
	}
	if err := w.Close(); err != nil {
		panic(fmt.Sprintf("zstd: %v", err))
	}
	return out.Bytes()
}

// Zip returns an archive of the given members, in the order of their names.
func Zip(members map[string][]byte) []byte {
	names := make([]string, 0, len(members))
	for name := range members {
		names = append(names, name)
	}
	sort.Strings(names)
	var b bytes.Buffer
	w := zip.NewWriter(&b)
	for _, name := range names {
		f, err := w.CreateHeader(&zip.FileHeader{Name: name, Method: zip.Deflate})
		if err != nil {
			panic(fmt.Sprintf("zip: %v", err))
		}
		if _, err := f.Write(members[name]); err != nil {
			panic(fmt.Sprintf("zip: %v", err))
		}
	}
	if err := w.Close(); err != nil {
		panic(fmt.Sprintf("zip: %v", err))
	}
	return b.Bytes()
}

// Jar returns a jar as Maven builds it: with a manifest and pom.properties, and
// with further members.
func Jar(group, artifact, version string, more map[string][]byte) []byte {
	members := map[string][]byte{
		"META-INF/MANIFEST.MF": []byte("Manifest-Version: 1.0\r\nImplementation-Version: " + version + "\r\n\r\n"),
		"META-INF/maven/" + group + "/" + artifact + "/pom.properties": []byte("groupId=" + group + "\nartifactId=" + artifact + "\nversion=" + version + "\n"),
	}
	for name, content := range more {
		members[name] = content
	}
	return Zip(members)
}

// ELF returns a small ELF file (64 bit, x86-64) whose one section holds data;
// a string in it is found by whatever looks through executables.
func ELF(data []byte) []byte { return elf(".rodata", data) }

// Module is a dependency in a Go binary's build information.
type Module struct{ Path, Version string }

// GoBinary returns an ELF file that carries the build information of a Go
// program (as go version -m shows it) and nothing else: built by the toolchain
// goVersion, for example "go1.16.3", from main with deps.
func GoBinary(goVersion string, main Module, deps ...Module) []byte {
	var mod strings.Builder
	fmt.Fprintf(&mod, "path\t%s\nmod\t%s\t%s\t\n", main.Path, main.Path, main.Version)
	for _, d := range deps {
		fmt.Fprintf(&mod, "dep\t%s\t%s\th1:%s\n", d.Path, d.Version, "q83vEjRWeJCrze8SNFZ4kKvN7xI0VniQq83vEjRWeJA=")
	}
	// The text stands between two 16-byte marks (runtime/debug, modinfo).
	info := "\x30\x77\xaf\x0c\x92\x74\x08\x02\x41\xe1\xc1\x07\xe6\xd6\x18\xe6" + mod.String() +
		"\xf9\x32\x43\x31\x86\x18\x20\x72\x00\x82\x42\x10\x41\x16\xd8\xf2"

	b := []byte("\xff Go buildinf:")
	b = append(b, 8, 2) // pointer size; flag: strings stand inline (debug/buildinfo)
	b = append(b, make([]byte, 32-len(b))...)
	b = binary.AppendUvarint(b, uint64(len(goVersion)))
	b = append(b, goVersion...)
	b = binary.AppendUvarint(b, uint64(len(info)))
	b = append(b, info...)
	return elf(".go.buildinfo", b)
}

// elf writes an ELF64 file with one loaded, writable segment that holds data,
// and the section headers that name it.
func elf(section string, data []byte) []byte {
	const (
		headerSize, programSize, sectionSize = 64, 56, 64
		base                                 = 0x400000
		dataAt                               = 0x1000
	)
	names := "\x00" + section + "\x00.shstrtab\x00"
	namesAt := dataAt + len(data)
	sectionsAt := (namesAt + len(names) + 15) &^ 15

	out := make([]byte, sectionsAt+3*sectionSize)
	le := binary.LittleEndian
	copy(out, "\x7fELF\x02\x01\x01")
	le.PutUint16(out[16:], 2)  // ET_EXEC
	le.PutUint16(out[18:], 62) // EM_X86_64
	le.PutUint32(out[20:], 1)
	le.PutUint64(out[24:], base+dataAt)
	le.PutUint64(out[32:], headerSize)
	le.PutUint64(out[40:], uint64(sectionsAt)) // #nosec G115 -- a length
	le.PutUint16(out[52:], headerSize)
	le.PutUint16(out[54:], programSize)
	le.PutUint16(out[56:], 1)
	le.PutUint16(out[58:], sectionSize)
	le.PutUint16(out[60:], 3)
	le.PutUint16(out[62:], 2)

	p := out[headerSize:]
	le.PutUint32(p[0:], 1) // PT_LOAD
	le.PutUint32(p[4:], 6) // read, write
	le.PutUint64(p[8:], dataAt)
	le.PutUint64(p[16:], base+dataAt)
	le.PutUint64(p[24:], base+dataAt)
	le.PutUint64(p[32:], uint64(len(data)))
	le.PutUint64(p[40:], uint64(len(data)))
	le.PutUint64(p[48:], 0x1000)

	copy(out[dataAt:], data)
	copy(out[namesAt:], names)

	s := out[sectionsAt+sectionSize:]
	le.PutUint32(s[0:], 1) // name
	le.PutUint32(s[4:], 1) // SHT_PROGBITS
	le.PutUint64(s[8:], 3) // SHF_WRITE | SHF_ALLOC
	le.PutUint64(s[16:], base+dataAt)
	le.PutUint64(s[24:], dataAt)
	le.PutUint64(s[32:], uint64(len(data)))
	le.PutUint64(s[48:], 16)
	s = out[sectionsAt+2*sectionSize:]
	le.PutUint32(s[0:], uint32(2+len(section))) // #nosec G115 -- a length
	le.PutUint32(s[4:], 3)                      // SHT_STRTAB
	le.PutUint64(s[24:], uint64(namesAt))
	le.PutUint64(s[32:], uint64(len(names)))
	le.PutUint64(s[48:], 1)
	return out
}
