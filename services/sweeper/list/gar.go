package list

import (
	"context"
	"fmt"
	"net/http"
	"net/url"
	"regexp"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/oauth2"
	"golang.org/x/oauth2/google"

	"github.com/tidewaiter/tidewaiter/libs/registry"
)

// garScope is enough to list (Artifact Registry REST reference, packages.list).
const garScope = "https://www.googleapis.com/auth/cloud-platform.read-only"

// garPage is the largest page that packages.list gives.
const garPage = 1000

var garRepository = regexp.MustCompile(`^projects/([^/]+)/locations/[^/]+/repositories/([^/]+)$`)

// gar lists through the Artifact Registry REST API, v1: the packages of
// repositories (each an image name), then their tags.
type gar struct {
	c            *client
	repositories []string
	secret       func() (string, error)

	mu     sync.Mutex
	source oauth2.TokenSource // application default credentials, or those of a key
	key    string             // that source was made from
}

func newGAR(o Options) (Lister, error) {
	c, err := newClient(o, "https://artifactregistry.googleapis.com")
	if err != nil {
		return nil, err
	}
	for _, r := range o.Within {
		if !garRepository.MatchString(r) {
			return nil, fmt.Errorf("within %q is not projects/PROJECT/locations/LOCATION/repositories/REPOSITORY: %w", r, ErrConfig)
		}
	}
	g := &gar{c: c, repositories: o.Within, secret: o.Secret}
	c.authorize = g.authorize
	return g, nil
}

// authorize sets an access token: the secret where that is one, one made from
// it where it is a service account's key, or one of the default credentials.
func (g *gar) authorize(ctx context.Context, h http.Header) error {
	secret := ""
	if g.secret != nil {
		var err error
		if secret, err = g.secret(); err != nil {
			return err
		}
	}
	if secret != "" && !strings.HasPrefix(secret, "{") {
		h.Set("Authorization", "Bearer "+secret)
		return nil
	}
	source, err := g.tokens(ctx, secret)
	if err != nil {
		return err
	}
	token, err := source.Token()
	if err != nil {
		return &registry.Error{Kind: registry.ErrUnauthorized, What: "get an access token of Google", Detail: "no token was given; check the credentials"}
	}
	token.SetAuthHeader(&http.Request{Header: h})
	return nil
}

// tokens returns where tokens come from; a key that changes is read anew.
func (g *gar) tokens(ctx context.Context, key string) (oauth2.TokenSource, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.source != nil && g.key == key {
		return g.source, nil
	}
	ctx = context.WithValue(context.WithoutCancel(ctx), oauth2.HTTPClient, g.c.http)
	if key != "" {
		config, err := google.JWTConfigFromJSON([]byte(key), garScope)
		if err != nil {
			return nil, fmt.Errorf("the secret is neither an access token nor a service account's key: %w", ErrConfig)
		}
		g.source, g.key = config.TokenSource(ctx), key
		return g.source, nil
	}
	credentials, err := google.FindDefaultCredentials(ctx, garScope)
	if err != nil {
		return nil, fmt.Errorf("find Google's application default credentials, as no secret is named: %w: %w", err, ErrConfig)
	}
	g.source, g.key = credentials.TokenSource, key
	return g.source, nil
}

func (g *gar) Repositories(ctx context.Context, next string) ([]Repository, string, error) {
	number, token, _ := strings.Cut(next, ":")
	place := 0
	if next != "" {
		at, err := parsePages(number+":1", len(g.repositories))
		if err != nil {
			return nil, "", err
		}
		place = at.place
	}
	parent := g.repositories[place]
	m := garRepository.FindStringSubmatch(parent)
	// A project of a domain is domain:name, in image names domain/name.
	prefix := strings.ReplaceAll(m[1], ":", "/") + "/" + m[2] + "/"
	var answer struct {
		Packages []struct {
			Name string `json:"name"`
		} `json:"packages"` // absent: none
		NextPageToken string `json:"nextPageToken"`
	}
	what := "list Artifact Registry's packages of " + parent
	if _, err := g.c.get(ctx, what, "/v1/"+parent+"/packages", tokenPage(token), &answer); err != nil {
		return nil, "", err
	}
	page := make([]Repository, 0, len(answer.Packages))
	for _, p := range answer.Packages {
		id, ok := strings.CutPrefix(p.Name, parent+"/packages/")
		name, err := url.PathUnescape(id)
		if !ok || err != nil {
			return nil, "", refused(what, "a package is of another repository")
		}
		page = append(page, Repository{Name: prefix + name, Handle: parent + "/packages/" + url.PathEscape(name)})
	}
	return named(page), placeAfter(place, answer.NextPageToken, len(g.repositories)), nil
}

func (g *gar) Tags(ctx context.Context, r Repository, next string) ([]Tag, string, error) {
	var answer struct {
		Tags []struct {
			Name    string `json:"name"`    // …/tags/TAG
			Version string `json:"version"` // …/versions/DIGEST
		} `json:"tags"` // absent: none
		NextPageToken string `json:"nextPageToken"`
	}
	what := "list Artifact Registry's tags of " + r.Name
	if _, err := g.c.get(ctx, what, "/v1/"+r.Handle+"/tags", tokenPage(next), &answer); err != nil {
		return nil, "", err
	}
	page := make([]Tag, 0, len(answer.Tags))
	for _, t := range answer.Tags {
		_, name, ok := strings.Cut(t.Name, "/tags/")
		if !ok {
			return nil, "", refused(what, "a tag has no name")
		}
		_, digest, _ := strings.Cut(t.Version, "/versions/")
		page = append(page, Tag{Name: name, Digest: digest})
	}
	return tagged(page), answer.NextPageToken, nil
}

func tokenPage(token string) url.Values {
	query := url.Values{"pageSize": {strconv.Itoa(garPage)}}
	if token != "" {
		query.Set("pageToken", token)
	}
	return query
}
