package merge

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/tidewaiter/tidewaiter/contracts"
)

// change is one layer as its tar archive says it: what it deletes of the
// layers below, and the files it holds.
type change struct {
	whiteouts, opaque []string
	files             map[string]string // path → content: "pkg NAME", "db A,B,…" or "plain"
}

// report says what analysis would find in the layer.
func (c change) report(t *rapid.T) contracts.LayerReport {
	r := contracts.LayerReport{
		Whiteouts: rapid.Permutation(c.whiteouts).Draw(t, "whiteouts"),
		Opaque:    rapid.Permutation(c.opaque).Draw(t, "opaque"),
	}
	paths := slices.Sorted(maps.Keys(c.files))
	for _, p := range rapid.Permutation(paths).Draw(t, "tar order") {
		what, names, _ := strings.Cut(c.files[p], " ")
		r.Replaced = append(r.Replaced, p)
		switch what {
		case "pkg":
			r.Packages = append(r.Packages, npm(names, "1", p))
		case "db":
			d := contracts.PackageDatabase{Kind: "apk", Path: p}
			for _, n := range strings.FieldsFunc(names, func(r rune) bool { return r == ',' }) {
				d.Packages = append(d.Packages, contracts.SystemPackage{Name: n, Version: "1"})
			}
			r.Databases = append(r.Databases, d)
		}
	}
	return r
}

// copyOf is a file in the tree that the model builds.
type copyOf struct {
	layer   int
	content string
}

// unpack builds the file tree as a container runtime does, and remembers for
// each path the copies that followed each other without a deletion between.
func unpack(layers []change) (tree map[string]copyOf, copies map[string][]copyOf) {
	tree, copies = map[string]copyOf{}, map[string][]copyOf{}
	under := func(p, folder string) bool { return folder == "." || strings.HasPrefix(p, folder+"/") }
	for i, l := range layers {
		remove := func(gone func(p string) bool) {
			for p := range tree {
				if !gone(p) {
					continue
				}
				delete(tree, p)
				if l.files[p] == "" || !strings.HasPrefix(l.files[p], "db") {
					delete(copies, p)
				}
			}
		}
		for _, w := range l.whiteouts {
			remove(func(p string) bool { return p == w || under(p, w) })
		}
		for _, o := range l.opaque {
			remove(func(p string) bool { return under(p, o) })
		}
		for f := range l.files {
			remove(func(p string) bool { return p == f || under(p, f) || under(f, p) })
		}
		for f, content := range l.files {
			tree[f] = copyOf{i, content}
			if strings.HasPrefix(content, "db") {
				copies[f] = append(copies[f], tree[f])
			}
		}
	}
	return tree, copies
}

// expected lists "purl layer paths" from the model's tree.
func expected(layers []change) []string {
	tree, copies := unpack(layers)
	first := map[string]int{}
	paths := map[string][]string{}
	add := func(purl string, layer int, p string) {
		if l, ok := first[purl]; !ok || layer < l {
			first[purl] = layer
		}
		paths[purl] = append(paths[purl], p)
	}
	for p, f := range tree {
		what, names, _ := strings.Cut(f.content, " ")
		switch what {
		case "pkg":
			add("pkg:npm/"+names+"@1", f.layer, p)
		case "db":
			for _, n := range strings.FieldsFunc(names, func(r rune) bool { return r == ',' }) {
				layer := f.layer
				run := copies[p]
				for i := len(run) - 1; i >= 0 && strings.Contains(run[i].content[2:], n); i-- {
					layer = run[i].layer
				}
				add("pkg:apk/"+n+"@1", layer, p)
			}
		}
	}
	var out []string
	for _, purl := range slices.Sorted(maps.Keys(first)) {
		slices.Sort(paths[purl])
		out = append(out, fmt.Sprintf("%s %d %s", purl, first[purl], strings.Join(paths[purl], ",")))
	}
	return out
}

func genChange(t *rapid.T) change {
	names := []string{"a", "b", "c"}
	genPath := rapid.Custom(func(t *rapid.T) string {
		return strings.Join(rapid.SliceOfN(rapid.SampledFrom(names), 1, 3).Draw(t, "segments"), "/")
	})
	c := change{
		whiteouts: rapid.SliceOfNDistinct(genPath, 0, 2, rapid.ID).Draw(t, "whiteouts"),
		opaque:    rapid.SliceOfNDistinct(rapid.OneOf(genPath, rapid.Just(".")), 0, 1, rapid.ID).Draw(t, "opaque"),
		files:     map[string]string{},
	}
	for _, p := range rapid.SliceOfNDistinct(genPath, 0, 5, rapid.ID).Draw(t, "files") {
		clash := func(other string) bool { return strings.HasPrefix(other, p+"/") || strings.HasPrefix(p, other+"/") }
		if slices.ContainsFunc(slices.Collect(maps.Keys(c.files)), clash) {
			continue // one tar archive holds no file below another file
		}
		c.files[p] = rapid.OneOf(
			rapid.SampledFrom([]string{"plain", "pkg x", "pkg y"}),
			rapid.Map(rapid.SliceOfNDistinct(rapid.SampledFrom([]string{"k", "l", "m"}), 0, 3, rapid.ID), func(n []string) string {
				return "db " + strings.Join(n, ",")
			}),
		).Draw(t, "content")
	}
	return c
}

func TestImageEqualsUnpackedTree(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		layers := rapid.SliceOfN(rapid.Custom(genChange), 1, 6).Draw(t, "layers")
		reports := make([]contracts.LayerReport, len(layers))
		for i, l := range layers {
			reports[i] = l.report(t)
		}
		got, want := listed(Image(image(reports...))), expected(layers)
		if !slices.Equal(got, want) {
			t.Fatalf("got %q\nwant %q", got, want)
		}
	})
}
