package list

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/registry"
)

// content is what every fake registry holds: tags and their digests by repository.
type content map[string]map[string]string

// holding returns n tags in one repository and a few in others.
func holding(names []string, n int) content {
	c := content{}
	for i, name := range names {
		c[name] = map[string]string{}
		for k := range n - i*n/len(names) {
			tag := fmt.Sprintf("v%04d", k)
			c[name][tag] = contracts.DigestOf([]byte(name + tag))
		}
	}
	return c
}

func (c content) repositories() []string { return slices.Sorted(maps.Keys(c)) }

func (c content) tags(repository string) []string { return slices.Sorted(maps.Keys(c[repository])) }

// numberedPage cuts a page out of a list by the query's page and size.
func numberedPage[T any](r *http.Request, all []T, number, size string) (page []T, more bool) {
	n, _ := strconv.Atoi(r.URL.Query().Get(number))
	s, _ := strconv.Atoi(r.URL.Query().Get(size))
	from := min((n-1)*s, len(all))
	to := min(from+s, len(all))
	return all[from:to], to < len(all)
}

// tokenedPage cuts a page out of a list by an opaque token.
func tokenedPage[T any](token string, size int, all []T) (page []T, next string) {
	from, _ := strconv.Atoi(strings.TrimPrefix(token, "opaque/+"))
	to := min(from+size, len(all))
	if to < len(all) {
		next = "opaque/+" + strconv.Itoa(to)
	}
	return all[from:to], next
}

func write(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(v)
}

type object = map[string]any

// fake is one vendor's API, as it is documented.
type fake struct {
	api      string
	within   []string
	username string
	secret   string
	names    []string // repositories as in image names
	digests  bool     // whether its lists say what tags point at
	authed   func(r *http.Request) bool
	serve    func(c content, w http.ResponseWriter, r *http.Request)
}

func hasBearer(token string) func(r *http.Request) bool {
	return func(r *http.Request) bool { return r.Header.Get("Authorization") == "Bearer "+token }
}

func fakes() []fake {
	return []fake{
		{
			api: Harbor, within: []string{"team", "other"}, username: "robot$sweep", secret: "s3cret", digests: true,
			names: []string{"team/app", "team/sub/dir", "other/app"},
			authed: func(r *http.Request) bool {
				u, p, _ := r.BasicAuth()
				return u == "robot$sweep" && p == "s3cret"
			},
			serve: serveHarbor,
		},
		{
			api: GHCR, within: []string{"orgs/Acme", "users/jo"}, secret: "ghp_s3cret", digests: true,
			names: []string{"acme/app", "acme/sub/tool", "jo/thing"}, authed: hasBearer("ghp_s3cret"), serve: serveGHCR,
		},
		{
			api: GitLab, within: []string{"groups/team/sub", "projects/other/app"}, secret: "glpat-s3cret",
			names:  []string{"team/sub/app", "team/sub/app/image", "other/app"},
			authed: func(r *http.Request) bool { return r.Header.Get("Private-Token") == "glpat-s3cret" }, serve: serveGitLab,
		},
		{
			api: Quay, within: []string{"team", "other"}, secret: "oauth-s3cret", digests: true,
			names: []string{"team/app", "team/tool", "other/app"}, authed: hasBearer("oauth-s3cret"), serve: serveQuay,
		},
		{
			api: GAR, within: []string{"projects/acme/locations/europe/repositories/images", "projects/corp.example:p2/locations/us/repositories/r"},
			secret: "ya29.s3cret", digests: true,
			names: []string{"acme/images/app", "acme/images/sub/tool", "corp.example/p2/r/app"}, authed: hasBearer("ya29.s3cret"), serve: serveGAR,
		},
		{
			api: DockerHub, within: []string{"acme"}, username: "jo", secret: "dckr_pat_s3cret", digests: true,
			names: []string{"acme/app", "acme/tool"}, authed: hasBearer("a-jwt"), serve: serveDockerHub,
		},
	}
}

func serveHarbor(c content, w http.ResponseWriter, r *http.Request) {
	parts := strings.Split(strings.TrimPrefix(r.URL.EscapedPath(), "/api/v2.0/projects/"), "/")
	total := func(n int) { w.Header().Set("X-Total-Count", strconv.Itoa(n)) }
	switch {
	case len(parts) == 2 && parts[1] == "repositories":
		all := slices.DeleteFunc(c.repositories(), func(s string) bool { return !strings.HasPrefix(s, parts[0]+"/") })
		page, _ := numberedPage(r, all, "page", "page_size")
		out := []object{}
		for _, name := range page {
			out = append(out, object{"name": name, "artifact_count": 3})
		}
		total(len(all))
		write(w, out)
	case len(parts) == 4 && parts[3] == "artifacts" && r.URL.Query().Get("with_tag") == "true":
		once, _ := url.PathUnescape(parts[2])
		twice, _ := url.PathUnescape(once)
		tags := c.tags(parts[0] + "/" + twice)
		page, _ := numberedPage(r, tags, "page", "page_size")
		out := []object{}
		for i, tag := range page {
			var list []object
			if list = append(list, object{"name": tag, "push_time": "2026-05-04T03:02:01.000Z"}); i%10 == 9 {
				out = append(out, object{"digest": "sha256:" + strings.Repeat("0", 64), "type": "IMAGE", "tags": nil})
			}
			out = append(out, object{
				"digest": c[parts[0]+"/"+twice][tag], "type": "IMAGE", "tags": list,
				"manifest_media_type": "application/vnd.oci.image.manifest.v1+json",
			})
		}
		total(len(tags))
		write(w, out)
	default:
		http.NotFound(w, r)
	}
}

func linkNext(w http.ResponseWriter, r *http.Request, more bool) {
	if more {
		w.Header().Set("Link", `<https://elsewhere.example.com`+r.URL.Path+`?page=99>; rel="next", <x>; rel="last"`)
	}
}

func serveGHCR(c content, w http.ResponseWriter, r *http.Request) {
	parts := strings.Split(strings.TrimPrefix(r.URL.EscapedPath(), "/"), "/")
	owner := strings.ToLower(parts[1])
	switch {
	case len(parts) == 3 && parts[2] == "packages" && r.URL.Query().Get("package_type") == "container":
		all := slices.DeleteFunc(c.repositories(), func(s string) bool { return !strings.HasPrefix(s, owner+"/") })
		page, more := numberedPage(r, all, "page", "per_page")
		out := []object{}
		for _, name := range page {
			out = append(out, object{"id": 1, "name": strings.TrimPrefix(name, owner+"/"), "package_type": "container"})
		}
		linkNext(w, r, more)
		write(w, out)
	case len(parts) == 6 && parts[5] == "versions":
		name, _ := url.PathUnescape(parts[4])
		tags := c.tags(owner + "/" + name)
		page, more := numberedPage(r, tags, "page", "per_page")
		out := []object{}
		for _, tag := range page {
			out = append(out, object{
				"id": 7, "name": c[owner+"/"+name][tag],
				"metadata": object{"package_type": "container", "container": object{"tags": []string{tag}}},
			})
		}
		linkNext(w, r, more)
		write(w, out)
	default:
		http.NotFound(w, r)
	}
}

func serveGitLab(c content, w http.ResponseWriter, r *http.Request) {
	all := c.repositories()
	parts := strings.Split(strings.TrimPrefix(r.URL.EscapedPath(), "/api/v4/"), "/")
	next := func(more bool) {
		v := ""
		if more {
			n, _ := strconv.Atoi(r.URL.Query().Get("page"))
			v = strconv.Itoa(n + 1)
		}
		w.Header().Set("X-Next-Page", v)
	}
	switch {
	case len(parts) == 4 && parts[3] == "repositories":
		path, _ := url.PathUnescape(parts[1])
		below := slices.DeleteFunc(slices.Clone(all), func(s string) bool { return s != path && !strings.HasPrefix(s, path+"/") })
		page, more := numberedPage(r, below, "page", "per_page")
		out := []object{}
		for _, name := range page {
			out = append(out, object{"id": slices.Index(all, name) + 1, "project_id": 42, "name": "", "path": name, "location": "registry.example.com/" + name})
		}
		next(more)
		write(w, out)
	case len(parts) == 6 && parts[1] == "42" && parts[5] == "tags":
		id, _ := strconv.Atoi(parts[4])
		page, more := numberedPage(r, c.tags(all[id-1]), "page", "per_page")
		out := []object{}
		for _, tag := range page {
			out = append(out, object{"name": tag, "path": all[id-1] + ":" + tag})
		}
		next(more)
		write(w, out)
	default:
		http.NotFound(w, r)
	}
}

func serveQuay(c content, w http.ResponseWriter, r *http.Request) {
	switch {
	case r.URL.Path == "/api/v1/repository":
		ns := r.URL.Query().Get("namespace")
		all := slices.DeleteFunc(c.repositories(), func(s string) bool { return !strings.HasPrefix(s, ns+"/") })
		page, next := tokenedPage(r.URL.Query().Get("next_page"), 1, all)
		out := []object{{"namespace": ns, "name": "chart", "kind": "application"}}
		for _, name := range page {
			out = append(out, object{"namespace": ns, "name": strings.TrimPrefix(name, ns+"/"), "kind": "image", "is_public": false})
		}
		answer := object{"repositories": out}
		if next != "" {
			answer["next_page"] = next
		}
		write(w, answer)
	case strings.HasSuffix(r.URL.Path, "/tag/") && r.URL.Query().Get("onlyActiveTags") == "true":
		name := strings.TrimSuffix(strings.TrimPrefix(r.URL.Path, "/api/v1/repository/"), "/tag/")
		page, more := numberedPage(r, c.tags(name), "page", "limit")
		out := []object{}
		for _, tag := range page {
			out = append(out, object{"name": tag, "manifest_digest": c[name][tag], "is_manifest_list": false, "start_ts": 1717680780})
		}
		write(w, object{"tags": out, "page": 1, "has_additional": more})
	default:
		http.NotFound(w, r)
	}
}

func serveGAR(c content, w http.ResponseWriter, r *http.Request) {
	path := strings.TrimPrefix(r.URL.EscapedPath(), "/v1/")
	parent, rest, _ := strings.Cut(path, "/packages")
	m := garRepository.FindStringSubmatch(parent)
	if m == nil {
		http.NotFound(w, r)
		return
	}
	prefix := strings.ReplaceAll(m[1], ":", "/") + "/" + m[2] + "/"
	pageToken := r.URL.Query().Get("pageToken")
	answer := object{}
	if rest == "" {
		all := slices.DeleteFunc(c.repositories(), func(s string) bool { return !strings.HasPrefix(s, prefix) })
		page, next := tokenedPage(pageToken, 1, all)
		var out []object
		for _, name := range page {
			out = append(out, object{"name": parent + "/packages/" + url.PathEscape(strings.TrimPrefix(name, prefix))})
		}
		answer["packages"], answer["nextPageToken"] = out, next
		write(w, answer)
		return
	}
	id, ok := strings.CutSuffix(strings.TrimPrefix(rest, "/"), "/tags")
	name, _ := url.PathUnescape(id)
	if !ok {
		http.NotFound(w, r)
		return
	}
	page, next := tokenedPage(pageToken, 100, c.tags(prefix+name))
	var out []object
	for _, tag := range page {
		p := parent + "/packages/" + id
		out = append(out, object{"name": p + "/tags/" + tag, "version": p + "/versions/" + c[prefix+name][tag]})
	}
	answer["tags"], answer["nextPageToken"] = out, next
	write(w, answer)
}

func serveDockerHub(c content, w http.ResponseWriter, r *http.Request) {
	parts := strings.Split(strings.TrimPrefix(r.URL.Path, "/v2/namespaces/"), "/")
	all := []object{}
	switch {
	case len(parts) == 2:
		for _, name := range c.repositories() {
			all = append(all, object{"name": strings.TrimPrefix(name, parts[0]+"/"), "namespace": parts[0]})
		}
	case len(parts) == 4:
		name := parts[0] + "/" + parts[2]
		for _, tag := range c.tags(name) {
			all = append(all, object{"name": tag, "digest": c[name][tag], "media_type": "application/vnd.oci.image.index.v1+json", "tag_status": "active"})
		}
	}
	page, more := numberedPage(r, all, "page", "page_size")
	answer := object{"count": len(all), "next": nil, "previous": nil, "results": page}
	if more {
		answer["next"] = "https://elsewhere.example.com/"
	}
	write(w, answer)
}

// server runs a fake; fault may answer instead.
func (f fake) server(t *testing.T, c content, fault func(w http.ResponseWriter, r *http.Request) bool) Lister {
	t.Helper()
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if fault != nil && fault(w, r) {
			return
		}
		if r.URL.Path == "/v2/auth/token" {
			var body map[string]string
			if json.NewDecoder(r.Body).Decode(&body) != nil || body["identifier"] != f.username || body["secret"] != f.secret {
				w.WriteHeader(http.StatusUnauthorized)
				return
			}
			write(w, object{"access_token": "a-jwt"})
			return
		}
		if !f.authed(r) {
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		f.serve(c, w, r)
	}))
	t.Cleanup(s.Close)
	l, err := New(Options{
		API: f.api, Registry: "registry.example.com", URL: s.URL, Within: f.within, Username: f.username,
		Secret: func() (string, error) { return f.secret, nil },
	})
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// everything lists all of a registry, at most 200 pages a listing.
func everything(ctx context.Context, l Lister) (content, int, error) {
	found, pages := content{}, 0
	var repositories []Repository
	next := ""
	for range 200 {
		page, following, err := l.Repositories(ctx, next)
		if err != nil {
			return found, pages, err
		}
		pages++
		repositories = append(repositories, page...)
		if next = following; next == "" {
			break
		}
	}
	for _, r := range repositories {
		found[r.Name] = map[string]string{}
		next := ""
		for range 200 {
			page, following, err := l.Tags(ctx, r, next)
			if err != nil {
				return found, pages, err
			}
			pages++
			for _, t := range page {
				found[r.Name][t.Name] = t.Digest
			}
			if next = following; next == "" {
				break
			}
		}
	}
	return found, pages, nil
}

// Every API lists everything, page by page, and each page by its position alone.
func TestListsEverything(t *testing.T) {
	for _, f := range fakes() {
		for _, n := range []int{0, 1, 100, 101, 333} {
			t.Run(fmt.Sprintf("%s/%d", f.api, n), func(t *testing.T) {
				want := holding(f.names, n)
				got, pages, err := everything(t.Context(), f.server(t, want, nil))
				if err != nil {
					t.Fatal(err)
				}
				if !f.digests {
					for _, tags := range want {
						for tag := range tags {
							tags[tag] = ""
						}
					}
				}
				if !maps.EqualFunc(got, want, func(a, b map[string]string) bool { return maps.Equal(a, b) }) {
					t.Errorf("%v\nwant %v", got.repositories(), want.repositories())
					for r := range want {
						t.Errorf("%s: %d tags, want %d", r, len(got[r]), len(want[r]))
					}
				}
				if n == 333 && pages < 1+len(f.names)+4 {
					t.Errorf("%d pages", pages)
				}
			})
		}
	}
}

// What is no list is an error of its kind, never an empty list; credentials
// are in no error.
func TestWhatIsNoList(t *testing.T) {
	type answer struct {
		name   string
		status int
		header map[string]string
		body   string
		want   error
		after  time.Duration
	}
	reset := time.Now().Add(time.Hour).Unix()
	answers := []answer{
		{name: "401", status: 401, want: registry.ErrUnauthorized},
		{name: "403", status: 403, want: registry.ErrUnauthorized},
		{name: "404", status: 404, want: registry.ErrNotFound},
		{name: "400", status: 400, want: registry.ErrRefused},
		{name: "429", status: 429, header: map[string]string{"Retry-After": "90"}, want: registry.ErrThrottled, after: 90 * time.Second},
		{name: "429 until a time", status: 429, header: map[string]string{"X-RateLimit-Reset": strconv.FormatInt(reset, 10)}, want: registry.ErrThrottled, after: 59 * time.Minute},
		{name: "403 of a limit", status: 403, header: map[string]string{"X-RateLimit-Remaining": "0"}, want: registry.ErrThrottled},
		{name: "500", status: 500, want: registry.ErrUnavailable},
		{name: "503", status: 503, header: map[string]string{"Retry-After": "7"}, want: registry.ErrUnavailable, after: 7 * time.Second},
		{name: "redirect", status: 302, header: map[string]string{"Location": "https://elsewhere.example.com/"}, want: registry.ErrRefused},
		{name: "login page", status: 200, body: "<html>", want: registry.ErrRefused},
		{name: "broken off", status: 200, body: `[{"name":"a`, want: registry.ErrRefused},
		{name: "another document", status: 200, body: `"x"`, want: registry.ErrRefused},
		{name: "nothing", status: 200, body: ``, want: registry.ErrRefused},
	}
	for _, f := range fakes() {
		for _, a := range answers {
			for _, where := range []string{"repositories", "tags"} {
				t.Run(f.api+"/"+a.name+"/"+where, func(t *testing.T) {
					failing := where == "repositories"
					l := f.server(t, holding(f.names, 3), func(w http.ResponseWriter, r *http.Request) bool {
						if !failing || r.URL.Path == "/v2/auth/token" {
							return false
						}
						for k, v := range a.header {
							w.Header().Set(k, v)
						}
						w.WriteHeader(a.status)
						fmt.Fprint(w, a.body)
						return true
					})
					page, _, err := l.Repositories(t.Context(), "")
					if where == "tags" {
						if err != nil || len(page) == 0 {
							t.Fatal(err)
						}
						failing = true
						_, _, err = l.Tags(t.Context(), page[0], "")
					}
					var e *registry.Error
					if !errors.Is(err, a.want) || !errors.As(err, &e) || e.After < a.after {
						t.Errorf("%v; want %v, after %s", err, a.want, a.after)
					}
					if err != nil && strings.Contains(err.Error(), "s3cret") {
						t.Errorf("the error holds the secret: %v", err)
					}
				})
			}
		}
	}
}

// A page that is shorter than the total says is an error.
func TestTruncatedPages(t *testing.T) {
	f := fakes()[0]
	l := f.server(t, holding(f.names, 3), func(w http.ResponseWriter, _ *http.Request) bool {
		w.Header().Set("X-Total-Count", "40")
		write(w, []object{{"name": "team/app"}})
		return true
	})
	if page, _, err := l.Repositories(t.Context(), ""); !errors.Is(err, registry.ErrRefused) {
		t.Errorf("%v, %v", page, err)
	}
}

// A name that nobody can ask for is left out, a digest of another kind too.
func TestForeignNames(t *testing.T) {
	repositories := named([]Repository{{Name: "ok/app"}, {Name: "../etc"}, {Name: "UPPER"}, {Name: ""}})
	tags := tagged([]Tag{{Name: "1.0", Digest: "sha512:abc"}, {Name: "../x"}, {Name: ""}})
	if len(repositories) != 1 || len(tags) != 1 || tags[0].Digest != "" {
		t.Errorf("%v, %v", repositories, tags)
	}
}

// Every request waits for the budget.
func TestRequestsWaitForTheBudget(t *testing.T) {
	stop := errors.New("no budget")
	for _, f := range fakes() {
		l := f.server(t, content{}, func(http.ResponseWriter, *http.Request) bool {
			t.Errorf("%s: a request was made without budget", f.api)
			return false
		})
		switch l := l.(type) {
		case *harbor:
			l.c.wait = func(context.Context) error { return stop }
		case *ghcr:
			l.c.wait = func(context.Context) error { return stop }
		case *gitlab:
			l.c.wait = func(context.Context) error { return stop }
		case *quay:
			l.c.wait = func(context.Context) error { return stop }
		case *gar:
			l.c.wait = func(context.Context) error { return stop }
		case *dockerHub:
			l.c.wait = func(context.Context) error { return stop }
		}
		if _, _, err := l.Repositories(t.Context(), ""); !errors.Is(err, stop) {
			t.Errorf("%s: %v", f.api, err)
		}
	}
}

// A token of Docker Hub that is not taken any more is replaced, once.
func TestDockerHubRenewsItsToken(t *testing.T) {
	f := fakes()[len(fakes())-1]
	var mu sync.Mutex
	refused, logins := 0, 0
	l := f.server(t, holding(f.names, 1), func(w http.ResponseWriter, r *http.Request) bool {
		mu.Lock()
		defer mu.Unlock()
		if r.URL.Path == "/v2/auth/token" {
			logins++
			return false
		}
		if refused == 0 {
			refused++
			w.WriteHeader(http.StatusUnauthorized)
			return true
		}
		return false
	})
	if _, _, err := l.Repositories(t.Context(), ""); err != nil || logins != 2 {
		t.Errorf("%d logins, %v", logins, err)
	}
}

func TestCheck(t *testing.T) {
	for _, tc := range []struct {
		o    Options
		want string // in the error; empty: none
	}{
		{Options{API: Distribution}, ""},
		{Options{API: "other"}, "is none of"},
		{Options{API: GHCR}, "orgs/NAME"},
		{Options{API: ECR}, "region"},
		{Options{API: ECR, Region: "eu-west-1"}, ""},
		{Options{API: Harbor, URL: "http://registry.example.com"}, "https://"},
		{Options{API: Harbor, URL: "https://user:secret@registry.example.com"}, "credentials"},
		{Options{API: Harbor, Within: []string{""}}, "empty"},
	} {
		err := Check(tc.o)
		if (err == nil) != (tc.want == "") || err != nil && (!strings.Contains(err.Error(), tc.want) || strings.Contains(err.Error(), "secret@")) {
			t.Errorf("%+v: %v, want %q", tc.o, err, tc.want)
		}
	}
	for _, o := range []Options{
		{API: GHCR, Within: []string{"acme"}},
		{API: GitLab, Within: []string{"acme"}},
		{API: GAR, Within: []string{"acme/images"}},
		{API: DockerHub, Within: []string{"acme"}, Secret: func() (string, error) { return "x", nil }},
	} {
		o.Registry = "registry.example.com"
		if _, err := New(o); !errors.Is(err, ErrConfig) {
			t.Errorf("%s: %v", o.API, err)
		}
	}
}

// Distribution lists through the registry client; within replaces the catalog.
func TestDistribution(t *testing.T) {
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/v2/_catalog":
			write(w, object{"repositories": []string{"a", "b/c"}})
		case "/v2/a/tags/list", "/v2/b/c/tags/list":
			write(w, object{"name": "a", "tags": []string{"1", "2"}})
		default:
			w.WriteHeader(http.StatusNotFound)
		}
	}))
	t.Cleanup(s.Close)
	host := strings.TrimPrefix(s.URL, "http://")
	client, err := registry.New([]registry.Host{{Name: host, PlainHTTP: true}}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	for _, within := range [][]string{nil, {"b/c"}} {
		l, err := New(Options{API: Distribution, Registry: host, Within: within, Client: client})
		if err != nil {
			t.Fatal(err)
		}
		got, _, err := everything(t.Context(), l)
		want := []string{"a", "b/c"}
		if within != nil {
			want = within
		}
		if err != nil || !slices.Equal(got.repositories(), want) || len(got["b/c"]) != 2 {
			t.Errorf("%v, %v", got, err)
		}
	}
}

// A repository that the catalog names and that is not known when its tags are
// listed has none. One that the configuration names may be misspelt.
func TestDistributionNamesRepositoriesWithoutTags(t *testing.T) {
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.URL.Path == "/v2/_catalog":
			write(w, object{"repositories": []string{"emptied", "vanishing"}})
		case r.URL.Path == "/v2/vanishing/tags/list" && r.URL.Query().Get("last") == "":
			w.Header().Set("Link", `</v2/vanishing/tags/list?last=1&n=1>; rel="next"`)
			write(w, object{"name": "vanishing", "tags": []string{"1"}})
		default:
			w.Header().Set("Content-Type", "application/json")
			w.WriteHeader(http.StatusNotFound)
			fmt.Fprint(w, `{"errors":[{"code":"NAME_UNKNOWN","message":"repository name not known to registry"}]}`)
		}
	}))
	t.Cleanup(s.Close)
	host := strings.TrimPrefix(s.URL, "http://")
	client, err := registry.New([]registry.Host{{Name: host, PlainHTTP: true}}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		within     []string
		repository string
		want       error // of its last page
	}{
		{nil, "emptied", nil},
		{[]string{"emptied"}, "emptied", registry.ErrNotFound},
		{nil, "vanishing", registry.ErrNotFound}, // half of a list is none
	} {
		l, err := New(Options{API: Distribution, Registry: host, Within: tc.within, Client: client})
		if err != nil {
			t.Fatal(err)
		}
		tags, next, err := l.Tags(t.Context(), Repository{Name: tc.repository}, "")
		if next != "" {
			tags, next, err = l.Tags(t.Context(), Repository{Name: tc.repository}, next)
		}
		if !errors.Is(err, tc.want) || len(tags) != 0 || next != "" {
			t.Errorf("%s within %v: %v, %q, %v; want %v", tc.repository, tc.within, tags, next, err, tc.want)
		}
	}
}

// How long an API is left alone: until its limit begins anew only where the
// limit is reached, and a minute where GitHub says so in words only.
func TestLimits(t *testing.T) {
	now := time.Now()
	anew := strconv.FormatInt(now.Add(time.Hour).Unix(), 10)
	secondary := `{"message":"You have exceeded a secondary Rate Limit. Please wait a few minutes before you try again."}`
	for _, tc := range []struct {
		name     string
		api      string
		status   int
		header   map[string]string
		body     string
		want     error
		min, max time.Duration
	}{
		{"trouble", GHCR, 502, map[string]string{"X-RateLimit-Reset": anew, "X-RateLimit-Remaining": "4999"}, "", registry.ErrUnavailable, 0, 0},
		{"not found", GHCR, 404, map[string]string{"X-RateLimit-Reset": anew, "X-RateLimit-Remaining": "4999"}, "", registry.ErrNotFound, 0, 0},
		{"spent", GHCR, 403, map[string]string{"X-RateLimit-Reset": anew, "X-RateLimit-Remaining": "0"}, "", registry.ErrThrottled, 59 * time.Minute, time.Hour},
		{"too many", GitLab, 429, map[string]string{"X-RateLimit-Reset": anew}, "", registry.ErrThrottled, 59 * time.Minute, time.Hour},
		{"it says when", GHCR, 403, map[string]string{"Retry-After": "120", "X-RateLimit-Reset": anew}, secondary, registry.ErrThrottled, 2 * time.Minute, 2 * time.Minute},
		{"secondary", GHCR, 403, map[string]string{"X-RateLimit-Reset": anew, "X-RateLimit-Remaining": "4999"}, secondary, registry.ErrThrottled, time.Minute, time.Minute},
		{"forbidden", GHCR, 403, map[string]string{"X-RateLimit-Reset": anew, "X-RateLimit-Remaining": "4999"}, `{"message":"Resource not accessible"}`, registry.ErrUnauthorized, 0, 0},
		{"another API", GitLab, 403, nil, secondary, registry.ErrUnauthorized, 0, 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				for k, v := range tc.header {
					w.Header().Set(k, v)
				}
				w.WriteHeader(tc.status)
				fmt.Fprint(w, tc.body)
			}))
			t.Cleanup(s.Close)
			within := map[string]string{GHCR: "orgs/acme", GitLab: "groups/acme"}[tc.api]
			l, err := New(Options{API: tc.api, Registry: "registry.example.com", URL: s.URL, Within: []string{within}, Now: func() time.Time { return now }})
			if err != nil {
				t.Fatal(err)
			}
			_, _, err = l.Repositories(t.Context(), "")
			var e *registry.Error
			if !errors.Is(err, tc.want) || !errors.As(err, &e) || e.After < tc.min || e.After > tc.max {
				t.Errorf("%v, want %v, left alone for %s to %s", err, tc.want, tc.min, tc.max)
			}
		})
	}
}

func FuzzAnswers(f *testing.F) {
	for _, s := range []string{
		`[{"name":"team/app","digest":"sha256:0","tags":[{"name":"1"}]}]`, `{"repositories":[{"namespace":"a","name":"b"}],"next_page":"x"}`,
		`{"packages":[{"name":"projects/acme/locations/europe/repositories/images/packages/a%2Fb"}],"nextPageToken":"t"}`,
		`{"results":[{"name":"x"}],"next":"y"}`, `{"tags":null}`, `[null]`, `{}`, `[{"metadata":{"container":{"tags":["a"]}}}]`,
	} {
		f.Add([]byte(s))
	}
	var body []byte
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(body) }))
	f.Cleanup(s.Close)
	var listers []Lister
	for _, fake := range fakes() {
		o := Options{API: fake.api, Registry: "registry.example.com", URL: s.URL, Within: fake.within}
		if fake.api == GAR {
			o.Secret = func() (string, error) { return "token", nil }
		}
		l, err := New(o)
		if err != nil {
			f.Fatal(err)
		}
		listers = append(listers, l)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		body = b
		for _, l := range listers {
			page, _, err := l.Repositories(t.Context(), "")
			for _, r := range page {
				if err != nil || !contracts.ValidRepository(r.Name) {
					t.Fatalf("%T: %v with %v", l, r, err)
				}
			}
			tags, _, err := l.Tags(t.Context(), Repository{Name: "a/b", Handle: "x"}, "")
			for _, tag := range tags {
				if err != nil || !contracts.ValidTag(tag.Name) || tag.Digest != "" && !contracts.ValidDigest(tag.Digest) {
					t.Fatalf("%T: %v with %v", l, tag, err)
				}
			}
		}
	})
}

func FuzzPositions(f *testing.F) {
	for _, s := range []string{"", "0:1", "1:2", "-1:1", "0:0", "9999999999999999999:1", "0", ":", "0:x"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, next string) {
		p, err := parsePages(next, 3)
		if err == nil && (p.place < 0 || p.place >= 3 || p.page < 1) {
			t.Errorf("%q: %+v", next, p)
		}
	})
}
