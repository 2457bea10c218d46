package worker

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"strings"
	"sync"
	"testing"
	"testing/iotest"
	"time"

	"github.com/klauspost/compress/gzip"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/services/analyzer/layer"
	lt "github.com/tidewaiter/tidewaiter/services/analyzer/layertest"
)

// TestMain makes the test's own executable the worker, with an analysis that
// does harm where the layer asks for it.
func TestMain(m *testing.M) {
	if os.Getenv(Environment) == "1" {
		os.Exit(child(os.Stdin, os.Stdout, harmful))
	}
	goleak.VerifyTestMain(m)
}

func harmful(ctx context.Context, r io.Reader, o layer.Options) (*contracts.LayerReport, error) {
	head := make([]byte, 8)
	n, _ := io.ReadFull(r, head)
	switch what := string(head[:n]); {
	case strings.HasPrefix(what, "PANIC"):
		panic("something foreign")
	case strings.HasPrefix(what, "EXIT"):
		os.Exit(3)
	case strings.HasPrefix(what, "HANG"):
		select {}
	case strings.HasPrefix(what, "LATE"): // reads it all, then hangs
		_, _ = io.Copy(io.Discard, r)
		select {}
	case strings.HasPrefix(what, "EAT"):
		var eaten [][]byte
		for {
			b := make([]byte, 8<<20)
			for i := range b {
				b[i] = byte(i)
			}
			eaten = append(eaten, b)
			if len(eaten) > 1<<10 {
				panic("8 GiB eaten")
			}
		}
	case strings.HasPrefix(what, "ENV"):
		return &contracts.LayerReport{Digest: strings.Join(os.Environ(), "\n")}, nil
	case strings.HasPrefix(what, "FILES"):
		names, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			return nil, err
		}
		rep := &contracts.LayerReport{}
		for _, f := range names {
			if to, err := os.Readlink("/proc/self/fd/" + f.Name()); err == nil {
				rep.Whiteouts = append(rep.Whiteouts, to)
			}
		}
		return rep, nil
	}
	return layer.Analyze(ctx, io.MultiReader(bytes.NewReader(head[:n]), r), o)
}

func newPool(t *testing.T, cfg Config) *Pool {
	t.Helper()
	p, err := New(cfg, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Close)
	return p
}

func good() lt.Layer {
	return lt.Gzip(lt.Text("a/node_modules/x/package.json", `{"name":"x","version":"1.0.0"}`))
}

// works proves that the pool is of use after whatever happened before.
func works(t *testing.T, p *Pool) {
	t.Helper()
	l := good()
	r, cpu, err := p.Analyze(t.Context(), bytes.NewReader(l.Compressed), layer.Options{Digest: l.Digest, Verify: true})
	if err != nil {
		t.Fatalf("Analyze: %v", err)
	}
	if r.DiffID != l.DiffID || len(r.Packages) != 1 || len(r.Gaps) != 0 || cpu <= 0 {
		t.Errorf("report %+v, CPU %s", r, cpu)
	}
}

func TestReportsAsInProcess(t *testing.T) {
	p := newPool(t, Config{Workers: 1, Recycle: 2})
	for range 5 { // over two replacements
		works(t, p)
	}
}

func TestHarm(t *testing.T) {
	cases := []struct{ what, reason string }{
		{"PANIC", "analyzer crashed: panic: something foreign"},
		{"EXIT", "analyzer crashed: exit status 3"},
		{"HANG", "limit: time"},
		{"LATE", "limit: time"},
		{"EAT", "limit: memory"},
	}
	for _, c := range cases {
		t.Run(c.what, func(t *testing.T) {
			t.Parallel()
			stall := time.Minute
			if c.reason == "limit: time" {
				stall = 300 * time.Millisecond
			}
			p := newPool(t, Config{Workers: 1, Stall: stall})
			// Far more than the pipe holds, so that a hang is met while sending.
			size := 4 << 20
			if c.what == "LATE" || c.what == "EAT" {
				size = 100
			}
			in := bytes.NewReader(append([]byte(c.what), make([]byte, size)...))
			r, _, err := p.Analyze(t.Context(), in, layer.Options{Digest: "sha256:x", Timeout: time.Millisecond})
			if err != nil {
				t.Fatalf("Analyze: %v", err)
			}
			if len(r.Gaps) != 1 || r.Gaps[0].Reason != c.reason || r.Gaps[0].Layer != "sha256:x" || r.DiffID != "" {
				t.Errorf("report %+v", r)
			}
			if in.Len() != 0 {
				t.Errorf("%d bytes were not read: their digest is not verified", in.Len())
			}
			works(t, newPool(t, Config{Workers: 1}))
		})
	}
}

// What the worst layers need stays within the bounds, and what would need more
// is a gap.
func TestMemoryIsBounded(t *testing.T) {
	fat := map[string][]byte{}
	for i := range 40 {
		fat[fmt.Sprintf("in%d.jar", i)] = lt.Zip(map[string][]byte{"in.jar": make([]byte, 8<<20)})
	}
	whole := lt.Zip(map[string][]byte{"in.jar": lt.Zip(map[string][]byte{"in.jar": make([]byte, 280<<20)})})
	for name, c := range map[string]struct {
		layer lt.Layer
		gap   string // "": none
	}{
		"a large file, spilled":                             {lt.Gzip(lt.Executable("bin/x", lt.ELF(make([]byte, 100<<20)))), ""},
		"many nested archives":                              {lt.Gzip(lt.File("a.jar", lt.Zip(fat))), "corrupt:"},
		"one nested archive that is larger than the memory": {lt.Gzip(lt.File("a.jar", whole)), "corrupt:"},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPool(t, Config{Workers: 1})
			r, _, err := p.Analyze(t.Context(), bytes.NewReader(c.layer.Compressed), layer.Options{MaxRatio: 1 << 20})
			if err != nil {
				t.Fatal(err)
			}
			all := ""
			for _, g := range r.Gaps {
				all += g.Path + " " + g.Reason + "\n"
			}
			if (c.gap == "") != (all == "") || !strings.Contains(all, c.gap) {
				t.Errorf("gaps %q, want %q", all, c.gap)
			}
			if p.PeakMemory() == 0 || p.PeakMemory() > DefaultMemory {
				t.Errorf("%d MiB resident", p.PeakMemory()>>20)
			}
			t.Logf("%d MiB resident", p.PeakMemory()>>20)
		})
	}
}

// BenchmarkPool prints what a layer costs with a child, beside gunzip and both
// sha256 in one process, and the child's peak memory.
func BenchmarkPool(b *testing.B) {
	noise := make([]byte, 64<<20)
	r := rand.New(rand.NewPCG(1, 2))
	for i := range noise {
		if i%2 == 0 {
			noise[i] = byte(r.Uint32())
		}
	}
	l := lt.Gzip(lt.File("data", noise), lt.Executable("bin/x", lt.ELF(noise)))
	p, err := New(Config{Workers: 1}, slog.New(slog.DiscardHandler))
	if err != nil {
		b.Fatal(err)
	}
	defer p.Close()
	var child, parent, floor time.Duration
	b.SetBytes(int64(len(l.Compressed)))
	for b.Loop() {
		start := cpuTime()
		digest, diffID := sha256.New(), sha256.New()
		z, err := gzip.NewReader(io.TeeReader(bytes.NewReader(l.Compressed), digest))
		if err != nil {
			b.Fatal(err)
		}
		if _, err := io.CopyBuffer(struct{ io.Writer }{diffID}, struct{ io.Reader }{z}, make([]byte, 256<<10)); err != nil {
			b.Fatal(err)
		}
		floor += cpuTime() - start

		// The parent's part is what the registry client does: the first sha256.
		start = cpuTime()
		digest.Reset()
		_, cpu, err := p.Analyze(b.Context(), io.TeeReader(bytes.NewReader(l.Compressed), digest), layer.Options{})
		if err != nil {
			b.Fatal(err)
		}
		parent += cpuTime() - start
		child += cpu
	}
	b.ReportMetric(float64(child+parent)/float64(floor), "ratio")
	b.ReportMetric(child.Seconds()/float64(b.N), "child-cpu-s")
	b.ReportMetric(parent.Seconds()/float64(b.N), "parent-cpu-s")
	b.ReportMetric(float64(p.PeakMemory()>>20), "peak-MiB")
}

func TestReplacedAfterCrash(t *testing.T) {
	p := newPool(t, Config{Workers: 1})
	works(t, p)
	if _, _, err := p.Analyze(t.Context(), strings.NewReader("EXIT....."), layer.Options{}); err != nil {
		t.Fatal(err)
	}
	works(t, p)
}

func TestReaderErrorsComeBack(t *testing.T) {
	p := newPool(t, Config{Workers: 1})
	broken := errors.New("connection reset")
	l := good()
	for name, r := range map[string]io.Reader{
		"at once":       iotest.ErrReader(broken),
		"in the middle": io.MultiReader(bytes.NewReader(l.Compressed[:20]), iotest.ErrReader(broken)),
		"at the end":    io.MultiReader(bytes.NewReader(l.Compressed), iotest.ErrReader(broken)),
		"after a crash": io.MultiReader(strings.NewReader("PANIC"+strings.Repeat("x", 4<<20)), iotest.ErrReader(broken)),
	} {
		if _, _, err := p.Analyze(t.Context(), r, layer.Options{}); !errors.Is(err, broken) {
			t.Errorf("%s: %v", name, err)
		}
		works(t, p)
	}
	if _, _, err := p.Analyze(t.Context(), bytes.NewReader(l.Compressed), layer.Options{Digest: "sha256:other", Verify: true}); !errors.Is(err, layer.ErrDigest) {
		t.Errorf("wrong digest: %v", err)
	}
}

func TestContextEnds(t *testing.T) {
	p := newPool(t, Config{Workers: 1})
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if _, _, err := p.Analyze(ctx, strings.NewReader("HANG....."), layer.Options{}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("while it hangs: %v", err)
	}
	works(t, p)
}

func TestEnvironmentAndFiles(t *testing.T) {
	// A file without close-on-exec, as a careless parent of ours would leave it.
	left, err := unix.Open(t.TempDir(), unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Close(left) })
	t.Setenv("AWS_SECRET_ACCESS_KEY", "do not tell")
	p := newPool(t, Config{Workers: 1})
	r, _, err := p.Analyze(t.Context(), strings.NewReader("ENV......"), layer.Options{})
	if err != nil {
		t.Fatal(err)
	}
	for _, kv := range strings.Split(r.Digest, "\n") {
		name, _, _ := strings.Cut(kv, "=")
		switch name {
		case Environment, "TMPDIR", "GOMAXPROCS", "GOMEMLIMIT", "GOTRACEBACK", "PWD":
		default:
			t.Errorf("the child sees %s", name)
		}
	}
	r, _, err = p.Analyze(t.Context(), strings.NewReader("FILES......"), layer.Options{})
	if err != nil {
		t.Fatal(err)
	}
	pipes := 0
	for _, to := range r.Whiteouts {
		switch {
		case strings.HasPrefix(to, "pipe:"):
			pipes++
		case strings.HasPrefix(to, "anon_inode:"), strings.HasPrefix(to, "/proc/"), strings.HasPrefix(to, "/sys/fs/cgroup/"):
			// Go's own: its poller, this listing, the CPU quota it follows.
		default:
			t.Errorf("the child holds %s", to)
		}
	}
	if pipes != 3 {
		t.Errorf("the child holds %d pipes: %q", pipes, r.Whiteouts)
	}
}

func TestManyAtOnce(t *testing.T) {
	p := newPool(t, Config{Workers: 2})
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() { works(t, p) })
	}
	wg.Wait()
}

func TestClosed(t *testing.T) {
	p := newPool(t, Config{Workers: 1})
	works(t, p)
	p.Close()
	p.Close()
	if _, _, err := p.Analyze(t.Context(), strings.NewReader(""), layer.Options{}); !errors.Is(err, ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
}

func FuzzFrames(f *testing.F) {
	var b bytes.Buffer
	for _, fr := range []struct {
		kind byte
		p    string
	}{{frameJob, "{}"}, {frameData, "abc"}, {frameEnd, ""}, {frameJob, `{"digest":"x"}`}, {frameData, ""}, {frameAbort, ""}} {
		if err := writeFrame(&b, fr.kind, []byte(fr.p)); err != nil {
			f.Fatal(err)
		}
	}
	f.Add(b.Bytes())
	f.Add([]byte("J\xff\xff\xff\xff"))
	f.Add([]byte("J\x00\x00\x00\x02{}D\x00\x00\x00\x01"))
	f.Fuzz(func(t *testing.T, in []byte) {
		got := 0
		var out bytes.Buffer
		err := serve(bytes.NewReader(in), &out, func(_ context.Context, r io.Reader, _ layer.Options) (*contracts.LayerReport, error) {
			n, err := io.Copy(io.Discard, r)
			got += int(n)
			return &contracts.LayerReport{}, err
		})
		if got > len(in) {
			t.Errorf("%d bytes out of %d", got, len(in))
		}
		// What the child answers is always whole frames, one a finished job.
		for {
			kind, _, rerr := readFrame(&out, maxResult)
			if rerr == io.EOF { //nolint:errorlint // as readFrame returns it
				break
			}
			if rerr != nil || kind != frameReady && kind != frameReport && kind != frameFailure {
				t.Fatalf("answer %q: %v (serve: %v)", kind, rerr, err)
			}
		}
	})
}
