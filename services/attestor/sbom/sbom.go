// Package sbom writes inventories as CycloneDX 1.6 documents.
package sbom

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"slices"
	"strconv"
	"strings"

	cdx "github.com/CycloneDX/cyclonedx-go"

	"github.com/tidewaiter/tidewaiter/contracts"
)

// Names of the properties that carry what CycloneDX has no field for.
const (
	propertyPrefix        = "tidewaiter:"
	PropertyEcosystem     = propertyPrefix + "ecosystem"
	PropertySource        = propertyPrefix + "source"
	PropertySourceVersion = propertyPrefix + "sourceVersion"
	PropertyModule        = propertyPrefix + "module"
	PropertyProduct       = propertyPrefix + "product"
	PropertyLayerIndex    = propertyPrefix + "layer:index"
	PropertyLayerDigest   = propertyPrefix + "layer:digest"
	PropertyLayerDiffID   = propertyPrefix + "layer:diffID"
	PropertyPlatform      = propertyPrefix + "platform"
	PropertyInventory     = propertyPrefix + "inventory"
	PropertyGap           = propertyPrefix + "gap"
)

// Part fetches the inventory of one platform of an index by its digest.
type Part func(ctx context.Context, inventoryDigest string) (*contracts.Inventory, error)

// CycloneDX writes an inventory as a CycloneDX 1.6 JSON document. The same
// inventory gives the same bytes: there is no timestamp and the serial number
// is derived from the inventory's digest. The components of an index are its
// platforms, each with its own packages inside; part is needed for these only.
// What could not be looked at is listed, and the document then calls itself
// incomplete.
func CycloneDX(ctx context.Context, inv *contracts.Inventory, inventoryDigest string, part Part) ([]byte, error) {
	bom, err := BOM(ctx, inv, inventoryDigest, part)
	if err != nil {
		return nil, err
	}
	return Encode(bom)
}

// BOM is CycloneDX before it is encoded, for those who have something to add.
func BOM(ctx context.Context, inv *contracts.Inventory, inventoryDigest string, part Part) (*cdx.BOM, error) {
	root := imageComponent(inv.Digest, inv.Platform, inventoryDigest)
	refs := references{}
	root.BOMRef = refs.next(inv.Digest)
	list := components(inv, refs)
	gaps := slices.Clone(inv.Gaps)
	for _, p := range inv.Parts {
		child, err := part(ctx, p.Inventory)
		if err != nil {
			return nil, fmt.Errorf("inventory %s of part %s: %w", p.Inventory, p.Digest, err)
		}
		c := imageComponent(p.Digest, p.Platform, p.Inventory)
		c.BOMRef = refs.next(p.Digest)
		if inner := componentsOf(child, refs); len(inner) > 0 {
			c.Components = &inner
		}
		list = append(list, c)
		for _, g := range child.Gaps {
			if g.Layer == "" {
				g.Layer = p.Digest
			}
			gaps = append(gaps, g)
		}
	}
	bom := document(inventoryDigest, inv.Analyzer)
	bom.Metadata.Component = &root
	bom.Components = &list
	markGaps(bom, gaps, root.BOMRef)
	return bom, nil
}

// document returns an empty document whose serial number is derived from what
// it is about.
func document(about, analyzer string) *cdx.BOM {
	bom := cdx.NewBOM()
	bom.SerialNumber = serial(about)
	bom.Metadata = &cdx.Metadata{Tools: &cdx.ToolsChoice{Components: &[]cdx.Component{{
		Type: cdx.ComponentTypeApplication, Name: "tidewaiter", Group: "dev.tidewaiter",
		Properties: properties(propertyPrefix+"analyzer", analyzer),
	}}}}
	return bom
}

// markGaps lists what could not be looked at below the component root.
func markGaps(bom *cdx.BOM, gaps []contracts.Gap, root string) {
	if len(gaps) == 0 {
		return
	}
	var listed []cdx.Property
	for _, g := range gaps {
		where := strings.TrimSpace(g.Layer + " " + g.Path)
		listed = append(listed, cdx.Property{Name: PropertyGap, Value: strings.TrimSpace(where + ": " + g.Reason)})
	}
	bom.Metadata.Properties = &listed
	bom.Compositions = &[]cdx.Composition{{
		Aggregate:  cdx.CompositionAggregateIncomplete,
		Assemblies: &[]cdx.BOMReference{cdx.BOMReference(root)},
	}}
}

// Encode writes a document as CycloneDX 1.6 JSON.
func Encode(bom *cdx.BOM) ([]byte, error) {
	var out bytes.Buffer
	err := cdx.NewBOMEncoder(&out, cdx.BOMFileFormatJSON).SetEscapeHTML(false).EncodeVersion(bom, cdx.SpecVersion1_6)
	if err != nil {
		return nil, fmt.Errorf("encode CycloneDX: %w", err)
	}
	return out.Bytes(), nil
}

// references hands out names that are unique within a document.
type references map[string]bool

// next returns want, or want with a number after it when it was handed out before.
func (r references) next(want string) string {
	name := want
	for n := 2; r[name]; n++ {
		name = want + "#" + strconv.Itoa(n)
	}
	r[name] = true
	return name
}

func components(inv *contracts.Inventory, refs references) []cdx.Component {
	out := componentsOf(inv, refs)
	if out == nil {
		return []cdx.Component{}
	}
	return out
}

func componentsOf(inv *contracts.Inventory, refs references) []cdx.Component {
	var out []cdx.Component
	if inv.OS != nil {
		out = append(out, cdx.Component{
			Type: cdx.ComponentTypeOS, BOMRef: refs.next("os:" + inv.OS.ID + "@" + inv.OS.VersionID),
			Name: inv.OS.ID, Version: inv.OS.VersionID, Description: inv.OS.PrettyName,
		})
	}
	for _, p := range inv.Packages {
		out = append(out, component(p, refs))
	}
	return out
}

func imageComponent(digest string, platform *contracts.Platform, inventoryDigest string) cdx.Component {
	c := cdx.Component{
		Type: cdx.ComponentTypeContainer, Name: digest, Version: digest,
		Hashes: &[]cdx.Hash{{Algorithm: cdx.HashAlgoSHA256, Value: strings.TrimPrefix(digest, "sha256:")}},
	}
	var name string
	if platform != nil {
		name = platform.String()
	}
	c.Properties = properties(PropertyPlatform, name, PropertyInventory, inventoryDigest)
	return c
}

// component returns a package as a component.
func component(p contracts.Package, refs references) cdx.Component {
	group, name := groupAndName(p.Ecosystem, p.Name)
	c := cdx.Component{
		BOMRef: refs.next(ref(p)), Type: cdx.ComponentTypeLibrary,
		Group: group, Name: name, Version: p.Version, PackageURL: p.PURL,
	}
	if p.Server {
		c.Type = cdx.ComponentTypeApplication
	}
	pairs := []string{
		PropertyEcosystem, p.Ecosystem, PropertySource, p.Source, PropertySourceVersion, p.SourceVersion,
		PropertyModule, p.Module, PropertyProduct, p.Product,
	}
	if p.Layer != nil {
		pairs = append(pairs, PropertyLayerIndex, strconv.Itoa(p.Layer.Index), PropertyLayerDigest, p.Layer.Digest, PropertyLayerDiffID, p.Layer.DiffID)
	}
	c.Properties = properties(pairs...)
	if len(p.Paths) > 0 {
		var found []cdx.EvidenceOccurrence
		for _, path := range p.Paths {
			found = append(found, cdx.EvidenceOccurrence{Location: path})
		}
		c.Evidence = &cdx.Evidence{Occurrences: &found}
	}
	return c
}

// ref is what a package is referred to by within a document.
func ref(p contracts.Package) string {
	if p.PURL != "" {
		return p.PURL
	}
	return p.Ecosystem + "/" + p.Name + "@" + p.Version
}

// groupAndName splits the names of ecosystems that have groups: Maven's
// group:artifact and npm's @scope/name.
func groupAndName(ecosystem, name string) (group, short string) {
	var found bool
	switch ecosystem, _, _ := strings.Cut(ecosystem, ":"); ecosystem {
	case "Maven":
		group, short, found = strings.Cut(name, ":")
	case "npm":
		if strings.HasPrefix(name, "@") {
			group, short, found = strings.Cut(name, "/")
		}
	}
	if !found {
		return "", name
	}
	return group, short
}

// properties returns the given name-value pairs without empty values.
func properties(pairs ...string) *[]cdx.Property {
	var out []cdx.Property
	for pair := range slices.Chunk(pairs, 2) {
		if pair[1] != "" {
			out = append(out, cdx.Property{Name: pair[0], Value: pair[1]})
		}
	}
	if out == nil {
		return nil
	}
	return &out
}

// serial derives a serial number: a UUID of version 8 (RFC 9562, section 5.8).
func serial(about string) string {
	sum := sha256.Sum256([]byte("CycloneDX of " + about))
	u := sum[:16]
	u[6] = u[6]&0x0f | 0x80
	u[8] = u[8]&0x3f | 0x80
	h := hex.EncodeToString(u)
	return "urn:uuid:" + h[:8] + "-" + h[8:12] + "-" + h[12:16] + "-" + h[16:20] + "-" + h[20:]
}
