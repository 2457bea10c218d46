package intake

import (
	"bytes"
	"encoding/base64"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"testing"
)

// TestSecretsAreReplacedWhileItRuns: over HTTP, for every way to prove oneself:
// both secrets count while both stand in the file, and the old one ends with it.
func TestSecretsAreReplacedWhileItRuns(t *testing.T) {
	t.Parallel()
	name := file(t, "old")
	body := func(n int) []byte { return push(fmt.Sprint(n), "team/app", "1") }
	header := func(name, value string) func(*http.Request) {
		return func(r *http.Request) { r.Header.Set(name, value) }
	}
	ways := map[string]struct {
		auth    Auth
		present func(secret string, body []byte) func(*http.Request)
	}{
		"bearer": {Auth{Bearer: &BearerAuth{TokenFile: name}}, func(secret string, _ []byte) func(*http.Request) {
			return header("Authorization", "Bearer "+secret)
		}},
		"basic": {Auth{Basic: &BasicAuth{Username: "u", PasswordFile: name}}, func(secret string, _ []byte) func(*http.Request) {
			return header("Authorization", "Basic "+base64.StdEncoding.EncodeToString([]byte("u:"+secret)))
		}},
		"header": {Auth{Header: &HeaderAuth{Name: "X-Secret", ValueFile: name}}, func(secret string, _ []byte) func(*http.Request) {
			return header("X-Secret", secret)
		}},
		"hmac": {Auth{HMAC: &HMACAuth{Header: "X-Signature", SecretFile: name}}, func(secret string, body []byte) func(*http.Request) {
			return header("X-Signature", mac("sha256", secret, body))
		}},
		"query": {Auth{Query: &QueryAuth{Name: "code", ValueFile: name}}, func(secret string, _ []byte) func(*http.Request) {
			return func(r *http.Request) { r.URL.RawQuery = "code=" + secret }
		}},
	}
	sources := Sources{}
	for way, c := range ways {
		src := openSource()
		src.Auth = c.auth
		sources[way] = src
	}
	cfg := DefaultConfig()
	cfg.Admin = &BearerAuth{TokenFile: name}
	s, _ := startWith(t, cfg, sources)
	server := httptest.NewServer(s.Handler())
	defer server.Close()
	sent := 0
	try := func(path string, body []byte, present func(*http.Request)) int {
		t.Helper()
		r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, server.URL+path, bytes.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		present(r)
		resp, err := server.Client().Do(r)
		if err != nil {
			t.Fatal(err)
		}
		if err := resp.Body.Close(); err != nil {
			t.Fatal(err)
		}
		return resp.StatusCode
	}
	for _, step := range []struct {
		content string
		valid   map[string]bool
	}{
		{"old", map[string]bool{"old": true, "new": false}},
		{"old\nnew\n", map[string]bool{"old": true, "new": true}},
		{"new\n", map[string]bool{"old": false, "new": true}},
	} {
		if err := os.WriteFile(name, []byte(step.content), 0o600); err != nil {
			t.Fatal(err)
		}
		for secret, valid := range step.valid {
			want := http.StatusUnauthorized
			if valid {
				want = http.StatusAccepted
			}
			for way, c := range ways {
				eventually(t, fmt.Sprintf("%q counts (%t) as %s when the file holds %q", secret, valid, way, step.content), func() bool {
					sent++
					b := body(sent)
					return try("/hooks/"+way, b, c.present(secret, b)) == want
				})
			}
			eventually(t, fmt.Sprintf("%q counts (%t) as admin token", secret, valid), func() bool {
				return try("/v1/submit", []byte(`{"ref":"r.example:5000/a:1"}`), header("Authorization", "Bearer "+secret)) == want
			})
		}
	}
}
