package hook

import (
	"encoding/json"
	"fmt"
)

// zotData is the data of zot's CloudEvents (project-zot/zot,
// pkg/extensions/events). The host is never said.
type zotData struct {
	Name      string `json:"name"`
	Reference string `json:"reference"` // a tag, or the digest again
	Digest    string `json:"digest"`
	MediaType string `json:"mediaType"`
	Manifest  string `json:"manifest"` // the whole text, with updates only
	Actor     struct {
		Name string `json:"name"` // absent for anonymous pushes
	} `json:"actor"`
}

func decodeZot(req Request) ([]Event, error) { return readCloudEvents(req, zotEvent) }

func zotEvent(in *cloudEvent) (Event, error) {
	var data zotData
	if err := in.readData(&data); err != nil {
		return Event{}, err
	}
	e := Event{
		Repository: data.Name, Tag: data.Reference, Digest: data.Digest, MediaType: data.MediaType,
		Actor: data.Actor.Name, Time: parseTime(in.Time), DeliveryID: in.ID,
	}
	switch in.Type {
	case "zotregistry.image.updated":
		return data.push(e), nil
	case "zotregistry.image.deleted":
		e.Action, e.Reason = Delete, "a tag or manifest was deleted"
		return e, nil
	case "zotregistry.repository.created": // at the start of an upload, before any manifest
		return e.ignored("a repository was created: nothing is in it yet"), nil
	case "zotregistry.image.lint_failed":
		return e.ignored("an image was refused"), nil
	default:
		return e.ignored(fmt.Sprintf("type %s is none of an update or a deletion", clean(in.Type, 128))), nil
	}
}

func (data *zotData) push(e Event) Event {
	switch manifestKind(data.MediaType) {
	case kindIndex:
		e.Action, e.Reason = Push, "an image index was pushed"
		return e
	case "":
		if data.MediaType != "" {
			return e.notAnImage("the media type is not one of an image manifest or index")
		}
	}
	e.Action, e.Reason = Push, "an image manifest was pushed"
	if why := otherArtifact(manifestReferences(data.Manifest)); why != "" {
		return e.notAnImage(why)
	}
	return e
}

// manifestReferences returns the media types of what an embedded manifest
// refers to, config first; none if it cannot be read.
func manifestReferences(text string) []string {
	var m struct {
		Config struct {
			MediaType string `json:"mediaType"`
		} `json:"config"`
		Layers []struct {
			MediaType string `json:"mediaType"`
		} `json:"layers"`
	}
	if json.Unmarshal([]byte(text), &m) != nil || m.Config.MediaType == "" {
		return nil
	}
	types := []string{m.Config.MediaType}
	for _, l := range m.Layers {
		types = append(types, l.MediaType)
	}
	return types
}
