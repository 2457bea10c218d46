package list

import (
	"context"
	"fmt"
	"net/http"
	"net/url"
	"strings"
)

// ghcr lists through GitHub Packages (docs.github.com/rest/packages): the
// container packages of organisations or users, then their versions.
type ghcr struct {
	c      *client
	owners []string // orgs/NAME, users/NAME
}

func newGHCR(o Options) (Lister, error) {
	c, err := newClient(o, "https://api.github.com")
	if err != nil {
		return nil, err
	}
	c.authorize, c.limit = bearer(o.Secret), "rate limit"
	for _, owner := range o.Within {
		kind, name, _ := strings.Cut(owner, "/")
		if kind != "orgs" && kind != "users" || name == "" || strings.Contains(name, "/") {
			return nil, fmt.Errorf("within %q is neither orgs/NAME nor users/NAME: %w", owner, ErrConfig)
		}
	}
	return &ghcr{c: c, owners: o.Within}, nil
}

func (g *ghcr) Repositories(ctx context.Context, next string) ([]Repository, string, error) {
	at, err := parsePages(next, len(g.owners))
	if err != nil {
		return nil, "", err
	}
	owner := g.owners[at.place]
	query := numbered(at.page, "page", "per_page")
	query.Set("package_type", "container")
	var answer []struct {
		Name string `json:"name"`
	}
	header, err := g.c.get(ctx, "list GitHub packages of "+owner, "/"+owner+"/packages", query, &answer)
	if err != nil {
		return nil, "", err
	}
	_, name, _ := strings.Cut(owner, "/")
	page := make([]Repository, 0, len(answer))
	for _, p := range answer {
		page = append(page, Repository{
			Name:   strings.ToLower(name + "/" + p.Name),
			Handle: "/" + owner + "/packages/container/" + url.PathEscape(p.Name) + "/versions",
		})
	}
	return named(page), at.following(hasNext(header, len(answer)), len(g.owners)), nil
}

func (g *ghcr) Tags(ctx context.Context, r Repository, next string) ([]Tag, string, error) {
	at, err := parsePages(next, 1)
	if err != nil {
		return nil, "", err
	}
	var answer []struct {
		Name     string `json:"name"` // the digest
		Metadata struct {
			Container *struct {
				Tags []string `json:"tags"`
			} `json:"container"`
		} `json:"metadata"`
	}
	what := "list versions of the GitHub package " + r.Name
	header, err := g.c.get(ctx, what, r.Handle, numbered(at.page, "page", "per_page"), &answer)
	if err != nil {
		return nil, "", err
	}
	var page []Tag
	for _, v := range answer {
		if v.Metadata.Container == nil {
			return nil, "", refused(what, "a version has no container metadata")
		}
		for _, t := range v.Metadata.Container.Tags {
			page = append(page, Tag{Name: t, Digest: v.Name})
		}
	}
	return tagged(page), at.following(hasNext(header, len(answer)), 1), nil
}

// hasNext says whether there is a page after this one. The link itself is not
// followed: the next page is the one with the next number.
func hasNext(header http.Header, entries int) bool {
	for _, link := range header.Values("Link") {
		if strings.Contains(link, `rel="next"`) {
			return true
		}
	}
	return entries >= pageSize
}
