package main

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/run"
	"github.com/tidewaiter/tidewaiter/services/advisor/artefact"
	"github.com/tidewaiter/tidewaiter/services/analyzer/worker"
	"github.com/tidewaiter/tidewaiter/services/tidewaiter/sample"
)

func TestMain(m *testing.M) {
	worker.Main()
	os.Exit(m.Run())
}

// tidewaiter runs a command line and returns what it printed.
func tidewaiter(t *testing.T, stdin string, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, errOut bytes.Buffer
	code = Main(t.Context(), args, strings.NewReader(stdin), &out, &errOut)
	return code, out.String(), errOut.String()
}

func TestUsage(t *testing.T) {
	empty := t.TempDir()
	for _, test := range []struct {
		args []string
		code int
		want string // in stdout or stderr
	}{
		{nil, run.ExitOK, "tidewaiter demo"},
		{[]string{"--help"}, run.ExitOK, "attestation"},
		{[]string{"--version"}, run.ExitOK, "devel"},
		{[]string{"scan", "--help"}, run.ExitOK, "Examples:"},
		{[]string{"nonsense"}, run.ExitUsage, "nonsense"},
		{[]string{"scan"}, run.ExitUsage, "<image>"},
		{[]string{"scan", "x", "--output", "xml"}, run.ExitUsage, "--output"},
		{[]string{"run", "nobody"}, run.ExitUsage, `no service "nobody"`},
		{[]string{"run", "planner"}, run.ExitUsage, "kafka.brokers: it is not set, and needed by planner"},
		{[]string{"where", "a/b:c", "--data", empty}, run.ExitUnavailable, "tidewaiter up --data"},
		{[]string{"report", "--data", empty}, run.ExitUnavailable, "nothing is running"},
		{[]string{"dlq", "list", "--data", empty}, run.ExitUnavailable, "--config FILE with kafka.brokers"},
		{[]string{"dlq", "list", "--server", "http://127.0.0.1:1"}, run.ExitUsage, "--server"},
		{[]string{"dlq", "replay", "--data", empty}, run.ExitUsage, "--all"},
		{[]string{"verify", "not an image", "--key", "x"}, run.ExitUsage, "not an image name"},
		{[]string{"verify", "127.0.0.1:1/a/b:c", "--key", empty + "/none"}, run.ExitUsage, "public key"},
		{[]string{"scan", "127.0.0.1:1/a/b:c"}, run.ExitUnavailable, "127.0.0.1:1"},
		{[]string{"match", empty + "/none"}, run.ExitUsage, "none"},
		{[]string{"advisories", "status", empty + "/none"}, run.ExitUsage, "none"},
		{[]string{"advisories", "build", "--from", empty, "--out", empty + "/x/y/z"}, run.ExitUsage, ""},
		{[]string{"config", "check", empty + "/none"}, run.ExitUsage, "none"},
		{[]string{"webhook", "decode", "--source", "fax"}, run.ExitUsage, "fax"},
		{[]string{"webhook", "decode", "--source", "distribution", "-H", "nocolon"}, run.ExitUsage, "colon"},
		{[]string{"up", "--advisories", empty + "/none", "--data", empty}, run.ExitUsage, "none"},
		{[]string{"deployed", "import", empty + "/none"}, run.ExitUsage, "none"},
		{[]string{"deployed", "import", "-", "--data", empty}, run.ExitUsage, "no image"},
		{[]string{"advisories", "pull", "nowhere", "--key", "x"}, run.ExitUsage, "nowhere"},
		{[]string{"advisories", "pull", "127.0.0.1:1/a/b", "--key", empty + "/none"}, run.ExitUsage, "none"},
		{[]string{"demo", "--advisories", empty + "/none"}, run.ExitUsage, "none"},
	} {
		code, stdout, stderr := tidewaiter(t, "", test.args...)
		if code != test.code || !strings.Contains(stdout+stderr, test.want) {
			t.Errorf("%v: exit code %d, want %d with %q in\n%s%s", test.args, code, test.code, test.want, stdout, stderr)
		}
	}
}

func TestKeysGenerateNeverOverwrites(t *testing.T) {
	t.Setenv("TIDEWAITER_KEY_PASSWORD", "secret")
	out := filepath.Join(t.TempDir(), "attestor")
	if code, _, stderr := tidewaiter(t, "", "keys", "generate", "--out", out); code != run.ExitOK {
		t.Fatalf("exit code %d: %s", code, stderr)
	}
	for name, mode := range map[string]fs.FileMode{out + ".key": 0o600, out + ".pub": 0o644} {
		info, err := os.Stat(name)
		if err != nil || info.Mode().Perm()&^mode != 0 {
			t.Errorf("%s: %v, %v", name, info.Mode(), err)
		}
	}
	before, err := os.ReadFile(out + ".key")
	if err != nil {
		t.Fatal(err)
	}
	if code, _, stderr := tidewaiter(t, "", "keys", "generate", "--out", out); code != run.ExitUsage || !strings.Contains(stderr, "not overwritten") {
		t.Errorf("second time: exit code %d: %s", code, stderr)
	}
	after, err := os.ReadFile(out + ".key")
	if err != nil || !bytes.Equal(before, after) {
		t.Error("the key was overwritten")
	}
}

func TestWebhookDecode(t *testing.T) {
	d := contracts.DigestOf([]byte("manifest"))
	body := `{"events":[
	 {"id":"1","action":"push","target":{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"` + d + `","repository":"team/app","tag":"1.0"},"request":{"host":"r.example.com"}},
	 {"id":"2","action":"pull","target":{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"` + d + `","repository":"team/app"},"request":{"host":"r.example.com"}}]}`
	code, stdout, stderr := tidewaiter(t, body, "webhook", "decode", "--source", "distribution")
	var got contracts.WebhookDecode
	if err := json.Unmarshal([]byte(stdout), &got); err != nil || code != run.ExitOK {
		t.Fatalf("exit code %d, %v\n%s%s", code, err, stdout, stderr)
	}
	if got.Status != 202 || len(got.Events) != 2 || got.Events[0].Action != "push" || got.Events[1].Action != "ignore" {
		t.Errorf("decoded %+v", got)
	}
	if e := got.Events[0]; *e.Registry != "r.example.com" || *e.Repository != "team/app" || *e.Tag != "1.0" || *e.Digest != d {
		t.Errorf("push: %s", stdout)
	}
	if got.Events[1].Tag != nil {
		t.Errorf("a tag that was not said must be null: %s", stdout)
	}
	code, stdout, _ = tidewaiter(t, body, "webhook", "decode", "--source", "distribution", "--secret", "s")
	if err := json.Unmarshal([]byte(stdout), &got); err != nil || got.Status != 401 || code != run.ExitOK {
		t.Errorf("wrong secret: exit code %d, %s", code, stdout)
	}
}

// A source of the configuration is read with its own registry and mapping,
// without which the kind "generic" reads nothing.
func TestWebhookDecodeAs(t *testing.T) {
	file := filepath.Join(t.TempDir(), "tidewaiter.yaml")
	content := `
sources:
  ours:
    kind: generic
    registry: r.example.com
    auth: {none: true}
    mapping: {action: '"push"', repository: body.image, tag: body.version}
`
	if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	body := `{"image": "team/app", "version": "1.0"}`
	code, stdout, stderr := tidewaiter(t, body, "webhook", "decode", "--as", "ours", "--config", file)
	var got contracts.WebhookDecode
	if err := json.Unmarshal([]byte(stdout), &got); err != nil || code != run.ExitOK || len(got.Events) != 1 {
		t.Fatalf("exit code %d, %v\n%s%s", code, err, stdout, stderr)
	}
	if e := got.Events[0]; e.Action != "push" || *e.Registry != "r.example.com" || *e.Repository != "team/app" || *e.Tag != "1.0" {
		t.Errorf("decoded %s", stdout)
	}
	for says, args := range map[string][]string{
		"mapping": {"--source", "generic"},
		"ours":    {"--as", "other", "--config", file},
		"--as":    {"--as", "ours", "--source", "distribution"},
	} {
		if code, _, stderr := tidewaiter(t, body, append([]string{"webhook", "decode"}, args...)...); code != run.ExitUsage || !strings.Contains(stderr, says) {
			t.Errorf("%v: exit code %d, %s; want %d and %q", args, code, stderr, run.ExitUsage, says)
		}
	}
}

// layout writes images as an OCI image layout (image-spec, image-layout.md).
func layout(t *testing.T, images ...sample.Image) string {
	t.Helper()
	dir := t.TempDir()
	blob := func(mediaType string, b []byte) ocispec.Descriptor {
		d := digest.FromBytes(b)
		if err := os.MkdirAll(filepath.Join(dir, "blobs/sha256"), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "blobs/sha256", d.Encoded()), b, 0o600); err != nil {
			t.Fatal(err)
		}
		return ocispec.Descriptor{MediaType: mediaType, Digest: d, Size: int64(len(b))}
	}
	encode := func(v any) []byte {
		b, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	index := func(list []ocispec.Descriptor) []byte {
		return encode(ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex, Manifests: list})
	}
	var platforms []ocispec.Descriptor
	for _, img := range images {
		config := ocispec.Image{Platform: img.Platform}
		config.RootFS.Type = "layers"
		m := ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest}
		for _, l := range img.Layers {
			config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, l.DiffID)
			config.History = append(config.History, ocispec.History{CreatedBy: l.Instruction})
			m.Layers = append(m.Layers, blob(l.Descriptor.MediaType, l.Content))
		}
		m.Config = blob(ocispec.MediaTypeImageConfig, encode(config))
		d := blob(ocispec.MediaTypeImageManifest, encode(m))
		d.Platform = &img.Platform
		platforms = append(platforms, d)
	}
	if len(images) > 1 {
		platforms = []ocispec.Descriptor{blob(ocispec.MediaTypeImageIndex, index(platforms))}
	}
	for name, b := range map[string][]byte{"index.json": index(platforms), "oci-layout": []byte(`{"imageLayoutVersion":"1.0.0"}`)} {
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func stories(t *testing.T) sample.Story {
	t.Helper()
	s, err := sample.NewStory(sample.GoBinary("go1.20.1", "example.com/tool"))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func scanJSON(t *testing.T, wantCode int, args ...string) contracts.Scan {
	t.Helper()
	code, stdout, stderr := tidewaiter(t, "", append([]string{"scan", "--output", "json"}, args...)...)
	if code != wantCode {
		t.Fatalf("scan %v: exit code %d, want %d\n%s", args, code, wantCode, stderr)
	}
	var scan contracts.Scan
	if err := json.Unmarshal([]byte(stdout), &scan); err != nil {
		t.Fatalf("%v\n%s", err, stdout)
	}
	return scan
}

func TestScanLayout(t *testing.T) {
	dir := layout(t, stories(t).Vulnerable...)
	scan := scanJSON(t, run.ExitPolicy, "ocidir://"+dir, "--fail-on", "critical")
	if scan.Verdict != contracts.VerdictFail || scan.Image == nil || !contracts.ValidDigest(scan.Image.Digest) {
		t.Errorf("verdict %s of %+v", scan.Verdict, scan.Image)
	}
	has := func(name string) bool {
		return slices.ContainsFunc(scan.Packages, func(p contracts.Package) bool { return p.Name == name })
	}
	for _, name := range []string{"lodash", "redis", "mysql", "couchdb", "tomcat", "jenkins", "elasticsearch", "openssl", "org.apache.logging.log4j:log4j-core", "golang.org/x/text", "stdlib"} {
		if !has(name) {
			t.Errorf("%s was not found", name)
		}
	}
	if has("minimist") {
		t.Error("minimist was deleted by a layer, and found")
	}
	for _, p := range scan.Packages {
		if p.Layer == nil || !contracts.ValidDigest(p.Layer.Digest) || p.Layer.Instruction == "" {
			t.Errorf("%s has no layer: %+v", p.PURL, p.Layer)
		}
	}

	one := scanJSON(t, run.ExitOK, "ocidir://"+dir, "--platform", "linux/arm64")
	if slices.ContainsFunc(one.Packages, func(p contracts.Package) bool { return p.Name == "redis" }) {
		t.Error("redis is in linux/amd64 alone")
	}
	if len(one.Gaps) == 0 {
		t.Error("a platform that was not selected is a gap")
	}

	clean := layout(t, stories(t).Clean...)
	scanJSON(t, run.ExitOK, "ocidir://"+clean, "--fail-on", "policy")
}

// The same image as a directory and as a file that holds it gives the same result.
func TestScanArchive(t *testing.T) {
	dir := layout(t, stories(t).Sharing...)
	file := filepath.Join(t.TempDir(), "image.tar")
	f, err := os.Create(file)
	if err != nil {
		t.Fatal(err)
	}
	w := tar.NewWriter(f)
	if err := w.AddFS(os.DirFS(dir)); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	a, b := scanJSON(t, run.ExitOK, "ocidir://"+dir), scanJSON(t, run.ExitOK, file)
	if a.Report != b.Report || a.Inventory != b.Inventory {
		t.Errorf("directory: report %s, inventory %s; file: report %s, inventory %s", a.Report, a.Inventory, b.Report, b.Inventory)
	}
}

// What scan writes as an SBOM, match reads: the same packages are affected.
func TestMatchReadsWhatScanWrites(t *testing.T) {
	dir := layout(t, stories(t).Sharing...)
	scan := scanJSON(t, run.ExitOK, "ocidir://"+dir)
	ids := func(s contracts.Scan) []string {
		var out []string
		for _, f := range s.Findings {
			out = append(out, f.Package.PURL+" "+f.ID)
		}
		slices.Sort(out)
		return slices.Compact(out)
	}
	for _, kind := range []string{"cyclonedx", "spdx"} {
		code, document, stderr := tidewaiter(t, "", "scan", "ocidir://"+dir, "--output", kind)
		if code != run.ExitOK {
			t.Fatalf("%s: exit code %d: %s", kind, code, stderr)
		}
		code, stdout, stderr := tidewaiter(t, document, "match", "-", "--output", "json")
		if code != run.ExitOK {
			t.Fatalf("match %s: exit code %d: %s", kind, code, stderr)
		}
		var matched contracts.Scan
		if err := json.Unmarshal([]byte(stdout), &matched); err != nil {
			t.Fatal(err)
		}
		if got, want := ids(matched), ids(scan); !slices.Equal(got, want) {
			t.Errorf("%s: %d findings, want %d\ngot  %v\nwant %v", kind, len(got), len(want), got, want)
		}
		if matched.Image != nil || strings.Contains(stdout, `"layer"`) {
			t.Errorf("%s: a document has no image and no layers", kind)
		}
	}
	if len(scan.Findings) == 0 {
		t.Error("nothing was found, so nothing was compared")
	}
	code, sarif, _ := tidewaiter(t, "", "scan", "ocidir://"+dir, "--output", "sarif")
	var document struct {
		Version string `json:"version"`
		Runs    []struct {
			Results []json.RawMessage `json:"results"`
		} `json:"runs"`
	}
	if err := json.Unmarshal([]byte(sarif), &document); err != nil || code != run.ExitOK || document.Version != "2.1.0" || len(document.Runs) != 1 || len(document.Runs[0].Results) == 0 {
		t.Errorf("sarif: exit code %d, %v, %+v", code, err, document)
	}
}

func TestAdvisoriesBuildAndStatus(t *testing.T) {
	dir := t.TempDir()
	osv := filepath.Join(dir, "npm")
	if err := os.MkdirAll(osv, 0o700); err != nil {
		t.Fatal(err)
	}
	record := `{"id":"GHSA-xxxx-yyyy-zzzz","modified":"2020-01-02T03:04:05Z","aliases":["CVE-2020-0001"],
	 "affected":[{"package":{"ecosystem":"npm","name":"left-pad"},"ranges":[{"type":"SEMVER","events":[{"introduced":"0"},{"fixed":"1.3.0"}]}]}]}`
	zipped, err := sample.Zip([]sample.File{{Path: "GHSA-xxxx-yyyy-zzzz.json", Body: []byte(record)}, {Path: "broken.json", Body: []byte("{")}})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(osv, "all.zip"), zipped, 0o600); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "advisories.db")
	code, stdout, stderr := tidewaiter(t, "", "advisories", "build", "--from", dir, "--out", file, "--output", "json")
	var built contracts.AdvisoriesBuild
	if err := json.Unmarshal([]byte(stdout), &built); err != nil || code != run.ExitOK {
		t.Fatalf("exit code %d, %v: %s", code, err, stderr)
	}
	if built.Records != 1 || built.Ecosystems["npm"] != 1 || built.Sequence != 1577934245 || len(built.Rejected) != 1 {
		t.Errorf("built %+v", built)
	}
	code, stdout, stderr = tidewaiter(t, "", "advisories", "status", file, "--max-age", "24h", "--output", "json")
	var status contracts.AdvisoriesStatus
	if err := json.Unmarshal([]byte(stdout), &status); err != nil || code != run.ExitPolicy || !strings.Contains(stderr, "old") {
		t.Errorf("exit code %d, %v: %s", code, err, stderr)
	}
	if status.Snapshot != built.Snapshot || status.Records != 1 {
		t.Errorf("status %+v", status)
	}
}

func TestKeysForAdvisor(t *testing.T) {
	out := filepath.Join(t.TempDir(), "advisor")
	if code, _, stderr := tidewaiter(t, "", "keys", "generate", "--for", "advisor", "--out", out); code != run.ExitOK {
		t.Fatalf("exit code %d: %s", code, stderr)
	}
	if _, err := artefact.LoadKey(out + ".key"); err != nil {
		t.Error(err)
	}
	if keys, err := artefact.LoadPublicKeys(out + ".pub"); err != nil || len(keys) != 1 {
		t.Errorf("%d keys, %v", len(keys), err)
	}
}

func TestReadImages(t *testing.T) {
	d := contracts.DigestOf([]byte("x"))
	got, err := readImages(strings.NewReader("# what runs\n\nr.example.com/a/b@" + d + "\n  r.example.com:5000/c:1.2@" + d + "\ndocker-pullable://r.example.com/e@" + d + "\n"))
	want := []string{"r.example.com/a/b@" + d, "r.example.com:5000/c@" + d, "r.example.com/e@" + d}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("%v, %v; want %v", got, err, want)
	}
	for in, why := range map[string]string{
		"":                                "no image",
		"r.example.com/a:1\n":             "line 1",
		"# x\nr.example.com/a@sha256:1\n": "line 2",
		"a@" + d + "\n":                   "line 1",
	} {
		if _, err := readImages(strings.NewReader(in)); err == nil || !strings.Contains(err.Error(), why) {
			t.Errorf("%q: %v, want %q in it", in, err, why)
		}
	}
}

func TestParseRef(t *testing.T) {
	d := "sha256:" + strings.Repeat("a", 64)
	for in, want := range map[string]string{
		"redis":                       "docker.io/library/redis:latest@",
		"redis:6":                     "docker.io/library/redis:6@",
		"team/app":                    "docker.io/team/app:latest@",
		"r.example.com/a/b:c":         "r.example.com/a/b:c@",
		"r.example.com:5000/a@" + d:   "r.example.com:5000/a:@" + d,
		"localhost/a:1@" + d:          "localhost/a:1@" + d,
		"127.0.0.1:5000/a/b":          "127.0.0.1:5000/a/b:latest@",
		"r.example.com/A":             "error",
		"r.example.com/a:b c":         "error",
		"r.example.com/a@sha256:beef": "error",
		"":                            "error",
	} {
		ref, err := parseRef(in)
		got := ref.Registry + "/" + ref.Repository + ":" + ref.Tag + "@" + ref.Digest
		if err != nil {
			got = "error"
		}
		if got != want {
			t.Errorf("%q: %s, want %s", in, got, want)
		}
	}
}

func FuzzParseRef(f *testing.F) {
	f.Add("r.example.com/a/b:c@sha256:x")
	f.Add("a:b:c/d@e")
	f.Fuzz(func(t *testing.T, s string) {
		ref, err := parseRef(s)
		if err != nil {
			return
		}
		if !contracts.ValidRegistry(ref.Registry) || !contracts.ValidRepository(ref.Repository) || ref.Tag == "" && ref.Digest == "" {
			t.Errorf("%q gives %+v", s, ref)
		}
	})
}
