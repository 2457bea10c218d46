package snapshot

import (
	"fmt"
	"sort"

	"github.com/google/osv-scalibr/semantic"
)

// Locate finds the place of a version among the entry's bounds. parsed returns
// the i-th bound ready for comparison.
func (e Entry) Locate(v semantic.Version, parsed func(i int) (semantic.Version, error)) (Place, error) {
	var failed error
	order := func(i int) int { // of the i-th bound against v
		b, err := parsed(i)
		if err == nil {
			var o int
			if o, err = b.Compare(v); err == nil {
				return o
			}
		}
		if failed == nil {
			failed = fmt.Errorf("compare with %q: %w", e.Bound(i), err)
		}
		return 0
	}
	lower := sort.Search(e.bounds, func(i int) bool { return order(i) >= 0 })
	upper := lower
	for upper < e.bounds && order(upper) == 0 && failed == nil {
		upper++
	}
	return Place{Lower: lower, Upper: upper}, failed
}
