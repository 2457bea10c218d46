package tracker

import (
	"context"
	"errors"
	"log/slog"
	"net/http"
	"strconv"
	"strings"
	"time"

	gitlab "gitlab.com/gitlab-org/api/client-go"
)

// GitLab is GitLab's REST API v4, "Issues API" and "Notes API". It needs a
// token of scope api that may plan in the projects.
type GitLab struct{ client *gitlab.Client }

var _ Tracker = (*GitLab)(nil)

// unlimited leaves the pace to us: client-go would otherwise wait in the call.
type unlimited struct{}

// Wait returns at once.
func (unlimited) Wait(context.Context) error { return nil }

// NewGitLab returns a client of the GitLab server at o.URL (https://gitlab.com).
func NewGitLab(o Options) (*GitLab, error) {
	h, base, err := newHTTP(o, func(h http.Header, secret string) { h.Set("PRIVATE-TOKEN", secret) })
	if err != nil {
		return nil, err
	}
	c, err := gitlab.NewClient("", gitlab.WithBaseURL(base.String()), gitlab.WithHTTPClient(h), gitlab.WithoutRetries(),
		gitlab.WithCustomLimiter(unlimited{}), gitlab.WithUserAgent("tidewaiter"), gitlab.WithURLWarningLogger(slog.New(slog.DiscardHandler)))
	if err != nil {
		return nil, errors.New("the address is no GitLab URL")
	}
	return &GitLab{client: c}, nil
}

// sound calls GitLab. client-go panics when it decodes an issue that lacks what
// an issue has, as a proxy's answer may.
func sound[T any](call func() (T, *gitlab.Response, error)) (v T, resp *gitlab.Response, err error) {
	defer func() {
		if recover() != nil {
			err = &Error{Kind: ErrUnavailable, Message: "the answer is none of GitLab"}
		}
	}()
	return call()
}

func iid(id string) (int64, error) {
	n, err := number(id)
	return int64(n), err
}

func ofGitLab(i *gitlab.Issue) Ticket {
	return Ticket{
		ID: strconv.FormatInt(i.IID, 10), URL: i.WebURL, Open: i.State == "opened",
		Title: i.Title, Body: i.Description, Labels: i.Labels,
	}
}

// Find lists the project's issues by the time they were made.
func (g *GitLab) Find(ctx context.Context, project, marker string, since time.Time) ([]Ticket, error) {
	since = since.UTC()
	state, order, sort := "all", "created_at", "asc"
	o := &gitlab.ListProjectIssuesOptions{
		ListOptions: gitlab.ListOptions{PerPage: pageSize, Page: 1},
		State:       &state, CreatedAfter: &since, OrderBy: &order, Sort: &sort,
	}
	var found []Ticket
	for range maxPages {
		list, resp, err := sound(func() ([]*gitlab.Issue, *gitlab.Response, error) {
			return g.client.Issues.ListProjectIssues(project, o, gitlab.WithContext(ctx))
		})
		if err != nil {
			return nil, failure(ctx, "list tickets of "+project, err)
		}
		for _, i := range list {
			if strings.Contains(i.Description, marker) {
				found = append(found, ofGitLab(i))
			}
		}
		if resp.NextPage == 0 {
			sortByNumber(found)
			return found, nil
		}
		o.Page = resp.NextPage
	}
	return nil, tooMany(project)
}

// Get returns one issue. GitLab says "404 Project Not Found" of a project, and
// another 404 of an issue that was deleted.
func (g *GitLab) Get(ctx context.Context, project, id string) (Ticket, error) {
	n, err := iid(id)
	if err != nil {
		return Ticket{}, err
	}
	i, _, err := sound(func() (*gitlab.Issue, *gitlab.Response, error) {
		return g.client.Issues.GetIssue(project, n, gitlab.WithContext(ctx))
	})
	var e *Error
	if errors.As(err, &e) && e.Status == http.StatusNotFound && e.Message != "" && !strings.Contains(e.Message, "Project") {
		err = &Error{Kind: ErrGone, Status: e.Status, Message: e.Message}
	}
	if err != nil {
		return Ticket{}, failure(ctx, "read ticket "+project+"#"+id, err)
	}
	return ofGitLab(i), nil
}

// Create makes an issue. Assignees that GitLab does not know are left out.
func (g *GitLab) Create(ctx context.Context, project string, d Draft) (Ticket, error) {
	o := &gitlab.CreateIssueOptions{Title: &d.Title, Description: &d.Body, Labels: (*gitlab.LabelOptions)(&d.Labels)}
	if d.Confidential {
		o.Confidential = &d.Confidential
	}
	var ids []int64
	for _, name := range d.Assignees {
		users, _, err := g.client.Users.ListUsers(&gitlab.ListUsersOptions{Username: &name}, gitlab.WithContext(ctx))
		if err != nil {
			return Ticket{}, failure(ctx, "look for the user "+name, err)
		}
		for _, u := range users {
			ids = append(ids, u.ID)
		}
	}
	if len(ids) > 0 {
		o.AssigneeIDs = &ids
	}
	i, _, err := sound(func() (*gitlab.Issue, *gitlab.Response, error) {
		return g.client.Issues.CreateIssue(project, o, gitlab.WithContext(ctx))
	})
	if err != nil {
		return Ticket{}, failure(ctx, "create a ticket in "+project, err)
	}
	if i.IID == 0 {
		return Ticket{}, failure(ctx, "create a ticket in "+project, errNoNumber)
	}
	return ofGitLab(i), nil
}

// Edit changes an issue.
func (g *GitLab) Edit(ctx context.Context, project, id string, c Change) error {
	n, err := iid(id)
	if err != nil {
		return err
	}
	o := &gitlab.UpdateIssueOptions{Title: c.Title, Description: c.Body, Labels: (*gitlab.LabelOptions)(c.Labels)}
	if c.Open != nil {
		change := "reopen"
		if !*c.Open {
			change = "close"
		}
		o.StateEvent = &change
	}
	_, _, err = sound(func() (*gitlab.Issue, *gitlab.Response, error) {
		return g.client.Issues.UpdateIssue(project, n, o, gitlab.WithContext(ctx))
	})
	return failure(ctx, "change ticket "+project+"#"+id, err)
}

// Comment adds a note.
func (g *GitLab) Comment(ctx context.Context, project, id, text string) error {
	n, err := iid(id)
	if err != nil {
		return err
	}
	_, _, err = g.client.Notes.CreateIssueNote(project, n, &gitlab.CreateIssueNoteOptions{Body: &text}, gitlab.WithContext(ctx))
	return failure(ctx, "comment on ticket "+project+"#"+id, err)
}

// Commented looks for a marker in the issue's notes, newest first.
func (g *GitLab) Commented(ctx context.Context, project, id, marker string, since time.Time) (bool, error) {
	n, err := iid(id)
	if err != nil {
		return false, err
	}
	order, sort := "created_at", "desc"
	o := &gitlab.ListIssueNotesOptions{ListOptions: gitlab.ListOptions{PerPage: pageSize, Page: 1}, OrderBy: &order, Sort: &sort}
	for range maxPages {
		list, resp, err := g.client.Notes.ListIssueNotes(project, n, o, gitlab.WithContext(ctx))
		if err != nil {
			return false, failure(ctx, "list notes of ticket "+project+"#"+id, err)
		}
		for _, note := range list {
			if strings.Contains(note.Body, marker) {
				return true, nil
			}
			if note.CreatedAt != nil && note.CreatedAt.Before(since) {
				return false, nil
			}
		}
		if resp.NextPage == 0 {
			return false, nil
		}
		o.Page = resp.NextPage
	}
	return false, tooMany(project)
}
