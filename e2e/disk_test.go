package e2e

import (
	"bytes"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/bus"
	"github.com/tidewaiter/tidewaiter/libs/run"
	"github.com/tidewaiter/tidewaiter/services/tidewaiter/allinone"
	"github.com/tidewaiter/tidewaiter/services/tidewaiter/sample"
)

// smallDisk mounts a file system of so many bytes, which only root may. resize
// gives it another size.
func smallDisk(t *testing.T, size string) (dir string, resize func(size string)) {
	t.Helper()
	dir = t.TempDir()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size="+size); err != nil {
		t.Skipf("a small file system cannot be mounted, which root may: %v", err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, syscall.MNT_DETACH); err != nil {
			t.Errorf("unmount %s: %v", dir, err)
		}
	})
	return dir, func(size string) {
		t.Helper()
		if err := syscall.Mount("tmpfs", dir, "tmpfs", syscall.MS_REMOUNT, "size="+size); err != nil {
			t.Fatal(err)
		}
	}
}

// A disk that is too full for what analyzer has to put aside: the image ends
// with a gap that says so, which is no pass; with room, and pushed again, its
// findings are those of an undisturbed run.
func TestDiskFullForSpills(t *testing.T) {
	tool := append(sample.GoBinary("go1.20.1", "example.com/tool", sample.GoModule{Path: "golang.org/x/net", Version: "v0.7.0"}), sample.Noise(7, 64<<20)...)
	large, err := sample.NewLayer("COPY tool", sample.File{Path: "usr/bin/tool", Body: tool, Mode: 0o755})
	if err != nil {
		t.Fatal(err)
	}
	image := distinctFleet(t, 70, 1)[0]
	image.Layers = append(image.Layers, large)
	want := undisturbed(t, []sample.Image{image})

	s := start(t, allinone.Options{})
	dir, resize := smallDisk(t, "1m")
	t.Setenv("TMPDIR", dir) // workers start when they are needed
	p := s.push("full/app", "1", image)
	s.attested(p)
	r := s.report(p.String())
	if len(r.Gaps) != 1 || r.Gaps[0].Layer != large.Descriptor.Digest.String() || !strings.Contains(r.Gaps[0].Reason, "no space") || r.Verdict == contracts.VerdictPass {
		t.Errorf("verdict %s with gaps %+v; what could not be looked at is never clean", r.Verdict, r.Gaps)
	}
	for _, l := range s.deadLetters() {
		if l.Service != "analyzer" || l.Subject != large.Descriptor.Digest.String() || !strings.Contains(l.Reason, "no space") {
			t.Errorf("dead letter %s of %s about %s: %s", l.ID, l.Service, l.Subject, l.Reason)
		}
	}
	resize("512m")
	s.announce(p)
	s.log.wait(t, func(l *events) string {
		reports := map[string]bool{}
		for _, m := range l.about(contracts.ImageAttestedV1, p.String()) {
			if d, err := bus.Decode[contracts.ImageAttested](m.Event); err == nil {
				reports[d.Report.Digest] = true
			}
		}
		if len(reports) < 2 {
			return "nothing new is said of " + p.String()
		}
		return ""
	})
	s.quiet()
	sameReports(t, s.reportDigests([]sample.Pushed{p}), want)
}

// A disk that is too full for the database: everything waits, says so, and
// goes on when there is room.
func TestDiskFullForDatabase(t *testing.T) {
	t.Parallel()
	fleet := distinctFleet(t, 71, 4)
	want := undisturbed(t, fleet)
	dir, _ := smallDisk(t, "24m")
	cfg, err := run.Parse("", []byte("database: {url: 'sqlite://"+filepath.Join(dir, "tidewaiter.db")+"'}"), func(string) (string, bool) { return "", false })
	if err != nil {
		t.Fatal(err)
	}
	s := start(t, allinone.Options{Config: cfg})
	s.attested(s.push("full/before", "1", distinctFleet(t, 72, 1)...)) // by now every service has its tables
	ballast := filepath.Join(dir, "ballast")
	f, err := os.Create(ballast)
	if err != nil {
		t.Fatal(err)
	}
	for size := 1 << 20; size > 0; { // to the last byte
		if _, err := f.Write(bytes.Repeat([]byte{1}, size)); errors.Is(err, syscall.ENOSPC) {
			size /= 2
		} else if err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	var pushed []sample.Pushed
	for i, image := range fleet {
		pushed = append(pushed, s.push(fmt.Sprintf("full/app-%d", i), "1", image))
	}
	s.log.wait(t, func(*events) string {
		status, body := s.call(http.MethodGet, s.Monitor+"/readyz", nil, nil)
		if status != http.StatusServiceUnavailable || !bytes.Contains(body, []byte("full")) {
			return fmt.Sprintf("readyz says %d %s", status, body)
		}
		return ""
	})
	if n := len(s.log.named(contracts.ImageAttestedV1)); n != 1 {
		t.Errorf("%d images were attested without room for it", n-1)
	}
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	s.attested(pushed...)
	s.quiet()
	sameReports(t, s.reportDigests(pushed), want)
	for layer, n := range s.log.analyses(t) {
		if n != 1 {
			t.Errorf("layer %s was analysed %d times", layer, n)
		}
	}
	for _, l := range s.deadLetters() {
		t.Errorf("dead letter %s: %s", l.ID, l.Reason)
	}
}
