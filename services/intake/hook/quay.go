package hook

import (
	"encoding/json"
	"fmt"
)

// quayCall is the body of Quay's notifications (docs.quay.io, "Repository
// Notifications"). No field says which event it is: a push has updated_tags.
type quayCall struct {
	Repository  string          `json:"repository"` // namespace/name
	DockerURL   string          `json:"docker_url"` // host/namespace/name, with or without a scheme
	UpdatedTags json.RawMessage `json:"updated_tags"`
}

func decodeQuay(req Request) ([]Event, error) {
	var in quayCall
	if err := decodeJSON(req.Body, &in); err != nil {
		return nil, err
	}
	if in.Repository == "" && in.DockerURL == "" {
		return nil, fmt.Errorf("no field \"repository\" or \"docker_url\" (is the body a template?): %w", ErrUnreadable)
	}
	e := Event{Registry: in.DockerURL, Repository: in.Repository}
	if in.UpdatedTags == nil {
		return []Event{e.ignored("no field updated_tags: not a push").finish(req, req.Body)}, nil
	}
	var tags []string
	if err := decodeJSON(in.UpdatedTags, &tags); err != nil {
		return nil, fmt.Errorf("updated_tags: %w", err)
	}
	switch {
	case len(tags) > MaxEvents:
		return nil, fmt.Errorf("%d tags, more than %d: %w", len(tags), MaxEvents, ErrUnreadable)
	case len(tags) == 0:
		return []Event{e.ignored("a push that updated no tag").finish(req, req.Body)}, nil
	}
	// The test button sends just such a push; the registry knows whether the tags are there.
	events := make([]Event, 0, len(tags))
	for _, tag := range tags {
		one := e
		one.Action, one.Reason, one.Tag = Push, "a tag was updated", tag
		events = append(events, one.finish(req, req.Body))
	}
	return events, nil
}
