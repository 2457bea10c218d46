package hook

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
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
	tags, err := quayTags(in.UpdatedTags)
	if err != nil {
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

// quayTags reads a list of tags, or what old versions sent: an object of image
// ids by tag.
func quayTags(raw []byte) ([]string, error) {
	if strings.HasPrefix(strings.TrimSpace(string(raw)), "{") {
		var ids map[string]string
		if err := decodeJSON(raw, &ids); err != nil {
			return nil, err
		}
		return slices.Sorted(maps.Keys(ids)), nil
	}
	var tags []string
	err := decodeJSON(raw, &tags)
	return tags, err
}
