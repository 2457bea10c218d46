package list

import (
	"context"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"strings"
)

// harbor lists through Harbor's API v2 (api/v2.0/swagger.yaml): repositories,
// of projects or of all, then the artifacts of each with their tags.
type harbor struct {
	c      *client
	places []string // paths of lists of repositories
}

func newHarbor(o Options) (Lister, error) {
	c, err := newClient(o, "https://"+o.Registry)
	if err != nil {
		return nil, err
	}
	c.authorize = basic(o)
	h := &harbor{c: c, places: []string{"/api/v2.0/repositories"}}
	if len(o.Within) > 0 {
		h.places = nil
		for _, project := range o.Within {
			h.places = append(h.places, "/api/v2.0/projects/"+url.PathEscape(project)+"/repositories")
		}
	}
	return h, nil
}

// basic authorizes with user name and password (RFC 7617).
func basic(o Options) func(context.Context, http.Header) error {
	if o.Secret == nil {
		return nil
	}
	return func(_ context.Context, h http.Header) error {
		password, err := o.Secret()
		if err != nil {
			return err
		}
		r := http.Request{Header: h}
		r.SetBasicAuth(o.Username, password)
		return nil
	}
}

type harborRepository struct {
	Name string `json:"name"` // project/repository
}

func (h *harbor) Repositories(ctx context.Context, next string) ([]Repository, string, error) {
	at, err := parsePages(next, len(h.places))
	if err != nil {
		return nil, "", err
	}
	var answer []harborRepository
	what := "list Harbor's repositories"
	header, err := h.c.get(ctx, what, h.places[at.place], numbered(at.page, "page", "page_size"), &answer)
	if err != nil {
		return nil, "", err
	}
	more, err := counted(what, header.Get("X-Total-Count"), at.page, len(answer))
	if err != nil {
		return nil, "", err
	}
	page := make([]Repository, 0, len(answer))
	for _, r := range answer {
		page = append(page, Repository{Name: r.Name})
	}
	return named(page), at.following(more, len(h.places)), nil
}

type harborArtifact struct {
	Digest            string `json:"digest"`
	ManifestMediaType string `json:"manifest_media_type"`
	Tags              []struct {
		Name string `json:"name"`
	} `json:"tags"` // null: it has none
}

func (h *harbor) Tags(ctx context.Context, r Repository, next string) ([]Tag, string, error) {
	at, err := parsePages(next, 1)
	if err != nil {
		return nil, "", err
	}
	project, name, ok := strings.Cut(r.Name, "/")
	if !ok {
		return nil, "", fmt.Errorf("repository %q is in no project: %w", r.Name, ErrConfig)
	}
	// A slash in a repository's name is escaped twice (swagger: "repository_name").
	path := "/api/v2.0/projects/" + url.PathEscape(project) + "/repositories/" + url.PathEscape(url.PathEscape(name)) + "/artifacts"
	query := numbered(at.page, "page", "page_size")
	query.Set("with_tag", "true")
	var answer []harborArtifact
	what := "list Harbor's artifacts of " + r.Name
	header, err := h.c.get(ctx, what, path, query, &answer)
	if err != nil {
		return nil, "", err
	}
	more, err := counted(what, header.Get("X-Total-Count"), at.page, len(answer))
	if err != nil {
		return nil, "", err
	}
	var page []Tag
	for _, a := range answer {
		for _, t := range a.Tags {
			page = append(page, Tag{Name: t.Name, Digest: a.Digest, MediaType: a.ManifestMediaType})
		}
	}
	return tagged(page), at.following(more, 1), nil
}

// numbered is the query for one page of pageSize entries.
func numbered(page int, number, size string) url.Values {
	return url.Values{number: {strconv.Itoa(page)}, size: {strconv.Itoa(pageSize)}}
}

// counted says whether there is a page after this one, from the total that the
// answer names. A page with less than there should be was cut short.
func counted(what, total string, page, entries int) (more bool, err error) {
	n, err := strconv.Atoi(total)
	if total == "" || err != nil {
		return entries >= pageSize, nil
	}
	if entries < min(pageSize, n-(page-1)*pageSize) {
		return false, refused(what, fmt.Sprintf("page %d has %d entries, and there are %d in all", page, entries, n))
	}
	return page*pageSize < n, nil
}
