package gatekeeper

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"mime"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/cloudevents/sdk-go/v2/event"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/bus"
	"github.com/tidewaiter/tidewaiter/services/attestor/statement"
)

const (
	// Kubernetes passes warnings on whole while all of them are below 4096
	// characters; then it cuts each at 256 and drops what is over.
	maxWarning  = 256
	maxWarnings = 15
	allWarnings = 4000
	// maxListed bounds the images that an event or a denial lists.
	maxListed = 50
	// submitAgain is how long the same image is not submitted again.
	submitAgain = 10 * time.Minute
)

// Handler returns the webhook: POST /validate.
func (g *Gatekeeper) Handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("POST /validate", g.serveValidate)
	return mux
}

// errBody is returned for a body that cannot be read; its status is that of the answer.
type errBody struct {
	status int
	err    error
}

func (e *errBody) Error() string { return e.err.Error() }
func (e *errBody) Unwrap() error { return e.err }

func (g *Gatekeeper) serveValidate(w http.ResponseWriter, r *http.Request) {
	start := time.Now()
	if g.Caller != nil && !g.Caller(r) {
		g.metrics.refused.WithLabelValues("401").Inc()
		w.Header().Set("WWW-Authenticate", `Bearer realm="gatekeeper"`)
		http.Error(w, "who asks is not known", http.StatusUnauthorized)
		return
	}
	req, err := g.read(w, r)
	if err == nil {
		var answer *response
		if answer, err = g.review(r.Context(), req, start); err == nil {
			w.Header().Set("Content-Type", "application/json")
			// The caller is gone if this fails.
			_ = json.NewEncoder(w).Encode(review{APIVersion: reviewVersion, Kind: reviewKind, Response: answer})
			return
		}
	}
	code := http.StatusBadRequest
	var body *errBody
	if errors.As(err, &body) {
		code = body.status
	}
	g.metrics.refused.WithLabelValues(strconv.Itoa(code)).Inc()
	g.Log.WarnContext(r.Context(), "call is no review", slog.Int("status", code), slog.String("remote", r.RemoteAddr), slog.Any("error", err))
	http.Error(w, clip(err.Error()), code)
}

func (g *Gatekeeper) read(w http.ResponseWriter, r *http.Request) (*request, error) {
	kind, _, err := mime.ParseMediaType(r.Header.Get("Content-Type"))
	if err != nil || kind != "application/json" {
		return nil, &errBody{http.StatusUnsupportedMediaType, errors.New("the body must be application/json")}
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, g.cfg.MaxBody))
	var tooLarge *http.MaxBytesError
	if errors.As(err, &tooLarge) {
		return nil, &errBody{http.StatusRequestEntityTooLarge, fmt.Errorf("more than %d bytes", g.cfg.MaxBody)}
	}
	if err != nil {
		return nil, fmt.Errorf("read body: %w", err)
	}
	return readReview(body)
}

// review answers one request.
func (g *Gatekeeper) review(ctx context.Context, req *request, start time.Time) (*response, error) {
	images, name, err := asked(req)
	if err != nil {
		return nil, err
	}
	if len(images) == 0 {
		g.metrics.reviews.WithLabelValues(g.cfg.Mode, contracts.DecisionAdmit).Inc()
		return &response{UID: req.UID, Allowed: true}, nil
	}
	exempt := g.exempt[req.Namespace]
	var findings []finding
	if !exempt {
		findings = g.decideAll(ctx, images)
	}
	answer, decision := g.answer(req, findings, exempt)
	g.tell(ctx, req, name, findings, len(images), exempt, decision, start)
	return answer, nil
}

// answer turns findings into what the API server is told.
func (g *Gatekeeper) answer(req *request, findings []finding, exempt bool) (*response, string) {
	out := &response{UID: req.UID, Allowed: true, AuditAnnotations: map[string]string{"mode": g.cfg.Mode}}
	if exempt {
		out.AuditAnnotations["exempt"] = req.Namespace
		return out, contracts.DecisionAdmit
	}
	var denied, warned []string
	for _, f := range findings {
		switch f.Decision {
		case contracts.DecisionDeny:
			denied = append(denied, f.line())
		case contracts.DecisionWarn:
			warned = append(warned, f.line())
		}
	}
	decision := contracts.DecisionAdmit
	switch {
	case len(denied) > 0 && g.cfg.Mode == ModeEnforce:
		decision = contracts.DecisionDeny
		out.Allowed = false
		out.Status = &status{Code: http.StatusForbidden, Reason: "Forbidden", Message: lines(denied)}
	case g.cfg.Mode == ModeAudit:
	case len(denied)+len(warned) > 0:
		decision = contracts.DecisionWarn
	}
	if decision != contracts.DecisionAdmit {
		told := warned
		if out.Allowed {
			told = slices.Concat(denied, warned)
		}
		told = told[:min(len(told), maxWarnings)]
		for _, line := range told {
			out.Warnings = append(out.Warnings, shorten("tidewaiter: "+line, max(maxWarning, allWarnings/len(told))))
		}
	}
	would := contracts.DecisionAdmit
	if len(denied) > 0 {
		would = contracts.DecisionDeny
		out.AuditAnnotations["denied"] = shorten(lines(denied), maxMessage*4)
	}
	out.AuditAnnotations["decision"] = would
	return out, decision
}

// lines joins what is said about images, one a line, at most maxListed.
func lines(all []string) string {
	text := strings.Join(all[:min(len(all), maxListed)], "\n")
	if more := len(all) - maxListed; more > 0 {
		text += fmt.Sprintf("\nand %d more", more)
	}
	return text
}

// line says in one line which image, where, why, and what to do.
func (f finding) line() string {
	return fmt.Sprintf("%s (%s): %s", f.Reference, clip(strings.Join(f.Places, ", ")), f.Message)
}

func shorten(s string, limit int) string {
	if len(s) <= limit {
		return s
	}
	return strings.ToValidUTF8(s[:limit-len("…")], "") + "…"
}

// tell counts and logs a decision and queues the events that tell of it. A dry
// run has no effects.
func (g *Gatekeeper) tell(ctx context.Context, req *request, name string, findings []finding, images int, exempt bool, decision string, start time.Time) {
	elapsed := time.Since(start)
	cached := !slices.ContainsFunc(findings, func(f finding) bool { return !f.Cached })
	g.metrics.reviews.WithLabelValues(g.cfg.Mode, decision).Inc()
	g.metrics.seconds.WithLabelValues(strconv.FormatBool(cached)).Observe(elapsed.Seconds())
	for _, f := range findings {
		g.metrics.images.WithLabelValues(f.Decision, f.Reason, strconv.FormatBool(f.Cached)).Inc()
	}
	level := slog.LevelDebug
	if decision != contracts.DecisionAdmit {
		level = slog.LevelInfo
	}
	g.Log.Log(ctx, level, "review", slog.String("decision", decision), slog.String("kind", req.Kind.Kind),
		slog.String("namespace", req.Namespace), slog.String("name", name), slog.Int("images", images), slog.Duration("duration", elapsed))
	if req.DryRun {
		return
	}
	d := contracts.AdmissionDecided{
		UID: req.UID, Operation: req.Operation, Kind: req.Kind.Kind, SubResource: req.SubResource,
		Namespace: req.Namespace, Name: name, User: clip(req.UserInfo.Username), Mode: g.cfg.Mode, Decision: decision, Exempt: exempt,
		Images: []contracts.AdmissionImage{}, ImageCount: images, DecidedAt: g.Now().UTC(), Millis: elapsed.Milliseconds(),
	}
	for _, f := range findings[:min(len(findings), maxListed)] {
		f.Places = f.Places[:min(len(f.Places), maxListed)]
		d.Images = append(d.Images, f.AdmissionImage)
	}
	g.publish(ctx, contracts.AdmissionDecidedV1, req, req.UID, req.Namespace, d)
	for _, f := range findings {
		if f.submit && f.Image != nil {
			g.submit(ctx, req, f)
		}
	}
}

// submit asks for a scan of an image that has no statement.
func (g *Gatekeeper) submit(ctx context.Context, req *request, f finding) {
	image := *f.Image
	now := g.Now()
	if last, ok := g.submitted.get(image.String()); ok && now.Sub(last.fetched) < submitAgain {
		return
	}
	g.submitted.put(image.String(), item{bundle: &statement.Bundle{}, fetched: now})
	g.publish(ctx, contracts.ImagePushedV1, req, image.String(), image.Repo(), contracts.ImagePushed{
		Source: Name, Registry: image.Registry, Repository: image.Repository, Tag: f.tag, Digest: image.Digest,
		Cause: "admission", ReceivedAt: now.UTC(),
	})
}

// publish queues an event. The API server may ask twice with one uid: the id
// follows from it.
func (g *Gatekeeper) publish(ctx context.Context, name string, req *request, subject, key string, data any) {
	var ev event.Event
	ev, err := bus.NewEvent(name, subject, data)
	if err != nil {
		g.Log.ErrorContext(ctx, "event cannot be made", slog.Any("error", err))
		return
	}
	ev.SetID(contracts.OutputID(Name, reviewKind, req.UID, ev.Type(), subject))
	if key != "" {
		bus.Key(&ev, key)
	}
	g.queue.add(ev)
}
