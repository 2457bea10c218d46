package match

import (
	"archive/zip"
	"fmt"
	"io"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/osv-scalibr/enricher/vulnmatch/osvlocal"
	"github.com/google/osv-scalibr/extractor"
	archivemetadata "github.com/google/osv-scalibr/extractor/filesystem/language/java/archive/metadata"
	apkmeta "github.com/google/osv-scalibr/extractor/filesystem/os/apk/metadata"
	dpkgmeta "github.com/google/osv-scalibr/extractor/filesystem/os/dpkg/metadata"
	rpmmeta "github.com/google/osv-scalibr/extractor/filesystem/os/rpm/metadata"
	osvpb "github.com/ossf/osv-schema/bindings/go/osvschema"
	"google.golang.org/protobuf/encoding/protojson"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/services/advisor/snapshot"
	"github.com/tidewaiter/tidewaiter/services/matcher/policy"
)

// TestAgreesWithOSV compares which advisories affect a package version with
// what OSV's own matcher says, on random names and versions of real advisories.
func TestAgreesWithOSV(t *testing.T) {
	s := realSnapshot(t)
	m := New(s, policy.Default())
	const names = 25
	for _, tt := range []struct {
		archive, base string
		scalibr       func(name, release, version string) *extractor.Package
	}{
		{"PyPI", "PyPI", ofType("pypi")},
		{"npm", "npm", ofType("npm")},
		{"Go", "Go", ofType("golang")},
		{"crates.io", "crates.io", ofType("cargo")},
		{"RubyGems", "RubyGems", ofType("gem")},
		{"Packagist", "Packagist", ofType("composer")},
		{"Maven", "Maven", func(name, _, version string) *extractor.Package {
			group, artifact, _ := strings.Cut(name, ":")
			return &extractor.Package{Name: name, Version: version, PURLType: "maven", Metadata: &archivemetadata.Metadata{GroupID: group, ArtifactID: artifact}}
		}},
		{"Debian", "Debian", func(name, release, version string) *extractor.Package {
			return &extractor.Package{Name: name, Version: version, PURLType: "deb", Metadata: &dpkgmeta.Metadata{PackageName: name, SourceName: name, OSID: "debian", OSVersionID: release}}
		}},
		{"Alpine", "Alpine", func(name, release, version string) *extractor.Package {
			return &extractor.Package{Name: name, Version: version, PURLType: "apk", Metadata: &apkmeta.Metadata{PackageName: name, OriginName: name, OSID: "alpine", OSVersionID: strings.TrimPrefix(release, "v")}}
		}},
		{"AlmaLinux", "AlmaLinux", func(name, release, version string) *extractor.Package {
			p := &extractor.Package{Name: name, Version: version, PURLType: "rpm"}
			meta := &rpmmeta.Metadata{PackageName: name, OSID: "almalinux", OSVersionID: release}
			if epoch, rest, ok := strings.Cut(version, ":"); ok {
				_, _ = fmt.Sscan(epoch, &meta.Epoch)
				p.Version = rest
			}
			p.Metadata = meta
			return p
		}},
	} {
		t.Run(tt.archive, func(t *testing.T) {
			all := readArchive(t, filepath.Join(sharedAdvisories(t), "osv", tt.archive+".zip"))
			byName, inArchive := map[string][]*osvpb.Vulnerability{}, map[string]bool{}
			for _, v := range all {
				inArchive[v.GetId()] = true
				for _, a := range v.GetAffected() {
					name := snapshot.NormalName(tt.base, a.GetPackage().GetName())
					a.Package.Name = name
					if list := byName[name]; len(list) == 0 || list[len(list)-1] != v {
						byName[name] = append(list, v)
					}
				}
			}
			checked, hits := 0, 0
			for _, p := range sample(s, tt.base, names) {
				base, release := snapshot.Split(p.Ecosystem)
				got := slices.DeleteFunc(recordIDs(m, &p), func(id string) bool { return !inArchive[id] })
				var want []string
				for _, v := range osvlocal.VulnerabilitiesAffectingPackage(byName[p.Name], tt.scalibr(p.Name, release, p.Version)) {
					want = append(want, v.GetId())
				}
				slices.Sort(want)
				if base == "AlmaLinux" {
					// Ours leaves out bug fixes and the other kind of build; all it finds, OSV must find.
					want = slices.DeleteFunc(want, func(id string) bool { return !slices.Contains(got, id) })
				}
				if !slices.Equal(got, want) {
					t.Errorf("%s %s %s: %v, OSV says %v", p.Ecosystem, p.Name, p.Version, got, want)
				}
				checked++
				hits += len(want)
			}
			t.Logf("%d versions, %d hits", checked, hits)
			if hits == 0 {
				t.Error("nothing was found at all: the comparison compares nothing")
			}
		})
	}
}

func ofType(purlType string) func(name, release, version string) *extractor.Package {
	return func(name, _, version string) *extractor.Package {
		return &extractor.Package{Name: name, Version: version, PURLType: purlType}
	}
}

// recordIDs returns the advisories that affect a package, sorted.
func recordIDs(m *Matcher, p *contracts.Package) []string {
	base, release := snapshot.Split(p.Ecosystem)
	entry, ok := m.snap.Lookup(base, p.Name)
	if !ok {
		return nil
	}
	facts := m.facts(entry)
	k := keyOf(p)
	place := m.locate(entry, facts, base, p.Version)
	var ids []string
	for _, h := range m.hits(entry, facts, place, release, p.Version, k) {
		ids = append(ids, h.advice.id)
	}
	slices.Sort(ids)
	return slices.Compact(ids)
}

// readArchive reads the records of an OSV archive that are not withdrawn,
// without ranges of commits: OSV's matcher stops at the first of these.
func readArchive(t *testing.T, path string) []*osvpb.Vulnerability {
	t.Helper()
	z, err := zip.OpenReader(path)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = z.Close() }()
	var all []*osvpb.Vulnerability
	for _, f := range z.File {
		r, err := f.Open()
		if err != nil {
			t.Fatal(err)
		}
		content, err := io.ReadAll(r)
		_ = r.Close()
		if err != nil {
			t.Fatal(err)
		}
		v := &osvpb.Vulnerability{}
		if err := (protojson.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(content, v); err != nil {
			continue
		}
		if v.GetWithdrawn() != nil {
			continue
		}
		for _, a := range v.GetAffected() {
			a.Ranges = slices.DeleteFunc(a.GetRanges(), func(r *osvpb.Range) bool { return r.GetType() == osvpb.Range_GIT })
		}
		all = append(all, v)
	}
	return all
}

// sample draws names of a base ecosystem, and for each of them versions at,
// just before and just after the bounds of its advisories.
func sample(s *snapshot.Snapshot, base string, names int) []contracts.Package {
	r := rand.New(rand.NewPCG(7, uint64(len(base))))
	type known struct {
		name string
		e    snapshot.Entry
	}
	var all []known
	s.Each(func(b, name string, e snapshot.Entry) bool {
		if b == base && e.Bounds() > 0 {
			all = append(all, known{name, e})
		}
		return true
	})
	r.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	var out []contracts.Package
	for _, k := range all[:min(names, len(all))] {
		c := k.e.Candidate(r.IntN(k.e.Candidates()))
		ecosystem := base
		if c.Release() != "" {
			ecosystem += ":" + c.Release()
		}
		versions := []string{"1.0.0", "0"}
		for range 6 {
			v := k.e.Bound(r.IntN(k.e.Bounds()))
			versions = append(versions, v, v+".1", strings.TrimRight(v, "0123456789")+"0")
		}
		if base == "PyPI" || base == "Alpine" || base == "Debian" {
			versions = slices.DeleteFunc(versions, func(v string) bool { _, err := snapshot.ParseVersion(base, v); return err != nil })
		}
		for _, v := range versions {
			out = append(out, contracts.Package{Ecosystem: ecosystem, Name: k.name, Version: v})
		}
	}
	return out
}
