package snapshot

import (
	"errors"
	"fmt"
	"strings"

	"github.com/google/osv-scalibr/semantic"
)

// ErrNoOrder is returned for an ecosystem whose version order is not known:
// only versions that an advisory lists one by one can be matched in it.
var ErrNoOrder = errors.New("the version order of this ecosystem is not supported")

// ErrVersion is returned for a version that cannot be read.
var ErrVersion = errors.New("not a version")

// Split cuts an OSV ecosystem ("Debian:12") into its base and its release,
// which is "" where there is none (OSV schema, "affected[].package").
func Split(ecosystem string) (base, release string) {
	base, release, _ = strings.Cut(ecosystem, ":")
	return base, normalRelease(base, release)
}

// normalRelease writes a release as the ecosystem's advisories do, whether it
// came from an advisory or from os-release: "12.5" is Debian's 12.
func normalRelease(base, release string) string {
	switch base {
	case "AlmaLinux", "Rocky Linux":
		major, _, _ := strings.Cut(release, ".")
		return major
	case "Alpine":
		parts := strings.SplitN(strings.TrimPrefix(release, "v"), ".", 3)
		if len(parts) < 2 {
			return release
		}
		return "v" + parts[0] + "." + parts[1]
	case "Debian":
		major, minor, ok := strings.Cut(release, ".")
		if ok && len(major) == 2 { // since 10, point releases share their advisories
			return major
		}
		if ok {
			minor, _, _ = strings.Cut(minor, ".")
			return major + "." + minor
		}
		return release
	case "Ubuntu":
		return strings.TrimSuffix(release, ":LTS")
	default:
		return release
	}
}

// NormalName returns a package's name as its ecosystem compares names:
// PyPI as PEP 503 says; Packagist, NuGet, Bitnami and Go in lower case (a purl
// of a Go module is, the module's path may not be); Go's toolchain as stdlib.
func NormalName(base, name string) string {
	switch base {
	case "PyPI":
		return normalPython(name)
	case "Packagist", "NuGet", "Bitnami":
		return strings.ToLower(name)
	case "Go":
		if name == "go" {
			return "stdlib"
		}
		return strings.ToLower(name)
	}
	return name
}

func normalPython(name string) string {
	clean := true
	for i := range len(name) {
		c := name[i]
		if c == '_' || c == '.' || c >= 'A' && c <= 'Z' || c == '-' && i > 0 && name[i-1] == '-' {
			clean = false
			break
		}
	}
	if clean {
		return name
	}
	b := make([]byte, 0, len(name))
	run := false
	for i := range len(name) {
		c := name[i]
		if c == '-' || c == '_' || c == '.' {
			if !run {
				b = append(b, '-')
			}
			run = true
			continue
		}
		run = false
		if c >= 'A' && c <= 'Z' {
			c += 'a' - 'A'
		}
		b = append(b, c)
	}
	return string(b)
}

// NormalVersion returns a package's version as its ecosystem's advisories
// write it: Go's without "v", "go" and what follows a space.
func NormalVersion(base, version string) string {
	if base != "Go" {
		return version
	}
	version, _, _ = strings.Cut(version, " ")
	version = strings.TrimPrefix(version, "go")
	return strings.TrimPrefix(version, "v")
}

// ParseVersion reads a version for comparison within one base ecosystem.
// Errors: ErrNoOrder, ErrVersion.
func ParseVersion(base, version string) (v semantic.Version, err error) {
	defer func() {
		// A parser that trips over foreign text must not take the service with it.
		if r := recover(); r != nil {
			v, err = nil, fmt.Errorf("%s version %q: %w", base, version, ErrVersion)
		}
	}()
	v, err = semantic.Parse(version, base)
	switch {
	case errors.Is(err, semantic.ErrUnsupportedEcosystem):
		return nil, fmt.Errorf("%s: %w", base, ErrNoOrder)
	case err != nil:
		return nil, fmt.Errorf("%s version %q: %w", base, version, ErrVersion)
	}
	return v, nil
}
