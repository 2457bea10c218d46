package merge

import "github.com/tidewaiter/tidewaiter/contracts"

// Ecosystem names the advisories for packages of one kind of package database
// ("dpkg", "apk", "rpm") on a distribution: OSV's name with release, or "" when
// none are known.
func Ecosystem(kind string, os *contracts.OSRelease) string {
	return distributionOf(kind, os).ecosystem
}
