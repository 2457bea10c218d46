package list

import (
	"context"
	"errors"

	"github.com/tidewaiter/tidewaiter/libs/registry"
)

// distribution lists through the registry itself: distribution's catalog and
// distribution-spec's "Listing Tags". Within replaces the catalog where that
// is closed.
type distribution struct{ o Options }

// registryPage is larger than vendors' pages: it holds names only.
const registryPage = 500

func newDistribution(o Options) (Lister, error) { return &distribution{o}, nil }

func (d *distribution) Repositories(ctx context.Context, next string) ([]Repository, string, error) {
	if len(d.o.Within) > 0 {
		var page []Repository
		for _, name := range d.o.Within {
			page = append(page, Repository{Name: name})
		}
		return named(page), "", nil
	}
	if err := d.o.Wait(ctx); err != nil {
		return nil, "", err
	}
	l, err := d.o.Client.ListRepositories(ctx, d.o.Registry, next, registryPage)
	if err != nil {
		return nil, "", err
	}
	page := make([]Repository, 0, len(l.Names))
	for _, name := range l.Names {
		page = append(page, Repository{Name: name})
	}
	return named(page), l.Next, nil
}

func (d *distribution) Tags(ctx context.Context, r Repository, next string) ([]Tag, string, error) {
	if err := d.o.Wait(ctx); err != nil {
		return nil, "", err
	}
	l, err := d.o.Client.ListTags(ctx, d.o.Registry, r.Name, next, registryPage)
	if next == "" && len(d.o.Within) == 0 && errors.Is(err, registry.ErrNotFound) {
		// Distribution's catalog names repositories that have no tags, and does not
		// know them when these are listed (NAME_UNKNOWN).
		return nil, "", nil
	}
	if err != nil {
		return nil, "", err
	}
	page := make([]Tag, 0, len(l.Names))
	for _, name := range l.Names {
		page = append(page, Tag{Name: name})
	}
	return tagged(page), l.Next, nil
}
