package list

import (
	"context"
	"fmt"
	"net/http"
	"net/url"
	"strings"
)

// gitlab lists through GitLab's container registry API
// (docs.gitlab.com/api/container_registry). The lists of tags hold no digests.
type gitlab struct {
	c      *client
	places []string // groups/PATH, projects/PATH
}

func newGitLab(o Options) (Lister, error) {
	c, err := newClient(o, "https://gitlab.com")
	if err != nil {
		return nil, err
	}
	if o.Secret != nil {
		c.authorize = func(_ context.Context, h http.Header) error {
			token, err := o.Secret()
			if err != nil {
				return err
			}
			h.Set("Private-Token", token)
			return nil
		}
	}
	for _, place := range o.Within {
		kind, path, _ := strings.Cut(place, "/")
		if kind != "groups" && kind != "projects" || path == "" {
			return nil, fmt.Errorf("within %q is neither groups/PATH nor projects/PATH: %w", place, ErrConfig)
		}
	}
	return &gitlab{c: c, places: o.Within}, nil
}

func (g *gitlab) Repositories(ctx context.Context, next string) ([]Repository, string, error) {
	at, err := parsePages(next, len(g.places))
	if err != nil {
		return nil, "", err
	}
	kind, path, _ := strings.Cut(g.places[at.place], "/")
	var answer []struct {
		ID        int64  `json:"id"`
		ProjectID int64  `json:"project_id"`
		Path      string `json:"path"` // as in image names
	}
	what := "list GitLab's registry repositories of " + g.places[at.place]
	header, err := g.c.get(ctx, what, "/api/v4/"+kind+"/"+url.PathEscape(path)+"/registry/repositories", numbered(at.page, "page", "per_page"), &answer)
	if err != nil {
		return nil, "", err
	}
	page := make([]Repository, 0, len(answer))
	for _, r := range answer {
		if r.ID == 0 || r.ProjectID == 0 {
			return nil, "", refused(what, "a repository has no id")
		}
		page = append(page, Repository{
			Name:   r.Path,
			Handle: fmt.Sprintf("/api/v4/projects/%d/registry/repositories/%d/tags", r.ProjectID, r.ID),
		})
	}
	return named(page), at.following(nextPage(header, len(answer)), len(g.places)), nil
}

func (g *gitlab) Tags(ctx context.Context, r Repository, next string) ([]Tag, string, error) {
	at, err := parsePages(next, 1)
	if err != nil {
		return nil, "", err
	}
	var answer []struct {
		Name string `json:"name"`
	}
	header, err := g.c.get(ctx, "list GitLab's tags of "+r.Name, r.Handle, numbered(at.page, "page", "per_page"), &answer)
	if err != nil {
		return nil, "", err
	}
	page := make([]Tag, 0, len(answer))
	for _, t := range answer {
		page = append(page, Tag{Name: t.Name})
	}
	return tagged(page), at.following(nextPage(header, len(answer)), 1), nil
}

// nextPage says whether there is a page after this one
// (docs.gitlab.com/api/rest, "Offset-based pagination").
func nextPage(header http.Header, entries int) bool {
	if v, ok := header["X-Next-Page"]; ok {
		return v[0] != ""
	}
	return entries >= pageSize
}
