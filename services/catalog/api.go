package catalog

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"strconv"
	"time"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/bus"
	"github.com/tidewaiter/tidewaiter/libs/credential"
)

// Bounds of a listing.
const (
	defaultLimit = 100
	maxLimit     = 1000
)

// requestTimeout bounds the work for one request.
const requestTimeout = 30 * time.Second

// api is the HTTP API, version 1:
//
//	GET /healthz                                 200 while the database answers; the only one without a token
//	GET /v1/timeline?ref=                        JSON lines, contracts.TimelineEntry
//	GET /v1/history?ref=                         {"periods": [contracts.TagPeriod]}: where the tags of a repository, or one of them, pointed
//	GET /v1/images?ref=&state=&limit=&after=     {"images": [ImageEntry], "next": name or null}
//	GET /v1/report                               contracts.FleetReport
//	GET /v1/problems?state=&limit=&after=        {"problems": [contracts.Problem], "next": key or null}
//	POST /v1/deployed                            {"origin": name, "images": [registry/repository@digest]}: what runs, instead of what the origin said before
//	POST /v1/rematch                             {"ref": registry/repository[:tag|@digest] or a digest} or {"all": true} → {"images": n}: they are matched again
//	GET /v1/outcome?push=&subject=               Outcome of a push that was submitted by hand, by the id and subject of its event
//	POST /v1/known                               KnownQuery → {"tags": [KnownTag]}
//	GET /v1/read?until=                          {"read": whether all pushes that were sent before this time (RFC 3339) are known here}
//	GET /v1/standings?registry=&limit=&after=    {"images": [Standing], "total": n, "next": repository@digest or null}
//	GET /v1/tags?registry=&limit=&after=         {"tags": [RepositoryTag], "next": repository:tag or null}
//
// All but the first ask for "Authorization: Bearer <token>". Errors are
// {"error": "…"} with 400 (bad input), 401 or 503 (the database is away).
type api struct {
	s      *Service
	tokens func() ([]string, error)
	log    *slog.Logger
}

func newAPI(s *Service, tokens func() ([]string, error)) http.Handler {
	a := &api{s: s, tokens: tokens, log: s.log}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", a.health)
	mux.Handle("GET /v1/timeline", a.protected(a.timeline))
	mux.Handle("GET /v1/history", a.protected(a.history))
	mux.Handle("GET /v1/images", a.protected(a.images))
	mux.Handle("GET /v1/report", a.protected(a.report))
	mux.Handle("GET /v1/problems", a.protected(a.problems))
	mux.Handle("POST /v1/deployed", a.protected(a.deployed))
	mux.Handle("POST /v1/rematch", a.protected(a.rematch))
	mux.Handle("GET /v1/outcome", a.protected(a.outcome))
	mux.Handle("POST /v1/known", a.protected(a.known))
	mux.Handle("GET /v1/read", a.protected(a.read))
	mux.Handle("GET /v1/standings", a.protected(a.standings))
	mux.Handle("GET /v1/tags", a.protected(a.tags))
	return mux
}

// protected asks for one of the tokens. Without a configured token nobody gets in.
func (a *api) protected(next func(w http.ResponseWriter, r *http.Request) error) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		tokens, err := a.tokens()
		if err != nil {
			a.log.ErrorContext(r.Context(), "the API's token cannot be read", "error", err)
		}
		if err != nil || !credential.Bearer(r.Header.Get("Authorization"), tokens) {
			w.Header().Set("WWW-Authenticate", `Bearer realm="tidewaiter catalog"`)
			a.answer(w, r, http.StatusUnauthorized, map[string]string{"error": "a valid bearer token is needed"})
			return
		}
		ctx, cancel := context.WithTimeout(r.Context(), requestTimeout)
		defer cancel()
		if err := next(w, r.WithContext(ctx)); err != nil {
			a.fail(w, r, err)
		}
	})
}

// errBadRequest marks what the client did wrong.
var errBadRequest = errors.New("bad request")

func (a *api) fail(w http.ResponseWriter, r *http.Request, err error) {
	if errors.Is(err, ErrBadRef) || errors.Is(err, errBadRequest) {
		a.answer(w, r, http.StatusBadRequest, map[string]string{"error": err.Error()})
		return
	}
	a.log.ErrorContext(r.Context(), "request failed", "path", r.URL.Path, "error", err)
	status := http.StatusInternalServerError
	if outcome, _ := bus.Classify(outage(err)); outcome == bus.OutcomeUnavailable {
		status = http.StatusServiceUnavailable
	}
	a.answer(w, r, status, map[string]string{"error": http.StatusText(status)})
}

func (a *api) answer(w http.ResponseWriter, r *http.Request, status int, body any) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	if err := json.NewEncoder(w).Encode(body); err != nil {
		a.log.DebugContext(r.Context(), "answer could not be written", "error", err)
	}
}

func (a *api) health(w http.ResponseWriter, r *http.Request) {
	ctx, cancel := context.WithTimeout(r.Context(), time.Second)
	defer cancel()
	if err := a.s.db.PingContext(ctx); err != nil {
		a.answer(w, r, http.StatusServiceUnavailable, map[string]string{"status": "database does not answer"})
		return
	}
	a.answer(w, r, http.StatusOK, map[string]string{"status": "ok"})
}

func (a *api) timeline(w http.ResponseWriter, r *http.Request) error {
	ref := r.URL.Query().Get("ref")
	if ref == "" {
		return fmt.Errorf("ref is missing: %w", errBadRequest)
	}
	entries, err := a.s.Timeline(r.Context(), ref)
	if err != nil {
		return err
	}
	w.Header().Set("Content-Type", "application/jsonl")
	w.Header().Set("Cache-Control", "no-store")
	lines := json.NewEncoder(w)
	for _, e := range entries {
		if err := lines.Encode(e); err != nil {
			a.log.DebugContext(r.Context(), "answer could not be written", "error", err)
			return nil
		}
	}
	return nil
}

func (a *api) images(w http.ResponseWriter, r *http.Request) error {
	q := r.URL.Query()
	limit, err := limitOf(q.Get("limit"))
	if err != nil {
		return err
	}
	images, err := a.s.Images(r.Context(), q.Get("ref"), q.Get("state"), q.Get("after"), limit)
	if err != nil {
		return err
	}
	body := struct {
		Images []ImageEntry `json:"images"`
		Next   *string      `json:"next"`
	}{Images: images}
	if len(images) == limit {
		body.Next = &images[limit-1].Image
	}
	a.answer(w, r, http.StatusOK, body)
	return nil
}

func (a *api) report(w http.ResponseWriter, r *http.Request) error {
	report, err := a.s.Fleet(r.Context())
	if err != nil {
		return err
	}
	a.answer(w, r, http.StatusOK, report)
	return nil
}

func (a *api) problems(w http.ResponseWriter, r *http.Request) error {
	q := r.URL.Query()
	limit, err := limitOf(q.Get("limit"))
	if err != nil {
		return err
	}
	problems, err := a.s.Problems(r.Context(), q.Get("state"), q.Get("after"), limit)
	if err != nil {
		return err
	}
	body := struct {
		Problems any     `json:"problems"`
		Next     *string `json:"next"`
	}{Problems: problems}
	if len(problems) == limit {
		body.Next = &problems[limit-1].Key
	}
	a.answer(w, r, http.StatusOK, body)
	return nil
}

func limitOf(s string) (int, error) {
	if s == "" {
		return defaultLimit, nil
	}
	n, err := strconv.Atoi(s)
	if err != nil || n < 1 || n > maxLimit {
		return 0, fmt.Errorf("limit is not a number from 1 to %d: %w", maxLimit, errBadRequest)
	}
	return n, nil
}

// maxDeployedBytes bounds a list of what runs: about 100,000 images.
const maxDeployedBytes = 32 << 20

func (a *api) deployed(w http.ResponseWriter, r *http.Request) error {
	var body struct {
		Origin string   `json:"origin"`
		Images []string `json:"images"`
	}
	d := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxDeployedBytes))
	d.DisallowUnknownFields()
	if err := d.Decode(&body); err != nil {
		return fmt.Errorf("body: %w: %w", err, errBadRequest)
	}
	if body.Origin == "" || len(body.Origin) > 200 {
		return fmt.Errorf("origin is empty or longer than 200 bytes: %w", errBadRequest)
	}
	images := make([]contracts.Image, len(body.Images))
	for i, name := range body.Images {
		im, err := contracts.ParseImage(name)
		if err != nil {
			return fmt.Errorf("images[%d]: %w: %w", i, err, errBadRequest)
		}
		images[i] = im
	}
	if err := a.s.Deployed(r.Context(), body.Origin, images, time.Now().UTC()); err != nil {
		return err
	}
	a.answer(w, r, http.StatusOK, map[string]int{"images": len(images)})
	return nil
}

// maxRequestBytes bounds a body that names one reference.
const maxRequestBytes = 4 << 10

func (a *api) rematch(w http.ResponseWriter, r *http.Request) error {
	var body struct {
		Ref string `json:"ref"`
		All bool   `json:"all"`
	}
	d := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxRequestBytes))
	d.DisallowUnknownFields()
	if err := d.Decode(&body); err != nil {
		return fmt.Errorf("body: %w: %w", err, errBadRequest)
	}
	if body.All == (body.Ref != "") {
		return fmt.Errorf(`the body must have either "ref" or "all": true: %w`, errBadRequest)
	}
	n, err := a.s.RequestRematch(r.Context(), body.Ref)
	if err != nil {
		return err
	}
	a.answer(w, r, http.StatusAccepted, map[string]int64{"images": n})
	return nil
}

func (a *api) outcome(w http.ResponseWriter, r *http.Request) error {
	q := r.URL.Query()
	if q.Get("push") == "" || q.Get("subject") == "" {
		return fmt.Errorf("push or subject is missing: %w", errBadRequest)
	}
	outcome, err := a.s.Outcome(r.Context(), q.Get("push"), q.Get("subject"))
	if err != nil {
		return err
	}
	a.answer(w, r, http.StatusOK, outcome)
	return nil
}
