package main

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/run"
	"github.com/tidewaiter/tidewaiter/services/catalog"
)

// fakeServer answers as intake and catalog do. The tag pointed at an old image
// with a good verdict before; what the push led to is known after three looks.
func fakeServer(t *testing.T, end catalog.Outcome) string {
	t.Helper()
	looks := 0
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		reply := func(status int, v any) {
			w.WriteHeader(status)
			if err := json.NewEncoder(w).Encode(v); err != nil {
				t.Error(err)
			}
		}
		old := &catalog.ImageEntry{Image: "r.example/app@" + contracts.DigestOf([]byte("old")), State: catalog.StateAttested, Verdict: contracts.VerdictPass}
		switch r.Method + " " + r.URL.Path {
		case "POST /v1/submit":
			reply(http.StatusAccepted, map[string]string{"id": "push-1", "subject": "r.example/app:v1"})
		case "GET /v1/images":
			reply(http.StatusOK, map[string]any{"images": []*catalog.ImageEntry{old}})
		case "GET /v1/outcome":
			if q := r.URL.Query(); q.Get("push") != "push-1" || q.Get("subject") != "r.example/app:v1" {
				t.Errorf("asked for %s", r.URL)
			}
			switch looks++; looks {
			case 1:
				reply(http.StatusOK, catalog.Outcome{})
			case 2:
				reply(http.StatusOK, catalog.Outcome{State: catalog.StateAttested, Image: old})
			default:
				reply(http.StatusOK, end)
			}
		case "POST /v1/rematch":
			var body struct {
				Ref string
				All bool
			}
			if err := json.NewDecoder(r.Body).Decode(&body); err != nil {
				t.Error(err)
			}
			n := 0
			switch {
			case body.All && body.Ref == "":
				n = 7
			case body.Ref == "r.example/app":
				n = 2
			}
			reply(http.StatusAccepted, map[string]int{"images": n})
		default:
			reply(http.StatusNotFound, map[string]string{"error": "no such path"})
		}
	}))
	t.Cleanup(s.Close)
	return s.URL
}

// TestSubmitWait: the answer is about what was submitted, never about what the
// tag stood for before.
func TestSubmitWait(t *testing.T) {
	image := "r.example/app@" + contracts.DigestOf([]byte("new"))
	entry := func(state, verdict string) *catalog.ImageEntry {
		return &catalog.ImageEntry{Image: image, State: state, Verdict: verdict}
	}
	for name, test := range map[string]struct {
		end  catalog.Outcome
		code int
		says string
	}{
		"good":     {catalog.Outcome{Ended: true, State: "attested", Image: entry("attested", "pass")}, run.ExitOK, image + "\tattested pass"},
		"bad":      {catalog.Outcome{Ended: true, State: "attested", Image: entry("attested", "fail")}, run.ExitPolicy, "the policy fails"},
		"no image": {catalog.Outcome{Ended: true, State: "unsupported", Image: entry("unsupported", "")}, run.ExitPolicy, "ended as unsupported"},
		"no tag":   {catalog.Outcome{Ended: true, State: "gone", Message: "the tag is gone"}, run.ExitPolicy, "ended as gone: the tag is gone"},
	} {
		t.Run(name, func(t *testing.T) {
			url := fakeServer(t, test.end)
			code, out, errs := tidewaiter(t, "", "submit", "r.example/app:v1", "--wait", "--server", url, "--intake", url)
			if code != test.code || !strings.Contains(out+errs, test.says) {
				t.Errorf("%d %s%s", code, out, errs)
			}
		})
	}
	t.Run("no verdict in time", func(t *testing.T) {
		url := fakeServer(t, catalog.Outcome{State: "planned", Image: entry("planned", "")})
		code, out, errs := tidewaiter(t, "", "submit", "r.example/app:v1", "--wait", "--timeout", "1ms", "--server", url, "--intake", url)
		if code != run.ExitUnavailable || out != "" || !strings.Contains(errs, "no verdict in time") {
			t.Errorf("%d %s%s", code, out, errs)
		}
	})
}

func TestRematchCommand(t *testing.T) {
	url := fakeServer(t, catalog.Outcome{})
	for _, test := range []struct {
		args []string
		code int
		says string
	}{
		{[]string{"--all"}, run.ExitOK, "7 images are matched again"},
		{[]string{"r.example/app"}, run.ExitOK, "2 images are matched again"},
		{[]string{"r.example/none"}, run.ExitUsage, "tidewaiter submit"},
		{[]string{"r.example/app", "--all"}, run.ExitUsage, "--all"},
		{nil, run.ExitUsage, "--all"},
	} {
		code, _, errs := tidewaiter(t, "", append([]string{"rematch", "--server", url}, test.args...)...)
		if code != test.code || !strings.Contains(errs, test.says) {
			t.Errorf("%s: %d %s", fmt.Sprint(test.args), code, errs)
		}
	}
	_, out, _ := tidewaiter(t, "", "rematch", "--server", url, "--all", "--output", "json")
	if got := decodeOne[contracts.Rematch](t, out); got.Images != 7 {
		t.Errorf("printed %+v", got)
	}
}
