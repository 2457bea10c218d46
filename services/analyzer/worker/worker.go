// Package worker analyses layers in child processes, as parsers of foreign
// bytes may crash, hang or eat memory.
//
// A child is this executable started again, with an empty environment, no file
// but its three pipes, lowered limits and a private temporary folder. It gets
// the compressed layer over its standard input and answers with the report. A
// child that dies, hangs or grows too large costs one layer a gap; it is
// replaced, and the layer is still read to its end, so that its digest is
// verified.
package worker

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/services/analyzer/layer"
)

const (
	// DefaultMemory bounds what a child may have resident, in bytes.
	DefaultMemory = 256 << 20
	// DefaultRecycle is after how many layers a child is replaced, so that
	// nothing can pile up in it.
	DefaultRecycle = 200
	// DefaultStall is how long a child may take over the layer's own time limit
	// to accept a piece or to answer.
	DefaultStall = 20 * time.Second
	// executable is this program, even if its file was replaced meanwhile.
	executable = "/proc/self/exe"
	// watchEvery is how often a busy child's memory is looked at.
	watchEvery = 5 * time.Millisecond
	// startTimeout bounds the start of a child.
	startTimeout = 30 * time.Second
	// pipeSize is the buffer of the pipe to a child, in bytes.
	pipeSize = 1 << 20
	// stopTimeout is how long a child may take to end by itself.
	stopTimeout = 2 * time.Second
)

// CrashReason begins the reason of the gap that a crashed child leaves. Unlike
// a limit, it may not happen again.
const CrashReason = "analyzer crashed: "

// ErrClosed is returned by a pool that was closed.
var ErrClosed = errors.New("worker pool is closed")

// Config sizes a Pool. Zero values mean the defaults.
type Config struct {
	Workers int           // children at once; default one a CPU
	Memory  int64         // resident bytes a child
	Recycle int           // layers a child
	Stall   time.Duration // see DefaultStall
}

// Pool is a set of child processes, started when they are needed.
type Pool struct {
	cfg    Config
	log    *slog.Logger
	slots  chan *process // nil: to be started
	closed chan struct{}
	once   sync.Once
	peak   atomic.Int64
}

// process is one child process and its pipes.
type process struct {
	pid     int
	in      *os.File
	answers chan answer   // closed when the child's output ended
	ended   chan struct{} // closed when the process is gone
	state   *os.ProcessState
	stderr  *tail
	kill    func()
	jobs    int
	cpu     time.Duration // reported so far
	memory  atomic.Bool   // it was killed for its size
	hung    atomic.Bool   // it was killed for its slowness
}

type answer struct {
	kind    byte
	payload []byte
}

// New returns a pool that says in log when it replaces a child; no child is
// started yet.
func New(cfg Config, log *slog.Logger) (*Pool, error) {
	if _, err := os.Stat(executable); err != nil {
		return nil, fmt.Errorf("workers need proc(5): %w", err)
	}
	if cfg.Workers <= 0 {
		cfg.Workers = runtime.NumCPU()
	}
	if cfg.Memory <= 0 {
		cfg.Memory = DefaultMemory
	}
	if cfg.Recycle <= 0 {
		cfg.Recycle = DefaultRecycle
	}
	if cfg.Stall <= 0 {
		cfg.Stall = DefaultStall
	}
	p := &Pool{cfg: cfg, log: log, slots: make(chan *process, cfg.Workers), closed: make(chan struct{})}
	for range cfg.Workers {
		p.slots <- nil
	}
	return p, nil
}

// Close waits for layers in hand, ends all children and returns when they are
// gone. Analyze returns ErrClosed from then on.
func (p *Pool) Close() {
	p.once.Do(func() {
		close(p.closed)
		for range p.cfg.Workers {
			if c := <-p.slots; c != nil {
				c.stop()
			}
		}
	})
}

// PeakMemory returns the most bytes that any child had resident so far.
func (p *Pool) PeakMemory() int64 { return p.peak.Load() }

func (p *Pool) saw(bytes int64) {
	for {
		most := p.peak.Load()
		if bytes <= most || p.peak.CompareAndSwap(most, bytes) {
			return
		}
	}
}

// Analyze does what layer.Analyze does, in a child. It also returns the CPU
// time that the child used. Errors are those of r and of ctx, and of children
// that cannot be started.
func (p *Pool) Analyze(ctx context.Context, r io.Reader, o layer.Options) (*contracts.LayerReport, time.Duration, error) {
	var c *process
	select {
	case <-p.closed:
		return nil, 0, ErrClosed
	default:
	}
	select {
	case <-ctx.Done():
		return nil, 0, ctx.Err()
	case <-p.closed:
		return nil, 0, ErrClosed
	case c = <-p.slots:
	}
	defer func() { p.slots <- c }()

	if c == nil || c.gone() {
		if c != nil {
			c.stop()
		}
		var err error
		if c, err = p.start(ctx); err != nil {
			c = nil
			return nil, 0, fmt.Errorf("start worker: %w", err)
		}
	}
	report, cpu, err := p.run(ctx, c, r, o)
	c.jobs++
	if c.gone() || c.jobs >= p.cfg.Recycle {
		c.stop()
		c = nil
	}
	return report, cpu, err
}

// run gives one layer to a child.
func (p *Pool) run(ctx context.Context, c *process, r io.Reader, o layer.Options) (*contracts.LayerReport, time.Duration, error) {
	stall := p.cfg.Stall + o.Timeout
	if o.Timeout <= 0 {
		stall = p.cfg.Stall + layer.DefaultTimeout
	}
	stop := c.watch(p)
	defer stop()

	sent, err := c.send(ctx, r, o, stall)
	if err != nil { // r's or ctx's
		if !sent || c.await(ctx, stall).kind == 0 {
			c.stop()
		}
		return nil, 0, err
	}
	if sent {
		a := c.await(ctx, stall)
		switch {
		case a.kind == frameReport:
			var res result
			if err := json.Unmarshal(a.payload, &res); err != nil || res.Report == nil {
				c.stop()
				return c.crashed(o, "unreadable report"), c.usage(), nil
			}
			c.cpu += res.CPU
			p.saw(res.Peak)
			return res.Report, res.CPU, nil
		case a.kind == frameFailure:
			if strings.Contains(string(a.payload), layer.ErrDigest.Error()) {
				return nil, 0, layer.ErrDigest
			}
			return nil, 0, fmt.Errorf("analyse layer in worker: %s", a.payload)
		case ctx.Err() != nil:
			c.stop()
			return nil, 0, ctx.Err()
		}
	}
	// The child is gone, or has to go; the layer is read on for its digest.
	c.stop()
	if _, err := io.Copy(io.Discard, ctxReader{ctx, r}); err != nil {
		return nil, c.usage(), fmt.Errorf("read layer: %w", err)
	}
	report := c.crashed(o, "")
	p.log.WarnContext(ctx, "layer worker did not survive a layer", "layer", o.Digest, "reason", report.Gaps[0].Reason)
	return report, c.usage(), nil
}

type ctxReader struct {
	ctx context.Context
	r   io.Reader
}

func (c ctxReader) Read(p []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	return c.r.Read(p)
}

// send streams a layer to the child. false means that the child did not take
// it all; an error is that of r or ctx, of which the child was told if sent is
// true.
func (c *process) send(ctx context.Context, r io.Reader, o layer.Options, stall time.Duration) (sent bool, err error) {
	opts, err := json.Marshal(o)
	if err != nil {
		return false, fmt.Errorf("encode job: %w", err)
	}
	if !c.write(append(head(frameJob, len(opts)), opts...), stall) {
		return false, nil
	}
	buf := make([]byte, headSize+pieceSize)
	for {
		n, rerr := readSome(ctxReader{ctx, r}, buf[headSize:])
		if n > 0 {
			putHead(buf, frameData, n)
			if !c.write(buf[:headSize+n], stall) {
				return false, nil
			}
		}
		if rerr == io.EOF { //nolint:errorlint // a digest mismatch may wrap io.EOF, only the bare one is the end
			return c.write(head(frameEnd, 0), stall), nil
		}
		if rerr != nil {
			return c.write(head(frameAbort, 0), stall), fmt.Errorf("read layer: %w", rerr)
		}
	}
}

// readSome fills p as far as it goes without waiting for the last byte: small
// reads of a slow source are gathered, so that frames are large.
func readSome(r io.Reader, p []byte) (int, error) {
	n := 0
	for n < len(p)/2 {
		m, err := r.Read(p[n:])
		n += m
		if err != nil {
			return n, err
		}
	}
	return n, nil
}

func head(kind byte, size int) []byte {
	b := make([]byte, headSize)
	putHead(b, kind, size)
	return b
}

// write gives the child bytes; false means that it is gone or hangs.
func (c *process) write(b []byte, stall time.Duration) bool {
	if err := c.in.SetWriteDeadline(time.Now().Add(stall)); err != nil {
		return false
	}
	_, err := c.in.Write(b)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		c.hung.Store(true)
	}
	return err == nil
}

// await waits for the child's answer; kind 0 means that there is none.
func (c *process) await(ctx context.Context, stall time.Duration) answer {
	timer := time.NewTimer(stall)
	defer timer.Stop()
	select {
	case a, ok := <-c.answers:
		if !ok {
			return answer{}
		}
		return a
	case <-timer.C:
		c.hung.Store(true)
		return answer{}
	case <-ctx.Done():
		return answer{}
	}
}

// crashed is the report about a layer that the child did not survive.
func (c *process) crashed(o layer.Options, why string) *contracts.LayerReport {
	reason := ""
	switch {
	case c.memory.Load(), c.stderr.has("out of memory"):
		reason = "limit: memory"
	case c.hung.Load():
		reason = "limit: time"
	case why != "":
		reason = CrashReason + why
	default:
		reason = CrashReason + c.stderr.summary(c.state)
	}
	return &contracts.LayerReport{
		Analyzer: layer.Version, Digest: o.Digest,
		Gaps: []contracts.Gap{{Layer: o.Digest, Reason: reason}},
	}
}

// usage is the CPU time of the layer that the child did not survive.
func (c *process) usage() time.Duration {
	if c.state == nil {
		return 0
	}
	return max(0, c.state.UserTime()+c.state.SystemTime()-c.cpu)
}

// start starts a child and waits until it is ready.
func (p *Pool) start(ctx context.Context) (*process, error) {
	dir, err := os.MkdirTemp("", "tidewaiter-worker-*")
	if err != nil {
		return nil, err
	}
	inRead, inWrite, err := os.Pipe()
	if err != nil {
		_ = os.RemoveAll(dir)
		return nil, err
	}
	outRead, outWrite, err := os.Pipe()
	if err != nil {
		_ = inRead.Close()
		_ = inWrite.Close()
		_ = os.RemoveAll(dir)
		return nil, err
	}
	// Large pipes spare switching between the processes; the default works too.
	if raw, err := inWrite.SyscallConn(); err == nil {
		_ = raw.Control(func(fd uintptr) { _, _ = unix.FcntlInt(fd, unix.F_SETPIPE_SZ, pipeSize) })
	}

	c := &process{in: inWrite, answers: make(chan answer, 2), ended: make(chan struct{}), stderr: &tail{}}
	cmd := exec.Command(executable) // ourselves; ended by stop, not by a context
	cmd.Args = []string{"tidewaiter-worker"}
	cmd.Dir = dir
	cmd.Env = []string{
		Environment + "=1",
		"TMPDIR=" + dir,
		"GOMAXPROCS=1",
		// The collector works harder before the parent has to kill.
		"GOMEMLIMIT=" + strconv.FormatInt(p.cfg.Memory*5/8, 10),
		"GOTRACEBACK=single",
	}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = inRead, outWrite, c.stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Pdeathsig: syscall.SIGKILL, // it never outlives us
		Setpgid:   true,            // an interrupt of the terminal is for us
	}

	started := make(chan error, 1)
	go func() {
		// The kernel sends Pdeathsig when the thread ends that started the
		// child: this one lives as long as the child does.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		_ = inRead.Close()
		_ = outWrite.Close()
		if err == nil {
			c.pid = cmd.Process.Pid
		}
		started <- err
		if err != nil {
			_ = os.RemoveAll(dir)
			close(c.ended)
			return
		}
		_ = cmd.Wait() // how it ended is in its state
		c.state = cmd.ProcessState
		_ = os.RemoveAll(dir)
		close(c.ended)
	}()
	if err := <-started; err != nil {
		_ = inWrite.Close()
		_ = outRead.Close()
		return nil, err
	}
	c.kill = func() { _ = cmd.Process.Kill() }
	go func() {
		defer func() { _ = outRead.Close() }()
		defer close(c.answers)
		for {
			kind, payload, err := readFrame(outRead, maxResult)
			if err != nil {
				return
			}
			select {
			case c.answers <- answer{kind, payload}:
			case <-c.ended:
				// The answer to nobody's question.
			}
		}
	}()
	if a := c.await(ctx, startTimeout); a.kind != frameReady {
		c.stop()
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		return nil, fmt.Errorf("worker did not start: %s", c.stderr.summary(c.state))
	}
	return c, nil
}

// gone says whether the process has ended.
func (c *process) gone() bool {
	select {
	case <-c.ended:
		return true
	default:
		return false
	}
}

// stop ends the child and returns when it is gone.
func (c *process) stop() {
	_ = c.in.Close() // ends an idle child
	if !c.hung.Load() {
		timer := time.NewTimer(stopTimeout)
		defer timer.Stop()
		select {
		case <-c.ended:
		case <-timer.C:
		}
	}
	c.kill()
	<-c.ended
	for range c.answers { //nolint:revive // until its reader ended
	}
}

// watch kills the child when it has more resident than the pool allows, until
// the returned function is called.
func (c *process) watch(p *Pool) (stop func()) {
	limit := p.cfg.Memory - p.cfg.Memory/8 // it grows on until the next look
	done, finished := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(finished)
		ticker := time.NewTicker(watchEvery)
		defer ticker.Stop()
		for {
			select {
			case <-done:
				return
			case <-c.ended:
				return
			case <-ticker.C:
				now := resident(c.pid)
				p.saw(now)
				if now > limit {
					c.memory.Store(true)
					c.kill()
					return
				}
			}
		}
	}()
	return func() {
		close(done)
		<-finished
	}
}

// resident is the resident memory of a process in bytes (proc(5), statm); 0 if
// it is gone.
func resident(pid int) int64 {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/statm")
	if err != nil {
		return 0
	}
	fields := strings.Fields(string(b))
	if len(fields) < 2 {
		return 0
	}
	pages, err := strconv.ParseInt(fields[1], 10, 64)
	if err != nil {
		return 0
	}
	return pages * int64(os.Getpagesize())
}

// tail keeps the beginning of what a child says before it dies.
type tail struct {
	mu sync.Mutex
	b  []byte
}

func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if room := 4096 - len(t.b); room > 0 {
		t.b = append(t.b, p[:min(room, len(p))]...)
	}
	return len(p), nil
}

func (t *tail) has(s string) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return strings.Contains(string(t.b), s)
}

// summary is the first line of it, or how the process ended. It holds no more
// than printable ASCII: a foreign file may have caused it.
func (t *tail) summary(state *os.ProcessState) string {
	t.mu.Lock()
	line, _, _ := strings.Cut(string(t.b), "\n")
	t.mu.Unlock()
	if line == "" && state != nil {
		line = state.String()
	}
	line = strings.Map(func(r rune) rune {
		if r < ' ' || r > '~' {
			return '?'
		}
		return r
	}, line)
	return line[:min(len(line), 200)]
}
