package intake

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/cloudevents/sdk-go/v2/event"
	"golang.org/x/time/rate"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/bus"
	"github.com/tidewaiter/tidewaiter/services/intake/hook"
)

// Handler returns the HTTP API: POST and OPTIONS /hooks/<source-id>,
// and, with the admin token, POST /v1/submit, GET /v1/deliveries and /v1/sources.
func (s *Intake) Handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("POST /hooks/{source}", s.serveHook)
	mux.HandleFunc("OPTIONS /hooks/{source}", s.serveHook)
	mux.HandleFunc("POST /v1/submit", s.serveSubmit)
	mux.HandleFunc("GET /v1/deliveries", s.serveDeliveries)
	mux.HandleFunc("GET /v1/sources", s.serveSources)
	return mux
}

// outcome is the answer to a call and what is remembered of it.
type outcome struct {
	delivery
	header http.Header
	body   []byte
	err    error
	known  bool // authenticated, so that the call is remembered as one
}

func (s *Intake) serveHook(w http.ResponseWriter, r *http.Request) {
	start := s.now()
	id := r.PathValue("source")
	src, known := s.sources[id]
	known = known && src.Pull == nil // those that are pulled have no URL
	if !known {
		src, id = s.decoy, sourceUnknown
	}
	o := s.take(w, r, src, start)
	if !known {
		o.status, o.reason, o.trouble = http.StatusNotFound, reasonUnknown, ""
	}
	o.source, o.received = id, start
	for k, v := range o.header {
		w.Header()[k] = v
	}
	w.WriteHeader(o.status)
	_, _ = w.Write(o.body) // the sender is gone if this fails
	s.finish(r, o)
}

// finish counts, logs and remembers a call. Nothing of what it presented as a
// proof is among the attributes.
func (s *Intake) finish(r *http.Request, o outcome) {
	elapsed := s.now().Sub(o.received)
	s.metrics.requests.WithLabelValues(o.source, strconv.Itoa(o.status), o.reason).Inc()
	s.metrics.seconds.Observe(elapsed.Seconds())
	attrs := []any{
		"source", o.source, "status", o.status, "reason", o.reason, "method", r.Method, "remote", r.RemoteAddr,
		"bytes", o.bytes, "events", o.events, "published", o.published, "dead", o.dead, "duration", elapsed,
	}
	if o.deliveryID != "" {
		attrs = append(attrs, "delivery", o.deliveryID)
	}
	level := slog.LevelDebug
	if o.status == http.StatusUnauthorized { // stalls some registries until somebody mends it
		level = slog.LevelWarn
	}
	if o.err != nil {
		level = slog.LevelWarn
		attrs = append(attrs, "error", o.err)
	}
	s.log.Log(r.Context(), level, "webhook call", attrs...)
	if !o.known {
		s.refused(o.delivery) // with words of ours alone: what anybody can vary would fill the log
		return
	}
	s.remember(o)
}

// remember writes an authentic call or message to the delivery log.
func (s *Intake) remember(o outcome) {
	if o.err != nil {
		o.trouble = o.err.Error()
	}
	o.trouble = bus.Redact(o.trouble)
	s.record(o.delivery)
}

// request is what a body of the source is decoded with.
func (src *source) request(h http.Header, body []byte) hook.Request {
	return hook.Request{
		Header: h, Body: body, Registry: src.Registry, Mapper: src.mapper,
		PathMapping: src.PathMapping, RepositoryKey: src.RepositoryKey,
	}
}

// take does the work of a call: authenticate, decode, store.
func (s *Intake) take(w http.ResponseWriter, r *http.Request, src *source, received time.Time) outcome {
	var o outcome
	offered := offer{header: r.Header, url: r.URL}
	refuse := func(why error) outcome {
		o.status, o.reason, o.trouble = http.StatusUnauthorized, reasonRefused, why.Error()
		if errors.Is(why, errUnchecked) {
			// What the issuer or its network says may be anything: it is for the log.
			o.status, o.reason, o.trouble, o.err = http.StatusServiceUnavailable, reasonUnchecked, errUnchecked.Error(), why
			return o
		}
		if src.verifier.scheme != "" {
			o.header = http.Header{"Www-Authenticate": {src.verifier.scheme + ` realm="hooks"`}}
		}
		return o
	}
	preflight, isPreflight := src.kind.Preflight(r.Method, r.Header)
	if isPreflight && slices.Contains(src.Origins, preflight.Header.Get("WebHook-Allowed-Origin")) {
		return o.greeted(preflight)
	}
	if !src.verifier.needBody {
		if _, err := src.verifier.check(r.Context(), offered); err != nil {
			return refuse(err)
		}
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, s.cfg.MaxBody))
	o.bytes = len(body)
	var tooLarge *http.MaxBytesError
	switch {
	case errors.As(err, &tooLarge):
		o.status, o.reason, o.known = http.StatusRequestEntityTooLarge, reasonTooLarge, !src.verifier.needBody
		return o
	case err != nil:
		o.status, o.reason, o.err = http.StatusBadRequest, reasonBrokenOff, fmt.Errorf("read body: %w", err)
		return o
	}
	req := src.request(r.Header, body)
	if src.verifier.needBody {
		offered.signed = src.kind.Signed(req)
		authentic, err := src.verifier.check(r.Context(), offered)
		switch {
		case errors.Is(err, errGreeted):
			o.known = true
			return o.greeted(hook.Answer{Status: http.StatusOK})
		case err != nil:
			return refuse(err)
		case authentic != nil: // what stands around it is not signed
			req.Body = authentic
		}
	}
	o.known = true
	if isPreflight {
		return o.greeted(preflight)
	}
	if r.Method != http.MethodPost {
		o.status, o.reason = http.StatusNoContent, reasonIgnored
		return o
	}
	// The sender may stop waiting; what it said is stored all the same.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(r.Context()), s.cfg.AckTimeout)
	defer cancel()
	if answer, ok := src.kind.Handshake(req); ok {
		if answer.Left != "" {
			return s.leave(ctx, src, req, answer, o)
		}
		return o.greeted(answer)
	}
	return s.store(ctx, src, req, received, o)
}

// greeted returns the outcome of a handshake.
func (o outcome) greeted(answer hook.Answer) outcome {
	o.status, o.reason, o.header, o.body = answer.Status, reasonHandshake, answer.Header, answer.Body
	return o
}

// leave answers a handshake and keeps its body for whoever is to finish it.
func (s *Intake) leave(ctx context.Context, src *source, req hook.Request, answer hook.Answer, o outcome) outcome {
	o.dead, o.err = 1, errors.New(answer.Left)
	o = s.bury(ctx, src, req.Header, req.Body, reasonIncomplete, answer.Left, o)
	if o.status == http.StatusAccepted {
		o.status, o.header, o.body = answer.Status, answer.Header, answer.Body
	}
	return o
}

// store decodes an authenticated body and stores what it says.
func (s *Intake) store(ctx context.Context, src *source, req hook.Request, received time.Time, o outcome) outcome {
	events, err := hook.Decode(src.Kind, req)
	if err != nil {
		o.dead, o.err = 1, err
		return s.bury(ctx, src, req.Header, req.Body, reasonUnreadable, err.Error(), o)
	}
	o.events = len(events)
	if len(events) > 0 {
		o.deliveryID = events[0].DeliveryID
	}
	var out []event.Event
	var troubles, left []string
	var charged []*rate.Reservation // for pushes, in the source's quota
	repeated := map[string]int{}
	for _, e := range events {
		index := repeated[e.DeliveryID]
		repeated[e.DeliveryID]++
		publishable, missing := e.Publishable()
		switch {
		case e.Bad != "":
			missing = e.Bad
			fallthrough
		case missing != "":
			troubles = append(troubles, missing)
			o.dead++
			s.count(src, "dead")
			continue
		case !publishable:
			o.ignored++
			s.count(src, "ignored")
			continue
		}
		if why := src.scoped(&e); why != "" {
			left = append(left, why)
			o.filtered++
			s.count(src, "filtered")
			continue
		}
		ev, err := s.message(src, e, index, received)
		if err != nil { // and would be every time
			troubles = append(troubles, err.Error())
			o.dead++
			s.count(src, "dead")
			continue
		}
		if s.seen.has(ev.ID()) {
			o.duplicates++
			s.count(src, "duplicate")
			continue
		}
		if e.Action != hook.Delete && ev.Extensions()[contracts.ExtLane] == contracts.LaneFresh {
			token := src.quota.ReserveN(received, 1)
			if token.DelayFrom(received) == 0 {
				charged = append(charged, token)
			} else {
				token.CancelAt(received)
				ev.SetExtension(contracts.ExtLane, contracts.LaneBulk)
				o.overQuota++
				s.count(src, "over-quota")
			}
		}
		out = append(out, ev)
	}
	if len(out) > 0 {
		if err := s.out.Publish(ctx, out...); err != nil {
			for _, token := range slices.Backward(charged) {
				token.CancelAt(received) // the sender comes again with the same
			}
			o.status, o.reason, o.err = http.StatusServiceUnavailable, reasonNotStored, fmt.Errorf("publish: %w", err)
			return o
		}
	}
	for _, ev := range out {
		s.seen.add(ev.ID())
		if len(o.subjects) < maxSubjects {
			o.subjects = append(o.subjects, ev.Subject())
		}
		s.count(src, strings.TrimSuffix(strings.TrimPrefix(ev.Type(), contracts.TypePrefix+"image."), ".v1"))
	}
	o.published = len(out)
	o.trouble = few(left)
	if len(troubles) > 0 {
		o.err = errors.New(few(troubles))
		return s.bury(ctx, src, req.Header, req.Body, reasonIncomplete, o.err.Error(), o)
	}
	o.status = http.StatusAccepted
	switch {
	case o.published > 0:
		o.reason = reasonStored
	case o.duplicates > 0:
		o.reason = reasonDuplicate
	case o.filtered > 0:
		o.reason = reasonFiltered
	default:
		o.reason = reasonIgnored
	}
	return o
}

// scoped brings an event's repository into the form that the registry knows it
// by. It returns why the source leaves the event out, "" if it does not.
func (src *source) scoped(e *hook.Event) string {
	mapped, ok := src.Rewrite.Map(e.Repository)
	if !ok {
		return "the source's rewrite leaves out repository " + e.Repository
	}
	e.Repository = mapped
	decide := func() (string, error) { return src.rules.Push(e.Registry, e.Repository, e.Tag) }
	if e.Action == hook.Delete {
		decide = func() (string, error) { return src.rules.Delete(e.Registry, e.Repository) }
	}
	left, err := decide()
	if err != nil {
		return err.Error()
	}
	return left
}

// few joins the first five different texts.
func few(texts []string) string {
	slices.Sort(texts)
	texts = slices.Compact(texts)
	return strings.Join(texts[:min(len(texts), 5)], "; ")
}

func (s *Intake) count(src *source, outcome string) {
	s.metrics.events.WithLabelValues(src.id, outcome).Inc()
}

// bury stores a body that says nothing usable, so that nothing is lost and the
// sender does not send it for ever.
func (s *Intake) bury(ctx context.Context, src *source, h http.Header, body []byte, code, reason string, o outcome) outcome {
	body = src.kind.Blank(body)
	headers := map[string]string{"source": src.id, "kind": src.Kind, "code": code, "delivery": o.deliveryID}
	if t := h.Get("Content-Type"); len(t) <= 128 {
		headers["content-type"] = t
	}
	if err := s.out.PublishDeadLetter(ctx, contracts.ImagePushedV1, reason, body, headers); err != nil {
		o.status, o.reason, o.err = http.StatusServiceUnavailable, reasonNotStored, fmt.Errorf("publish dead letter: %w", err)
		return o
	}
	o.status, o.reason = http.StatusAccepted, code
	return o
}

// message makes the event to publish. index tells events apart that share a
// delivery id.
func (s *Intake) message(src *source, e hook.Event, index int, received time.Time) (ev event.Event, err error) {
	var at *time.Time
	if !e.Time.IsZero() {
		at = &e.Time
	}
	lane := src.Lane
	if lane == "" {
		lane = contracts.LaneFresh
	}
	if e.Hint != "" {
		lane = contracts.LaneBulk
	}
	if e.Action == hook.Delete {
		ev, err = newEvent(contracts.ImageDeletedV1, e.Subject(), contracts.ImageDeleted{
			Source: src.id, Registry: e.Registry, Repository: e.Repository, Tag: e.Tag, Digest: e.Digest,
			DeliveryID: e.DeliveryID, Actor: e.Actor, OccurredAt: at, ReceivedAt: received.UTC(),
		}, lane, received)
	} else {
		ev, err = newEvent(contracts.ImagePushedV1, e.Subject(), contracts.ImagePushed{
			Source: src.id, Registry: e.Registry, Repository: e.Repository, Tag: e.Tag, Digest: e.Digest,
			MediaType: e.MediaType, Cause: causePush, Hint: e.Hint,
			DeliveryID: e.DeliveryID, Actor: e.Actor, OccurredAt: at, ReceivedAt: received.UTC(),
		}, lane, received)
	}
	if err != nil {
		return event.Event{}, err
	}
	bus.Key(&ev, e.Registry+"/"+e.Repository)
	input := e.DeliveryID + "/" + strconv.Itoa(index)
	if e.Unnamed {
		// A later push of the same tag reads the same; it must not pass for this one.
		input += "/" + strconv.FormatInt(received.UnixNano(), 10)
	}
	ev.SetID(contracts.OutputID(Name, "/hooks/"+src.id, input, ev.Type(), ev.Subject()))
	return ev, nil
}

// Sources in the delivery log that are not configured ones.
const (
	sourceUnknown = "unknown" // calls to no source
	sourceSubmit  = causeSubmit
)

// Causes of image.pushed that intake gives.
const (
	causePush   = "push"
	causeSubmit = "submit"
)

// newEvent returns an event that starts a trace.
func newEvent(name, subject string, data any, lane string, at time.Time) (event.Event, error) {
	ev, err := bus.NewEvent(name, subject, data)
	if err != nil {
		return event.Event{}, err
	}
	ev.SetSource("/services/" + Name)
	ev.SetTime(at.UTC())
	ev.SetExtension(contracts.ExtLane, lane)
	ev.SetExtension(contracts.ExtTraceparent, traceparent())
	return ev, nil
}

// traceparent starts a trace (W3C Trace Context, "traceparent Header"): sampled.
func traceparent() string {
	var b [24]byte
	_, _ = rand.Read(b[:]) // never fails (crypto/rand)
	return "00-" + hex.EncodeToString(b[:16]) + "-" + hex.EncodeToString(b[16:]) + "-01"
}

// maxSubmission bounds the body of POST /v1/submit, in bytes.
const maxSubmission = 64 << 10

// submission is the body of POST /v1/submit.
type submission struct {
	Ref string `json:"ref"` // registry/repository[:tag][@digest]; without both the tag is "latest"
}

// Submitted is the answer to POST /v1/submit.
type Submitted struct {
	ID      string `json:"id"`      // of the event
	Subject string `json:"subject"` // registry/repository[:tag][@digest]
}

// serveSubmit takes a push by hand, for registries that cannot reach us.
func (s *Intake) serveSubmit(w http.ResponseWriter, r *http.Request) {
	o := outcome{delivery: delivery{source: sourceSubmit, received: s.now()}}
	reply := s.submit(w, r, &o)
	switch {
	case reply != nil:
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(o.status)
		_ = json.NewEncoder(w).Encode(reply) // the client is gone if this fails
	case o.status == http.StatusBadRequest, o.status == http.StatusRequestEntityTooLarge:
		http.Error(w, o.err.Error(), o.status) // says what is wrong with the request, nothing of ours
	default:
		w.WriteHeader(o.status)
	}
	s.finish(r, o)
}

func (s *Intake) submit(w http.ResponseWriter, r *http.Request, o *outcome) *Submitted {
	end := func(status int, reason string, err error) *Submitted {
		o.status, o.reason, o.err = status, reason, err
		return nil
	}
	if s.admin == nil {
		return end(http.StatusNotFound, reasonClosed, nil)
	}
	if !s.admin.verify(offer{header: r.Header}) {
		w.Header().Set("WWW-Authenticate", `Bearer realm="admin"`)
		o.trouble = s.admin.trouble(offer{header: r.Header})
		return end(http.StatusUnauthorized, reasonRefused, nil)
	}
	o.known = true
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxSubmission))
	var tooLarge *http.MaxBytesError
	switch {
	case errors.As(err, &tooLarge):
		return end(http.StatusRequestEntityTooLarge, reasonTooLarge, fmt.Errorf("the body is over %d bytes", maxSubmission))
	case err != nil:
		return end(http.StatusBadRequest, reasonBrokenOff, fmt.Errorf("read body: %w", err))
	}
	o.bytes = len(body)
	var in submission
	decoder := json.NewDecoder(bytes.NewReader(body))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(&in); err != nil {
		// the decoder's error would quote the body
		return end(http.StatusBadRequest, reasonUnreadable, errors.New(`the body is not {"ref": "registry/repository:tag"}`))
	}
	ref, err := submitted(in.Ref)
	if err != nil {
		return end(http.StatusBadRequest, reasonUnreadable, err)
	}
	o.events, o.deliveryID = 1, rand.Text()
	e := hook.Event{Registry: ref.Registry, Repository: ref.Repository, Tag: ref.Tag, Digest: ref.Digest}
	ev, err := newEvent(contracts.ImagePushedV1, e.Subject(), contracts.ImagePushed{
		Source: causeSubmit, Registry: ref.Registry, Repository: ref.Repository, Tag: ref.Tag, Digest: ref.Digest,
		Cause: causeSubmit, DeliveryID: o.deliveryID, ReceivedAt: o.received.UTC(),
	}, contracts.LaneFresh, o.received)
	if err != nil {
		return end(http.StatusServiceUnavailable, reasonNotStored, err)
	}
	bus.Key(&ev, ref.Registry+"/"+ref.Repository)
	ev.SetID(contracts.OutputID(Name, "/v1/submit", o.deliveryID, ev.Type(), ev.Subject()))
	ctx, cancel := context.WithTimeout(context.WithoutCancel(r.Context()), s.cfg.AckTimeout)
	defer cancel()
	if err := s.out.Publish(ctx, ev); err != nil {
		return end(http.StatusServiceUnavailable, reasonNotStored, fmt.Errorf("publish: %w", err))
	}
	o.status, o.reason, o.published, o.subjects = http.StatusAccepted, reasonStored, 1, []string{ev.Subject()}
	return &Submitted{ID: ev.ID(), Subject: ev.Subject()}
}

// submitted reads a reference that a user wrote; the registry must be named.
func submitted(text string) (hook.Reference, error) {
	ref, err := hook.ParseReference(text)
	if err != nil {
		if ref, err = hook.ParseReference(text + ":latest"); err != nil {
			return hook.Reference{}, fmt.Errorf("ref: %w", err)
		}
	}
	if ref.Registry == "" {
		return hook.Reference{}, fmt.Errorf("ref names no registry: %w", hook.ErrReference)
	}
	return ref, nil
}
