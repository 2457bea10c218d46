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
}

// NewHealth returns a Health that is ready until told otherwise.
func NewHealth() *Health {
	return &Health{checks: map[string]func() error{}, states: map[string]error{}}
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

// Problems returns, sorted, what does not work.
func (h *Health) Problems() []string {
	h.mu.Lock()
	states, checks := maps.Clone(h.states), maps.Clone(h.checks)
	h.mu.Unlock()
	for what, check := range checks {
		states[what] = check()
	}
	var problems []string
	for what, err := range states {
		if err != nil {
			problems = append(problems, fmt.Sprintf("%s: %v", what, err))
		}
	}
	slices.Sort(problems)
	return problems
}

// ServeHTTP answers 200 when everything works and 503 with the reasons when not.
func (h *Health) ServeHTTP(w http.ResponseWriter, _ *http.Request) {
	problems := h.Problems()
	if len(problems) == 0 {
		fmt.Fprintln(w, "ready")
		return
	}
	w.WriteHeader(http.StatusServiceUnavailable)
	for _, p := range problems {
		fmt.Fprintln(w, p)
	}
}
