package tracker

import (
	"context"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/google/go-github/v74/github"
)

// GitHub is GitHub's REST API, "Issues". It needs a token with write access to
// the issues of the repositories; GitHub drops labels of tokens without push access.
type GitHub struct{ client *github.Client }

var _ Tracker = (*GitHub)(nil)

// NewGitHub returns a client of the API at o.URL (https://api.github.com/, or
// https://HOST/api/v3/ of a GitHub Enterprise server).
func NewGitHub(o Options) (*GitHub, error) {
	h, base, err := newHTTP(o, func(h http.Header, secret string) { h.Set("Authorization", "Bearer "+secret) })
	if err != nil {
		return nil, err
	}
	c := github.NewClient(h)
	if !strings.HasSuffix(base.Path, "/") {
		base.Path += "/"
	}
	c.BaseURL, c.UserAgent = base, "tidewaiter"
	c.DisableRateLimitCheck = true // the pauses are ours to keep, with the event put aside
	return &GitHub{client: c}, nil
}

// split returns owner and repository; configuration has checked that there are two.
func split(project string) (owner, repository string) {
	owner, repository, _ = strings.Cut(project, "/")
	return owner, repository
}

func number(id string) (int, error) {
	n, err := strconv.Atoi(id)
	if err != nil || n <= 0 {
		return 0, &Error{Kind: ErrInvalid, Message: fmt.Sprintf("%q is no ticket number", clean(id))}
	}
	return n, nil
}

func ofGitHub(i *github.Issue) Ticket {
	t := Ticket{
		ID: strconv.Itoa(i.GetNumber()), URL: i.GetHTMLURL(), Open: i.GetState() == "open",
		Title: i.GetTitle(), Body: i.GetBody(),
	}
	for _, l := range i.Labels {
		t.Labels = append(t.Labels, l.GetName())
	}
	return t
}

// Find lists the repository's issues by the time they last changed, which is
// not before they were made.
func (g *GitHub) Find(ctx context.Context, project, marker string, since time.Time) ([]Ticket, error) {
	owner, repository := split(project)
	o := &github.IssueListByRepoOptions{State: "all", Since: since.UTC(), Sort: "created", Direction: "asc"}
	o.ListOptions = github.ListOptions{PerPage: pageSize, Page: 1}
	var found []Ticket
	for range maxPages {
		list, resp, err := g.client.Issues.ListByRepo(ctx, owner, repository, o)
		if err != nil {
			return nil, failure(ctx, "list tickets of "+project, err)
		}
		for _, i := range list {
			if !i.IsPullRequest() && strings.Contains(i.GetBody(), marker) {
				found = append(found, ofGitHub(i))
			}
		}
		if resp.NextPage == 0 {
			sortByNumber(found)
			return found, nil
		}
		o.ListOptions.Page = resp.NextPage
	}
	return nil, tooMany(project)
}

func tooMany(project string) error {
	return &Error{Kind: ErrInvalid, Message: fmt.Sprintf("%s has too many tickets to look for one", project)}
}

func sortByNumber(list []Ticket) {
	slices.SortFunc(list, func(a, b Ticket) int {
		x, _ := strconv.Atoi(a.ID)
		y, _ := strconv.Atoi(b.ID)
		return x - y
	})
}

// Get returns one issue.
func (g *GitHub) Get(ctx context.Context, project, id string) (Ticket, error) {
	owner, repository := split(project)
	n, err := number(id)
	if err != nil {
		return Ticket{}, err
	}
	i, _, err := g.client.Issues.Get(ctx, owner, repository, n)
	if err != nil {
		return Ticket{}, failure(ctx, "read ticket "+project+"#"+id, err)
	}
	return ofGitHub(i), nil
}

// Create makes an issue.
func (g *GitHub) Create(ctx context.Context, project string, d Draft) (Ticket, error) {
	owner, repository := split(project)
	req := &github.IssueRequest{Title: &d.Title, Body: &d.Body, Labels: &d.Labels}
	if len(d.Assignees) > 0 {
		req.Assignees = &d.Assignees
	}
	i, _, err := g.client.Issues.Create(ctx, owner, repository, req)
	if err != nil {
		return Ticket{}, failure(ctx, "create a ticket in "+project, err)
	}
	if i.GetNumber() == 0 {
		return Ticket{}, failure(ctx, "create a ticket in "+project, errNoNumber)
	}
	return ofGitHub(i), nil
}

var errNoNumber = &Error{Kind: ErrUnavailable, Message: "the answer has no ticket number"}

// Edit changes an issue.
func (g *GitHub) Edit(ctx context.Context, project, id string, c Change) error {
	owner, repository := split(project)
	n, err := number(id)
	if err != nil {
		return err
	}
	req := &github.IssueRequest{Title: c.Title, Body: c.Body, Labels: c.Labels}
	if c.Open != nil {
		state, reason := "open", "reopened"
		if !*c.Open {
			state, reason = "closed", "completed"
		}
		req.State, req.StateReason = &state, &reason
	}
	_, _, err = g.client.Issues.Edit(ctx, owner, repository, n, req)
	return failure(ctx, "change ticket "+project+"#"+id, err)
}

// Comment adds a comment.
func (g *GitHub) Comment(ctx context.Context, project, id, text string) error {
	owner, repository := split(project)
	n, err := number(id)
	if err != nil {
		return err
	}
	_, _, err = g.client.Issues.CreateComment(ctx, owner, repository, n, &github.IssueComment{Body: &text})
	return failure(ctx, "comment on ticket "+project+"#"+id, err)
}

// Commented looks for a marker in the issue's comments.
func (g *GitHub) Commented(ctx context.Context, project, id, marker string, since time.Time) (bool, error) {
	owner, repository := split(project)
	n, err := number(id)
	if err != nil {
		return false, err
	}
	since = since.UTC()
	o := &github.IssueListCommentsOptions{Since: &since, ListOptions: github.ListOptions{PerPage: pageSize, Page: 1}}
	for range maxPages {
		list, resp, err := g.client.Issues.ListComments(ctx, owner, repository, n, o)
		if err != nil {
			return false, failure(ctx, "list comments of ticket "+project+"#"+id, err)
		}
		for _, c := range list {
			if strings.Contains(c.GetBody(), marker) {
				return true, nil
			}
		}
		if resp.NextPage == 0 {
			return false, nil
		}
		o.Page = resp.NextPage
	}
	return false, tooMany(project)
}
