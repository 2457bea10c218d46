package sweeper

import (
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/tidewaiter/tidewaiter/contracts"
)

// The API asks for its token, tells of sweeps and lets one begin.
func TestAPI(t *testing.T) {
	w := newWorld(t)
	t.Setenv("SWEEPER_TEST_TOKEN", "a-token\nthe-next\n")
	w.hold("team/app", "1")
	s := w.sweeper()
	server := httptest.NewServer(s.API())
	t.Cleanup(server.Close)
	call := func(method, path, auth string) (int, string) {
		t.Helper()
		req, err := http.NewRequestWithContext(t.Context(), method, server.URL+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		if auth != "" {
			req.Header.Set("Authorization", auth)
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return resp.StatusCode, string(body)
	}
	for _, auth := range []string{"", "Bearer ", "Bearer wrong", "Basic a-token", "Bearer a-token2"} {
		for _, path := range []string{"/v1/sweeps", "/v1/sweeps/main"} {
			if status, body := call(http.MethodGet, path, auth); status != http.StatusUnauthorized {
				t.Errorf("%s with %q: %d %s", path, auth, status, body)
			}
		}
		if status, _ := call(http.MethodPost, "/v1/sweeps/main", auth); status != http.StatusUnauthorized {
			t.Errorf("a sweep was asked for with %q: %d", auth, status)
		}
	}
	if status, _ := call(http.MethodGet, "/healthz", ""); status != http.StatusOK {
		t.Errorf("health: %d", status)
	}
	if status, body := call(http.MethodGet, "/v1/sweeps/main", "Bearer the-next"); status != http.StatusOK {
		t.Errorf("with the token that replaces the other: %d %s", status, body)
	}
	if status, body := call(http.MethodGet, "/v1/sweeps/other", "Bearer a-token"); status != http.StatusNotFound || !strings.Contains(body, "no source of this id") {
		t.Errorf("%d %s", status, body)
	}
	if status, body := call(http.MethodPost, "/v1/sweeps/main?dryRun=true", "Bearer a-token"); status != http.StatusAccepted {
		t.Errorf("%d %s", status, body)
	}
	w.turn(s)
	if len(w.sent) != 0 {
		t.Errorf("a dry run was asked for, and %d events were sent", len(w.sent))
	}
	status, body := call(http.MethodGet, "/v1/sweeps", "Bearer a-token")
	var all struct {
		Sweeps []SourceSweeps `json:"sweeps"`
	}
	if err := json.Unmarshal([]byte(body), &all); err != nil || status != http.StatusOK || len(all.Sweeps) != 1 {
		t.Fatalf("%d %s", status, body)
	}
	if one := all.Sweeps[0]; one.Source != "main" || one.Last == nil || !one.Last.DryRun || one.Last.State != contracts.SweepComplete || one.Complete != nil {
		t.Errorf("%s", body)
	}
	t.Setenv("SWEEPER_TEST_TOKEN", "")
	if status, _ := call(http.MethodGet, "/v1/sweeps", "Bearer "); status != http.StatusUnauthorized {
		t.Errorf("without a token: %d", status)
	}
}

func TestConfig(t *testing.T) {
	good := DefaultConfig()
	good.Catalog, good.CatalogTokenEnv = "http://127.0.0.1:8481", "T"
	if err := good.Validate(); err != nil {
		t.Error(err)
	}
	for want, change := range map[string]func(*Config){
		"listen needs":     func(c *Config) { c.Listen = ":1" },
		"catalog is not":   func(c *Config) { c.Catalog = "catalog" },
		"catalogTokenFile": func(c *Config) { c.CatalogTokenFile = "x" },
		"tick is":          func(c *Config) { c.Tick = 0 },
		"attempts is":      func(c *Config) { c.Attempts = 0 },
	} {
		c := good
		change(&c)
		if err := c.Validate(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %q", err, want)
		}
	}
}
