package sbom_test

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"os"
	"path/filepath"
	"regexp"
	"testing"

	cdx "github.com/CycloneDX/cyclonedx-go"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/services/attestor/sbom"
)

var update = flag.Bool("update", false, "write the golden files anew")

func digest(s string) string { return contracts.DigestOf([]byte(s)) }

func image(arch string) *contracts.Inventory {
	base := &contracts.LayerRef{Index: 0, Digest: digest("base"), DiffID: digest("base diff"), Instruction: "ADD rootfs.tar /"}
	app := &contracts.LayerRef{Index: 1, Digest: digest("app " + arch), DiffID: digest("app diff " + arch)}
	return &contracts.Inventory{
		Digest: digest("manifest " + arch), Kind: contracts.KindImage, MediaType: "application/vnd.oci.image.manifest.v1+json",
		Platform: &contracts.Platform{OS: "linux", Architecture: arch}, Analyzer: "1",
		OS:     &contracts.OSRelease{Path: "usr/lib/os-release", ID: "debian", VersionID: "12", PrettyName: "Debian GNU/Linux 12 (bookworm)"},
		Layers: []contracts.LayerRef{*base, *app},
		Packages: []contracts.Package{
			{PURL: "pkg:deb/debian/libssl3@3.0.11-1~deb12u2?arch=" + arch + "&distro=bookworm&source=openssl", Name: "libssl3", Version: "3.0.11-1~deb12u2", Ecosystem: "Debian:12", Source: "openssl", Arch: arch, Paths: []string{"var/lib/dpkg/status"}, Layer: base},
			{PURL: "pkg:maven/org.apache.logging.log4j/log4j-core@2.14.1", Name: "org.apache.logging.log4j:log4j-core", Version: "2.14.1", Ecosystem: "Maven", Paths: []string{"app/app.jar!/lib/log4j-core-2.14.1.jar"}, Layer: app},
			{PURL: "pkg:npm/%40babel/traverse@7.23.0", Name: "@babel/traverse", Version: "7.23.0", Ecosystem: "npm", Paths: []string{"app/node_modules/@babel/traverse/package.json"}, Layer: app},
			{PURL: "pkg:bitnami/redis@2.8.19", Name: "redis", Version: "2.8.19", Ecosystem: "Bitnami", Server: true, Product: "redis", Paths: []string{"opt/redis-server"}, Layer: app},
		},
	}
}

func index() (*contracts.Inventory, sbom.Part) {
	amd, arm := image("amd64"), image("arm64")
	arm.Gaps = []contracts.Gap{{Path: "app/big.jar", Reason: "limit: nesting deeper than 4"}}
	parts := map[string]*contracts.Inventory{digest("inventory amd64"): amd, digest("inventory arm64"): arm}
	inv := &contracts.Inventory{
		Digest: digest("index"), Kind: contracts.KindIndex, MediaType: "application/vnd.oci.image.index.v1+json", Analyzer: "1",
		Parts: []contracts.InventoryPart{
			{Digest: amd.Digest, Platform: amd.Platform, Inventory: digest("inventory amd64"), Packages: 4},
			{Digest: arm.Digest, Platform: arm.Platform, Inventory: digest("inventory arm64"), Packages: 4},
		},
	}
	return inv, func(_ context.Context, d string) (*contracts.Inventory, error) {
		if parts[d] == nil {
			return nil, os.ErrNotExist
		}
		return parts[d], nil
	}
}

func TestGolden(t *testing.T) {
	ix, part := index()
	for name, inv := range map[string]*contracts.Inventory{
		"image": image("amd64"), "index": ix,
		"empty": {Digest: digest("scratch"), Kind: contracts.KindImage, Analyzer: "1"},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := sbom.CycloneDX(t.Context(), inv, digest("inventory of "+name), part)
			if err != nil {
				t.Fatal(err)
			}
			again, err := sbom.CycloneDX(t.Context(), inv, digest("inventory of "+name), part)
			if err != nil || !bytes.Equal(got, again) {
				t.Errorf("written again it differs (%v)", err)
			}
			file := filepath.Join("testdata", name+".cdx.json")
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
		})
	}
}

// What CycloneDX asks for beyond its shape: a serial number of its form, and
// references that are unique and point at something.
func TestRules(t *testing.T) {
	inv, part := index()
	inv.Parts = append(inv.Parts, inv.Parts[0]) // one digest listed under two platforms
	got, err := sbom.CycloneDX(t.Context(), inv, digest("inventory"), part)
	if err != nil {
		t.Fatal(err)
	}
	var bom cdx.BOM
	if err := cdx.NewBOMDecoder(bytes.NewReader(got), cdx.BOMFileFormatJSON).Decode(&bom); err != nil {
		t.Fatal(err)
	}
	if bom.SpecVersion != cdx.SpecVersion1_6 || bom.Metadata.Timestamp != "" {
		t.Errorf("version %v, timestamp %q", bom.SpecVersion, bom.Metadata.Timestamp)
	}
	if !regexp.MustCompile(`^urn:uuid:[0-9a-f]{8}-[0-9a-f]{4}-8[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$`).MatchString(bom.SerialNumber) {
		t.Errorf("serial number %s", bom.SerialNumber)
	}
	seen := map[string]bool{}
	count := 0
	var walk func(c []cdx.Component)
	walk = func(components []cdx.Component) {
		for _, c := range components {
			if c.BOMRef == "" || seen[c.BOMRef] {
				t.Errorf("reference %q is empty or doubled", c.BOMRef)
			}
			seen[c.BOMRef] = true
			count++
			if c.Components != nil {
				walk(*c.Components)
			}
		}
	}
	walk([]cdx.Component{*bom.Metadata.Component})
	walk(*bom.Components)
	if want := 1 + 3*(1+1+4); count != want {
		t.Errorf("%d components, want %d", count, want)
	}
	for _, c := range *bom.Compositions {
		for _, r := range *c.Assemblies {
			if !seen[string(r)] {
				t.Errorf("composition of %q, which is not there", r)
			}
		}
	}
}

func TestMissingPart(t *testing.T) {
	inv, part := index()
	inv.Parts[1].Inventory = digest("gone")
	if _, err := sbom.CycloneDX(t.Context(), inv, digest("inventory"), part); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("got %v, want ErrNotExist", err)
	}
}
