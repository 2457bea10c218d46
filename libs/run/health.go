package run

import (
	"fmt"
	"maps"
	"net/http"
	"slices"
	"sync"
)

// Health collects what keeps the services of a process from working.
type Health struct {
	mu     sync.Mutex
	checks map[string]func() error
	states map[string]error
	notes  map[string]error
}

// NewHealth returns a Health that is ready until told otherwise.
func NewHealth() *Health {
	return &Health{checks: map[string]func() error{}, states: map[string]error{}, notes: map[string]error{}}
}

// Set records the state of one dependency; nil is good.
func (h *Health) Set(what string, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.states[what] = err
}

// Check registers a function that is asked for the state of one dependency
// whenever somebody wants to know.
func (h *Health) Check(what string, f func() error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.checks[what] = f
}

// Note records trouble that shows and does not make the process unready, since
// the rest of it works; nil ends it.
func (h *Health) Note(what string, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if err == nil {
		delete(h.notes, what)
		return
	}
	h.notes[what] = err
}

// Notes returns, sorted, what is noted.
func (h *Health) Notes() []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return lines(h.notes)
}

// Problems returns, sorted, what does not work.
func (h *Health) Problems() []string {
	h.mu.Lock()
	states, checks := maps.Clone(h.states), maps.Clone(h.checks)
	h.mu.Unlock()
	for what, check := range checks {
		states[what] = check()
	}
	return lines(states)
}

func lines(states map[string]error) []string {
	var out []string
	for what, err := range states {
		if err != nil {
			out = append(out, fmt.Sprintf("%s: %v", what, err))
		}
	}
	slices.Sort(out)
	return out
}

// ServeHTTP answers 200 when everything works and 503 with the reasons when not;
// notes follow in both cases.
func (h *Health) ServeHTTP(w http.ResponseWriter, _ *http.Request) {
	problems := h.Problems()
	if len(problems) == 0 {
		fmt.Fprintln(w, "ready")
	} else {
		w.WriteHeader(http.StatusServiceUnavailable)
	}
	for _, p := range problems {
		fmt.Fprintln(w, p)
	}
	for _, n := range h.Notes() {
		fmt.Fprintln(w, "note: "+n)
	}
}
