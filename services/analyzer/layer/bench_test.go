package layer_test

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"syscall"
	"testing"
	"time"

	"github.com/klauspost/compress/gzip"

	"github.com/tidewaiter/tidewaiter/services/analyzer/layer"
	lt "github.com/tidewaiter/tidewaiter/services/analyzer/layertest"
)

// mixed is a layer like those of real images: many small texts, a node_modules,
// Python packages, libraries and executables with and without Go inside, jars.
func mixed(tb testing.TB) lt.Layer {
	tb.Helper()
	rnd := rand.New(rand.NewPCG(1, 2))
	words := make([]string, 4000)
	for i := range words {
		b := make([]byte, 2+rnd.IntN(9))
		for j := range b {
			b[j] = byte('a' + rnd.IntN(26))
		}
		words[i] = string(b)
	}
	text := func(n int) []byte {
		var b bytes.Buffer
		for b.Len() < n {
			b.WriteString(words[int(rnd.ExpFloat64()*300)%len(words)])
			b.WriteByte(' ')
		}
		return b.Bytes()[:n]
	}
	// code compresses to about half, as machine code does.
	code := func(n int) []byte {
		b := make([]byte, n)
		for i := 0; i < n; i += 16 {
			for j := range min(8, n-i) {
				b[i+j] = byte(rnd.Uint32())
			}
			copy(b[i+min(8, n-i):], []byte("\x48\x8b\x05\x00\x00\x00\x00\xc3"))
		}
		copy(b, "\x7fELF")
		return b
	}
	var o []lt.Option
	for i := range 6000 {
		o = append(o, lt.File(fmt.Sprintf("usr/share/doc/p%d/copyright", i), text(2000+rnd.IntN(8000))))
	}
	for i := range 800 {
		dir := fmt.Sprintf("app/node_modules/m%d/", i)
		o = append(o, lt.Text(dir+"package.json", fmt.Sprintf(`{"name":"m%d","version":"1.%d.0","description":%q}`, i, i, text(400))))
		for j := range 8 {
			o = append(o, lt.File(fmt.Sprintf("%slib/f%d.js", dir, j), text(4000)))
		}
	}
	for i := range 120 {
		o = append(o, lt.Text(fmt.Sprintf("usr/lib/python3/site-packages/p%d-1.0.dist-info/METADATA", i), fmt.Sprintf("Metadata-Version: 2.1\nName: p%d\nVersion: 1.0\n\n%s", i, text(3000))))
	}
	for i := range 300 {
		o = append(o, lt.Executable(fmt.Sprintf("usr/bin/b%d", i), code(20_000+rnd.IntN(60_000))))
	}
	for i := range 40 {
		o = append(o, lt.File(fmt.Sprintf("usr/lib/x86_64-linux-gnu/lib%d.so.1", i), code(400_000)))
	}
	for i := range 40 {
		o = append(o, lt.File(fmt.Sprintf("srv/lib/j%d-1.0.jar", i), lt.Jar("org.example", fmt.Sprintf("j%d", i), "1.0", map[string][]byte{"a.class": code(300_000), "b.class": code(300_000)})))
	}
	o = append(o, lt.Executable("usr/sbin/mysqld", append(code(50<<20), "\x005.5.9\x00x86_64\x00Linux\x00%s  Ver %s for %s on %s (%s)\n\x00"...)))
	self, err := os.Executable()
	if err != nil {
		tb.Fatal(err)
	}
	own, err := os.ReadFile(self)
	if err != nil {
		tb.Fatal(err)
	}
	return lt.Gzip(append(o, lt.Executable("usr/local/bin/tool", own))...)
}

func cpu(tb testing.TB) time.Duration {
	tb.Helper()
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		tb.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// floor reads the layer with the same gunzip and both sha256, and nothing else.
func floor(tb testing.TB, b []byte) {
	tb.Helper()
	digest, diffID := sha256.New(), sha256.New()
	z, err := gzip.NewReader(io.TeeReader(bytes.NewReader(b), digest))
	if err != nil {
		tb.Fatal(err)
	}
	if _, err := io.CopyBuffer(struct{ io.Writer }{diffID}, struct{ io.Reader }{z}, make([]byte, 256<<10)); err != nil {
		tb.Fatal(err)
	}
}

// BenchmarkAnalyze prints how much more CPU analysis takes than the floor, both
// measured by turns in one run.
func BenchmarkAnalyze(b *testing.B) {
	l := mixed(b)
	var analysis, least time.Duration
	b.SetBytes(int64(len(l.Compressed)))
	for b.Loop() {
		start := cpu(b)
		floor(b, l.Compressed)
		least += cpu(b) - start
		start = cpu(b)
		r, err := layer.Analyze(b.Context(), bytes.NewReader(l.Compressed), layer.Options{Digest: l.Digest, Verify: true})
		if err != nil || len(r.Gaps) > 0 || len(r.Packages) < 900 {
			b.Fatalf("%v, %+v", err, r)
		}
		analysis += cpu(b) - start
	}
	b.ReportMetric(float64(analysis)/float64(least), "ratio")
	b.ReportMetric(least.Seconds()/float64(b.N), "floor-s")
	b.ReportMetric(analysis.Seconds()/float64(b.N), "analysis-s")
	b.ReportMetric(float64(len(l.Compressed))/1e6, "MB-gzip")
	b.ReportMetric(float64(len(l.Tar))/1e6, "MB-tar")
}
