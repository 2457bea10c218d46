package hook

import (
	"fmt"
	"strings"
)

// artifactoryCall is the body of JFrog Artifactory's predefined webhooks
// (docs.jfrog.com, "Event Types", domain Docker).
type artifactoryCall struct {
	Domain    string `json:"domain"`
	EventType string `json:"event_type"`
	Data      struct {
		RepoKey   string `json:"repo_key"`
		Path      string `json:"path"` // image/tag/file
		Name      string `json:"name"` // file
		SHA256    string `json:"sha256"`
		ImageName string `json:"image_name"`
		Tag       string `json:"tag"`
	} `json:"data"`
	Origin string `json:"jpd_origin"`
	Source string `json:"source"` // who, for example jfrog/user@example.com
}

func decodeArtifactory(req Request) ([]Event, error) {
	var in artifactoryCall
	if err := decodeJSON(req.Body, &in); err != nil {
		return nil, err
	}
	if in.Domain == "" || in.EventType == "" {
		return nil, fmt.Errorf("no field \"domain\" or \"event_type\": %w", ErrUnreadable)
	}
	d := in.Data
	image := d.ImageName
	if rest, ok := strings.CutSuffix(d.Path, "/"+d.Tag+"/"+d.Name); ok && d.Tag != "" && rest != "" {
		image = rest // image_name may be the last part of it alone
	}
	if parts := strings.Split(d.Path, "/"); in.Domain != "docker" && len(parts) > 2 {
		image = strings.Join(parts[:len(parts)-2], "/")
	}
	e, ours := req.place(Event{Actor: in.Source}, MappingPath, in.Origin, d.RepoKey, image)
	switch {
	case !ours:
		return []Event{e.finish(req, req.Body)}, nil
	case in.Domain != "docker":
		return []Event{e.ignored(fmt.Sprintf("domain %q: subscribe to the Docker events", clean(in.Domain, 32))).finish(req, req.Body)}, nil
	}
	e.Tag = d.Tag
	if d.Name == "manifest.json" || d.Name == "list.manifest.json" {
		e.Digest = "sha256:" + d.SHA256
	}
	switch in.EventType {
	case "pushed", "promoted":
		e.Action, e.Reason = Push, "a tag was "+in.EventType
	case "deleted":
		e.Action, e.Reason = Delete, "a tag was deleted"
	default:
		e = e.ignored(fmt.Sprintf("event %q is neither pushed, promoted nor deleted", clean(in.EventType, 32)))
	}
	return []Event{e.finish(req, req.Body)}, nil
}
