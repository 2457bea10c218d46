package sample

import (
	"archive/zip"
	"bytes"
	"encoding/binary"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Debian returns the files of a small Debian base: os-release and dpkg's
// database. Debian 12 comes with an OpenSSL from before a known fix and is past
// its end of life; Debian 13 is up to date.
func Debian(release int) []File {
	codename, bash, libc, openssl, zlib, baseFiles := "trixie", "5.2.37-2+b5", "2.41-12", "3.5.1-1+deb13u1", "1:1.3.dfsg+really1.3.1-1+b1", "13.8+deb13u1"
	if release == 12 {
		codename, bash, libc, openssl, zlib, baseFiles = "bookworm", "5.2.15-2+b8", "2.36-9+deb12u13", "3.0.8-1", "1:1.2.13.dfsg-1", "12.4+deb12u12"
	}
	var status strings.Builder
	for _, p := range []struct{ name, version, source string }{
		{"base-files", baseFiles, ""},
		{"bash", bash, ""},
		{"libc6", libc, "glibc"},
		{"libssl3", openssl, "openssl"},
		{"openssl", openssl, ""},
		{"zlib1g", zlib, "zlib"},
		{"ca-certificates", "20250419", ""},
	} {
		fmt.Fprintf(&status, "Package: %s\nStatus: install ok installed\nPriority: optional\nSection: libs\nMaintainer: Example <packages@example.org>\nArchitecture: amd64\n", p.name)
		if p.source != "" {
			fmt.Fprintf(&status, "Source: %s\n", p.source)
		}
		fmt.Fprintf(&status, "Version: %s\nDescription: sample of %s\n\n", p.version, p.name)
	}
	return []File{
		file("etc/os-release", fmt.Sprintf(`PRETTY_NAME="Debian GNU/Linux %d (%s)"`, release, codename), `NAME="Debian GNU/Linux"`,
			fmt.Sprintf(`VERSION_ID="%d"`, release), fmt.Sprintf(`VERSION="%d (%s)"`, release, codename), "VERSION_CODENAME="+codename, "ID=debian"),
		{Path: "var/lib/dpkg/status", Body: []byte(status.String())},
	}
}

// NPM returns a package installed below dir/node_modules.
func NPM(dir, name, version string) File {
	return file(dir+"/node_modules/"+name+"/package.json",
		"{", fmt.Sprintf("  %q: %q,", "name", name), fmt.Sprintf("  %q: %q,", "version", version), `  "license": "MIT"`, "}")
}

// Wheel returns the metadata that installing a Python wheel leaves.
func Wheel(name, version string) []File {
	dir := "usr/local/lib/python3.9/site-packages/" + name + "-" + version + ".dist-info/"
	return []File{
		file(dir+"METADATA", "Metadata-Version: 2.1", "Name: "+name, "Version: "+version, "Summary: sample", ""),
		file(dir+"WHEEL", "Wheel-Version: 1.0", "Generator: bdist_wheel (0.37.0)", "Root-Is-Purelib: true", "Tag: py3-none-any"),
		file(dir+"RECORD", name+"/__init__.py,,", name+"-"+version+".dist-info/METADATA,,"),
		file(dir+"INSTALLER", "pip"),
	}
}

// Jar returns a jar of a Maven artifact, holding other jars by path.
func Jar(group, artifact, version string, inside map[string][]byte) ([]byte, error) {
	return Zip(append([]File{
		file("META-INF/MANIFEST.MF", "Manifest-Version: 1.0", "Implementation-Title: "+artifact, "Implementation-Version: "+version, ""),
		file("META-INF/maven/"+group+"/"+artifact+"/pom.properties",
			"version="+version, "groupId="+group, "artifactId="+artifact),
	}, sorted(inside)...))
}

// Zip packs files, uncompressed jars inside included, in order.
func Zip(files []File) ([]byte, error) {
	var buf bytes.Buffer
	z := zip.NewWriter(&buf)
	for _, f := range files {
		method := zip.Deflate
		if strings.HasSuffix(f.Path, ".jar") {
			method = zip.Store // as Spring Boot's loader asks for
		}
		w, err := z.CreateHeader(&zip.FileHeader{Name: f.Path, Method: method, Modified: epoch})
		if err != nil {
			return nil, fmt.Errorf("zip %s: %w", f.Path, err)
		}
		if _, err := w.Write(f.Body); err != nil {
			return nil, fmt.Errorf("zip %s: %w", f.Path, err)
		}
	}
	if err := z.Close(); err != nil {
		return nil, fmt.Errorf("zip: %w", err)
	}
	return buf.Bytes(), nil
}

// GoModule is a dependency in a Go binary's build information.
type GoModule struct{ Path, Version string }

// GoBinary returns an ELF file that carries the build information of a Go
// program (debug/buildinfo's inline format, Go 1.18 and later) and no code.
func GoBinary(goVersion, main string, deps ...GoModule) []byte {
	var mod strings.Builder
	fmt.Fprintf(&mod, "path\t%s\nmod\t%s\t(devel)\t\n", main, main)
	for _, d := range deps {
		fmt.Fprintf(&mod, "dep\t%s\t%s\th1:%s=\n", d.Path, d.Version, strings.Repeat("A", 43))
	}
	// the linker frames the module text with 16 bytes on both sides
	framed := "0w\xaf\f\x92t\b\x02A\xe1\xc1\a\xe6\xd6\x18\xe6" + mod.String() + "\xf92C1\x86\x18 r\x00\x82B\x10A\x16\xd8\xf2"
	info := append([]byte("\xff Go buildinf:"), 8, 2) // pointer size, flag: strings follow inline
	info = append(info, make([]byte, 32-len(info))...)
	for _, s := range []string{goVersion, framed} {
		info = binary.AppendUvarint(info, uint64(len(s)))
		info = append(info, s...)
	}
	return ELF(Section{".go.buildinfo", info})
}

// Section is a section of an ELF file.
type Section struct {
	Name string
	Data []byte
}

// ELF returns a 64-bit little-endian executable for Linux on amd64 with one
// writable segment that holds all sections (System V ABI, "Object Files").
func ELF(sections ...Section) []byte {
	const (
		headerSize, programSize, sectionSize = 64, 56, 64
		base                                 = 0x400000
	)
	le := binary.LittleEndian
	names := []byte{0}
	data := make([]byte, 0x1000) // headers, then data from a page boundary
	type placed struct{ name, offset, size int }
	var at []placed
	for _, s := range sections {
		for len(data)%16 != 0 {
			data = append(data, 0)
		}
		at = append(at, placed{len(names), len(data), len(s.Data)})
		names = append(append(names, s.Name...), 0)
		data = append(data, s.Data...)
	}
	dataEnd := len(data)
	nameAt := len(names)
	names = append(names, ".shstrtab\x00"...)
	stringsOffset := len(data)
	data = append(data, names...)
	for len(data)%8 != 0 {
		data = append(data, 0)
	}
	table := len(data)
	section := func(name, kind, flags, address, offset, size int) {
		h := make([]byte, sectionSize)
		le.PutUint32(h[0:], uint32(name))     //nolint:gosec // small by construction
		le.PutUint32(h[4:], uint32(kind))     //nolint:gosec // small by construction
		le.PutUint64(h[8:], uint64(flags))    //nolint:gosec // small by construction
		le.PutUint64(h[16:], uint64(address)) //nolint:gosec // small by construction
		le.PutUint64(h[24:], uint64(offset))  //nolint:gosec // small by construction
		le.PutUint64(h[32:], uint64(size))    //nolint:gosec // small by construction
		le.PutUint64(h[48:], 16)
		data = append(data, h...)
	}
	section(0, 0, 0, 0, 0, 0)
	for _, p := range at {
		section(p.name, 1, 3, base+p.offset, p.offset, p.size) // PROGBITS, writable and allocated
	}
	section(nameAt, 3, 0, 0, stringsOffset, len(names)) // STRTAB

	copy(data, "\x7fELF\x02\x01\x01")
	le.PutUint16(data[16:], 2)  // ET_EXEC
	le.PutUint16(data[18:], 62) // EM_X86_64
	le.PutUint32(data[20:], 1)
	le.PutUint64(data[24:], base+0x1000)
	le.PutUint64(data[32:], headerSize)
	le.PutUint64(data[40:], uint64(table))
	le.PutUint16(data[52:], headerSize)
	le.PutUint16(data[54:], programSize)
	le.PutUint16(data[56:], 1)
	le.PutUint16(data[58:], sectionSize)
	le.PutUint16(data[60:], uint16(len(at)+2)) //nolint:gosec // small by construction
	le.PutUint16(data[62:], uint16(len(at)+1)) //nolint:gosec // small by construction
	p := data[headerSize:]
	le.PutUint32(p[0:], 1) // PT_LOAD
	le.PutUint32(p[4:], 6) // readable, writable
	le.PutUint64(p[8:], 0)
	le.PutUint64(p[16:], base)
	le.PutUint64(p[24:], base)
	le.PutUint64(p[32:], uint64(dataEnd))
	le.PutUint64(p[40:], uint64(dataEnd))
	le.PutUint64(p[48:], 0x1000)
	return data
}

// Noise returns n bytes that do not compress, the same for the same seed.
func Noise(seed uint64, n int) []byte {
	var key [32]byte
	binary.LittleEndian.PutUint64(key[:], seed)
	r := rand.NewChaCha8(key)
	b := make([]byte, n)
	_, _ = r.Read(b) // documented never to fail
	return b
}

// AMD64 and ARM64 are the platforms of the samples.
var (
	AMD64 = ocispec.Platform{OS: "linux", Architecture: "amd64"}
	ARM64 = ocispec.Platform{OS: "linux", Architecture: "arm64", Variant: "v8"}
)

func sorted(files map[string][]byte) []File {
	var out []File
	for _, name := range slices.Sorted(maps.Keys(files)) {
		out = append(out, File{Path: name, Body: files[name]})
	}
	return out
}
