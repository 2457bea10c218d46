package intake

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/bus"
	"github.com/tidewaiter/tidewaiter/libs/store"
)

// Bounds of a listing of deliveries.
const (
	defaultLimit = 100
	maxLimit     = 1000
	queryWithin  = 10 * time.Second
	// defaultSince is how far back a summary of sources looks.
	defaultSince = 24 * time.Hour
)

var (
	errQuery  = errors.New("bad request")
	errNoLog  = errors.New("the database of the delivery log is away")
	errClosed = errors.New("closed: no admin token is configured (intake.admin)")
)

// Deliveries is the answer to GET /v1/deliveries.
type Deliveries struct {
	Deliveries []contracts.Delivery `json:"deliveries"` // newest first
	Next       *string              `json:"next"`       // the parameter after of the next page; null: this is the last
}

// SourceStatuses is the answer to GET /v1/sources.
type SourceStatuses struct {
	Sources []contracts.SourceStatus `json:"sources"` // by id
}

// serveDeliveries lists the delivery log: GET /v1/deliveries
// ?source=&reason=&since=&limit=&after=. since is a time (RFC 3339) or how long
// ago (Go duration). Errors are {"error": "…"} with 400, 401, 404 (closed) or 503.
func (s *Intake) serveDeliveries(w http.ResponseWriter, r *http.Request) {
	s.serveLog(w, r, func(ctx context.Context, db *store.DB, q url.Values) (any, error) {
		query, err := s.parseQuery(q)
		if err != nil {
			return nil, err
		}
		return listDeliveries(ctx, db, query)
	})
}

// serveSources sums up the calls of each source: GET /v1/sources?source=&since=,
// by default those of a day.
func (s *Intake) serveSources(w http.ResponseWriter, r *http.Request) {
	s.serveLog(w, r, func(ctx context.Context, db *store.DB, q url.Values) (any, error) {
		since, err := s.parseSince(q.Get("since"), s.now().Add(-defaultSince))
		if err != nil {
			return nil, err
		}
		return s.sourceStatuses(ctx, db, q.Get("source"), since)
	})
}

func (s *Intake) serveLog(w http.ResponseWriter, r *http.Request, ask func(context.Context, *store.DB, url.Values) (any, error)) {
	answer, err := s.askLog(r, ask)
	status := http.StatusOK
	switch {
	case err == nil:
	case errors.Is(err, errClosed):
		status = http.StatusNotFound
	case errors.Is(err, errQuery):
		status = http.StatusBadRequest
	case errors.Is(err, errUnauthorized):
		status = http.StatusUnauthorized
		w.Header().Set("WWW-Authenticate", `Bearer realm="admin"`)
	default:
		status = http.StatusServiceUnavailable
		s.log.WarnContext(r.Context(), "the delivery log cannot be read", "error", err)
		err = errNoLog
	}
	if err != nil {
		answer = map[string]string{"error": err.Error()}
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(answer) // the client is gone if this fails
}

var errUnauthorized = errors.New("a valid bearer token is needed")

func (s *Intake) askLog(r *http.Request, ask func(context.Context, *store.DB, url.Values) (any, error)) (any, error) {
	if s.admin == nil {
		return nil, errClosed
	}
	if !s.admin.verify(offer{header: r.Header}) {
		return nil, errUnauthorized
	}
	db := s.db()
	if db == nil {
		return nil, errNoLog
	}
	ctx, cancel := context.WithTimeout(r.Context(), queryWithin)
	defer cancel()
	return ask(ctx, db, r.URL.Query())
}

// deliveryQuery selects deliveries.
type deliveryQuery struct {
	source, reason string
	since          time.Time
	limit          int
	beforeTime     int64 // with beforeID: only what comes after this one in the listing
	beforeID       string
}

func (s *Intake) parseQuery(q url.Values) (deliveryQuery, error) {
	out := deliveryQuery{source: q.Get("source"), reason: q.Get("reason"), limit: defaultLimit}
	var err error
	if out.since, err = s.parseSince(q.Get("since"), time.Time{}); err != nil {
		return out, err
	}
	if out.reason != "" && !slices.ContainsFunc(Reasons(), func(r Reason) bool { return r.Code == out.reason }) {
		var codes []string
		for _, r := range Reasons() {
			codes = append(codes, r.Code)
		}
		return out, fmt.Errorf("reason is none of %s: %w", strings.Join(codes, ", "), errQuery)
	}
	if text := q.Get("limit"); text != "" {
		if out.limit, err = strconv.Atoi(text); err != nil || out.limit < 1 || out.limit > maxLimit {
			return out, fmt.Errorf("limit is not a number from 1 to %d: %w", maxLimit, errQuery)
		}
	}
	if after := q.Get("after"); after != "" {
		at, id, ok := strings.Cut(after, "-")
		if out.beforeTime, err = strconv.ParseInt(at, 10, 64); err != nil || !ok || id == "" {
			return out, fmt.Errorf("after is not what next said: %w", errQuery)
		}
		out.beforeID = id
	}
	return out, nil
}

func (s *Intake) parseSince(text string, otherwise time.Time) (time.Time, error) {
	if text == "" {
		return otherwise, nil
	}
	if ago, err := time.ParseDuration(text); err == nil && ago > 0 {
		return s.now().Add(-ago), nil
	}
	at, err := time.Parse(time.RFC3339, text)
	if err != nil {
		return time.Time{}, fmt.Errorf(`since is neither a time like "2026-05-04T03:02:01Z" nor a duration like "1h": %w`, errQuery)
	}
	return at, nil
}

func listDeliveries(ctx context.Context, db *store.DB, q deliveryQuery) (Deliveries, error) {
	var where []string
	var args []any
	add := func(condition string, values ...any) {
		for _, v := range values {
			args = append(args, v)
			condition = strings.Replace(condition, "?", "$"+strconv.Itoa(len(args)), 1)
		}
		where = append(where, condition)
	}
	if q.source != "" {
		add("source = ?", q.source)
	}
	if q.reason != "" {
		add("reason = ?", q.reason)
	}
	if !q.since.IsZero() {
		add("received_at >= ?", q.since.UnixMilli())
	}
	if q.beforeID != "" {
		add("(received_at, id) < (?, ?)", q.beforeTime, q.beforeID)
	}
	query := `SELECT id, source, delivery_id, received_at, status, reason, bytes, events, published, ignored, filtered, duplicates,
		dead, over_quota, calls, first_at, trouble, subjects FROM intake_deliveries`
	if len(where) > 0 {
		query += " WHERE " + strings.Join(where, " AND ") // conditions of ours; what was asked for is in args
	}
	args = append(args, q.limit)
	query += " ORDER BY received_at DESC, id DESC LIMIT $" + strconv.Itoa(len(args))
	rows, err := db.QueryContext(ctx, query, args...)
	if err != nil {
		return Deliveries{}, fmt.Errorf("list deliveries: %w", err)
	}
	defer func() { _ = rows.Close() }() // read to its end
	out := Deliveries{Deliveries: []contracts.Delivery{}}
	for rows.Next() {
		d, err := scanDelivery(rows)
		if err != nil {
			return Deliveries{}, err
		}
		out.Deliveries = append(out.Deliveries, d)
	}
	if err := rows.Err(); err != nil {
		return Deliveries{}, fmt.Errorf("list deliveries: %w", err)
	}
	if n := len(out.Deliveries); n == q.limit {
		last := out.Deliveries[n-1]
		next := strconv.FormatInt(last.Time.UnixMilli(), 10) + "-" + last.ID
		out.Next = &next
	}
	return out, nil
}

func scanDelivery(rows *sql.Rows) (contracts.Delivery, error) {
	var d contracts.Delivery
	var received, first int64
	var subjects string
	err := rows.Scan(&d.ID, &d.Source, &d.DeliveryID, &received, &d.Status, &d.Reason, &d.Bytes, &d.Events, &d.Published,
		&d.Ignored, &d.Filtered, &d.Duplicates, &d.Dead, &d.OverQuota, &d.Calls, &first, &d.Trouble, &subjects)
	if err != nil {
		return d, fmt.Errorf("read delivery: %w", err)
	}
	d.Time = time.UnixMilli(received).UTC()
	if d.Calls > 1 {
		at := time.UnixMilli(first).UTC()
		d.First = &at
	}
	if subjects != "" {
		d.Subjects = strings.Split(subjects, "\n")
	}
	r := reasonOf(d.Reason)
	d.Means, d.Action, d.Failure = r.Means, r.Do, r.Failure
	return d, nil
}

// sourceStatuses sums up the calls of one source, or of all that are configured
// or ever called.
func (s *Intake) sourceStatuses(ctx context.Context, db *store.DB, only string, since time.Time) (SourceStatuses, error) {
	since = since.Truncate(time.Hour).UTC() // calls are counted by the hour
	all := map[string]*contracts.SourceStatus{}
	of := func(id string) *contracts.SourceStatus {
		if all[id] == nil {
			all[id] = &contracts.SourceStatus{Source: id, Since: since, Reasons: map[string]int{}}
		}
		return all[id]
	}
	for id, src := range s.sources {
		st := of(id)
		st.Configured, st.Kind, st.Registry = true, src.Kind, src.Registry
	}
	failures := map[string]contracts.Delivery{} // the last of each source: its reason and time
	rows, err := db.QueryContext(ctx, `SELECT source, reason, SUM(calls), MAX(last_at) FROM intake_hours WHERE hour >= $1
		GROUP BY source, reason`, since.UnixMilli())
	if err != nil {
		return SourceStatuses{}, fmt.Errorf("count deliveries: %w", err)
	}
	defer func() { _ = rows.Close() }() // read to its end
	for rows.Next() {
		var id, reason string
		var calls int
		var last int64
		if err := rows.Scan(&id, &reason, &calls, &last); err != nil {
			return SourceStatuses{}, fmt.Errorf("count deliveries: %w", err)
		}
		st, at := of(id), time.UnixMilli(last).UTC()
		st.Calls += calls
		st.Reasons[reason] = calls
		later(&st.LastCall, at)
		if reason == reasonStored {
			later(&st.LastStored, at)
		}
		if reasonOf(reason).Failure && at.After(failures[id].Time) {
			failures[id] = contracts.Delivery{Reason: reason, Time: at}
		}
	}
	if err := rows.Err(); err != nil {
		return SourceStatuses{}, fmt.Errorf("count deliveries: %w", err)
	}
	out := SourceStatuses{Sources: []contracts.SourceStatus{}}
	for _, id := range slices.Sorted(maps.Keys(all)) {
		if only != "" && id != only {
			continue
		}
		if f, ok := failures[id]; ok {
			found, err := listDeliveries(ctx, db, deliveryQuery{source: id, reason: f.Reason, since: f.Time, limit: 1})
			if err != nil {
				return SourceStatuses{}, err
			}
			if len(found.Deliveries) > 0 {
				all[id].LastFailure = &found.Deliveries[0]
			}
		}
		out.Sources = append(out.Sources, *all[id])
	}
	if only != "" && len(out.Sources) == 0 {
		return out, fmt.Errorf("source %s is not configured and never called: %w", bus.Redact(strconv.Quote(only)), errQuery)
	}
	return out, nil
}

func later(t **time.Time, at time.Time) {
	if *t == nil || at.After(**t) {
		*t = &at
	}
}
