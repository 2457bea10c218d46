package worker

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime/debug"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/services/analyzer/layer"
)

// Environment is the variable that makes a process a worker; its value is "1".
const Environment = "TIDEWAITER_WORKER"

const (
	// maxOpenFiles bounds the open files of a child: its pipes, one temporary
	// file, and those of the rpm extractor.
	maxOpenFiles = 64
	// maxCPU bounds the CPU seconds of a child over its whole life, as a last
	// resort; each layer is bounded by the clock before.
	maxCPU = 4 * 3600
	// maxTempFile bounds any one file a child writes.
	maxTempFile = 4 << 30
	// maxData bounds what a child may map, far above what it may have resident,
	// as Go maps its heap in advance.
	maxData = 2 << 30
)

// analyzeFunc is layer.Analyze; tests put something worse in its place.
type analyzeFunc func(ctx context.Context, r io.Reader, o layer.Options) (*contracts.LayerReport, error)

// Main serves jobs and ends the process if it was started as a worker, and
// returns at once otherwise. It is called first by every main, and every
// TestMain, whose process holds a Pool.
func Main() {
	if os.Getenv(Environment) != "1" {
		return
	}
	os.Exit(child(os.Stdin, os.Stdout, layer.Analyze))
}

// child serves jobs until its input ends and returns the exit code.
func child(in io.Reader, out io.Writer, analyze analyzeFunc) int {
	if err := restrict(); err != nil {
		fmt.Fprintln(os.Stderr, "worker:", err)
		return 1
	}
	if err := serve(in, out, analyze); err != nil {
		fmt.Fprintln(os.Stderr, "worker:", err)
		return 1
	}
	return 0
}

// restrict lowers the limits of this process before it sees a foreign byte.
func restrict() error {
	for _, l := range []struct {
		what  string
		which int
		most  uint64
	}{
		{"core dumps", unix.RLIMIT_CORE, 0},
		{"open files", unix.RLIMIT_NOFILE, maxOpenFiles},
		{"file size", unix.RLIMIT_FSIZE, maxTempFile},
		{"CPU time", unix.RLIMIT_CPU, maxCPU},
		{"data", unix.RLIMIT_DATA, maxData},
	} {
		if err := unix.Setrlimit(l.which, &unix.Rlimit{Cur: l.most, Max: l.most}); err != nil {
			return fmt.Errorf("limit %s: %w", l.what, err)
		}
	}
	closeInherited()
	return nil
}

// closeInherited closes the files that came over exec beside the three pipes:
// whatever started the parent may have left some open. They are those without
// the close-on-exec flag, which Go sets on every file of its own.
func closeInherited() {
	for fd := 3; fd < 1024; fd++ {
		flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0)
		if err == nil && flags&unix.FD_CLOEXEC == 0 {
			_ = unix.Close(fd)
		}
	}
}

// result is what a child answers to a job.
type result struct {
	Report *contracts.LayerReport `json:"report"`
	CPU    time.Duration          `json:"cpu"`  // user and system time, nanoseconds
	Peak   int64                  `json:"peak"` // most resident memory so far, bytes
}

func serve(in io.Reader, out io.Writer, analyze analyzeFunc) error {
	// Heads of frames are small; data goes past this buffer where it is large.
	r := bufio.NewReaderSize(in, 64<<10)
	if err := writeFrame(out, frameReady, nil); err != nil {
		return fmt.Errorf("say ready: %w", err)
	}
	for {
		kind, payload, err := readFrame(r, maxPiece)
		if errors.Is(err, io.EOF) {
			return nil // the parent is done with us
		}
		if err != nil {
			return fmt.Errorf("read job: %w", err)
		}
		if kind != frameJob {
			return fmt.Errorf("%w: type %q between layers", errFrame, kind)
		}
		var o layer.Options
		if err := json.Unmarshal(payload, &o); err != nil {
			return fmt.Errorf("read job: %w", err)
		}
		if err := job(&layerReader{r: r}, out, o, analyze); err != nil {
			return err
		}
	}
}

func job(lr *layerReader, out io.Writer, o layer.Options, analyze analyzeFunc) error {
	before := cpuTime()
	report, err := analyze(context.Background(), lr, o)
	// Whatever became of it, the next frame must be the next job.
	if _, derr := io.Copy(io.Discard, lr); derr != nil && !errors.Is(derr, errAborted) {
		return fmt.Errorf("read the rest of a layer: %w", derr)
	}
	if err != nil {
		return writeFrame(out, frameFailure, []byte(err.Error()))
	}
	b, err := json.Marshal(result{Report: report, CPU: cpuTime() - before, Peak: peak()})
	if err != nil {
		return fmt.Errorf("encode report: %w", err)
	}
	if err := writeFrame(out, frameReport, b); err != nil {
		return fmt.Errorf("send report: %w", err)
	}
	debug.FreeOSMemory() // idle workers hold nothing of the last layer
	return nil
}

// cpuTime is what this process has used so far.
func cpuTime() time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// peak is the most memory that this process ever had resident, in bytes
// (proc(5), VmHWM). Getrusage would count the parent's before exec, too.
func peak() int64 {
	b, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return 0
	}
	_, rest, ok := strings.Cut(string(b), "\nVmHWM:")
	if !ok {
		return 0
	}
	var kib int64
	if _, err := fmt.Sscan(rest, &kib); err != nil {
		return 0
	}
	return kib << 10
}
