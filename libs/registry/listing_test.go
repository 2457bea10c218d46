package registry

import (
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// everything pages through a listing, at most 50 pages of it.
func everything(t *testing.T, page func(next string) (Listing, error)) (names []string, pages int, err error) {
	t.Helper()
	next := ""
	for range 50 {
		l, err := page(next)
		if err != nil {
			return names, pages, err
		}
		names, pages = append(names, l.Names...), pages+1
		if l.Next == "" {
			return names, pages, nil
		}
		next = l.Next
	}
	return names, pages, errors.New("it does not end")
}

func listServer(t *testing.T, handler http.HandlerFunc) (*Client, string) {
	t.Helper()
	s := httptest.NewServer(handler)
	t.Cleanup(s.Close)
	name := strings.TrimPrefix(s.URL, "http://")
	return newClient(t, Host{Name: name, PlainHTTP: true}), name
}

func TestListTagsOfARegistry(t *testing.T) {
	_, name := olaregServer(t, true)
	c := newClient(t, Host{Name: name, PlainHTTP: true})
	var want []string
	for i := range 25 {
		tag := fmt.Sprintf("v%02d", i)
		pushImage(t, c, name, "team/app", tag)
		want = append(want, tag)
	}
	got, pages, err := everything(t, func(next string) (Listing, error) {
		return c.ListTags(t.Context(), name, "team/app", next, 10)
	})
	if err != nil || !slices.Equal(got, want) || pages != 3 {
		t.Errorf("%d pages, %v, %v", pages, got, err)
	}
}

// Of a link only the query is followed, to the host that was asked.
func TestLinksLeadNowhereElse(t *testing.T) {
	var stranger atomic.Int64
	evil := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { stranger.Add(1) }))
	t.Cleanup(evil.Close)
	c, name := listServer(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		if r.URL.Query().Get("next_page") == "opaque/token=" {
			fmt.Fprint(w, `{"repositories":["b"]}`)
			return
		}
		w.Header().Set("Link", `<`+evil.URL+`/v2/_catalog?next_page=opaque%2Ftoken%3D>; rel="next"`)
		fmt.Fprint(w, `{"repositories":["a"]}`)
	})
	got, _, err := everything(t, func(next string) (Listing, error) {
		return c.ListRepositories(t.Context(), name, next, 100)
	})
	if err != nil || !slices.Equal(got, []string{"a", "b"}) {
		t.Errorf("%v, %v", got, err)
	}
	if stranger.Load() != 0 {
		t.Error("another host was asked")
	}
}

// A link that points at its own page is given to the caller, once a call.
func TestALinkThatPointsAtItself(t *testing.T) {
	var requests atomic.Int64
	c, name := listServer(t, func(w http.ResponseWriter, r *http.Request) {
		requests.Add(1)
		w.Header().Set("Content-Type", "application/json")
		w.Header().Set("Link", `</v2/app/tags/list?last=z>; rel="next"`)
		fmt.Fprint(w, `{"name":"app","tags":[]}`)
	})
	l, err := c.ListTags(t.Context(), name, "app", "last=z", 100)
	if err != nil || l.Next != "last=z" || len(l.Names) != 0 {
		t.Errorf("%+v, %v", l, err)
	}
	if requests.Load() != 1 {
		t.Errorf("%d requests, want 1", requests.Load())
	}
}

// A page that is full and has no link is followed by its last name.
func TestListingWithoutLinks(t *testing.T) {
	all := []string{"a", "b", "c", "d", "e"}
	c, name := listServer(t, func(w http.ResponseWriter, r *http.Request) {
		last := r.URL.Query().Get("last")
		var page []string
		for _, n := range all {
			if n > last && len(page) < 2 {
				page = append(page, `"`+n+`"`)
			}
		}
		w.Header().Set("Content-Type", "application/json")
		fmt.Fprintf(w, `{"name":"app","tags":[%s]}`, strings.Join(page, ","))
	})
	got, pages, err := everything(t, func(next string) (Listing, error) {
		return c.ListTags(t.Context(), name, "app", next, 2)
	})
	if err != nil || !slices.Equal(got, all) || pages != 3 {
		t.Errorf("%d pages, %v, %v", pages, got, err)
	}
}

// Registries that do not heed "last", and send no link: one that heeds "n"
// neither has given everything on its first page, the other cannot be listed.
func TestListingOfWhatDoesNotHeedLast(t *testing.T) {
	for _, tc := range []struct {
		names   int
		heedsN  bool
		refused bool
	}{
		{names: 4},
		{names: 5},
		{names: 6},
		{names: 12},
		{names: 4, heedsN: true},
		{names: 5, heedsN: true},
		{names: 6, heedsN: true, refused: true},
		{names: 12, heedsN: true, refused: true},
	} {
		t.Run(fmt.Sprintf("%d names, heeds n %v", tc.names, tc.heedsN), func(t *testing.T) {
			c, name := listServer(t, func(w http.ResponseWriter, r *http.Request) {
				n, err := strconv.Atoi(r.URL.Query().Get("n"))
				if err != nil || !tc.heedsN {
					n = tc.names
				}
				var page []string
				for i := range min(n, tc.names) {
					page = append(page, fmt.Sprintf(`"v%d"`, 9999-i)) // in no order
				}
				w.Header().Set("Content-Type", "application/json")
				fmt.Fprintf(w, `{"name":"app","tags":[%s]}`, strings.Join(page, ","))
			})
			got, _, err := everything(t, func(next string) (Listing, error) {
				return c.ListTags(t.Context(), name, "app", next, 5)
			})
			slices.Sort(got)
			if tc.refused != errors.Is(err, ErrRefused) || !tc.refused && (err != nil || len(slices.Compact(got)) != tc.names) {
				t.Errorf("%v, %v", got, err)
			}
		})
	}
}

// What is no list is an error, never an empty list.
func TestListingsThatAreNone(t *testing.T) {
	for _, tc := range []struct {
		name    string
		status  int
		header  http.Header
		body    string
		want    error
		nothing bool // a list, without anything in it
	}{
		{name: "empty", status: 200, body: `{"name":"app","tags":[]}`, nothing: true},
		{name: "null", status: 200, body: `{"name":"app","tags":null}`, nothing: true},
		{name: "no list", status: 200, body: `{}`, want: ErrRefused},
		{name: "a page of a portal", status: 200, body: `<html>`, want: ErrRefused},
		{name: "broken off", status: 200, body: `{"name":"app","tags":["1","2`, want: ErrRefused},
		{name: "another type", status: 200, body: `{"name":"app","tags":"1"}`, want: ErrRefused},
		{name: "link without a query", status: 200, header: http.Header{"Link": {`</v2/app/tags/list>; rel=next`}}, body: `{"tags":["1"]}`, want: ErrRefused},
		{name: "gone", status: 404, want: ErrNotFound},
		{name: "closed", status: 403, want: ErrUnauthorized},
		{name: "slow down", status: 429, header: http.Header{"Retry-After": {"120"}}, want: ErrThrottled},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c, name := listServer(t, func(w http.ResponseWriter, _ *http.Request) {
				w.Header().Set("Content-Type", "application/json")
				for k, v := range tc.header {
					w.Header()[k] = v
				}
				w.WriteHeader(tc.status)
				fmt.Fprint(w, tc.body)
			})
			l, err := c.ListTags(t.Context(), name, "app", "", 100)
			if tc.nothing {
				if err != nil || len(l.Names) != 0 || l.Next != "" {
					t.Errorf("%+v, %v", l, err)
				}
				return
			}
			if !errors.Is(err, tc.want) {
				t.Errorf("%+v, %v; want %v", l, err, tc.want)
			}
			var e *Error
			if errors.Is(tc.want, ErrThrottled) && (!errors.As(err, &e) || e.After != 2*time.Minute) {
				t.Errorf("%v does not say when to try again", err)
			}
		})
	}
}

func TestListRepositoriesKeepsToThePrefixes(t *testing.T) {
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		fmt.Fprint(w, `{"repositories":["team/a","other/b","team"]}`)
	}))
	t.Cleanup(s.Close)
	name := strings.TrimPrefix(s.URL, "http://")
	c := newClient(t, Host{Name: name, PlainHTTP: true, PathPrefixes: []string{"team"}})
	l, err := c.ListRepositories(t.Context(), name, "", 100)
	if err != nil || !slices.Equal(l.Names, []string{"team/a", "team"}) {
		t.Errorf("%+v, %v", l, err)
	}
	if _, err := c.ListRepositories(t.Context(), "elsewhere.example.com", "", 100); !errors.Is(err, ErrNotConfigured) {
		t.Errorf("a registry that is not configured: %v", err)
	}
}

func FuzzNextQuery(f *testing.F) {
	for _, s := range []string{
		`</v2/_catalog?last=b&n=10>; rel="next"`, `<https://r.example.com/v2/a/tags/list?next_page=x>; rel=next`,
		`<a?b>; rel="prev", <c?d>; title="x;y"; rel="first next"`, `<`, `<>;rel=next`, `<%zz?>;rel=next`, ``,
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, header string) {
		query, ok, err := nextQuery([]string{header})
		if err != nil && ok {
			t.Error("an error and a link")
		}
		if ok && (query == "" || !strings.Contains(header, query)) {
			t.Errorf("query %q is not one of %q", query, header)
		}
	})
}

func FuzzNames(f *testing.F) {
	for _, s := range []string{`{"tags":["a"]}`, `{"tags":null}`, `{}`, `[]`, `{"tags":{"a":1}}`, `{"tags":["a"`} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		list, err := names(body, "tags")
		if err != nil && list != nil {
			t.Errorf("%v and %v", list, err)
		}
		if err != nil && !errors.Is(err, ErrRefused) {
			t.Errorf("%v", err)
		}
	})
}
