package hook

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/http"
)

// gridEvent is one event of Azure Event Grid in either of its schemas
// (learn.microsoft.com, "Event Grid event schema" and "CloudEvents schema").
type gridEvent struct {
	ID   string          `json:"id"`
	Data json.RawMessage `json:"data"`
	// Event Grid schema
	EventType string `json:"eventType"`
	EventTime string `json:"eventTime"`
	// CloudEvents 1.0
	Type string `json:"type"`
	Time string `json:"time"`
}

const (
	gridValidation = "Microsoft.EventGrid.SubscriptionValidationEvent"
	maxGridCode    = 256 // of a validation code, which is a UUID
)

// gridActions are ACR's actions by the types of its events.
var gridActions = map[string]string{
	"Microsoft.ContainerRegistry.ImagePushed":  "push",
	"Microsoft.ContainerRegistry.ImageDeleted": "delete",
	"Microsoft.ContainerRegistry.ChartPushed":  "chart_push",
	"Microsoft.ContainerRegistry.ChartDeleted": "chart_delete",
}

func decodeEventGrid(req Request) ([]Event, error) {
	list, err := listOf(req.Body)
	if err != nil {
		return nil, err
	}
	events := make([]Event, 0, len(list))
	for _, raw := range list {
		e, err := gridEventOf(raw)
		if err != nil {
			e = bad(err.Error())
		}
		events = append(events, e.finish(req, raw))
	}
	return events, nil
}

func gridEventOf(raw []byte) (Event, error) {
	var in gridEvent
	if err := decodeJSON(raw, &in); err != nil {
		return Event{}, err
	}
	typ, at := in.EventType, in.EventTime
	if typ == "" {
		typ, at = in.Type, in.Time
	}
	action, known := gridActions[typ]
	if !known {
		e := Event{DeliveryID: in.ID, Time: parseTime(at)}
		return e.ignored(fmt.Sprintf("type %q is none of Azure Container Registry", clean(typ, 128))), nil
	}
	var data acrEvent
	if err := decodeJSON(in.Data, &data); err != nil {
		return Event{}, fmt.Errorf("data: %w", err)
	}
	e := data.about()
	e.DeliveryID = in.ID // kept when it is sent again, as data.id is not promised to be
	if t := parseTime(at); !t.IsZero() {
		e.Time = t
	}
	return data.classify(e, action), nil
}

// eventGridValidation answers the proof of ownership that Event Grid asks for
// when a subscription is made: 200 with its code (learn.microsoft.com,
// "Endpoint validation with Event Grid event schema"). Its validationUrl, the
// way by hand, is never followed.
func eventGridValidation(req Request) (Answer, bool) {
	if !bytes.Contains(req.Body, []byte(gridValidation)) {
		return Answer{}, false
	}
	list, err := listOf(req.Body)
	if err != nil || len(list) != 1 {
		return Answer{}, false
	}
	var in struct {
		EventType string `json:"eventType"`
		Data      struct {
			Code string `json:"validationCode"`
		} `json:"data"`
	}
	if decodeJSON(list[0], &in) != nil || in.EventType != gridValidation || in.Data.Code == "" || len(in.Data.Code) > maxGridCode {
		return Answer{}, false
	}
	body, err := json.Marshal(map[string]string{"validationResponse": in.Data.Code})
	if err != nil {
		return Answer{}, false
	}
	return Answer{Status: http.StatusOK, Header: http.Header{"Content-Type": {"application/json"}}, Body: body}, true
}
