package format

import (
	"fmt"
	"io"
	"net/url"
	"strings"
	"time"

	spdxjson "github.com/spdx/tools-golang/json"
	"github.com/spdx/tools-golang/spdx/v2/common"
	"github.com/spdx/tools-golang/spdx/v2/v2_3"

	"github.com/tidewaiter/tidewaiter/contracts"
)

const (
	spdxNone  = "NOASSERTION"
	spdxRoot  = "Root"
	spdxPURLs = "PACKAGE-MANAGER"
)

// writeSPDX writes SPDX 2.3 JSON: the packages below one that stands for the
// image, with references to the advisories that affect them. SPDX asks for the
// time at which the document was made.
func writeSPDX(w io.Writer, scan *contracts.Scan, created time.Time) error {
	affected := map[string][]string{} // purl → ids, in order
	for i := range scan.Findings {
		f := &scan.Findings[i]
		if counts(f) {
			affected[f.Package.PURL] = append(affected[f.Package.PURL], f.ID)
		}
	}
	root := &v2_3.Package{
		PackageName: about(scan), PackageSPDXIdentifier: spdxRoot,
		PackageDownloadLocation: spdxNone, PackageCopyrightText: spdxNone,
		PackageLicenseConcluded: spdxNone, PackageLicenseDeclared: spdxNone,
		PrimaryPackagePurpose: "CONTAINER",
	}
	if scan.Image != nil {
		root.PackageVersion = scan.Image.Digest
		root.PackageChecksums = []common.Checksum{{Algorithm: common.SHA256, Value: strings.TrimPrefix(scan.Image.Digest, "sha256:")}}
	}
	doc := &v2_3.Document{
		SPDXVersion: v2_3.Version, DataLicense: v2_3.DataLicense, SPDXIdentifier: "DOCUMENT",
		DocumentName:      about(scan),
		DocumentNamespace: informationURI + "spdx/" + strings.TrimPrefix(scan.Inventory, "sha256:") + "/" + strings.TrimPrefix(scan.Report, "sha256:"),
		CreationInfo: &v2_3.CreationInfo{
			Creators: []common.Creator{{CreatorType: "Tool", Creator: "tidewaiter"}},
			Created:  created.UTC().Format(time.RFC3339),
		},
		Packages: []*v2_3.Package{root},
		Relationships: []*v2_3.Relationship{{
			RefA: common.MakeDocElementID("", "DOCUMENT"), RefB: common.MakeDocElementID("", spdxRoot), Relationship: common.TypeRelationshipDescribe,
		}},
	}
	for i, p := range scan.Packages {
		id := common.ElementID(fmt.Sprintf("Package-%d", i+1))
		doc.Packages = append(doc.Packages, spdxPackage(p, id, affected[p.PURL]))
		doc.Relationships = append(doc.Relationships, &v2_3.Relationship{
			RefA: common.MakeDocElementID("", spdxRoot), RefB: common.MakeDocElementID("", string(id)), Relationship: common.TypeRelationshipContains,
		})
	}
	if len(scan.Gaps) > 0 {
		doc.DocumentComment = fmt.Sprintf("Incomplete, not looked at: %d, the first: %s", len(scan.Gaps), scan.Gaps[0].Reason)
	}
	if err := spdxjson.Write(doc, w, spdxjson.Indent("  ")); err != nil {
		return fmt.Errorf("encode SPDX: %w", err)
	}
	return nil
}

func spdxPackage(p contracts.Package, id common.ElementID, advisories []string) *v2_3.Package {
	out := &v2_3.Package{
		PackageName: p.Name, PackageSPDXIdentifier: id, PackageVersion: p.Version,
		PackageDownloadLocation: spdxNone, PackageCopyrightText: spdxNone,
		PackageLicenseConcluded: spdxNone, PackageLicenseDeclared: spdxNone,
		PrimaryPackagePurpose: "LIBRARY",
	}
	if p.Server {
		out.PrimaryPackagePurpose = "APPLICATION"
	}
	if p.Source != "" {
		version := p.SourceVersion
		if version == "" {
			version = p.Version
		}
		out.PackageSourceInfo = builtFrom + p.Source + " " + version
	}
	if p.PURL != "" {
		out.PackageExternalReferences = append(out.PackageExternalReferences,
			&v2_3.PackageExternalReference{Category: spdxPURLs, RefType: "purl", Locator: p.PURL})
	}
	for _, a := range advisories {
		out.PackageExternalReferences = append(out.PackageExternalReferences,
			&v2_3.PackageExternalReference{Category: "SECURITY", RefType: "advisory", Locator: "https://osv.dev/vulnerability/" + url.PathEscape(a)})
	}
	return out
}

// builtFrom starts the source information of a package that was built from
// another one, as it is written here and by other tools.
const builtFrom = "built package from: "
