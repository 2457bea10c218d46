// Package stub is a tracker within the process, for demonstrations: as much of
// GitHub's REST API as ticketer asks for, in memory. It is no GitHub, and
// whoever shows it says so.
package stub

import (
	"crypto/subtle"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"sync"
	"time"
)

const (
	maxRequest = 1 << 20 // bytes of a body
	maxTickets = 10_000
)

// Ticket is a ticket as the stub has it.
type Ticket struct {
	Number   int
	Project  string // owner/repository
	Title    string
	Body     string
	Open     bool
	Labels   []string
	Comments []string
}

// Tracker is a stub. Use it as an http.Handler, at the URL that ticketer's
// configuration names for a tracker of kind github.
type Tracker struct {
	mux    *http.ServeMux
	token  string
	change func(what string, t Ticket)

	mu      sync.Mutex
	tickets []*ticket
}

type ticket struct {
	Ticket
	created, updated time.Time
}

// New returns an empty tracker that wants a bearer token. change, which may be
// nil, is told of each change ("opened", "changed", "commented", "closed",
// "reopened"), one at a time; it must not call the tracker.
func New(token string, change func(what string, t Ticket)) *Tracker {
	if change == nil {
		change = func(string, Ticket) {}
	}
	s := &Tracker{mux: http.NewServeMux(), token: token, change: change}
	const issues = "/repos/{owner}/{repository}/issues"
	for pattern, f := range map[string]func(r *http.Request, t *ticket) (int, any){
		"GET " + issues:                         s.list,
		"POST " + issues:                        s.create,
		"GET " + issues + "/{number}":           func(_ *http.Request, t *ticket) (int, any) { return http.StatusOK, t.json() },
		"PATCH " + issues + "/{number}":         s.edit,
		"GET " + issues + "/{number}/comments":  s.comments,
		"POST " + issues + "/{number}/comments": s.comment,
	} {
		s.mux.HandleFunc(pattern, s.handler(f))
	}
	return s
}

// ServeHTTP answers one request.
func (s *Tracker) ServeHTTP(w http.ResponseWriter, r *http.Request) { s.mux.ServeHTTP(w, r) }

// Tickets returns copies of all tickets, oldest first.
func (s *Tracker) Tickets() []Ticket {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []Ticket
	for _, t := range s.tickets {
		out = append(out, t.Ticket)
	}
	return out
}

func project(r *http.Request) string { return r.PathValue("owner") + "/" + r.PathValue("repository") }

// handler checks the token and finds the ticket that the path names.
func (s *Tracker) handler(f func(r *http.Request, t *ticket) (int, any)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		status, answer := http.StatusUnauthorized, any(map[string]string{"message": "Bad credentials"})
		if subtle.ConstantTimeCompare([]byte(r.Header.Get("Authorization")), []byte("Bearer "+s.token)) == 1 {
			status, answer = s.answer(r, f)
		}
		w.Header().Set("Content-Type", "application/json; charset=utf-8")
		w.WriteHeader(status)
		_ = json.NewEncoder(w).Encode(answer) // the client may have gone
	}
}

func (s *Tracker) answer(r *http.Request, f func(r *http.Request, t *ticket) (int, any)) (int, any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	number := r.PathValue("number")
	if number == "" {
		return f(r, nil)
	}
	for _, t := range s.tickets {
		if strconv.Itoa(t.Number) == number && t.Project == project(r) {
			return f(r, t)
		}
	}
	return http.StatusNotFound, map[string]string{"message": "Not Found"}
}

func (t *ticket) json() map[string]any {
	state, labels := "open", []map[string]string{}
	if !t.Open {
		state = "closed"
	}
	for _, l := range t.Labels {
		labels = append(labels, map[string]string{"name": l})
	}
	return map[string]any{
		"number": t.Number, "title": t.Title, "body": t.Body, "state": state, "labels": labels, "created_at": t.created, "updated_at": t.updated,
		"html_url": fmt.Sprintf("https://tracker-stub.invalid/%s/issues/%d", t.Project, t.Number),
	}
}

// read decodes a body; what is wrong with it becomes the answer.
func read(r *http.Request, into any) (int, any) {
	if err := json.NewDecoder(io.LimitReader(r.Body, maxRequest)).Decode(into); err != nil {
		return http.StatusBadRequest, map[string]string{"message": "Problems parsing JSON"}
	}
	return 0, nil
}

func (s *Tracker) list(r *http.Request, _ *ticket) (int, any) {
	if page := r.URL.Query().Get("page"); page != "" && page != "1" {
		return http.StatusOK, []any{} // everything is on the first
	}
	since, err := time.Parse(time.RFC3339, r.URL.Query().Get("since"))
	if err != nil {
		since = time.Time{}
	}
	out := []map[string]any{}
	for _, t := range s.tickets {
		if t.Project == project(r) && !t.updated.Before(since) {
			out = append(out, t.json())
		}
	}
	return http.StatusOK, out
}

func (s *Tracker) create(r *http.Request, _ *ticket) (int, any) {
	var b struct {
		Title  string   `json:"title"`
		Body   string   `json:"body"`
		Labels []string `json:"labels"`
	}
	if status, answer := read(r, &b); status != 0 {
		return status, answer
	}
	if b.Title == "" || len(s.tickets) >= maxTickets {
		return http.StatusUnprocessableEntity, map[string]string{"message": "Validation Failed"}
	}
	now := time.Now().UTC()
	t := &ticket{Ticket{Number: len(s.tickets) + 1, Project: project(r), Title: b.Title, Body: b.Body, Open: true, Labels: b.Labels}, now, now}
	s.tickets = append(s.tickets, t)
	s.change("opened", t.Ticket)
	return http.StatusCreated, t.json()
}

func (s *Tracker) edit(r *http.Request, t *ticket) (int, any) {
	var b struct {
		Title  *string   `json:"title"`
		Body   *string   `json:"body"`
		State  *string   `json:"state"`
		Labels *[]string `json:"labels"`
	}
	if status, answer := read(r, &b); status != 0 {
		return status, answer
	}
	if b.Title != nil {
		t.Title = *b.Title
	}
	if b.Body != nil {
		t.Body = *b.Body
	}
	if b.Labels != nil {
		t.Labels = *b.Labels
	}
	what := "changed"
	if b.State != nil && t.Open != (*b.State == "open") {
		t.Open = !t.Open
		what = map[bool]string{true: "reopened", false: "closed"}[t.Open]
	}
	t.updated = time.Now().UTC()
	s.change(what, t.Ticket)
	return http.StatusOK, t.json()
}

func (s *Tracker) comments(r *http.Request, t *ticket) (int, any) {
	out := []map[string]any{}
	if page := r.URL.Query().Get("page"); page == "" || page == "1" {
		for i, c := range t.Comments {
			out = append(out, map[string]any{"id": i + 1, "body": c})
		}
	}
	return http.StatusOK, out
}

func (s *Tracker) comment(r *http.Request, t *ticket) (int, any) {
	var b struct {
		Body string `json:"body"`
	}
	if status, answer := read(r, &b); status != 0 {
		return status, answer
	}
	t.Comments = append(t.Comments, b.Body)
	t.updated = time.Now().UTC()
	s.change("commented", t.Ticket)
	return http.StatusCreated, map[string]any{"id": len(t.Comments), "body": b.Body}
}
