package format

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	cdx "github.com/CycloneDX/cyclonedx-go"
	"github.com/owenrumney/go-sarif/v3/pkg/report/v210/sarif"
	spdxjson "github.com/spdx/tools-golang/json"

	"github.com/tidewaiter/tidewaiter/contracts"
)

var update = flag.Bool("update", false, "write the golden files anew")

func sum(s string) string { return contracts.DigestOf([]byte(s)) }

func ptr[T any](v T) *T { return &v }

// scan is a scan of an image with one of everything.
func scan() (*contracts.Scan, Inventories) {
	base := &contracts.LayerRef{Index: 0, Digest: sum("base"), DiffID: sum("base diff"), Instruction: "ADD rootfs.tar /"}
	app := &contracts.LayerRef{Index: 1, Digest: sum("app"), DiffID: sum("app diff"), Instruction: "COPY app /app"}
	packages := []contracts.Package{
		{PURL: "pkg:bitnami/redis@2.8.19", Name: "redis", Version: "2.8.19", Ecosystem: "Bitnami", Server: true, Product: "redis", Paths: []string{"opt/redis-server"}, Layer: app},
		{PURL: "pkg:deb/debian/libssl3@3.0.11-1~deb12u2?arch=amd64&distro=debian-12", Name: "libssl3", Version: "3.0.11-1~deb12u2", Ecosystem: "Debian:12", Source: "openssl", Arch: "amd64", Paths: []string{"var/lib/dpkg/status"}, Layer: base},
		{PURL: "pkg:maven/org.apache.logging.log4j/log4j-core@2.14.1", Name: "org.apache.logging.log4j:log4j-core", Version: "2.14.1", Ecosystem: "Maven", Paths: []string{"app/app.jar!/lib/log4j-core-2.14.1.jar"}, Layer: app},
		{PURL: "pkg:npm/lodash@4.17.4", Name: "lodash", Version: "4.17.4", Ecosystem: "npm", Paths: []string{"app/node_modules/lodash/package.json"}, Layer: app},
	}
	inv := &contracts.Inventory{
		Digest: sum("manifest"), Kind: contracts.KindImage, MediaType: "application/vnd.oci.image.manifest.v1+json", Analyzer: "1",
		Platform: &contracts.Platform{OS: "linux", Architecture: "amd64"},
		OS:       &contracts.OSRelease{ID: "debian", VersionID: "12"}, Layers: []contracts.LayerRef{*base, *app}, Packages: packages,
		Gaps: []contracts.Gap{{Layer: app.Digest, Path: "app/big.jar", Reason: "limit: nesting deeper than 4"}},
	}
	of := func(i int) contracts.FindingPackage {
		p := packages[i]
		return contracts.FindingPackage{PURL: p.PURL, Name: p.Name, Version: p.Version, Ecosystem: p.Ecosystem}
	}
	s := &contracts.Scan{
		Image: &contracts.ScanImage{Ref: "registry.example/shop/cart:v1", Digest: inv.Digest}, Platform: inv.Platform, Packages: packages,
		Findings: []contracts.Finding{
			{
				ID: "CVE-2021-44228", Aliases: []string{"GHSA-jfh8-c2jp-5v3q"}, Summary: "Remote code injection in Log4j", Package: of(2),
				Severity: contracts.SeverityCritical, Score: ptr(10.0), Vector: "CVSS:3.1/AV:N/AC:L/PR:N/UI:N/S:C/C:H/I:H/A:H",
				Fixed: []string{"2.3.1", "2.12.2", "2.15.0"}, KEV: true, EPSS: ">=0.9", Status: contracts.StatusAffected, Layer: app, Paths: packages[2].Paths,
			},
			{
				ID: "CVE-2019-10744", Package: of(3), Severity: contracts.SeverityHigh, Fixed: []string{"4.17.12"},
				Status: contracts.StatusAffected, Layer: app, Paths: packages[3].Paths,
			},
			{
				ID: "CVE-2023-6129", Package: of(1), Severity: contracts.SeverityMedium, Score: ptr(6.5), Vector: "CVSS:3.0/AV:N/AC:H",
				Status: contracts.StatusUnderInvestigation, Layer: base, Paths: packages[1].Paths,
			},
			{ID: "CVE-2015-4335", Package: of(0), Severity: contracts.SeverityUnknown, Status: contracts.StatusNotAffected, Reason: "ignored by policy: no Lua", Layer: app},
		},
		Lags: []contracts.Lag{{Product: "redis", Version: "2.8.19", Latest: "8.2.1", LatestInCycle: "2.8.24", EndOfLife: "2016-05-06", EOL: true, Outdated: true, BehindDays: ptr(3900)}},
		Gaps: inv.Gaps, Verdict: contracts.VerdictFail, Reasons: []string{"CVE-2021-44228 in pkg:maven/org.apache.logging.log4j/log4j-core@2.14.1: known to be exploited"},
		Snapshot: contracts.SnapshotRef{Digest: sum("snapshot"), Sequence: 1764000000}, Inventory: sum("inventory"), Report: sum("report"),
	}
	return s, func(_ context.Context, d string) (*contracts.Inventory, error) {
		if d != s.Inventory {
			return nil, os.ErrNotExist
		}
		return inv, nil
	}
}

func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	file := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(file, got, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%s differs:\n%s", file, got)
	}
}

func TestGolden(t *testing.T) {
	s, get := scan()
	for name, kind := range map[string]string{"scan.txt": Table, "scan.json": JSON, "scan.sarif": SARIF, "scan.cdx.json": CycloneDX} {
		t.Run(kind, func(t *testing.T) {
			var out bytes.Buffer
			if err := Write(&out, kind, s, get); err != nil {
				t.Fatal(err)
			}
			golden(t, name, out.Bytes())
		})
	}
	t.Run(SPDX, func(t *testing.T) {
		var out bytes.Buffer
		if err := writeSPDX(&out, s, time.Date(2026, 11, 23, 10, 0, 0, 0, time.UTC)); err != nil {
			t.Fatal(err)
		}
		golden(t, "scan.spdx.json", out.Bytes())
	})
}

func TestUnknownKind(t *testing.T) {
	s, get := scan()
	if err := Write(&bytes.Buffer{}, "html", s, get); err == nil {
		t.Error("html was written")
	}
}

// An empty scan, and one of a document, are written in every form.
func TestNothingFound(t *testing.T) {
	inv := &contracts.Inventory{Digest: sum("sbom"), Kind: contracts.KindImage, Analyzer: "sbom"}
	s := &contracts.Scan{Packages: []contracts.Package{}, Findings: []contracts.Finding{}, Gaps: []contracts.Gap{}, Verdict: contracts.VerdictPass, Inventory: sum("inventory")}
	get := func(context.Context, string) (*contracts.Inventory, error) { return inv, nil }
	for _, kind := range []string{Table, JSON, SARIF, CycloneDX, SPDX} {
		var out bytes.Buffer
		if err := Write(&out, kind, s, get); err != nil {
			t.Errorf("%s: %v", kind, err)
		}
		if kind == Table && !strings.Contains(out.String(), "Findings: 0") {
			t.Errorf("table: %s", out.String())
		}
	}
}

// Every finding of an index points at the component of its platform.
func TestCycloneDXOfIndex(t *testing.T) {
	child := func(arch string) *contracts.Inventory {
		return &contracts.Inventory{
			Digest: sum(arch), Kind: contracts.KindImage, Platform: &contracts.Platform{OS: "linux", Architecture: arch},
			Packages: []contracts.Package{{PURL: "pkg:npm/lodash@4.17.4", Name: "lodash", Version: "4.17.4", Ecosystem: "npm"}},
		}
	}
	inventories := map[string]*contracts.Inventory{
		"amd": child("amd64"), "arm": child("arm64"),
		"index": {Digest: sum("index"), Kind: contracts.KindIndex, Parts: []contracts.InventoryPart{
			{Digest: sum("amd64"), Platform: child("amd64").Platform, Inventory: "amd"},
			{Digest: sum("arm64"), Platform: child("arm64").Platform, Inventory: "arm"},
		}},
	}
	finding := contracts.Finding{ID: "CVE-2019-10744", Package: contracts.FindingPackage{PURL: "pkg:npm/lodash@4.17.4"}, Status: contracts.StatusAffected, Platform: "linux/arm64"}
	s := &contracts.Scan{Inventory: "index", Findings: []contracts.Finding{finding}}
	var out bytes.Buffer
	err := Write(&out, CycloneDX, s, func(_ context.Context, d string) (*contracts.Inventory, error) { return inventories[d], nil })
	if err != nil {
		t.Fatal(err)
	}
	var bom cdx.BOM
	if err := cdx.NewBOMDecoder(&out, cdx.BOMFileFormatJSON).Decode(&bom); err != nil {
		t.Fatal(err)
	}
	want := (*(*bom.Components)[1].Components)[0].BOMRef
	affects := *(*bom.Vulnerabilities)[0].Affects
	if len(affects) != 1 || affects[0].Ref != want {
		t.Errorf("affects %+v, want %s", affects, want)
	}
}

// What is written can be read by the formats' own libraries, with their checks.
func TestValid(t *testing.T) {
	s, get := scan()
	var out bytes.Buffer
	if err := Write(&out, SARIF, s, get); err != nil {
		t.Fatal(err)
	}
	report, err := sarif.FromBytes(out.Bytes())
	if err != nil {
		t.Fatal(err)
	}
	if err := report.Validate(); err != nil {
		t.Error(err)
	}
	for _, r := range report.Runs[0].Results {
		if id := report.Runs[0].Tool.Driver.Rules[r.RuleIndex].ID; *id != *r.RuleID {
			t.Errorf("result of %s points at rule %s", *r.RuleID, *id)
		}
	}
	out.Reset()
	if err := Write(&out, SPDX, s, get); err != nil {
		t.Fatal(err)
	}
	doc, err := spdxjson.Read(&out)
	if err != nil || len(doc.Packages) != 5 || len(doc.Relationships) != 5 {
		t.Errorf("%+v, %v", doc, err)
	}
}

// A terminal is commanded by nobody's package name.
func TestTableIsClean(t *testing.T) {
	s, get := scan()
	s.Findings[0].Package.Name = "evil\x1b[2J\nname\u202e" + strings.Repeat("x", 200)
	s.Gaps[0].Path = "a\x07b"
	s.Reasons = []string{"\x1b]0;title\x07"}
	var out bytes.Buffer
	if err := Write(&out, Table, s, get); err != nil {
		t.Fatal(err)
	}
	if strings.ContainsAny(out.String(), "\x1b\x07\u202e") {
		t.Errorf("%q", out.String())
	}
	for line := range strings.Lines(out.String()) {
		if len(line) > 400 {
			t.Errorf("a line of %d bytes", len(line))
		}
	}
}

func TestColours(t *testing.T) {
	var out bytes.Buffer
	s, _ := scan()
	printFindings(&out, s.Findings, painter(true))
	lines := strings.Split(out.String(), "\n")
	if !strings.HasPrefix(lines[1], "\x1b[1m\x1b[31mcritical\x1b[0m  CVE-2021-44228") || !strings.HasPrefix(lines[2], "\x1b[31mhigh\x1b[0m      CVE-2019-10744") {
		t.Errorf("%q", lines[:3])
	}
	out.Reset()
	if err := Findings(&out, s.Findings, Options{}); err != nil || strings.Contains(out.String(), "\x1b") {
		t.Errorf("no terminal, but %q, %v", out.String(), err)
	}
}

func TestPackageOf(t *testing.T) {
	debian := &contracts.OSRelease{ID: "debian", VersionID: "12"}
	for purl, want := range map[string]contracts.Package{
		"pkg:npm/lodash@4.17.4":                                           {Ecosystem: "npm", Name: "lodash", Version: "4.17.4"},
		"pkg:npm/%40babel/traverse@7.23.0":                                {Ecosystem: "npm", Name: "@babel/traverse", Version: "7.23.0"},
		"pkg:pypi/Django@2.2":                                             {Ecosystem: "PyPI", Name: "django", Version: "2.2"},
		"pkg:maven/org.apache.logging.log4j/log4j-core@2.14.1?type=jar":   {Ecosystem: "Maven", Name: "org.apache.logging.log4j:log4j-core", Version: "2.14.1"},
		"pkg:golang/golang.org/x/crypto@v0.17.0":                          {Ecosystem: "Go", Name: "golang.org/x/crypto", Version: "0.17.0"},
		"pkg:golang/stdlib@1.20.1":                                        {Ecosystem: "Go", Name: "stdlib", Version: "1.20.1"},
		"pkg:cargo/time@0.1.44":                                           {Ecosystem: "crates.io", Name: "time", Version: "0.1.44"},
		"pkg:gem/rails@5.2.0":                                             {Ecosystem: "RubyGems", Name: "rails", Version: "5.2.0"},
		"pkg:nuget/Newtonsoft.Json@12.0.1":                                {Ecosystem: "NuGet", Name: "Newtonsoft.Json", Version: "12.0.1"},
		"pkg:composer/symfony/http-kernel@4.4.0":                          {Ecosystem: "Packagist", Name: "symfony/http-kernel", Version: "4.4.0"},
		"pkg:bitnami/redis@2.8.19?arch=amd64":                             {Ecosystem: "Bitnami", Name: "redis", Version: "2.8.19", Server: true},
		"pkg:generic/something@1.0":                                       {Name: "something", Version: "1.0"},
		"pkg:deb/debian/libssl3@3.0.11-1?arch=amd64&distro=debian-12":     {Ecosystem: "Debian:12", Name: "libssl3", Version: "3.0.11-1", Arch: "amd64"},
		"pkg:deb/debian/libssl3@3.0.11-1?distro=debian-12.5":              {Ecosystem: "Debian:12", Name: "libssl3", Version: "3.0.11-1"},
		"pkg:deb/debian/libssl3@3.0.11-1?distro=bullseye":                 {Ecosystem: "Debian:11", Name: "libssl3", Version: "3.0.11-1"},
		"pkg:deb/debian/libssl3@3.0.11-1":                                 {Ecosystem: "Debian:12", Name: "libssl3", Version: "3.0.11-1"},
		"pkg:deb/debian/git@2.39.2?epoch=1&distro=debian-12":              {Ecosystem: "Debian:12", Name: "git", Version: "1:2.39.2"},
		"pkg:deb/debian/libc6@2.36?upstream=glibc&distro=debian-12":       {Ecosystem: "Debian:12", Name: "libc6", Version: "2.36", Source: "glibc"},
		"pkg:deb/debian/gpgv@2.2-1?upstream=gnupg2%402.2&distro=12":       {Ecosystem: "Debian:12", Name: "gpgv", Version: "2.2-1", Source: "gnupg2", SourceVersion: "2.2"},
		"pkg:deb/ubuntu/bash@5.1?distro=ubuntu-22.04":                     {Ecosystem: "Ubuntu:22.04:LTS", Name: "bash", Version: "5.1"},
		"pkg:deb/ubuntu/bash@5.1":                                         {Name: "bash", Version: "5.1"}, // the document's Debian says nothing of it
		"pkg:apk/alpine/busybox@1.36.1-r5?arch=x86_64&distro=alpine-3.19": {Ecosystem: "Alpine:v3.19", Name: "busybox", Version: "1.36.1-r5", Arch: "x86_64"},
		"pkg:apk/alpine/busybox@1.36.1-r5?distro=3.19.1":                  {Ecosystem: "Alpine:v3.19", Name: "busybox", Version: "1.36.1-r5"},
		"pkg:apk/wolfi/busybox@1.36.1-r5":                                 {Ecosystem: "Wolfi", Name: "busybox", Version: "1.36.1-r5"},
		"pkg:rpm/almalinux/openssl-libs@3.0.7-1.el9?epoch=1&distro=almalinux-9.3&upstream=openssl-3.0.7-1.el9.src.rpm": {
			Ecosystem: "AlmaLinux:9", Name: "openssl-libs", Version: "1:3.0.7-1.el9", Source: "openssl", SourceVersion: "3.0.7-1.el9",
		},
		"pkg:rpm/rocky/bash@5.1.8-6.el9?distro=rocky-9.3": {Ecosystem: "Rocky Linux:9", Name: "bash", Version: "5.1.8-6.el9"},
		"pkg:rpm/opensuse/bash@4.4-150400?distro=opensuse-leap-15.5": {
			Ecosystem: "openSUSE:Leap 15.5", Name: "bash", Version: "4.4-150400",
		},
	} {
		want.PURL = purl
		got, err := packageOf(purl, debian)
		if err != nil {
			t.Errorf("%s: %v", purl, err)
			continue
		}
		if a, b := mustJSON(t, got), mustJSON(t, want); a != b {
			t.Errorf("%s:\ngot  %s\nwant %s", purl, a, b)
		}
	}
	for _, purl := range []string{"", "npm/lodash", "pkg:", "pkg:npm"} {
		if p, err := packageOf(purl, nil); err == nil {
			t.Errorf("%q gives %+v", purl, p)
		}
	}
}

func mustJSON(t *testing.T, v any) string {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// What we write as CycloneDX or SPDX is read as the same packages.
func TestReadWhatWeWrite(t *testing.T) {
	s, get := scan()
	for _, kind := range []string{CycloneDX, SPDX} {
		t.Run(kind, func(t *testing.T) {
			var out bytes.Buffer
			if err := Write(&out, kind, s, get); err != nil {
				t.Fatal(err)
			}
			inv, err := ReadSBOM(out.Bytes())
			if err != nil {
				t.Fatal(err)
			}
			want := slices.Clone(s.Packages)
			for i := range want {
				want[i].Layer = nil
				if kind == SPDX {
					want[i].Paths, want[i].Product = nil, ""
				}
				if kind == CycloneDX {
					want[i].Arch = inv.Packages[i].Arch // carried by the purl
				}
			}
			if a, b := mustJSON(t, inv.Packages), mustJSON(t, want); a != b {
				t.Errorf("got  %s\nwant %s", a, b)
			}
			if len(inv.Gaps) != 0 || inv.Digest != contracts.DigestOf(out.Bytes()) {
				t.Errorf("gaps %v, digest %s", inv.Gaps, inv.Digest)
			}
		})
	}
}
