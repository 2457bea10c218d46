package format

import (
	"strings"

	"github.com/package-url/packageurl-go"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/services/assembler/merge"
)

// language are the ecosystems of packages that belong to no distribution, by
// purl type (purl-spec, PURL-TYPES; OSV schema, "Defined ecosystems").
func language(purlType string) string {
	switch purlType {
	case "npm":
		return "npm"
	case "pypi":
		return "PyPI"
	case "maven":
		return "Maven"
	case "golang":
		return "Go"
	case "cargo":
		return "crates.io"
	case "gem":
		return "RubyGems"
	case "nuget":
		return "NuGet"
	case "composer":
		return "Packagist"
	case "bitnami":
		return "Bitnami"
	case "hex":
		return "Hex"
	case "pub":
		return "Pub"
	case "swift":
		return "SwiftURL"
	case "conan":
		return "ConanCenter"
	case "cran":
		return "CRAN"
	case "hackage":
		return "Hackage"
	default:
		return ""
	}
}

// packageOf returns the package that a purl names, with the name and ecosystem
// under which OSV knows it. os is the document's distribution, for purls that
// do not name one; it may be nil. A purl of a type without advisories gives a
// package without an ecosystem.
func packageOf(purl string, os *contracts.OSRelease) (contracts.Package, error) {
	u, err := packageurl.FromString(purl)
	if err != nil {
		return contracts.Package{}, err
	}
	p := contracts.Package{PURL: purl, Version: u.Version, Name: u.Name, Ecosystem: language(u.Type)}
	qualifiers := u.Qualifiers.Map()
	switch u.Type {
	case "npm", "composer", "swift":
		p.Name = join(u.Namespace, "/", u.Name)
	case "golang":
		p.Name = join(u.Namespace, "/", u.Name)
		p.Version = strings.TrimPrefix(u.Version, "v") // OSV's Go versions have none
	case "maven":
		p.Name = join(u.Namespace, ":", u.Name)
	case "bitnami":
		p.Server = true
	case "deb", "apk", "rpm":
		system(&p, u, qualifiers, os)
	}
	return p, nil
}

func join(namespace, separator, name string) string {
	if namespace == "" {
		return name
	}
	return namespace + separator + name
}

// system fills in what is particular to packages of distributions.
func system(p *contracts.Package, u packageurl.PackageURL, qualifiers map[string]string, os *contracts.OSRelease) {
	kind := u.Type
	if kind == "deb" {
		kind = "dpkg"
	}
	p.Arch = qualifiers["arch"]
	p.Module = qualifiers["rpmmod"]
	if epoch := qualifiers["epoch"]; epoch != "" && epoch != "0" && !strings.Contains(p.Version, ":") {
		p.Version = epoch + ":" + p.Version
	}
	p.Source, p.SourceVersion = source(qualifiers)
	if p.SourceVersion == p.Version {
		p.SourceVersion = ""
	}
	p.Ecosystem = merge.Ecosystem(kind, release(u.Namespace, qualifiers["distro"], os))
}

// source reads the source package as the various tools write it:
// upstream=name[@version], source=name and sourceversion=version, or
// sourcerpm=name-version-release.src.rpm.
func source(qualifiers map[string]string) (name, version string) {
	if upstream := qualifiers["upstream"]; upstream != "" && !strings.HasSuffix(upstream, ".src.rpm") {
		name, version, _ = strings.Cut(upstream, "@")
		return name, version
	}
	if s := qualifiers["source"]; s != "" {
		return s, qualifiers["sourceversion"]
	}
	file := qualifiers["sourcerpm"]
	if file == "" {
		file = qualifiers["upstream"]
	}
	stem, ok := strings.CutSuffix(file, ".src.rpm")
	if !ok {
		return "", ""
	}
	// The name may hold hyphens, version and release may not.
	last := strings.LastIndexByte(stem, '-')
	if last < 0 {
		return "", ""
	}
	first := strings.LastIndexByte(stem[:last], '-')
	if first < 0 {
		return "", ""
	}
	return stem[:first], stem[first+1:]
}

// release reads a purl's distribution: its namespace and its qualifier
// "distro", which tools write as "debian-12", "12.5" or "bookworm". Where it
// does not tell, os does, if it is the same distribution.
func release(namespace, distro string, os *contracts.OSRelease) *contracts.OSRelease {
	r := &contracts.OSRelease{ID: osID(namespace)}
	name, version, ok := strings.Cut(distro, "-")
	for ok && !startsWithDigit(version) { // opensuse-leap-15.5
		var more string
		if more, version, ok = strings.Cut(version, "-"); ok {
			name += "-" + more
		}
	}
	switch {
	case ok && version != "":
		r.VersionID = version
		r.ID = osID(name)
	case startsWithDigit(distro), strings.HasPrefix(distro, "v") && startsWithDigit(distro[1:]):
		r.VersionID = strings.TrimPrefix(distro, "v")
	case distro != "" && distro != namespace:
		_, code, found := strings.Cut(distro, "-") // debian-sid
		if !found {
			code = distro
		}
		r.Codename = code
	case os != nil && (r.ID == "" || r.ID == osID(os.ID)):
		return os
	}
	return r
}

// osID is a distribution's name as its os-release says it.
func osID(name string) string {
	switch name = strings.ToLower(name); name {
	case "redhat", "red hat":
		return "rhel"
	case "suse", "suse linux enterprise server":
		return "sles"
	case "opensuse", "opensuse.leap", "opensuse leap":
		return "opensuse-leap"
	case "alma":
		return "almalinux"
	case "rockylinux", "rocky linux":
		return "rocky"
	default:
		return name
	}
}

func startsWithDigit(s string) bool { return s != "" && s[0] >= '0' && s[0] <= '9' }
