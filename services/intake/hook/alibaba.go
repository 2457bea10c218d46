package hook

import (
	"fmt"
	"regexp"
	"strings"
	"time"
)

// alibabaTrigger is the body of a repository's trigger
// (alibabacloud.com/help, Container Registry, "Manage triggers").
type alibabaTrigger struct {
	PushData struct {
		Digest   string `json:"digest"`
		PushedAt string `json:"pushed_at"`
		Tag      string `json:"tag"`
	} `json:"push_data"`
	Repository struct {
		Name      string `json:"name"`
		Namespace string `json:"namespace"`
		FullName  string `json:"repo_full_name"`
		Region    string `json:"region"`
	} `json:"repository"`
	SpecVersion string `json:"specversion"` // of an event of EventBridge
}

// alibabaData is the data of EventBridge's CloudEvents about an Enterprise
// Edition instance (alibabacloud.com/help, EventBridge, "Container Registry
// events"). The host is not said.
type alibabaData struct {
	Namespace string `json:"RepoNamespaceName"`
	Name      string `json:"RepoName"`
	Tag       string `json:"Tag"`
	Digest    string `json:"Digest"`
}

var alibabaRegion = regexp.MustCompile(`^[a-z]+(?:-[a-z0-9]+)+$`)

func decodeAlibaba(req Request) ([]Event, error) {
	if req.Header.Get("Ce-Specversion") != "" {
		return readCloudEvents(req, alibabaEvent)
	}
	var in alibabaTrigger
	if strings.HasPrefix(strings.TrimLeft(string(req.Body), " \t\r\n"), "[") {
		return readCloudEvents(req, alibabaEvent)
	}
	if err := decodeJSON(req.Body, &in); err != nil {
		return nil, err
	}
	if in.SpecVersion != "" {
		return readCloudEvents(req, alibabaEvent)
	}
	if in.Repository.FullName == "" {
		in.Repository.FullName = joined(in.Repository.Namespace, in.Repository.Name)
	}
	if in.Repository.FullName == "" {
		return nil, fmt.Errorf("neither a trigger's nor an event's body, which have \"repository\" or \"specversion\": %w", ErrUnreadable)
	}
	e := Event{
		Action: Push, Reason: "an image was pushed",
		Repository: strings.ToLower(in.Repository.FullName), // names are shown as they were typed, and pulled in lower case
		Tag:        in.PushData.Tag, Digest: in.PushData.Digest,
		Time: alibabaTime(in.PushData.PushedAt),
	}
	if alibabaRegion.MatchString(in.Repository.Region) { // of the personal edition; instances have hosts of their own
		e.Registry = "registry." + in.Repository.Region + ".aliyuncs.com"
	}
	return []Event{e.finish(req, req.Body)}, nil
}

func alibabaEvent(in *cloudEvent) (Event, error) {
	var data alibabaData
	if err := in.readData(&data); err != nil {
		return Event{}, err
	}
	e := Event{
		Repository: strings.ToLower(joined(data.Namespace, data.Name)), Tag: data.Tag, Digest: data.Digest,
		Time: parseTime(in.Time), DeliveryID: in.ID,
	}
	if in.Type == "cr:Artifact:PushCompleted" {
		e.Action, e.Reason = Push, "an image was pushed"
		return e, nil
	}
	// Of a build the push is told too; of a copy between instances the sweeper learns.
	return e.ignored(fmt.Sprintf("type %s: nothing was pushed", clean(in.Type, 128))), nil
}

// joined returns namespace/name, "" unless both are there.
func joined(namespace, name string) string {
	if namespace == "" || name == "" {
		return ""
	}
	return namespace + "/" + name
}

// alibabaTime reads a time that does not say its zone, which is China's.
func alibabaTime(s string) time.Time {
	t, err := time.ParseInLocation(time.DateTime, s, time.FixedZone("UTC+8", 8*60*60))
	if err != nil {
		return parseTime(s)
	}
	return t.UTC()
}
