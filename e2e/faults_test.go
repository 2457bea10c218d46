package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/bus"
	"github.com/tidewaiter/tidewaiter/services/tidewaiter/allinone"
	"github.com/tidewaiter/tidewaiter/services/tidewaiter/sample"
)

// undisturbed returns the reports of a fleet, by digest of the image, from a
// run in which nothing happens.
func undisturbed(t *testing.T, fleet []sample.Image) map[string]string {
	t.Helper()
	s, pushed := scanned(t, fleet)
	return s.reportDigests(pushed)
}

// scanned returns a pipeline that has attested a fleet, an image a repository.
func scanned(t *testing.T, fleet []sample.Image) (*system, []sample.Pushed) {
	t.Helper()
	s := start(t, allinone.Options{})
	var pushed []sample.Pushed
	for i, image := range fleet {
		pushed = append(pushed, s.push(fmt.Sprintf("fleet/app-%d", i), "1", image))
	}
	s.attested(pushed...)
	return s, pushed
}

// reportDigests returns the digest of each image's report. Reports carry no
// clocks, so they are the same whenever and wherever they are made.
func (s *system) reportDigests(pushed []sample.Pushed) map[string]string {
	s.t.Helper()
	out := map[string]string{}
	for _, p := range pushed {
		b, err := json.Marshal(s.report(p.String()))
		if err != nil {
			s.t.Fatal(err)
		}
		out[p.Ref.Digest] = contracts.DigestOf(b)
	}
	return out
}

func sameReports(t *testing.T, got, want map[string]string) {
	t.Helper()
	for image, report := range want {
		if got[image] != report {
			t.Errorf("the report of %s is %s, undisturbed it is %s", image, got[image], report)
		}
	}
}

// Redis loses everything, again and again, while work is going on.
func TestRedisFlushedInMidFlight(t *testing.T) {
	t.Parallel()
	fleet := fleet(t, 12, 600<<10, 10<<10)
	want := undisturbed(t, fleet)
	s := start(t, allinone.Options{})
	var pushed []sample.Pushed
	for i, image := range fleet {
		pushed = append(pushed, s.push(fmt.Sprintf("fleet/app-%d", i), "1", image))
		s.Servers.FlushRedis()
	}
	s.log.wait(t, func(l *events) string {
		s.Servers.FlushRedis()
		for _, p := range pushed {
			if len(l.about(contracts.ImageAttestedV1, p.String())) == 0 {
				return p.String() + " is not attested"
			}
		}
		return ""
	})
	sameReports(t, s.reportDigests(pushed), want)
}

// Every service is stopped and started again while work is going on.
func TestEveryServiceRestartedInMidFlight(t *testing.T) {
	t.Parallel()
	fleet := fleet(t, 14, 600<<10, 10<<10)
	want := undisturbed(t, fleet)
	s := start(t, allinone.Options{})
	var pushed []sample.Pushed
	for i, image := range fleet {
		service := allinone.Services()[i%len(allinone.Services())].Name
		pushed = append(pushed, s.push(fmt.Sprintf("fleet/app-%d", i), "1", image))
		if err := s.StopService(service); err != nil {
			t.Fatalf("stop %s: %v", service, err)
		}
		if err := s.StartService(service); err != nil {
			t.Fatalf("start %s: %v", service, err)
		}
	}
	s.attested(pushed...)
	s.quiet()
	sameReports(t, s.reportDigests(pushed), want)
	for layer, n := range s.log.analyses(t) {
		if n != 1 {
			t.Errorf("layer %s was analysed %d times", layer, n)
		}
	}
	for _, p := range pushed {
		if got := s.referrers(p.String()); len(got) != 4 {
			t.Errorf("%s carries %d referrers: %v", p, len(got), got)
		}
	}
}

// Layers that cannot be read, each in its own way: their images reach an end
// with the gap named, and the others are not disturbed.
func TestPoisonedLayers(t *testing.T) {
	t.Parallel()
	fleet := fleet(t, 4, 300<<10, 10<<10)
	want := undisturbed(t, fleet[:2])
	s := start(t, allinone.Options{})

	garbage := fleet[2]
	garbage.Layers = append(garbage.Layers[:3:3], rawLayer([]byte("\x1f\x8b\x08 this is no gzip stream at all")))
	truncated := fleet[3]
	own := truncated.Layers[3]
	truncated.Layers = append(truncated.Layers[:3:3], rawLayer(own.Content[:len(own.Content)/2]))

	poisoned := []sample.Pushed{s.push("bad/garbage", "1", garbage), s.push("bad/truncated", "1", truncated)}
	healthy := []sample.Pushed{s.push("fleet/app-0", "1", fleet[0]), s.push("fleet/app-1", "1", fleet[1])}
	s.attested(append(healthy, poisoned...)...)
	sameReports(t, s.reportDigests(healthy), want)
	for _, p := range poisoned {
		r := s.report(p.String())
		if len(r.Gaps) == 0 || r.Verdict == contracts.VerdictPass {
			t.Errorf("%s: verdict %s with %d gaps; what could not be read is never clean", p, r.Verdict, len(r.Gaps))
		}
	}
}

// A registry that serves other bytes than the digest promises: the layer is
// refused, the image reaches an end and says so.
func TestLayerWithoutItsDigest(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s := start(t, allinone.Options{Dir: dir})
	if err := s.StopService("planner"); err != nil {
		t.Fatal(err)
	}
	p := s.push("bad/swapped", "1", fleet(t, 1, 300<<10, 10<<10)...)
	last := p.Layers[len(p.Layers)-1]
	swapped := false
	err := filepath.WalkDir(filepath.Join(dir, "servers"), func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(path, strings.TrimPrefix(last, "sha256:")) {
			return err
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		b[len(b)/2] ^= 0xff
		swapped = true
		return os.WriteFile(path, b, 0o600)
	})
	if err != nil || !swapped {
		t.Fatalf("swap bytes of the stored layer: %v, found %t", err, swapped)
	}
	if err := s.StartService("planner"); err != nil {
		t.Fatal(err)
	}
	s.attested(p)
	r := s.report(p.String())
	if len(r.Gaps) == 0 || r.Verdict == contracts.VerdictPass {
		t.Errorf("verdict %s, gaps %v", r.Verdict, r.Gaps)
	}
	for _, m := range s.log.named(contracts.LayerFailedV1) {
		e, err := bus.Decode[contracts.LayerFailed](m.Event)
		if err != nil {
			t.Fatal(err)
		}
		if e.Digest != last {
			t.Errorf("layer %s failed: %s", e.Digest, e.Message)
		}
	}
}

func rawLayer(content []byte) sample.Layer {
	return sample.Layer{
		Instruction: "COPY poison / # buildkit", Content: content, DiffID: digest.FromString("unknown"),
		Descriptor: ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayerGzip, Digest: digest.FromBytes(content), Size: int64(len(content))},
	}
}
