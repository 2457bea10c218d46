package hook

import (
	"fmt"
	"strings"
	"time"
)

// nexusCall is the body of Sonatype Nexus's repository webhooks
// (help.sonatype.com, "Example Headers and Payloads").
type nexusCall struct {
	Timestamp  string     `json:"timestamp"`
	Initiator  string     `json:"initiator"` // user/address
	Repository string     `json:"repositoryName"`
	Action     string     `json:"action"`
	Component  *nexusPart `json:"component"`
	Asset      *nexusPart `json:"asset"`
}

type nexusPart struct {
	Format  string `json:"format"`
	Name    string `json:"name"`    // of a component the image, of an asset its path
	Version string `json:"version"` // of a component the tag
}

// nexusTime is how Nexus writes times.
const nexusTime = "2006-01-02T15:04:05.999-0700"

func decodeNexus(req Request) ([]Event, error) {
	var in nexusCall
	if err := decodeJSON(req.Body, &in); err != nil {
		return nil, err
	}
	e := Event{DeliveryID: req.Header.Get("X-Nexus-Webhook-Delivery")}
	e.Actor, _, _ = strings.Cut(in.Initiator, "/")
	if t, err := time.Parse(nexusTime, in.Timestamp); err == nil {
		e.Time = t.UTC()
	}
	part, what := in.Component, "component"
	if part == nil {
		part, what = in.Asset, "asset"
	}
	switch {
	case part == nil && in.Action == "":
		return nil, fmt.Errorf("no field \"component\", \"asset\" or \"action\": %w", ErrUnreadable)
	case part == nil:
		return []Event{e.ignored("neither a component nor an asset").finish(req, req.Body)}, nil
	case part.Format != "docker":
		return []Event{e.ignored(fmt.Sprintf("a %s of format %q", what, clean(part.Format, 32))).finish(req, req.Body)}, nil
	}
	image, tag := part.Name, part.Version
	if in.Component == nil {
		var ok bool
		if image, tag, ok = nexusManifest(part.Name); !ok {
			return []Event{e.ignored("an asset that is no manifest").finish(req, req.Body)}, nil
		}
	}
	e, ours := req.place(e, MappingPort, "", in.Repository, image)
	if !ours {
		return []Event{e.finish(req, req.Body)}, nil
	}
	e.Tag = tag
	switch in.Action {
	case "CREATED", "UPDATED":
		e.Action, e.Reason = Push, fmt.Sprintf("a %s was %s", what, strings.ToLower(in.Action))
	case "DELETED", "PURGED":
		e.Action, e.Reason = Delete, fmt.Sprintf("a %s was %s", what, strings.ToLower(in.Action))
	default:
		e = e.ignored(fmt.Sprintf("action %q is neither a creation nor a deletion", clean(in.Action, 32)))
	}
	return []Event{e.finish(req, req.Body)}, nil
}

// nexusManifest takes repository and tag or digest out of the path of a
// manifest, v2/<repository>/manifests/<reference>.
func nexusManifest(path string) (repository, reference string, ok bool) {
	path, ok = strings.CutPrefix(strings.TrimPrefix(path, "/"), "v2/")
	if !ok {
		return "", "", false
	}
	i := strings.LastIndex(path, "/manifests/")
	if i < 1 {
		return "", "", false
	}
	return path[:i], path[i+len("/manifests/"):], true
}
