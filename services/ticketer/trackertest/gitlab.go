package trackertest

import (
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
)

// gitlab is GitLab's REST API v4: docs.gitlab.com, "Issues API", "Notes API"
// and "Users API".
func gitlab(s *Server) http.Handler {
	mux := http.NewServeMux()
	const base = "/api/v4/projects/{project}/issues"
	handle := func(pattern string, f func(w http.ResponseWriter, r *http.Request, i *Issue)) {
		mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
			if r.Header.Get("Private-Token") != s.token {
				answer(w, http.StatusUnauthorized, map[string]any{"message": "401 Unauthorized"})
				return
			}
			if project := r.PathValue("project"); project != "" && project != Project {
				answer(w, http.StatusNotFound, map[string]any{"message": "404 Project Not Found"})
				return
			}
			var i *Issue
			if n := r.PathValue("number"); n != "" {
				if i = s.find(n); i == nil || i.Deleted {
					answer(w, http.StatusNotFound, map[string]any{"message": "404 Not found"})
					return
				}
			}
			f(w, r, i)
		})
	}
	handle("GET "+base, s.gitlabList)
	handle("POST "+base, s.gitlabCreate)
	handle("GET "+base+"/{number}", func(w http.ResponseWriter, _ *http.Request, i *Issue) { answer(w, 200, s.gitlabIssue(i)) })
	handle("PUT "+base+"/{number}", s.gitlabEdit)
	handle("GET "+base+"/{number}/notes", s.gitlabNotes)
	handle("POST "+base+"/{number}/notes", s.gitlabNote)
	handle("GET /api/v4/users", s.gitlabUsers)
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) { s.wrong(w, r, "no such endpoint") })
	return mux
}

func (s *Server) gitlabIssue(i *Issue) map[string]any {
	state := "opened"
	if !i.Open {
		state = "closed"
	}
	return map[string]any{
		"id": 5000 + i.Number, "iid": i.Number, "project_id": 4, "state": state, "title": i.Title, "description": i.Body,
		"labels": append([]string{}, i.Labels...), "created_at": i.Created, "updated_at": i.Updated, "confidential": i.Secret,
		"web_url": fmt.Sprintf("%s/%s/-/issues/%d", s.URL, Project, i.Number),
	}
}

// gitlabPage answers with one page and GitLab's pagination headers.
func gitlabPage(s *Server, w http.ResponseWriter, q url.Values, list []map[string]any) {
	page, next := paged(s, q, list)
	w.Header().Set("X-Page", "1")
	w.Header().Set("X-Per-Page", q.Get("per_page"))
	w.Header().Set("X-Next-Page", "")
	if next != 0 {
		w.Header().Set("X-Next-Page", strconv.Itoa(next))
	}
	answer(w, 200, page)
}

func (s *Server) gitlabList(w http.ResponseWriter, r *http.Request, _ *Issue) {
	q, ok := s.query(w, r, "assignee_id", "assignee_username", "author_id", "author_username", "confidential", "created_after", "created_before",
		"due_date", "iids[]", "in", "issue_type", "labels", "milestone", "order_by", "page", "per_page", "scope", "search", "sort", "state",
		"updated_after", "updated_before", "with_labels_details")
	if !ok {
		return
	}
	after, err := time.Parse(time.RFC3339, q.Get("created_after"))
	if err != nil || !slices.Contains([]string{"opened", "closed", "all"}, q.Get("state")) ||
		!slices.Contains([]string{"created_at", "updated_at"}, q.Get("order_by")) || !slices.Contains([]string{"asc", "desc"}, q.Get("sort")) {
		s.wrong(w, r, "created_after, state, order_by or sort")
		return
	}
	list := []map[string]any{}
	for _, i := range s.issues {
		if !i.Deleted && i.Created.After(after) {
			list = append(list, s.gitlabIssue(i))
		}
	}
	gitlabPage(s, w, q, list)
}

// gitlabContent are the fields that creating and editing have in common.
type gitlabContent struct {
	Title        *string `json:"title"`
	Description  *string `json:"description"`
	Labels       *string `json:"labels"` // separated by commas
	AssigneeIDs  []int   `json:"assignee_ids"`
	AssigneeID   int     `json:"assignee_id"`
	Confidential *bool   `json:"confidential"`
	DueDate      string  `json:"due_date"`
	EpicID       int     `json:"epic_id"`
	IssueType    string  `json:"issue_type"`
	MilestoneID  int     `json:"milestone_id"`
	Weight       int     `json:"weight"`
}

func (c gitlabContent) labels() *[]string {
	if c.Labels == nil {
		return nil
	}
	l := strings.Split(*c.Labels, ",")
	return &l
}

func (s *Server) gitlabCreate(w http.ResponseWriter, r *http.Request, _ *Issue) {
	var b struct {
		gitlabContent
		CreatedAt string `json:"created_at"`
		IID       int    `json:"iid"`
	}
	if !s.fields(w, r, &b) {
		return
	}
	if b.Title == nil || *b.Title == "" || len([]rune(*b.Title)) > 255 || b.Description == nil || len(*b.Description) > 1048576 || b.Labels == nil {
		s.wrong(w, r, "title, description or labels are missing or too long")
		return
	}
	var assignees []string
	for _, id := range b.AssigneeIDs {
		assignees = append(assignees, fmt.Sprint(id))
	}
	i := s.add(*b.Title, *b.Description, *b.labels(), assignees)
	i.Secret = b.Confidential != nil && *b.Confidential
	answer(w, http.StatusCreated, s.gitlabIssue(i))
}

func (s *Server) gitlabEdit(w http.ResponseWriter, r *http.Request, i *Issue) {
	var b struct {
		gitlabContent
		AddLabels        *string `json:"add_labels"`
		RemoveLabels     *string `json:"remove_labels"`
		StateEvent       *string `json:"state_event"`
		UpdatedAt        string  `json:"updated_at"`
		DiscussionLocked *bool   `json:"discussion_locked"`
	}
	if !s.fields(w, r, &b) {
		return
	}
	if b.StateEvent != nil && *b.StateEvent != "close" && *b.StateEvent != "reopen" {
		s.wrong(w, r, "state_event %q", *b.StateEvent)
		return
	}
	s.edit(i, b.Title, b.Description, b.labels())
	if b.StateEvent != nil {
		i.Open = *b.StateEvent == "reopen"
	}
	answer(w, 200, s.gitlabIssue(i))
}

func (s *Server) gitlabNotes(w http.ResponseWriter, r *http.Request, i *Issue) {
	q, ok := s.query(w, r, "activity_filter", "order_by", "sort", "page", "per_page")
	if !ok {
		return
	}
	if q.Get("order_by") != "created_at" || q.Get("sort") != "desc" {
		s.wrong(w, r, "order_by or sort")
		return
	}
	list := []map[string]any{}
	for n := len(i.Comments) - 1; n >= 0; n-- {
		list = append(list, map[string]any{"id": n + 1, "body": i.Comments[n].Body, "created_at": i.Comments[n].Created, "system": false})
	}
	gitlabPage(s, w, q, list)
}

func (s *Server) gitlabNote(w http.ResponseWriter, r *http.Request, i *Issue) {
	var b struct {
		Body      string `json:"body"`
		CreatedAt string `json:"created_at"`
		Internal  bool   `json:"internal"`
	}
	if !s.fields(w, r, &b) {
		return
	}
	if b.Body == "" || len(b.Body) > 1000000 {
		s.wrong(w, r, "body is missing or too long")
		return
	}
	i.Comments = append(i.Comments, Comment{b.Body, s.now().UTC()})
	i.Updated = s.now().UTC()
	answer(w, http.StatusCreated, map[string]any{"id": len(i.Comments), "body": b.Body, "created_at": s.now().UTC()})
}

// gitlabUsers knows alice, whose id is 7.
func (s *Server) gitlabUsers(w http.ResponseWriter, r *http.Request, _ *Issue) {
	q, ok := s.query(w, r, "username")
	if !ok {
		return
	}
	list := []map[string]any{}
	if q.Get("username") == "alice" {
		list = append(list, map[string]any{"id": 7, "username": "alice", "name": "Alice", "state": "active"})
	}
	answer(w, 200, list)
}
