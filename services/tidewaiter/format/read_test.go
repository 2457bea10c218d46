package format

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/tidewaiter/tidewaiter/contracts"
)

// Documents shaped as other tools write them.
const (
	syftLike = `{"bomFormat":"CycloneDX","specVersion":"1.6","version":1,
"metadata":{"component":{"bom-ref":"af63bd4c8601b7f1","type":"container","name":"shop/cart","version":"sha256:00"}},
"components":[
 {"type":"library","name":"libssl3","version":"3.0.11-1~deb12u2","purl":"pkg:deb/debian/libssl3@3.0.11-1~deb12u2?arch=amd64&upstream=openssl"},
 {"type":"library","name":"lodash","version":"4.17.4","purl":"pkg:npm/lodash@4.17.4"},
 {"type":"library","name":"lodash","version":"4.17.4","purl":"pkg:npm/lodash@4.17.4","evidence":{"occurrences":[{"location":"app/a.json"}]}},
 {"type":"library","name":"homemade","version":"1"},
 {"type":"library","name":"nameless-version","purl":"pkg:npm/left-pad"},
 {"type":"library","name":"broken","version":"1","purl":"pkg:broken"},
 {"type":"file","name":"/etc/passwd"},
 {"type":"operating-system","name":"debian","version":"12"}]}`
	trivyLike = `{"bomFormat":"CycloneDX","specVersion":"1.5","version":1,
"metadata":{"component":{"type":"container","name":"cart","purl":"pkg:oci/cart@sha256%3A00?arch=amd64"}},
"components":[
 {"type":"application","name":"package-lock.json"},
 {"type":"library","name":"gpgv","version":"2.2.40-1.1","purl":"pkg:deb/debian/gpgv@2.2.40-1.1?arch=amd64&distro=debian-12.5",
  "properties":[{"name":"aquasecurity:trivy:SrcName","value":"gnupg2"},{"name":"aquasecurity:trivy:SrcVersion","value":"2.2.40"},{"name":"aquasecurity:trivy:SrcRelease","value":"1"}],
  "components":[{"type":"library","name":"inner","version":"1","purl":"pkg:pypi/django@2.2"}]}]}`
	spdxLike = `{"spdxVersion":"SPDX-2.3","dataLicense":"CC0-1.0","SPDXID":"SPDXRef-DOCUMENT","name":"cart","documentNamespace":"https://x.example/1",
"creationInfo":{"created":"2026-01-01T00:00:00Z","creators":["Tool: x"]},
"packages":[
 {"SPDXID":"SPDXRef-1","name":"cart","versionInfo":"sha256:00","downloadLocation":"NOASSERTION","primaryPackagePurpose":"CONTAINER"},
 {"SPDXID":"SPDXRef-2","name":"log4j-core","versionInfo":"2.14.1","downloadLocation":"NOASSERTION",
  "externalRefs":[{"referenceCategory":"SECURITY","referenceType":"cpe23Type","referenceLocator":"cpe:2.3:a:x"},
   {"referenceCategory":"PACKAGE_MANAGER","referenceType":"purl","referenceLocator":"pkg:maven/org.apache.logging.log4j/log4j-core@2.14.1"}]},
 {"SPDXID":"SPDXRef-3","name":"musl","versionInfo":"1.2.4-r2","downloadLocation":"NOASSERTION",
  "externalRefs":[{"referenceCategory":"PACKAGE-MANAGER","referenceType":"purl","referenceLocator":"pkg:apk/alpine/musl@1.2.4-r2?arch=x86_64"}]},
 {"SPDXID":"SPDXRef-4","name":"alpine","versionInfo":"3.19.1","downloadLocation":"NOASSERTION","primaryPackagePurpose":"OPERATING-SYSTEM"},
 {"SPDXID":"SPDXRef-5","name":"homemade","versionInfo":"1","downloadLocation":"NOASSERTION"}]}`
)

func TestReadSBOM(t *testing.T) {
	for name, c := range map[string]struct {
		document string
		packages []string
		gaps     []string
		os       string
	}{
		"syft": {
			syftLike,
			[]string{"Debian:12 libssl3 3.0.11-1~deb12u2 from openssl ", "npm lodash 4.17.4 from  "},
			[]string{"no-purl: homemade 1", "no-version: pkg:npm/left-pad", `purl: purl is missing type or name`},
			"debian 12",
		},
		"trivy": {
			trivyLike,
			[]string{"Debian:12 gpgv 2.2.40-1.1 from gnupg2 2.2.40-1", "PyPI django 2.2 from  "},
			nil, "",
		},
		"spdx": {
			spdxLike,
			[]string{"Alpine:v3.19 musl 1.2.4-r2 from  ", "Maven org.apache.logging.log4j:log4j-core 2.14.1 from  "},
			[]string{"no-purl: homemade 1"},
			"alpine 3.19.1",
		},
	} {
		t.Run(name, func(t *testing.T) {
			inv, err := ReadSBOM([]byte(c.document))
			if err != nil {
				t.Fatal(err)
			}
			var packages, gaps []string
			for _, p := range inv.Packages {
				packages = append(packages, fmt.Sprintf("%s %s %s from %s %s", p.Ecosystem, p.Name, p.Version, p.Source, p.SourceVersion))
			}
			for _, g := range inv.Gaps {
				gaps = append(gaps, g.Reason)
			}
			if !slices.Equal(packages, c.packages) || !slices.Equal(gaps, c.gaps) {
				t.Errorf("packages %q, gaps %q", packages, gaps)
			}
			os := ""
			if inv.OS != nil {
				os = inv.OS.ID + " " + inv.OS.VersionID
			}
			if os != c.os || inv.Digest != contracts.DigestOf([]byte(c.document)) {
				t.Errorf("os %q, digest %s", os, inv.Digest)
			}
		})
	}
	inv, err := ReadSBOM([]byte(syftLike))
	if err != nil || !slices.Equal(inv.Packages[1].Paths, []string{"app/a.json"}) {
		t.Errorf("paths of a package that is listed twice: %v, %v", inv.Packages[1].Paths, err)
	}
}

func TestReadSBOMRefuses(t *testing.T) {
	deep := strings.Repeat(`{"type":"library","name":"x","components":[`, maxDepth+2) + strings.Repeat("]}", maxDepth+2)
	for name, c := range map[string]struct {
		document string
		want     error
	}{
		"nothing":       {"", ErrNotSBOM},
		"text":          {"hello", ErrNotSBOM},
		"other JSON":    {`{"kind":"Pod"}`, ErrNotSBOM},
		"an array":      {`[]`, ErrNotSBOM},
		"XML":           {`<?xml version="1.0"?><bom/>`, ErrUnsupported},
		"SPDX 3":        {`{"@context":"https://spdx.org/rdf/3.0.1/spdx-context.jsonld","@graph":[]}`, ErrUnsupported},
		"unknown SPDX":  {`{"spdxVersion":"SPDX-9.9"}`, ErrUnsupported},
		"cut off":       {syftLike[:200], ErrNotSBOM},
		"wrong types":   {`{"bomFormat":"CycloneDX","specVersion":"1.6","components":"none"}`, ErrNotSBOM},
		"nested deeply": {`{"bomFormat":"CycloneDX","specVersion":"1.6","components":[` + deep + `]}`, ErrLimit},
	} {
		t.Run(name, func(t *testing.T) {
			if inv, err := ReadSBOM([]byte(c.document)); !errors.Is(err, c.want) {
				t.Errorf("got %+v, %v; want %v", inv, err, c.want)
			}
		})
	}
}

// However many components cannot be matched, the list of gaps stays readable and says how many.
func TestManyGaps(t *testing.T) {
	var list []string
	for i := range 1000 {
		list = append(list, fmt.Sprintf(`{"type":"library","name":"n%03d"}`, i))
	}
	inv, err := ReadSBOM([]byte(`{"bomFormat":"CycloneDX","specVersion":"1.6","components":[` + strings.Join(list, ",") + `]}`))
	if err != nil {
		t.Fatal(err)
	}
	if n := len(inv.Gaps); n != maxListedGaps+1 || inv.Gaps[n-1].Reason != "and 900 more components that cannot be matched" {
		t.Errorf("%d gaps, last %+v", n, inv.Gaps[n-1])
	}
}

// Whatever the document: no panic; packages have names, versions and purls,
// sorted, each once; and reading is deterministic.
func FuzzReadSBOM(f *testing.F) {
	for _, s := range []string{syftLike, trivyLike, spdxLike, `{"bomFormat":"CycloneDX"}`, `{"spdxVersion":"SPDX-2.2","packages":[null]}`} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		inv, err := ReadSBOM(b)
		if err != nil {
			return
		}
		for i, p := range inv.Packages {
			if p.PURL == "" || p.Name == "" || p.Version == "" {
				t.Errorf("package %+v", p)
			}
			if i > 0 && inv.Packages[i-1].PURL >= p.PURL {
				t.Errorf("%q before %q", inv.Packages[i-1].PURL, p.PURL)
			}
		}
		again, err := ReadSBOM(b)
		if err != nil || mustJSON(t, inv) != mustJSON(t, again) {
			t.Errorf("read again it differs (%v)", err)
		}
	})
}

func FuzzPackageOf(f *testing.F) {
	f.Add("pkg:deb/debian/git@2.39.2?epoch=1&distro=debian-12&upstream=git%401", "debian", "12")
	f.Add("pkg:rpm/opensuse/bash@4.4?distro=opensuse-leap-15.5&sourcerpm=a-b-c.src.rpm", "", "")
	f.Fuzz(func(t *testing.T, purl, id, version string) {
		p, err := packageOf(purl, &contracts.OSRelease{ID: id, VersionID: version})
		if err == nil && (p.Name == "" || p.PURL != purl) {
			t.Errorf("%q gives %+v", purl, p)
		}
	})
}
