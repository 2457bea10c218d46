package registry

import (
	"bytes"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"pgregory.net/rapid"
)

// fake starts a server that answers as told, and a client for it.
func fake(t *testing.T, cfg Host, handler http.HandlerFunc) (*Client, string) {
	t.Helper()
	s := httptest.NewServer(handler)
	t.Cleanup(s.Close)
	cfg.Name, cfg.PlainHTTP = strings.TrimPrefix(s.URL, "http://"), true
	return newClient(t, cfg), cfg.Name
}

func manifestAnswer(w http.ResponseWriter, r *http.Request) {
	body := `{"schemaVersion":2,"mediaType":"` + ocispec.MediaTypeImageManifest + `","config":{},"layers":[]}`
	w.Header().Set("Content-Type", ocispec.MediaTypeImageManifest)
	w.Header().Set("Docker-Content-Digest", digest.FromString(body).String())
	if r.Method == http.MethodGet {
		_, _ = io.WriteString(w, body) // the client may have gone
	}
}

func TestThrottled(t *testing.T) {
	var asked atomic.Int32
	c, name := fake(t, Host{}, func(w http.ResponseWriter, _ *http.Request) {
		asked.Add(1)
		w.Header().Set("Retry-After", "120")
		w.WriteHeader(http.StatusTooManyRequests)
		_, _ = io.WriteString(w, `{"errors":[{"code":"TOOMANYREQUESTS","message":"no"}]}`)
	})
	for range 2 { // the second does not even ask
		_, err := c.Resolve(t.Context(), Ref{Registry: name, Repository: "a", Tag: "v"})
		if !errors.Is(err, ErrThrottled) {
			t.Fatal(err)
		}
		at, again := RetryAt(err, 1)
		if wait := time.Until(at); !again || wait < 115*time.Second || wait > 160*time.Second {
			t.Errorf("again %v in %s", again, wait)
		}
	}
	if asked.Load() != 1 {
		t.Errorf("asked %d times", asked.Load())
	}
}

func TestFailuresThatPass(t *testing.T) {
	for _, status := range []int{429, 500, 502, 503, 408} {
		t.Run(fmt.Sprint(status), func(t *testing.T) {
			var asked atomic.Int32
			c, name := fake(t, Host{}, func(w http.ResponseWriter, r *http.Request) {
				if asked.Add(1) < 3 {
					w.WriteHeader(status)
					return
				}
				manifestAnswer(w, r)
			})
			if _, err := c.Manifest(t.Context(), Ref{Registry: name, Repository: "a", Tag: "v"}); err != nil {
				t.Fatal(err)
			}
			if asked.Load() != 3 {
				t.Errorf("asked %d times", asked.Load())
			}
		})
	}
}

func TestStatus(t *testing.T) {
	tests := []struct {
		status, asked int
		want          error
	}{
		{401, 1, ErrUnauthorized},
		{403, 1, ErrUnauthorized},
		{404, 1, ErrNotFound},
		{400, 1, ErrRefused},
		{500, 3, ErrUnavailable},
		{504, 3, ErrUnavailable},
	}
	for _, tt := range tests {
		t.Run(fmt.Sprint(tt.status), func(t *testing.T) {
			var asked atomic.Int32
			c, name := fake(t, Host{}, func(w http.ResponseWriter, _ *http.Request) {
				asked.Add(1)
				w.WriteHeader(tt.status)
			})
			_, err := c.Manifest(t.Context(), Ref{Registry: name, Repository: "a", Tag: "v"})
			if !errors.Is(err, tt.want) || !strings.Contains(err.Error(), name+"/a:v") {
				t.Errorf("%v", err)
			}
			if int(asked.Load()) != tt.asked {
				t.Errorf("asked %d times", asked.Load())
			}
			if _, again := RetryAt(err, 1); again != (tt.status >= 500) {
				t.Errorf("worth another try: %v", again)
			}
		})
	}
}

func TestRetryAt(t *testing.T) {
	if _, again := RetryAt(errors.New("x"), 1); again {
		t.Error("an unknown error is tried again")
	}
	rapid.Check(t, func(t *rapid.T) {
		after := time.Duration(rapid.Int64Range(0, int64(3*time.Hour)).Draw(t, "after"))
		attempt := rapid.IntRange(-1, 100).Draw(t, "attempt")
		now := time.Now()
		at, again := RetryAt(fmt.Errorf("x: %w", &Error{Kind: ErrThrottled, After: after}), attempt)
		wait := at.Sub(now)
		if !again || wait < min(after, time.Hour) || wait < time.Second || wait > 76*time.Minute {
			t.Fatalf("wait %s", wait)
		}
	})
}

// What may be a broken proxy's doing is asked for a few times; what we refuse
// ourselves, or a registry says in so many words, is not.
func TestRetryAtDoubtful(t *testing.T) {
	for _, kind := range []error{ErrDigestMismatch, ErrTooLarge, ErrUnknownManifest, errUnclear} {
		for attempt, want := range map[int]bool{1: true, doubtTries - 1: true, doubtTries: false, doubtTries + 1: false} {
			if _, again := RetryAt(fmt.Errorf("x: %w", &Error{Kind: kind}), attempt); again != want {
				t.Errorf("%v, attempt %d: again %t", kind, attempt, again)
			}
		}
	}
	for _, err := range []error{
		fmt.Errorf("of 5 GB: %w", ErrTooLarge), &Error{Kind: ErrRefused, Status: 400}, &Error{Kind: ErrNotFound}, &Error{Kind: ErrForbiddenHost},
	} {
		if _, again := RetryAt(err, 1); again {
			t.Errorf("%v is tried again", err)
		}
	}
}

// A registry, or a proxy before it, that answers every other request with
// something else than what was asked for does no harm.
func TestDoubtfulAnswers(t *testing.T) {
	body := []byte(`{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{"mediaType":"application/vnd.oci.empty.v1+json","digest":"sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a","size":2},"layers":[]}`)
	spoil := map[string]func(w http.ResponseWriter, content []byte){
		"other bytes": func(w http.ResponseWriter, content []byte) { _, _ = w.Write(bytes.ToUpper(content)) },
		"a login page": func(w http.ResponseWriter, _ []byte) {
			w.Header().Set("Content-Type", "text/html")
			fmt.Fprint(w, "<html>Log in</html>")
		},
		"nothing":       func(w http.ResponseWriter, _ []byte) { w.Header().Set("Content-Length", "0") },
		"half of it":    func(w http.ResponseWriter, content []byte) { _, _ = w.Write(content[:len(content)/2]) },
		"more":          func(w http.ResponseWriter, content []byte) { _, _ = w.Write(append(content, "more"...)) },
		"a broken line": func(http.ResponseWriter, []byte) { panic(http.ErrAbortHandler) },
	}
	for name, wrong := range spoil {
		t.Run(name, func(t *testing.T) {
			var asked atomic.Int64
			content := map[string][]byte{"manifests": body, "blobs": []byte("{}")}
			c, host := fake(t, Host{}, func(w http.ResponseWriter, r *http.Request) {
				parts := strings.Split(r.URL.Path, "/")
				answer, known := content[parts[len(parts)-2]]
				if !known {
					return
				}
				w.Header().Set("Content-Type", ocispec.MediaTypeImageManifest)
				if asked.Add(1)%2 == 1 {
					wrong(w, bytes.Clone(answer))
					return
				}
				_, _ = w.Write(answer)
			})
			m, err := c.Manifest(t.Context(), Ref{Registry: host, Repository: "team/app", Digest: digest.FromBytes(body).String()})
			if err != nil || !bytes.Equal(m.Body, body) {
				t.Errorf("manifest: %q, %v", m.Body, err)
			}
			got, err := c.ReadBlob(t.Context(), host, "team/app", ocispec.Descriptor{Digest: digest.FromString("{}"), Size: 2}, 100)
			if err != nil || string(got) != "{}" {
				t.Errorf("blob: %q, %v", got, err)
			}
		})
	}
}

// A portal says 200 to anything that is asked for by HEAD. That is no blob: it is
// uploaded, and what has its size is not.
func TestBlobOfAnotherSizeIsUploaded(t *testing.T) {
	for size, want := range map[int]int64{2: 0, 0: 1, 27: 1} {
		var uploads atomic.Int64
		c, host := fake(t, Host{}, func(w http.ResponseWriter, r *http.Request) {
			switch r.Method {
			case http.MethodHead:
				w.Header().Set("Content-Length", strconv.Itoa(size))
			case http.MethodPost:
				w.Header().Set("Location", "/v2/team/app/blobs/uploads/1")
				w.WriteHeader(http.StatusAccepted)
			case http.MethodPut:
				uploads.Add(1)
				w.WriteHeader(http.StatusCreated)
			}
		})
		if err := c.ensureBlob(t.Context(), host, "team/app", []byte("{}")); err != nil {
			t.Errorf("the registry says %d bytes: %v", size, err)
		}
		if n := uploads.Load(); n != want {
			t.Errorf("the registry says %d bytes: %d uploads, want %d", size, n, want)
		}
	}
}

// uploads is a registry that takes uploads as answer lets it, and keeps what it took.
func uploads(t *testing.T, cfg Host, answer func(w http.ResponseWriter, r *http.Request) bool) (c *Client, host string, taken func() []byte) {
	t.Helper()
	var mu sync.Mutex
	var content []byte
	c, host = fake(t, cfg, func(w http.ResponseWriter, r *http.Request) {
		if !answer(w, r) {
			return
		}
		const location = "/v2/team/app/blobs/uploads/1"
		mu.Lock()
		defer mu.Unlock()
		switch r.Method {
		case http.MethodPost:
			content = nil
			w.Header().Set("Location", location)
			w.WriteHeader(http.StatusAccepted)
		case http.MethodPatch, http.MethodPut:
			body, err := io.ReadAll(r.Body)
			if err != nil {
				w.WriteHeader(http.StatusBadRequest)
				return
			}
			content = append(content, body...)
			w.Header().Set("Location", location)
			w.Header().Set("Range", fmt.Sprintf("0-%d", len(content)-1))
			if r.Method == http.MethodPatch {
				w.WriteHeader(http.StatusAccepted)
			} else {
				w.WriteHeader(http.StatusCreated)
			}
		case http.MethodDelete:
			w.WriteHeader(http.StatusNoContent)
		}
	})
	return c, host, func() []byte {
		mu.Lock()
		defer mu.Unlock()
		return content
	}
}

// A registry that answers in the middle of an upload, what it may: each try
// sends all of the content, though the one before may still be reading.
func TestUploadIsTriedAgain(t *testing.T) {
	content := random(t, 8<<20)
	for _, tt := range []struct {
		name   string
		cfg    Host
		answer func(w http.ResponseWriter, r *http.Request, puts int) bool
	}{
		{"unavailable", Host{}, func(w http.ResponseWriter, _ *http.Request, puts int) bool {
			if puts < 3 {
				w.WriteHeader(http.StatusServiceUnavailable)
			}
			return puts >= 3
		}},
		{"asks for credentials", Host{Username: "u", Password: "p"}, func(w http.ResponseWriter, r *http.Request, _ int) bool {
			_, p, _ := r.BasicAuth()
			if p != "p" {
				w.Header().Set("WWW-Authenticate", `Basic realm="x"`)
				w.WriteHeader(http.StatusUnauthorized)
			}
			return p == "p"
		}},
		{"takes small bodies only", Host{}, func(w http.ResponseWriter, r *http.Request, _ int) bool {
			if r.ContentLength > 1<<20 {
				w.WriteHeader(http.StatusRequestEntityTooLarge)
			}
			return r.ContentLength <= 1<<20
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var puts atomic.Int32
			c, host, taken := uploads(t, tt.cfg, func(w http.ResponseWriter, r *http.Request) bool {
				if r.Method != http.MethodPut {
					return true
				}
				return tt.answer(w, r, int(puts.Add(1)))
			})
			if err := c.PushBlob(t.Context(), host, "team/app", descriptorOf("", content), bytes.NewReader(content)); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(taken(), content) {
				t.Errorf("%d bytes of %d arrived, or others", len(taken()), len(content))
			}
		})
	}
}

func TestRetryAfter(t *testing.T) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	for v, want := range map[string]time.Duration{
		"": 0, "7": 7 * time.Second, "-1": 0, "x": 0, "999999999999999999999": 0,
		"Fri, 02 Jan 2026 03:05:05 GMT": time.Minute, "Fri, 02 Jan 2026 03:03:05 GMT": 0,
	} {
		if got := retryAfter(v, now); got != want {
			t.Errorf("%q: %s", v, got)
		}
	}
}

// breakOff ends a connection in the middle, with a reset.
func breakOff(w http.ResponseWriter) {
	conn, _, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return
	}
	if tcp, ok := conn.(*net.TCPConn); ok {
		_ = tcp.SetLinger(0)
	}
	_ = conn.Close()
}

// partial answers a GET with at most n bytes of what was asked for, then breaks off.
func partial(w http.ResponseWriter, r *http.Request, content []byte, n int, ranges, clean bool) {
	from := 0
	if v := r.Header.Get("Range"); v != "" && ranges {
		if _, err := fmt.Sscanf(v, "bytes=%d-", &from); err != nil {
			w.WriteHeader(http.StatusBadRequest)
			return
		}
		w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", from, len(content)-1, len(content)))
	}
	rest := content[from:]
	w.Header().Set("Content-Length", fmt.Sprint(len(rest)))
	if from > 0 {
		w.WriteHeader(http.StatusPartialContent)
	}
	if len(rest) <= n {
		_, _ = w.Write(rest)
		return
	}
	_, _ = w.Write(rest[:n])
	_ = http.NewResponseController(w).Flush()
	if clean {
		panic(http.ErrAbortHandler)
	}
	breakOff(w)
}

func TestBlobIsResumed(t *testing.T) {
	content := random(t, 1<<20)
	d := descriptorOf("", content)
	for _, tt := range []struct {
		name          string
		ranges, clean bool
		piece         int
	}{
		{"reset", true, false, 200_000},
		{"closed", true, true, 200_000},
		{"often", true, false, 70_000},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var asked atomic.Int32
			c, name := fake(t, Host{Concurrency: 2}, func(w http.ResponseWriter, r *http.Request) {
				asked.Add(1)
				partial(w, r, content, tt.piece, tt.ranges, tt.clean)
			})
			for range 10 { // broken downloads use nothing up
				got, err := readAll(t, c, name, "a", d)
				if err != nil || !bytes.Equal(got, content) {
					t.Fatalf("%d bytes, %v", len(got), err)
				}
			}
			if asked.Load() < 20 {
				t.Errorf("asked only %d times", asked.Load())
			}
		})
	}
	t.Run("server ignores Range", func(t *testing.T) {
		var asked atomic.Int32
		c, name := fake(t, Host{}, func(w http.ResponseWriter, r *http.Request) {
			n := len(content)
			if asked.Add(1) == 1 {
				n = 300_000
			}
			partial(w, r, content, n, false, false)
		})
		got, err := readAll(t, c, name, "a", d)
		if err != nil || !bytes.Equal(got, content) {
			t.Fatalf("%d bytes, %v", len(got), err)
		}
	})
	t.Run("token expires in between", func(t *testing.T) {
		var asked atomic.Int32
		c, name := fake(t, Host{Username: "u", Password: "p"}, func(w http.ResponseWriter, r *http.Request) {
			n := asked.Add(1)
			if r.Header.Get("Authorization") == "" || n == 3 {
				w.Header().Set("WWW-Authenticate", `Basic realm="x"`)
				w.WriteHeader(http.StatusUnauthorized)
				return
			}
			partial(w, r, content, 600_000, true, false)
		})
		got, err := readAll(t, c, name, "a", d)
		if err != nil || !bytes.Equal(got, content) {
			t.Fatalf("%d bytes, %v after %d requests", len(got), err, asked.Load())
		}
	})
	t.Run("it never goes on", func(t *testing.T) {
		c, name := fake(t, Host{}, func(w http.ResponseWriter, r *http.Request) {
			if r.Header.Get("Range") != "" {
				breakOff(w)
				return
			}
			partial(w, r, content, 1000, true, false)
		})
		if _, err := readAll(t, c, name, "a", d); !errors.Is(err, ErrUnavailable) {
			t.Errorf("%v", err)
		}
	})
	t.Run("gone in between", func(t *testing.T) {
		c, name := fake(t, Host{}, func(w http.ResponseWriter, r *http.Request) {
			if r.Header.Get("Range") != "" {
				w.WriteHeader(http.StatusNotFound)
				return
			}
			partial(w, r, content, 1000, true, false)
		})
		if _, err := readAll(t, c, name, "a", d); !errors.Is(err, ErrNotFound) {
			t.Errorf("%v", err)
		}
	})
}

func TestWrongContent(t *testing.T) {
	want := []byte("what the manifest names")
	for name, send := range map[string]string{
		"other bytes": "What the manifest names", "shorter": "what", "longer": "what the manifest names, and more",
	} {
		for _, chunked := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, chunked %v", name, chunked), func(t *testing.T) {
				c, host := fake(t, Host{}, func(w http.ResponseWriter, _ *http.Request) {
					if chunked {
						_ = http.NewResponseController(w).Flush()
					}
					_, _ = io.WriteString(w, send)
				})
				_, err := readAll(t, c, host, "a", descriptorOf("", want))
				if !errors.Is(err, ErrDigestMismatch) || errors.Is(err, io.EOF) {
					t.Errorf("%v", err)
				}
			})
		}
	}
	t.Run("manifest", func(t *testing.T) {
		c, host := fake(t, Host{}, func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", ocispec.MediaTypeImageManifest)
			_, _ = io.WriteString(w, `{"schemaVersion":2}`)
		})
		_, err := c.Manifest(t.Context(), Ref{Registry: host, Repository: "a", Digest: digest.FromString("x").String()})
		if !errors.Is(err, ErrDigestMismatch) {
			t.Errorf("%v", err)
		}
	})
}

func TestManifestLimit(t *testing.T) {
	for _, chunked := range []bool{false, true} {
		c, host := fake(t, Host{}, func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", ocispec.MediaTypeImageManifest)
			if chunked {
				_ = http.NewResponseController(w).Flush()
			}
			_, _ = w.Write(append([]byte(`{"schemaVersion":2}`), bytes.Repeat([]byte(" "), MaxManifestBytes)...))
		})
		if _, err := c.Manifest(t.Context(), Ref{Registry: host, Repository: "a", Tag: "v"}); !errors.Is(err, ErrTooLarge) {
			t.Errorf("chunked %v: %v", chunked, err)
		}
	}
}

func TestSlowLoris(t *testing.T) {
	end := make(chan struct{})
	c, host := fake(t, Host{}, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Length", "1000")
		_, _ = io.WriteString(w, "x")
		_ = http.NewResponseController(w).Flush()
		select {
		case <-end:
		case <-r.Context().Done():
		}
	})
	defer close(end)
	c.hosts[host].rt.idle = 20 * time.Millisecond
	d := ocispec.Descriptor{Digest: digest.FromString("x"), Size: 1000}
	if _, err := readAll(t, c, host, "a", d); !errors.Is(err, ErrUnavailable) {
		t.Errorf("%v", err)
	}
	// What trickles is given up too, however regularly it does.
	b := &blobBody{op: &op{cancel: func() {}}, size: 1 << 30, off: 1000, waited: 2 * time.Minute}
	if err := b.next(nil); !errors.Is(err, ErrUnavailable) {
		t.Errorf("trickle: %v", err)
	}
	b = &blobBody{op: &op{cancel: func() {}}, size: 1 << 30, off: 100 << 20, waited: 2 * time.Minute}
	if err := b.next(nil); err != nil {
		t.Errorf("steady: %v", err)
	}
}

func TestCallerEnds(t *testing.T) {
	content := random(t, 100_000)
	started := make(chan struct{})
	c, host := fake(t, Host{}, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Length", fmt.Sprint(len(content)))
		_, _ = w.Write(content[:10])
		_ = http.NewResponseController(w).Flush()
		close(started)
		<-r.Context().Done()
	})
	rc, err := c.Blob(t.Context(), host, "a", descriptorOf("", content))
	if err != nil {
		t.Fatal(err)
	}
	<-started
	if err := rc.Close(); err != nil {
		t.Errorf("close: %v", err)
	}
	if n := len(c.hosts[host].rt.reads); n != 0 {
		t.Errorf("%d slots are still taken", n)
	}
}

func TestConcurrency(t *testing.T) {
	var now, most atomic.Int32
	c, host := fake(t, Host{Concurrency: 3}, func(w http.ResponseWriter, r *http.Request) {
		n := now.Add(1)
		defer now.Add(-1)
		for m := most.Load(); n > m && !most.CompareAndSwap(m, n); m = most.Load() {
		}
		manifestAnswer(w, r)
	})
	var wg sync.WaitGroup
	for range 50 {
		wg.Go(func() {
			if _, err := c.Manifest(t.Context(), Ref{Registry: host, Repository: "a", Tag: "v"}); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if most.Load() > 3 {
		t.Errorf("%d at once", most.Load())
	}
}

// headers collects what a server is sent.
type headers struct {
	mu   sync.Mutex
	auth []string
}

func (h *headers) note(r *http.Request) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.auth = append(h.auth, r.Header.Get("Authorization"))
}

func (h *headers) all() []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return append([]string(nil), h.auth...)
}

// TestForeignRealm: a token realm elsewhere is a private address here, which
// is refused before a connection unless that is allowed.
func TestForeignRealm(t *testing.T) {
	var realm headers
	tokens := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		realm.note(r)
		_, _ = io.WriteString(w, `{"token":"the-token"}`)
	}))
	defer tokens.Close()
	handler := func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != "Bearer the-token" {
			w.Header().Set("WWW-Authenticate", `Bearer realm="`+tokens.URL+`/token",service="s"`)
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		manifestAnswer(w, r)
	}
	c, host := fake(t, Host{Username: "user", Password: "secret-word"}, handler)
	_, err := c.Manifest(t.Context(), Ref{Registry: host, Repository: "a", Tag: "v"})
	if !errors.Is(err, ErrForbiddenHost) || strings.Contains(err.Error(), "secret-word") {
		t.Errorf("%v", err)
	}
	if n := len(realm.all()); n != 0 {
		t.Fatalf("the realm was asked %d times", n)
	}
	c, host = fake(t, Host{Username: "user", Password: "secret-word", AllowPrivate: true}, handler)
	if _, err := c.Manifest(t.Context(), Ref{Registry: host, Repository: "a", Tag: "v"}); err != nil {
		t.Fatal(err)
	}
	want := "Basic " + base64.StdEncoding.EncodeToString([]byte("user:secret-word"))
	if got := realm.all(); len(got) != 1 || got[0] != want {
		t.Errorf("the realm was sent %q", got)
	}
}

// TestRedirect: no Authorization goes where a redirect leads, whatever it asks for.
func TestRedirect(t *testing.T) {
	content := random(t, 1000)
	var seen headers
	elsewhere := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		seen.note(r)
		if strings.Contains(r.URL.Path, "/asks/") {
			w.Header().Set("WWW-Authenticate", `Basic realm="give"`)
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		_, _ = w.Write(content)
	}))
	defer elsewhere.Close()
	for _, scheme := range []string{"Basic", "Bearer"} {
		handler := func(w http.ResponseWriter, r *http.Request) {
			switch {
			case r.URL.Path == "/token":
				_, _ = io.WriteString(w, `{"token":"the-token"}`)
			case !strings.HasPrefix(r.Header.Get("Authorization"), scheme):
				w.Header().Set("WWW-Authenticate", scheme+` realm="http://`+r.Host+`/token",service="s"`)
				w.WriteHeader(http.StatusUnauthorized)
			default:
				path := strings.TrimPrefix(r.URL.Path, "/v2")
				http.Redirect(w, r, elsewhere.URL+path+"?signature=secret-signature", http.StatusTemporaryRedirect)
			}
		}
		t.Run(scheme, func(t *testing.T) {
			c, host := fake(t, Host{Username: "user", Password: "secret-word"}, handler)
			_, err := readAll(t, c, host, "a", descriptorOf("", content))
			if !errors.Is(err, ErrForbiddenHost) || strings.Contains(err.Error(), "secret") {
				t.Errorf("%v", err)
			}
			if n := len(seen.all()); n != 0 {
				t.Fatalf("a private address was asked %d times", n)
			}
			c, host = fake(t, Host{Username: "user", Password: "secret-word", AllowPrivate: true}, handler)
			got, err := readAll(t, c, host, "a", descriptorOf("", content))
			if err != nil || !bytes.Equal(got, content) {
				t.Errorf("%d bytes, %v", len(got), err)
			}
			_, err = readAll(t, c, host, "asks", descriptorOf("", content))
			if !errors.Is(err, ErrUnauthorized) || strings.Contains(err.Error(), "secret") {
				t.Errorf("%v", err)
			}
			for _, a := range seen.all() {
				if a != "" {
					t.Errorf("the other host was sent %q", a)
				}
			}
			seen.auth = nil
		})
	}
}

func TestErrorsHoldNoSecrets(t *testing.T) {
	c, host := fake(t, Host{Username: "user", Password: "secret-word", AllowPrivate: true}, func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.Header.Get("Authorization") == "":
			w.Header().Set("WWW-Authenticate", `Basic realm="x"`)
			w.WriteHeader(http.StatusUnauthorized)
		case strings.Contains(r.URL.Path, "/echo/"):
			w.WriteHeader(http.StatusInternalServerError)
			_, _ = fmt.Fprintf(w, `{"errors":[{"code":"%s"}]}`, r.Header.Get("Authorization"))
		default:
			http.Redirect(w, r, "http://127.0.0.1:1/x?signature=secret-signature", http.StatusFound)
		}
	})
	for _, repository := range []string{"echo", "redirect"} {
		_, err := c.Resolve(t.Context(), Ref{Registry: host, Repository: repository, Tag: "v"})
		if !errors.Is(err, ErrUnavailable) {
			t.Errorf("%s: %v", repository, err)
		}
		if s := err.Error(); strings.Contains(s, "secret") || strings.Contains(s, "Basic ") {
			t.Errorf("%s: %s", repository, s)
		}
	}
}

func TestPasswordIsReadAgain(t *testing.T) {
	file := filepath.Join(t.TempDir(), "password")
	write := func(p string) {
		if err := os.WriteFile(file, []byte(p+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("old")
	var current atomic.Value
	current.Store("old")
	c, host := fake(t, Host{Username: "u", PasswordFile: file}, func(w http.ResponseWriter, r *http.Request) {
		if _, p, _ := r.BasicAuth(); p != current.Load() {
			w.Header().Set("WWW-Authenticate", `Basic realm="x"`)
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		manifestAnswer(w, r)
	})
	ref := Ref{Registry: host, Repository: "a", Tag: "v"}
	if _, err := c.Manifest(t.Context(), ref); err != nil {
		t.Fatal(err)
	}
	current.Store("new")
	if _, err := c.Manifest(t.Context(), ref); !errors.Is(err, ErrUnauthorized) {
		t.Fatalf("old password: %v", err)
	}
	write("new")
	if _, err := c.Manifest(t.Context(), ref); err != nil {
		t.Fatalf("new password: %v", err)
	}
}

func TestTLS(t *testing.T) {
	s := httptest.NewTLSServer(http.HandlerFunc(manifestAnswer))
	defer s.Close()
	s.Config.ErrorLog = nil
	ca := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	address := strings.TrimPrefix(s.URL, "https://")
	// The certificate is for example.com, which is connected to at another address.
	c := newClient(t, Host{Name: "example.com", Address: address, CAFile: ca})
	if _, err := c.Manifest(t.Context(), Ref{Registry: "example.com", Repository: "a", Tag: "v"}); err != nil {
		t.Errorf("with caFile: %v", err)
	}
	c = newClient(t, Host{Name: "example.com", Address: address})
	_, err := c.Manifest(t.Context(), Ref{Registry: "example.com", Repository: "a", Tag: "v"})
	if !errors.Is(err, ErrUnavailable) || !strings.Contains(err.Error(), "caFile") {
		t.Errorf("without caFile: %v", err)
	}
}

func TestTLSIsNotGivenUp(t *testing.T) {
	plain := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
		t.Error("asked without TLS")
	}))
	defer plain.Close()
	s := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, plain.URL+r.URL.Path, http.StatusFound)
	}))
	defer s.Close()
	ca := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	c := newClient(t, Host{Name: "example.com", Address: strings.TrimPrefix(s.URL, "https://"), CAFile: ca, AllowPrivate: true})
	_, err := c.Manifest(t.Context(), Ref{Registry: "example.com", Repository: "a", Tag: "v"})
	if !errors.Is(err, ErrForbiddenHost) {
		t.Errorf("%v", err)
	}
}

func TestPublic(t *testing.T) {
	for addr, want := range map[string]bool{
		"8.8.8.8": true, "2606:4700::1111": true, "::ffff:8.8.8.8": true,
		"127.0.0.1": false, "10.1.2.3": false, "172.16.0.1": false, "192.168.1.1": false, "169.254.169.254": false,
		"0.0.0.0": false, "100.64.0.1": false, "192.0.0.192": false, "198.18.0.1": false, "224.0.0.1": false, "255.255.255.255": false,
		"::1": false, "::": false, "fe80::1": false, "fd00::1": false, "fec0::1": false, "ff02::1": false,
		"::ffff:127.0.0.1": false, "64:ff9b::7f00:1": false, "64:ff9b::808:808": true, "2002:7f00:1::": false,
	} {
		if got := public(netip.MustParseAddr(addr)); got != want {
			t.Errorf("%s: %v", addr, got)
		}
	}
}

func TestHosts(t *testing.T) {
	missing := filepath.Join(t.TempDir(), "none")
	for name, hosts := range map[string][]Host{
		"no name":           {{}},
		"URL":               {{Name: "https://registry.example"}},
		"twice":             {{Name: "registry.example"}, {Name: "Registry.example"}},
		"docker hub twice":  {{Name: "docker.io"}, {Name: "index.docker.io"}},
		"no CA file":        {{Name: "registry.example", CAFile: missing}},
		"no password file":  {{Name: "registry.example", PasswordFile: missing}},
		"no password there": {{Name: "registry.example", PasswordEnv: "TIDEWAITER_TEST_NOT_SET"}},
	} {
		if _, err := New(hosts, discard()); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	c := newClient(t, Host{Name: "registry.example", PathPrefixes: []string{"team/"}})
	for repository, want := range map[string]bool{"team/app": true, "team": true, "teams/app": false, "other": false} {
		_, err := c.host("registry.example", repository)
		if (err == nil) != want || err != nil && !errors.Is(err, ErrNotConfigured) {
			t.Errorf("%s: %v", repository, err)
		}
	}
}
