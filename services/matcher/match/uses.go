package match

import (
	"cmp"
	"slices"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/services/advisor/snapshot"
)

// Use is what an inventory looks up in a snapshot: a package name in an
// ecosystem (Name set), the advisories of an ecosystem as a whole (Name empty),
// or a product's release lines (Product set). Names are those that an
// AdvisoriesDelta has.
type Use struct {
	Ecosystem, Release, Name string
	Product                  string
}

// Uses returns everything in a snapshot that the report on an inventory's own
// packages can depend on, sorted, each once. The parts of an index have uses of
// their own.
func Uses(inv *contracts.Inventory) []Use {
	seen := map[Use]bool{}
	for i := range inv.Packages {
		p := &inv.Packages[i]
		k := keyOf(p)
		base, release := snapshot.Split(k.ecosystem)
		seen[Use{Ecosystem: base, Release: release}] = true
		seen[Use{Ecosystem: base, Release: release, Name: lookupName(base, k.name)}] = true
		if p.Server {
			addProducts(seen, cmp.Or(p.Product, p.Name))
		}
	}
	if inv.OS != nil && inv.OS.VersionID != "" {
		addProducts(seen, osProduct(inv.OS.ID))
	}
	uses := make([]Use, 0, len(seen))
	for u := range seen {
		uses = append(uses, u)
	}
	slices.SortFunc(uses, func(a, b Use) int {
		return cmp.Or(cmp.Compare(a.Ecosystem, b.Ecosystem), cmp.Compare(a.Release, b.Release),
			cmp.Compare(a.Name, b.Name), cmp.Compare(a.Product, b.Product))
	})
	return uses
}

// addProducts adds every name that is looked for: the first may appear later.
func addProducts(seen map[Use]bool, product string) {
	for _, name := range productNames(product) {
		seen[Use{Product: name}] = true
	}
}
