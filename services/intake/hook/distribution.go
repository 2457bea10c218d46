package hook

import (
	"encoding/json"
	"fmt"
	"regexp"
	"strings"
)

// distributionEnvelope is the body of CNCF Distribution's notifications
// (distribution.github.io/distribution/about/notifications, "Events").
type distributionEnvelope struct {
	Events []json.RawMessage `json:"events"`
}

type distributionEvent struct {
	ID        string `json:"id"`
	Timestamp string `json:"timestamp"`
	Action    string `json:"action"`
	Target    struct {
		MediaType  string `json:"mediaType"`
		Digest     string `json:"digest"`
		Repository string `json:"repository"`
		URL        string `json:"url"`
		Tag        string `json:"tag"`
		// References is only sent with notifications.events.includereferences.
		References []struct {
			MediaType string `json:"mediaType"`
		} `json:"references"`
	} `json:"target"`
	Request struct {
		Host string `json:"host"`
	} `json:"request"`
	Actor struct {
		Name string `json:"name"` // GitLab adds "user", which holds a token: never read, see blankUsers
	} `json:"actor"`
}

func decodeDistribution(req Request) ([]Event, error) {
	var envelope distributionEnvelope
	if err := decodeJSON(req.Body, &envelope); err != nil {
		return nil, err
	}
	if envelope.Events == nil {
		return nil, fmt.Errorf("no field \"events\": %w", ErrUnreadable)
	}
	if len(envelope.Events) > MaxEvents {
		return nil, fmt.Errorf("%d events, more than %d: %w", len(envelope.Events), MaxEvents, ErrUnreadable)
	}
	events := make([]Event, 0, len(envelope.Events))
	for _, raw := range envelope.Events {
		var in distributionEvent
		if err := decodeJSON(raw, &in); err != nil {
			events = append(events, bad(err.Error()).finish(req, raw))
			continue
		}
		events = append(events, in.event().finish(req, raw))
	}
	return events, nil
}

func (in *distributionEvent) event() Event {
	e := Event{
		Registry:   in.Request.Host,
		Repository: in.Target.Repository,
		Tag:        in.Target.Tag,
		Digest:     in.Target.Digest, // never the one in target.url, which may differ
		MediaType:  in.Target.MediaType,
		Actor:      in.Actor.Name,
		Time:       parseTime(in.Timestamp),
		DeliveryID: in.ID,
	}
	switch in.Action {
	case "push":
		return in.push(e)
	case "delete":
		return in.deletion(e)
	case "pull":
		return e.ignored("pull: nothing changed")
	case "mount":
		return e.ignored("a blob was mounted from another repository: no manifest")
	case "rename":
		return e.ignored("the repository was renamed: no content changed")
	case "":
		e.Bad = "no field \"action\""
		return e.ignored(e.Bad)
	default:
		return e.ignored(fmt.Sprintf("action %q is neither push nor delete", clean(in.Action, 32)))
	}
}

func (in *distributionEvent) push(e Event) Event {
	kind := manifestKind(in.Target.MediaType)
	switch {
	case kind == "" && in.isBlob():
		return e.ignored("a blob was pushed: no manifest")
	case kind == "" && in.Target.MediaType != "":
		return e.notAnImage("the media type is not one of an image manifest or index")
	}
	e.Action, e.Reason = Push, "an image manifest was pushed"
	if kind == kindIndex {
		e.Reason = "an image index was pushed"
		return e
	}
	var types []string
	for _, r := range in.Target.References {
		types = append(types, r.MediaType)
	}
	if why := otherArtifact(types); why != "" {
		return e.notAnImage(why)
	}
	return e
}

// isBlob says whether a target that is no known manifest is a blob. Blobs are
// application/octet-stream today; old versions sent the layer's own type.
func (in *distributionEvent) isBlob() bool {
	if strings.Contains(in.Target.URL, "/manifests/") {
		return false
	}
	return strings.Contains(in.Target.URL, "/blobs/") ||
		in.Target.MediaType == "application/octet-stream" || isImageLayer(in.Target.MediaType)
}

// deletion reads a delete. That of a blob looks just like that of a manifest;
// planner asks the registry.
func (in *distributionEvent) deletion(e Event) Event {
	e.Action = Delete
	switch {
	case in.Target.Tag != "":
		e.Reason = "a tag was deleted"
	case in.Target.Digest != "":
		e.Reason = "a manifest was deleted"
	default:
		e.Reason = "a repository was deleted"
	}
	return e
}

// userField is the field "user", whose text may be cut off with the body.
var userField = regexp.MustCompile(`("user"\s*:\s*)"(?:[^"\\]|\\.)*"?`)

// blankUsers empties every field "user". It reads the text, so that it does the
// same with a body that is no JSON.
func blankUsers(body []byte) []byte { return userField.ReplaceAll(body, []byte(`${1}""`)) }
