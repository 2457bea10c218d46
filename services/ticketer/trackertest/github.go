package trackertest

import (
	"fmt"
	"net/http"
	"slices"
	"time"
)

// github is GitHub's REST API, version 2022-11-28: docs.github.com,
// "REST API endpoints for issues" and "… for issue comments".
func github(s *Server) http.Handler {
	mux := http.NewServeMux()
	const base = "/repos/{owner}/{repo}/issues"
	handle := func(pattern string, f func(w http.ResponseWriter, r *http.Request, i *Issue)) {
		mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
			if !s.githubHead(w, r) {
				return
			}
			var i *Issue
			if n := r.PathValue("number"); n != "" {
				if i = s.find(n); i == nil {
					answer(w, http.StatusNotFound, githubError("Not Found"))
					return
				}
				if i.Deleted {
					answer(w, http.StatusGone, githubError("This issue was deleted"))
					return
				}
			}
			f(w, r, i)
		})
	}
	handle("GET "+base, s.githubList)
	handle("POST "+base, s.githubCreate)
	handle("GET "+base+"/{number}", func(w http.ResponseWriter, _ *http.Request, i *Issue) { answer(w, 200, s.githubIssue(i)) })
	handle("PATCH "+base+"/{number}", s.githubEdit)
	handle("GET "+base+"/{number}/comments", s.githubComments)
	handle("POST "+base+"/{number}/comments", s.githubComment)
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) { s.wrong(w, r, "no such endpoint") })
	return mux
}

func githubError(message string) map[string]any {
	return map[string]any{"message": message, "documentation_url": "https://docs.github.com/rest", "status": "404"}
}

func (s *Server) githubHead(w http.ResponseWriter, r *http.Request) bool {
	switch {
	case r.Header.Get("User-Agent") == "":
		s.wrong(w, r, "no User-Agent")
	case r.Header.Get("Accept") == "" || r.Header.Get("X-Github-Api-Version") != "2022-11-28":
		s.wrong(w, r, "Accept %q, version %q", r.Header.Get("Accept"), r.Header.Get("X-Github-Api-Version"))
	case r.Header.Get("Authorization") != "Bearer "+s.token:
		answer(w, http.StatusUnauthorized, githubError("Bad credentials"))
	case r.PathValue("owner")+"/"+r.PathValue("repo") != Project:
		answer(w, http.StatusNotFound, githubError("Not Found"))
	default:
		return true
	}
	return false
}

func (s *Server) githubIssue(i *Issue) map[string]any {
	state := "open"
	if !i.Open {
		state = "closed"
	}
	labels := []map[string]any{}
	for _, l := range i.Labels {
		labels = append(labels, map[string]any{"id": len(l), "name": l, "color": "ededed", "default": false})
	}
	return map[string]any{
		"id": 1000 + i.Number, "node_id": "I_x", "number": i.Number, "state": state, "title": i.Title, "body": i.Body,
		"html_url": fmt.Sprintf("%s/%s/issues/%d", s.URL, Project, i.Number), "labels": labels,
		"created_at": i.Created, "updated_at": i.Updated, "comments": len(i.Comments), "user": map[string]any{"login": "bot", "id": 1},
	}
}

func (s *Server) githubList(w http.ResponseWriter, r *http.Request, _ *Issue) {
	q, ok := s.query(w, r, "milestone", "state", "assignee", "type", "creator", "mentioned", "labels", "sort", "direction", "since", "per_page", "page")
	if !ok {
		return
	}
	if !slices.Contains([]string{"open", "closed", "all"}, q.Get("state")) || !slices.Contains([]string{"created", "updated", "comments"}, q.Get("sort")) ||
		!slices.Contains([]string{"asc", "desc"}, q.Get("direction")) {
		s.wrong(w, r, "state, sort or direction")
		return
	}
	since, err := time.Parse(time.RFC3339, q.Get("since"))
	if err != nil {
		s.wrong(w, r, "since: %v", err)
		return
	}
	list := []map[string]any{}
	for _, i := range s.issues {
		if !i.Deleted && !i.Updated.Before(since) {
			list = append(list, s.githubIssue(i))
		}
	}
	// A pull request is an issue too, and may quote the text of one.
	pull := s.githubIssue(&Issue{Number: 9999, Body: "mentions everything"})
	pull["pull_request"] = map[string]any{"url": s.URL}
	list = append(list, pull)
	page, next := paged(s, q, list)
	s.githubLink(w, r, next)
	answer(w, 200, page)
}

func (s *Server) githubLink(w http.ResponseWriter, r *http.Request, next int) {
	if next == 0 {
		return
	}
	u := *r.URL
	q := u.Query()
	q.Set("page", fmt.Sprint(next))
	u.RawQuery = q.Encode()
	w.Header().Set("Link", fmt.Sprintf(`<%s%s>; rel="next"`, s.URL, u.String()))
}

func (s *Server) githubCreate(w http.ResponseWriter, r *http.Request, _ *Issue) {
	var b struct {
		Title     *string  `json:"title"`
		Body      string   `json:"body"`
		Assignee  *string  `json:"assignee"`
		Milestone any      `json:"milestone"`
		Labels    []string `json:"labels"`
		Assignees []string `json:"assignees"`
		Type      *string  `json:"type"`
	}
	if !s.fields(w, r, &b) {
		return
	}
	if b.Title == nil || *b.Title == "" || len([]rune(*b.Title)) > 256 || len([]rune(b.Body)) > 65536 {
		s.wrong(w, r, "title or body is missing or too long")
		return
	}
	answer(w, http.StatusCreated, s.githubIssue(s.add(*b.Title, b.Body, b.Labels, b.Assignees)))
}

func (s *Server) githubEdit(w http.ResponseWriter, r *http.Request, i *Issue) {
	var b struct {
		Title       *string   `json:"title"`
		Body        *string   `json:"body"`
		Assignee    *string   `json:"assignee"`
		State       *string   `json:"state"`
		StateReason *string   `json:"state_reason"`
		Milestone   any       `json:"milestone"`
		Labels      *[]string `json:"labels"`
		Assignees   *[]string `json:"assignees"`
		Type        *string   `json:"type"`
	}
	if !s.fields(w, r, &b) {
		return
	}
	if b.State != nil && *b.State != "open" && *b.State != "closed" ||
		b.StateReason != nil && !slices.Contains([]string{"completed", "not_planned", "duplicate", "reopened"}, *b.StateReason) {
		s.wrong(w, r, "state or state_reason")
		return
	}
	s.edit(i, b.Title, b.Body, b.Labels)
	if b.State != nil {
		i.Open = *b.State == "open"
	}
	answer(w, 200, s.githubIssue(i))
}

func (s *Server) edit(i *Issue, title, body *string, labels *[]string) {
	i.Updated = s.now().UTC()
	if title != nil {
		i.Title = *title
	}
	if body != nil {
		i.Body = *body
	}
	if labels != nil {
		i.Labels = *labels
	}
}

func (s *Server) githubComments(w http.ResponseWriter, r *http.Request, i *Issue) {
	q, ok := s.query(w, r, "since", "per_page", "page")
	if !ok {
		return
	}
	if _, err := time.Parse(time.RFC3339, q.Get("since")); err != nil {
		s.wrong(w, r, "since: %v", err)
		return
	}
	list := []map[string]any{}
	for n, c := range i.Comments {
		list = append(list, map[string]any{"id": n + 1, "body": c.Body, "created_at": c.Created, "updated_at": c.Created})
	}
	page, next := paged(s, q, list)
	s.githubLink(w, r, next)
	answer(w, 200, page)
}

func (s *Server) githubComment(w http.ResponseWriter, r *http.Request, i *Issue) {
	var b struct {
		Body string `json:"body"`
	}
	if !s.fields(w, r, &b) {
		return
	}
	if b.Body == "" {
		s.wrong(w, r, "body is missing")
		return
	}
	i.Comments = append(i.Comments, Comment{b.Body, s.now().UTC()})
	i.Updated = s.now().UTC()
	answer(w, http.StatusCreated, map[string]any{"id": len(i.Comments), "body": b.Body, "created_at": s.now().UTC()})
}
