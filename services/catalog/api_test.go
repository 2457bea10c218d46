package catalog

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/tidewaiter/tidewaiter/contracts"
)

func serve(t *testing.T, f *fixture, tokens func() ([]string, error)) func(path, auth string) (int, string) {
	server := httptest.NewServer(f.s.API(tokens))
	t.Cleanup(server.Close)
	return func(path, auth string) (int, string) {
		t.Helper()
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, server.URL+path, nil)
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
}

func secret() ([]string, error) { return []string{"s3cret", "n3xt"}, nil }

func TestAPIAsksForTheToken(t *testing.T) {
	f := newFixture(t)
	get := serve(t, f, secret)
	for _, path := range []string{"/v1/report", "/v1/images", "/v1/problems", "/v1/timeline?ref=r.example/a:latest"} {
		for auth, want := range map[string]int{
			"": 401, "Bearer ": 401, "Bearer wrong": 401, "bearer": 401, "Basic s3cret": 401, "Bearer s3cret2": 401, "Bearer s3cret n3xt": 401,
			"Bearer s3cret": 200, "Bearer n3xt": 200,
		} {
			if status, body := get(path, auth); status != want {
				t.Errorf("%s with %q: %d %s, want %d", path, auth, status, body, want)
			}
		}
	}
	if status, body := get("/healthz", ""); status != 200 || body != `{"status":"ok"}`+"\n" {
		t.Errorf("health: %d %s", status, body)
	}
	for name, token := range map[string]func() ([]string, error){
		"no token":         func() ([]string, error) { return nil, nil },
		"unreadable token": func() ([]string, error) { return []string{"s3cret"}, errors.New("file is gone") },
	} {
		if status, _ := serve(t, f, token)("/v1/report", "Bearer "); status != 401 {
			t.Errorf("%s: %d", name, status)
		}
		if status, _ := serve(t, f, token)("/v1/report", "Bearer s3cret"); status != 401 {
			t.Errorf("%s: %d", name, status)
		}
	}
}

func TestAPIRefusesBadInput(t *testing.T) {
	get := serve(t, newFixture(t), secret)
	for _, path := range []string{
		"/v1/timeline", "/v1/timeline?ref=", "/v1/timeline?ref=latest", "/v1/timeline?ref=r.example/a@sha256:1", "/v1/timeline?ref=r.example/A%20b:x",
		"/v1/images?ref=x", "/v1/images?limit=0", "/v1/images?limit=1001", "/v1/problems?limit=many",
	} {
		if status, body := get(path, "Bearer s3cret"); status != 400 || !strings.HasPrefix(body, `{"error":"`) {
			t.Errorf("%s: %d %s", path, status, body)
		}
	}
}

func TestTimelineTellsTheStory(t *testing.T) {
	f := newFixture(t)
	one, two := img("a", "one"), img("a", "two")
	f.handle(f.pushed("a", "latest", ""), f.observed("a", "latest", one.Digest), f.planned(one, "base", "l1"), f.analyzed("base", false), f.analyzed("l1", false),
		f.event("assembler", contracts.ImageAssembledV1, "x", contracts.ImageAssembled{Image: one, Packages: 14}),
		f.event("matcher", contracts.ImageMatchedV1, "x", contracts.ImageMatched{Image: one, Verdict: contracts.VerdictWarn}), f.attested(one, 1))
	f.handle(f.pushed("a", "next", two.Digest), f.planned(two, "base", "l2"), f.analyzed("base", true), f.analyzed("l2", false), f.analyzed("base", true))
	f.handle(f.event("analyzer", contracts.LayerFailedV1, "x", contracts.LayerFailed{Digest: dig("l3"), Image: two, Reason: "not-found"}))
	get := serve(t, f, secret)
	tell := func(ref string) []string {
		t.Helper()
		status, body := get("/v1/timeline?ref="+url.QueryEscape(ref), "Bearer s3cret")
		if status != 200 {
			t.Fatalf("%s: %d %s", ref, status, body)
		}
		var steps []string
		last := time.Time{}
		for line := range strings.Lines(body) {
			var e contracts.TimelineEntry
			if err := json.Unmarshal([]byte(line), &e); err != nil {
				t.Fatal(err)
			}
			if e.Time.Before(last) {
				t.Errorf("%s: %s is told after %s", ref, e.Time, last)
			}
			last = e.Time
			steps = append(steps, e.Step+" "+e.Service)
		}
		return steps
	}
	first := []string{"pushed intake", "planned planner", "analyzed analyzer", "analyzed analyzer", "assembled assembler", "matched matcher", "attested attestor"}
	second := []string{"pushed intake", "planned planner", "deduplicated analyzer", "analyzed analyzer", "failed analyzer"}
	for ref, want := range map[string][]string{
		"r.example/a:latest": first,
		one.String():         first[1:],
		two.String():         second,
		two.Digest:           second,
		dig("base"):          {"analyzed analyzer", "deduplicated analyzer", "deduplicated analyzer"},
		"r.example/b:latest": nil,
		dig("unknown"):       nil,
	} {
		if got := tell(ref); !slices.Equal(got, want) {
			t.Errorf("%s: got %q, want %q", ref, got, want)
		}
	}
}

func TestAPIListsInPages(t *testing.T) {
	f := newFixture(t)
	for i := range 5 {
		im := img(fmt.Sprint("repo", i), fmt.Sprint("image", i))
		f.handle(f.observed(im.Repository, "latest", im.Digest), f.attested(im, 1, vuln("CVE-1", "a", "1", contracts.SeverityHigh)))
	}
	f.handle(f.planned(img("repo5", "image5"), "l"))
	get := serve(t, f, secret)
	var names []string
	after := ""
	for {
		status, body := get("/v1/images?limit=2&after="+url.QueryEscape(after), "Bearer s3cret")
		var page struct {
			Images []ImageEntry
			Next   *string
		}
		if err := json.Unmarshal([]byte(body), &page); err != nil || status != 200 {
			t.Fatalf("%d %s", status, body)
		}
		for _, e := range page.Images {
			names = append(names, fmt.Sprint(e.Image[:15], " ", e.State, " ", e.Current, " ", e.Tags))
		}
		if page.Next == nil {
			break
		}
		after = *page.Next
	}
	want := []string{
		"r.example/repo0 attested true [latest]", "r.example/repo1 attested true [latest]", "r.example/repo2 attested true [latest]",
		"r.example/repo3 attested true [latest]", "r.example/repo4 attested true [latest]", "r.example/repo5 planned true []",
	}
	if !slices.Equal(names, want) {
		t.Errorf("got %q\nwant %q", names, want)
	}
	for query, want := range map[string]int{
		"ref=r.example/repo1:latest": 1, "ref=r.example/repo1:other": 0, "ref=r.example/repo1": 1, "state=planned": 1, "state=failed": 0, "ref=" + dig("image3"): 1,
	} {
		_, body := get("/v1/images?"+query, "Bearer s3cret")
		if got := strings.Count(body, `"image":`); got != want {
			t.Errorf("%s: %d images, want %d: %s", query, got, want, body)
		}
	}
	_, body := get("/v1/problems?state=open&limit=3", "Bearer s3cret")
	if strings.Count(body, `"key":`) != 3 || strings.Contains(body, `"next":null`) {
		t.Errorf("problems: %s", body)
	}
	_, body = get("/v1/report", "Bearer s3cret")
	var report contracts.FleetReport
	if err := json.Unmarshal([]byte(body), &report); err != nil || report.Images != 5 || report.Open != 5 || report.Unfinished != 1 {
		t.Errorf("report: %s", body)
	}
}
