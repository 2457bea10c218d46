package hook

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"strings"

	"github.com/tidewaiter/tidewaiter/contracts"
)

// gitHubCall is the body of GitHub's events "package" and "registry_package"
// (docs.github.com, "Webhook events and payloads").
type gitHubCall struct {
	Action          string         `json:"action"`
	Package         *gitHubPackage `json:"package"`
	RegistryPackage *gitHubPackage `json:"registry_package"`
	Repository      struct {
		FullName string `json:"full_name"`
	} `json:"repository"`
	Sender struct {
		Login string `json:"login"`
	} `json:"sender"`
}

type gitHubPackage struct {
	Name        string          `json:"name"`
	Namespace   string          `json:"namespace"`
	Ecosystem   string          `json:"ecosystem"`
	PackageType string          `json:"package_type"`
	Version     json.RawMessage `json:"package_version"` // its shape depends on the ecosystem
}

type gitHubVersion struct {
	Version    string `json:"version"`
	Manifest   string `json:"manifest"`    // of the old Docker registry alone
	PackageURL string `json:"package_url"` // host/repository:tag; without a tag it ends with the colon
	UpdatedAt  string `json:"updated_at"`
	Container  *struct {
		Tag struct {
			Name   string `json:"name"`
			Digest string `json:"digest"`
		} `json:"tag"`
		Manifest struct {
			Digest    string `json:"digest"`
			MediaType string `json:"media_type"`
			Config    struct {
				MediaType string `json:"media_type"`
			} `json:"config"`
			Layers []struct {
				MediaType string `json:"media_type"`
			} `json:"layers"`
		} `json:"manifest"`
	} `json:"container_metadata"`
}

// oldGitHubRegistry is where GitHub kept images before ghcr.io.
const oldGitHubRegistry = "docker.pkg.github.com"

// gitHubPing answers the call that GitHub makes when a webhook is created.
func gitHubPing(req Request) (Answer, bool) {
	if event := req.Header.Get("X-Github-Event"); event != "ping" {
		return Answer{}, false
	}
	return Answer{Status: http.StatusOK}, true
}

func decodeGitHub(req Request) ([]Event, error) {
	payload := req.payload()
	var in gitHubCall
	if err := decodeJSON(payload, &in); err != nil {
		return nil, err
	}
	e := Event{Actor: in.Sender.Login, DeliveryID: req.Header.Get("X-Github-Delivery")}
	p := in.Package
	if p == nil {
		p = in.RegistryPackage
	}
	switch event := req.Header.Get("X-Github-Event"); {
	case event != "" && event != "package" && event != "registry_package":
		return []Event{e.ignored(fmt.Sprintf("event %q is about no package", clean(event, 64))).finish(req, payload)}, nil
	case p == nil:
		return nil, fmt.Errorf("no field \"package\" or \"registry_package\": %w", ErrUnreadable)
	case !p.container():
		return []Event{e.ignored(fmt.Sprintf("a package of type %s", clean(p.PackageType, 32))).finish(req, payload)}, nil
	}
	var v gitHubVersion
	if err := decodeJSON(p.Version, &v); err != nil {
		return nil, fmt.Errorf("package_version: %w", err)
	}
	e = v.describe(e, p, in.Repository.FullName)
	return []Event{v.classify(e, in.Action).finish(req, payload)}, nil
}

// container says whether a package holds container images. Neither field alone
// is reliable.
func (p *gitHubPackage) container() bool {
	for _, s := range []string{p.PackageType, p.Ecosystem} {
		if strings.EqualFold(s, "container") || strings.EqualFold(s, "docker") {
			return true
		}
	}
	return false
}

// describe fills in what the version says of the image.
func (v *gitHubVersion) describe(e Event, p *gitHubPackage, repository string) Event {
	e.Time, e.Digest = parseTime(v.UpdatedAt), v.Version
	if v.Container != nil {
		m, tag := v.Container.Manifest, v.Container.Tag
		e.MediaType, e.Tag = m.MediaType, tag.Name
		if !contracts.ValidDigest(e.Digest) {
			e.Digest = m.Digest
		}
		if contracts.ValidDigest(tag.Digest) && tag.Digest != e.Digest {
			e.Tag = "" // it belongs to another version
		}
	}
	e.Registry, e.Repository = packageURL(v.PackageURL)
	if e.Repository != "" {
		return e
	}
	if v.Container == nil && v.Manifest != "" && !contracts.ValidDigest(v.Version) {
		// the old registry: the version is the tag, the image stands below the repository
		e.Registry, e.Repository = oldGitHubRegistry, strings.ToLower(repository+"/"+p.Name)
		e.Tag, e.Digest = v.Version, contracts.DigestOf([]byte(v.Manifest))
		return e
	}
	e.Registry, e.Repository = "ghcr.io", strings.ToLower(p.Namespace+"/"+p.Name)
	return e
}

func (v *gitHubVersion) classify(e Event, action string) Event {
	switch action {
	case "published", "updated":
		e.Action, e.Reason = Push, "a package version was "+action
	case "deleted":
		e.Action, e.Reason = Delete, "a package version was deleted"
		return e
	default:
		return e.ignored(fmt.Sprintf("action %q is neither published, updated nor deleted", clean(action, 32)))
	}
	if v.Container == nil {
		return e
	}
	m := v.Container.Manifest
	switch manifestKind(m.MediaType) {
	case kindIndex:
		return e
	case "":
		if m.MediaType != "" {
			return e.notAnImage("the media type is not one of an image manifest or index")
		}
	}
	var types []string
	if m.Config.MediaType != "" {
		types = append(types, m.Config.MediaType)
	}
	for _, l := range m.Layers {
		types = append(types, l.MediaType)
	}
	if why := otherArtifact(types); why != "" {
		return e.notAnImage(why)
	}
	return e
}

// packageURL reads host/repository with or without ":tag", where the tag may be
// empty and the repository percent-encoded and of mixed case.
func packageURL(s string) (registry, repository string) {
	host, path, ok := strings.Cut(s, "/")
	if !ok || !strings.ContainsAny(host, ".:") {
		return "", ""
	}
	path, _, _ = strings.Cut(path, "@")
	if i := strings.LastIndexByte(path, ':'); i > strings.LastIndexByte(path, '/') {
		path = path[:i]
	}
	if decoded, err := url.PathUnescape(path); err == nil {
		path = decoded
	}
	return host, strings.ToLower(path)
}
