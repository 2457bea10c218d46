package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
)

func TestDockerHubByItsNames(t *testing.T) {
	var asked atomic.Value
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked.Store(r.Host + r.URL.Path)
		manifestAnswer(w, r)
	}))
	defer s.Close()
	c := newClient(t, Host{Name: "docker.io", Address: strings.TrimPrefix(s.URL, "http://"), PlainHTTP: true})
	for _, name := range []string{"docker.io", "index.docker.io", "registry-1.docker.io"} {
		if _, err := c.Manifest(t.Context(), Ref{Registry: name, Repository: "library/x", Tag: "v"}); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if got := asked.Load(); got != "registry-1.docker.io/v2/library/x/manifests/v" {
			t.Errorf("%s: asked %s", name, got)
		}
	}
}

func TestCallerCancels(t *testing.T) {
	c, host := fake(t, Host{}, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Length", "1000")
		_, _ = io.WriteString(w, "x")
		_ = http.NewResponseController(w).Flush()
		<-r.Context().Done()
	})
	ctx, cancel := context.WithCancel(t.Context())
	rc, err := c.Blob(ctx, host, "a", descriptorOf("", make([]byte, 1000)))
	if err != nil {
		t.Fatal(err)
	}
	p := make([]byte, 10)
	if n, err := rc.Read(p); n != 1 || err != nil {
		t.Fatalf("%d, %v", n, err)
	}
	cancel()
	if _, err := rc.Read(p); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	if err := rc.Close(); err != nil {
		t.Errorf("close: %v", err)
	}
	if _, err := c.Resolve(ctx, Ref{Registry: host, Repository: "a", Tag: "v"}); !errors.Is(err, context.Canceled) {
		t.Errorf("resolve: %v", err)
	}
}

// TestTrouble of a token realm is the registry's, not wrong credentials.
func TestTokenRealmTrouble(t *testing.T) {
	for status, want := range map[int]error{
		503: ErrUnavailable, 429: ErrThrottled, 401: ErrUnauthorized, 403: ErrUnauthorized,
	} {
		t.Run(fmt.Sprint(status), func(t *testing.T) {
			c, host := fake(t, Host{Username: "u", Password: "p"}, func(w http.ResponseWriter, r *http.Request) {
				if r.URL.Path == "/token" {
					w.Header().Set("Retry-After", "60")
					w.WriteHeader(status)
					return
				}
				w.Header().Set("WWW-Authenticate", `Bearer realm="http://`+r.Host+`/token",service="s"`)
				w.WriteHeader(http.StatusUnauthorized)
			})
			_, err := c.Resolve(t.Context(), Ref{Registry: host, Repository: "a", Tag: "v"})
			if !errors.Is(err, want) {
				t.Errorf("%v", err)
			}
		})
	}
}

func TestNothingListens(t *testing.T) {
	s := httptest.NewServer(nil)
	name := strings.TrimPrefix(s.URL, "http://")
	s.Close()
	c := newClient(t, Host{Name: name, PlainHTTP: true})
	_, err := c.Resolve(t.Context(), Ref{Registry: name, Repository: "a", Tag: "v"})
	if !errors.Is(err, ErrUnavailable) || !strings.Contains(err.Error(), "connection refused") {
		t.Errorf("%v", err)
	}
}

func TestNames(t *testing.T) {
	c := newClient(t, Host{Name: "registry.example"})
	for _, r := range []Ref{
		{Repository: "../x", Tag: "v"},
		{Repository: "a", Tag: "../v"},
		{Repository: "a"},
		{Repository: "a", Digest: "sha256:x"},
		{Repository: "a", Digest: digest.SHA512.FromString("x").String()},
		{Repository: "a?x=y", Tag: "v"},
	} {
		r.Registry = "registry.example"
		if _, err := c.Manifest(t.Context(), r); !errors.Is(err, ErrInvalidName) {
			t.Errorf("%+v: %v", r, err)
		}
	}
}

// FuzzHeaders: what a registry sends beside content is bounded and never panics.
func FuzzHeaders(f *testing.F) {
	f.Add("120", "bytes 5-10/11", []byte(`{"errors":[{"code":"DENIED"}]}`))
	f.Add("Fri, 02 Jan 2026 03:05:05 GMT", "bytes -", []byte(`{}`))
	f.Fuzz(func(t *testing.T, after, contentRange string, body []byte) {
		if retryAfter(after, time.Unix(0, 0)) < 0 {
			t.Error("a time in the past")
		}
		rangeStart(&http.Response{Header: http.Header{"Content-Range": {contentRange}}})
		if code := errorCode(body); len(code) > 40 {
			t.Errorf("code %q", code)
		}
	})
}

// TestReferrersAfterAFailure: a failure of the API, or a manifest that was not
// there, does not hide what is attached to others.
func TestReferrersAfterAFailure(t *testing.T) {
	for _, status := range []int{404, 500, 403} {
		t.Run(fmt.Sprint(status), func(t *testing.T) {
			backend, _ := olaregServer(t, true)
			var failing atomic.Bool
			c, name := fake(t, Host{}, func(w http.ResponseWriter, r *http.Request) {
				if failing.Load() && strings.Contains(r.URL.Path, "/referrers/") {
					w.WriteHeader(status)
					return
				}
				backend.Config.Handler.ServeHTTP(w, r)
			})
			m := pushImage(t, c, name, "app", "v1", []byte("layer"))
			if _, err := c.Attach(t.Context(), name, "app", m.Descriptor, Artifact{Type: "application/x.one", MediaType: "text/plain", Content: []byte("one")}); err != nil {
				t.Fatal(err)
			}
			at := Ref{Registry: name, Repository: "app", Tag: "v1"}
			c.hosts[name].forget() // as a new process begins
			failing.Store(true)
			list, err := c.Referrers(t.Context(), at, "")
			if status == 500 && !errors.Is(err, ErrUnavailable) || len(list) != 0 {
				t.Fatalf("%v, %v", list, err)
			}
			failing.Store(false)
			if list, err = c.Referrers(t.Context(), at, ""); err != nil || len(list) != 1 {
				t.Errorf("%v, %v", list, err)
			}
		})
	}
}
