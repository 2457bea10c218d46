// Package merge makes the inventory of an image out of its plan and the
// reports of its layers, and the inventory of an index out of its parts'.
//
// It is pure: no clocks, no I/O, and the same input gives the same bytes. Its
// rules are those by which a container runtime stacks layers (image-spec,
// layer.md, "Whiteouts"): what a layer deletes or overwrites of lower layers
// is not in the image.
package merge

import (
	"cmp"
	"path"
	"slices"
	"strconv"
	"strings"

	"github.com/tidewaiter/tidewaiter/contracts"
)

// Version is raised when the same plan and reports give another inventory.
const Version = "1"

// npmHiddenLock is the file in which npm remembers what it installed. It goes
// on listing packages that a later layer deleted.
const npmHiddenLock = "node_modules/.package-lock.json"

// Image returns the inventory of one image manifest. reports are by layer
// digest and are only read; a layer without one becomes a gap whose reason is
// the plan's Missing, where that is set. The result's slices are sorted; it
// belongs to the digest alone and names neither registry nor tag.
func Image(plan contracts.ImagePlanned, reports map[string]*contracts.LayerReport) *contracts.Inventory {
	s := newStack(plan, reports)
	inv := &contracts.Inventory{
		Digest:    plan.Image.Digest,
		Kind:      contracts.KindImage,
		MediaType: plan.MediaType,
		Platform:  plan.Platform,
		Analyzer:  s.analyzer(),
		Layers:    s.refs,
	}
	inv.OS = s.osRelease()
	system, gaps := s.systemPackages(inv.OS)
	language := dropOwned(s.languagePackages(), system)
	inv.Packages = dedupe(append(system, language...))
	inv.Gaps = sortGaps(append(s.gaps(), gaps...))
	return inv
}

// Index returns the inventory of an index: the inventories of its parts, which
// are named by digest and not repeated. gaps are the parts that have none.
func Index(plan contracts.ImagePlanned, parts []contracts.InventoryPart, gaps []contracts.Gap) *contracts.Inventory {
	parts = slices.Clone(parts)
	slices.SortFunc(parts, func(a, b contracts.InventoryPart) int {
		return cmp.Or(cmp.Compare(platform(a.Platform), platform(b.Platform)), cmp.Compare(a.Digest, b.Digest))
	})
	gaps = slices.Clone(gaps)
	for _, p := range plan.Parts {
		if p.Skipped != "" && p.Gap {
			gaps = append(gaps, contracts.Gap{Layer: p.Digest, Path: platform(p.Platform), Reason: "part not scanned: " + p.Skipped})
		}
	}
	return &contracts.Inventory{
		Digest:    plan.Image.Digest,
		Kind:      contracts.KindIndex,
		MediaType: plan.MediaType,
		Platform:  plan.Platform,
		Parts:     parts,
		Gaps:      sortGaps(gaps),
	}
}

func platform(p *contracts.Platform) string {
	if p == nil {
		return ""
	}
	return p.String()
}

// stack is the layers of an image with what each hides of those below it.
type stack struct {
	refs    []contracts.LayerRef
	missing []string // by layer: why there is no report; "" where there is one
	plan    []contracts.PlannedLayer
	reports []*contracts.LayerReport // nil where missing
	hides   []hiding
}

// hiding is what one layer takes away from all lower ones. Paths are relative
// to the root and clean.
type hiding struct {
	removed map[string]bool // the path and everything below it
	opaque  map[string]bool // everything below it, not the directory itself
	folders map[string]bool // directories of this layer: a lower file of that name is gone
}

func newStack(plan contracts.ImagePlanned, reports map[string]*contracts.LayerReport) *stack {
	s := &stack{plan: plan.Layers}
	for i, l := range plan.Layers {
		r := reports[l.Digest]
		why := ""
		switch {
		case l.Missing != "":
			r, why = nil, "layer not analysed: "+l.Missing
		case r == nil:
			why = "layer not analysed: no report"
		}
		ref := contracts.LayerRef{Index: i, Digest: l.Digest, DiffID: l.DiffID, Instruction: l.Instruction}
		if ref.DiffID == "" && r != nil {
			ref.DiffID = r.DiffID
		}
		s.refs = append(s.refs, ref)
		s.missing = append(s.missing, why)
		s.reports = append(s.reports, r)
		s.hides = append(s.hides, hidingOf(r))
	}
	return s
}

func hidingOf(r *contracts.LayerReport) hiding {
	h := hiding{removed: map[string]bool{}, opaque: map[string]bool{}, folders: map[string]bool{}}
	if r == nil {
		return h
	}
	// A file hides the file below it, and a file in the place of a directory
	// hides all that was in it: the same effect as a whiteout.
	holds := func(p string) {
		h.removed[p] = true
		for p = path.Dir(p); p != "." && !h.folders[p]; p = path.Dir(p) {
			h.folders[p] = true
		}
	}
	for _, p := range r.Whiteouts {
		h.removed[clean(p)] = true
	}
	for _, p := range r.Opaque {
		h.opaque[clean(p)] = true
	}
	for _, p := range r.Replaced {
		holds(clean(p))
	}
	for _, d := range r.Databases {
		holds(clean(d.Path))
	}
	if r.OSRelease != nil {
		holds(clean(r.OSRelease.Path))
	}
	for _, p := range r.Packages {
		for _, f := range p.Paths {
			holds(file(f))
		}
	}
	return h
}

// coversFile says whether h hides the file at the clean path p.
func (h hiding) coversFile(p string) bool { return h.folders[p] || h.covers(p) }

// covers says whether h hides the clean path p, be it a file or a directory.
func (h hiding) covers(p string) bool {
	if len(h.removed) == 0 && len(h.opaque) == 0 {
		return false
	}
	if h.removed[p] {
		return true
	}
	for p != "." {
		p = path.Dir(p)
		if h.opaque[p] || (p != "." && h.removed[p]) {
			return true
		}
	}
	return false
}

// visible says whether a file that layer i brought is in the image.
func (s *stack) visible(i int, p string) bool {
	for _, h := range s.hides[i+1:] {
		if h.coversFile(p) {
			return false
		}
	}
	return true
}

// clean makes a path relative to the root: "usr/bin/x", and "." for the root.
func clean(p string) string {
	p = path.Clean("/" + p)[1:]
	if p == "" {
		return "."
	}
	return p
}

// file returns the file of the layer that a package's path names: without what
// is inside archives.
func file(p string) string {
	outer, _, _ := strings.Cut(p, "!/")
	return clean(outer)
}

// analyzer names the version that made the reports; versions are joined, in
// order, while an upgrade is under way.
func (s *stack) analyzer() string {
	var versions []string
	for _, r := range s.reports {
		if r != nil && !slices.Contains(versions, r.Analyzer) {
			versions = append(versions, r.Analyzer)
		}
	}
	slices.SortFunc(versions, CompareVersions)
	return strings.Join(versions, "+")
}

// CompareVersions orders versions of an analyzer: numbers by value, all else
// as text and after numbers.
func CompareVersions(a, b string) int {
	x, errA := strconv.Atoi(a)
	y, errB := strconv.Atoi(b)
	switch {
	case errA == nil && errB == nil:
		return cmp.Compare(x, y)
	case errA == nil:
		return -1
	case errB == nil:
		return 1
	}
	return cmp.Compare(a, b)
}

// osRelease returns the topmost visible os-release. Where both files are
// there, etc/os-release speaks, as os-release(5) says; as that is by
// convention a link to the other, a copy of usr/lib/os-release that a higher
// layer brought wins over one that was read through the link further down.
func (s *stack) osRelease() *contracts.OSRelease {
	for i := len(s.reports) - 1; i >= 0; i-- {
		r := s.reports[i]
		if r == nil || r.OSRelease == nil || !s.visible(i, clean(r.OSRelease.Path)) {
			continue
		}
		return r.OSRelease
	}
	return nil
}

// gaps returns what could not be looked at in the layers.
func (s *stack) gaps() []contracts.Gap {
	var gaps []contracts.Gap
	for i, r := range s.reports {
		digest := s.refs[i].Digest
		if r == nil {
			gaps = append(gaps, contracts.Gap{Layer: digest, Reason: s.missing[i]})
			continue
		}
		if want := s.plan[i].DiffID; want != "" && r.DiffID != "" && r.DiffID != want {
			gaps = append(gaps, contracts.Gap{Layer: digest, Reason: "diffid-mismatch: the config promises " + want + ", the layer holds " + r.DiffID})
		}
		for _, g := range r.Gaps {
			g.Layer = digest
			gaps = append(gaps, g)
		}
	}
	return gaps
}

func sortGaps(gaps []contracts.Gap) []contracts.Gap {
	slices.SortFunc(gaps, func(a, b contracts.Gap) int {
		return cmp.Or(cmp.Compare(a.Layer, b.Layer), cmp.Compare(a.Path, b.Path), cmp.Compare(a.Reason, b.Reason))
	})
	return slices.Compact(gaps)
}

// found is a language package or server in one layer, with its visible files.
type found struct {
	pkg   contracts.LayerPackage
	layer int
	paths []string
}

// languagePackages returns what files prove that are still there.
func (s *stack) languagePackages() []contracts.Package {
	var all []found
	installed := map[string]bool{} // purl → one of its own files was seen in some layer
	alive := map[string]bool{}     // … and is still there
	for i, r := range s.reports {
		if r == nil {
			continue
		}
		for _, p := range r.Packages {
			f := found{pkg: p, layer: i}
			for _, at := range p.Paths {
				lock := isHiddenLock(file(at))
				seen := s.visible(i, file(at))
				if !lock {
					installed[p.PURL] = true
					alive[p.PURL] = alive[p.PURL] || seen
				}
				if seen {
					f.paths = append(f.paths, at)
				}
			}
			all = append(all, f)
		}
	}
	var out []contracts.Package
	for _, f := range all {
		f.paths = slices.DeleteFunc(f.paths, func(at string) bool {
			if !isHiddenLock(file(at)) {
				return false
			}
			if installed[f.pkg.PURL] {
				return !alive[f.pkg.PURL]
			}
			own := path.Join(path.Dir(file(at)), f.pkg.Name)
			return slices.ContainsFunc(s.hides[f.layer+1:], func(h hiding) bool { return h.covers(own) })
		})
		if len(f.paths) == 0 {
			continue
		}
		slices.Sort(f.paths)
		ref := s.refs[f.layer]
		out = append(out, contracts.Package{
			PURL: f.pkg.PURL, Name: f.pkg.Name, Version: f.pkg.Version, Ecosystem: f.pkg.Ecosystem,
			Server: f.pkg.Server, Product: f.pkg.Product, Paths: slices.Compact(f.paths), Layer: &ref,
		})
	}
	return out
}

func isHiddenLock(p string) bool {
	return p == npmHiddenLock || strings.HasSuffix(p, "/"+npmHiddenLock)
}

// dedupe joins packages of one purl: their paths are merged, and the lowest
// layer that has it brought it.
func dedupe(all []contracts.Package) []contracts.Package {
	slices.SortStableFunc(all, func(a, b contracts.Package) int {
		return cmp.Or(cmp.Compare(a.PURL, b.PURL), cmp.Compare(a.Layer.Index, b.Layer.Index),
			cmp.Compare(a.Ecosystem, b.Ecosystem), slices.Compare(a.Paths, b.Paths))
	})
	var out []contracts.Package
	for _, p := range all {
		if n := len(out); n > 0 && out[n-1].PURL == p.PURL {
			last := &out[n-1]
			last.Paths = append(last.Paths, p.Paths...)
			last.Server = last.Server || p.Server
			last.Product = cmp.Or(last.Product, p.Product)
			continue
		}
		out = append(out, p)
	}
	for i := range out {
		slices.Sort(out[i].Paths)
		out[i].Paths = slices.Compact(out[i].Paths)
	}
	return out
}
