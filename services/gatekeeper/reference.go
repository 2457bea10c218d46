package gatekeeper

import (
	"errors"
	"fmt"
	"strings"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/registry"
)

// ErrReference is returned for what is no image reference.
var ErrReference = errors.New("not an image reference")

// defaultRegistry and defaultNamespace are what container runtimes put before a
// short name (distribution, reference/normalize.go describes the rules).
const (
	defaultRegistry  = "docker.io"
	defaultNamespace = "library/"
	defaultTag       = "latest"
	maxReference     = 1024
)

// parseReference reads an image reference as container runtimes do:
// "nginx" is docker.io/library/nginx:latest. The digest counts where both a tag
// and a digest are given; the tag is kept beside it.
func parseReference(s string) (registry.Ref, error) {
	if len(s) > maxReference {
		return registry.Ref{}, fmt.Errorf("%d bytes: %w", len(s), ErrReference)
	}
	rest, digest, hasDigest := strings.Cut(s, "@")
	if hasDigest && !contracts.ValidDigest(digest) {
		return registry.Ref{}, fmt.Errorf("digest %q is not sha256:<64 hex>: %w", digest, ErrReference)
	}
	ref := registry.Ref{Registry: defaultRegistry, Repository: rest, Digest: digest}
	if i := strings.LastIndex(rest, ":"); i > strings.LastIndex(rest, "/") {
		ref.Repository, ref.Tag = rest[:i], rest[i+1:]
		if !contracts.ValidTag(ref.Tag) {
			return registry.Ref{}, fmt.Errorf("tag %q: %w", ref.Tag, ErrReference)
		}
	}
	if first, below, ok := strings.Cut(ref.Repository, "/"); ok && isHost(first) {
		ref.Registry, ref.Repository = first, below
	}
	if ref.Registry == "index.docker.io" {
		ref.Registry = defaultRegistry
	}
	if ref.Registry == defaultRegistry && !strings.Contains(ref.Repository, "/") {
		ref.Repository = defaultNamespace + ref.Repository
	}
	if ref.Digest == "" && ref.Tag == "" {
		ref.Tag = defaultTag
	}
	if !contracts.ValidRegistry(ref.Registry) {
		return registry.Ref{}, fmt.Errorf("registry %q: %w", ref.Registry, ErrReference)
	}
	if !contracts.ValidRepository(ref.Repository) {
		return registry.Ref{}, fmt.Errorf("repository %q: %w", ref.Repository, ErrReference)
	}
	return ref, nil
}

// isHost tells a registry's name from the first part of a repository.
func isHost(s string) bool {
	return s == "localhost" || strings.ContainsAny(s, ".:") || strings.ToLower(s) != s
}
