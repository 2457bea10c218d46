package layer_test

import (
	"archive/tar"
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/klauspost/compress/gzip"

	"github.com/tidewaiter/tidewaiter/services/analyzer/layer"
	lt "github.com/tidewaiter/tidewaiter/services/analyzer/layertest"
)

// zeros is size bytes of nothing, compressed as well as gzip can.
func zeros(size int64) []byte {
	var b bytes.Buffer
	w, _ := gzip.NewWriterLevel(&b, gzip.BestCompression)
	if _, err := io.CopyN(w, zeroReader{}, size); err != nil {
		panic(err)
	}
	if err := w.Close(); err != nil {
		panic(err)
	}
	return b.Bytes()
}

type zeroReader struct{}

func (zeroReader) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

// block is a tar header with the given fields, and a right checksum.
func block(name string, size string, typeflag byte) []byte {
	b := make([]byte, 512)
	copy(b, name)
	copy(b[100:], "0000644\x000000000\x000000000\x00")
	copy(b[124:], size)
	copy(b[136:], "00000000000\x00")
	b[156] = typeflag
	copy(b[257:], "ustar\x0000")
	copy(b[148:], "        ")
	sum := 0
	for _, c := range b {
		sum += int(c)
	}
	copy(b[148:], fmt.Sprintf("%06o\x00 ", sum))
	return b
}

func pad(b []byte) []byte { return append(b, make([]byte, (512-len(b)%512)%512)...) }

// pax is an extended header record (POSIX.1-2001, pax).
func pax(key, value string) string {
	n := len(key) + len(value) + 3
	for len(fmt.Sprint(n))+len(key)+len(value)+3 != n {
		n++
	}
	return fmt.Sprintf("%d %s=%s\n", n, key, value)
}

func nested(levels int) []byte {
	inner := lt.Jar("org.example", "deep", "1.0.0", nil)
	for range levels {
		inner = lt.Zip(map[string][]byte{"in.jar": inner})
	}
	return inner
}

// lyingZip claims a member of a size that it does not have.
func lyingZip() []byte {
	b := lt.Zip(map[string][]byte{"in.jar": bytes.Repeat([]byte("PK\x03\x04 not really"), 10000)})
	i := bytes.Index(b, []byte("PK\x01\x02"))
	binary.LittleEndian.PutUint32(b[i+24:], 40) // uncompressed size in the central directory
	return b
}

func TestHostileLayers(t *testing.T) {
	good := lt.Gzip(everything()...).Compressed
	plain := lt.Tar(everything()...)
	entry := func(o ...lt.Option) []byte { return lt.Gzip(o...).Compressed }
	longName := strings.Repeat("d/", 3000) + "package.json"
	many := make([]lt.Option, 3000)
	for i := range many {
		many[i] = lt.Text(fmt.Sprintf("f%d", i), "")
	}
	badJars := make([]lt.Option, 500)
	for i := range badJars {
		badJars[i] = lt.Text(fmt.Sprintf("j%d.jar", i), "no zip at all, but long enough to be one")
	}
	elf := lt.GoBinary("go1.20.1", lt.Module{Path: "m", Version: "v1.0.0"})

	cases := []struct {
		name  string
		layer []byte
		o     layer.Options
		want  string // part of one of the gaps; "": none
	}{
		{"nothing at all", nil, layer.Options{}, "corrupt: empty"},
		{"one byte", []byte{0x1f}, layer.Options{}, "corrupt: truncated"},
		{"gzip magic only", []byte{0x1f, 0x8b}, layer.Options{}, "corrupt:"},
		{"gzip of nothing", lt.GzipBytes(nil), layer.Options{}, ""},
		{"gzip header cut", good[:7], layer.Options{}, "corrupt: truncated"},
		{"gzip cut in the middle", good[:len(good)/2], layer.Options{}, "corrupt: truncated"},
		{"gzip without its checksum", good[:len(good)-4], layer.Options{}, "corrupt: truncated"},
		{"gzip with a wrong checksum", append(bytes.Clone(good[:len(good)-8]), 1, 2, 3, 4, 5, 6, 7, 8), layer.Options{}, "checksum"},
		{"gzip, then garbage", append(bytes.Clone(good), 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11), layer.Options{}, "corrupt:"},
		{"two gzip members", append(lt.GzipBytes(plain[:1024]), lt.GzipBytes(plain[1024:])...), layer.Options{}, ""},
		{"zstd magic only", []byte{0x28, 0xb5, 0x2f, 0xfd}, layer.Options{}, "corrupt:"},
		{"zstd cut", lt.ZstdBytes(plain)[:200], layer.Options{}, "corrupt:"},
		// A frame header with a window of 2 GiB.
		{"zstd that wants memory", append([]byte{0x28, 0xb5, 0x2f, 0xfd, 0x00, 0xa8}, make([]byte, 100)...), layer.Options{}, "limit: memory"},
		{"bzip2", []byte("BZh91AY&SY" + strings.Repeat("x", 600)), layer.Options{}, "corrupt: tar"},
		{"a web page", []byte(strings.Repeat("<html>no such layer</html>", 100)), layer.Options{}, "corrupt: tar"},
		{"gzip in gzip", lt.GzipBytes(good), layer.Options{}, "corrupt: tar"},
		{"tar cut in a header", lt.GzipBytes(plain[:len(plain)/512/2*512+100]), layer.Options{}, "corrupt: "},
		{"tar cut in a file", lt.GzipBytes(plain[:600]), layer.Options{}, "corrupt: truncated"},
		{"tar with a wrong checksum", lt.GzipBytes(append([]byte("x"), plain[1:]...)), layer.Options{}, "corrupt: tar"},
		{"tar without an end", lt.GzipBytes(plain[:len(plain)-1024]), layer.Options{}, ""},
		{"negative size", lt.GzipBytes(block("a/package.json", "-0000000001\x00", '0')), layer.Options{}, "corrupt: tar"},
		{"negative size in base 256", lt.GzipBytes(block("a/package.json", "\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", '0')), layer.Options{}, "corrupt: tar"},
		{"absurd size", lt.GzipBytes(block("a/package.json", "77777777777\x00", '0')), layer.Options{}, "limit: file larger"},
		{"absurd size of a file of no interest", lt.GzipBytes(block("a/data", "77777777777\x00", '0')), layer.Options{}, "corrupt: truncated"},
		{"pax size beyond everything", lt.GzipBytes(append(append(block("x", fmt.Sprintf("%011o\x00", len(pax("size", "9223372036854775807"))), 'x'),
			pad([]byte(pax("size", "9223372036854775807")))...), block("a/package.json", "00000000000\x00", '0')...)), layer.Options{}, "limit: file larger"},
		{"pax header of 8 MiB", lt.GzipBytes(append(block("x", fmt.Sprintf("%011o\x00", 8<<20), 'x'), bytes.Repeat([]byte("a"), 8<<20)...)), layer.Options{}, "corrupt: tar"},
		{"pax garbage", lt.GzipBytes(append(block("x", "00000000020\x00", 'x'), pad([]byte("99 not a record\n"))...)), layer.Options{}, "corrupt: tar"},
		{"GNU long name of 8 MiB", lt.GzipBytes(append(block("././@LongLink", fmt.Sprintf("%011o\x00", 8<<20), 'L'), bytes.Repeat([]byte("a"), 8<<20)...)), layer.Options{}, "corrupt: tar"},
		{"ten thousand pax headers", lt.GzipBytes(bytes.Repeat(append(block("x", fmt.Sprintf("%011o\x00", len(pax("path", "a"))), 'x'), pad([]byte(pax("path", "a")))...), 10000)), layer.Options{}, ""},
		{"sparse of a terabyte", sparse(1 << 40), layer.Options{}, "limit: file larger"},
		{"sparse within the limits", sparse(100 << 20), layer.Options{}, "limit: text file"},
		{"path out of the layer", entry(lt.Text("../../etc/package.json", `{"name":"x","version":"1"}`)), layer.Options{}, "path leaves the layer"},
		{"path out of the layer in the middle", entry(lt.Text("a/../../package.json", `{"name":"x","version":"1"}`)), layer.Options{}, "path leaves the layer"},
		{"absolute path", entry(lt.Text("/a/node_modules/x/package.json", `{"name":"x","version":"1.0.0"}`)), layer.Options{}, ""},
		{"path of 6 kB", entry(lt.Text(longName, "{}")), layer.Options{}, "limit: path longer"},
		{"name of control characters", entry(lt.Text("a\x1b[2J\n/x.jar", "no zip at all, but long enough to be one")), layer.Options{}, "corrupt:"},
		{"whiteout of nothing", entry(lt.File("a/.wh.", nil)), layer.Options{}, "whiteout of nothing"},
		{"whiteout of the parent", entry(lt.File("a/.wh...", nil)), layer.Options{}, "whiteout of nothing"},
		{"symlink to itself", entry(lt.Symlink("etc/os-release", "os-release"), lt.Symlink("var/lib/dpkg/status", "status")), layer.Options{}, ""},
		{"symlink loop", entry(lt.Symlink("a", "b"), lt.Symlink("b", "a"), lt.Symlink("var/lib/dpkg/status", "/a")), layer.Options{}, "unresolved: package database is a link"},
		{"hard link to itself", entry(lt.Hardlink("a.jar", "a.jar")), layer.Options{}, ""},
		{"hard link to nothing", entry(lt.Hardlink("a/package.json", "gone")), layer.Options{}, "unresolved: hard link"},
		{"hard link out of the layer", entry(lt.Hardlink("a/package.json", "../../etc/passwd")), layer.Options{}, "corrupt: hard link out of the layer"},
		{"device named like a database", entry(lt.Header(tar.Header{Typeflag: tar.TypeChar, Name: "var/lib/dpkg/status"})), layer.Options{}, ""},
		{"too many entries", entry(many...), layer.Options{MaxEntries: 1000}, "limit: more than 1000 entries"},
		{"bomb by ratio", zeros(300 << 20), layer.Options{}, "limit: uncompressed more than 200 times"},
		{"bomb by size", zeros(80 << 20), layer.Options{MaxBytes: 10 << 20}, "limit: more than 10485760 bytes"},
		{"bomb in the second member", append(bytes.Clone(good), zeros(300<<20)...), layer.Options{}, "limit: uncompressed more than"},
		{"file over its limit", entry(lt.File("a.jar", make([]byte, 2000))), layer.Options{MaxFile: 1000}, "limit: file larger than 1000 bytes"},
		{"time", good, layer.Options{Timeout: time.Nanosecond}, "limit: time"},
		{"jar that is none", entry(lt.Text("a.jar", "this is not an archive, is it?")), layer.Options{}, "corrupt:"},
		{"jar cut", entry(lt.File("a.jar", nested(1)[:60])), layer.Options{}, "corrupt:"},
		{"jar nested too deep", entry(lt.File("a.jar", nested(12))), layer.Options{}, "limit: archives nested deeper than 8"},
		{"jar nested just deep enough", entry(lt.File("a.jar", nested(7))), layer.Options{}, ""},
		{"jar bomb", entry(lt.File("a.jar", lt.Zip(map[string][]byte{"in.jar": make([]byte, 64<<20)}))), layer.Options{MaxFile: 1 << 20, MaxNested: 1 << 20}, "limit: archives within one"},
		{"jar that lies about a size", entry(lt.File("a.jar", lyingZip())), layer.Options{}, "corrupt:"},
		{"jar of too many members", entry(lt.File("a.jar", bytes.Repeat([]byte("PK\x01\x02"+strings.Repeat("\x00", 42)), 210_000))), layer.Options{MaxRatio: 1 << 20}, "limit: more than 200000 members"},
		{"jar of too many members, spilled", entry(lt.File("a.jar", bytes.Repeat([]byte("PK\x01\x02"+strings.Repeat("\x00", 42)), 210_000))), layer.Options{MaxRatio: 1 << 20, MaxMemory: 1}, "limit: more than 200000 members"},
		{"wheel of too many members", entry(lt.File("a.whl", append([]byte("PK\x03\x04"), bytes.Repeat([]byte("PK\x01\x02"+strings.Repeat("\x00", 42)), 210_000)...))), layer.Options{MaxRatio: 1 << 20}, "limit: more than 200000 members"},
		{"war that is none", entry(lt.Text("jenkins.war", "this is not an archive, is it?")), layer.Options{}, "corrupt:"},
		{"package.json that is none", entry(lt.Text("a/node_modules/x/package.json", "{")), layer.Options{}, "corrupt:"},
		{"package.json of 70 MB", entry(lt.File("a/package.json", make([]byte, 70<<20))), layer.Options{MaxRatio: 1 << 20}, "limit: text file larger"},
		{"package.json nested deep", entry(lt.Text("a/package.json", strings.Repeat("[", 1<<20))), layer.Options{}, "corrupt:"},
		{"lock file that is none", entry(lt.Text("a/package-lock.json", "null")), layer.Options{}, "corrupt:"},
		{"aliased lock file without a version", entry(lt.Text("a/package-lock.json", `{"lockfileVersion":1,"dependencies":{"a":{"version":"npm:b"}}}`)), layer.Options{}, "corrupt: extractor panicked"},
		{"dpkg status of nonsense", entry(lt.Text("var/lib/dpkg/status", "Package: x\nStatus: yes\nVersion: 1\n\n")), layer.Options{}, "corrupt:"},
		{"rpm database of nonsense", entry(lt.Text("var/lib/rpm/rpmdb.sqlite", "SQLite format 3\x00 nothing of the kind")), layer.Options{}, "corrupt:"},
		{"rpm database of zeros", entry(lt.File("var/lib/rpm/Packages", make([]byte, 8192))), layer.Options{}, "corrupt:"},
		{"os-release of 1 MB", entry(lt.File("etc/os-release", make([]byte, 1<<20))), layer.Options{}, "limit: os-release"},
		{"executable of three bytes", entry(lt.Executable("bin/x", []byte("\x7fEL"))), layer.Options{}, ""},
		{"Go binary cut", entry(lt.Executable("bin/x", elf[:len(elf)/2])), layer.Options{}, ""},
		{"Go mark without anything", entry(lt.Executable("bin/x", []byte("\x7fELF\xff Go buildinf:"))), layer.Options{}, ""},
		{"more gaps than are listed", entry(badJars...), layer.Options{}, "300 more gaps"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			r := analyze(t, c.layer, c.o)
			all := strings.Join(gaps(r), "\n")
			if c.want == "" && all != "" || !strings.Contains(all, c.want) {
				t.Errorf("gaps %q, want %q", all, c.want)
			}
			if again := strings.Join(gaps(analyze(t, c.layer, c.o)), "\n"); again != all {
				t.Errorf("gaps %q the second time, %q the first", again, all)
			}
			for _, g := range r.Gaps {
				if strings.ContainsAny(g.Path+g.Reason, "\x00\x1b\n") || len(g.Reason) > 1000 {
					t.Errorf("gap is not fit to be shown: %q", g)
				}
			}
		})
	}
	if len(cases) < 30 {
		t.Errorf("only %d hostile layers", len(cases))
	}
}

// sparse is a file of that logical size with nothing stored (GNU tar, PAX format 1.0).
func sparse(size int64) []byte {
	records := pax("GNU.sparse.major", "1") + pax("GNU.sparse.minor", "0") + pax("GNU.sparse.name", "a/package.json") + pax("GNU.sparse.realsize", fmt.Sprint(size))
	m := fmt.Sprintf("1\n%d\n0\n", size)
	b := append(block("x", fmt.Sprintf("%011o\x00", len(records)), 'x'), pad([]byte(records))...)
	b = append(b, block("GNUSparseFile.0/package.json", fmt.Sprintf("%011o\x00", 512), '0')...)
	b = append(b, pad([]byte(m))...)
	return lt.GzipBytes(append(b, make([]byte, 1024)...))
}

func FuzzAnalyze(f *testing.F) {
	f.Add(lt.Gzip(everything()...).Compressed)
	f.Add(lt.Tar(lt.Text("a/package.json", `{"name":"x","version":"1.0.0"}`), lt.File("b.jar", nested(2)), lt.Whiteout("c"), lt.Hardlink("d.jar", "b.jar")))
	f.Add(lt.ZstdBytes(lt.Tar(lt.Text("var/lib/dpkg/status", status), lt.Symlink("etc/os-release", "x"))))
	f.Add(lt.Tar(lt.Executable("bin/x", lt.GoBinary("go1.20.1", lt.Module{Path: "m", Version: "v1.0.0"}))))
	f.Add(sparse(1 << 30))
	f.Fuzz(func(t *testing.T, b []byte) {
		in := bytes.NewReader(b)
		r, err := layer.Analyze(t.Context(), in, layer.Options{
			TempDir: t.TempDir(), MaxBytes: 8 << 20, MaxFile: 1 << 20, MaxNested: 1 << 20, MaxMemory: 64 << 10, Timeout: 10 * time.Second,
		})
		if err != nil {
			t.Fatalf("an error is only the reader's: %v", err)
		}
		if in.Len() > 0 {
			t.Fatalf("%d bytes were not read", in.Len())
		}
		for _, p := range r.Packages {
			if p.Name == "" || p.Version == "" || p.PURL == "" || p.Ecosystem == "" || len(p.Paths) == 0 {
				t.Errorf("incomplete package %+v", p)
			}
		}
	})
}
