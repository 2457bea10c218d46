package hook

import (
	"encoding/json"
	"fmt"
)

// harborCall is the body of Harbor's webhooks in either of its formats
// (goharbor.io, "Configure Webhook Notifications"; src/pkg/notifier/formats).
type harborCall struct {
	// "Default"
	Type      string      `json:"type"` // also in CloudEvents
	OccurAt   json.Number `json:"occur_at"`
	Operator  string      `json:"operator"` // also in CloudEvents, an extension
	EventData harborData  `json:"event_data"`
	// "CloudEvents"
	SpecVersion string     `json:"specversion"`
	ID          string     `json:"id"`
	Time        string     `json:"time"`
	Data        harborData `json:"data"`
}

type harborData struct {
	Resources []struct {
		Digest string `json:"digest"`
		Tag    string `json:"tag"` // the digest again where there is no tag
		// ResourceURL is host/repository:tag or @digest; before Harbor 2.1 also ":sha256:…".
		ResourceURL string `json:"resource_url"`
	} `json:"resources"`
	Repository struct {
		Name      string `json:"name"`
		Namespace string `json:"namespace"`
		FullName  string `json:"repo_full_name"`
	} `json:"repository"`
	Replication struct {
		Host string `json:"harbor_hostname"`
	} `json:"replication"`
}

func decodeHarbor(req Request) ([]Event, error) {
	var in harborCall
	if err := decodeJSON(req.Body, &in); err != nil {
		return nil, err
	}
	if in.Type == "" {
		return nil, fmt.Errorf("no field \"type\": %w", ErrUnreadable)
	}
	data, e := in.EventData, Event{Actor: in.Operator, Time: unixTime(in.OccurAt)}
	if in.SpecVersion != "" {
		data, e.Time, e.DeliveryID = in.Data, parseTime(in.Time), in.ID
	}
	if len(data.Resources) > MaxEvents {
		return nil, fmt.Errorf("%d resources, more than %d: %w", len(data.Resources), MaxEvents, ErrUnreadable)
	}
	e.Repository = data.Repository.FullName
	if e.Repository == "" && data.Repository.Namespace != "" {
		e.Repository = data.Repository.Namespace + "/" + data.Repository.Name
	}
	if len(data.Resources) == 0 {
		e.Registry = data.Replication.Host
		return []Event{in.classify(e).finish(req, req.Body)}, nil
	}
	events := make([]Event, 0, len(data.Resources))
	for _, r := range data.Resources {
		one := e
		one.Registry, one.Tag, one.Digest = r.ResourceURL, r.Tag, r.Digest
		events = append(events, in.classify(one).finish(req, req.Body))
	}
	return events, nil
}

// classify goes by the type alone: some types carry the resource of a push that
// did not happen (QUOTA_EXCEED) or happened long ago.
func (in *harborCall) classify(e Event) Event {
	switch in.Type {
	case "PUSH_ARTIFACT", "harbor.artifact.pushed", "pushImage":
		e.Action, e.Reason = Push, "an artifact was pushed"
		return e
	case "DELETE_ARTIFACT", "harbor.artifact.deleted", "deleteImage":
		e.Action, e.Reason = Delete, "an artifact was deleted"
		return e
	case "PULL_ARTIFACT", "harbor.artifact.pulled", "pullImage":
		return e.ignored("pull: nothing changed")
	case "UPLOAD_CHART", "uploadChart":
		return e.notAnImage("a chart was uploaded to Harbor's chart museum")
	case "REPLICATION", "harbor.replication.status.changed":
		return e.ignored("the state of a replication: what it brings is also told as pushes")
	case "QUOTA_EXCEED", "harbor.quota.exceeded":
		return e.ignored("the quota refused a push: nothing was stored")
	default:
		return e.ignored(fmt.Sprintf("type %q is neither a push nor a deletion", clean(in.Type, 64)))
	}
}
