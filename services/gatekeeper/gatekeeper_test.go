package gatekeeper

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"path"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/alicebob/miniredis/v2"
	"github.com/cloudevents/sdk-go/v2/event"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/bus"
	"github.com/tidewaiter/tidewaiter/libs/redis"
	"github.com/tidewaiter/tidewaiter/services/attestor/statement"
	gt "github.com/tidewaiter/tidewaiter/services/gatekeeper/gatekeepertest"
)

// world is a gatekeeper with a real registry and a Redis.
type world struct {
	t     testing.TB
	reg   *gt.Registry
	mini  *miniredis.Miniredis
	cache *redis.Client
	cfg   Config
	now   time.Time
	g     *Gatekeeper
}

var start = time.Date(2026, 11, 23, 10, 0, 0, 0, time.UTC)

func newWorld(t testing.TB, change func(*Config)) *world {
	t.Helper()
	w := &world{t: t, reg: gt.NewRegistry(t), mini: miniredis.RunT(t), now: start}
	cache, err := redis.Open(redis.Config{URL: "redis://" + w.mini.Addr()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cache.Close() })
	w.cache = cache
	w.cfg = DefaultConfig()
	w.cfg.KeyFiles, w.cfg.Auth.None, w.cfg.TLS = []string{"given"}, true, TLS{Dir: "given", Names: []string{"localhost"}}
	w.cfg.Budget = 10 * time.Second // a loaded machine; what is about time sets it itself
	if change != nil {
		change(&w.cfg)
	}
	w.restart()
	return w
}

// restart replaces the gatekeeper by a new one, which remembers nothing.
func (w *world) restart() {
	w.t.Helper()
	g, err := New(w.cfg, Deps{
		Registry: w.reg.Client, Cache: w.cache, Log: slog.New(slog.DiscardHandler),
		Keys: func() []statement.Verifier { return []statement.Verifier{gt.Key(w.t, 0).Verifier()} },
		Now:  func() time.Time { return w.now },
	})
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(g.Close)
	w.g = g
}

// attest attaches a statement of our key.
func (w *world) attest(image contracts.Image, verdict string, sequence int64) gt.Statement {
	w.t.Helper()
	s := gt.Statement{Verdict: verdict, Sequence: sequence, Time: w.now}
	gt.Attached(w.t, w.reg.Client, gt.Key(w.t, 0), s, image)
	return s
}

func (w *world) image(repository string) contracts.Image {
	w.t.Helper()
	return w.reg.Push(w.t, repository, "v1")
}

// pod returns a review of the creation of a Pod with the given images.
func pod(images ...string) map[string]any {
	var containers []any
	for i, image := range images {
		containers = append(containers, map[string]any{"name": fmt.Sprintf("c%d", i), "image": image})
	}
	return reviewOf("", "Pod", "CREATE", map[string]any{"metadata": map[string]any{"name": "p"}, "spec": map[string]any{"containers": containers}}, nil)
}

func reviewOf(group, kind, operation string, object, old any) map[string]any {
	return map[string]any{
		"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview",
		"request": map[string]any{
			"uid": "uid-1", "kind": map[string]any{"group": group, "version": "v1", "kind": kind}, "namespace": "shop",
			"operation": operation, "userInfo": map[string]any{"username": "alice"}, "object": object, "oldObject": old,
		},
	}
}

// ask sends a review to the handler.
func (w *world) ask(review any) *response {
	w.t.Helper()
	body, err := json.Marshal(review)
	if err != nil {
		w.t.Fatal(err)
	}
	answer, code := w.send(body)
	if code != http.StatusOK {
		w.t.Fatalf("status %d", code)
	}
	return answer
}

func (w *world) send(body []byte) (*response, int) {
	w.t.Helper()
	r := httptest.NewRequestWithContext(context.Background(), http.MethodPost, "/validate", bytes.NewReader(body))
	r.Header.Set("Content-Type", "application/json")
	rec := httptest.NewRecorder()
	w.g.Handler().ServeHTTP(rec, r)
	if rec.Code != http.StatusOK {
		return nil, rec.Code
	}
	var out review
	if err := json.Unmarshal(rec.Body.Bytes(), &out); err != nil {
		w.t.Fatal(err)
	}
	if out.Response == nil || out.Response.UID != "uid-1" {
		w.t.Fatalf("answer %s", rec.Body)
	}
	return out.Response, rec.Code
}

// events returns the events that wait to be published.
func (w *world) events() []event.Event { return w.g.queue.take(nil) }

// decided returns the decision that waits to be published.
func (w *world) decided() contracts.AdmissionDecided {
	w.t.Helper()
	for _, ev := range w.events() {
		if ev.Type() == contracts.TypePrefix+contracts.AdmissionDecidedV1 {
			d, err := bus.Decode[contracts.AdmissionDecided](ev)
			if err != nil {
				w.t.Fatal(err)
			}
			return d
		}
	}
	w.t.Fatal("nothing was decided")
	return contracts.AdmissionDecided{}
}

// expect asks for a Pod with one image and checks the answer.
func (w *world) expect(image string, allowed bool, reason string) contracts.AdmissionImage {
	w.t.Helper()
	answer := w.ask(pod(image))
	d := w.decided()
	if answer.Allowed != allowed || len(d.Images) != 1 || d.Images[0].Reason != reason {
		w.t.Fatalf("allowed %t, %+v; want %t, %s", answer.Allowed, d.Images, allowed, reason)
	}
	if !allowed && !strings.Contains(answer.Status.Message, image) {
		w.t.Errorf("the denial does not name the image: %q", answer.Status.Message)
	}
	return d.Images[0]
}

// Each way in which a statement is not good is refused with its own reason.
func TestRefusals(t *testing.T) {
	ours, theirs := gt.Key(t, 0), gt.Key(t, 1)
	good := gt.Statement{Verdict: contracts.VerdictPass, Sequence: 100, Time: start}
	for _, test := range []struct {
		name   string
		reason string
		says   string
		attach func(w *world, image contracts.Image) []byte
	}{
		{"good", ReasonVerified, "", func(w *world, i contracts.Image) []byte { return gt.Sign(w.t, ours, i, good) }},
		{"missing", ReasonMissing, "tidewaiter submit", func(*world, contracts.Image) []byte { return nil }},
		{"foreign key", ReasonForeignKey, "another key", func(w *world, i contracts.Image) []byte { return gt.Sign(w.t, theirs, i, good) }},
		{"replayed", ReasonOtherDigest, "another image", func(w *world, _ contracts.Image) []byte {
			return gt.Sign(w.t, ours, w.image("shop/other"), good)
		}},
		{"tampered", ReasonTampered, "signature does not hold", func(w *world, i contracts.Image) []byte {
			bad := good
			bad.Verdict = contracts.VerdictFail
			return tamper(w.t, gt.Sign(w.t, ours, i, bad), `"fail"`, `"pass"`, `FAILED`, `PASSED`)
		}},
		{"garbage", ReasonMalformed, "not a statement", func(*world, contracts.Image) []byte { return []byte("{}") }},
		{"no longer valid", ReasonExpired, "no longer valid", func(w *world, i contracts.Image) []byte {
			s := good
			s.Time, s.ValidUntil = start.Add(-48*time.Hour), start.Add(-time.Minute)
			return gt.Sign(w.t, ours, i, s)
		}},
		{"too old", ReasonTooOld, "older than allowed", func(w *world, i contracts.Image) []byte {
			s := good
			s.Time = start.Add(-25 * time.Hour)
			return gt.Sign(w.t, ours, i, s)
		}},
		{"advisories too old", ReasonAdvisoriesOld, "advisories older", func(w *world, i contracts.Image) []byte {
			s := good
			s.SnapshotTime = start.Add(-25 * time.Hour)
			return gt.Sign(w.t, ours, i, s)
		}},
		{"another policy", ReasonOtherPolicy, "another policy", func(w *world, i contracts.Image) []byte {
			s := good
			s.Policy = contracts.DigestOf([]byte("lax"))
			return gt.Sign(w.t, ours, i, s)
		}},
		{"failing", ReasonVerdict, `the verdict is "fail" (1 critical`, func(w *world, i contracts.Image) []byte {
			s := good
			s.Verdict = contracts.VerdictFail
			return gt.Sign(w.t, ours, i, s)
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			w := newWorld(t, func(c *Config) {
				c.MaxAge, c.PolicyDigest = 24*time.Hour, contracts.DigestOf([]byte("policy"))
			})
			image := w.image("shop/cart")
			if bundle := test.attach(w, image); bundle != nil {
				gt.Attach(t, w.reg.Client, image, bundle)
			}
			for range 2 { // the second time from memory, where it may be
				got := w.expect(image.String(), test.reason == ReasonVerified, test.reason)
				if !strings.Contains(got.Message, test.says) {
					t.Errorf("%q does not say %q", got.Message, test.says)
				}
			}
		})
	}
}

// tamper changes the payload of a bundle and leaves the signature.
func tamper(t testing.TB, bundle []byte, changes ...string) []byte {
	t.Helper()
	var b map[string]any
	if err := json.Unmarshal(bundle, &b); err != nil {
		t.Fatal(err)
	}
	envelope := b["dsseEnvelope"].(map[string]any)
	payload, err := base64.StdEncoding.DecodeString(envelope["payload"].(string))
	if err != nil {
		t.Fatal(err)
	}
	changed := []byte(strings.NewReplacer(changes...).Replace(string(payload)))
	if bytes.Equal(changed, payload) {
		t.Fatal("nothing was changed")
	}
	envelope["payload"] = base64.StdEncoding.EncodeToString(changed)
	out, err := json.Marshal(b)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// An older statement that is put back is refused, by the replica that saw the
// newer one, by another one, and after a restart.
func TestOlderSequence(t *testing.T) {
	w := newWorld(t, nil)
	image := w.image("shop/cart")
	old := gt.Attach(t, w.reg.Client, image, gt.Sign(t, gt.Key(t, 0), image, gt.Statement{Verdict: contracts.VerdictPass, Sequence: 100, Time: start}))
	w.expect(image.String(), true, ReasonVerified)

	newer := gt.Attach(t, w.reg.Client, image, gt.Sign(t, gt.Key(t, 0), image, gt.Statement{Verdict: contracts.VerdictFail, Sequence: 200, Time: start}))
	w.now = w.now.Add(w.cfg.Recheck)
	if got := w.expect(image.String(), false, ReasonVerdict); *got.Sequence != 200 {
		t.Errorf("sequence %d", *got.Sequence)
	}

	gt.Detach(t, w.reg.Client, image, newer)
	w.now = w.now.Add(w.cfg.Recheck)
	w.expect(image.String(), false, ReasonSuperseded)
	w.restart()
	w.mini.Del(bundleKey(image.String()))
	w.expect(image.String(), false, ReasonSuperseded)

	gt.Detach(t, w.reg.Client, image, old)
	w.attest(image, contracts.VerdictPass, 200) // later, of the same advisories
	w.expect(image.String(), true, ReasonVerified)
}

// What is remembered answers without any call, is verified again, and is not
// believed for longer than configured.
func TestRemembered(t *testing.T) {
	w := newWorld(t, nil)
	image := w.image("shop/cart")
	w.attest(image, contracts.VerdictPass, 100)
	if got := w.expect(image.String(), true, ReasonVerified); got.Cached {
		t.Error("the first one was remembered")
	}
	requests, commands := w.reg.Requests.Load(), w.mini.CommandCount()
	if got := w.expect(image.String(), true, ReasonVerified); !got.Cached {
		t.Error("the second one was not remembered")
	}
	if r, c := w.reg.Requests.Load()-requests, w.mini.CommandCount()-commands; r != 0 || c != 0 {
		t.Errorf("%d requests to the registry, %d to Redis", r, c)
	}

	w.restart() // from Redis, without the registry
	if got := w.expect(image.String(), true, ReasonVerified); !got.Cached {
		t.Error("Redis was not asked")
	}
	if r := w.reg.Requests.Load() - requests; r != 0 {
		t.Errorf("%d requests to the registry", r)
	}

	// Somebody changes what Redis holds: the registry is asked.
	w.restart()
	forged, err := json.Marshal(cached{Content: []byte("{}"), Fetched: w.now})
	if err != nil {
		t.Fatal(err)
	}
	if err := w.cache.Put(t.Context(), bundleKey(image.String()), forged, time.Hour); err != nil {
		t.Fatal(err)
	}
	if got := w.expect(image.String(), true, ReasonVerified); got.Cached {
		t.Error("a forged entry answered")
	}

	// It ends to be valid while it is remembered.
	w.now = start.Add(8 * 24 * time.Hour)
	w.expect(image.String(), false, ReasonExpired)
}

// While the registry is away, what is remembered answers as long as it is
// valid; what is not remembered is refused, and that is not remembered.
func TestRegistryAway(t *testing.T) {
	w := newWorld(t, nil)
	known, unknown := w.image("shop/cart"), w.image("shop/new")
	w.attest(known, contracts.VerdictPass, 100)
	w.attest(unknown, contracts.VerdictPass, 100)
	w.expect(known.String(), true, ReasonVerified)
	away := func(*http.Request) bool { return false }
	w.reg.Gate.Store(&away)
	w.now = w.now.Add(w.cfg.Recheck)
	if got := w.expect(known.String(), true, ReasonVerified); !got.Cached {
		t.Error("it was not remembered")
	}
	w.expect(unknown.String(), false, ReasonUnavailable)
	w.reg.Gate.Store(nil)
	w.expect(unknown.String(), true, ReasonVerified)
	w.now = start.Add(8 * 24 * time.Hour)
	w.reg.Gate.Store(&away)
	w.expect(known.String(), false, ReasonUnavailable)
}

// A registry that does not answer in time costs the budget, no more; the work
// goes on and the next review finds it done.
func TestBudget(t *testing.T) {
	w := newWorld(t, func(c *Config) { c.Budget = 20 * time.Millisecond })
	image := w.image("shop/cart")
	w.attest(image, contracts.VerdictPass, 100)
	open := make(chan struct{})
	slow := func(*http.Request) bool { <-open; return true }
	w.reg.Gate.Store(&slow)
	got := w.expect(image.String(), false, ReasonUnavailable)
	if !strings.Contains(got.Message, "within 20ms") {
		t.Errorf("message %q", got.Message)
	}
	close(open)
	w.g.statements.wait()
	if got := w.expect(image.String(), true, ReasonVerified); !got.Cached {
		t.Error("the work was lost")
	}
}

// 200 reviews at once of the same few images ask the registry once an image.
func TestManyAtOnce(t *testing.T) {
	w := newWorld(t, nil)
	var images []contracts.Image
	for i := range 4 {
		images = append(images, w.image(fmt.Sprintf("shop/app%d", i)))
		if i > 0 { // the first has none
			w.attest(images[i], contracts.VerdictPass, 100)
		}
	}
	open := make(chan struct{})
	var waiting sync.Map
	gate := func(r *http.Request) bool {
		if strings.Contains(r.URL.Path, "/referrers/") {
			n, _ := waiting.LoadOrStore(path.Base(r.URL.Path), new(atomic.Int64))
			n.(*atomic.Int64).Add(1)
		}
		<-open
		return true
	}
	w.reg.Gate.Store(&gate)
	bodies := make([][]byte, len(images))
	for i, image := range images {
		body, err := json.Marshal(pod(image.String()))
		if err != nil {
			t.Fatal(err)
		}
		bodies[i] = body
	}
	var group sync.WaitGroup
	allowed := make([]bool, 200)
	for i := range allowed {
		group.Go(func() {
			answer, _ := w.send(bodies[i%len(bodies)])
			allowed[i] = answer != nil && answer.Allowed
		})
	}
	for deadline := time.Now().Add(30 * time.Second); ; {
		n := 0
		waiting.Range(func(any, any) bool { n++; return true })
		if n == len(images) {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("the registry is not asked")
		}
	}
	close(open)
	group.Wait()
	for i, ok := range allowed {
		if ok != (i%len(images) != 0) {
			t.Errorf("review %d: allowed %t", i, ok)
		}
	}
	for _, image := range images[1:] { // that there is none is not remembered
		if n, _ := waiting.Load(image.Digest); n.(*atomic.Int64).Load() != 1 {
			t.Errorf("the registry was asked %d times", n.(*atomic.Int64).Load())
		}
	}
}

// Announced statements are remembered without a review, from the database and
// from the registry, and only when they verify.
func TestAnnounced(t *testing.T) {
	for _, from := range []string{FromRegistry, FromDatabase} {
		t.Run(from, func(t *testing.T) {
			w := newWorld(t, nil)
			image := w.image("shop/cart")
			s := gt.Statement{Verdict: contracts.VerdictPass, Sequence: 100, Time: start}
			bundle := gt.Sign(t, gt.Key(t, 0), image, s)
			referrer := gt.Attach(t, w.reg.Client, image, bundle)
			if from == FromDatabase {
				w.g.Blobs = blobs{contracts.DigestOf(bundle): bundle}
			}
			ev := announce(t, image, s, contracts.StatementRef{
				PredicateType: contracts.PredicateVSA, Digest: referrer.Digest.String(), Bundle: contracts.DigestOf(bundle),
			})
			before := w.reg.Requests.Load()
			if _, err := w.g.Handle(t.Context(), ev); err != nil {
				t.Fatal(err)
			}
			if asked := w.reg.Requests.Load() > before; asked != (from == FromRegistry) {
				t.Errorf("the registry was asked: %t", asked)
			}
			w.g.Announced(ev) // it is known already
			if got := w.expect(image.String(), true, ReasonVerified); !got.Cached {
				t.Error("it was not remembered")
			}

			// Another replica learns of a newer one, this one is only told.
			w.attest(image, contracts.VerdictFail, 200)
			w.g.Announced(announce(t, image, gt.Statement{Sequence: 200, Time: w.now}))
			w.expect(image.String(), false, ReasonVerdict)
		})
	}
}

func TestAnnouncedForged(t *testing.T) {
	w := newWorld(t, nil)
	image := w.image("shop/cart")
	s := gt.Statement{Verdict: contracts.VerdictPass, Sequence: 900, Time: start}
	bundle := gt.Sign(t, gt.Key(t, 1), image, s)
	w.g.Blobs = blobs{contracts.DigestOf(bundle): bundle}
	ref := contracts.StatementRef{PredicateType: contracts.PredicateVSA, Digest: contracts.DigestOf([]byte("x")), Bundle: contracts.DigestOf(bundle)}
	if _, err := w.g.Handle(t.Context(), announce(t, image, s, ref)); err != nil {
		t.Fatal(err)
	}
	w.expect(image.String(), false, ReasonMissing)
	w.attest(image, contracts.VerdictPass, 100) // the forged sequence was not remembered
	w.now = w.now.Add(absentFor)
	w.expect(image.String(), true, ReasonVerified)

	bad := announce(t, image, s)
	if err := bad.SetData(event.ApplicationJSON, []byte(`{"image":{"registry":"x","repository":"../y","digest":"z"}}`)); err != nil {
		t.Fatal(err)
	}
	_, err := w.g.Handle(t.Context(), bad)
	if outcome, _ := bus.Classify(err); outcome != bus.OutcomePermanent {
		t.Errorf("an event without an image: %v", err)
	}
	away := func(*http.Request) bool { return false }
	w.reg.Gate.Store(&away)
	w.g.Blobs = nil
	_, err = w.g.Handle(t.Context(), announce(t, image, s))
	if outcome, _ := bus.Classify(err); outcome != bus.OutcomeLater {
		t.Errorf("the registry is away: %v", err)
	}
}

// blobs is a blob store.
type blobs map[string][]byte

func (b blobs) Blob(_ context.Context, digest string) ([]byte, error) {
	content, ok := b[digest]
	if !ok {
		return nil, errors.New("not there")
	}
	return content, nil
}

func announce(t testing.TB, image contracts.Image, s gt.Statement, refs ...contracts.StatementRef) event.Event {
	t.Helper()
	ev, err := bus.NewEvent(contracts.ImageAttestedV1, image.String(), contracts.ImageAttested{
		Image: image, Snapshot: contracts.SnapshotRef{Sequence: s.Sequence}, SignedAt: s.Time, Statements: refs,
	})
	if err != nil {
		t.Fatal(err)
	}
	return ev
}

// References that lead nowhere that is configured are decided without asking anybody.
func TestUnknownRegistry(t *testing.T) {
	for rule, allowed := range map[string]bool{RuleDeny: false, RuleWarn: true, RuleAdmit: true} {
		w := newWorld(t, func(c *Config) { c.UnknownRegistry = rule })
		digest := "@" + contracts.DigestOf([]byte("x"))
		for _, image := range []string{"nginx", "evil.example/app" + digest, "169.254.169.254/latest/meta-data" + digest, "localhost/app:v1"} {
			w.expect(image, allowed, ReasonUnknownRegistry)
		}
		answer := w.ask(pod("nginx"))
		if warned := len(answer.Warnings) > 0; warned != (rule == RuleWarn) {
			t.Errorf("%s: warnings %q", rule, answer.Warnings)
		}
		if w.reg.Requests.Load() != 0 || w.mini.CommandCount() != 0 {
			t.Error("somebody was asked")
		}
	}
}

func TestTags(t *testing.T) {
	w := newWorld(t, nil)
	image := w.image("shop/cart")
	w.attest(image, contracts.VerdictPass, 100)
	tagged := image.Repo() + ":v1"
	w.expect(tagged, false, ReasonNoDigest)
	w.expect(tagged+"@"+image.Digest, true, ReasonVerified)

	w = newWorld(t, func(c *Config) { c.RequireDigest = false })
	image = w.image("shop/cart")
	w.attest(image, contracts.VerdictPass, 100)
	if got := w.expect(image.Repo()+":v1", true, ReasonVerified); *got.Image != image {
		t.Errorf("resolved to %+v", got.Image)
	}
	w.expect(image.Repo()+":v2", false, ReasonNotFound)
	away := func(*http.Request) bool { return false }
	w.reg.Gate.Store(&away)
	w.expect(image.Repo()+":v1", false, ReasonUnavailable)
}

func TestRules(t *testing.T) {
	w := newWorld(t, func(c *Config) { c.Missing, c.Unavailable = RuleSubmit, RuleWarn })
	image := w.image("shop/cart")
	for i := range 2 {
		answer := w.ask(pod(image.String()))
		if !answer.Allowed || len(answer.Warnings) != 1 || !strings.Contains(answer.Warnings[0], "tidewaiter submit "+image.String()) {
			t.Fatalf("answer %+v", answer)
		}
		events := w.events()
		if i == 1 { // asked for already
			if len(events) != 1 {
				t.Errorf("%d events", len(events))
			}
			break
		}
		if len(events) != 2 {
			t.Fatalf("%d events", len(events))
		}
		p, err := bus.Decode[contracts.ImagePushed](events[1])
		if err != nil {
			t.Fatal(err)
		}
		want := contracts.ImagePushed{
			Source: "gatekeeper", Registry: image.Registry, Repository: image.Repository, Digest: image.Digest, Cause: "admission", ReceivedAt: start,
		}
		if p != want || events[1].Extensions()[contracts.ExtKey] != image.Repo() {
			t.Errorf("got %+v, want %+v", p, want)
		}
	}
	away := func(*http.Request) bool { return false }
	w.reg.Gate.Store(&away)
	if answer := w.ask(pod(image.String())); !answer.Allowed || len(answer.Warnings) != 1 {
		t.Errorf("answer %+v", answer)
	}
	w.events()
	w.reg.Gate.Store(nil)

	// A dry run has no effects; an image that fails is refused whatever the rules.
	w.restart()
	dry := pod(image.String())
	dry["request"].(map[string]any)["dryRun"] = true
	if answer := w.ask(dry); !answer.Allowed || len(w.events()) != 0 {
		t.Errorf("dry run: %+v", answer)
	}
	w.attest(image, contracts.VerdictFail, 100)
	w.now = w.now.Add(absentFor)
	w.expect(image.String(), false, ReasonVerdict)
}

// TestUnknownImageIsSubmitted: whatever the rule, a scan is asked for, once.
func TestUnknownImageIsSubmitted(t *testing.T) {
	for rule, allowed := range map[string]bool{RuleDeny: false, RuleWarn: true, RuleSubmit: true} {
		t.Run(rule, func(t *testing.T) {
			w := newWorld(t, func(c *Config) { c.Missing = rule })
			image := w.image("shop/cart")
			pushes := 0
			for range 3 {
				if answer := w.ask(pod(image.String())); answer.Allowed != allowed {
					t.Fatalf("answer %+v", answer)
				}
				for _, ev := range w.events() {
					if ev.Type() == contracts.TypePrefix+contracts.ImagePushedV1 {
						pushes++
					}
				}
			}
			if pushes != 1 {
				t.Errorf("%d pushes", pushes)
			}
		})
	}
}

// TestMissingIsRemembered: who is denied tries again; the registry is asked again
// after a moment, or when a statement is announced.
func TestMissingIsRemembered(t *testing.T) {
	w := newWorld(t, nil)
	image := w.image("shop/cart")
	var asked atomic.Int32
	count := func(*http.Request) bool { asked.Add(1); return true }
	w.reg.Gate.Store(&count)
	if got := w.expect(image.String(), false, ReasonMissing); got.Cached || asked.Load() == 0 {
		t.Errorf("the first time: %+v, %d requests", got, asked.Load())
	}
	asked.Store(0)
	for range 3 {
		if got := w.expect(image.String(), false, ReasonMissing); !got.Cached || asked.Load() != 0 {
			t.Errorf("again: %+v, %d requests", got, asked.Load())
		}
	}
	w.now = w.now.Add(absentFor)
	if got := w.expect(image.String(), false, ReasonMissing); got.Cached || asked.Load() == 0 {
		t.Errorf("later: %+v, %d requests", got, asked.Load())
	}
	s := w.attest(image, contracts.VerdictPass, 100)
	w.g.Announced(announce(t, image, s))
	w.expect(image.String(), true, ReasonVerified)
}

func TestModes(t *testing.T) {
	for _, test := range []struct {
		mode              string
		allowed, warnings bool
		decision          string
	}{
		{ModeEnforce, false, false, contracts.DecisionDeny},
		{ModeWarn, true, true, contracts.DecisionWarn},
		{ModeAudit, true, false, contracts.DecisionAdmit},
	} {
		w := newWorld(t, func(c *Config) { c.Mode, c.Exempt = test.mode, []string{"kube-system"} })
		good, bad := w.image("shop/good"), w.image("shop/bad")
		w.attest(good, contracts.VerdictWarn, 100)
		answer := w.ask(pod(good.String(), bad.String(), "not/a:ref:erence"))
		if answer.Allowed != test.allowed || (len(answer.Warnings) == 2) != test.warnings || answer.AuditAnnotations["decision"] != contracts.DecisionDeny {
			t.Errorf("%s: %+v", test.mode, answer)
		}
		if !answer.Allowed {
			lines := strings.Split(answer.Status.Message, "\n")
			if len(lines) != 2 || !strings.Contains(lines[0], bad.String()+" (container c1): ") || !strings.Contains(lines[1], "(container c2)") {
				t.Errorf("message %q", answer.Status.Message)
			}
		}
		d := w.decided()
		if d.Decision != test.decision || d.Mode != test.mode || d.ImageCount != 3 || d.User != "alice" || d.Namespace != "shop" || d.Name != "p" {
			t.Errorf("decided %+v", d)
		}
		if !slices.Equal(d.Images[1].Places, []string{"container c1"}) || d.Images[1].Decision != contracts.DecisionDeny {
			t.Errorf("decided %+v", d.Images[1])
		}
		exempt := pod(bad.String())
		exempt["request"].(map[string]any)["namespace"] = "kube-system"
		if answer := w.ask(exempt); !answer.Allowed || len(answer.Warnings) != 0 {
			t.Errorf("exempt: %+v", answer)
		}
		if d := w.decided(); !d.Exempt || d.ImageCount != 1 {
			t.Errorf("exempt: %+v", d)
		}
	}
}

// However many images a workload names, the answer stays readable.
func TestManyImages(t *testing.T) {
	w := newWorld(t, nil)
	var images []string
	for i := range 500 {
		images = append(images, fmt.Sprintf("nowhere.example/app%d:v1", i))
	}
	answer := w.ask(pod(images...))
	if n := strings.Count(answer.Status.Message, "\n"); answer.Allowed || n != maxListed || !strings.HasSuffix(answer.Status.Message, "and 450 more") {
		t.Errorf("%d lines", n)
	}
	if d := w.decided(); d.ImageCount != 500 || len(d.Images) != maxListed {
		t.Errorf("%d images, %d listed", d.ImageCount, len(d.Images))
	}
}

func TestAcceptPass(t *testing.T) {
	w := newWorld(t, func(c *Config) { c.Accept = contracts.VerdictPass })
	image := w.image("shop/cart")
	w.attest(image, contracts.VerdictWarn, 100)
	w.expect(image.String(), false, ReasonVerdict)
}

// Without Redis everything works, only slower.
func TestWithoutRedis(t *testing.T) {
	w := newWorld(t, nil)
	image := w.image("shop/cart")
	w.attest(image, contracts.VerdictPass, 100)
	w.mini.Close()
	w.expect(image.String(), true, ReasonVerified)
	if got := w.expect(image.String(), true, ReasonVerified); !got.Cached {
		t.Error("it was not remembered")
	}
}

func TestRefusedCalls(t *testing.T) {
	w := newWorld(t, func(c *Config) { c.MaxBody = 2000 })
	null := pod()
	null["request"].(map[string]any)["object"] = nil
	nullBody, err := json.Marshal(null)
	if err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct {
		body string
		code int
	}{
		"no JSON":        {"hello", http.StatusBadRequest},
		"another kind":   {`{"apiVersion":"v1","kind":"Pod"}`, http.StatusBadRequest},
		"no request":     {`{"apiVersion":"admission.k8s.io/v1","kind":"AdmissionReview"}`, http.StatusBadRequest},
		"without object": {string(nullBody), http.StatusBadRequest},
		"too large":      {strings.Repeat("x", 2001), http.StatusRequestEntityTooLarge},
	} {
		if _, code := w.send([]byte(test.body)); code != test.code {
			t.Errorf("%s: status %d", name, code)
		}
	}
	w.g.Caller = func(*http.Request) bool { return false }
	if _, code := w.send([]byte(`{}`)); code != http.StatusUnauthorized {
		t.Errorf("unknown caller: status %d", code)
	}
}
