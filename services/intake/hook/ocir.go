package hook

import (
	"fmt"
	"net/http"
	"strings"
)

// ocirEvent is what OCI Events tells of Oracle's registry: names after
// CloudEvents 0.1 (docs.oracle.com, Events, "Contents of an Event Message").
// The host (a region's key before .ocir.io) is never said.
type ocirEvent struct {
	EventType string `json:"eventType"`
	EventTime string `json:"eventTime"`
	EventID   string `json:"eventID"`
	Data      struct {
		ResourceName      string `json:"resourceName"` // repository[:tag], without the namespace
		AdditionalDetails struct {
			Path   string `json:"path"` // namespace/repository
			Digest string `json:"digest"`
		} `json:"additionalDetails"`
	} `json:"data"`
	// ConfirmationURL is what OCI Notifications sends first to a new HTTPS subscription.
	ConfirmationURL string `json:"ConfirmationURL"`
}

const ocirEventPrefix = "com.oraclecloud.artifacts."

func decodeOCIR(req Request) ([]Event, error) {
	var in ocirEvent
	if err := decodeJSON(req.Body, &in); err != nil {
		return nil, err
	}
	if in.ConfirmationURL != "" || ocirConfirmation(req.Header) {
		// Nothing proves whose URL that is, so it is set aside for a person to open.
		return []Event{bad("a subscription waits to be confirmed: open the ConfirmationURL in this body by hand").finish(req, req.Body)}, nil
	}
	if in.EventType == "" {
		return nil, fmt.Errorf("no field \"eventType\": %w", ErrUnreadable)
	}
	return []Event{in.event().finish(req, req.Body)}, nil
}

// ocirConfirmation knows the call by its header
// (docs.oracle.com, Notifications, "Confirming a Subscription").
func ocirConfirmation(h http.Header) bool {
	return h.Get("X-OCI-NS-MessageType") == "SubscriptionConfirmation"
}

func (in *ocirEvent) event() Event {
	e := Event{
		Repository: in.Data.AdditionalDetails.Path,
		Digest:     in.Data.AdditionalDetails.Digest,
		Time:       parseTime(in.EventTime),
		DeliveryID: in.EventID,
	}
	if i := strings.LastIndexByte(in.Data.ResourceName, ':'); i >= 0 {
		e.Tag = in.Data.ResourceName[i+1:]
	}
	switch strings.TrimPrefix(in.EventType, ocirEventPrefix) {
	case "uploaddockerimage", "uploadcontainerimage":
		e.Action, e.Reason = Push, "an image was pushed"
	case "createcontainerversion":
		e.Action, e.Reason = Push, "an image was given a tag"
	case "restorecontainerimage":
		e.Action, e.Reason = Push, "a deleted image was restored"
	case "deletecontainerimage", "deletedockerimage":
		e.Action, e.Reason = Delete, "an image was deleted"
	case "removecontainerversion":
		e.Action, e.Reason = Delete, "a tag was removed"
	case "deletecontainerrepository", "deletedockerrepository":
		e.Tag, e.Digest = "", ""
		e.Action, e.Reason = Delete, "a repository was deleted"
	default:
		return e.ignored(fmt.Sprintf("type %s: nothing was pushed or deleted", clean(in.EventType, 128)))
	}
	return e
}
