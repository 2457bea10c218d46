package intake

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha1"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cloudevents/sdk-go/v2/event"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"go.uber.org/goleak"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/bus"
	"github.com/tidewaiter/tidewaiter/services/intake/hook"
	"github.com/tidewaiter/tidewaiter/services/intake/scope"
)

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m,
		// Pub/Sub's client links OpenCensus, which starts a worker when it is loaded,
		// and leaves one goroutine behind of each stream (as of v2.9.0).
		goleak.IgnoreTopFunction("go.opencensus.io/stats/view.(*worker).start"),
		goleak.IgnoreTopFunction("cloud.google.com/go/pubsub/v2.(*messageIterator).streamKeepAliveHandler"),
	)
}

const (
	testDigest = "sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"
	testSigTag = "sha256-aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa.sig"
)

// letter is a dead letter.
type letter struct {
	topic, reason string
	body          []byte
	headers       map[string]string
}

// memory is a Publisher that keeps what it is given, or fails as fail says.
type memory struct {
	mu      sync.Mutex
	fail    func(context.Context) error
	events  []event.Event
	letters []letter
}

func (m *memory) Publish(ctx context.Context, events ...event.Event) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.fail != nil {
		if err := m.fail(ctx); err != nil {
			return err
		}
	}
	for _, ev := range events {
		if err := ev.Validate(); err != nil {
			return err
		}
	}
	m.events = append(m.events, events...)
	return nil
}

func (m *memory) PublishDeadLetter(ctx context.Context, topic, reason string, body []byte, headers map[string]string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.fail != nil {
		if err := m.fail(ctx); err != nil {
			return err
		}
	}
	m.letters = append(m.letters, letter{topic, reason, body, headers})
	return nil
}

// pushes returns the data of the image.pushed events.
func (m *memory) pushes(t testing.TB) []contracts.ImagePushed {
	t.Helper()
	var out []contracts.ImagePushed
	for _, ev := range m.events {
		if ev.Type() != contracts.TypePrefix+contracts.ImagePushedV1 {
			continue
		}
		p, err := bus.Decode[contracts.ImagePushed](ev)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, p)
	}
	return out
}

func (m *memory) deletes(t testing.TB) []contracts.ImageDeleted {
	t.Helper()
	var out []contracts.ImageDeleted
	for _, ev := range m.events {
		if ev.Type() != contracts.TypePrefix+contracts.ImageDeletedV1 {
			continue
		}
		d, err := bus.Decode[contracts.ImageDeleted](ev)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, d)
	}
	return out
}

// file writes a secret's file and returns its name.
func file(t testing.TB, content string) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(name, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return name
}

// start returns a service with one source "s" and what it publishes to.
func start(t testing.TB, src Source) (*Intake, *memory) {
	t.Helper()
	return startWith(t, DefaultConfig(), Sources{"s": src})
}

func startWith(t testing.TB, cfg Config, sources Sources) (*Intake, *memory) {
	t.Helper()
	m := &memory{}
	s, err := New(cfg, sources, m, slog.New(slog.DiscardHandler), prometheus.NewRegistry())
	if err != nil {
		t.Fatal(err)
	}
	return s, m
}

func openSource() Source {
	return Source{Kind: "distribution", Registry: "r.example:5000", Auth: Auth{None: true}}
}

// call makes one request and returns the answer.
func call(s *Intake, method, path string, header http.Header, body []byte) *httptest.ResponseRecorder {
	r := httptest.NewRequest(method, path, bytes.NewReader(body))
	if header != nil {
		r.Header = header
	}
	w := httptest.NewRecorder()
	s.Handler().ServeHTTP(w, r)
	return w
}

// push is the body of a push of a manifest.
func push(id, repository, tag string) []byte {
	return fmt.Appendf(nil, `{"events":[{"id":%q,"timestamp":"2026-01-02T03:04:05Z","action":"push","target":{
		"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":%q,"repository":%q,"tag":%q},
		"request":{"host":"elsewhere.example"},"actor":{"name":"ci"}}]}`, id, testDigest, repository, tag)
}

func mac(algorithm, secret string, body []byte) string {
	h := hmac.New(sha256.New, []byte(secret))
	if algorithm == "sha1" {
		h = hmac.New(sha1.New, []byte(secret))
	}
	h.Write(body)
	return hex.EncodeToString(h.Sum(nil))
}

func TestAuthentication(t *testing.T) {
	body := push("1", "a/b", "1")
	basic := func(user, password string) []string {
		return []string{"Basic " + base64.StdEncoding.EncodeToString([]byte(user+":"+password))}
	}
	for name, c := range map[string]struct {
		auth  Auth
		right []http.Header
		wrong []http.Header
	}{
		"bearer": {
			Auth{Bearer: &BearerAuth{TokenFile: file(t, "old-token\nnew-token\n")}},
			[]http.Header{
				{"Authorization": {"Bearer old-token"}},
				{"Authorization": {"Bearer new-token"}},
				{"Authorization": {"bearer new-token"}},
			},
			[]http.Header{
				{},
				{"Authorization": {""}},
				{"Authorization": {"Bearer "}},
				{"Authorization": {"Bearer wrong"}},
				{"Authorization": {"Bearer old-token2"}},
				{"Authorization": {"old-token"}},
				{"Authorization": basic("", "old-token")},
				{"Authorization": {"Bearer old-token\nnew-token"}},
				{"Authorization": {"Bearer wrong", "Bearer old-token"}},
				{"X-Authorization": {"Bearer old-token"}},
			},
		},
		"basic": {
			Auth{Basic: &BasicAuth{Username: "zot", PasswordFile: file(t, "pass:word")}},
			[]http.Header{{"Authorization": basic("zot", "pass:word")}},
			[]http.Header{
				{},
				{"Authorization": basic("zot", "password")},
				{"Authorization": basic("other", "pass:word")},
				{"Authorization": {"Basic !"}},
				{"Authorization": {"Bearer pass:word"}},
			},
		},
		"shared header": {
			Auth{Header: &HeaderAuth{Name: "x-secret", ValueFile: file(t, "value")}},
			[]http.Header{{"X-Secret": {"value"}}},
			[]http.Header{{}, {"X-Secret": {"Value"}}, {"X-Secret": {"value "}}, {"Authorization": {"value"}}},
		},
		"hmac sha256 with prefix": {
			Auth{HMAC: &HMACAuth{Header: "X-Hub-Signature-256", Prefix: "sha256=", SecretFile: file(t, "key\nnext")}},
			[]http.Header{
				{"X-Hub-Signature-256": {"sha256=" + mac("sha256", "key", body)}},
				{"X-Hub-Signature-256": {"sha256=" + mac("sha256", "next", body)}},
				{"X-Hub-Signature-256": {"sha256=" + strings.ToUpper(mac("sha256", "key", body))}},
			},
			[]http.Header{
				{},
				{"X-Hub-Signature-256": {mac("sha256", "key", body)}},
				{"X-Hub-Signature-256": {"sha256="}},
				{"X-Hub-Signature-256": {"sha256=" + mac("sha256", "other", body)}},
				{"X-Hub-Signature-256": {"sha256=" + mac("sha256", "key", append(bytes.Clone(body), ' '))}},
				{"X-Hub-Signature-256": {"sha256=" + mac("sha1", "key", body)}},
				{"X-Hub-Signature-256": {"key"}},
			},
		},
		"hmac sha1": {
			Auth{HMAC: &HMACAuth{Header: "X-Nexus-Webhook-Signature", Algorithm: "sha1", SecretFile: file(t, "key")}},
			[]http.Header{{"X-Nexus-Webhook-Signature": {mac("sha1", "key", body)}}},
			[]http.Header{{}, {"X-Nexus-Webhook-Signature": {mac("sha256", "key", body)}}},
		},
	} {
		t.Run(name, func(t *testing.T) {
			src := openSource()
			src.Auth = c.auth
			for _, h := range c.right {
				s, m := start(t, src)
				if w := call(s, http.MethodPost, "/hooks/s", h, body); w.Code != http.StatusAccepted || len(m.events) != 1 {
					t.Errorf("%v: got %d and %d events, want 202 and 1", h, w.Code, len(m.events))
				}
			}
			s, m := start(t, src)
			remembered := 0
			s.record = func(delivery) { remembered++ }
			for _, h := range c.wrong {
				if w := call(s, http.MethodPost, "/hooks/s", h, body); w.Code != http.StatusUnauthorized {
					t.Errorf("%v: got %d, want 401", h, w.Code)
				}
				// what cannot be read is not looked at before authentication either
				if w := call(s, http.MethodPost, "/hooks/s", h, []byte("{")); w.Code != http.StatusUnauthorized {
					t.Errorf("%v, bad body: got %d, want 401", h, w.Code)
				}
			}
			if len(m.events)+len(m.letters)+remembered != 0 {
				t.Errorf("a wrong secret stored %d events, %d letters, %d deliveries", len(m.events), len(m.letters), remembered)
			}
		})
	}
}

func TestZeroVerifierRefuses(t *testing.T) {
	var v verifier
	if v.verify(offer{header: http.Header{"": {""}}}) {
		t.Error("a verifier without configuration lets pass")
	}
}

func TestUnknownSource(t *testing.T) {
	s, m := start(t, openSource())
	for _, h := range []http.Header{{}, {"Authorization": {"Bearer x"}}} {
		if w := call(s, http.MethodPost, "/hooks/other", h, push("1", "a", "1")); w.Code != http.StatusNotFound || w.Body.Len() != 0 || len(w.Header()) != 1 {
			// the one header is the challenge that a known source would make too
			t.Errorf("got %d, %v, %s", w.Code, w.Header(), w.Body)
		}
	}
	if len(m.events)+len(m.letters) != 0 {
		t.Error("an unknown source stored something")
	}
	if w := call(s, http.MethodGet, "/hooks/s", nil, nil); w.Code != http.StatusMethodNotAllowed {
		t.Errorf("GET: got %d, want 405", w.Code)
	}
}

func TestSecretIsReadAgain(t *testing.T) {
	name := file(t, "one")
	s, err := newSecret(name, "", slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	s.now = func() time.Time { return now }
	replace := func(content string) {
		t.Helper()
		now = now.Add(2 * rereadEvery)
		if err := os.WriteFile(name, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chtimes(name, now, now); err != nil {
			t.Fatal(err)
		}
	}
	for _, step := range []struct {
		content string
		want    []string
	}{
		{"one\ntwo\n", []string{"one", "two"}},
		{"two", []string{"two"}},
		{"\n", []string{"two"}},                // emptied by mistake
		{"a\nb\nc\n", []string{"two"}},         // more than two
		{"three\r\n", []string{"three"}},       // repaired
		{"  four  ", []string{"four"}},         // whitespace is no part of it
		{"four\n\n\n", []string{"four"}},       // nor are empty lines
		{"4our", []string{"4our"}},             // same length as before
		{"five\nsix", []string{"five", "six"}}, // replaced as a whole
	} {
		replace(step.content)
		if got := s.current(); !reflect.DeepEqual(got, step.want) {
			t.Errorf("after %q: got %q, want %q", step.content, got, step.want)
		}
	}
	if err := os.Remove(name); err != nil {
		t.Fatal(err)
	}
	now = now.Add(2 * rereadEvery)
	if got := s.current(); len(got) != 2 {
		t.Errorf("after the file went away: got %q, want the last two", got)
	}
}

func TestSecretMustBeThere(t *testing.T) {
	log := slog.New(slog.DiscardHandler)
	t.Setenv("INTAKE_TEST_EMPTY", "")
	t.Setenv("INTAKE_TEST_TOKEN", "token")
	for name, c := range map[string]struct{ file, env string }{
		"no file":        {filepath.Join(t.TempDir(), "absent"), ""},
		"empty file":     {file(t, " \n"), ""},
		"huge file":      {file(t, strings.Repeat("x", 70<<10)), ""},
		"no variable":    {"", "INTAKE_TEST_ABSENT"},
		"empty variable": {"", "INTAKE_TEST_EMPTY"},
	} {
		if _, err := newSecret(c.file, c.env, log); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	s, err := newSecret("", "INTAKE_TEST_TOKEN", log)
	if err != nil || !reflect.DeepEqual(s.current(), []string{"token"}) {
		t.Errorf("got %v, %v", s, err)
	}
}

// TestQueryAuthentication: senders that can only be told a URL prove themselves
// by a parameter of it, which nothing of ours repeats.
func TestQueryAuthentication(t *testing.T) {
	src := openSource()
	src.Auth = Auth{Query: &QueryAuth{Name: "token", ValueFile: file(t, "hunter2\nnext+one&")}}
	var logged bytes.Buffer
	m := &memory{}
	s, err := New(DefaultConfig(), Sources{"s": src}, m, slog.New(slog.NewTextHandler(&logged, &slog.HandlerOptions{Level: slog.LevelDebug})),
		prometheus.NewRegistry())
	if err != nil {
		t.Fatal(err)
	}
	body := push("1", "a/b", "1")
	for query, want := range map[string]int{
		"": 401, "?": 401, "?token": 401, "?token=": 401, "?token=wrong": 401, "?Token=hunter2": 401, "?token=hunter2&token=hunter2": 401,
		"?token=wrong&token=hunter2": 401, "?token=hunter2%0Anext": 401, "?token=%zz": 401,
		"?token=hunter2": 202, "?a=b&token=hunter2": 202, "?token=next%2Bone%26": 202,
	} {
		if w := call(s, http.MethodPost, "/hooks/s"+query, nil, body); w.Code != want {
			t.Errorf("%q: got %d, want %d", query, w.Code, want)
		}
	}
	if w := call(s, http.MethodPost, "/hooks/s", http.Header{"Token": {"hunter2"}}, body); w.Code != http.StatusUnauthorized {
		t.Errorf("as a header: got %d, want 401", w.Code)
	}
	if !strings.Contains(logged.String(), "status=401") || strings.Contains(logged.String(), "hunter2") {
		t.Errorf("the log shows the secret, or no calls:\n%s", logged.String())
	}
}

func TestValidate(t *testing.T) {
	token := Auth{Bearer: &BearerAuth{TokenEnv: "X"}}
	ok := Source{Kind: "distribution", Registry: "r.example", Auth: token}
	if err := (Sources{"ok-1": ok}).Validate(); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		change func(*Source)
		want   string
	}{
		"unknown kind":                 {func(s *Source) { s.Kind = "x" }, `kind "x" is none of distribution, gitlab, `},
		"no registry":                  {func(s *Source) { s.Registry = "" }, "registry is missing"},
		"two registries":               {func(s *Source) { s.AnyRegistry = true }, "exclude each other"},
		"registry with path":           {func(s *Source) { s.Registry = "r.example/x" }, "is not host[:port]"},
		"bad path":                     {func(s *Source) { s.Paths = []string{"/a"} }, `path "/a"`},
		"bad lane":                     {func(s *Source) { s.Lane = "slow" }, `lane "slow"`},
		"bad quota":                    {func(s *Source) { s.Quota = -1 }, "quota -1"},
		"no auth":                      {func(s *Source) { s.Auth = Auth{} }, "0 of bearer, basic, hmac, header, query, oidc, sns and none"},
		"two auths":                    {func(s *Source) { s.Auth.None = true }, "2 of bearer, basic, hmac, header, query, oidc, sns and none"},
		"bearer without":               {func(s *Source) { s.Auth = Auth{Bearer: &BearerAuth{}} }, "auth.bearer.tokenFile or auth.bearer.tokenEnv"},
		"bearer with both":             {func(s *Source) { s.Auth = Auth{Bearer: &BearerAuth{"a", "b"}} }, "exactly one is needed"},
		"basic without user":           {func(s *Source) { s.Auth = Auth{Basic: &BasicAuth{PasswordEnv: "X"}} }, "auth.basic.username"},
		"hmac without header":          {func(s *Source) { s.Auth = Auth{HMAC: &HMACAuth{SecretEnv: "X"}} }, "auth.hmac.header"},
		"hmac half a header":           {func(s *Source) { s.Auth = Auth{HMAC: &HMACAuth{Prefix: "x=", SecretEnv: "X"}} }, "auth.hmac.header is missing"},
		"query without name":           {func(s *Source) { s.Auth = Auth{Query: &QueryAuth{ValueEnv: "X"}} }, "auth.query.name"},
		"query without value":          {func(s *Source) { s.Auth = Auth{Query: &QueryAuth{Name: "token"}} }, "auth.query.value"},
		"hmac with md5":                {func(s *Source) { s.Auth = Auth{HMAC: &HMACAuth{Header: "X", Algorithm: "md5", SecretEnv: "X"}} }, `"md5" is neither`},
		"registry that is never named": {func(s *Source) { s.Kind, s.Registry, s.AnyRegistry = "nexus", "", true }, `kind "nexus" never names its registry`},
		"mapping of a kind without":    {func(s *Source) { s.PathMapping = "port" }, `not for kind "distribution"`},
		"key of a kind without":        {func(s *Source) { s.RepositoryKey = "x" }, `not for kind "distribution"`},
		"unknown mapping":              {func(s *Source) { s.Kind, s.PathMapping = "artifactory", "x" }, `pathMapping "x" is none of repo-path, subdomain, port`},
		"port of an unnamed registry": {func(s *Source) {
			s.Kind, s.Registry, s.AnyRegistry, s.PathMapping = "artifactory", "", true, "port"
		}, "no payload names the port"},
		"subdomain without a key": {func(s *Source) { s.Kind, s.PathMapping = "artifactory", "subdomain" }, "repositoryKey is missing"},
		"header without name":     {func(s *Source) { s.Auth = Auth{Header: &HeaderAuth{ValueEnv: "X"}} }, "auth.header.name"},
		"bad glob":                {func(s *Source) { s.Tags.Include = []string{"{"} }, "tags: glob"},
		"bad platform":            {func(s *Source) { s.Platforms = []string{"linux"} }, `platform "linux"`},
		"bad rewrite":             {func(s *Source) { s.Rewrite.StripPrefix = "/x" }, "rewrite.stripPrefix"},
	} {
		s := ok
		c.change(&s)
		if err := (Sources{"s": s}).Validate(); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: got %v, want %q", name, err, c.want)
		}
	}
	for _, id := range []string{"Not/ok", "unknown", "submit", "catalog"} {
		if err := (Sources{id: ok}).Validate(); err == nil {
			t.Errorf("id %q is accepted", id)
		}
	}
	if err := DefaultConfig().Validate(); err != nil {
		t.Error(err)
	}
	if err := (Config{Admin: &BearerAuth{}}).Validate(); err == nil {
		t.Error("an empty configuration is accepted")
	}
}

// TestWarnings: what is allowed but unsafe is told, with the source's id.
func TestWarnings(t *testing.T) {
	signed, bearer := Auth{HMAC: &HMACAuth{SecretEnv: "X"}}, Auth{Bearer: &BearerAuth{TokenEnv: "X"}}
	for name, c := range map[string]struct {
		src  Source
		want string
	}{
		"signs, anybody":      {Source{Kind: "ghcr", AnyRegistry: true, Auth: Auth{None: true}}, `senders of kind "ghcr" sign: use auth.hmac`},
		"signs, bearer":       {Source{Kind: "gitea", AnyRegistry: true, Auth: bearer}, "auth.hmac is better"},
		"signs, hmac":         {Source{Kind: "ghcr", AnyRegistry: true, Auth: signed}, ""},
		"signs not, anybody":  {Source{Kind: "quay", AnyRegistry: true, Auth: Auth{None: true}}, "anybody may send to it"},
		"signs not, a secret": {Source{Kind: "quay", AnyRegistry: true, Auth: Auth{Query: &QueryAuth{Name: "t", ValueEnv: "X"}}}, ""},
		"secret as it stands": {Source{Kind: "artifactory", AnyRegistry: true, Auth: Auth{Header: &HeaderAuth{Name: "x-jfrog-event-auth", ValueEnv: "X"}}}, ""},
		"another header":      {Source{Kind: "artifactory", AnyRegistry: true, Auth: Auth{Header: &HeaderAuth{Name: "X-Other", ValueEnv: "X"}}}, "auth.hmac is better"},
		"nexus without a key": {Source{Kind: "nexus", Registry: "r.example:5000", Auth: signed}, "repositoryKey is missing"},
		"nexus with a key":    {Source{Kind: "nexus", Registry: "r.example:5000", RepositoryKey: "docker", Auth: signed}, ""},
		"nexus by path":       {Source{Kind: "nexus", Registry: "r.example", PathMapping: "repo-path", Auth: signed}, ""},
	} {
		sources := Sources{"hub-1": c.src}
		if err := sources.Validate(); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		got := sources.Warnings()
		switch {
		case c.want == "" && len(got) > 0:
			t.Errorf("%s: got %q, want none", name, got)
		case c.want != "" && (len(got) != 1 || !strings.Contains(got[0], c.want) || !strings.Contains(got[0], `source "hub-1"`)):
			t.Errorf("%s: got %q, want %q", name, got, c.want)
		}
	}
}

func TestTooLarge(t *testing.T) {
	s, m := start(t, openSource())
	body := append(push("1", "a", "1"), bytes.Repeat([]byte(" "), DefaultMaxBody)...)
	if w := call(s, http.MethodPost, "/hooks/s", nil, body); w.Code != http.StatusRequestEntityTooLarge {
		t.Errorf("got %d, want 413", w.Code)
	}
	if w := call(s, http.MethodPost, "/hooks/s", nil, body[:DefaultMaxBody]); w.Code != http.StatusAccepted {
		t.Errorf("at the limit: got %d, want 202", w.Code)
	}
	if len(m.events) != 1 || len(m.letters) != 0 {
		t.Errorf("got %d events and %d letters, want 1 and 0", len(m.events), len(m.letters))
	}
}

func TestDeadLetter(t *testing.T) {
	src := openSource()
	src.Auth = Auth{Bearer: &BearerAuth{TokenFile: file(t, "hunter2")}}
	s, m := start(t, src)
	h := http.Header{"Authorization": {"Bearer hunter2"}, "Content-Type": {"text/plain"}}
	if w := call(s, http.MethodPost, "/hooks/s", h, []byte("garbage")); w.Code != http.StatusAccepted {
		t.Errorf("got %d, want 202", w.Code)
	}
	if len(m.letters) != 1 {
		t.Fatalf("got %d dead letters, want 1", len(m.letters))
	}
	l := m.letters[0]
	if l.topic != contracts.ImagePushedV1 || string(l.body) != "garbage" || l.reason == "" ||
		l.headers["source"] != "s" || l.headers["kind"] != "distribution" || l.headers["code"] != reasonUnreadable {
		t.Errorf("got %+v", l)
	}
	if text := fmt.Sprint(l); strings.Contains(text, "hunter2") {
		t.Errorf("the dead letter holds the secret: %s", text)
	}
}

func TestNotStored(t *testing.T) {
	s, m := start(t, openSource())
	m.fail = func(context.Context) error { return errors.New("no broker") }
	var deliveries []delivery
	s.record = func(d delivery) { deliveries = append(deliveries, d) }
	for _, body := range [][]byte{push("1", "a", "1"), []byte("garbage")} {
		if w := call(s, http.MethodPost, "/hooks/s", nil, body); w.Code != http.StatusServiceUnavailable {
			t.Errorf("%.10s: got %d, want 503", body, w.Code)
		}
	}
	if len(deliveries) != 2 || deliveries[0].reason != reasonNotStored || deliveries[0].published != 0 {
		t.Errorf("got %+v", deliveries)
	}
	m.fail = nil
	// what was not stored is no duplicate when it comes again
	if w := call(s, http.MethodPost, "/hooks/s", nil, push("1", "a", "1")); w.Code != http.StatusAccepted || len(m.events) != 1 {
		t.Errorf("again: got %d and %d events, want 202 and 1", w.Code, len(m.events))
	}
}

func TestSlowKafka(t *testing.T) {
	cfg := DefaultConfig()
	cfg.AckTimeout = 5 * time.Millisecond
	s, m := startWith(t, cfg, Sources{"s": openSource()})
	m.fail = func(ctx context.Context) error { // ends when the deadline does
		<-ctx.Done()
		return ctx.Err()
	}
	if w := call(s, http.MethodPost, "/hooks/s", nil, push("1", "a", "1")); w.Code != http.StatusServiceUnavailable {
		t.Errorf("got %d, want 503", w.Code)
	}
}

func TestSenderThatGoesAway(t *testing.T) {
	s, m := start(t, openSource())
	m.fail = func(ctx context.Context) error { return ctx.Err() }
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	r := httptest.NewRequestWithContext(ctx, http.MethodPost, "/hooks/s", bytes.NewReader(push("1", "a", "1")))
	s.Handler().ServeHTTP(httptest.NewRecorder(), r)
	if len(m.events) != 1 {
		t.Errorf("got %d events: what was read must be stored though nobody waits", len(m.events))
	}
}

func TestDuplicate(t *testing.T) {
	s, m := start(t, openSource())
	var deliveries []delivery
	s.record = func(d delivery) { deliveries = append(deliveries, d) }
	for range 3 {
		if w := call(s, http.MethodPost, "/hooks/s", nil, push("1", "a", "1")); w.Code != http.StatusAccepted {
			t.Errorf("got %d, want 202", w.Code)
		}
	}
	if len(m.events) != 1 {
		t.Errorf("got %d events, want 1", len(m.events))
	}
	if len(deliveries) != 3 || deliveries[0].reason != reasonStored || deliveries[2].reason != reasonDuplicate || deliveries[2].duplicates != 1 {
		t.Errorf("got %+v", deliveries)
	}
	// the same id of another image is another event; a sender may be careless
	call(s, http.MethodPost, "/hooks/s", nil, push("1", "a", "2"))
	if len(m.events) != 2 || m.events[0].ID() == m.events[1].ID() {
		t.Errorf("got %d events", len(m.events))
	}
	// another process derives the same id
	other, om := start(t, openSource())
	call(other, http.MethodPost, "/hooks/s", nil, push("1", "a", "1"))
	if om.events[0].ID() != m.events[0].ID() {
		t.Errorf("ids %s and %s of one delivery", om.events[0].ID(), m.events[0].ID())
	}
}

func TestEventsThatShareAnID(t *testing.T) {
	s, m := start(t, openSource())
	one := `{"id":"x","action":"push","target":{"mediaType":"application/vnd.oci.image.manifest.v1+json","repository":"a","tag":"1"}}`
	body := []byte(`{"events":[` + one + `,` + one + `]}`)
	call(s, http.MethodPost, "/hooks/s", nil, body)
	call(s, http.MethodPost, "/hooks/s", nil, body)
	if len(m.events) != 2 || m.events[0].ID() == m.events[1].ID() {
		t.Errorf("got %d events, want 2 with ids of their own", len(m.events))
	}
}

func TestSeenForgetsTheOldest(t *testing.T) {
	s := newSeen(4)
	for _, id := range []string{"a", "b", "c", "d", "e"} {
		s.add(id)
	}
	if s.has("a") || s.has("b") || !s.has("c") || !s.has("d") || !s.has("e") {
		t.Errorf("got %v and %v", s.old, s.new)
	}
}

func TestEvent(t *testing.T) {
	s, m := start(t, openSource())
	now := time.Date(2026, 5, 4, 3, 2, 1, 0, time.UTC)
	s.now = func() time.Time { return now }
	call(s, http.MethodPost, "/hooks/s", nil, push("id-1", "a/b", "1.0"))
	if len(m.events) != 1 {
		t.Fatalf("got %d events", len(m.events))
	}
	ev := m.events[0]
	if ev.Type() != "dev.tidewaiter.image.pushed.v1" || ev.Source() != "/services/intake" || !ev.Time().Equal(now) {
		t.Errorf("got %s of %s at %s", ev.Type(), ev.Source(), ev.Time())
	}
	if want := "r.example:5000/a/b:1.0@" + testDigest; ev.Subject() != want {
		t.Errorf("subject %q, want %q", ev.Subject(), want)
	}
	x := ev.Extensions()
	if x[contracts.ExtKey] != "r.example:5000/a/b" || x[contracts.ExtLane] != contracts.LaneFresh {
		t.Errorf("extensions %v", x)
	}
	if tp, _ := x[contracts.ExtTraceparent].(string); !regexp.MustCompile(`^00-[0-9a-f]{32}-[0-9a-f]{16}-01$`).MatchString(tp) {
		t.Errorf("traceparent %q", tp)
	}
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	want := contracts.ImagePushed{
		Source: "s", Registry: "r.example:5000", Repository: "a/b", Tag: "1.0", Digest: testDigest,
		MediaType: "application/vnd.oci.image.manifest.v1+json", Cause: "push",
		DeliveryID: "id-1", Actor: "ci", OccurredAt: &at, ReceivedAt: now,
	}
	if got := m.pushes(t)[0]; !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, want %+v", got, want)
	}
}

func TestLanes(t *testing.T) {
	lanes := func(m *memory) (out []string) {
		for _, ev := range m.events {
			out = append(out, ev.Extensions()[contracts.ExtLane].(string))
		}
		return out
	}
	t.Run("hint", func(t *testing.T) {
		s, m := start(t, openSource())
		call(s, http.MethodPost, "/hooks/s", nil, push("1", "a", testSigTag))
		if got := lanes(m); !reflect.DeepEqual(got, []string{"bulk"}) {
			t.Errorf("got %v", got)
		}
		if p := m.pushes(t); p[0].Hint == "" {
			t.Errorf("no hint: %+v", p[0])
		}
	})
	t.Run("source", func(t *testing.T) {
		src := openSource()
		src.Lane = contracts.LaneBulk
		s, m := start(t, src)
		call(s, http.MethodPost, "/hooks/s", nil, push("1", "a", "1"))
		if got := lanes(m); !reflect.DeepEqual(got, []string{"bulk"}) {
			t.Errorf("got %v", got)
		}
	})
	t.Run("quota", func(t *testing.T) {
		src := openSource()
		src.Quota = 2
		s, m := start(t, src)
		now := time.Date(2026, 5, 4, 3, 2, 1, 0, time.UTC)
		s.now = func() time.Time { return now }
		var over int
		s.record = func(d delivery) { over += d.overQuota }
		for i := range 4 {
			if w := call(s, http.MethodPost, "/hooks/s", nil, push(fmt.Sprint(i), "a", fmt.Sprint(i))); w.Code != http.StatusAccepted {
				t.Errorf("got %d, want 202", w.Code)
			}
		}
		now = now.Add(30 * time.Second) // half a minute makes room for one
		for i := range 2 {
			call(s, http.MethodPost, "/hooks/s", nil, push(fmt.Sprint(10+i), "a", fmt.Sprint(10+i)))
		}
		want := []string{"fresh", "fresh", "bulk", "bulk", "fresh", "bulk"}
		if got := lanes(m); !reflect.DeepEqual(got, want) || over != 3 {
			t.Errorf("got %v and %d over the quota, want %v and 3", got, over, want)
		}
	})
}

// TestQuotaIsForNewPushes: what is sent again, what could not be stored and what
// was deleted cost nothing.
func TestQuotaIsForNewPushes(t *testing.T) {
	src := openSource()
	src.Quota = 2
	s, m := start(t, src)
	now := time.Date(2026, 5, 4, 3, 2, 1, 0, time.UTC)
	s.now = func() time.Time { return now }
	deletion := []byte(`{"events":[{"id":"d","action":"delete","target":{"repository":"a","tag":"1"}},
		{"id":"e","action":"delete","target":{"repository":"a","tag":"2"}},{"id":"f","action":"delete","target":{"repository":"a","tag":"3"}}]}`)
	m.fail = func(context.Context) error { return errors.New("no broker") }
	for range 5 {
		if w := call(s, http.MethodPost, "/hooks/s", nil, push("1", "a", "1")); w.Code != http.StatusServiceUnavailable {
			t.Errorf("without Kafka: got %d, want 503", w.Code)
		}
	}
	m.fail = nil
	call(s, http.MethodPost, "/hooks/s", nil, deletion)
	for range 5 {
		call(s, http.MethodPost, "/hooks/s", nil, push("1", "a", "1"))
	}
	call(s, http.MethodPost, "/hooks/s", nil, push("2", "a", "2"))
	call(s, http.MethodPost, "/hooks/s", nil, push("3", "a", "3"))
	var got []string
	for _, ev := range m.events {
		got = append(got, ev.Extensions()[contracts.ExtLane].(string))
	}
	if want := []string{"fresh", "fresh", "fresh", "fresh", "fresh", "bulk"}; !reflect.DeepEqual(got, want) {
		t.Errorf("three deletions and three pushes go as %v, want %v", got, want)
	}
}

// TestTimesWithoutJSON: a time that no event can hold does not make a sender
// come again for ever, and what makes no event at all is set aside.
func TestTimesWithoutJSON(t *testing.T) {
	s, m := start(t, openSource())
	body := bytes.Replace(push("1", "a", "1"), []byte("2026-01-02T03:04:05Z"), []byte("9999-12-31T23:59:59-01:00"), 1)
	if w := call(s, http.MethodPost, "/hooks/s", nil, body); w.Code != http.StatusAccepted {
		t.Errorf("got %d, want 202", w.Code)
	}
	if p := m.pushes(t); len(p) != 1 || p[0].OccurredAt != nil {
		t.Errorf("got %+v", p)
	}
	s.now = func() time.Time { return time.Date(10000, 1, 1, 0, 0, 0, 0, time.UTC) } // our own cannot be left out
	if w := call(s, http.MethodPost, "/hooks/s", nil, push("2", "a", "2")); w.Code != http.StatusAccepted {
		t.Errorf("no event can be made: got %d, want 202", w.Code)
	}
	if len(m.events) != 1 || len(m.letters) != 1 || !strings.Contains(m.letters[0].reason, "encode data of image.pushed.v1") {
		t.Errorf("got %d events and %+v", len(m.events), m.letters)
	}
}

// TestTokenOfGitLab is in no dead letter: whoever may read those must not act as
// the user who pushed.
func TestTokenOfGitLab(t *testing.T) {
	src := openSource()
	src.Kind = "gitlab"
	s, m := start(t, src)
	whole := `{"events":[{"id":"1","action":"push","target":{"mediaType":"application/vnd.oci.image.manifest.v1+json","repository":"a"},
		"actor":{"name":"ci","user_type":"personal_access_token","user":"eyJhbGciOi.eyJ1c2VyX2luZm8i.c2lnbmF0dXJl"}}]}`
	for _, body := range []string{whole, whole[:len(whole)-20]} { // an incomplete event, and a body that is cut off
		m.letters = nil
		if w := call(s, http.MethodPost, "/hooks/s", nil, []byte(body)); w.Code != http.StatusAccepted {
			t.Errorf("got %d, want 202", w.Code)
		}
		if len(m.letters) != 1 || !bytes.Contains(m.letters[0].body, []byte(`"name":"ci"`)) {
			t.Fatalf("got %+v", m.letters)
		}
		l := m.letters[0]
		if text := fmt.Sprintf("%s %s %v %s", l.topic, l.reason, l.headers, l.body); strings.Contains(text, "eyJ") || strings.Contains(text, "c2ln") {
			t.Errorf("the letter holds the token: %s", text)
		}
	}
}

// TestOtherRegistry: an event of a topic that tells of several registries is
// not about the one that the source is bound to.
func TestOtherRegistry(t *testing.T) {
	s, m := start(t, Source{Kind: "gar", Registry: "europe-west1-docker.pkg.dev", Auth: Auth{None: true}})
	var got delivery
	s.record = func(d delivery) { got = d }
	for host, want := range map[string]string{"europe-west1-docker.pkg.dev": reasonStored, "us-docker.pkg.dev": reasonFiltered} {
		m.events = nil
		body := []byte(`{"action":"INSERT","tag":"` + host + `/p/r/app:1"}`)
		if w := call(s, http.MethodPost, "/hooks/s", nil, body); w.Code != http.StatusAccepted || got.reason != want {
			t.Errorf("%s: got %d, %+v", host, w.Code, got)
		}
		if (len(m.events) == 1) != (want == reasonStored) || len(m.letters) != 0 {
			t.Errorf("%s: %d events, %d letters", host, len(m.events), len(m.letters))
		}
		if want == reasonFiltered && (!strings.Contains(got.trouble, "bound to registry europe-west1-docker.pkg.dev") || !strings.Contains(got.trouble, host)) {
			t.Errorf("the log says %q", got.trouble)
		}
	}
}

func TestConfigValidate(t *testing.T) {
	for name, c := range map[string]struct {
		change func(*Config)
		want   string
	}{
		"the defaults":                     {func(*Config) {}, ""},
		"as much as a dead letter":         {func(c *Config) { c.MaxBody = bus.MaxDeadLetterBytes }, ""},
		"more than a dead letter can hold": {func(c *Config) { c.MaxBody = bus.MaxDeadLetterBytes + 1 }, "maxBody 4194305 is not 1 to 4194304"},
		"no body":                          {func(c *Config) { c.MaxBody = 0 }, "maxBody 0"},
	} {
		cfg := DefaultConfig()
		c.change(&cfg)
		if err := cfg.Validate(); (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if advice := reasonOf(reasonTooLarge).Do; !strings.Contains(advice, fmt.Sprint(bus.MaxDeadLetterBytes)) {
		t.Errorf("what to do about a body that is too large does not name the limit: %s", advice)
	}
}

func TestPaths(t *testing.T) {
	src := openSource()
	src.Paths = []string{"team-a/", "shared/base"}
	s, m := start(t, src)
	for i, repository := range []string{"team-a/api", "team-a", "team-ab/api", "shared/base", "shared/base/x", "shared/basement", "other"} {
		if w := call(s, http.MethodPost, "/hooks/s", nil, push(fmt.Sprint(i), repository, "1")); w.Code != http.StatusAccepted {
			t.Errorf("%s: got %d, want 202", repository, w.Code)
		}
	}
	var got []string
	for _, p := range m.pushes(t) {
		got = append(got, p.Repository)
	}
	if want := []string{"team-a/api", "team-a", "shared/base", "shared/base/x"}; !reflect.DeepEqual(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

// TestFilters: what a source leaves out goes no further, and the log says why.
func TestFilters(t *testing.T) {
	src := openSource()
	src.Repositories = scope.Filter{Include: []string{"team/**"}, Exclude: []string{"team/scratch/*"}}
	src.Tags = scope.Filter{Exclude: []string{"dev-*"}}
	src.Rewrite = scope.Rewrite{StripPrefix: "docker-local/", AddPrefix: "team/"}
	s, m := start(t, src)
	var got delivery
	s.record = func(d delivery) { got = d }
	for i, c := range []struct{ repository, tag, want, trouble string }{
		{"docker-local/app", "v1", "team/app", ""},
		{"docker-local/app", "dev-1", "", "leaves out tag dev-1 (exclude: dev-*)"},
		{"docker-local/scratch/x", "v1", "", "leaves out repository team/scratch/x"},
		{"docker-remote/app", "v1", "", "rewrite leaves out repository docker-remote/app"},
		{"docker-local/app", testSigTag, "team/app", ""},
	} {
		m.events, got = nil, delivery{}
		if w := call(s, http.MethodPost, "/hooks/s", nil, push(fmt.Sprint(i), c.repository, c.tag)); w.Code != http.StatusAccepted {
			t.Errorf("%+v: got %d", c, w.Code)
		}
		published, reason := "", reasonFiltered
		if c.want != "" {
			reason = reasonStored
		}
		for _, p := range m.pushes(t) {
			published = p.Repository
		}
		if published != c.want || got.reason != reason || !strings.Contains(got.trouble, c.trouble) || (got.filtered == 0) != (c.want != "") {
			t.Errorf("%+v: got %q, %+v", c, published, got)
		}
	}
	// one of two events is left out: the delivery is stored, and says what it left out
	one := func(tag string) string {
		return `{"id":"x` + tag + `","action":"push","target":{"mediaType":"application/vnd.oci.image.manifest.v1+json","repository":"docker-local/app","tag":"` + tag + `"}}`
	}
	call(s, http.MethodPost, "/hooks/s", nil, []byte(`{"events":[`+one("v2")+`,`+one("dev-2")+`]}`))
	if got.reason != reasonStored || got.published != 1 || got.filtered != 1 || !strings.Contains(got.trouble, "dev-2") {
		t.Errorf("got %+v", got)
	}
	// a deletion may be of what was wanted before
	m.events = nil
	call(s, http.MethodPost, "/hooks/s", nil, []byte(`{"events":[{"id":"d","action":"delete","target":{"repository":"docker-local/app","tag":"dev-1"}}]}`))
	if d := m.deletes(t); len(d) != 1 || d[0].Repository != "team/app" || d[0].Tag != "dev-1" {
		t.Errorf("got %+v", d)
	}
}

func TestHandshake(t *testing.T) {
	src := Source{
		Kind: "cloudevents", Registry: "r.example", Origins: []string{"listed.example"},
		Auth: Auth{Bearer: &BearerAuth{TokenFile: file(t, "token")}},
	}
	s, m := start(t, src)
	for name, c := range map[string]struct {
		origin, authorization string
		want                  int
	}{
		"with the token":          {"events.example", "Bearer token", http.StatusOK},
		"without":                 {"events.example", "", http.StatusUnauthorized},
		"without, but listed":     {"listed.example", "", http.StatusOK},
		"no origin, with token":   {"", "Bearer token", http.StatusNoContent},
		"no origin, no token":     {"", "", http.StatusUnauthorized},
		"listed, as a part of it": {"listed.example.evil.example", "", http.StatusUnauthorized},
	} {
		h := http.Header{"Authorization": {c.authorization}}
		h.Set("WebHook-Request-Origin", c.origin)
		h.Set("WebHook-Request-Rate", "120")
		w := call(s, http.MethodOptions, "/hooks/s", h, nil)
		if w.Code != c.want {
			t.Errorf("%s: got %d, want %d", name, w.Code, c.want)
		}
		if granted := w.Header().Get("WebHook-Allowed-Origin"); (granted == c.origin && c.origin != "") != (c.want == http.StatusOK) {
			t.Errorf("%s: origin %q is granted", name, granted)
		}
	}
	if len(m.events)+len(m.letters) != 0 {
		t.Error("a handshake stored something")
	}
}

func TestSubmit(t *testing.T) {
	cfg := DefaultConfig()
	cfg.Admin = &BearerAuth{TokenFile: file(t, "admin")}
	s, m := startWith(t, cfg, nil)
	admin := func() http.Header { return http.Header{"Authorization": {"Bearer admin"}} }
	for body, c := range map[string]struct {
		want    int
		subject string
	}{
		`{"ref":"r.example/a/b:1"}`:                     {http.StatusAccepted, "r.example/a/b:1"},
		`{"ref":"r.example:5000/a/b"}`:                  {http.StatusAccepted, "r.example:5000/a/b:latest"},
		`{"ref":"localhost:5000/a@` + testDigest + `"}`: {http.StatusAccepted, "localhost:5000/a@" + testDigest},
		`{"ref":"r.example/a:1@` + testDigest + `"}`:    {http.StatusAccepted, "r.example/a:1@" + testDigest},
		`{"ref":"a/b:1"}`:                               {http.StatusBadRequest, ""},
		`{"ref":""}`:                                    {http.StatusBadRequest, ""},
		`{"ref":"r.example/a:1","lane":"bulk"}`:         {http.StatusBadRequest, ""},
		`x`:                                             {http.StatusBadRequest, ""},
		`{"ref":"r.example/a:` + strings.Repeat("x", 70000) + `"}`: {http.StatusRequestEntityTooLarge, ""},
	} {
		m.events = nil
		w := call(s, http.MethodPost, "/v1/submit", admin(), []byte(body))
		if w.Code != c.want {
			t.Errorf("%.60s: got %d (%s), want %d", body, w.Code, w.Body, c.want)
			continue
		}
		if c.want != http.StatusAccepted {
			if len(m.events) != 0 || w.Body.Len() == 0 {
				t.Errorf("%.60s: got %d events and body %q", body, len(m.events), w.Body)
			}
			continue
		}
		var reply Submitted
		if err := json.Unmarshal(w.Body.Bytes(), &reply); err != nil {
			t.Fatal(err)
		}
		if reply.Subject != c.subject || len(m.events) != 1 || m.events[0].ID() != reply.ID || m.events[0].Subject() != c.subject {
			t.Errorf("%s: got %+v and %v", body, reply, m.events)
		}
		if p := m.pushes(t)[0]; p.Cause != "submit" || p.Source != "submit" {
			t.Errorf("got %+v", p)
		}
	}
	for _, h := range []http.Header{{}, {"Authorization": {"Bearer other"}}} {
		if w := call(s, http.MethodPost, "/v1/submit", h, []byte(`{"ref":"r.example/a:1"}`)); w.Code != http.StatusUnauthorized {
			t.Errorf("got %d, want 401", w.Code)
		}
	}
	closed, _ := startWith(t, DefaultConfig(), nil)
	if w := call(closed, http.MethodPost, "/v1/submit", admin(), []byte(`{"ref":"r.example/a:1"}`)); w.Code != http.StatusNotFound {
		t.Errorf("without a token configured: got %d, want 404", w.Code)
	}
	m.fail = func(context.Context) error { return errors.New("no broker") }
	if w := call(s, http.MethodPost, "/v1/submit", admin(), []byte(`{"ref":"r.example/a:1"}`)); w.Code != http.StatusServiceUnavailable {
		t.Errorf("without Kafka: got %d, want 503", w.Code)
	}
}

func TestLogHoldsNoSecrets(t *testing.T) {
	var out bytes.Buffer
	cfg := DefaultConfig()
	cfg.Admin = &BearerAuth{TokenFile: file(t, "hunter2")}
	m := &memory{}
	log := slog.New(slog.NewJSONHandler(&out, &slog.HandlerOptions{Level: slog.LevelDebug}))
	s, err := New(cfg, Sources{"s": {
		Kind: "gitlab", Registry: "r.example", Auth: Auth{Header: &HeaderAuth{Name: "Authorization", ValueFile: file(t, "hunter2")}},
	}}, m, log, prometheus.NewRegistry())
	if err != nil {
		t.Fatal(err)
	}
	body := bytes.Replace(push("1", "a", "1"), []byte(`"name":"ci"`), []byte(`"name":"ci","user":"user-hunter2"`), 1)
	for _, h := range []http.Header{{"Authorization": {"hunter2"}}, {"Authorization": {"hunter2x"}}} {
		call(s, http.MethodPost, "/hooks/s", h, body)
		call(s, http.MethodPost, "/hooks/s", h, []byte(`{"hunter2`))
		call(s, http.MethodPost, "/hooks/hunter2", h, body)
		call(s, http.MethodPost, "/v1/submit", http.Header{"Authorization": {"Bearer hunter2"}}, []byte(`{"hunter2":1}`))
	}
	if strings.Contains(out.String(), "hunter2") {
		t.Errorf("a secret is in the log: %s", out.String())
	}
	if n := strings.Count(out.String(), `"msg":"webhook call"`); n != 8 {
		t.Errorf("%d calls are logged, want 8", n)
	}
	for _, ev := range m.events {
		if strings.Contains(ev.String(), "hunter2") {
			t.Errorf("a secret is in an event: %s", ev)
		}
	}
}

func TestMetrics(t *testing.T) {
	s, m := start(t, openSource())
	call(s, http.MethodPost, "/hooks/s", nil, push("1", "a", "1"))
	call(s, http.MethodPost, "/hooks/s", nil, push("1", "a", "1"))
	call(s, http.MethodPost, "/hooks/x", nil, push("1", "a", "1"))
	for labels, want := range map[[3]string]float64{
		{"s", "202", "stored"}:               1,
		{"s", "202", "duplicate"}:            1,
		{"unknown", "404", "unknown-source"}: 1,
	} {
		if got := testutil.ToFloat64(s.metrics.requests.WithLabelValues(labels[:]...)); got != want {
			t.Errorf("%v: got %v, want %v", labels, got, want)
		}
	}
	if got := testutil.ToFloat64(s.metrics.events.WithLabelValues("s", "pushed")); got != 1 {
		t.Errorf("got %v events, want 1", got)
	}
	_ = m
}

func TestDecodeOnce(t *testing.T) {
	body := push("1", "a/b", "1.0")
	bearerHeader := http.Header{"Authorization": {"Bearer token"}}
	handshake := http.Header{}
	handshake.Set("WebHook-Request-Origin", "events.example")
	for name, c := range map[string]struct {
		kind, secret string
		header       http.Header
		body         []byte
		status       int
		events       int
	}{
		"no secret asked for":  {"distribution", "", nil, body, 202, 1},
		"bearer":               {"distribution", "token", bearerHeader, body, 202, 1},
		"whole header":         {"distribution", "Bearer token", bearerHeader, body, 202, 1},
		"basic":                {"cloudevents", "pw", http.Header{"Authorization": {"Basic dTpwdw=="}}, []byte(`{}`), 202, 0},
		"wrong":                {"distribution", "other", bearerHeader, body, 401, 0},
		"missing":              {"distribution", "token", http.Header{}, body, 401, 0},
		"unreadable":           {"distribution", "", nil, []byte("x"), 202, 0},
		"too large":            {"distribution", "", nil, make([]byte, DefaultMaxBody+1), 413, 0},
		"handshake":            {"cloudevents", "", handshake, nil, 200, 0},
		"handshake, no secret": {"cloudevents", "token", handshake, nil, 401, 0},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := DecodeOnce(c.kind, c.secret, "bound.example", c.header, c.body)
			if err != nil {
				t.Fatal(err)
			}
			if got.Status != c.status || len(got.Events) != c.events || got.Events == nil {
				t.Errorf("got %+v, want status %d and %d events", got, c.status, c.events)
			}
			if c.events == 1 && *got.Events[0].Registry != "bound.example" {
				t.Errorf("registry %s", *got.Events[0].Registry)
			}
		})
	}
	if _, err := DecodeOnce("pigeon", "", "", nil, nil); !errors.Is(err, hook.ErrUnknownKind) {
		t.Errorf("got %v, want ErrUnknownKind", err)
	}
}

// sample is a file of testdata/hooks.
type sample struct {
	Note     string            `json:"note"`
	Kind     string            `json:"kind"`
	Registry string            `json:"registry"`
	Headers  map[string]string `json:"headers"`
	Status   int               `json:"status"`
	Dead     int               `json:"dead"` // dead letters
	Body     json.RawMessage   `json:"body"`
	Events   []sampleEvent     `json:"events"`
}

type sampleEvent struct {
	Action     string  `json:"action"`
	Registry   *string `json:"registry"`
	Repository *string `json:"repository"`
	Tag        *string `json:"tag"`
	Digest     *string `json:"digest"`
	Hint       bool    `json:"hint"`
}

func text(p *string) string {
	if p == nil {
		return ""
	}
	return *p
}

// fields of an event that a sample tells.
func (e sampleEvent) fields() [4]string {
	return [4]string{text(e.Registry), text(e.Repository), text(e.Tag), text(e.Digest)}
}

// checkDecode compares what a body decodes to with what a sample says.
func checkDecode(t *testing.T, kind, registry string, header http.Header, body []byte, status int, want []sampleEvent) {
	t.Helper()
	got, err := DecodeOnce(kind, "", registry, header, body)
	if err != nil {
		t.Fatal(err)
	}
	if got.Status != status || len(got.Events) != len(want) {
		t.Fatalf("got status %d and %d events, want %d and %d", got.Status, len(got.Events), status, len(want))
	}
	for i, e := range got.Events {
		fields := sampleEvent{Registry: e.Registry, Repository: e.Repository, Tag: e.Tag, Digest: e.Digest}.fields()
		if e.Action != want[i].Action || fields != want[i].fields() {
			t.Errorf("event %d: got %s %q (%s), want %s %q", i, e.Action, fields, e.Reason, want[i].Action, want[i].fields())
		}
		for _, p := range []*string{e.Registry, e.Repository, e.Tag, e.Digest} {
			if p != nil && *p == "" {
				t.Errorf("event %d: what is not said is \"\" instead of null", i)
			}
		}
	}
}

// checkPublished compares what was published with the pushes and deletes of a
// sample; pushes with a hint are not compared here.
func checkPublished(t *testing.T, m *memory, want []sampleEvent) {
	t.Helper()
	var got, expected [][4]string
	for _, p := range m.pushes(t) {
		if p.Hint == "" {
			got = append(got, [4]string{p.Registry, p.Repository, p.Tag, p.Digest})
		}
	}
	for _, d := range m.deletes(t) {
		got = append(got, [4]string{d.Registry, d.Repository, d.Tag, d.Digest})
	}
	for _, action := range []string{"push", "delete"} {
		for _, e := range want {
			if e.Action == action && e.Registry != nil {
				expected = append(expected, e.fields())
			}
		}
	}
	if !reflect.DeepEqual(got, expected) {
		t.Errorf("published %q, want %q", got, expected)
	}
}

func TestOwnSamples(t *testing.T) {
	names, err := filepath.Glob("testdata/hooks/*.json")
	if err != nil || len(names) < 10 {
		t.Fatalf("%d samples, %v", len(names), err)
	}
	for _, name := range names {
		t.Run(strings.TrimSuffix(filepath.Base(name), ".json"), func(t *testing.T) {
			content, err := os.ReadFile(name)
			if err != nil {
				t.Fatal(err)
			}
			var in sample
			decoder := json.NewDecoder(bytes.NewReader(content))
			decoder.DisallowUnknownFields()
			if err := decoder.Decode(&in); err != nil {
				t.Fatal(err)
			}
			header := http.Header{}
			for k, v := range in.Headers {
				header.Set(k, v)
			}
			checkDecode(t, in.Kind, in.Registry, header, in.Body, in.Status, in.Events)

			src := Source{Kind: in.Kind, Registry: in.Registry, AnyRegistry: in.Registry == "", Auth: Auth{None: true}}
			s, m := start(t, src)
			if w := call(s, http.MethodPost, "/hooks/s", header, in.Body); w.Code != in.Status {
				t.Errorf("got %d, want %d", w.Code, in.Status)
			}
			checkPublished(t, m, in.Events)
			hints := 0
			for _, e := range in.Events {
				if e.Hint {
					hints++
				}
			}
			published := 0
			for _, p := range m.pushes(t) {
				if p.Hint != "" {
					published++
				}
			}
			if published != hints || len(m.letters) != in.Dead {
				t.Errorf("got %d hints and %d dead letters, want %d and %d", published, len(m.letters), hints, in.Dead)
			}
		})
	}
}

// FuzzHandler: whatever comes, the answer is one that a sender may be given.
func FuzzHandler(f *testing.F) {
	f.Add("distribution", "POST", "application/json", "Bearer token", push("1", "a", "1"))
	f.Add("distribution", "POST", "", "", []byte("x"))
	f.Add("cloudevents", "OPTIONS", "", "Bearer token", []byte{})
	f.Add("cloudevents", "POST", "application/cloudevents+json", "Bearer token", []byte(`{"specversion":"1.0","type":"x.pushed","subject":"a:1"}`))
	f.Add("other", "POST", "", "Bearer token", []byte(`{}`))
	token := file(f, "token")
	auth := Auth{Bearer: &BearerAuth{TokenFile: token}}
	sources := Sources{}
	for _, k := range hook.Kinds() {
		src := Source{Kind: k.Name, AnyRegistry: k.Says.Registry, Auth: auth}
		if !k.Says.Registry {
			src.Registry = "r.example"
		}
		if k.Name == generic {
			src.Mapping = mappedSource().Mapping
		}
		sources[k.Name] = src
	}
	s, m := startWith(f, DefaultConfig(), sources)
	f.Fuzz(func(t *testing.T, id, method, contentType, authorization string, body []byte) {
		m.events, m.letters = nil, nil
		r := httptest.NewRequest(http.MethodPost, "/hooks/s", bytes.NewReader(body))
		r.Method = method
		r.URL.Path = "/hooks/" + id
		r.Header = http.Header{"Content-Type": {contentType}, "Authorization": {authorization}}
		w := httptest.NewRecorder()
		s.Handler().ServeHTTP(w, r)
		authentic := authorization != "" && strings.EqualFold(strings.SplitN(authorization, " ", 2)[0], "Bearer") &&
			strings.HasSuffix(authorization, " token")
		_, known := sources[id]
		switch w.Code {
		case http.StatusAccepted, http.StatusOK, http.StatusNoContent:
			if !authentic || !known {
				t.Fatalf("%d for %q with %q", w.Code, id, authorization)
			}
		case http.StatusUnauthorized, http.StatusNotFound, http.StatusMethodNotAllowed, http.StatusRequestEntityTooLarge,
			http.StatusMovedPermanently, http.StatusTemporaryRedirect, http.StatusPermanentRedirect:
			if len(m.events)+len(m.letters) != 0 {
				t.Fatalf("%d stored something", w.Code)
			}
			if authentic && known && method == http.MethodPost && w.Code == http.StatusUnauthorized {
				t.Fatal("401 for the right token")
			}
		default:
			t.Fatalf("got %d", w.Code)
		}
		for _, ev := range m.events {
			if err := ev.Validate(); err != nil {
				t.Fatal(err)
			}
			if strings.HasPrefix(ev.Subject(), "/") {
				t.Fatalf("subject %q", ev.Subject())
			}
		}
	})
}
