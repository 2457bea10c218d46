package list

import (
	"context"
	"net/url"
	"strings"
)

// quay lists through Quay's API (docs.quay.io/api/swagger): the repositories
// of namespaces, then their active tags.
type quay struct {
	c          *client
	namespaces []string
}

func newQuay(o Options) (Lister, error) {
	c, err := newClient(o, "https://"+o.Registry)
	if err != nil {
		return nil, err
	}
	c.authorize = bearer(o.Secret)
	return &quay{c: c, namespaces: o.Within}, nil
}

func (q *quay) Repositories(ctx context.Context, next string) ([]Repository, string, error) {
	number, token, _ := strings.Cut(next, ":")
	place := 0
	if next != "" {
		at, err := parsePages(number+":1", len(q.namespaces))
		if err != nil {
			return nil, "", err
		}
		place = at.place
	}
	query := url.Values{"namespace": {q.namespaces[place]}}
	if token != "" {
		query.Set("next_page", token)
	}
	var answer struct {
		Repositories *[]struct {
			Namespace string `json:"namespace"`
			Name      string `json:"name"`
			Kind      string `json:"kind"` // image, application
		} `json:"repositories"`
		NextPage string `json:"next_page"`
	}
	what := "list Quay's repositories of " + q.namespaces[place]
	if _, err := q.c.get(ctx, what, "/api/v1/repository", query, &answer); err != nil {
		return nil, "", err
	}
	if answer.Repositories == nil {
		return nil, "", refused(what, "its answer holds no repositories")
	}
	page := make([]Repository, 0, len(*answer.Repositories))
	for _, r := range *answer.Repositories {
		if r.Kind == "" || r.Kind == "image" {
			page = append(page, Repository{Name: r.Namespace + "/" + r.Name})
		}
	}
	return named(page), placeAfter(place, answer.NextPage, len(q.namespaces)), nil
}

func (q *quay) Tags(ctx context.Context, r Repository, next string) ([]Tag, string, error) {
	at, err := parsePages(next, 1)
	if err != nil {
		return nil, "", err
	}
	query := numbered(at.page, "page", "limit")
	query.Set("onlyActiveTags", "true")
	var answer struct {
		Tags *[]struct {
			Name           string `json:"name"`
			ManifestDigest string `json:"manifest_digest"`
		} `json:"tags"`
		HasAdditional bool `json:"has_additional"`
	}
	what := "list Quay's tags of " + r.Name
	if _, err := q.c.get(ctx, what, "/api/v1/repository/"+r.Name+"/tag/", query, &answer); err != nil {
		return nil, "", err
	}
	if answer.Tags == nil {
		return nil, "", refused(what, "its answer holds no tags")
	}
	page := make([]Tag, 0, len(*answer.Tags))
	for _, t := range *answer.Tags {
		page = append(page, Tag{Name: t.Name, Digest: t.ManifestDigest})
	}
	return tagged(page), at.following(answer.HasAdditional, 1), nil
}
