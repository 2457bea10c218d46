package main

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/tidewaiter/tidewaiter/services/ticketer/stub"
)

// trackerStub stands for the user's tracker in the demo: as much of GitHub's
// API as ticketer asks for, in memory, on a loopback port.
type trackerStub struct {
	server *http.Server
	url    string

	mu      sync.Mutex
	changed chan struct{}
	tickets []stub.Ticket // every state that a ticket was in
}

// startStub listens on a free loopback port until it is closed.
func startStub(ctx context.Context, token string) (*trackerStub, error) {
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return nil, fmt.Errorf("start the stub of a tracker: %w", err)
	}
	t := &trackerStub{url: "http://" + l.Addr().String() + "/", changed: make(chan struct{})}
	t.server = &http.Server{Handler: stub.New(token, t.change), ReadHeaderTimeout: 5 * time.Second}
	go func() { _ = t.server.Serve(l) }() // ends with close
	return t, nil
}

func (t *trackerStub) close() error { return t.server.Close() }

func (t *trackerStub) change(_ string, ticket stub.Ticket) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.tickets = append(t.tickets, ticket)
	close(t.changed)
	t.changed = make(chan struct{})
}

// wait waits for an open ticket about a package in a repository.
func (t *trackerStub) wait(ctx context.Context, repository, name string) (stub.Ticket, error) {
	for {
		t.mu.Lock()
		changed := t.changed
		for _, ticket := range t.tickets {
			if ticket.Open && strings.Contains(ticket.Title, name) && strings.Contains(ticket.Title+ticket.Body, repository) {
				t.mu.Unlock()
				return ticket, nil
			}
		}
		t.mu.Unlock()
		select {
		case <-changed:
		case <-ctx.Done():
			return stub.Ticket{}, fmt.Errorf("no ticket about %s in %s: %w", name, repository, ctx.Err())
		}
	}
}
