package hook

import (
	"fmt"
	"strings"
)

const (
	kindManifest = "manifest"
	kindIndex    = "index"
)

// manifestKind tells manifests and indexes from anything else by media type
// (image-spec, media-types.md; Docker's registry manifest formats). "" is
// anything else. It never says that something is an image: charts and
// signatures have the same media type.
func manifestKind(mediaType string) string {
	switch mediaType {
	case "application/vnd.oci.image.manifest.v1+json",
		"application/vnd.docker.distribution.manifest.v2+json",
		"application/vnd.docker.distribution.manifest.v1+json",
		"application/vnd.docker.distribution.manifest.v1+prettyjws":
		return kindManifest
	case "application/vnd.oci.image.index.v1+json",
		"application/vnd.docker.distribution.manifest.list.v2+json":
		return kindIndex
	}
	return ""
}

func isImageLayer(mediaType string) bool {
	return strings.HasPrefix(mediaType, "application/vnd.oci.image.layer.") ||
		strings.HasPrefix(mediaType, "application/vnd.docker.image.rootfs.") ||
		strings.HasPrefix(mediaType, "application/vnd.docker.container.image.rootfs.")
}

func isImageConfig(mediaType string) bool {
	return mediaType == "application/vnd.oci.image.config.v1+json" ||
		mediaType == "application/vnd.docker.container.image.v1+json"
}

// otherArtifact looks at the media types of what a manifest refers to (config
// first, then layers) and says why it is no image, "" when it may be one or
// when nothing is known. One image layer makes it an image, as it does for planner.
func otherArtifact(references []string) string {
	config := false
	for _, r := range references {
		if isImageLayer(r) {
			return ""
		}
		config = config || isImageConfig(r)
	}
	for _, r := range references {
		if !isImageConfig(r) {
			return fmt.Sprintf("it refers to %s and to no image layer", clean(r, maxMediaType))
		}
	}
	if config || len(references) == 0 {
		return ""
	}
	return "it refers to no image layer"
}
