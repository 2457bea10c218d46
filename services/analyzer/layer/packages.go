package layer

import (
	"bytes"
	"fmt"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/google/osv-scalibr/extractor"
	archivemeta "github.com/google/osv-scalibr/extractor/filesystem/language/java/archive/metadata"
	apkmeta "github.com/google/osv-scalibr/extractor/filesystem/os/apk/metadata"
	dpkgmeta "github.com/google/osv-scalibr/extractor/filesystem/os/dpkg/metadata"
	rpmmeta "github.com/google/osv-scalibr/extractor/filesystem/os/rpm/metadata"
	"github.com/package-url/packageurl-go"

	"github.com/tidewaiter/tidewaiter/contracts"
)

// maxRelease bounds os-release, in bytes.
const maxRelease = 64 << 10

// ecosystems are OSV's names by purl type.
var ecosystems = map[string]string{
	"npm": "npm", "pypi": "PyPI", "maven": "Maven", "golang": "Go", "bitnami": "Bitnami",
}

// convert turns what an extractor found in one file into facts of the report.
// A package database is one even if nothing in it is installed.
func (a *analysis) convert(k kind, name string, found []*extractor.Package) ([]contracts.LayerPackage, *contracts.PackageDatabase) {
	switch k {
	case kindDpkg, kindApk, kindRPM:
		db := &contracts.PackageDatabase{Kind: databaseKind(name), Path: name, Packages: []contracts.SystemPackage{}}
		for _, p := range found {
			db.Packages = append(db.Packages, systemPackage(p))
		}
		slices.SortFunc(db.Packages, compareSystem)
		db.Packages = slices.Compact(db.Packages)
		return nil, db
	}
	var out []contracts.LayerPackage
	for _, p := range found {
		if lp, ok := languagePackage(k, p); ok {
			out = append(out, lp)
		}
	}
	return out, nil
}

func systemPackage(p *extractor.Package) contracts.SystemPackage {
	s := contracts.SystemPackage{Name: p.Name, Version: p.Version}
	switch m := p.Metadata.(type) {
	case *dpkgmeta.Metadata:
		s.Source, s.SourceVersion, s.Arch = m.SourceName, m.SourceVersion, m.Architecture
	case *apkmeta.Metadata:
		s.Source, s.Arch = m.OriginName, m.Architecture
	case *rpmmeta.Metadata:
		s.Arch = m.Architecture
		if m.Epoch > 0 {
			s.Version = strconv.Itoa(m.Epoch) + ":" + s.Version
		}
		s.Source, s.SourceVersion = sourceOfRPM(m.SourceRPM)
	}
	return s
}

// sourceOfRPM splits the file name of a source package:
// "glibc-2.34-60.el9.src.rpm" is glibc, 2.34-60.el9.
func sourceOfRPM(file string) (name, version string) {
	base, ok := strings.CutSuffix(file, ".src.rpm")
	if !ok {
		return "", ""
	}
	release := strings.LastIndexByte(base, '-')
	if release <= 0 {
		return "", ""
	}
	v := strings.LastIndexByte(base[:release], '-')
	if v <= 0 {
		return "", ""
	}
	return base[:v], base[v+1:]
}

func compareSystem(x, y contracts.SystemPackage) int {
	for _, c := range []int{
		strings.Compare(x.Name, y.Name), strings.Compare(x.Version, y.Version), strings.Compare(x.Arch, y.Arch),
		strings.Compare(x.Source, y.Source), strings.Compare(x.SourceVersion, y.SourceVersion),
	} {
		if c != 0 {
			return c
		}
	}
	return 0
}

// languagePackage converts a package of a language's own package manager;
// false means that it has no usable name or version.
func languagePackage(k kind, p *extractor.Package) (contracts.LayerPackage, bool) {
	lp := contracts.LayerPackage{Type: p.PURLType, Name: p.Name, Version: p.Version, Paths: []string{p.Location.PathOrEmpty()}}
	switch k {
	case kindPython:
		lp.Name = normalizePyPI(lp.Name)
	case kindExecutable:
		if lp.Name == "go" {
			lp.Name = "stdlib" // its name in the Go vulnerability database
			lp.Version = goSemver(lp.Version)
		}
		if lp.Version == "(devel)" || lp.Version == "" {
			return lp, false // built from a working copy: there is nothing to compare
		}
	case kindJava:
		name, ok := mavenName(p)
		if !ok {
			return lp, false
		}
		lp.Name = name
	case kindNpmLock, kindYarnLock, kindPnpmLock:
		if developmentOnly(p) {
			return lp, false // not installed in an image
		}
	}
	lp.Ecosystem = ecosystems[lp.Type]
	if lp.Ecosystem == "" || !sane(lp.Name) || !sane(lp.Version) {
		return lp, false
	}
	lp.PURL = purl(lp)
	return lp, true
}

// sane refuses names and versions that no registry has: empty ones, and what
// only a hostile file would hold.
func sane(s string) bool {
	if s == "" || len(s) > 512 {
		return false
	}
	for _, r := range s {
		if r <= ' ' || r == 0x7f || r == 0xfffd {
			return false
		}
	}
	return true
}

func purl(p contracts.LayerPackage) string {
	namespace, name := "", p.Name
	switch p.Type {
	case "maven":
		namespace, name, _ = strings.Cut(p.Name, ":")
	case "npm", "golang":
		if i := strings.LastIndexByte(p.Name, '/'); i >= 0 {
			namespace, name = p.Name[:i], p.Name[i+1:]
		}
	}
	return packageurl.NewPackageURL(p.Type, namespace, name, p.Version, nil, "").ToString()
}

var separators = regexp.MustCompile(`[-_.]+`)

// normalizePyPI writes a name as PEP 503 does.
func normalizePyPI(name string) string {
	return strings.ToLower(separators.ReplaceAllString(name, "-"))
}

var goVersion = regexp.MustCompile(`^(\d+)\.(\d+)(?:\.(\d+))?(?:(alpha|beta|rc|pre)\.?(\d+))?(?:[-+].*)?$`)

// goSemver writes the version of a Go toolchain as the Go vulnerability
// database does: "1.21rc2" is "1.21.0-rc.2". Development builds have none.
func goSemver(v string) string {
	m := goVersion.FindStringSubmatch(v)
	if m == nil {
		return ""
	}
	patch := m[3]
	if patch == "" {
		patch = "0"
	}
	out := m[1] + "." + m[2] + "." + patch
	if m[4] != "" {
		out += "-" + m[4] + "." + m[5]
	}
	return out
}

// developmentOnly says whether a lock file lists a package for development alone.
func developmentOnly(p *extractor.Package) bool {
	g, ok := p.Metadata.(interface{ DepGroups() []string })
	if !ok {
		return false
	}
	groups := g.DepGroups()
	for _, name := range groups {
		if name != "dev" {
			return false
		}
	}
	return len(groups) > 0
}

// mavenName returns group:artifact. Only pom.properties knows the group; from
// file names and manifests it is guessed, and mended where the artifact is known.
func mavenName(p *extractor.Package) (string, bool) {
	m, ok := p.Metadata.(*archivemeta.Metadata)
	if !ok || m.ArtifactID == "" || m.ArtifactID == "unknown" {
		return "", false
	}
	artifact, group := m.ArtifactID, m.GroupID
	if !fromPom(p) {
		if known, ok := mavenGroups[artifact]; ok {
			group = known
		} else if known, ok := manifestNames[artifact]; ok {
			group, artifact, _ = strings.Cut(known, ":")
		} else if known := groupByPrefix(artifact); known != "" {
			group = known
		}
	}
	if group == "" || strings.ContainsAny(group+artifact, ":/ ") {
		return "", false
	}
	return group + ":" + artifact, true
}

func fromPom(p *extractor.Package) bool {
	n := len(p.Location.Related)
	return n > 0 && p.Location.Related[n-1].File != nil && path.Base(p.Location.Related[n-1].File.Path) == "pom.properties"
}

// parseRelease reads os-release (freedesktop.org, os-release(5)): assignments
// of shell-quoted values.
func parseRelease(name string, content []byte) *contracts.OSRelease {
	r := &contracts.OSRelease{Path: name}
	for _, line := range bytes.Split(content, []byte("\n")) {
		key, value, ok := strings.Cut(strings.TrimSpace(string(line)), "=")
		if !ok || strings.HasPrefix(key, "#") {
			continue
		}
		value = clip(unquote(value))
		switch key {
		case "ID":
			r.ID = strings.ToLower(value)
		case "ID_LIKE":
			r.IDLike = value
		case "VERSION_ID":
			r.VersionID = value
		case "VERSION_CODENAME":
			r.Codename = value
		case "PRETTY_NAME":
			r.PrettyName = value
		}
	}
	return r
}

func unquote(s string) string {
	if len(s) >= 2 && (s[0] == '"' || s[0] == '\'') && s[len(s)-1] == s[0] {
		quote := s[0]
		s = s[1 : len(s)-1]
		if quote == '"' {
			s = strings.NewReplacer(`\"`, `"`, `\\`, `\`, `\$`, `$`, "\\`", "`").Replace(s)
		}
	}
	return s
}

// finish puts the facts of all files together, sorted, so that the same layer
// gives the same bytes.
func (a *analysis) finish() {
	names := make([]string, 0, len(a.files))
	for name := range a.files {
		names = append(names, name)
	}
	slices.Sort(names)

	type identity struct{ typ, name, version string }
	merged := map[identity]*contracts.LayerPackage{}
	add := func(p contracts.LayerPackage) {
		id := identity{p.Type, p.Name, p.Version}
		if m, ok := merged[id]; ok {
			m.Paths = append(m.Paths, p.Paths...)
			return
		}
		p.Paths = slices.Clone(p.Paths)
		merged[id] = &p
	}
	installed := a.projectsInstalled(names)
	for _, name := range names {
		f := a.files[name]
		for _, g := range f.gaps {
			a.gap(g.Path, g.Reason)
		}
		if a.superseded(name, f.kind, installed) {
			continue
		}
		for _, p := range f.packages {
			add(p)
		}
		for _, s := range f.servers {
			if !a.proven(s.Needs) {
				continue
			}
			add(contracts.LayerPackage{
				Type: "bitnami", Name: s.Name, Version: s.Version, PURL: s.PURL(), Ecosystem: "Bitnami",
				Paths: []string{name}, Server: true, Product: s.Product,
			})
		}
		if f.database != nil {
			a.report.Databases = append(a.report.Databases, *f.database)
		}
		if f.release != nil && (a.report.OSRelease == nil || name == "etc/os-release") {
			a.report.OSRelease = f.release
		}
	}
	for _, p := range merged {
		slices.Sort(p.Paths)
		p.Paths = slices.Compact(p.Paths)
		a.report.Packages = append(a.report.Packages, *p)
	}
	slices.SortFunc(a.report.Packages, func(x, y contracts.LayerPackage) int {
		for _, c := range []int{strings.Compare(x.Type, y.Type), strings.Compare(x.Name, y.Name), strings.Compare(x.Version, y.Version)} {
			if c != 0 {
				return c
			}
		}
		return 0
	})
	for name, target := range a.symlinks {
		a.checkSymlink(name, target)
	}
	a.report.Whiteouts = sorted(a.white)
	a.report.Opaque = sorted(a.opaque)
	a.report.Replaced = sorted(a.replaced)

	slices.SortFunc(a.gaps, func(x, y contracts.Gap) int {
		if c := strings.Compare(x.Path, y.Path); c != 0 {
			return c
		}
		return strings.Compare(x.Reason, y.Reason)
	})
	a.report.Gaps = slices.Compact(a.gaps)
	if a.dropped > 0 {
		a.report.Gaps = append(a.report.Gaps, contracts.Gap{Reason: fmt.Sprintf("limit: %d more gaps of this layer are not listed", a.dropped)})
	}
	for i := range a.report.Gaps {
		a.report.Gaps[i].Layer = a.o.Digest
	}
}

// projectsInstalled returns the folders that have a node_modules with packages.
func (a *analysis) projectsInstalled(names []string) map[string]bool {
	out := map[string]bool{}
	for _, name := range names {
		if a.files[name].kind != kindPackageJSON {
			continue
		}
		if i := strings.Index("/"+name, "/node_modules/"); i >= 0 {
			out[strings.TrimSuffix(name[:i], "/")] = true
		}
	}
	return out
}

// superseded says whether something in the layer says better what a lock file
// says: the installed packages themselves, or npm-shrinkwrap.json.
func (a *analysis) superseded(name string, k kind, installed map[string]bool) bool {
	if k != kindNpmLock && k != kindYarnLock && k != kindPnpmLock {
		return false
	}
	dir, base := path.Split(name)
	dir = strings.TrimSuffix(dir, "/")
	if installed[dir] {
		return true
	}
	return base == "package-lock.json" && a.files[path.Join(dir, "npm-shrinkwrap.json")] != nil
}

func (a *analysis) proven(needs []string) bool {
	if len(needs) == 0 {
		return true
	}
	for _, n := range needs {
		if _, ok := a.evidence[n]; ok {
			return true
		}
	}
	return false
}

// checkSymlink reports a package database that is only a link to something
// that was not read as one.
func (a *analysis) checkSymlink(name, target string) {
	if isRelease(name) {
		return // both places of os-release are read where they are files
	}
	to := target
	if !strings.HasPrefix(to, "/") {
		to = path.Join("/", path.Dir(name), to)
	}
	to = strings.TrimPrefix(path.Clean(to), "/")
	if databaseKind(to) == "" {
		a.gap(name, "unresolved: package database is a link to "+clip(target))
	}
}

func sorted(set map[string]struct{}) []string {
	if len(set) == 0 {
		return nil
	}
	out := make([]string, 0, len(set))
	for s := range set {
		out = append(out, s)
	}
	slices.Sort(out)
	return out
}
