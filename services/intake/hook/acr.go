package hook

import (
	"fmt"
	"net/http"
)

// acrEvent is the body of Azure Container Registry's webhooks and the data of
// its events in Event Grid (learn.microsoft.com, "Azure Container Registry
// webhook reference" and "as an Event Grid source").
type acrEvent struct {
	ID        string `json:"id"`
	Timestamp string `json:"timestamp"`
	Action    string `json:"action"`
	Target    struct {
		MediaType  string `json:"mediaType"`
		Digest     string `json:"digest"`
		Repository string `json:"repository"`
		Tag        string `json:"tag"`
	} `json:"target"`
	Request struct {
		Host string `json:"host"`
	} `json:"request"`
}

// acrPing answers the button "Ping" and the call when a webhook is created.
func acrPing(req Request) (Answer, bool) {
	var in struct {
		Action string `json:"action"`
	}
	if decodeJSON(req.Body, &in) != nil || in.Action != "ping" {
		return Answer{}, false
	}
	return Answer{Status: http.StatusOK}, true
}

func decodeACR(req Request) ([]Event, error) {
	var in acrEvent
	if err := decodeJSON(req.Body, &in); err != nil {
		return nil, err
	}
	if in.Action == "" {
		return nil, fmt.Errorf("no field \"action\": %w", ErrUnreadable)
	}
	e := in.about()
	e.DeliveryID = in.ID
	return []Event{in.classify(e, in.Action).finish(req, req.Body)}, nil
}

// about returns what the event is about, without saying what happened.
func (in *acrEvent) about() Event {
	return Event{
		Registry: in.Request.Host, Repository: in.Target.Repository, Tag: in.Target.Tag, Digest: in.Target.Digest,
		MediaType: in.Target.MediaType, Time: parseTime(in.Timestamp),
	}
}

func (in *acrEvent) classify(e Event, action string) Event {
	switch action {
	case "push", "quarantine": // what is in quarantine waits for a scanner
		e.Action, e.Reason = Push, "a manifest was pushed"
		if action == "quarantine" {
			e.Reason = "a manifest was pushed into quarantine"
		}
		if e.MediaType != "" && manifestKind(e.MediaType) == "" {
			return e.notAnImage("the media type is not one of an image manifest or index")
		}
		return e
	case "chart_push":
		return e.notAnImage("a Helm chart was pushed")
	case "delete":
		e.Action, e.Reason = Delete, "a manifest was deleted"
		if e.Digest == "" {
			e.Reason = "a repository was deleted"
		}
		return e
	case "chart_delete":
		return e.ignored("a Helm chart was deleted")
	case "ping":
		return e.ignored("a ping")
	default:
		return e.ignored(fmt.Sprintf("action %q is neither a push nor a deletion", clean(action, 32)))
	}
}
