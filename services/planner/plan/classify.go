package plan

import (
	"mime"
	"strings"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Prefixes of the media types of an image's layers (image-spec, layer.md;
// Docker's "Image Manifest Version 2, Schema 2").
const (
	ociLayerPrefix    = "application/vnd.oci.image.layer."
	dockerLayerPrefix = "application/vnd.docker.image.rootfs."
)

// readableLayers are the media types of layers that analysis can read.
var readableLayers = map[string]bool{
	"application/vnd.oci.image.layer.v1.tar":                       true,
	"application/vnd.oci.image.layer.v1.tar+gzip":                  true,
	"application/vnd.oci.image.layer.v1.tar+zstd":                  true,
	"application/vnd.oci.image.layer.nondistributable.v1.tar":      true,
	"application/vnd.oci.image.layer.nondistributable.v1.tar+gzip": true,
	"application/vnd.oci.image.layer.nondistributable.v1.tar+zstd": true,
	"application/vnd.docker.image.rootfs.diff.tar":                 true,
	"application/vnd.docker.image.rootfs.diff.tar.gzip":            true,
	"application/vnd.docker.image.rootfs.diff.tar.zstd":            true,
	"application/vnd.docker.image.rootfs.foreign.diff.tar":         true,
	"application/vnd.docker.image.rootfs.foreign.diff.tar.gzip":    true,
	"application/vnd.docker.image.rootfs.diff.tar+gzip":            true,
	"application/vnd.docker.image.rootfs.diff.tar+zstd":            true,
	"application/vnd.docker.image.rootfs.foreign.diff.tar.zstd":    true,
	"application/vnd.oci.image.layer.nondistributable.v1.tar.gzip": true,
	"application/vnd.docker.image.rootfs.foreign.diff.tar+gzip":    true,
}

// base returns a media type without parameters, in lower case.
func base(mediaType string) string {
	if t, _, err := mime.ParseMediaType(mediaType); err == nil {
		return t
	}
	t, _, _ := strings.Cut(mediaType, ";")
	return strings.ToLower(strings.TrimSpace(t))
}

// imageLayer says whether a media type is that of an image's layer, readable
// or not (encrypted ones have a suffix of their own, for example).
func imageLayer(mediaType string) bool {
	t := base(mediaType)
	return strings.HasPrefix(t, ociLayerPrefix) || strings.HasPrefix(t, dockerLayerPrefix)
}

func readableLayer(mediaType string) bool { return readableLayers[base(mediaType)] }

// foreign says whether a layer may be kept outside of the registry.
func foreign(l ocispec.Descriptor) bool {
	t := base(l.MediaType)
	return len(l.URLs) > 0 || strings.Contains(t, ".nondistributable.") || strings.Contains(t, ".foreign.")
}

func isIndex(mediaType string) bool {
	switch base(mediaType) {
	case ocispec.MediaTypeImageIndex, "application/vnd.docker.distribution.manifest.list.v2+json":
		return true
	}
	return false
}

func isManifest(mediaType string) bool {
	switch base(mediaType) {
	case ocispec.MediaTypeImageManifest, "application/vnd.docker.distribution.manifest.v2+json",
		"application/vnd.docker.distribution.manifest.v1+json", "application/vnd.docker.distribution.manifest.v1+prettyjws",
		"application/vnd.oci.artifact.manifest.v1+json":
		return true
	}
	return isIndex(mediaType)
}

// kinds of content that is no image, by the media type of config or layers.
// The first that fits is the reason; all layers must fit where layers is set.
var kinds = []struct {
	code   string
	why    string
	config []string // prefixes
	layers []string // prefixes
}{
	{code: "signature", why: "A signature made by cosign.", layers: []string{"application/vnd.dev.cosign.simplesigning."}},
	{code: "sigstore-bundle", why: "A sigstore bundle: a signed statement about another image.", layers: []string{"application/vnd.dev.sigstore.bundle"}},
	{code: "attestation", why: "Attestations about another image.", layers: []string{"application/vnd.in-toto", "application/vnd.dsse.envelope"}},
	{code: "helm-chart", why: "A Helm chart.", config: []string{"application/vnd.cncf.helm.config."}},
	{
		code: "wasm", why: "A WebAssembly module.",
		config: []string{"application/vnd.wasm.", "application/vnd.module.wasm."},
		layers: []string{"application/wasm", "application/vnd.wasm.", "application/vnd.module.wasm."},
	},
	{
		code: "sbom", why: "A software bill of materials about another image.",
		layers: []string{"text/spdx", "application/spdx", "application/vnd.cyclonedx", "application/vnd.syft", "application/vnd.cyclonedx+json"},
	},
	{code: "buildkit-cache", why: "A build cache of BuildKit.", config: []string{"application/vnd.buildkit.cacheconfig."}},
}

// classify says why an image manifest is not scanned; nil: it is an image.
func classify(doc *document) *no {
	for _, l := range doc.Layers {
		if imageLayer(l.MediaType) {
			return nil
		}
	}
	for _, k := range kinds {
		if doc.Config != nil && hasPrefix(doc.Config.MediaType, k.config) || allHavePrefix(doc.Layers, k.layers) {
			return &no{code: k.code, why: k.why}
		}
	}
	kind := doc.ArtifactType
	if kind == "" && doc.Config != nil {
		kind = doc.Config.MediaType
	}
	switch {
	case doc.Subject != nil:
		return &no{code: "referrer", why: "Content of type " + short(kind) + " about another image."}
	case len(doc.Layers) == 0:
		return &no{code: "no-layers", why: "It has no layers: there is nothing to scan."}
	}
	return &no{code: "no-image-layers", why: "An artifact of type " + short(kind) + ", of which no layer is one of an image."}
}

func hasPrefix(mediaType string, prefixes []string) bool {
	t := base(mediaType)
	for _, p := range prefixes {
		if strings.HasPrefix(t, p) {
			return true
		}
	}
	return false
}

func allHavePrefix(layers []ocispec.Descriptor, prefixes []string) bool {
	for _, l := range layers {
		if !hasPrefix(l.MediaType, prefixes) {
			return false
		}
	}
	return len(layers) > 0
}

// classifyIndex says why an index is not scanned, as far as it can be seen
// without its children.
func classifyIndex(doc *document) *no {
	if len(doc.Manifests) == 0 {
		return &no{code: "empty-index", why: "An index that lists nothing."}
	}
	for _, d := range doc.Manifests {
		if strings.HasPrefix(base(d.MediaType), "application/vnd.buildkit.cacheconfig.") {
			return &no{code: "buildkit-cache", why: "A build cache of BuildKit."}
		}
	}
	return nil
}

// namesArtifact says whether a list calls what it points to an artifact, as the
// fallback tag of a registry without the referrers API does (distribution-spec,
// "Referrers Tag Schema"). An older state of such a list names statements that
// have been replaced since. Nobody can run what is gone, so the word is enough
// for that; what is there is judged by its manifest.
func namesArtifact(d ocispec.Descriptor) bool {
	switch base(d.ArtifactType) {
	case "", ocispec.MediaTypeImageConfig, "application/vnd.docker.container.image.v1+json":
		return false
	}
	return true
}

// nothingIn says why an index of which no child is scanned is not, from the
// codes of the children's reasons.
func nothingIn(reasons map[string]bool) *no {
	about := map[string]bool{"signature": true, "sigstore-bundle": true, "attestation": true, "sbom": true, "referrer": true}
	for code := range reasons {
		if !about[code] {
			return &no{code: "no-images", why: "An index of which no child is an image."}
		}
	}
	return &no{code: "referrers-list", why: "A list of statements about another image."}
}
