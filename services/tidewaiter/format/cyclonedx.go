package format

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	cdx "github.com/CycloneDX/cyclonedx-go"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/services/attestor/sbom"
)

// writeCycloneDX writes the SBOM that attestor attaches to images, with the
// findings as its vulnerabilities.
func writeCycloneDX(ctx context.Context, w io.Writer, scan *contracts.Scan, get Inventories) error {
	if get == nil {
		return errors.New("CycloneDX is written from inventories, there are none")
	}
	inv, err := get(ctx, scan.Inventory)
	if err != nil {
		return fmt.Errorf("inventory %s: %w", scan.Inventory, err)
	}
	bom, err := sbom.BOM(ctx, inv, scan.Inventory, sbom.Part(get))
	if err != nil {
		return err
	}
	if scan.Image != nil && scan.Image.Ref != "" {
		bom.Metadata.Component.Name = scan.Image.Ref
	}
	refs := map[component][]string{}
	collect(refs, "", *bom.Components)
	var found []cdx.Vulnerability
	for i := range scan.Findings {
		f := &scan.Findings[i]
		v := vulnerability(f, fmt.Sprintf("finding-%d", i+1))
		var affects []cdx.Affects
		for _, ref := range refs[component{f.Platform, f.Package.PURL}] {
			affects = append(affects, cdx.Affects{Ref: ref, Range: &[]cdx.AffectedVersions{{Version: f.Package.Version, Status: versionStatus(f)}}})
		}
		if len(affects) > 0 {
			v.Affects = &affects
		}
		found = append(found, v)
	}
	if found != nil {
		bom.Vulnerabilities = &found
	}
	content, err := sbom.Encode(bom)
	if err != nil {
		return err
	}
	_, err = w.Write(content)
	return err
}

// component is what findings name a component by.
type component struct{ platform, purl string }

func collect(refs map[component][]string, platform string, components []cdx.Component) {
	for _, c := range components {
		if c.Components != nil {
			collect(refs, property(c.Properties, sbom.PropertyPlatform), *c.Components)
		}
		if c.PackageURL != "" {
			key := component{platform, c.PackageURL}
			refs[key] = append(refs[key], c.BOMRef)
		}
	}
}

func property(properties *[]cdx.Property, name string) string {
	if properties == nil {
		return ""
	}
	i := slices.IndexFunc(*properties, func(p cdx.Property) bool { return p.Name == name })
	if i < 0 {
		return ""
	}
	return (*properties)[i].Value
}

func vulnerability(f *contracts.Finding, ref string) cdx.Vulnerability {
	v := cdx.Vulnerability{
		BOMRef: ref, ID: f.ID, Source: &cdx.Source{Name: "OSV", URL: "https://osv.dev/"},
		Description: f.Summary, Analysis: &cdx.VulnerabilityAnalysis{State: state(f), Detail: f.Reason},
	}
	rating := cdx.VulnerabilityRating{Score: f.Score, Severity: severity(f.Severity), Vector: f.Vector, Method: method(f.Vector)}
	v.Ratings = &[]cdx.VulnerabilityRating{rating}
	if len(f.Fixed) > 0 {
		v.Recommendation = "Update " + f.Package.Name + " to " + strings.Join(f.Fixed, " or ")
	}
	var aliases []cdx.VulnerabilityReference
	for _, a := range f.Aliases {
		aliases = append(aliases, cdx.VulnerabilityReference{ID: a, Source: &cdx.Source{Name: "OSV"}})
	}
	if aliases != nil {
		v.References = &aliases
	}
	var more []cdx.Property
	if f.KEV {
		more = append(more, cdx.Property{Name: "tidewaiter:kev", Value: "true"})
	}
	if f.EPSS != "" {
		more = append(more, cdx.Property{Name: "tidewaiter:epss", Value: f.EPSS})
	}
	if more != nil {
		v.Properties = &more
	}
	return v
}

func versionStatus(f *contracts.Finding) cdx.VulnerabilityStatus {
	switch f.Status {
	case contracts.StatusAffected:
		return cdx.VulnerabilityStatusAffected
	case contracts.StatusUnderInvestigation:
		return cdx.VulnerabilityStatusUnknown
	default:
		return cdx.VulnerabilityStatusNotAffected
	}
}

func state(f *contracts.Finding) cdx.ImpactAnalysisState {
	switch f.Status {
	case contracts.StatusAffected:
		return cdx.IASExploitable
	case contracts.StatusFixed:
		return cdx.IASResolved
	case contracts.StatusNotAffected:
		return cdx.IASNotAffected
	default:
		return cdx.IASInTriage
	}
}

func severity(s string) cdx.Severity {
	switch s {
	case contracts.SeverityCritical:
		return cdx.SeverityCritical
	case contracts.SeverityHigh:
		return cdx.SeverityHigh
	case contracts.SeverityMedium:
		return cdx.SeverityMedium
	case contracts.SeverityLow:
		return cdx.SeverityLow
	default:
		return cdx.SeverityUnknown
	}
}

// method names the scoring method of a CVSS vector.
func method(vector string) cdx.ScoringMethod {
	switch {
	case vector == "":
		return ""
	case strings.HasPrefix(vector, "CVSS:4."):
		return cdx.ScoringMethodCVSSv4
	case strings.HasPrefix(vector, "CVSS:3.1"):
		return cdx.ScoringMethodCVSSv31
	case strings.HasPrefix(vector, "CVSS:3.0"):
		return cdx.ScoringMethodCVSSv3
	default:
		return cdx.ScoringMethodCVSSv2
	}
}
