package hook

import (
	"encoding/json"
	"fmt"
)

// dockerHubCall is the body of Docker Hub's webhooks (docs.docker.com,
// "Docker Hub webhooks"). There is nothing else than pushes.
type dockerHubCall struct {
	PushData *struct {
		PushedAt json.Number `json:"pushed_at"` // seconds, whole or not
		Pusher   string      `json:"pusher"`
		Tag      string      `json:"tag"`
		// MediaType is that of the config; no documentation tells of it.
		MediaType string `json:"media_type"`
	} `json:"push_data"`
	Repository struct {
		Name      string `json:"name"`
		Namespace string `json:"namespace"`
		RepoName  string `json:"repo_name"`
	} `json:"repository"`
	// callback_url is never called.
}

func decodeDockerHub(req Request) ([]Event, error) {
	var in dockerHubCall
	if err := decodeJSON(req.Body, &in); err != nil {
		return nil, err
	}
	if in.PushData == nil {
		return nil, fmt.Errorf("no field \"push_data\": %w", ErrUnreadable)
	}
	push := in.PushData
	e := Event{
		Action: Push, Reason: "a tag was pushed", Registry: "docker.io",
		Repository: in.Repository.RepoName, Tag: push.Tag, Actor: push.Pusher, Time: unixTime(push.PushedAt),
	}
	if e.Repository == "" {
		e.Repository = in.Repository.Namespace + "/" + in.Repository.Name
	}
	if !e.Time.IsZero() {
		// A push of several platforms is told once each, in bodies that may differ elsewhere.
		e.DeliveryID = hashOf([]byte(e.Repository + ":" + e.Tag + " " + push.PushedAt.String()))
	}
	if manifestKind(push.MediaType) != "" {
		e.MediaType = push.MediaType
	} else if push.MediaType != "" && !isImageConfig(push.MediaType) {
		e = e.notAnImage(fmt.Sprintf("its config is %s, that of no image", clean(push.MediaType, maxMediaType)))
	}
	return []Event{e.finish(req, req.Body)}, nil
}
