package tracker_test

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cloudevents/sdk-go/v2/event"

	"github.com/tidewaiter/tidewaiter/services/ticketer/tracker"
)

func options(url string) tracker.Options {
	return tracker.Options{URL: url, Secret: func() (string, error) { return "0123456789abcdef-secret", nil }, Timeout: 5 * time.Second}
}

// TestNoCredentialsElsewhere: no request goes to where a tracker redirects.
func TestNoCredentialsElsewhere(t *testing.T) {
	elsewhere := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		t.Errorf("asked: %s %s, %q", r.Method, r.URL, r.Header)
	}))
	defer elsewhere.Close()
	for _, status := range []int{301, 302, 303, 307, 308} {
		here := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, elsewhere.URL+r.URL.Path, status)
		}))
		github, err := tracker.NewGitHub(options(here.URL))
		if err != nil {
			t.Fatal(err)
		}
		gitlab, err := tracker.NewGitLab(options(here.URL))
		if err != nil {
			t.Fatal(err)
		}
		webhook, err := tracker.NewWebhook(options(here.URL))
		if err != nil {
			t.Fatal(err)
		}
		for name, tr := range map[string]tracker.Tracker{"github": github, "gitlab": gitlab} {
			if _, err := tr.Create(t.Context(), "a/b", tracker.Draft{Title: "x"}); !errors.Is(err, tracker.ErrForeign) {
				t.Errorf("%s, %d: %v", name, status, err)
			}
			if _, err := tr.Get(t.Context(), "a/b", "1"); !errors.Is(err, tracker.ErrForeign) {
				t.Errorf("%s, %d: %v", name, status, err)
			}
		}
		if err := webhook.Deliver(t.Context(), sample(t)); !errors.Is(err, tracker.ErrForeign) {
			t.Errorf("webhook, %d: %v", status, err)
		}
		here.Close()
	}
}

func sample(t *testing.T) event.Event {
	t.Helper()
	ev := event.New()
	ev.SetID("id-1")
	ev.SetSource("/services/catalog")
	ev.SetType("dev.tidewaiter.finding.opened.v1")
	if err := ev.SetData(event.ApplicationJSON, map[string]any{"key": "k"}); err != nil {
		t.Fatal(err)
	}
	return ev
}

// TestWebhook verifies a delivery as its receiver would.
func TestWebhook(t *testing.T) {
	const old, fresh = "the old secret, long enough", "whsec_MDEyMzQ1Njc4OWFiY2RlZjAxMjM="
	var body []byte
	var head http.Header
	status := 200
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var err error
		if body, err = io.ReadAll(r.Body); err != nil {
			t.Error(err)
		}
		head = r.Header
		w.WriteHeader(status)
	}))
	defer server.Close()
	file := filepath.Join(t.TempDir(), "secret")
	write := func(s string) {
		t.Helper()
		if err := os.WriteFile(file, []byte(s), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(old + "\n")
	now := time.Unix(1_790_000_000, 0)
	w, err := tracker.NewWebhook(tracker.Options{
		URL: server.URL + "/hook?tenant=1", Timeout: time.Minute, Now: func() time.Time { return now },
		Secret: func() (string, error) { b, err := os.ReadFile(file); return string(b), err },
	})
	if err != nil {
		t.Fatal(err)
	}
	verify := func(key []byte) bool {
		mac := hmac.New(sha256.New, key)
		mac.Write([]byte("id-1." + strconv.FormatInt(now.Unix(), 10) + "."))
		mac.Write(body)
		want := "v1," + base64.StdEncoding.EncodeToString(mac.Sum(nil))
		for got := range strings.FieldsSeq(head.Get("webhook-signature")) {
			if hmac.Equal([]byte(got), []byte(want)) {
				return true
			}
		}
		return false
	}
	deliver := func() {
		t.Helper()
		if err := w.Deliver(t.Context(), sample(t)); err != nil {
			t.Fatal(err)
		}
	}
	deliver()
	if !verify([]byte(old)) || head.Get("webhook-id") != "id-1" || head.Get("webhook-timestamp") != "1790000000" ||
		head.Get("Content-Type") != "application/cloudevents+json; charset=utf-8" || head.Get("Authorization") != "" {
		t.Errorf("got %q", head)
	}
	var got event.Event
	if err := json.Unmarshal(body, &got); err != nil || got.ID() != "id-1" || got.Type() != "dev.tidewaiter.finding.opened.v1" || got.Validate() != nil {
		t.Errorf("got %s, %v", body, err)
	}
	write(fresh + "\n" + old + "\n")
	deliver()
	if !verify([]byte(old)) || !verify([]byte("0123456789abcdef0123")) || verify([]byte("0123456789abcdef")) {
		t.Errorf("got %q", head)
	}
	for secret, why := range map[string]string{"": "empty", "short": "shorter", "whsec_?": "base64"} {
		write(secret)
		if err := w.Deliver(t.Context(), sample(t)); !errors.Is(err, tracker.ErrDenied) || !strings.Contains(err.Error(), why) {
			t.Errorf("%q: %v", secret, err)
		}
	}
	write(old)
	for code, want := range map[int]error{
		204: nil, 304: tracker.ErrInvalid, 400: tracker.ErrInvalid, 401: tracker.ErrDenied, 410: tracker.ErrGone,
		429: tracker.ErrThrottled, 500: tracker.ErrUnavailable,
	} {
		status = code
		if err := w.Deliver(t.Context(), sample(t)); !errors.Is(err, want) {
			t.Errorf("%d: %v", code, err)
		}
	}
}

func TestTimeout(t *testing.T) {
	stop := make(chan struct{})
	server := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		select {
		case <-r.Context().Done():
		case <-stop:
		}
	}))
	defer server.Close()
	defer close(stop)
	o := options(server.URL)
	o.Timeout = 20 * time.Millisecond
	github, err := tracker.NewGitHub(o)
	if err != nil {
		t.Fatal(err)
	}
	gitlab, err := tracker.NewGitLab(o)
	if err != nil {
		t.Fatal(err)
	}
	for name, tr := range map[string]tracker.Tracker{"github": github, "gitlab": gitlab} {
		if _, err := tr.Create(t.Context(), "a/b", tracker.Draft{Title: "x"}); !errors.Is(err, tracker.ErrUnavailable) {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := tr.Get(t.Context(), "a/b", "../../users"); !errors.Is(err, tracker.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestBadOptions(t *testing.T) {
	for name, o := range map[string]tracker.Options{
		"no URL": {URL: "api.github.com"}, "ftp": {URL: "ftp://x/"}, "no CA": {URL: "https://x/", CAFile: "/does/not/exist"},
	} {
		_, a := tracker.NewGitHub(o)
		_, b := tracker.NewGitLab(o)
		_, c := tracker.NewWebhook(o)
		if a == nil || b == nil || c == nil {
			t.Errorf("%s: %v, %v, %v", name, a, b, c)
		}
	}
}

// FuzzAnswers: whatever a tracker answers, there is a ticket or one of our errors.
func FuzzAnswers(f *testing.F) {
	f.Add(201, `{"number":1,"iid":1,"id":1}`, "60")
	f.Add(403, `{"message":{"base":["x"]},"errors":[{"field":"a"}]}`, "Mon, 01 Jan 2024 00:00:00 GMT")
	f.Add(200, `[{"iid":"x","labels":[{"name":1},2]}]`, "-1")
	f.Add(500, `{"error":1}`, "9999999999999")
	f.Fuzz(func(t *testing.T, status int, body, retry string) {
		if status < 200 || status > 599 {
			return // no status of an answer
		}
		server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Retry-After", strings.Map(func(r rune) rune {
				if r < ' ' || r > '~' {
					return -1
				}
				return r
			}, retry))
			w.WriteHeader(status)
			_, _ = io.WriteString(w, body) // a status without a body refuses it
		}))
		defer server.Close()
		github, err := tracker.NewGitHub(options(server.URL))
		if err != nil {
			t.Fatal(err)
		}
		gitlab, err := tracker.NewGitLab(options(server.URL))
		if err != nil {
			t.Fatal(err)
		}
		for _, tr := range []tracker.Tracker{github, gitlab} {
			made, err := tr.Create(t.Context(), "a/b", tracker.Draft{Title: "x"})
			if n, _ := strconv.Atoi(made.ID); err == nil && n == 0 {
				t.Errorf("got %+v", made)
			}
			_, err2 := tr.Find(t.Context(), "a/b", "marker", time.Now())
			_, err3 := tr.Get(t.Context(), "a/b", "1")
			_, err4 := tr.Commented(t.Context(), "a/b", "1", "marker", time.Now())
			for _, err := range []error{err, err2, err3, err4, tr.Comment(t.Context(), "a/b", "1", "x"), tr.Edit(t.Context(), "a/b", "1", tracker.Change{})} {
				var e *tracker.Error
				if err != nil && (!errors.As(err, &e) || e.Kind == nil || strings.Contains(err.Error(), "-secret")) {
					t.Errorf("got %v", err)
				}
			}
		}
	})
}
