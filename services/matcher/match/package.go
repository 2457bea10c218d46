package match

import (
	"fmt"
	"slices"
	"strings"

	"github.com/google/osv-scalibr/semantic"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/services/advisor/snapshot"
)

// Result is what is known about one package version, whatever image holds it.
type Result struct {
	findings  []contracts.Finding // without package, layer and paths
	gap       string              // why it could not be decided
	known     bool                // an advisory names the package
	uncovered bool                // the snapshot says nothing about its ecosystem
}

// Findings returns what affects the version; Package, Layer, Paths and Platform are empty.
func (r *Result) Findings() []contracts.Finding { return r.findings }

// key is all of a package that decides what is known about it.
type key struct {
	ecosystem, name, version, module string
}

func keyOf(p *contracts.Package) key {
	k := key{ecosystem: p.Ecosystem, name: p.Name, version: p.Version, module: p.Module}
	if p.Source == "" || namedByBinary(p.Ecosystem) {
		return k
	}
	k.name = p.Source
	if p.SourceVersion != "" {
		k.version = p.SourceVersion
	}
	return k
}

// namedByBinary says whether a distribution's advisories name binary packages.
func namedByBinary(ecosystem string) bool {
	base, _, _ := strings.Cut(ecosystem, ":")
	switch base {
	case "AlmaLinux", "Rocky Linux", "Red Hat", "openSUSE", "SUSE", "openEuler", "Mageia":
		return true
	default:
		return false
	}
}

// Package returns what is known about a package version, from the cache where
// it was asked before.
func (m *Matcher) Package(p *contracts.Package) *Result {
	k := keyOf(p)
	if r, ok := m.cache.get(k); ok {
		return r
	}
	r := m.evaluate(k)
	m.cache.put(k, r)
	return r
}

// hit is one advisory that affects the version.
type hit struct {
	advice *advice
	snapshot.Hit
	fixed []int // bounds
}

func (m *Matcher) evaluate(k key) *Result {
	base, release := snapshot.Split(k.ecosystem)
	if !m.covered(base, release) {
		return &Result{uncovered: true}
	}
	entry, ok := m.snap.Lookup(base, lookupName(base, k.name))
	if !ok {
		return &Result{}
	}
	r := &Result{known: true}
	facts := m.facts(entry)
	version := snapshot.NormalVersion(base, k.version)
	place := m.locate(entry, facts, base, version)
	hits := m.hits(entry, facts, place, release, version, k)
	if place == nil && m.anyAbout(entry, release) {
		r.gap = fmt.Sprintf("version: %s %s %q cannot be compared with its advisories", k.ecosystem, k.name, k.version)
	}
	r.findings = merge(entry, hits, k)
	return r
}

// lookupName returns a package's name as the snapshot has it.
func lookupName(base, name string) string {
	name = snapshot.NormalName(base, name)
	switch base {
	case "Bitnami":
		return componentName(name)
	case "Maven":
		return strings.Replace(name, "/", ":", 1)
	default:
		return name
	}
}

// locate returns the place of a version among an entry's bounds, nil where it
// cannot be compared with them.
func (m *Matcher) locate(entry snapshot.Entry, facts *entryFacts, base, version string) *snapshot.Place {
	parsed, err := readVersion(base, version)
	if err != nil {
		return nil
	}
	place, err := entry.Locate(parsed, func(i int) (semantic.Version, error) { return facts.bound(base, entry, i) })
	if err != nil {
		return nil
	}
	return &place
}

// readVersion reads an installed version. A text without a digit is no version
// in any ecosystem, though some parsers take it for one below all others.
func readVersion(base, version string) (semantic.Version, error) {
	if !strings.ContainsAny(version, "0123456789") {
		return nil, fmt.Errorf("%q: %w", version, snapshot.ErrVersion)
	}
	return snapshot.ParseVersion(base, version)
}

func (m *Matcher) anyAbout(entry snapshot.Entry, release string) bool {
	id, ok := m.snap.StringID(release)
	for i := range entry.Candidates() {
		if entry.Candidate(i).About(id, ok) {
			return true
		}
	}
	return false
}

// hits returns the advisories that affect the version, one a record, sorted by id.
func (m *Matcher) hits(entry snapshot.Entry, facts *entryFacts, place *snapshot.Place, release, version string, k key) []hit {
	releaseID, releaseKnown := m.snap.StringID(release)
	versionID, versionKnown := m.snap.StringID(version)
	errata := namedByBinary(k.ecosystem)
	var hits []hit
	for i := range entry.Candidates() {
		c := entry.Candidate(i)
		if !c.About(releaseID, releaseKnown) {
			continue
		}
		a := facts.advice[i]
		if a.informational {
			continue
		}
		h, ok := c.Evaluate(place, versionID, versionKnown)
		if !ok || errata && !sameModule(k, a.modules, until(entry, h)) {
			continue
		}
		// A record's statements follow each other: they were sorted by its id.
		if n := len(hits); n == 0 || hits[n-1].advice.id != a.id {
			hits = append(hits, hit{advice: a, Hit: h})
		}
		if h.Fixed != snapshot.FromStart {
			last := &hits[len(hits)-1]
			last.fixed = append(last.fixed, h.Fixed)
		}
	}
	return hits
}

func until(entry snapshot.Entry, h snapshot.Hit) string {
	if h.Until == snapshot.FromStart {
		return ""
	}
	return entry.Bound(h.Until)
}

// sameModule says whether a modular advisory is about the module stream that a
// package was built in. The Red Hat family builds one package in several
// streams whose versions are not comparable: nodejs:16 is not mended by nodejs:18.
func sameModule(k key, modules, fixed string) bool {
	const mark = ".module"
	if fixed != "" && strings.Contains(fixed, mark) != strings.Contains(k.version, mark) {
		return false
	}
	if k.module == "" || modules == "" || !strings.Contains(fixed, mark) {
		return true
	}
	name, rest, _ := strings.Cut(k.module, ":")
	stream, _, _ := strings.Cut(rest, ":")
	return slices.Contains(strings.Fields(modules), name+":"+stream)
}

// componentName translates what server software is called elsewhere to the
// name of its Bitnami component.
func componentName(name string) string {
	switch name {
	case "nodejs", "node.js":
		return "node"
	case "openjdk", "jdk":
		return "java"
	case "httpd", "apache2", "apache-http-server":
		return "apache"
	case "apache-couchdb":
		return "couchdb"
	case "postgres":
		return "postgresql"
	case "mongod", "mongo":
		return "mongodb"
	case "apache-tomcat":
		return "tomcat"
	case "redis-server":
		return "redis"
	case "mysqld", "mysql-server":
		return "mysql"
	case "mariadbd", "mariadb-server":
		return "mariadb"
	default:
		return name
	}
}
