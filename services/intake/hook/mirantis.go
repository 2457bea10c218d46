package hook

import (
	"fmt"
)

// dtrEvent is the body of a webhook of Docker Trusted Registry, later Mirantis
// Secure Registry 2 and 3 (docs.mirantis.com, MSR, "Manage webhooks"). The host
// is not said. MSR 4 is Harbor.
type dtrEvent struct {
	Type      string `json:"type"`
	CreatedAt string `json:"createdAt"`
	Contents  struct {
		Namespace  string `json:"namespace"`
		Repository string `json:"repository"`
		Tag        string `json:"tag"`
		Digest     string `json:"digest"`
		Author     string `json:"author"`
	} `json:"contents"`
}

func decodeDTR(req Request) ([]Event, error) {
	var in dtrEvent
	if err := decodeJSON(req.Body, &in); err != nil {
		return nil, err
	}
	if in.Type == "" {
		return nil, fmt.Errorf("no field \"type\": %w", ErrUnreadable)
	}
	return []Event{in.event().finish(req, req.Body)}, nil
}

func (in *dtrEvent) event() Event {
	e := Event{
		Repository: joined(in.Contents.Namespace, in.Contents.Repository),
		Tag:        in.Contents.Tag, Digest: in.Contents.Digest,
		Actor: in.Contents.Author, Time: parseTime(in.CreatedAt),
	}
	switch in.Type {
	case "TAG_PUSH":
		e.Action, e.Reason = Push, "a tag was pushed"
	case "MANIFEST_PUSH":
		e.Action, e.Reason = Push, "a manifest was pushed"
	case "TAG_DELETE":
		e.Action, e.Reason = Delete, "a tag was deleted"
	case "MANIFEST_DELETE":
		e.Action, e.Reason = Delete, "a manifest was deleted"
	case "REPO_DELETED":
		e.Tag, e.Digest = "", ""
		e.Action, e.Reason = Delete, "a repository was deleted"
	case "POLL_MIRRORING": // from another registry into this one
		if e.Tag == "" && e.Digest == "" {
			return e.ignored("type POLL_MIRRORING: no image is named")
		}
		e.Action, e.Reason = Push, "an image was mirrored into the registry"
	default: // pulls, scans, promotions (the target tells of its push), changes of repositories
		return e.ignored(fmt.Sprintf("type %s: nothing was pushed or deleted here", clean(in.Type, 64)))
	}
	return e
}
