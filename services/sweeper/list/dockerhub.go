package list

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"

	"github.com/tidewaiter/tidewaiter/libs/registry"
)

// hubTokenAge is how long an access token of Docker Hub is used: they live for
// ten minutes.
const hubTokenAge = 5 * time.Minute

// dockerHub lists through Docker Hub's API (docs.docker.com/reference/api/hub):
// the repositories of namespaces, then their tags.
type dockerHub struct {
	c          *client
	o          Options
	namespaces []string

	mu    sync.Mutex
	token string
	until time.Time
}

func newDockerHub(o Options) (Lister, error) {
	c, err := newClient(o, "https://hub.docker.com")
	if err != nil {
		return nil, err
	}
	if o.Secret != nil && o.Username == "" {
		return nil, fmt.Errorf("api dockerhub needs username beside the secret: %w", ErrConfig)
	}
	d := &dockerHub{c: c, o: o, namespaces: o.Within}
	if o.Secret != nil {
		c.authorize = d.authorize
	}
	return d, nil
}

// authorize sets an access token, which is given for user name and secret.
func (d *dockerHub) authorize(ctx context.Context, h http.Header) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.token == "" || d.o.Now().After(d.until) {
		secret, err := d.o.Secret()
		if err != nil {
			return err
		}
		body, err := json.Marshal(map[string]string{"identifier": d.o.Username, "secret": secret})
		if err != nil {
			return fmt.Errorf("encode credentials: %w", err)
		}
		var answer struct {
			AccessToken string `json:"access_token"`
		}
		what := "log in to Docker Hub"
		if _, err := d.c.do(ctx, what, http.MethodPost, "/v2/auth/token", nil, bytes.NewReader(body), &answer, false); err != nil {
			return err
		}
		if answer.AccessToken == "" {
			return refused(what, "its answer holds no token")
		}
		d.token, d.until = answer.AccessToken, d.o.Now().Add(hubTokenAge)
	}
	h.Set("Authorization", "Bearer "+d.token)
	return nil
}

// get is the client's, with a new token if the old one is not taken any more.
func (d *dockerHub) get(ctx context.Context, what, path string, query url.Values, into any) error {
	_, err := d.c.get(ctx, what, path, query, into)
	var e *registry.Error
	if d.o.Secret == nil || !errors.As(err, &e) || e.Status != http.StatusUnauthorized {
		return err
	}
	d.mu.Lock()
	d.token = ""
	d.mu.Unlock()
	_, err = d.c.get(ctx, what, path, query, into)
	return err
}

func (d *dockerHub) Repositories(ctx context.Context, next string) ([]Repository, string, error) {
	at, err := parsePages(next, len(d.namespaces))
	if err != nil {
		return nil, "", err
	}
	namespace := d.namespaces[at.place]
	var answer struct {
		Next    *string `json:"next"`
		Results *[]struct {
			Name string `json:"name"`
		} `json:"results"`
	}
	what := "list Docker Hub's repositories of " + namespace
	if err := d.get(ctx, what, "/v2/namespaces/"+url.PathEscape(namespace)+"/repositories", numbered(at.page, "page", "page_size"), &answer); err != nil {
		return nil, "", err
	}
	if answer.Results == nil {
		return nil, "", refused(what, "its answer holds no results")
	}
	page := make([]Repository, 0, len(*answer.Results))
	for _, r := range *answer.Results {
		page = append(page, Repository{Name: namespace + "/" + r.Name})
	}
	return named(page), at.following(said(answer.Next), len(d.namespaces)), nil
}

func (d *dockerHub) Tags(ctx context.Context, r Repository, next string) ([]Tag, string, error) {
	at, err := parsePages(next, 1)
	if err != nil {
		return nil, "", err
	}
	namespace, name, ok := strings.Cut(r.Name, "/")
	if !ok {
		return nil, "", fmt.Errorf("repository %q is in no namespace: %w", r.Name, ErrConfig)
	}
	var answer struct {
		Next    *string `json:"next"`
		Results *[]struct {
			Name      string `json:"name"`
			Digest    string `json:"digest"` // absent of old tags
			MediaType string `json:"media_type"`
		} `json:"results"`
	}
	what := "list Docker Hub's tags of " + r.Name
	path := "/v2/namespaces/" + url.PathEscape(namespace) + "/repositories/" + url.PathEscape(name) + "/tags"
	if err := d.get(ctx, what, path, numbered(at.page, "page", "page_size"), &answer); err != nil {
		return nil, "", err
	}
	if answer.Results == nil {
		return nil, "", refused(what, "its answer holds no results")
	}
	page := make([]Tag, 0, len(*answer.Results))
	for _, t := range *answer.Results {
		page = append(page, Tag{Name: t.Name, Digest: t.Digest, MediaType: t.MediaType})
	}
	return tagged(page), at.following(said(answer.Next), 1), nil
}

func said(s *string) bool { return s != nil && *s != "" }
