package hook

import (
	"fmt"
	"strings"

	"github.com/tidewaiter/tidewaiter/contracts"
)

// giteaCall is the body of the event "package" of Gitea and Forgejo
// (modules/structs/hook.go, PackagePayload).
type giteaCall struct {
	Action  string `json:"action"`
	Package *struct {
		Owner struct {
			Login    string `json:"login"`
			UserName string `json:"username"`
		} `json:"owner"`
		Type      string `json:"type"`
		Name      string `json:"name"`
		Version   string `json:"version"` // a tag or a digest
		HTMLURL   string `json:"html_url"`
		CreatedAt string `json:"created_at"`
	} `json:"package"`
	Sender struct {
		Login string `json:"login"`
	} `json:"sender"`
}

func decodeGitea(req Request) ([]Event, error) {
	payload := req.payload()
	var in giteaCall
	if err := decodeJSON(payload, &in); err != nil {
		return nil, err
	}
	// X-GitHub-Event is there too, and says the same of other things.
	first := func(names ...string) string {
		for _, n := range names {
			if v := req.Header.Get(n); v != "" {
				return v
			}
		}
		return ""
	}
	e := Event{Actor: in.Sender.Login, DeliveryID: first("X-Gitea-Delivery", "X-Forgejo-Delivery")}
	if event := first("X-Gitea-Event", "X-Forgejo-Event"); event != "" && event != "package" {
		return []Event{e.ignored(fmt.Sprintf("event %q is about no package", clean(event, 64))).finish(req, payload)}, nil
	}
	p := in.Package
	if p == nil {
		return nil, fmt.Errorf("no field \"package\": %w", ErrUnreadable)
	}
	e.Registry = p.HTMLURL
	if p.Type != "container" {
		return []Event{e.ignored(fmt.Sprintf("a package of type %s", clean(p.Type, 32))).finish(req, payload)}, nil
	}
	owner := p.Owner.Login
	if owner == "" {
		owner = p.Owner.UserName
	}
	e.Repository = strings.ToLower(owner + "/" + p.Name) // as its registry does
	e.Tag = p.Version
	if contracts.ValidDigest(p.Version) {
		e.Tag, e.Digest = "", p.Version
	}
	switch in.Action {
	case "created":
		e.Action, e.Reason, e.Time = Push, "a package version was created", parseTime(p.CreatedAt)
	case "deleted": // when, is not said: created_at is that of the version
		e.Action, e.Reason = Delete, "a package version was deleted"
	default:
		e = e.ignored(fmt.Sprintf("action %q is neither created nor deleted", clean(in.Action, 32)))
	}
	return []Event{e.finish(req, payload)}, nil
}
