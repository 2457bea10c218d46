package catalog

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/tidewaiter/tidewaiter/contracts"
)

// pushedBy is a push that a cause led to.
func (f *fixture) pushedBy(cause, repository, tag, digest string, at time.Time) {
	f.t.Helper()
	f.handle(f.event("intake", contracts.ImagePushedV1, "r.example/"+repository, contracts.ImagePushed{
		Source: "hub", Registry: "r.example", Repository: repository, Tag: tag, Digest: digest, Cause: cause, ReceivedAt: at,
	}))
}

// What is known of a tag: where it points, how far its image is, and when a
// webhook told of it.
func TestKnown(t *testing.T) {
	f := newFixture(t)
	one, two := img("a", "one"), img("a", "two")
	before := time.Now().UTC().Add(-time.Hour)
	f.handle(f.observed("a", "1", one.Digest), f.planned(one, "l1"))
	f.pushedBy(contracts.CausePush, "a", "1", one.Digest, before)
	f.pushedBy(contracts.CausePush, "a", "", two.Digest, before.Add(time.Minute)) // named by digest only
	f.pushedBy(contracts.CausePush, "a", "tag-only", "", before)
	f.pushedBy(contracts.CauseSubmit, "a", "by-hand", dig("three"), before)
	f.pushedBy(contracts.CauseSweep, "a", "swept", dig("four"), before)
	ask := func(tags ...Tagged) []KnownTag {
		t.Helper()
		known, err := f.s.Known(t.Context(), KnownQuery{Registry: "r.example", Repository: "a", Tags: tags})
		if err != nil {
			t.Fatal(err)
		}
		return known
	}
	moved := dig("moved")
	got := ask(Tagged{"1", one.Digest}, Tagged{"1", moved}, Tagged{"2", two.Digest}, Tagged{"tag-only", moved},
		Tagged{"by-hand", dig("three")}, Tagged{"swept", dig("four")}, Tagged{"new", dig("new")})
	never := time.Time{}
	want := []KnownTag{
		{Tagged{"1", one.Digest}, one.Digest, StatePlanned, before},
		{Tagged{"1", moved}, one.Digest, "", never},
		{Tagged{"2", two.Digest}, "", StatePushed, before.Add(time.Minute)},
		{Tagged{"tag-only", moved}, "", "", before},
		{Tagged{"by-hand", dig("three")}, "", StatePushed, never},
		{Tagged{"swept", dig("four")}, "", StatePushed, never},
		{Tagged{"new", dig("new")}, "", "", never},
	}
	if !slices.Equal(got, want) {
		t.Errorf("%+v\nwant %+v", got, want)
	}
	// of several webhooks the last counts, also where it names the digest only
	f.pushedBy(contracts.CausePush, "a", "", one.Digest, before.Add(2*time.Minute))
	if got := ask(Tagged{"1", one.Digest}); !got[0].HeardAt.Equal(before.Add(2 * time.Minute)) {
		t.Errorf("heard at %s, want two minutes after %s", got[0].HeardAt, before)
	}
}

// What webhooks told of is forgotten with the timeline.
func TestHeardIsForgotten(t *testing.T) {
	f := newFixture(t)
	now := time.Now().UTC()
	old, recent := now.Add(-f.s.cfg.KeepTimeline-time.Minute), now.Add(-f.s.cfg.KeepTimeline+time.Minute)
	f.pushedBy(contracts.CausePush, "a", "old", dig("old"), old)
	f.pushedBy(contracts.CausePush, "a", "recent", dig("recent"), recent)
	if err := f.s.CleanUp(t.Context(), now); err != nil {
		t.Fatal(err)
	}
	got, err := f.s.Known(t.Context(), KnownQuery{Registry: "r.example", Repository: "a", Tags: []Tagged{{"old", dig("old")}, {"recent", dig("recent")}}})
	if err != nil || !got[0].HeardAt.IsZero() || !got[1].HeardAt.Equal(recent) {
		t.Errorf("%+v, %v, want the second only, heard at %s", got, err, recent)
	}
}

// What should carry statements, and which; page by page.
func TestStandings(t *testing.T) {
	f := newFixture(t)
	lodash := vuln("CVE-1", "lodash", "4.17.4", contracts.SeverityHigh, "4.17.11")
	one, two, other := img("a", "one"), img("b", "two"), img("b", "unsupported")
	first := f.attested(one, 1, lodash)
	d := contracts.ImageAttested{}
	if err := json.Unmarshal(first.Data(), &d); err != nil {
		t.Fatal(err)
	}
	d.Statements = []contracts.StatementRef{{PredicateType: contracts.PredicateVSA, Digest: dig("vsa")}, {PredicateType: contracts.PredicateVuln, Digest: dig("vuln")}}
	f.handle(f.event("attestor", contracts.ImageAttestedV1, one.String(), d), f.planned(two, "l"),
		f.event("planner", contracts.ImageFailedV1, "x", contracts.ImageFailed{Registry: "r.example", Repository: "b", Digest: two.Digest, Stage: "analyzer"}),
		f.event("planner", contracts.ImageUnsupportedV1, "x", contracts.ImageUnsupported{Image: other, Source: "hub", Reason: "helm-chart"}))
	all, total, err := f.s.Standings(t.Context(), "r.example", "", "", 10)
	if err != nil || total != 2 || len(all) != 2 {
		t.Fatalf("%+v, %d, %v", all, total, err)
	}
	if all[0].Digest != one.Digest || !slices.Equal(all[0].Statements, []string{dig("vsa"), dig("vuln")}) || all[0].State != StateAttested || all[0].SignedAt.IsZero() {
		t.Errorf("%+v", all[0])
	}
	if all[1].Digest != two.Digest || all[1].State != StateFailed || len(all[1].Statements) != 0 {
		t.Errorf("%+v", all[1])
	}
	page, _, err := f.s.Standings(t.Context(), "r.example", "a", one.Digest, 10)
	if err != nil || len(page) != 1 || page[0].Digest != two.Digest {
		t.Errorf("after the first: %+v, %v", page, err)
	}
	if none, _, err := f.s.Standings(t.Context(), "other.example", "", "", 10); err != nil || len(none) != 0 {
		t.Errorf("another registry: %+v, %v", none, err)
	}
}

// The listings for sweeper over HTTP: the token, pages, and what is no question.
func TestSweepersAPI(t *testing.T) {
	f := newFixture(t)
	for _, tag := range []string{"1", "2", "3"} {
		f.handle(f.observed("a", tag, dig(tag)))
	}
	f.handle(f.observed("b", "1", dig("1")), f.observed("b", "gone", ""))
	get := serve(t, f, secret)
	var seen []string
	after := ""
	for range 10 {
		status, body := get("/v1/tags?registry=r.example&limit=2&after="+after, "Bearer s3cret")
		var page struct {
			Tags []RepositoryTag `json:"tags"`
			Next *string         `json:"next"`
		}
		if err := json.Unmarshal([]byte(body), &page); err != nil || status != http.StatusOK {
			t.Fatalf("%d %s", status, body)
		}
		for _, tag := range page.Tags {
			seen = append(seen, tag.Repository+":"+tag.Tag)
			if tag.ObservedAt.IsZero() || tag.ObservedAt.After(time.Now().Add(time.Hour)) {
				t.Errorf("%s was observed at %s", tag.Tag, tag.ObservedAt)
			}
		}
		if page.Next == nil {
			break
		}
		after = *page.Next
	}
	if !slices.Equal(seen, []string{"a:1", "a:2", "a:3", "b:1"}) {
		t.Errorf("%v", seen)
	}
	until := ""
	f.s.readUpTo = func(_ context.Context, t time.Time) (bool, error) {
		until = t.Format(time.RFC3339Nano)
		return t.Year() < 2026, errors.Join(map[int]error{2030: errors.New("kafka: away")}[t.Year()])
	}
	for at, want := range map[string]struct {
		status int
		body   string
	}{
		"2025-05-04T03:02:01.5Z": {http.StatusOK, `{"read":true}`},
		"2027-05-04T03:02:01Z":   {http.StatusOK, `{"read":false}`},
		"2030-05-04T03:02:01Z":   {http.StatusServiceUnavailable, `{"error":"Service Unavailable"}`},
		"yesterday":              {http.StatusBadRequest, `until is not an RFC 3339 time`},
	} {
		if status, body := get("/v1/read?until="+at, "Bearer s3cret"); status != want.status || !strings.Contains(body, want.body) || status == http.StatusOK && until != at {
			t.Errorf("read until %s: %d %s, asked until %s", at, status, body, until)
		}
	}
	for path, want := range map[string]int{
		"/v1/read?until=2027-05-04T03:02:01Z": 401,
		"/v1/tags?registry=r.example":         401, "/v1/standings?registry=r.example": 401,
	} {
		if status, _ := get(path, "Bearer wrong"); status != want {
			t.Errorf("%s: %d", path, status)
		}
	}
	for _, path := range []string{"/v1/tags", "/v1/standings?registry=a/b", "/v1/tags?registry=r.example&limit=0"} {
		if status, body := get(path, "Bearer s3cret"); status != http.StatusBadRequest {
			t.Errorf("%s: %d %s", path, status, body)
		}
	}
	server := httptest.NewServer(f.s.API(secret))
	t.Cleanup(server.Close)
	tooMany := `{"registry":"r.example","repository":"a","tags":[` + strings.Repeat(`{"tag":"1","digest":"`+dig("1")+`"},`, maxLimit) + `{"tag":"1","digest":"` + dig("1") + `"}]}`
	for body, want := range map[string]int{
		`{"registry":"r.example","repository":"a","tags":[{"tag":"1","digest":"` + dig("1") + `"}]}`: 200,
		`{"registry":"r.example","repository":"A B","tags":[]}`:                                      400,
		`{"registry":"r.example","repository":"a","tags":[{"tag":"1","digest":"sha256:x"}]}`:         400,
		`{"registry":"r.example","repository":"a","more":1}`:                                         400,
		`not JSON`: 400,
		tooMany:    400,
	} {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, server.URL+"/v1/known", strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Authorization", "Bearer s3cret")
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		_ = resp.Body.Close()
		if resp.StatusCode != want {
			t.Errorf("%.80s: %d, want %d", body, resp.StatusCode, want)
		}
	}
}
