package hook

import (
	"encoding/json"
	"fmt"
	"strings"
	"time"
)

// icrEvent is an audit event of IBM Cloud Container Registry, which has no
// webhooks (cloud.ibm.com/docs/Registry, "Activity tracking events"; the fields
// are those of every audit event).
type icrEvent struct {
	EventTime string `json:"eventTime"`
	Action    string `json:"action"`
	Outcome   string `json:"outcome"`
	Initiator struct {
		Name string `json:"name"`
	} `json:"initiator"`
	Target struct {
		Name string `json:"name"` // host/namespace/repository[:tag][@digest]
	} `json:"target"`
}

// decodeICR reads one audit event or a list of them.
func decodeICR(req Request) ([]Event, error) {
	if !strings.HasPrefix(strings.TrimLeft(string(req.Body), " \t\r\n"), "[") {
		var in icrEvent
		if err := decodeJSON(req.Body, &in); err != nil {
			return nil, err
		}
		if in.Action == "" {
			return nil, fmt.Errorf("no field \"action\": %w", ErrUnreadable)
		}
		return []Event{in.event().finish(req, req.Body)}, nil
	}
	var batch []json.RawMessage
	if err := decodeJSON(req.Body, &batch); err != nil {
		return nil, err
	}
	if len(batch) > MaxEvents {
		return nil, fmt.Errorf("%d events, more than %d: %w", len(batch), MaxEvents, ErrUnreadable)
	}
	events := make([]Event, 0, len(batch))
	for _, raw := range batch {
		var in icrEvent
		if err := decodeJSON(raw, &in); err != nil {
			events = append(events, bad(err.Error()).finish(req, raw))
			continue
		}
		events = append(events, in.event().finish(req, raw))
	}
	return events, nil
}

func (in *icrEvent) event() Event {
	e := Event{Actor: in.Initiator.Name, Time: icrTime(in.EventTime)}
	// requestData has a digest too, but nothing says what of.
	if ref, err := ParseReference(in.Target.Name); err == nil {
		e = e.fillFrom(ref)
	}
	action, ok := strings.CutPrefix(in.Action, "container-registry.image.")
	switch {
	case !ok:
		return e.ignored("the audit event is about no image")
	case in.Outcome != "success":
		return e.ignored("the audited call did not succeed")
	}
	switch action {
	case "push", "tag", "restore":
		e.Action, e.Reason = Push, "an image was pushed or tagged"
	case "delete", "rm", "untag":
		e.Action, e.Reason = Delete, "an image or tag was deleted"
	default: // pull, inspect, list, bulkdelete (which names no image)
		return e.ignored(fmt.Sprintf("action %s: nothing was pushed, and no image that was deleted is named", clean(in.Action, 64)))
	}
	return e
}

// icrTime reads a time whose zone has no colon.
func icrTime(s string) time.Time {
	t, err := time.Parse("2006-01-02T15:04:05.999999999-0700", s)
	if err != nil {
		return parseTime(s)
	}
	return t.UTC()
}
