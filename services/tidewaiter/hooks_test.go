package main

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"reflect"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/run"
	"github.com/tidewaiter/tidewaiter/services/intake"
)

// example decodes a golden example.
func example[T any](t *testing.T, name string) (out T) {
	t.Helper()
	b, err := contracts.Example(name)
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(b, &out); err != nil {
		t.Fatal(err)
	}
	return out
}

// fakeIntake answers as intake's API does, with total deliveries.
func fakeIntake(t *testing.T, total int) (url string, asked *[]string) {
	t.Helper()
	asked = new([]string)
	sample := example[contracts.Delivery](t, "cli-hooks-log")
	mux := http.NewServeMux()
	answer := func(w http.ResponseWriter, v any) {
		if err := json.NewEncoder(w).Encode(v); err != nil {
			t.Error(err)
		}
	}
	mux.HandleFunc("GET /v1/deliveries", func(w http.ResponseWriter, r *http.Request) {
		q := r.URL.Query()
		*asked = append(*asked, r.URL.RawQuery)
		limit, err := strconv.Atoi(q.Get("limit"))
		if err != nil || limit > 1000 {
			t.Errorf("limit %q", q.Get("limit"))
		}
		first, _ := strconv.Atoi(q.Get("after"))
		out := intake.Deliveries{Deliveries: []contracts.Delivery{}}
		for i := first; i < min(total, first+limit); i++ {
			d := sample
			d.ID = strconv.Itoa(i)
			out.Deliveries = append(out.Deliveries, d)
		}
		if n := first + limit; n <= total {
			next := strconv.Itoa(n)
			out.Next = &next
		}
		answer(w, out)
	})
	mux.HandleFunc("GET /v1/sources", func(w http.ResponseWriter, r *http.Request) {
		*asked = append(*asked, r.URL.RawQuery)
		idle := contracts.SourceStatus{Source: "idle", Kind: "gitlab", Configured: true, Reasons: map[string]int{}}
		answer(w, intake.SourceStatuses{Sources: []contracts.SourceStatus{idle, example[contracts.SourceStatus](t, "cli-hooks-status")}})
	})
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != "Bearer admin" {
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		mux.ServeHTTP(w, r)
	}))
	t.Cleanup(server.Close)
	t.Setenv("TIDEWAITER_TOKEN", "admin")
	return server.URL, asked
}

func TestHooksLog(t *testing.T) {
	url, asked := fakeIntake(t, 1203)
	code, stdout, stderr := tidewaiter(t, "", "hooks", "log", "--intake", url, "--limit", "1100", "--output", "json",
		"--source", "main-registry", "--reason", "unauthorized", "--since", "1h")
	if code != run.ExitOK {
		t.Fatalf("exit code %d: %s", code, stderr)
	}
	lines := strings.Split(strings.TrimSpace(stdout), "\n")
	if len(lines) != 1100 || len(*asked) != 3 {
		t.Errorf("%d lines in %d questions", len(lines), len(*asked))
	}
	for _, part := range []string{"source=main-registry", "reason=unauthorized", "since=1h"} {
		if !strings.Contains((*asked)[2], part) {
			t.Errorf("%s is not in %s", part, (*asked)[2])
		}
	}
	want := example[contracts.Delivery](t, "cli-hooks-log")
	want.ID = "0"
	var got contracts.Delivery
	if err := json.Unmarshal([]byte(lines[0]), &got); err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("%v: got %+v", err, got)
	}

	code, stdout, stderr = tidewaiter(t, "", "hooks", "log", "--intake", url, "--limit", "2")
	if code != run.ExitOK {
		t.Fatalf("exit code %d: %s", code, stderr)
	}
	for _, part := range []string{
		want.Time.Local().Format(time.DateTime), "main-registry", "401", "header Authorization is missing",
		"unauthorized: " + want.Means + " " + want.Action,
	} {
		if strings.Count(stdout, part) == 0 {
			t.Errorf("%q is not in\n%s", part, stdout)
		}
	}
	if strings.Count(stdout, want.Means) != 1 {
		t.Errorf("a reason is explained more than once:\n%s", stdout)
	}
}

func TestHooksStatus(t *testing.T) {
	url, asked := fakeIntake(t, 0)
	code, stdout, stderr := tidewaiter(t, "", "hooks", "status", "--intake", url, "--since", "168h")
	if code != run.ExitOK || !strings.Contains((*asked)[0], "since=168h") {
		t.Fatalf("exit code %d: %s, asked %q", code, stderr, *asked)
	}
	for _, part := range []string{"main-registry", "ignored 1101, stored 281, unauthorized 12", "idle", "main-registry, last trouble at", "Put the same secret"} {
		if !strings.Contains(stdout, part) {
			t.Errorf("%q is not in\n%s", part, stdout)
		}
	}
	code, stdout, _ = tidewaiter(t, "", "hooks", "status", "--intake", url, "--output", "json")
	lines := strings.Split(strings.TrimSpace(stdout), "\n")
	var got contracts.SourceStatus
	if err := json.Unmarshal([]byte(lines[len(lines)-1]), &got); err != nil || code != run.ExitOK || len(lines) != 2 {
		t.Fatalf("exit code %d, %v\n%s", code, err, stdout)
	}
	if want := example[contracts.SourceStatus](t, "cli-hooks-status"); !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, want %+v", got, want)
	}
}

func TestHooksTrouble(t *testing.T) {
	url, _ := fakeIntake(t, 0)
	for _, c := range []struct {
		args []string
		code int
		says string
	}{
		{[]string{"log", "--intake", url, "--limit", "0"}, run.ExitUsage, "--limit"},
		{[]string{"log", "--intake", url, "--token-env", "NOT_SET"}, run.ExitUsage, "--token-env"},
		{[]string{"log", "--server", url}, run.ExitUsage, "--intake"},
		{[]string{"log", "--data", t.TempDir()}, run.ExitUnavailable, "nothing is running"},
		{[]string{"status", "--intake", "http://127.0.0.1:1"}, run.ExitUnavailable, "127.0.0.1:1"},
		{[]string{"log", "--intake", url}, run.ExitOK, "no calls"},
	} {
		code, stdout, stderr := tidewaiter(t, "", append([]string{"hooks"}, c.args...)...)
		if code != c.code || !strings.Contains(stderr, c.says) || stdout != "" {
			t.Errorf("%v: exit code %d, want %d with %q in\n%s%s", c.args, code, c.code, c.says, stdout, stderr)
		}
	}
}

func TestWhereTags(t *testing.T) {
	period := example[contracts.TagPeriod](t, "cli-where-tags")
	gone := contracts.TagPeriod{Repository: period.Repository, Tag: period.Tag, From: *period.Until}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		answer := map[string]any{"periods": []contracts.TagPeriod{}}
		if r.URL.Path == "/v1/history" && r.URL.Query().Get("ref") == period.Repository {
			answer["periods"] = []contracts.TagPeriod{gone, period}
		}
		if err := json.NewEncoder(w).Encode(answer); err != nil {
			t.Error(err)
		}
	}))
	defer server.Close()
	code, stdout, stderr := tidewaiter(t, "", "where", period.Repository, "--tags", "--server", server.URL)
	lines := strings.Split(strings.TrimSpace(stdout), "\n")
	if code != run.ExitOK || len(lines) != 2 || !strings.HasSuffix(lines[0], "gone") || !strings.HasSuffix(lines[1], *period.Digest) {
		t.Errorf("exit code %d\n%s%s", code, stdout, stderr)
	}
	code, stdout, _ = tidewaiter(t, "", "where", period.Repository, "--tags", "--server", server.URL, "-o", "json")
	lines = strings.Split(strings.TrimSpace(stdout), "\n")
	var got contracts.TagPeriod
	if err := json.Unmarshal([]byte(lines[len(lines)-1]), &got); err != nil || code != run.ExitOK || !reflect.DeepEqual(got, period) {
		t.Errorf("exit code %d, %v\n%s", code, err, stdout)
	}
	if code, _, stderr := tidewaiter(t, "", "where", "r.example/none", "--tags", "--server", server.URL); code != run.ExitUsage || !strings.Contains(stderr, "r.example/none") {
		t.Errorf("exit code %d: %s", code, stderr)
	}
}
