// Package tracker talks to issue trackers: GitHub Issues, GitLab Issues, and
// anything else through a signed webhook.
//
// Connections go to the configured address only: redirects to other hosts are
// refused, and credentials are never sent there.
package tracker

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// Kinds of errors, for errors.Is. Only after ErrUnavailable is it unknown
// whether the request was carried out.
var (
	// ErrThrottled is returned when the tracker asks for a pause: Error.RetryAt.
	ErrThrottled = errors.New("tracker asks for a pause")
	// ErrUnavailable is returned for answers 5xx, time-outs, broken connections
	// and answers that cannot be read.
	ErrUnavailable = errors.New("tracker does not answer as it should")
	// ErrDenied is returned when the credentials are refused or may not do this.
	ErrDenied = errors.New("tracker refuses the credentials")
	// ErrNotFound is returned when a project or ticket does not exist, or is
	// hidden from the credentials.
	ErrNotFound = errors.New("not found in the tracker")
	// ErrGone is returned when a ticket was deleted, or tickets are switched off.
	ErrGone = errors.New("gone from the tracker")
	// ErrInvalid is returned when the tracker does not take what was sent.
	ErrInvalid = errors.New("tracker refuses the content")
	// ErrForeign is returned when the tracker leads to another host.
	ErrForeign = errors.New("tracker leads to another host")
)

// Error is a failed request. It holds no credentials.
type Error struct {
	Kind    error     // one of the kinds above
	Status  int       // of the HTTP response; 0: there was none
	RetryAt time.Time // of ErrThrottled, perhaps of ErrUnavailable: not before
	Message string    // what the tracker said, shortened
}

// Error says what went wrong.
func (e *Error) Error() string {
	s := e.Kind.Error()
	if e.Status != 0 {
		s = fmt.Sprintf("%s (HTTP %d)", s, e.Status)
	}
	if e.Message != "" {
		s += ": " + e.Message
	}
	return s
}

// Unwrap returns the kind.
func (e *Error) Unwrap() error { return e.Kind }

// Ticket is an issue as the tracker has it.
type Ticket struct {
	ID     string // number within the project
	URL    string // for people
	Open   bool
	Title  string
	Body   string
	Labels []string
}

// Draft is what a new ticket says.
type Draft struct {
	Title        string
	Body         string
	Labels       []string
	Assignees    []string // user names
	Confidential bool     // GitLab: only members of the project see it
}

// Change is what to change of a ticket; nil leaves something as it is.
type Change struct {
	Title  *string
	Body   *string
	Labels *[]string
	Open   *bool
}

// Tracker is an issue tracker. A project is named as the tracker names it
// (owner/repository, or a GitLab path). All errors are an *Error, or that of
// the context.
type Tracker interface {
	// Find returns the tickets, open and closed, that were made since a time
	// and hold a marker in their body, oldest first.
	Find(ctx context.Context, project, marker string, since time.Time) ([]Ticket, error)
	// Get returns one ticket: ErrGone when it was deleted.
	Get(ctx context.Context, project, id string) (Ticket, error)
	// Create makes a ticket.
	Create(ctx context.Context, project string, d Draft) (Ticket, error)
	// Edit changes a ticket.
	Edit(ctx context.Context, project, id string, c Change) error
	// Comment adds a comment to a ticket.
	Comment(ctx context.Context, project, id, text string) error
	// Commented says whether a comment made since a time holds a marker.
	Commented(ctx context.Context, project, id, marker string, since time.Time) (bool, error)
}
