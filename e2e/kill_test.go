package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/registry"
	"github.com/tidewaiter/tidewaiter/services/tidewaiter/allinone"
	"github.com/tidewaiter/tidewaiter/services/tidewaiter/sample"
)

// buildOnce builds the program once for all tests that run it as a process.
var buildOnce = sync.OnceValues(func() (string, error) {
	bin := filepath.Join(programs, "tidewaiter")
	out, err := exec.Command("go", "build", "-o", bin, "github.com/tidewaiter/tidewaiter/services/tidewaiter").CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("build: %w\n%s", err, out)
	}
	return bin, nil
})

func program(t *testing.T) string {
	t.Helper()
	bin, err := buildOnce()
	if err != nil {
		t.Fatal(err)
	}
	return bin
}

// up is `tidewaiter up` as a process of its own.
type up struct {
	t    *testing.T
	dir  string
	args []string
	cmd  *exec.Cmd
	out  *bytes.Buffer
}

func newUp(t *testing.T, dir string) *up {
	t.Helper()
	args := []string{"--log-level", "error", "up", "--data", dir}
	for _, flag := range []string{"--listen", "--catalog-listen", "--monitor-listen", "--registry-listen"} {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		args = append(args, flag, l.Addr().String())
		_ = l.Close()
	}
	u := &up{t: t, dir: dir, args: args}
	t.Cleanup(func() {
		if u.cmd != nil {
			u.kill()
		}
		if t.Failed() && u.out != nil {
			t.Logf("up said: %s", u.out)
		}
	})
	return u
}

// start starts the process and waits until it has said how it is reached.
func (u *up) start() allinone.Addresses {
	u.t.Helper()
	_ = os.Remove(filepath.Join(u.dir, "addresses.json"))
	u.out = &bytes.Buffer{}
	u.cmd = exec.Command(program(u.t), u.args...)
	u.cmd.Stderr = u.out
	if err := u.cmd.Start(); err != nil {
		u.t.Fatal(err)
	}
	deadline := time.Now().Add(patience)
	for {
		if a, err := allinone.ReadAddresses(u.dir); err == nil {
			return a
		}
		if time.Now().After(deadline) {
			u.t.Fatalf("up did not start: %s", u.out)
		}
		pause(u.t, 20*time.Millisecond)
	}
}

// kill ends the process as a power cut would.
func (u *up) kill() {
	u.t.Helper()
	_ = u.cmd.Process.Signal(syscall.SIGKILL)
	_ = u.cmd.Wait() // says only that it was killed
	u.cmd = nil
}

// pause waits a moment between two looks at a condition.
func pause(t *testing.T, d time.Duration) {
	t.Helper()
	select {
	case <-time.After(d):
	case <-t.Context().Done():
		t.Fatal(t.Context().Err())
	}
}

// Killed with -9 again and again while images are pushed, and started on the
// same data: every push that the registry acknowledged is attested, with the
// findings of an undisturbed run.
func TestUpSurvivesKill(t *testing.T) {
	t.Parallel()
	fleet := fleet(t, 12, 900<<10, 20<<10)
	want := undisturbed(t, fleet)
	u := newUp(t, t.TempDir())
	var pushed []sample.Pushed
	for i := 0; i < len(fleet); {
		a := u.start()
		client, err := registry.New([]registry.Host{a.RegistryHost()}, (&system{}).logger())
		if err != nil {
			t.Fatal(err)
		}
		for range 4 { // then it is killed, with most of the work still to do
			p, err := sample.Push(t.Context(), client, registry.Ref{Registry: a.Registry.Host, Repository: fmt.Sprintf("fleet/app-%d", i), Tag: "1"}, fleet[i])
			if err != nil {
				t.Fatal(err)
			}
			pushed = append(pushed, p)
			i++
		}
		u.kill()
	}
	a := u.start()
	client, err := registry.New([]registry.Host{a.RegistryHost()}, (&system{}).logger())
	if err != nil {
		t.Fatal(err)
	}
	s := &system{t: t, client: client, AllInOne: &allinone.AllInOne{Addresses: a}}
	s.log = listen(t, s.BusConfig())
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	for _, p := range pushed {
		for {
			v, err := s.verify(p.String())
			attached := s.referrers(p.String())
			if err == nil && v.Verified && len(attached) == 4 {
				break
			}
			if ctx.Err() != nil {
				t.Fatalf("%s is not attested, it carries %v: %s", p, attached, u.out)
			}
			pause(t, 50*time.Millisecond)
		}
	}
	// nothing more comes of what was done twice
	s.quiet()
	analyses := s.log.analyses(t)
	for _, p := range pushed {
		if got := s.referrers(p.String()); len(got) != 4 {
			t.Errorf("%s carries %d referrers, want 4: %v", p, len(got), got)
		}
		for _, layer := range p.Layers {
			if n := analyses[layer]; n != 1 {
				t.Errorf("layer %s of %s was analysed %d times", layer, p, n)
			}
		}
	}
	sameReports(t, s.reportDigests(pushed), want)
}

// The demo tells its story to machines and to people, and says at the end
// where everything is.
func TestDemo(t *testing.T) {
	t.Parallel()
	var out, errOut bytes.Buffer
	cmd := exec.CommandContext(t.Context(), program(t), "demo", "--output", "json")
	cmd.Stdout, cmd.Stderr = &out, &errOut
	if err := cmd.Run(); err != nil {
		t.Fatalf("demo: %v\n%s", err, errOut.String())
	}
	steps := map[string]int{}
	var last contracts.TimelineEntry
	for _, line := range lines(out.Bytes()) {
		last = contracts.TimelineEntry{}
		if err := json.Unmarshal(line, &last); err != nil {
			t.Fatalf("%s: %v", line, err)
		}
		steps[last.Step]++
		if last.Step == contracts.StepPushed && (last.Registry == "" || last.Image == "") {
			t.Errorf("a push without registry and image: %s", line)
		}
	}
	for _, step := range []string{
		contracts.StepPushed, contracts.StepPlanned, contracts.StepAnalyzed, contracts.StepDeduplicated,
		contracts.StepAssembled, contracts.StepMatched, contracts.StepAttested, contracts.StepVerified,
	} {
		if steps[step] == 0 {
			t.Errorf("the demo does not tell of %q", step)
		}
	}
	if last.Step != contracts.StepDone || last.OK == nil || !*last.OK || last.Image == "" || last.PublicKey == "" {
		t.Errorf("the last line is %+v", last)
	}
}
