package catalog

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/cloudevents/sdk-go/v2/event"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/bus"
)

// submission is a push by hand and what planner derives from it.
type submission struct {
	f       *fixture
	id      string
	subject string
}

func (f *fixture) submitted(repository, tag string) (submission, event.Event) {
	f.t.Helper()
	p := submission{f: f, subject: "r.example/" + repository + ":" + tag}
	ev := f.event("intake", contracts.ImagePushedV1, p.subject, contracts.ImagePushed{
		Source: contracts.CauseSubmit, Registry: "r.example", Repository: repository, Tag: tag, Cause: contracts.CauseSubmit, ReceivedAt: f.now,
	})
	p.id = ev.ID()
	return p, ev
}

func (p submission) derived(name, subject string, data any) event.Event {
	p.f.t.Helper()
	ev := p.f.event("planner", name, subject, data)
	ev.SetID(contracts.OutputID("planner", "/services/intake", p.id, ev.Type(), subject))
	return ev
}

func (p submission) observed(digest string) event.Event {
	repository, tag, _ := strings.Cut(strings.TrimPrefix(p.subject, "r.example/"), ":")
	return p.derived(contracts.TagObservedV1, p.subject, contracts.TagObserved{
		Source: contracts.CauseSubmit, Registry: "r.example", Repository: repository, Tag: tag, Digest: digest, ObservedAt: p.f.now,
	})
}

func (p submission) planned(im contracts.Image) event.Event {
	return p.derived(contracts.ImagePlannedV1, im.String(), contracts.ImagePlanned{Image: im, Source: contracts.CauseSubmit, Kind: contracts.KindImage})
}

func (p submission) outcome() Outcome {
	p.f.t.Helper()
	o, err := p.f.s.Outcome(p.f.t.Context(), p.id, p.subject)
	if err != nil {
		p.f.t.Fatal(err)
	}
	return o
}

// requests returns the image.rematch events with reason "request" that were
// sent since the last call: "repository lane sequence".
func (f *fixture) requests() []string {
	f.t.Helper()
	var all []string
	for _, ev := range f.out.events {
		if ev.Type() != contracts.TypePrefix+contracts.ImageRematchV1 {
			continue
		}
		d, err := bus.Decode[contracts.ImageRematch](ev)
		if err != nil {
			f.t.Fatal(err)
		}
		if d.Reason != contracts.RematchRequest || d.Inventory.Size == 0 {
			f.t.Errorf("got %+v", d)
		}
		all = append(all, fmt.Sprintf("%s %v %d", d.Image.Repository, ev.Extensions()[contracts.ExtLane], d.Snapshot.Sequence))
	}
	f.out.events = nil
	return all
}

// TestSubmittedAgain: who submits an image that has a verdict gets a new one,
// with the newest advisories, and is told of that one and no other.
func TestSubmittedAgain(t *testing.T) {
	f := newFixture(t)
	im := img("a", "1")
	f.handle(f.assembled(im, contracts.Inventory{Packages: npmPackages("lodash")}), f.attested(im, 1), f.observed("a", "v1", im.Digest),
		f.published(1, 2, about("express")))
	f.rematch()
	same(t, "before", f.requests())

	push, pushed := f.submitted("a", "v1")
	f.handle(pushed)
	if o := push.outcome(); o.Ended || o.Image != nil {
		t.Errorf("before planner looked: %+v", o)
	}
	f.handle(push.observed(im.Digest))
	if o := push.outcome(); o.Ended {
		t.Errorf("before the image was planned: %+v", o)
	}
	planned := push.planned(im)
	f.handle(planned)
	if o := push.outcome(); o.Ended || o.State != StateAttested || o.Image == nil || o.Image.Image != im.String() {
		t.Errorf("with the old verdict: %+v", o)
	}
	f.rematch()
	same(t, "asked", f.requests(), "a fresh 2")
	if o := push.outcome(); o.Ended {
		t.Errorf("asked, with the old verdict: %+v", o)
	}
	f.handle(planned)
	f.rematch()
	same(t, "a replay", f.requests())
	f.handle(f.attested(im, 2))
	if o := push.outcome(); !o.Ended || o.Image == nil || o.Image.Sequence != 2 {
		t.Errorf("with the new verdict: %+v", o)
	}
	f.handle(f.planned(im, "l"))
	f.rematch()
	same(t, "a push by a registry", f.requests())
}

// TestOutcomeOfAPush: a push that leads to another image than the tag's last
// one, or to none.
func TestOutcomeOfAPush(t *testing.T) {
	f := newFixture(t)
	old, next := img("a", "old"), img("a", "next")
	f.handle(f.observed("a", "latest", old.Digest), f.attested(old, 1))

	push, pushed := f.submitted("a", "latest")
	f.handle(pushed, push.observed(next.Digest), push.planned(next))
	if o := push.outcome(); o.Ended || o.State != StatePlanned || o.Image == nil || o.Image.Image != next.String() {
		t.Errorf("the tag has moved: %+v", o)
	}
	f.handle(f.attested(next, 1))
	if o := push.outcome(); !o.Ended || o.State != StateAttested || o.Image.Image != next.String() {
		t.Errorf("its first verdict: %+v", o)
	}

	for name, test := range map[string]struct {
		events func(p submission) []event.Event
		state  string
	}{
		"the tag is gone": {func(p submission) []event.Event { return []event.Event{p.observed("")} }, StateGone},
		"it could not be resolved": {func(p submission) []event.Event {
			return []event.Event{p.derived(contracts.ImageFailedV1, p.subject, contracts.ImageFailed{
				Registry: "r.example", Repository: "a", Tag: "latest", Stage: "planner", Message: "unauthorized",
			})}
		}, StateFailed},
		"no image": {func(p submission) []event.Event {
			chart := img("a", "chart")
			return []event.Event{p.observed(chart.Digest), p.derived(contracts.ImageUnsupportedV1, chart.String(), contracts.ImageUnsupported{Image: chart, Reason: "helm-chart"})}
		}, StateUnsupported},
		"deleted meanwhile": {func(p submission) []event.Event {
			return []event.Event{p.observed(old.Digest), p.derived(contracts.ImageGoneV1, old.String(), contracts.ImageGone{Image: old, Reason: "not found"})}
		}, StateGone},
	} {
		push, pushed := f.submitted("a", "latest")
		f.handle(pushed)
		f.handle(test.events(push)...)
		if o := push.outcome(); !o.Ended || o.State != test.state {
			t.Errorf("%s: %+v", name, o)
		}
	}
	if _, err := f.s.Outcome(t.Context(), "id", "no reference"); err == nil {
		t.Error("a bad subject is no error")
	}
}

// TestRematchRequest: after a change of the policy, everything or a part of it.
func TestRematchRequest(t *testing.T) {
	f := newFixture(t)
	a, b, c, gone := img("a", "a"), img("b", "b"), img("b", "c"), img("c", "gone")
	for _, im := range []contracts.Image{a, b, c, gone} {
		f.handle(f.assembled(im, contracts.Inventory{Packages: npmPackages("lodash", im.Digest)}), f.attested(im, 1))
	}
	f.handle(f.observed("b", "v1", b.Digest), f.planned(img("d", "waits"), "l"),
		f.event("planner", contracts.ImageGoneV1, gone.String(), contracts.ImageGone{Image: gone, Reason: "not found"}))
	if err := f.s.Deployed(t.Context(), "cluster", []contracts.Image{c}, f.now); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		ref  string
		want []string
	}{
		{"", []string{"a bulk 1", "b bulk 1", "b fresh 1"}},
		{"r.example/b", []string{"b bulk 1", "b fresh 1"}},
		{"r.example/b:v1", []string{"b fresh 1"}},
		{"r.example/b:v2", nil},
		{a.Digest, []string{"a fresh 1"}},
		{c.String(), []string{"b fresh 1"}},
		{"r.example/none", nil},
	} {
		n, err := f.s.RequestRematch(t.Context(), test.ref)
		if err != nil || int(n) != len(test.want) {
			t.Errorf("%q: %d images, %v", test.ref, n, err)
		}
		f.now = f.now.Add(time.Second)
		f.rematch()
		expect(t, test.ref, f.requests(), test.want...)
		f.restart()
		f.rematch()
		same(t, test.ref+" again", f.requests())
	}
}

func TestRematchAPI(t *testing.T) {
	f := newFixture(t)
	im := img("a", "1")
	f.handle(f.assembled(im, contracts.Inventory{Packages: npmPackages("lodash")}), f.attested(im, 1))
	api := f.s.API(func() ([]string, error) { return []string{"secret"}, nil })
	call := func(method, path, token, body string) (int, string) {
		req := httptest.NewRequestWithContext(t.Context(), method, path, strings.NewReader(body))
		req.Header.Set("Authorization", "Bearer "+token)
		answer := httptest.NewRecorder()
		api.ServeHTTP(answer, req)
		return answer.Code, strings.TrimSpace(answer.Body.String())
	}
	for _, test := range []struct {
		token, body string
		status      int
		answer      string
	}{
		{"wrong", `{"all":true}`, http.StatusUnauthorized, ""},
		{"secret", `{"all":true}`, http.StatusAccepted, `{"images":1}`},
		{"secret", `{"ref":"r.example/a"}`, http.StatusAccepted, `{"images":1}`},
		{"secret", `{"ref":"r.example/b"}`, http.StatusAccepted, `{"images":0}`},
		{"secret", `{"ref":"r.example/a","all":true}`, http.StatusBadRequest, ""},
		{"secret", `{"ref":"no reference"}`, http.StatusBadRequest, ""},
		{"secret", `{}`, http.StatusBadRequest, ""},
		{"secret", `{"everything":true}`, http.StatusBadRequest, ""},
		{"secret", `[`, http.StatusBadRequest, ""},
	} {
		status, answer := call(http.MethodPost, "/v1/rematch", test.token, test.body)
		if status != test.status || test.answer != "" && answer != test.answer {
			t.Errorf("%s: %d %s", test.body, status, answer)
		}
	}
	if status, answer := call(http.MethodGet, "/v1/outcome?push=x&subject=r.example/a:v1", "secret", ""); status != http.StatusOK || answer != `{"ended":false}` {
		t.Errorf("an unknown push: %d %s", status, answer)
	}
	for _, query := range []string{"", "?push=x", "?push=x&subject=a"} {
		if status, answer := call(http.MethodGet, "/v1/outcome"+query, "secret", ""); status != http.StatusBadRequest || !json.Valid([]byte(answer)) {
			t.Errorf("%q: %d %s", query, status, answer)
		}
	}
}

// TestFailedRenewalIsAskedAgain: what matcher or attestor gave up on is asked
// for again, after longer and longer, until there is a new verdict.
func TestFailedRenewalIsAskedAgain(t *testing.T) {
	f := newFixture(t)
	im := img("a", "1")
	failed := func(stage string) event.Event {
		return f.event(stage, contracts.ImageFailedV1, im.String(), contracts.ImageFailed{
			Registry: im.Registry, Repository: im.Repository, Digest: im.Digest, Stage: stage, Message: "no",
		})
	}
	early := failed("attestor")
	f.handle(f.assembled(im, contracts.Inventory{Packages: npmPackages("lodash")}), f.attested(im, 1), f.published(1, 2, about("lodash")))
	f.rematch()
	same(t, "by the snapshot", f.asked(), "a bulk 2 advisories")
	f.handle(early, failed("planner"))
	f.now = f.now.Add(retryFirst)
	f.rematch()
	same(t, "what failed before the verdict, or is no renewal", f.asked())
	wait := retryFirst
	for _, stage := range []string{"matcher", "attestor", "matcher"} {
		f.handle(failed(stage))
		f.now = f.now.Add(wait - time.Second)
		f.rematch()
		same(t, "too early", f.asked())
		f.now = f.now.Add(time.Second)
		f.rematch()
		same(t, fmt.Sprint(wait, " after ", stage, " failed"), f.asked(), "a bulk 2 refresh")
		wait *= 2
	}
	f.handle(f.attested(im, 2))
	f.now = f.now.Add(24 * time.Hour)
	f.rematch()
	same(t, "a new verdict", f.asked())
	f.handle(failed("matcher"))
	f.now = f.now.Add(retryFirst)
	f.rematch()
	same(t, "it begins anew", f.asked(), "a bulk 2 refresh")
}

// TestReturnedImageIsMatchedAgain: a snapshot was drawn while the image was gone.
func TestReturnedImageIsMatchedAgain(t *testing.T) {
	f := newFixture(t)
	touched, untouched := img("touched", "1"), img("untouched", "2")
	v := vuln("CVE-1", "lodash", "1.0.0", contracts.SeverityHigh, "1.0.1")
	for im, name := range map[contracts.Image]string{touched: "lodash", untouched: "express"} {
		f.handle(f.assembled(im, contracts.Inventory{Packages: npmPackages(name)}), f.attested(im, 1, v),
			f.event("planner", contracts.ImageGoneV1, im.String(), contracts.ImageGone{Image: im, Reason: "not found"}))
	}
	f.handle(f.published(1, 2, about("lodash")))
	f.rematch()
	same(t, "while it is gone", f.asked())
	f.handle(f.planned(touched, "l"), f.planned(untouched, "l"))
	expect(t, "problems are open again", f.said(),
		"finding.opened.v1 lodash fixable r3 high 1.0.0 → 1.0.1 (1)", "finding.opened.v1 lodash fixable r3 high 1.0.0 → 1.0.1 (1)")
	f.rematch()
	same(t, "when it is back", f.asked(), "touched bulk 2 advisories")
	f.rematch()
	same(t, "once", f.asked())
}

// TestRefreshIsSpread: what was signed at one time is not asked for at one time,
// and never after 75 % of the validity.
func TestRefreshIsSpread(t *testing.T) {
	const validity = 100 * time.Hour
	signed := start.UnixNano()
	var early, late int
	for i := range 1000 {
		share := time.Duration(refreshAt(dig(fmt.Sprint(i)), signed, signed+int64(validity)) - signed).Hours()
		if share < 70 || share > 75 {
			t.Fatalf("at %f %%", share)
		}
		if share < 72.5 {
			early++
		} else {
			late++
		}
	}
	if early < 400 || late < 400 {
		t.Errorf("%d in the first half, %d in the second", early, late)
	}
	if refreshAt(dig("1"), signed, signed) != 0 {
		t.Error("a statement that is never valid is asked for")
	}
	if RefreshAge(validity) != 75*time.Hour {
		t.Errorf("refreshed after %s", RefreshAge(validity))
	}
}
