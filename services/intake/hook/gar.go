package hook

import (
	"encoding/base64"
	"fmt"
	"strings"

	"github.com/tidewaiter/tidewaiter/contracts"
)

// Headers in which Pub/Sub tells of a message whose payload stands alone in the
// body (cloud.google.com/pubsub, "Payload unwrapping"). Whoever pulls messages
// hands them on in the same way.
const (
	PubSubMessageID   = "X-Goog-Pubsub-Message-Id"
	PubSubPublishTime = "X-Goog-Pubsub-Publish-Time"
)

// garNotification is the message of Artifact Registry and of Container
// Registry before it (cloud.google.com/artifact-registry, "Configure Pub/Sub
// notifications"), in Pub/Sub's push envelope or without it.
type garNotification struct {
	Action string `json:"action"`
	Digest string `json:"digest"` // host/path@digest
	Tag    string `json:"tag"`    // host/path:tag

	Message *struct {
		Data         string `json:"data"` // base64
		MessageID    string `json:"messageId"`
		MessageID2   string `json:"message_id"`
		PublishTime  string `json:"publishTime"`
		PublishTime2 string `json:"publish_time"`
	} `json:"message"`
}

func decodeGAR(req Request) ([]Event, error) {
	var in garNotification
	if err := decodeJSON(req.Body, &in); err != nil {
		return nil, err
	}
	id, at := req.Header.Get(PubSubMessageID), req.Header.Get(PubSubPublishTime)
	if m := in.Message; m != nil {
		id, at = first(m.MessageID, m.MessageID2), first(m.PublishTime, m.PublishTime2)
		data, err := base64.StdEncoding.DecodeString(m.Data)
		if err != nil {
			return nil, fmt.Errorf("message.data is not base64: %w", ErrUnreadable)
		}
		in = garNotification{}
		if err := decodeJSON(data, &in); err != nil {
			return nil, fmt.Errorf("message.data: %w", err)
		}
	}
	if in.Action == "" {
		return nil, fmt.Errorf("no field \"action\": %w", ErrUnreadable)
	}
	e := in.event()
	e.DeliveryID, e.Time = id, parseTime(at)
	return []Event{e.finish(req, req.Body)}, nil
}

func first(texts ...string) string {
	for _, t := range texts {
		if t != "" {
			return t
		}
	}
	return ""
}

// foreignGAR: the hosts of both products say location and product, and an image
// has one of them alone. A bound host that is none of them stands before one.
func foreignGAR(said, bound string) bool { return said != "" && said != bound && isGARHost(bound) }

func isGARHost(host string) bool {
	return strings.HasSuffix(host, "-docker.pkg.dev") || host == "gcr.io" || strings.HasSuffix(host, ".gcr.io")
}

func (in *garNotification) event() Event {
	var e Event
	if ref, err := ParseReference(in.Digest); err == nil {
		e = e.fillFrom(ref)
	}
	tagged, err := ParseReference(in.Tag)
	switch {
	case err == nil && (e.Repository == "" || (tagged.Registry == e.Registry && tagged.Repository == e.Repository)):
		e = e.fillFrom(tagged)
		e.Tag = tagged.Tag
	case err == nil && tagged.Registry == "" && strings.HasSuffix(e.Repository, "/"+tagged.Repository): // the path is cut short
		e.Tag = tagged.Tag
	case contracts.ValidTag(in.Tag): // the tag alone
		e.Tag = in.Tag
	}
	switch in.Action {
	case "INSERT":
		e.Action, e.Reason = Push, "an image was pushed"
	case "DELETE":
		e.Action, e.Reason = Delete, "an image or tag was deleted"
	default:
		return e.ignored(fmt.Sprintf("action %q is neither INSERT nor DELETE", clean(in.Action, 32)))
	}
	return e
}
