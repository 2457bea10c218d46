package hook

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
)

// cloudsmithCall is one event of Cloudsmith's webhooks (docs.cloudsmith.com,
// "Webhooks").
type cloudsmithCall struct {
	Data struct {
		Format     string `json:"format"`
		Namespace  string `json:"namespace"`
		Repository string `json:"repository"`
		Name       string `json:"name"`
		Version    string `json:"version"`
		Checksum   string `json:"checksum_sha256"`
		Uploader   string `json:"uploader"`
		Tags       struct {
			Version []string `json:"version"`
		} `json:"tags"`
	} `json:"data"`
	Meta struct {
		EventID   string `json:"event_id"`
		EventAt   string `json:"event_at"`
		TriggerID string `json:"trigger_id"` // stays when it is sent again
	} `json:"meta"`
}

// cloudsmithPayload returns the JSON of a call. Within a form it is a JSON text
// in a JSON text.
func cloudsmithPayload(req Request) []byte {
	payload := req.payload()
	var text string
	if req.isForm() && json.Unmarshal(payload, &text) == nil {
		return []byte(text)
	}
	return payload
}

// cloudsmithPing answers the call when a webhook is made or tested.
func cloudsmithPing(req Request) (Answer, bool) {
	list, err := listOf(cloudsmithPayload(req))
	if err != nil || len(list) != 1 {
		return Answer{}, false
	}
	var in cloudsmithCall
	if decodeJSON(list[0], &in) != nil || in.Meta.EventID != "ping" {
		return Answer{}, false
	}
	return Answer{Status: http.StatusOK}, true
}

func decodeCloudsmith(req Request) ([]Event, error) {
	list, err := listOf(cloudsmithPayload(req))
	if err != nil {
		return nil, err
	}
	var events []Event
	for _, raw := range list {
		var in cloudsmithCall
		if err := decodeJSON(raw, &in); err != nil {
			events = append(events, bad(err.Error()).finish(req, raw))
			continue
		}
		for _, e := range in.events() {
			events = append(events, e.finish(req, raw))
		}
		if len(events) > MaxEvents {
			return nil, fmt.Errorf("more than %d tags: %w", MaxEvents, ErrUnreadable)
		}
	}
	return events, nil
}

// events returns one event a tag, or one by digest where there is no tag.
func (in *cloudsmithCall) events() []Event {
	d := in.Data
	e := Event{Actor: d.Uploader, Time: parseTime(in.Meta.EventAt), DeliveryID: in.Meta.TriggerID}
	switch {
	case in.Meta.EventID == "":
		e.Bad = "no field \"meta.event_id\""
		return []Event{e.ignored(e.Bad)}
	case d.Format != "docker":
		return []Event{e.ignored(fmt.Sprintf("a package of format %q", clean(d.Format, 32)))}
	}
	e.Registry = "docker.cloudsmith.io"
	e.Repository = strings.Join([]string{d.Namespace, d.Repository, d.Name}, "/")
	e.Digest = "sha256:" + d.Version
	if !saidDigest.MatchString(e.Digest) || len(d.Version) != 64 {
		e.Digest = "sha256:" + d.Checksum
	}
	name := strings.TrimPrefix(in.Meta.EventID, "package.")
	switch name {
	case "synced", "tags_updated", "restored", "released":
		e.Action, e.Reason = Push, fmt.Sprintf("a package was %s", strings.ReplaceAll(name, "_", " "))
	case "deleted":
		e.Action, e.Reason = Delete, "a package was deleted"
	default:
		e = e.ignored(fmt.Sprintf("event %q says neither that a package is there nor that it is gone", clean(in.Meta.EventID, 64)))
		return []Event{e}
	}
	if len(d.Tags.Version) == 0 {
		return []Event{e}
	}
	events := make([]Event, 0, len(d.Tags.Version))
	for _, tag := range d.Tags.Version {
		one := e
		one.Tag = tag
		events = append(events, one)
	}
	return events
}
