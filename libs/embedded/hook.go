package embedded

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

const (
	notificationType = "application/vnd.docker.distribution.events.v2+json"
	// hookBatch bounds the stored notifications that are sent in one request.
	hookBatch = 50
	// hookTimeout bounds one request.
	hookTimeout = 15 * time.Second
	// hookBackoff and hookMaxBackoff bound the wait after a failure.
	hookBackoff    = 100 * time.Millisecond
	hookMaxBackoff = 10 * time.Second
)

// hook delivers push notifications in order, each until it is accepted. They
// are files in a directory, numbered, so that a killed process goes on where
// it was.
type hook struct {
	dir    string
	log    *slog.Logger
	client *http.Client

	mu      sync.Mutex
	next    uint64
	waiting []uint64 // numbers of the files, in order
	url     string
	auth    string

	wake chan struct{} // holds one element when there may be something to do
}

func startHook(ctx context.Context, dir string, log *slog.Logger) (h *hook, stop func() error, err error) {
	h = &hook{dir: dir, log: log, wake: make(chan struct{}, 1), client: &http.Client{
		Transport: &http.Transport{MaxIdleConns: 1, IdleConnTimeout: time.Minute},
		// The Authorization header is for the configured address alone.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, nil, err
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, nil, err
	}
	for _, e := range entries {
		n, err := strconv.ParseUint(strings.TrimSuffix(e.Name(), ".json"), 10, 64)
		if err != nil {
			continue // a file that was being written when the process was killed; its push was not answered
		}
		h.waiting = append(h.waiting, n)
		h.next = max(h.next, n+1)
	}
	slices.Sort(h.waiting)

	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx)) // it ends after the registry, not before
	done := make(chan struct{})
	go func() {
		defer close(done)
		h.deliver(ctx)
	}()
	return h, func() error {
		cancel()
		<-done
		h.client.CloseIdleConnections()
		return nil
	}, nil
}

func (h *hook) set(url, authorization string) {
	h.mu.Lock()
	h.url, h.auth = url, authorization
	h.mu.Unlock()
	h.signal()
}

func (h *hook) signal() {
	select {
	case h.wake <- struct{}{}:
	default: // it is awake already
	}
}

func (h *hook) file(n uint64) string { return filepath.Join(h.dir, fmt.Sprintf("%020d.json", n)) }

// add stores events and returns when they would survive a power cut.
func (h *hook) add(events []notificationEvent) error {
	content, err := json.Marshal(events)
	if err != nil {
		return err
	}
	h.mu.Lock()
	n := h.next
	h.next++
	h.mu.Unlock()
	if err := writeFile(h.file(n), content); err != nil {
		return err
	}
	h.mu.Lock()
	h.waiting = append(h.waiting, n)
	slices.Sort(h.waiting) // pushes to two repositories may be stored in either order
	h.mu.Unlock()
	h.signal()
	return nil
}

// deliver sends what is stored until ctx ends.
func (h *hook) deliver(ctx context.Context) {
	wait := hookBackoff
	for {
		sent, err := h.sendNext(ctx)
		if ctx.Err() != nil {
			return
		}
		switch {
		case err != nil:
			h.log.WarnContext(ctx, "push notification is not accepted, will be sent again",
				slog.Duration("wait", wait), slog.Any("error", err))
			select {
			case <-ctx.Done():
				return
			case <-time.After(wait):
			case <-h.wake: // a new address, perhaps
			}
			wait = min(2*wait, hookMaxBackoff)
		case sent:
			wait = hookBackoff
		default:
			select {
			case <-ctx.Done():
				return
			case <-h.wake:
			}
		}
	}
}

// sendNext sends the oldest notifications; sent is false if there was nothing
// to send or nowhere to send it to.
func (h *hook) sendNext(ctx context.Context) (sent bool, err error) {
	h.mu.Lock()
	url, auth := h.url, h.auth
	batch := slices.Clone(h.waiting[:min(len(h.waiting), hookBatch)])
	h.mu.Unlock()
	if url == "" || len(batch) == 0 {
		return false, nil
	}
	var envelope notification
	for _, n := range batch {
		content, err := os.ReadFile(h.file(n))
		if err != nil {
			return false, err
		}
		var events []notificationEvent
		if err := json.Unmarshal(content, &events); err != nil {
			return false, fmt.Errorf("stored notification %d: %w", n, err)
		}
		envelope.Events = append(envelope.Events, events...)
	}
	body, err := json.Marshal(envelope)
	if err != nil {
		return false, err
	}
	if err := h.post(ctx, url, auth, body); err != nil {
		return false, err
	}
	h.mu.Lock()
	h.waiting = slices.DeleteFunc(h.waiting, func(n uint64) bool { return slices.Contains(batch, n) })
	h.mu.Unlock()
	// A crash before the removal is on disk sends them again, with the same ids.
	var errs []error
	for _, n := range batch {
		errs = append(errs, os.Remove(h.file(n)))
	}
	if err := errors.Join(errs...); err != nil {
		h.log.WarnContext(ctx, "delivered push notification could not be removed", slog.Any("error", err))
	}
	return true, nil
}

// post sends a notification; whatever is not a 2xx is an error, also a 4xx:
// the receiver may not be configured yet.
func (h *hook) post(ctx context.Context, url, authorization string, body []byte) (err error) {
	ctx, cancel := context.WithTimeout(ctx, hookTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, url, bytes.NewReader(body))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", notificationType)
	if authorization != "" {
		req.Header.Set("Authorization", authorization)
	}
	resp, err := h.client.Do(req)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, resp.Body.Close()) }()
	if _, err := io.Copy(io.Discard, io.LimitReader(resp.Body, 64<<10)); err != nil {
		return err
	}
	if resp.StatusCode < 200 || resp.StatusCode > 299 {
		return fmt.Errorf("answered %s", resp.Status)
	}
	return nil
}
