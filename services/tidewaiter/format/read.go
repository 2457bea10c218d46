package format

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	cdx "github.com/CycloneDX/cyclonedx-go"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/services/attestor/sbom"
)

// Errors of ReadSBOM.
var (
	ErrNotSBOM     = errors.New("neither a CycloneDX nor an SPDX document in JSON")
	ErrUnsupported = errors.New("a kind of document that is not supported")
	ErrLimit       = errors.New("more than is read")
)

// Limits of what is read.
const (
	maxPackages   = 500_000
	maxDepth      = 64 // of components within components
	maxListedGaps = 100
)

// mediaTypeSPDX is the media type of SPDX JSON documents (IANA).
const mediaTypeSPDX = "application/spdx+json"

// ReadSBOM reads a CycloneDX (1.0 to 1.6) or SPDX (2.1 to 2.3) document in
// JSON as an inventory of the packages it names by purl. The inventory's digest
// is the document's. What names no purl or no version is listed as a gap, as it
// cannot be matched.
func ReadSBOM(content []byte) (*contracts.Inventory, error) {
	var kind struct {
		BOMFormat   string          `json:"bomFormat"`
		SPDXVersion string          `json:"spdxVersion"`
		Graph       json.RawMessage `json:"@graph"`
	}
	if err := json.Unmarshal(content, &kind); err != nil {
		if bytes.HasPrefix(bytes.TrimSpace(content), []byte("<")) {
			return nil, fmt.Errorf("XML is not read, write the document as JSON: %w", ErrUnsupported)
		}
		return nil, fmt.Errorf("read document: %w: %w", ErrNotSBOM, err)
	}
	r := &reader{inv: &contracts.Inventory{Digest: contracts.DigestOf(content), Kind: contracts.KindImage, Analyzer: "sbom"}}
	var err error
	switch {
	case strings.EqualFold(kind.BOMFormat, "CycloneDX"):
		r.inv.MediaType = contracts.MediaTypeCycloneDX
		err = r.cycloneDX(content)
	case strings.HasPrefix(kind.SPDXVersion, "SPDX-2."):
		r.inv.MediaType = mediaTypeSPDX
		err = r.spdx(content)
	case kind.SPDXVersion != "":
		return nil, fmt.Errorf("%.20q is not read, write the document as SPDX 2.3: %w", kind.SPDXVersion, ErrUnsupported)
	case kind.Graph != nil:
		return nil, fmt.Errorf("SPDX 3 is not read, write the document as SPDX 2.3: %w", ErrUnsupported)
	default:
		return nil, ErrNotSBOM
	}
	if err != nil {
		return nil, err
	}
	return r.finish(), nil
}

// reader collects packages.
type reader struct {
	inv     *contracts.Inventory
	pending []pending
	gaps    []contracts.Gap
}

// pending is a package whose distribution may be named further down.
type pending struct {
	purl   string
	path   string // of the component in the document, for gaps
	paths  []string
	adjust func(p *contracts.Package)
}

func (r *reader) gap(path, reason string) {
	r.gaps = append(r.gaps, contracts.Gap{Path: path, Reason: reason})
}

func (r *reader) cycloneDX(content []byte) error {
	var bom cdx.BOM
	if err := cdx.NewBOMDecoder(bytes.NewReader(content), cdx.BOMFileFormatJSON).Decode(&bom); err != nil {
		return fmt.Errorf("read CycloneDX: %w: %w", ErrNotSBOM, err)
	}
	if bom.Metadata != nil && bom.Metadata.Component != nil {
		// What the document is about is matched too, if it is a package.
		if c := *bom.Metadata.Component; c.PackageURL != "" {
			c.Components = nil
			if err := r.components([]cdx.Component{c}, 0); err != nil {
				return err
			}
		}
		if inner := bom.Metadata.Component.Components; inner != nil {
			if err := r.components(*inner, 1); err != nil {
				return err
			}
		}
	}
	if bom.Components == nil {
		return nil
	}
	return r.components(*bom.Components, 0)
}

func (r *reader) components(list []cdx.Component, depth int) error {
	if depth > maxDepth {
		return fmt.Errorf("components nested deeper than %d: %w", maxDepth, ErrLimit)
	}
	for i := range list {
		c := &list[i]
		switch {
		case c.Type == cdx.ComponentTypeOS:
			r.os(c.Name, c.Version)
		case c.PackageURL != "":
			if err := r.add(pending{purl: c.PackageURL, path: c.Name, paths: occurrences(c), adjust: func(p *contracts.Package) { known(p, c) }}); err != nil {
				return err
			}
		case c.Type == cdx.ComponentTypeLibrary, c.Type == cdx.ComponentTypeFramework, c.Type == cdx.ComponentTypeApplication && c.Version != "":
			r.gap(c.Name, "no-purl: "+c.Name+" "+c.Version)
		}
		if c.Components != nil {
			if err := r.components(*c.Components, depth+1); err != nil {
				return err
			}
		}
	}
	return nil
}

func occurrences(c *cdx.Component) []string {
	if c.Evidence == nil || c.Evidence.Occurrences == nil {
		return nil
	}
	var out []string
	for _, o := range *c.Evidence.Occurrences {
		if o.Location != "" {
			out = append(out, o.Location)
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// known fills in what tools write as properties, beside the purl: ours, those
// of syft and of Trivy.
func known(p *contracts.Package, c *cdx.Component) {
	first := func(names ...string) string {
		for _, n := range names {
			if v := property(c.Properties, n); v != "" {
				return v
			}
		}
		return ""
	}
	p.Ecosystem = cmp.Or(first(sbom.PropertyEcosystem), p.Ecosystem)
	p.Product = first(sbom.PropertyProduct)
	p.Module = cmp.Or(first(sbom.PropertyModule, "syft:metadata:modularityLabel", "aquasecurity:trivy:Modularitylabel"), p.Module)
	if p.Source != "" {
		return
	}
	p.Source = first(sbom.PropertySource, "syft:metadata:source", "aquasecurity:trivy:SrcName")
	version := first(sbom.PropertySourceVersion, "syft:metadata:sourceVersion")
	if v := first("aquasecurity:trivy:SrcVersion"); version == "" && v != "" {
		version = join(first("aquasecurity:trivy:SrcEpoch"), ":", v)
		if release := first("aquasecurity:trivy:SrcRelease"); release != "" {
			version += "-" + release
		}
	}
	if version != p.Version {
		p.SourceVersion = version
	}
}

// spdxDocument is what is read of SPDX 2: the SPDX project's own library
// panics on documents with holes, which a reader of foreign files must not.
type spdxDocument struct {
	Packages []struct {
		Name         string `json:"name"`
		Version      string `json:"versionInfo"`
		Purpose      string `json:"primaryPackagePurpose"`
		SourceInfo   string `json:"sourceInfo"`
		ExternalRefs []struct {
			Type    string `json:"referenceType"`
			Locator string `json:"referenceLocator"`
		} `json:"externalRefs"`
	} `json:"packages"`
}

func (r *reader) spdx(content []byte) error {
	var doc spdxDocument
	if err := json.Unmarshal(content, &doc); err != nil {
		return fmt.Errorf("read SPDX: %w: %w", ErrNotSBOM, err)
	}
	for _, p := range doc.Packages {
		if p.Purpose == "OPERATING-SYSTEM" {
			r.os(p.Name, p.Version)
			continue
		}
		purl := ""
		for _, ref := range p.ExternalRefs {
			if ref.Type == "purl" {
				purl = ref.Locator
				break
			}
		}
		if purl == "" {
			if p.Purpose != "CONTAINER" && p.Version != "" {
				r.gap(p.Name, "no-purl: "+p.Name+" "+p.Version)
			}
			continue
		}
		err := r.add(pending{purl: purl, path: p.Name, adjust: func(out *contracts.Package) {
			from, ok := strings.CutPrefix(p.SourceInfo, builtFrom)
			if !ok || out.Source != "" {
				return
			}
			name, version, _ := strings.Cut(from, " ")
			out.Source = name
			if version != out.Version {
				out.SourceVersion = version
			}
		}})
		if err != nil {
			return err
		}
	}
	return nil
}

// os notes the distribution; the first one counts.
func (r *reader) os(name, version string) {
	if r.inv.OS == nil && name != "" {
		r.inv.OS = &contracts.OSRelease{ID: osID(name), VersionID: version}
	}
}

func (r *reader) add(p pending) error {
	if len(r.pending) == maxPackages {
		return fmt.Errorf("more than %d packages: %w", maxPackages, ErrLimit)
	}
	r.pending = append(r.pending, p)
	return nil
}

func (r *reader) finish() *contracts.Inventory {
	byPURL := map[string]int{}
	var packages []contracts.Package
	for _, n := range r.pending {
		p, err := packageOf(n.purl, r.inv.OS)
		if err != nil {
			r.gap(n.path, "purl: "+err.Error())
			continue
		}
		if strings.HasPrefix(n.purl, "pkg:oci/") || strings.HasPrefix(n.purl, "pkg:docker/") {
			continue // the image itself
		}
		n.adjust(&p)
		if p.Version == "" {
			r.gap(n.path, "no-version: "+n.purl)
			continue
		}
		i, ok := byPURL[p.PURL]
		if !ok {
			byPURL[p.PURL] = len(packages)
			p.Paths = n.paths
			packages = append(packages, p)
			continue
		}
		paths := append(packages[i].Paths, n.paths...)
		slices.Sort(paths)
		packages[i].Paths = slices.Compact(paths)
	}
	slices.SortFunc(packages, func(a, b contracts.Package) int { return cmp.Compare(a.PURL, b.PURL) })
	r.inv.Packages = packages
	slices.SortStableFunc(r.gaps, func(a, b contracts.Gap) int {
		return cmp.Or(cmp.Compare(a.Reason, b.Reason), cmp.Compare(a.Path, b.Path))
	})
	r.gaps = slices.Compact(r.gaps)
	if more := len(r.gaps) - maxListedGaps; more > 0 {
		r.gaps = append(r.gaps[:maxListedGaps], contracts.Gap{Reason: fmt.Sprintf("and %d more components that cannot be matched", more)})
	}
	r.inv.Gaps = r.gaps
	return r.inv
}
