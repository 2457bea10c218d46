// Package trackertest holds trackers to test against: HTTP servers that speak
// as much of GitHub's and GitLab's APIs as ticketer needs, refuse every field,
// parameter and header that the vendors do not document, and fail on demand.
package trackertest

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// Project is the one project that exists.
const Project = "team/app"

// Token is the token that both servers want; SetToken changes it.
const Token = "s3cret-token"

// Fault says how a request fails. The zero value lets it succeed.
type Fault struct {
	Status int               // answered without doing anything
	Header map[string]string // of that answer
	Body   string            // of that answer
	Lost   bool              // done, and the connection is closed instead of an answer
	Late   bool              // not done, the connection is closed; Land does it later
}

// Issue is an issue as the server has it.
type Issue struct {
	Number    int
	Title     string
	Body      string
	Open      bool
	Labels    []string
	Assignees []string
	Secret    bool // confidential
	Deleted   bool
	Comments  []Comment
	Created   time.Time
	Updated   time.Time
}

// Comment is a comment on an issue.
type Comment struct {
	Body    string
	Created time.Time
}

// Server is a tracker.
type Server struct {
	URL string

	t        testing.TB
	now      func() time.Time
	mu       sync.Mutex
	token    string
	issues   []*Issue
	faults   func(r *http.Request) Fault
	late     []func()
	requests []string
	pageSize int
}

// GitHub starts a server with GitHub's API. Requests that GitHub would not
// understand fail the test.
func GitHub(t testing.TB, now func() time.Time) *Server { return start(t, now, github) }

// GitLab starts a server with GitLab's API.
func GitLab(t testing.TB, now func() time.Time) *Server { return start(t, now, gitlab) }

func start(t testing.TB, now func() time.Time, routes func(s *Server) http.Handler) *Server {
	s := &Server{t: t, now: now, token: Token, pageSize: 100}
	h := routes(s)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { s.serve(h, w, r) }))
	t.Cleanup(server.Close)
	s.URL = server.URL
	return s
}

// SetFaults sets what fails; nil: nothing. It is called for each request.
func (s *Server) SetFaults(f func(r *http.Request) Fault) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.faults = f
}

// SetToken changes the token that is wanted.
func (s *Server) SetToken(token string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.token = token
}

// SetPageSize makes pages smaller than they were asked for, as vendors may.
func (s *Server) SetPageSize(n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.pageSize = n
}

// Change lets a human change the server's issues.
func (s *Server) Change(f func(issues []*Issue)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f(s.issues)
}

// Issues returns copies of the issues that were not deleted.
func (s *Server) Issues() []Issue {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []Issue
	for _, i := range s.issues {
		if !i.Deleted {
			c := *i
			c.Labels, c.Comments = slices.Clone(i.Labels), slices.Clone(i.Comments)
			out = append(out, c)
		}
	}
	return out
}

// Requests returns what was asked so far ("POST /path"), and forgets it.
func (s *Server) Requests() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := s.requests
	s.requests = nil
	return out
}

// Land carries out the requests that failed as Late.
func (s *Server) Land() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, do := range s.late {
		do()
	}
	s.late = nil
}

func (s *Server) serve(h http.Handler, w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.requests = append(s.requests, r.Method+" "+r.URL.EscapedPath())
	var f Fault
	if s.faults != nil {
		f = s.faults(r)
	}
	switch {
	case f.Status != 0:
		for k, v := range f.Header {
			w.Header().Set(k, v)
		}
		w.WriteHeader(f.Status)
		fmt.Fprint(w, f.Body)
	case f.Lost:
		h.ServeHTTP(httptest.NewRecorder(), r)
		panic(http.ErrAbortHandler)
	case f.Late:
		body, err := io.ReadAll(r.Body)
		if err != nil {
			s.t.Errorf("read the body of %s: %v", r.URL, err)
		}
		again := r.Clone(r.Context())
		again.Body = io.NopCloser(strings.NewReader(string(body)))
		s.late = append(s.late, func() { h.ServeHTTP(httptest.NewRecorder(), again) })
		panic(http.ErrAbortHandler)
	default:
		h.ServeHTTP(w, r)
	}
}

// wrong fails the test and answers as a vendor would.
func (s *Server) wrong(w http.ResponseWriter, r *http.Request, format string, args ...any) {
	s.t.Errorf("%s %s: %s", r.Method, r.URL, fmt.Sprintf(format, args...))
	answer(w, http.StatusUnprocessableEntity, map[string]any{"message": fmt.Sprintf(format, args...)})
}

func answer(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json; charset=utf-8")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(v) // the client may have gone
}

// query returns the parameters, each of which must be allowed and given once.
func (s *Server) query(w http.ResponseWriter, r *http.Request, allowed ...string) (url.Values, bool) {
	for name, values := range r.URL.Query() {
		if !slices.Contains(allowed, name) || len(values) != 1 {
			s.wrong(w, r, "parameter %s=%q is not documented", name, values)
			return nil, false
		}
	}
	return r.URL.Query(), true
}

// fields decodes the body into v, a struct of the documented fields.
func (s *Server) fields(w http.ResponseWriter, r *http.Request, v any) bool {
	if !strings.HasPrefix(r.Header.Get("Content-Type"), "application/json") {
		s.wrong(w, r, "content type %q", r.Header.Get("Content-Type"))
		return false
	}
	d := json.NewDecoder(r.Body)
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		s.wrong(w, r, "body: %v", err)
		return false
	}
	return true
}

func (s *Server) add(title, body string, labels, assignees []string) *Issue {
	i := &Issue{
		Number: len(s.issues) + 1, Title: title, Body: body, Open: true, Labels: labels, Assignees: assignees,
		Created: s.now().UTC(), Updated: s.now().UTC(),
	}
	s.issues = append(s.issues, i)
	return i
}

// AddIssue makes an issue as a human would.
func (s *Server) AddIssue(title, body string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.add(title, body, nil, nil).Number
}

func (s *Server) find(number string) *Issue {
	for _, i := range s.issues {
		if fmt.Sprint(i.Number) == number {
			return i
		}
	}
	return nil
}

// paged returns one page of a list and the number of the next, 0 for none.
func paged[T any](s *Server, q url.Values, all []T) (page []T, next int) {
	size, n := 30, 1
	_, _ = fmt.Sscan(q.Get("per_page"), &size)
	_, _ = fmt.Sscan(q.Get("page"), &n)
	size = min(size, s.pageSize)
	from := min((n-1)*size, len(all))
	to := min(from+size, len(all))
	if to < len(all) {
		next = n + 1
	}
	return all[from:to], next
}
