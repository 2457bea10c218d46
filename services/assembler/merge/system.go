package merge

import (
	"cmp"
	"maps"
	"slices"
	"strings"

	"github.com/package-url/packageurl-go"

	"github.com/tidewaiter/tidewaiter/contracts"
)

// entry is what makes two entries of a package database the same package.
type entry struct{ name, version, arch string }

// history is one database file over the layers.
type history struct {
	kind     string
	packages []contracts.SystemPackage // of the topmost copy
	since    map[entry]int             // the layer that brought each, in the final run
}

// systemPackages returns the packages of the databases that are still there,
// each attributed to the layer that first listed that name, version and
// architecture and was followed by no copy that did not.
func (s *stack) systemPackages(os *contracts.OSRelease) ([]contracts.Package, []contracts.Gap) {
	databases := map[string]*history{}
	for i, r := range s.reports {
		for at := range databases {
			if s.hides[i].coversFile(at) && !brings(r, at) {
				delete(databases, at)
			}
		}
		if r == nil {
			continue
		}
		for _, d := range r.Databases {
			at := clean(d.Path)
			before := databases[at]
			if before != nil && before.kind != d.Kind {
				before = nil
			}
			databases[at] = before.next(d, i)
		}
	}

	var out []contracts.Package
	unmatched := map[string]string{} // kind → path of its first database
	for _, at := range slices.Sorted(maps.Keys(databases)) {
		h := databases[at]
		dist := distributionOf(h.kind, os)
		for _, p := range h.packages {
			ref := s.refs[h.since[entry{p.Name, p.Version, p.Arch}]]
			out = append(out, systemPackage(h.kind, at, p, dist, ref))
		}
		if _, seen := unmatched[h.kind]; !seen && dist.ecosystem == "" && len(h.packages) > 0 {
			unmatched[h.kind] = at
		}
	}
	var gaps []contracts.Gap
	for kind, at := range unmatched {
		gaps = append(gaps, contracts.Gap{Path: at, Reason: unmatchedReason(kind, os)})
	}
	return out, gaps
}

func brings(r *contracts.LayerReport, at string) bool {
	return r != nil && slices.ContainsFunc(r.Databases, func(d contracts.PackageDatabase) bool { return clean(d.Path) == at })
}

// next returns the history with one more copy of the file on top.
func (h *history) next(d contracts.PackageDatabase, layer int) *history {
	n := &history{kind: d.Kind, packages: d.Packages, since: make(map[entry]int, len(d.Packages))}
	for _, p := range d.Packages {
		e := entry{p.Name, p.Version, p.Arch}
		n.since[e] = layer
		if h == nil {
			continue
		}
		if first, ok := h.since[e]; ok {
			n.since[e] = first
		}
	}
	return n
}

func systemPackage(kind, at string, p contracts.SystemPackage, dist distribution, ref contracts.LayerRef) contracts.Package {
	return contracts.Package{
		PURL: systemPURL(kind, p, dist), Name: p.Name, Version: p.Version, Ecosystem: dist.ecosystem,
		Source: p.Source, SourceVersion: p.SourceVersion, Arch: p.Arch, Module: p.Module,
		Paths: []string{at}, Layer: &ref,
	}
}

// systemPURL writes a purl as purl-spec's type definitions say: deb and apk
// versions are written whole, an rpm's epoch is a qualifier.
func systemPURL(kind string, p contracts.SystemPackage, dist distribution) string {
	purlType, version := kind, p.Version
	qualifiers := map[string]string{}
	if p.Arch != "" {
		qualifiers["arch"] = p.Arch
	}
	if dist.qualifier != "" {
		qualifiers["distro"] = dist.qualifier
	}
	switch kind {
	case "dpkg":
		purlType = "deb"
	case "rpm":
		if epoch, rest, ok := strings.Cut(version, ":"); ok {
			version = rest
			if epoch != "0" {
				qualifiers["epoch"] = epoch
			}
		}
	}
	return packageurl.NewPackageURL(purlType, dist.namespace, p.Name, version,
		packageurl.QualifiersFromMap(qualifiers), "").ToString()
}

// distribution is what an os-release means for the packages of one kind of
// database.
type distribution struct {
	ecosystem string // OSV's name with release; "" when no advisories can be named
	namespace string // of purls
	qualifier string // purl's "distro"
}

// Releases by code name, for os-release files that carry no VERSION_ID
// (Debian's testing and unstable) and for derivatives that keep the name of
// the release they are built on.
var (
	debianReleases = map[string]string{
		"jessie": "8", "stretch": "9", "buster": "10", "bullseye": "11", "bookworm": "12", "trixie": "13", "forky": "14",
	}
	ubuntuReleases = map[string]string{
		"trusty": "14.04", "xenial": "16.04", "bionic": "18.04", "focal": "20.04", "jammy": "22.04", "noble": "24.04",
		"mantic": "23.10", "oracular": "24.10", "plucky": "25.04", "questing": "25.10", "resolute": "26.04",
	}
)

// distributionOf names the advisories for packages of the given kind of
// database (OSV schema, "Defined ecosystems"). A derivative counts as its
// parent only when it carries the code name of one of the parent's releases:
// then its archive is the parent's with additions.
func distributionOf(kind string, os *contracts.OSRelease) distribution {
	if os == nil || os.ID == "" {
		return distribution{}
	}
	id := strings.ToLower(os.ID)
	d := distribution{namespace: id, qualifier: id}
	if os.VersionID != "" {
		d.qualifier += "-" + os.VersionID
	} else if os.Codename != "" {
		d.qualifier += "-" + os.Codename
	}
	switch kind {
	case "dpkg":
		d.ecosystem = dpkgEcosystem(id, os)
	case "apk":
		d.ecosystem = apkEcosystem(id, os.VersionID)
	case "rpm":
		d.ecosystem = rpmEcosystem(id, os.VersionID)
		if id == "rhel" {
			d.namespace = "redhat"
		}
		if strings.HasPrefix(id, "opensuse") {
			d.namespace = "opensuse"
		}
	}
	return d
}

func dpkgEcosystem(id string, os *contracts.OSRelease) string {
	switch id {
	case "debian":
		return debianEcosystem(cmp.Or(os.VersionID, debianReleases[os.Codename]))
	case "ubuntu":
		return ubuntuEcosystem(cmp.Or(os.VersionID, ubuntuReleases[os.Codename]))
	}
	like := strings.Fields(strings.ToLower(os.IDLike))
	if release := ubuntuReleases[os.Codename]; release != "" && slices.Contains(like, "ubuntu") {
		return ubuntuEcosystem(release)
	}
	if release := debianReleases[os.Codename]; release != "" && slices.Contains(like, "debian") {
		return debianEcosystem(release)
	}
	return ""
}

func debianEcosystem(version string) string {
	major, _, _ := strings.Cut(version, ".")
	switch major {
	case "":
		return ""
	case "3", "4", "5", "6": // until 7 the second number was part of the release
		return "Debian:" + version
	}
	return "Debian:" + major
}

// ubuntuEcosystem appends LTS as OSV does: releases of April in even years.
func ubuntuEcosystem(version string) string {
	year, month, ok := strings.Cut(version, ".")
	if !ok || year == "" {
		return ""
	}
	if month == "04" && strings.ContainsAny(year[len(year)-1:], "02468") {
		return "Ubuntu:" + version + ":LTS"
	}
	return "Ubuntu:" + version
}

func apkEcosystem(id, version string) string {
	switch id {
	case "wolfi":
		return "Wolfi"
	case "chainguard":
		return "Chainguard"
	case "minimos":
		return "MinimOS"
	case "alpine":
		major, rest, ok := strings.Cut(version, ".")
		minor, _, _ := strings.Cut(rest, ".")
		// "3.22_alpha…" is edge, which no release's advisories describe.
		if !ok || strings.Contains(version, "_alpha") {
			return ""
		}
		return "Alpine:v" + major + "." + minor
	}
	return ""
}

func rpmEcosystem(id, version string) string {
	major, minor, _ := strings.Cut(version, ".")
	if major == "" {
		return ""
	}
	switch id {
	case "almalinux":
		return "AlmaLinux:" + major
	case "rocky":
		return "Rocky Linux:" + major
	case "rhel":
		return "Red Hat:enterprise_linux:" + major
	case "opensuse-leap":
		return "openSUSE:Leap " + version
	case "sles":
		if minor == "" || minor == "0" {
			return "SUSE:Linux Enterprise Server " + major
		}
		return "SUSE:Linux Enterprise Server " + major + " SP" + minor
	case "mageia":
		return "Mageia:" + major
	}
	return ""
}

func unmatchedReason(kind string, os *contracts.OSRelease) string {
	if os == nil || os.ID == "" {
		return "no os-release: packages of " + kind + " cannot be matched"
	}
	name := os.ID
	if os.VersionID != "" {
		name += " " + os.VersionID
	}
	return "no advisories are known for " + name + ": packages of " + kind + " cannot be matched"
}
