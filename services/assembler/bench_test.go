package assembler

import (
	"encoding/json"
	"fmt"
	"testing"

	"github.com/tidewaiter/tidewaiter/contracts"
)

// BenchmarkWarmImages measures images a second whose shared layers (a Debian
// base of 400 packages, 1,500 language packages) were analysed before.
func BenchmarkWarmImages(b *testing.B) {
	f := newFixture(b)
	base := contracts.LayerReport{Analyzer: "1", Digest: dig("base"), OSRelease: &contracts.OSRelease{Path: "etc/os-release", ID: "debian", VersionID: "12"}}
	debs := contracts.PackageDatabase{Kind: "dpkg", Path: "var/lib/dpkg/status"}
	for i := range 400 {
		debs.Packages = append(debs.Packages, contracts.SystemPackage{Name: fmt.Sprint("lib", i), Version: "1:2.3-4", Source: "src", Arch: "amd64"})
	}
	base.Databases = []contracts.PackageDatabase{debs}
	app := contracts.LayerReport{Analyzer: "1", Digest: dig("app")}
	for i := range 1500 {
		name := fmt.Sprint("pkg", i)
		app.Packages = append(app.Packages, contracts.LayerPackage{
			Type: "npm", Name: name, Version: "1.0.0", PURL: "pkg:npm/" + name + "@1.0.0", Ecosystem: "npm",
			Paths: []string{"app/node_modules/" + name + "/package.json"},
		})
	}
	for _, r := range []contracts.LayerReport{base, app} {
		content, err := json.Marshal(r)
		if err != nil {
			b.Fatal(err)
		}
		digest, err := f.db.PutBlob(b.Context(), content)
		if err != nil {
			b.Fatal(err)
		}
		f.handle(f.event(contracts.LayerAnalyzedV1, r.Digest, contracts.LayerAnalyzed{Digest: r.Digest, Report: contracts.Blob{Digest: digest}, Analyzer: "1"}))
	}
	i := 0
	for b.Loop() {
		i++
		own := fmt.Sprint("own", i)
		out := f.handle(f.planned(plan(img(fmt.Sprint("app", i), own), "base", "app", own)), f.analyzed(own))
		if len(out) != 1 {
			b.Fatalf("%d events", len(out))
		}
	}
	b.ReportMetric(float64(i)/b.Elapsed().Seconds(), "images/s")
}
