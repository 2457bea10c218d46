package registry

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/regclient/regclient"
	"github.com/regclient/regclient/scheme"

	"github.com/tidewaiter/tidewaiter/contracts"
)

// Listing is one page of names, as the registry wrote them: they are not checked.
type Listing struct {
	Names []string
	// Next continues the listing, also in another process; empty: this was the last page.
	Next string
}

// ListRepositories returns a page of the registry's repositories, of about
// limit names, from where next (of the page before; "": the beginning) says
// (distribution's "catalog" endpoint; distribution-spec leaves it out, and many
// registries close it: ErrNotFound or ErrUnauthorized). Repositories outside of
// the host's PathPrefixes are left out.
func (c *Client) ListRepositories(ctx context.Context, registry, next string, limit int) (Listing, error) {
	h := c.hosts[normalize(registry)]
	if h == nil {
		return Listing{}, fmt.Errorf("registry %q: %w: add it under registries: in the configuration", registry, ErrNotConfigured)
	}
	page, err := h.list(ctx, "list repositories of "+registry, "repositories", next, limit, func(ctx context.Context, rc *regclient.RegClient) ([]byte, error) {
		l, err := rc.RepoList(ctx, h.name, scheme.WithRepoLimit(limit))
		if err != nil {
			return nil, err
		}
		return l.RawBody()
	})
	kept := page.Names[:0]
	for _, name := range page.Names {
		if under(name, h.cfg.PathPrefixes) {
			kept = append(kept, name)
		}
	}
	page.Names = kept
	return page, err
}

// ListTags returns a page of a repository's tags, of about limit names, from
// where next (of the page before; "": the beginning) says (distribution-spec,
// "Listing Tags").
func (c *Client) ListTags(ctx context.Context, registry, repository, next string, limit int) (Listing, error) {
	if !contracts.ValidRepository(repository) {
		return Listing{}, fmt.Errorf("repository %q: %w", repository, ErrInvalidName)
	}
	h, err := c.host(registry, repository)
	if err != nil {
		return Listing{}, err
	}
	return h.list(ctx, "list tags of "+registry+"/"+repository, "tags", next, limit, func(ctx context.Context, rc *regclient.RegClient) ([]byte, error) {
		l, err := rc.TagList(ctx, h.repo(Ref{Repository: repository}), scheme.WithTagLimit(limit))
		if err != nil {
			return nil, err
		}
		return l.RawBody()
	})
}

// list asks for one page. Of the link to the next one only the query is
// followed, to the same path of the same host.
func (h *host) list(ctx context.Context, what, field, next string, limit int,
	ask func(ctx context.Context, rc *regclient.RegClient) ([]byte, error),
) (Listing, error) {
	var page Listing
	o := &op{kind: opList, query: next}
	err := h.do(ctx, what, o, smallTimeout, tries, func(ctx context.Context, rc *regclient.RegClient) error {
		body, err := ask(ctx, rc)
		if err != nil {
			return err
		}
		page.Names, err = names(body, field)
		return err
	})
	if err != nil {
		return Listing{}, err
	}
	query, linked, err := nextQuery(o.linked())
	if err != nil {
		return Listing{}, &Error{Kind: ErrRefused, What: what, Detail: err.Error()}
	}
	last, asked := guess(next, limit)
	switch n := len(page.Names); {
	case linked:
		page.Next = query
	case last != "" && slices.Contains(page.Names, last):
		// It does not heed "last". What is shorter than asked for is all there is.
		if n >= asked {
			return Listing{}, &Error{Kind: ErrRefused, What: what, Detail: "it neither links to the next page nor gives what comes after a name"}
		}
	case n > 0 && (n == limit || n == asked):
		// A registry need not send a link (distribution-spec, "Listing Tags": "last").
		// One more is asked for, to know a registry that does not heed this either.
		page.Next = url.Values{"last": {page.Names[n-1]}, "n": {strconv.Itoa(limit + 1)}}.Encode()
	}
	return page, nil
}

// guess reads after which name a query has a page begin, "" for none, and how
// many names it asks for.
func guess(query string, limit int) (last string, n int) {
	q, err := url.ParseQuery(query)
	if err != nil {
		return "", limit // a registry's own link
	}
	if n, err = strconv.Atoi(q.Get("n")); err != nil {
		n = limit
	}
	return q.Get("last"), n
}

// names reads one page. An answer without the list is no empty list.
func names(body []byte, field string) ([]string, error) {
	var v map[string]json.RawMessage
	if err := json.Unmarshal(body, &v); err != nil {
		return nil, &Error{Kind: ErrRefused, Detail: "its answer is not JSON"}
	}
	raw, ok := v[field]
	if !ok {
		return nil, &Error{Kind: ErrRefused, Detail: "its answer holds no list of " + field}
	}
	var list []string
	if err := json.Unmarshal(raw, &list); err != nil {
		return nil, &Error{Kind: ErrRefused, Detail: "its list of " + field + " is none"}
	}
	return list, nil
}

var linkPattern = regexp.MustCompile(`<([^<>]*)>((?:\s*;\s*[^,;<>"]+(?:"[^"]*")?)*)`)

// nextQuery returns the query of the link to the next page (RFC 8288).
func nextQuery(headers []string) (query string, ok bool, err error) {
	for _, header := range headers {
		for _, m := range linkPattern.FindAllStringSubmatch(header, -1) {
			if !relNext(m[2]) {
				continue
			}
			u, err := url.Parse(m[1])
			if err != nil || u.RawQuery == "" {
				return "", false, fmt.Errorf("its link to the next page leads nowhere")
			}
			return u.RawQuery, true, nil
		}
	}
	return "", false, nil
}

// relNext says whether a link's parameters have the relation "next".
func relNext(parameters string) bool {
	for _, p := range strings.Split(parameters, ";") {
		name, value, _ := strings.Cut(strings.TrimSpace(p), "=")
		if !strings.EqualFold(strings.TrimSpace(name), "rel") {
			continue
		}
		for _, rel := range strings.Fields(strings.Trim(strings.TrimSpace(value), `"`)) {
			if strings.EqualFold(rel, "next") {
				return true
			}
		}
	}
	return false
}

// continued returns the request for the page that the operation asks for.
func (o *op) continued(req *http.Request) *http.Request {
	if o == nil || o.kind != opList || o.query == "" || !listPath(req.URL.Path) {
		return req
	}
	req = req.Clone(req.Context())
	req.URL.RawQuery = o.query
	return req
}

// keepLink takes the link to the next page out of an answer: regclient would
// follow it, wherever and however often it leads.
func (o *op) keepLink(req *http.Request, resp *http.Response) {
	if o == nil || o.kind != opList || !listPath(req.URL.Path) {
		return
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	o.link = resp.Header.Values("Link")
	resp.Header.Del("Link")
}

func (o *op) linked() []string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.link
}

func listPath(path string) bool {
	return strings.HasSuffix(path, "/_catalog") || strings.HasSuffix(path, "/tags/list")
}
