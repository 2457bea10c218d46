package intake

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/store"
	"github.com/tidewaiter/tidewaiter/libs/store/storetest"
)

// logged returns a service whose calls are remembered; written ends when all are.
func logged(t *testing.T, sources Sources) (s *Intake, m *memory, written func()) {
	t.Helper()
	cfg := DefaultConfig()
	cfg.Admin = &BearerAuth{TokenFile: file(t, "admin")}
	s, m = startWith(t, cfg, sources)
	db := opened(t)
	r := newRecorder(time.Hour, func(context.Context) (*store.DB, error) { return db, nil },
		func() { t.Error("a delivery was dropped") }, slog.New(slog.DiscardHandler))
	s.record, s.refused, s.db = r.record, r.refuse, r.db.Load
	return s, m, recording(t, r)
}

// ask gets a path of the log and decodes the answer.
func ask[T any](t *testing.T, s *Intake, path string) (out T) {
	t.Helper()
	w := call(s, http.MethodGet, path, http.Header{"Authorization": {"Bearer admin"}}, nil)
	if w.Code != http.StatusOK {
		t.Fatalf("%s: got %d, %s", path, w.Code, w.Body)
	}
	d := json.NewDecoder(w.Body)
	d.DisallowUnknownFields()
	if err := d.Decode(&out); err != nil {
		t.Fatal(err)
	}
	return out
}

// TestLogSaysWhy: for each way in which a call can go there is a code, words and what to do.
func TestLogSaysWhy(t *testing.T) {
	bearer := Source{
		Kind: "distribution", Registry: "r.example:5000", Paths: []string{"team"},
		Auth: Auth{Bearer: &BearerAuth{TokenFile: file(t, "hunter2-hunter2")}},
	}
	signed := bearer
	signed.Auth = Auth{HMAC: &HMACAuth{Header: "X-Signature", SecretFile: file(t, "key")}}
	inURL := bearer
	inURL.Auth = Auth{Query: &QueryAuth{Name: "code", ValueFile: file(t, "hunter5-hunter5")}}
	anywhere := bearer
	anywhere.Registry, anywhere.AnyRegistry = "", true
	right := http.Header{"Authorization": {"Bearer hunter2-hunter2"}}
	wrong := http.Header{"Authorization": {"Bearer hunter3-hunter3"}}
	nowhere := []byte(`{"events":[{"id":"n","action":"push","target":{"mediaType":"application/vnd.oci.image.manifest.v1+json","repository":"team/a","tag":"1"}}]}`)

	s, m, written := logged(t, Sources{"main": bearer, "signed": signed, "url": inURL, "anywhere": anywhere})
	slow := false
	m.fail = func(context.Context) error {
		if slow {
			return errors.New("no broker at kafka://user:hunter4@broker")
		}
		return nil
	}
	type want struct {
		source, reason, trouble string
		failure                 bool
	}
	var wants []want
	try := func(path string, h http.Header, body []byte, w want) {
		t.Helper()
		call(s, http.MethodPost, path, h, body)
		if w.reason != "" {
			wants = append(wants, w)
		}
	}
	try("/hooks/main", right, push("1", "team/a", "1"), want{"main", reasonStored, "", false})
	try("/hooks/main", right, push("1", "team/a", "1"), want{"main", reasonDuplicate, "", false})
	try("/hooks/main", right, push("2", "other/a", "1"), want{"main", reasonFiltered, "", false})
	try("/hooks/main", right, []byte(`{"events":[]}`), want{"main", reasonIgnored, "", false})
	try("/hooks/main", right, []byte("not what it sends"), want{"main", reasonUnreadable, "not JSON at byte", true})
	try("/hooks/anywhere", right, nowhere, want{"anywhere", reasonIncomplete, "no registry is named", true})
	try("/hooks/main", right, bytes.Repeat([]byte(" "), DefaultMaxBody+1), want{"main", reasonTooLarge, "", true})
	try("/hooks/main", wrong, push("3", "team/a", "1"), want{"main", reasonRefused, "holds none of the secrets", true})
	try("/hooks/main", nil, push("3", "team/a", "1"), want{"main", reasonRefused, "Authorization is missing", true})
	try("/hooks/main", http.Header{"Authorization": {"hunter2-hunter2"}}, nil, want{"main", reasonRefused, "does not have the form", true})
	try("/hooks/main", http.Header{"Authorization": {"Bearer hunter2-hunter2", "x"}}, nil, want{"main", reasonRefused, "more than once", true})
	try("/hooks/signed", http.Header{"X-Signature": {"00"}}, push("3", "team/a", "1"), want{"signed", reasonRefused, "is not the body's", true})
	try("/hooks/url", nil, push("3", "team/a", "1"), want{"url", reasonRefused, "parameter code of the URL is missing", true})
	try("/hooks/url?code=hunter6", nil, push("3", "team/a", "1"), want{"url", reasonRefused, "parameter code of the URL holds none", true})
	try("/hooks/nobody-knows", wrong, push("3", "team/a", "1"), want{sourceUnknown, reasonUnknown, "", true})
	try("/v1/submit", wrong, []byte(`{"ref":"r.example:5000/team/a:1"}`), want{sourceSubmit, reasonRefused, "holds none", true})
	slow = true
	try("/hooks/main", right, push("4", "team/a", "4"), want{"main", reasonNotStored, "no broker", true})
	broken := httptest.NewRequest(http.MethodPost, "/hooks/main", io.MultiReader(strings.NewReader("{"), errReader{}))
	broken.Header = right
	s.Handler().ServeHTTP(httptest.NewRecorder(), broken)
	wants = append(wants, want{"main", reasonBrokenOff, "", true})
	written()

	got := ask[Deliveries](t, s, "/v1/deliveries?since=1h&limit=1000").Deliveries
	for _, w := range wants {
		i := slices.IndexFunc(got, func(d contracts.Delivery) bool {
			return d.Source == w.source && d.Reason == w.reason && strings.Contains(d.Trouble, w.trouble)
		})
		if i < 0 {
			t.Errorf("%+v is not in the log", w)
			continue
		}
		d := got[i]
		if d.Means == "" || d.Failure != w.failure || w.failure && d.Action == "" || d.Calls != 1 {
			t.Errorf("%+v: got %+v", w, d)
		}
		if w.reason == reasonStored && !slices.Equal(d.Subjects, []string{"r.example:5000/team/a:1@" + testDigest}) {
			t.Errorf("subjects %q", d.Subjects)
		}
	}
	if len(got) != len(wants) {
		t.Errorf("%d entries, want %d", len(got), len(wants))
	}
	if text := fmt.Sprintf("%+v", got); strings.Contains(text, "hunter") {
		t.Errorf("what was presented, or a password, is in the log: %s", text)
	}

	all := ask[SourceStatuses](t, s, "/v1/sources").Sources
	by := map[string]contracts.SourceStatus{}
	for _, st := range all {
		by[st.Source] = st
	}
	status := by["main"]
	if status.Calls != 12 || status.Reasons[reasonRefused] != 4 || status.Reasons[reasonStored] != 1 || !status.Configured ||
		status.Registry != "r.example:5000" || status.LastCall == nil || status.LastStored == nil || status.LastStored.After(*status.LastCall) {
		t.Errorf("got %+v", status)
	}
	if f := by["main"].LastFailure; f == nil || !f.Failure || f.Means == "" || f.Source != "main" {
		t.Errorf("last failure %+v", f)
	}
	if u := by[sourceUnknown]; u.Configured || u.Calls != 1 {
		t.Errorf("calls to no source: %+v", u)
	}
	if one := ask[SourceStatuses](t, s, "/v1/sources?source=signed").Sources; len(one) != 1 || one[0].Source != "signed" || one[0].LastStored != nil {
		t.Errorf("got %+v", one)
	}
}

type errReader struct{}

func (errReader) Read([]byte) (int, error) { return 0, io.ErrUnexpectedEOF }

// TestFloodOfRefusedCalls: whoever has no secret cannot fill the database.
func TestFloodOfRefusedCalls(t *testing.T) {
	src := openSource()
	src.Auth = Auth{Bearer: &BearerAuth{TokenFile: file(t, "token")}}
	s, _, written := logged(t, Sources{"s": src})
	now := time.Now() // entries that are too old go away
	s.now = func() time.Time { return now }
	const flood = 5000
	for i := range flood {
		h := http.Header{"Authorization": {fmt.Sprintf("Bearer guess-%d", i)}, "Content-Type": {fmt.Sprintf("x/%d", i)}}
		call(s, http.MethodPost, "/hooks/s", h, push(fmt.Sprint(i), "a", "1"))
		call(s, http.MethodPost, fmt.Sprintf("/hooks/s%d", i), h, nil)
		now = now.Add(200 * time.Millisecond)
	}
	written()
	got := ask[Deliveries](t, s, "/v1/deliveries").Deliveries
	calls := map[string]int{}
	for _, d := range got {
		calls[d.Reason] += d.Calls
		if d.Calls > 1 && (d.First == nil || !d.First.Before(d.Time)) {
			t.Errorf("from %v to %v", d.First, d.Time)
		}
	}
	// 1000 s touch three windows of ten minutes
	if len(got) > 6 || calls[reasonRefused] != flood || calls[reasonUnknown] != flood {
		t.Errorf("%d entries for %v", len(got), calls)
	}
	if text := fmt.Sprintf("%+v", got); strings.Contains(text, "guess") {
		t.Errorf("what was presented is in the log: %s", text)
	}
}

// TestRefusedCallsWhileTheDatabaseIsAway: memory is bounded, and what waits is written later.
func TestRefusedCallsWhileTheDatabaseIsAway(t *testing.T) {
	dropped := 0
	r := newRecorder(time.Hour, nil, func() { dropped++ }, slog.New(slog.DiscardHandler))
	at := time.Date(2026, 5, 4, 3, 2, 1, 0, time.UTC)
	for i := range maxRefused + 3 {
		r.refuse(delivery{source: fmt.Sprint(i), received: at})
	}
	r.refuse(delivery{source: "0", received: at.Add(time.Second)})
	if dropped != 3 || len(r.refused) != maxRefused {
		t.Errorf("%d dropped, %d kept", dropped, len(r.refused))
	}
	taken := r.takeRefused()
	r.refuse(delivery{source: "0", received: at.Add(-time.Second)})
	r.keepRefused(taken) // it could not be written
	want := tally{3, at.Add(-time.Second), at.Add(time.Second)}
	if got := r.refused[refusal{source: "0", window: at.Truncate(refusedEvery).UnixMilli()}]; got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
}

// TestReplicasShareTheLog: two processes count the same refused calls in one row.
func TestReplicasShareTheLog(t *testing.T) {
	address := storetest.URL(t)
	at := time.Date(2026, 5, 4, 3, 2, 1, 0, time.UTC)
	key := refusal{"s", reasonRefused, "", 401, at.Truncate(refusedEvery).UnixMilli()}
	var db *store.DB
	for i := range 2 {
		db = storetest.OpenURL(t, address)
		if err := migrate(t.Context(), db); err != nil {
			t.Fatal(err)
		}
		seen := at.Add(time.Duration(i) * time.Second)
		for range 2 {
			if err := write(t.Context(), db, nil, map[refusal]tally{key: {5, seen, seen}}); err != nil {
				t.Fatal(err)
			}
		}
	}
	got, err := listDeliveries(t.Context(), db, deliveryQuery{limit: 10})
	if err != nil {
		t.Fatal(err)
	}
	if len(got.Deliveries) != 1 || got.Deliveries[0].Calls != 20 || !got.Deliveries[0].First.Equal(at) || !got.Deliveries[0].Time.Equal(at.Add(time.Second)) {
		t.Errorf("got %+v", got.Deliveries)
	}
}

func TestLogIsPaged(t *testing.T) {
	db := opened(t)
	at := time.Date(2026, 5, 4, 3, 2, 1, 0, time.UTC)
	var batch []delivery
	for i := range 25 { // five share each time
		batch = append(batch, delivery{source: fmt.Sprint("s", i%2), reason: reasonStored, deliveryID: fmt.Sprint(i), received: at.Add(time.Duration(i/5) * time.Second)})
	}
	if err := write(t.Context(), db, batch, nil); err != nil {
		t.Fatal(err)
	}
	cfg := DefaultConfig()
	cfg.Admin = &BearerAuth{TokenFile: file(t, "admin")}
	s, _ := startWith(t, cfg, nil)
	s.db = func() *store.DB { return db }
	s.now = func() time.Time { return at.Add(5 * time.Second) }
	for query, want := range map[string]int{
		"":                        25,
		"source=s1":               12,
		"source=s1&reason=stored": 12,
		"reason=ignored":          0,
		"since=2s":                10,
		"since=" + at.Add(3*time.Second).Format(time.RFC3339): 10,
		"source=s0&since=1h": 13,
	} {
		seen := map[string]bool{}
		last := at.Add(time.Hour)
		after := ""
		for pages := 0; ; pages++ {
			page := ask[Deliveries](t, s, "/v1/deliveries?limit=4&"+query+"&after="+url.QueryEscape(after))
			for _, d := range page.Deliveries {
				if seen[d.DeliveryID] || d.Time.After(last) {
					t.Errorf("%s: %s is there twice or out of order", query, d.DeliveryID)
				}
				seen[d.DeliveryID], last = true, d.Time
			}
			if page.Next == nil || pages > 10 {
				break
			}
			after = *page.Next
		}
		if len(seen) != want {
			t.Errorf("%s: %d entries, want %d", query, len(seen), want)
		}
	}
}

func TestLogIsGuarded(t *testing.T) {
	admin := http.Header{"Authorization": {"Bearer admin"}}
	cfg := DefaultConfig()
	closed, _ := startWith(t, cfg, nil)
	cfg.Admin = &BearerAuth{TokenFile: file(t, "admin")}
	away, _ := startWith(t, cfg, nil)
	db := opened(t)
	s, _ := startWith(t, cfg, nil)
	s.db = func() *store.DB { return db }
	for _, c := range []struct {
		s      *Intake
		header http.Header
		query  string
		want   int
		says   string
	}{
		{closed, admin, "", http.StatusNotFound, "intake.admin"},
		{away, admin, "", http.StatusServiceUnavailable, "database"},
		{s, nil, "", http.StatusUnauthorized, "token"},
		{s, http.Header{"Authorization": {"Bearer other"}}, "", http.StatusUnauthorized, "token"},
		{s, admin, "", http.StatusOK, ""},
		{s, admin, "?since=yesterday", http.StatusBadRequest, "since"},
		{s, admin, "?since=-1h", http.StatusBadRequest, "since"},
		{s, admin, "?limit=0", http.StatusBadRequest, "limit"},
		{s, admin, "?limit=100000", http.StatusBadRequest, "limit"},
		{s, admin, "?after=x", http.StatusBadRequest, "after"},
		{s, admin, "?reason=x", http.StatusBadRequest, "unknown-source"},
	} {
		w := call(c.s, http.MethodGet, "/v1/deliveries"+c.query, c.header, nil)
		if w.Code != c.want || !strings.Contains(w.Body.String(), c.says) {
			t.Errorf("%s: got %d, %s, want %d with %q", c.query, w.Code, w.Body, c.want, c.says)
		}
	}
	if w := call(s, http.MethodGet, "/v1/sources?source=nobody", admin, nil); w.Code != http.StatusBadRequest || !strings.Contains(w.Body.String(), "nobody") {
		t.Errorf("got %d, %s", w.Code, w.Body)
	}
	if w := call(s, http.MethodGet, "/v1/sources", nil, nil); w.Code != http.StatusUnauthorized {
		t.Errorf("got %d", w.Code)
	}
}

// TestReasons: each code says what it means, each failure what to do, and README.md names all.
func TestReasons(t *testing.T) {
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{}
	for _, r := range Reasons() {
		if seen[r.Code] || !strings.HasSuffix(r.Means, ".") || r.Failure && r.Do == "" || r.Do != "" && !strings.HasSuffix(r.Do, ".") {
			t.Errorf("%+v", r)
		}
		seen[r.Code] = true
		if !strings.Contains(string(readme), "`"+r.Code+"`") {
			t.Errorf("README.md does not name %s", r.Code)
		}
	}
	if r := reasonOf("new-code"); r.Code != "new-code" || r.Failure {
		t.Errorf("a code of a later version: %+v", r)
	}
}
