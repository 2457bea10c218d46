// Package list lists the repositories and tags of registries: one file for
// each API. An answer that is no whole list is always an error, so that what
// could not be listed is never taken for something that is not there.
package list

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"time"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/registry"
)

// Names of the APIs.
const (
	Distribution = "distribution"
	Harbor       = "harbor"
	GHCR         = "ghcr"
	GitLab       = "gitlab"
	Quay         = "quay"
	ECR          = "ecr"
	GAR          = "gar"
	DockerHub    = "dockerhub"
)

// APIs are the names of all APIs.
func APIs() []string {
	return []string{Distribution, Harbor, GHCR, GitLab, Quay, ECR, GAR, DockerHub}
}

// ErrConfig is returned for options that an API cannot work with.
var ErrConfig = errors.New("the listing API cannot be used like this")

// Repository is one repository of a registry.
type Repository struct {
	Name   string // as in image names, below the registry
	Handle string // what the API calls it
}

// Tag is one tag of a repository.
type Tag struct {
	Name      string
	Digest    string // what it points at; empty: the API does not say
	MediaType string // of the manifest; empty: the API does not say
}

// Lister lists one registry. Next is "" at the beginning; the following one is
// "" after the last page. It can be kept and used by another process.
//
// Errors are those of package registry: ErrThrottled and ErrUnavailable are
// worth another try, the others are facts.
type Lister interface {
	Repositories(ctx context.Context, next string) (page []Repository, following string, err error)
	Tags(ctx context.Context, repository Repository, next string) (page []Tag, following string, err error)
}

// Registry is what is needed of a registry.Client.
type Registry interface {
	ListRepositories(ctx context.Context, registry, next string, limit int) (registry.Listing, error)
	ListTags(ctx context.Context, registry, repository, next string, limit int) (registry.Listing, error)
}

// Options say what is listed and how.
type Options struct {
	API      string
	Registry string   // host[:port]
	URL      string   // of the API; empty: the vendor's
	Within   []string // what of the account is listed; its meaning depends on the API
	Region   string   // of ECR
	Username string
	// Secret returns the password or token as it is now; nil: nobody is named.
	Secret func() (string, error)
	CAFile string // PEM, beside the system's
	// Wait blocks until the next request may be made.
	Wait   func(ctx context.Context) error
	Client Registry         // of Distribution
	Now    func() time.Time // nil: the present
}

// pageSize is how many entries are asked for at once.
const pageSize = 100

// New returns the lister of an API. Nothing is connected to. Errors are ErrConfig.
func New(o Options) (Lister, error) {
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Wait == nil {
		o.Wait = func(ctx context.Context) error { return ctx.Err() }
	}
	open, ok := listers[o.API]
	if !ok {
		return nil, fmt.Errorf("there is no listing API %q: %w", o.API, ErrConfig)
	}
	return open(o)
}

// Check says what is wrong with options, without reading secrets or files.
func Check(o Options) error {
	rule, ok := rules[o.API]
	switch {
	case !ok:
		return fmt.Errorf("api %q is none of %v: %w", o.API, APIs(), ErrConfig)
	case rule.within && len(o.Within) == 0:
		return fmt.Errorf("api %s needs within: %s: %w", o.API, rule.hint, ErrConfig)
	case rule.region && o.Region == "":
		return fmt.Errorf("api %s needs region: %w", o.API, ErrConfig)
	case slices.Contains(o.Within, ""):
		return fmt.Errorf("within has an empty entry: %w", ErrConfig)
	case o.URL != "":
		_, err := base(o.URL, "")
		return err
	}
	return nil
}

// rules are what each API needs to be told.
var rules = map[string]struct {
	within, region bool
	hint           string
}{
	Distribution: {hint: "repositories that are listed instead of those that _catalog names"},
	Harbor:       {hint: "projects"},
	GHCR:         {within: true, hint: "orgs/NAME or users/NAME"},
	GitLab:       {within: true, hint: "groups/PATH or projects/PATH"},
	Quay:         {within: true, hint: "namespaces"},
	ECR:          {region: true, hint: "repositories or prefixes that end at a /"},
	GAR:          {within: true, hint: "projects/PROJECT/locations/LOCATION/repositories/REPOSITORY"},
	DockerHub:    {within: true, hint: "namespaces"},
}

var listers = map[string]func(Options) (Lister, error){
	Distribution: newDistribution,
	Harbor:       newHarbor,
	GHCR:         newGHCR,
	GitLab:       newGitLab,
	Quay:         newQuay,
	ECR:          newECR,
	GAR:          newGAR,
	DockerHub:    newDockerHub,
}

// named leaves out what cannot be the name of a repository: nothing of that
// name can be asked for.
func named(page []Repository) []Repository {
	return slices.DeleteFunc(page, func(r Repository) bool { return !contracts.ValidRepository(r.Name) })
}

// tagged leaves out what cannot be a tag, and digests that are not sha256.
func tagged(page []Tag) []Tag {
	page = slices.DeleteFunc(page, func(t Tag) bool { return !contracts.ValidTag(t.Name) })
	for i := range page {
		if !contracts.ValidDigest(page[i].Digest) {
			page[i].Digest = ""
		}
	}
	return page
}

// refused is the error for an answer that is no list.
func refused(what, detail string) error {
	return &registry.Error{Kind: registry.ErrRefused, What: what, Status: http.StatusOK, Detail: detail}
}

// placeAfter returns where to go on in a listing of several places one after
// the other: at the token of the same place, else at the next of n places; "" at the end.
func placeAfter(place int, token string, n int) string {
	switch {
	case token != "":
		return strconv.Itoa(place) + ":" + token
	case place+1 < n:
		return strconv.Itoa(place+1) + ":"
	}
	return ""
}
