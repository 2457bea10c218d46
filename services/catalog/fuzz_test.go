package catalog

import (
	"testing"

	"github.com/tidewaiter/tidewaiter/contracts"
)

// FuzzParseRef checks that whatever a user asks for is refused or names
// something that can exist.
func FuzzParseRef(f *testing.F) {
	for _, s := range []string{"", "r.example/a:latest", "r.example:5000/a/b@" + dig("x"), dig("x"), "r/a@", "/", "r.example/a:b:c", "[::1]:5000/a"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		r, err := parseRef(s)
		if err != nil {
			return
		}
		if r.repository == "" && s != "" && !contracts.ValidDigest(r.digest) {
			t.Errorf("%q names nothing: %+v", s, r)
		}
		if r.repository != "" && (!contracts.ValidRegistry(r.registry) || !contracts.ValidRepository(r.repository)) {
			t.Errorf("%q: %+v", s, r)
		}
		if r.tag != "" && !contracts.ValidTag(r.tag) || (r.digest != "" && !contracts.ValidDigest(r.digest)) {
			t.Errorf("%q: %+v", s, r)
		}
	})
}
