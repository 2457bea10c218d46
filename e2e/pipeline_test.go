package e2e

import (
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/bus"
	"github.com/tidewaiter/tidewaiter/libs/registry"
	"github.com/tidewaiter/tidewaiter/libs/run"
	"github.com/tidewaiter/tidewaiter/services/tidewaiter/allinone"
	"github.com/tidewaiter/tidewaiter/services/tidewaiter/sample"
)

// One push of a two-platform index: one scan of each manifest, each distinct
// layer analysed once, one set of statements, and none of our own pushes is
// scanned.
func TestOnePushIsOneScan(t *testing.T) {
	t.Parallel()
	s := start(t, allinone.Options{})
	p := s.push("team/shop", "1.0", story(t).Vulnerable...)
	s.attested(p)
	s.quiet()

	layers := s.log.analyses(t)
	if len(layers) != len(p.Layers) {
		t.Errorf("%d layers were analysed, want the %d distinct ones", len(layers), len(p.Layers))
	}
	for layer, n := range layers {
		if n != 1 {
			t.Errorf("layer %s was analysed %d times", layer, n)
		}
	}
	for _, image := range images(p) {
		for _, name := range []string{contracts.ImageAssembledV1, contracts.ImageAttestedV1} {
			ids := map[string]bool{}
			for _, m := range s.log.snapshot() {
				if m.Event.Type() == contracts.TypePrefix+name && m.Event.Subject() == image {
					ids[m.Event.ID()] = true
				}
			}
			if name == contracts.ImageAssembledV1 && len(ids) != 1 {
				t.Errorf("%s: %d distinct %s", image, len(ids), name)
			}
		}
		if got := s.referrers(image); len(got) != 4 {
			t.Errorf("%s carries %d referrers, want vuln, VSA, report and SBOM: %v", image, len(got), got)
		}
		v, err := s.verify(image)
		if err != nil || !v.Verified || len(v.Statements) != 2 || len(v.Ignored) != 0 {
			t.Errorf("verify %s: %+v, %v", image, v, err)
		}
	}
	// what attestor pushed came back as notifications and was recognised
	planned := map[string]bool{}
	for _, m := range s.log.named(contracts.ImagePlannedV1) {
		planned[m.Event.Subject()] = true
	}
	if len(planned) != len(images(p)) {
		t.Errorf("%d images were planned, want %d: %v", len(planned), len(images(p)), planned)
	}
	if n := len(s.log.named(contracts.ImageUnsupportedV1)); n < 4*len(images(p)) {
		t.Errorf("%d of our own pushes were recognised, want %d", n, 4*len(images(p)))
	}
}

// What the images hold is found, and what a layer deleted is not.
func TestFindings(t *testing.T) {
	t.Parallel()
	s := start(t, allinone.Options{})
	stories := story(t)
	bad := s.push("team/shop", "1.0", stories.Vulnerable...)
	good := s.push("team/mended", "1.0", stories.Clean...)
	s.attested(bad, good)

	report := s.report(bad.String())
	if report.Verdict != contracts.VerdictFail || report.Kind != contracts.KindIndex || len(report.Parts) != 2 {
		t.Errorf("verdict %s, kind %s, %d parts", report.Verdict, report.Kind, len(report.Parts))
	}
	find := func(pkg, id string) *contracts.Finding {
		for i, f := range report.Findings {
			if f.Package.Name == pkg && (f.ID == id || slices.Contains(f.Aliases, id)) {
				return &report.Findings[i]
			}
		}
		return nil
	}
	for _, want := range []struct{ pkg, id string }{
		{"org.apache.logging.log4j:log4j-core", "CVE-2021-44228"},
		{"lodash", "CVE-2019-10744"},
		{"redis", "CVE-2018-11218"},
		{"tomcat", "CVE-2025-24813"},
		{"mysql", "CVE-2016-6662"},
		{"couchdb", "CVE-2022-24706"},
		{"jenkins", "CVE-2024-23897"},
		{"elasticsearch", "CVE-2021-22145"},
	} {
		if find(want.pkg, want.id) == nil {
			t.Errorf("%s was not found in %s", want.id, want.pkg)
		}
	}
	log4j := find("org.apache.logging.log4j:log4j-core", "CVE-2021-44228")
	if log4j == nil || !log4j.KEV || log4j.Severity != contracts.SeverityCritical || log4j.Layer == nil || len(log4j.Fixed) == 0 || len(log4j.Paths) == 0 {
		t.Errorf("log4shell: %+v", log4j)
	}
	for _, f := range report.Findings {
		if f.Package.Name == "minimist" {
			t.Errorf("minimist was deleted by a layer, and found: %+v", f)
		}
	}
	servers := map[string]bool{}
	for _, l := range report.Lags {
		servers[l.Product] = true
	}
	for _, want := range []string{"redis", "mysql", "tomcat", "jenkins", "elasticsearch", "apache-couchdb", "debian"} {
		if !servers[want] {
			t.Errorf("no lag of %s was measured: %v", want, servers)
		}
	}
	if clean := s.report(good.String()); clean.Verdict == contracts.VerdictFail {
		t.Errorf("the mended image fails: %v", clean.Reasons)
	}
}

// 50 pushes at once that share a base: no layer is analysed twice, and every
// image is attested.
func TestFiftyPushesAtOnce(t *testing.T) {
	t.Parallel()
	s := start(t, allinone.Options{})
	fleet := fleet(t, 50, 3<<20, 20<<10)
	pushed := make([]sample.Pushed, len(fleet))
	var group errgroup.Group
	for i, image := range fleet {
		group.Go(func() (err error) {
			ref := registry.Ref{Registry: s.Registry.Host, Repository: fmt.Sprintf("fleet/app-%d", i), Tag: "1"}
			pushed[i], err = sample.Push(t.Context(), s.client, ref, image)
			return err
		})
	}
	if err := group.Wait(); err != nil {
		t.Fatal(err)
	}
	s.attested(pushed...)
	total, distinct := 0, map[string]bool{}
	for _, p := range pushed {
		for _, l := range p.Layers {
			distinct[l] = true
		}
	}
	for _, n := range s.log.analyses(t) {
		total += n
	}
	t.Logf("layers analysed ÷ distinct layers = %d ÷ %d = %.2f", total, len(distinct), float64(total)/float64(len(distinct)))
	if total != len(distinct) {
		t.Errorf("%d analyses of %d distinct layers", total, len(distinct))
	}
}

// Every topic read again from its beginning, by every service: no statement,
// no finding and no id changes.
func TestReplayChangesNothing(t *testing.T) {
	t.Parallel()
	s := start(t, allinone.Options{})
	stories := story(t)
	pushed := []sample.Pushed{
		s.push("team/shop", "1.0", stories.Vulnerable...),
		s.push("team/reports", "1.0", stories.Sharing...),
		s.push("team/mended", "1.0", stories.Clean...),
	}
	s.attested(pushed...)
	s.quiet()

	type state struct {
		Referrers map[string][]string
		Problems  []contracts.Problem
		Reports   map[string]*contracts.Report
	}
	now := func() state {
		out := state{Referrers: map[string][]string{}, Problems: s.problems(), Reports: map[string]*contracts.Report{}}
		for _, p := range pushed {
			for _, image := range images(p) {
				out.Referrers[image], out.Reports[image] = s.referrers(image), s.report(image)
			}
		}
		return out
	}
	before, ids := now(), s.log.distinctIDs()
	if len(before.Problems) == 0 {
		t.Fatal("no problem is open, so nothing could change")
	}
	s.republish(s.log.snapshot())
	s.quiet()
	after := now()
	a, _ := json.Marshal(before)
	b, _ := json.Marshal(after)
	if string(a) != string(b) {
		t.Errorf("the replay changed something\nbefore %s\nafter  %s", a, b)
	}
	for _, id := range s.log.distinctIDs() {
		if !slices.Contains(ids, id) {
			t.Errorf("the replay made a new event: %s", id)
		}
	}
}

// A runnable image is scanned whatever its tag looks like and whatever it says
// it refers to; a signature is not.
func TestWhatIsAnImageIsDecidedByItsManifest(t *testing.T) {
	t.Parallel()
	s := start(t, allinone.Options{})
	image := fleet(t, 3, 3000, 1000)
	base := s.push("team/base", "1", image[0])
	s.attested(base)

	disguised := s.push("team/base", "sha256-"+base.Ref.Digest[len("sha256:"):]+".sig", image[1])
	s.attested(disguised)

	subject := image[2]
	subject.Subject = &ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.Digest(base.Ref.Digest), Size: base.Platforms[0].Size}
	referring := s.push("team/base", "refers", subject)
	s.attested(referring)
	if v, err := s.verify(referring.String()); err != nil || !v.Verified {
		t.Errorf("verify: %+v, %v", v, err)
	}
}

// A webhook about a registry that is not configured causes no connection.
func TestUnknownRegistryIsNeverConnectedTo(t *testing.T) {
	t.Parallel()
	var connections atomic.Int64
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			connections.Add(1)
			_ = c.Close()
		}
	}()
	cfg, err := run.Parse("", []byte("sources:\n  open:\n    kind: cloudevents\n    anyRegistry: true\n    auth: {none: true}\n"), noEnv)
	if err != nil {
		t.Fatal(err)
	}
	s := start(t, allinone.Options{Config: cfg})
	image := contracts.Image{Registry: l.Addr().String(), Repository: "team/app", Digest: contracts.DigestOf([]byte("x"))}
	body := fmt.Sprintf(`{"specversion":"1.0","id":"1","type":"com.example.push","source":"x","data":{"registry":%q,"repository":"team/app","tag":"1","digest":%q}}`, image.Registry, image.Digest)
	status, answer := s.deliver(s.Intake+"/hooks/open", map[string]string{"Content-Type": "application/cloudevents+json"}, []byte(body))
	if status/100 != 2 {
		t.Fatalf("webhook: %d %s", status, answer)
	}
	if end := s.ended(image.String()); end != contracts.ImageFailedV1 {
		t.Errorf("the image ended as %s", end)
	}
	s.quiet()
	if n := connections.Load(); n != 0 {
		t.Errorf("%d connections were made to a registry that nobody configured", n)
	}
}

func noEnv(string) (string, bool) { return "", false }

// Wrong secrets get 401 and leave nothing; what cannot be read gets a 2xx and
// a dead letter.
func TestWebhookAnswers(t *testing.T) {
	t.Parallel()
	s := start(t, allinone.Options{})
	hook := s.Intake + "/hooks/" + allinone.Source
	body := []byte(`{"events":[{"id":"1","action":"push","target":{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"` +
		contracts.DigestOf([]byte("y")) + `","repository":"a/b"},"request":{"host":"` + s.Registry.Host + `"}}]}`)
	for _, auth := range []string{"", "Bearer wrong", "Basic d3Jvbmc6d3Jvbmc="} {
		if status, _ := s.call(http.MethodPost, hook, map[string]string{"Authorization": auth}, body); status != http.StatusUnauthorized {
			t.Errorf("Authorization %q: %d, want 401", auth, status)
		}
	}
	b, err := bus.New(s.BusConfig(), "e2e-dlq", s.logger(), nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = b.Close() })
	status, _ := s.deliver(hook, map[string]string{"Authorization": "Bearer " + s.hookSecret()}, []byte("{broken"))
	if status/100 != 2 {
		t.Errorf("a body that cannot be read: %d, want 2xx", status)
	}
	letters, err := b.ListDeadLetters(t.Context(), bus.DeadLetterFilter{})
	if err != nil {
		t.Fatal(err)
	}
	if len(letters) != 1 || letters[0].Service != "intake" {
		t.Fatalf("dead letters: %+v, want the one body that could not be read", letters)
	}
	_, headers, stored, err := b.ReadDeadLetter(t.Context(), letters[0].ID)
	if err != nil || string(stored) != "{broken" {
		t.Errorf("dead letter: %q, %v", stored, err)
	}
	for k, v := range headers {
		if k == "Authorization" || v == "Bearer "+s.hookSecret() {
			t.Errorf("the dead letter holds a credential: %s", k)
		}
	}
	if n := len(s.log.named(contracts.ImagePushedV1)); n != 0 {
		t.Errorf("%d pushes were stored, want none", n)
	}
}

// An image deleted in its registry reaches the end "gone" when somebody says so.
func TestDeletedImageIsGone(t *testing.T) {
	t.Parallel()
	s := start(t, allinone.Options{})
	p := s.push("team/app", "1", fleet(t, 1, 3000, 100)...)
	s.attested(p)
	s.quiet()
	if len(s.problems()) == 0 {
		t.Fatal("no problem is open, so none could be closed")
	}
	status, answer := s.registryCall(http.MethodDelete, "/v2/team/app/manifests/"+p.Ref.Digest)
	if status/100 != 2 {
		t.Fatalf("delete: %d %s", status, answer)
	}
	s.log.wait(t, func(l *events) string {
		if len(l.about(contracts.ImageGoneV1, p.String())) == 0 {
			return "no image.gone"
		}
		return ""
	})
	s.log.wait(t, func(*events) string {
		if problems := s.problems(); len(problems) > 0 {
			return fmt.Sprintf("%d problems are still open", len(problems))
		}
		return ""
	})
}

// The timeline tells the whole story of an image, and the fleet report counts it.
func TestTimelineAndFleet(t *testing.T) {
	t.Parallel()
	s := start(t, allinone.Options{})
	p := s.push("team/shop", "1.0", story(t).Vulnerable...)
	s.attested(p)
	s.quiet()
	status, body := s.call(http.MethodGet, s.Catalog+"/v1/timeline?ref="+escape(s.Registry.Host+"/team/shop:1.0"),
		map[string]string{"Authorization": "Bearer " + s.Token}, nil)
	if status != http.StatusOK {
		t.Fatalf("timeline: %d %s", status, body)
	}
	seen := map[string]bool{}
	var last time.Time
	for line := range slices.Values(lines(body)) {
		var e contracts.TimelineEntry
		if err := json.Unmarshal(line, &e); err != nil {
			t.Fatalf("%s: %v", line, err)
		}
		if e.Time.Before(last) {
			t.Errorf("the timeline is out of order at %s", line)
		}
		last = e.Time
		seen[e.Step] = true
	}
	for _, step := range []string{contracts.StepPushed, contracts.StepPlanned, contracts.StepAssembled, contracts.StepMatched, contracts.StepAttested} {
		if !seen[step] {
			t.Errorf("the timeline does not tell of %q: %s", step, body)
		}
	}
	var fleet contracts.FleetReport
	s.catalog("/v1/report", &fleet)
	if fleet.Images != 1 || fleet.Vulnerable != 1 || fleet.ShareVuln == nil || *fleet.ShareVuln != 1 || fleet.Verdicts.Fail != 1 || fleet.Outdated != 1 {
		t.Errorf("fleet: %+v", fleet)
	}
	status, _ = s.call(http.MethodGet, s.Catalog+"/v1/report", nil, nil)
	if status != http.StatusUnauthorized {
		t.Errorf("the API answered %d without a token", status)
	}
}
