package snapshot

import "github.com/google/osv-scalibr/semantic"

// parse reads an npm entry's bounds anew each time.
func parse(e Entry) func(i int) (semantic.Version, error) {
	return func(i int) (semantic.Version, error) { return ParseVersion("npm", e.Bound(i)) }
}
