package contracts

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"regexp"
	"strings"
)

// ErrInvalidImage is returned for an image identity that is not
// registry/repository@digest.
var ErrInvalidImage = errors.New("not an image identity (registry/repository@sha256:<64 hex>)")

var (
	digestPattern     = regexp.MustCompile(`^sha256:[0-9a-f]{64}$`)
	repositoryPattern = regexp.MustCompile(`^[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*$`)
	tagPattern        = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9._-]{0,127}$`)
	registryPattern   = regexp.MustCompile(`^(?:[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?|\[[0-9a-fA-F:]+\])(?::[0-9]{1,5})?$`)
)

// ValidDigest says whether d is a sha256 digest as OCI writes it
// (image-spec, descriptor.md, "Digests"); others are not supported.
func ValidDigest(d string) bool { return digestPattern.MatchString(d) }

// ValidRepository says whether r is a repository name
// (distribution-spec, "Pulling manifests").
func ValidRepository(r string) bool { return len(r) <= 255 && repositoryPattern.MatchString(r) }

// ValidTag says whether t is a tag (distribution-spec, "Pulling manifests").
func ValidTag(t string) bool { return tagPattern.MatchString(t) }

// ValidRegistry says whether r is a registry's host name, with or without a port.
func ValidRegistry(r string) bool { return len(r) <= 261 && registryPattern.MatchString(r) }

// DigestOf returns the sha256 digest of b as OCI writes it.
func DigestOf(b []byte) string {
	sum := sha256.Sum256(b)
	return "sha256:" + hex.EncodeToString(sum[:])
}

// Image is the identity of an image: one manifest or index in one repository.
type Image struct {
	Registry   string `json:"registry"`   // host[:port], as configured
	Repository string `json:"repository"` // path below the registry
	Digest     string `json:"digest"`     // of the manifest or index
}

// String returns registry/repository@digest, the subject of image events.
func (i Image) String() string { return i.Registry + "/" + i.Repository + "@" + i.Digest }

// Repo returns registry/repository.
func (i Image) Repo() string { return i.Registry + "/" + i.Repository }

// Validate returns ErrInvalidImage, wrapped with what is wrong.
func (i Image) Validate() error {
	switch {
	case !ValidRegistry(i.Registry):
		return fmt.Errorf("registry %q: %w", i.Registry, ErrInvalidImage)
	case !ValidRepository(i.Repository):
		return fmt.Errorf("repository %q: %w", i.Repository, ErrInvalidImage)
	case !ValidDigest(i.Digest):
		return fmt.Errorf("digest %q: %w", i.Digest, ErrInvalidImage)
	}
	return nil
}

// ParseImage reads what Image.String writes.
func ParseImage(s string) (Image, error) {
	name, digest, ok := strings.Cut(s, "@")
	registry, repository, ok2 := strings.Cut(name, "/")
	if !ok || !ok2 {
		return Image{}, fmt.Errorf("%q: %w", s, ErrInvalidImage)
	}
	i := Image{Registry: registry, Repository: repository, Digest: digest}
	if err := i.Validate(); err != nil {
		return Image{}, fmt.Errorf("%q: %w", s, err)
	}
	return i, nil
}

// OutputID derives the id of an event that a service emits because of an input
// event, so that a replay emits the same event again.
func OutputID(service, inSource, inID, outType, outSubject string) string {
	return deriveID(service, inSource, inID, outType, outSubject)
}

// JoinID derives the id of an event that several inputs led to, from what it
// says: the digest of its content.
func JoinID(outType, outSubject, contentDigest string) string {
	return deriveID("join", outType, outSubject, contentDigest)
}

func deriveID(parts ...string) string {
	h := sha256.New()
	for _, p := range parts {
		fmt.Fprintf(h, "%d:%s", len(p), p) // lengths keep ("a","bc") and ("ab","c") apart
	}
	return hex.EncodeToString(h.Sum(nil)[:16])
}
