package intake

import (
	"bytes"
	"encoding/json"
	"errors"
	"maps"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/services/intake/hook"
)

// boundRegistry is the host of a sample's source if the payload names none.
const boundRegistry = "bound.example:5000"

// sharedSample is one recorded call of a registry.
type sharedSample struct {
	kind, name string
	body       []byte
	header     http.Header
	meta       sharedMeta
}

type sharedMeta struct {
	BodyFile string            `json:"body_file"`
	Headers  map[string]string `json:"headers"`
	Expected struct {
		HTTPStatus int `json:"http_status"`
	} `json:"expected"`
	Events []sampleEvent `json:"expected_events"`
	Auth   *struct {
		Scheme, Header, Value, Secret string
		Valid                         *bool
	} `json:"auth"`
	Handshake *struct {
		Method          string            `json:"method"`
		ResponseStatus  int               `json:"response_status"`
		ResponseHeaders map[string]string `json:"response_headers"`
		ResponseJSON    json.RawMessage   `json:"response_json"`
	} `json:"handshake"`
}

// sharedSamples reads all recorded calls. A directory of a kind that does not
// exist fails the test.
func sharedSamples(t *testing.T) []sharedSample {
	t.Helper()
	root := filepath.Join("..", "..", "..", "shared", "registry-events")
	index, err := os.ReadFile(filepath.Join(root, "INDEX.json"))
	if errors.Is(err, os.ErrNotExist) {
		t.Skip("the samples of registry events are not beside the repository")
	}
	if err != nil {
		t.Fatal(err)
	}
	var list struct {
		Samples []struct{ Source, Name string }
	}
	if err := json.Unmarshal(index, &list); err != nil {
		t.Fatal(err)
	}
	listed := map[string]bool{}
	for _, s := range list.Samples {
		listed[s.Source+"/"+s.Name] = true
	}
	metas, err := filepath.Glob(filepath.Join(root, "*", "*.meta.json"))
	if err != nil {
		t.Fatal(err)
	}
	if len(metas) < 100 || len(metas) != len(listed) {
		t.Fatalf("%d samples and %d in the list", len(metas), len(listed))
	}
	var out []sharedSample
	for _, path := range metas {
		s := sharedSample{kind: filepath.Base(filepath.Dir(path)), name: strings.TrimSuffix(filepath.Base(path), ".meta.json"), header: http.Header{}}
		if !listed[s.kind+"/"+s.name] {
			t.Errorf("%s/%s is not in the list", s.kind, s.name)
		}
		if _, ok := hook.Find(s.kind); !ok {
			t.Errorf("%s/%s: no kind of this name", s.kind, s.name)
			continue
		}
		content, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if err := json.Unmarshal(content, &s.meta); err != nil {
			t.Fatal(err)
		}
		if s.body, err = os.ReadFile(filepath.Join(root, s.kind, s.meta.BodyFile)); err != nil {
			t.Fatal(err)
		}
		// The samples call the case of a name ambiguous: Alibaba tells it as it was
		// typed, and registries know lower case alone.
		for i, e := range s.meta.Events {
			if s.kind == "alibaba-acr" && e.Repository != nil {
				lower := strings.ToLower(*e.Repository)
				s.meta.Events[i].Repository = &lower
			}
		}
		for k, v := range s.meta.Headers {
			s.header.Set(k, v)
		}
		out = append(out, s)
	}
	return out
}

// scheme of the sample's authentication, "" for none.
func (s sharedSample) scheme() string {
	if s.meta.Auth == nil {
		return ""
	}
	return s.meta.Auth.Scheme
}

// source returns the source that the sample is for, the query of its URL, and
// whether a call can be told from one with another secret.
func (s sharedSample) source(t *testing.T) (src Source, query string, secured bool) {
	t.Helper()
	src = Source{Kind: s.kind, AnyRegistry: true, Auth: Auth{None: true}}
	if kind, _ := hook.Find(s.kind); !kind.Says.Registry {
		src.AnyRegistry, src.Registry = false, boundRegistry
	}
	for _, e := range s.meta.Events {
		if e.Registry == nil && e.Action != "ignore" {
			src.AnyRegistry, src.Registry = false, boundRegistry
		}
	}
	switch s.scheme() {
	case "":
	case "shared-header":
		src.Auth = Auth{Header: &HeaderAuth{Name: s.meta.Auth.Header, ValueFile: file(t, s.meta.Auth.Value)}}
		secured = true
	case "hmac-sha256-prefixed", "hmac-sha256-hex", "hmac-sha1-prefixed", "hmac-sha1-hex":
		src.Auth = Auth{HMAC: &HMACAuth{SecretFile: file(t, s.meta.Auth.Secret)}} // the kind knows the rest
		secured = true
	case "url-secret", "aad-jwt-or-query-secret":
		src.Auth = Auth{Query: &QueryAuth{Name: "token", ValueFile: file(t, "of the URL")}}
		query, secured = "?token=of+the+URL", true
	default:
		// Recorded tokens and certificates have run out: verified with ones of their own in other tests.
		if !slices.Contains([]string{"oidc-jwt", "sns-x509", "oci-notifications"}, s.scheme()) {
			t.Fatalf("authentication %q is not known to this test", s.scheme())
		}
	}
	return src, query, secured
}

func (s sharedSample) method() string {
	if s.meta.Handshake != nil && s.meta.Handshake.Method != "" {
		return s.meta.Handshake.Method
	}
	return http.MethodPost
}

// TestSharedSamples sends every recorded call through the HTTP handler of a
// source that is set up for it.
func TestSharedSamples(t *testing.T) {
	done := map[string]int{}
	for _, s := range sharedSamples(t) {
		done[s.kind]++
		t.Run(s.kind+"/"+s.name, func(t *testing.T) { checkSharedSample(t, s) })
	}
	t.Logf("samples by kind: %v", done)
}

func checkSharedSample(t *testing.T, s sharedSample) {
	src, query, secured := s.source(t)
	in, m := start(t, src)
	w := call(in, s.method(), "/hooks/s"+query, s.header.Clone(), s.body)
	if w.Code != s.meta.Expected.HTTPStatus {
		t.Errorf("got %d, want %d", w.Code, s.meta.Expected.HTTPStatus)
	}
	if h := s.meta.Handshake; h != nil {
		for k, v := range h.ResponseHeaders {
			if w.Header().Get(k) != v {
				t.Errorf("%s: %q, want %q", k, w.Header().Get(k), v)
			}
		}
		if h.ResponseJSON != nil {
			checkSameJSON(t, w.Body.Bytes(), h.ResponseJSON)
		}
	} else if w.Body.Len() != 0 {
		t.Errorf("the answer says %q", w.Body)
	}
	checkPublished(t, m, bound(s.meta.Events, src.Registry))
	if s.kind == "ecr" && s.name == "sns-subscription-confirmation" {
		if len(m.letters) != 1 || !strings.Contains(m.letters[0].reason, "open the SubscribeURL") {
			t.Errorf("letters %+v, want one for whoever is to confirm the subscription", m.letters)
		}
	} else {
		checkLetters(t, m, s.meta.Events, src.Registry)
	}

	// The same call again is published again only if nothing in it can tell it from a later push.
	published, unnamed := len(m.events), 0
	events, _ := hook.Decode(s.kind, hook.Request{Header: s.header, Body: s.body, Registry: src.Registry})
	for _, e := range events {
		if ok, _ := e.Publishable(); ok && e.Unnamed && w.Code == http.StatusAccepted {
			unnamed++
		}
	}
	if w := call(in, s.method(), "/hooks/s"+query, s.header.Clone(), s.body); w.Code != s.meta.Expected.HTTPStatus || len(m.events)-published != unnamed {
		t.Errorf("again: got %d and %d events more, want %d and %d", w.Code, len(m.events)-published, s.meta.Expected.HTTPStatus, unnamed)
	}

	// A source that is bound to a registry speaks of that one alone.
	src.AnyRegistry, src.Registry = false, boundRegistry
	in, m = start(t, src)
	if w := call(in, s.method(), "/hooks/s"+query, s.header.Clone(), s.body); w.Code != s.meta.Expected.HTTPStatus {
		t.Errorf("bound to a registry: got %d, want %d", w.Code, s.meta.Expected.HTTPStatus)
	}
	checkPublished(t, m, bound(s.meta.Events, boundRegistry))

	if secured {
		checkRefused(t, s, src, query)
	}
}

// bound returns the events as a source that is bound to registry has them.
func bound(events []sampleEvent, registry string) []sampleEvent {
	if registry == "" {
		return events
	}
	out := slices.Clone(events)
	for i := range out {
		out[i].Registry = &registry
	}
	return out
}

// checkLetters: what is not readable of a recorded call is never the call. Only
// what may be no image and names no registry is set aside.
func checkLetters(t *testing.T, m *memory, events []sampleEvent, registry string) {
	t.Helper()
	nameless := slices.ContainsFunc(events, func(e sampleEvent) bool { return e.Registry == nil && e.Repository != nil })
	for _, l := range m.letters {
		if l.reason != "no registry is named" || registry != "" || !nameless {
			t.Errorf("dead letter: %s", l.reason)
		}
	}
}

// checkRefused sends a call without its proof, with another one and with
// another body; none of them may be taken.
func checkRefused(t *testing.T, s sharedSample, src Source, query string) {
	t.Helper()
	type attempt struct {
		query  string
		header http.Header
		body   []byte
	}
	wrong := map[string]attempt{}
	if query != "" {
		wrong["no secret"] = attempt{"", s.header.Clone(), s.body}
		wrong["another secret"] = attempt{query + "x", s.header.Clone(), s.body}
	} else {
		without, other := s.header.Clone(), s.header.Clone()
		without.Del(s.meta.Auth.Header)
		other.Set(s.meta.Auth.Header, s.header.Get(s.meta.Auth.Header)+"0")
		wrong["no proof"] = attempt{"", without, s.body}
		wrong["another proof"] = attempt{"", other, s.body}
	}
	if src.Auth.HMAC != nil {
		wrong["another body"] = attempt{"", s.header.Clone(), append(slices.Clone(s.body), ' ')}
		plain := s.header.Clone()
		plain.Set(s.meta.Auth.Header, s.meta.Auth.Secret)
		wrong["the secret itself"] = attempt{"", plain, s.body}
	}
	for name, c := range wrong {
		in, m := start(t, src)
		if w := call(in, s.method(), "/hooks/s"+c.query, c.header, c.body); w.Code != http.StatusUnauthorized ||
			w.Body.Len() != 0 || len(m.events)+len(m.letters) != 0 {
			t.Errorf("%s: got %d, %q, %d events and %d letters, want 401 and nothing", name, w.Code, w.Body, len(m.events), len(m.letters))
		}
	}
}

// TestSharedSamplesDecodeOnce: `webhook decode` says of every recorded call just
// what is recorded, with the secret and without, and nothing with another one.
func TestSharedSamplesDecodeOnce(t *testing.T) {
	for _, s := range sharedSamples(t) {
		t.Run(s.kind+"/"+s.name, func(t *testing.T) {
			secret := ""
			if s.meta.Auth != nil {
				secret = s.meta.Auth.Secret
				if s.scheme() == "shared-header" {
					secret = s.meta.Auth.Value
				}
			}
			forged := s.meta.Auth != nil && s.meta.Auth.Valid != nil && !*s.meta.Auth.Valid
			if !forged {
				checkDecode(t, s.kind, "", s.header, s.body, s.meta.Expected.HTTPStatus, s.meta.Events)
			}
			if secret == "" {
				return
			}
			got, err := DecodeOnce(s.kind, secret, "", s.header, s.body)
			if err != nil || got.Status != s.meta.Expected.HTTPStatus || len(got.Events) != len(s.meta.Events) {
				t.Errorf("with its secret: got %d and %d events, %v, want %d and %d", got.Status, len(got.Events), err,
					s.meta.Expected.HTTPStatus, len(s.meta.Events))
			}
			got, err = DecodeOnce(s.kind, secret+"x", "", s.header, s.body)
			if want := (contracts.WebhookDecode{Status: http.StatusUnauthorized, Events: []contracts.WebhookEvent{}}); err != nil || !reflect.DeepEqual(got, want) {
				t.Errorf("with another secret: got %+v, %v, want 401 and no events", got, err)
			}
		})
	}
}

// TestSharedSamplesAsForms: GitHub signs the form, Gitea the JSON within it.
func TestSharedSamplesAsForms(t *testing.T) {
	done := 0
	for _, s := range sharedSamples(t) {
		if s.kind != "ghcr" && s.kind != "gitea" || s.meta.Expected.HTTPStatus == http.StatusUnauthorized {
			continue
		}
		done++
		t.Run(s.kind+"/"+s.name, func(t *testing.T) {
			form := []byte(url.Values{"payload": {string(s.body)}}.Encode())
			header := s.header.Clone()
			header.Set("Content-Type", "application/x-www-form-urlencoded")
			if s.kind == "ghcr" {
				header.Set("X-Hub-Signature-256", "sha256="+mac("sha256", s.meta.Auth.Secret, form))
			}
			checkDecode(t, s.kind, "", header, form, s.meta.Expected.HTTPStatus, s.meta.Events)
			src, _, _ := s.source(t)
			in, m := start(t, src)
			if w := call(in, http.MethodPost, "/hooks/s", header, form); w.Code != s.meta.Expected.HTTPStatus {
				t.Errorf("got %d, want %d", w.Code, s.meta.Expected.HTTPStatus)
			}
			checkPublished(t, m, s.meta.Events)
			header.Set(s.meta.Auth.Header, "sha256="+mac("sha256", "other", form))
			in, m = start(t, src)
			if w := call(in, http.MethodPost, "/hooks/s", header, form); w.Code != http.StatusUnauthorized || len(m.events) != 0 {
				t.Errorf("with another secret: got %d, want 401", w.Code)
			}
		})
	}
	if _, ok := hook.Find("ghcr"); ok && done < 5 {
		t.Errorf("only %d samples were sent as forms", done)
	}
}

// TestSharedSamplesAsBatches puts all recorded events of a kind that sends
// arrays into one call; each stays what it was, in its order.
func TestSharedSamplesAsBatches(t *testing.T) {
	contentType := map[string]string{
		"cloudevents":     "application/cloudevents-batch+json",
		"azure-eventgrid": "application/json; charset=utf-8",
		"cloudsmith":      "application/json",
	}
	parts, events := map[string][]json.RawMessage{}, map[string][]sampleEvent{}
	for _, s := range sharedSamples(t) {
		if contentType[s.kind] == "" || len(s.meta.Events) == 0 {
			continue
		}
		var several []json.RawMessage
		if json.Unmarshal(s.body, &several) != nil {
			several = []json.RawMessage{s.body}
		}
		parts[s.kind] = append(parts[s.kind], several...)
		events[s.kind] = append(events[s.kind], s.meta.Events...)
	}
	for _, kind := range slices.Sorted(maps.Keys(parts)) {
		t.Run(kind, func(t *testing.T) {
			body, err := json.Marshal(parts[kind])
			if err != nil {
				t.Fatal(err)
			}
			header := http.Header{"Content-Type": {contentType[kind]}}
			checkDecode(t, kind, "", header, body, http.StatusAccepted, events[kind])
			in, m := start(t, Source{Kind: kind, Registry: boundRegistry, Auth: Auth{None: true}})
			if w := call(in, http.MethodPost, "/hooks/s", header, body); w.Code != http.StatusAccepted {
				t.Errorf("got %d, want 202", w.Code)
			}
			checkPublished(t, m, bound(events[kind], boundRegistry))
		})
	}
	if len(parts["cloudevents"]) < 2 {
		t.Error("no batch was sent")
	}
}

func checkSameJSON(t *testing.T, got, want []byte) {
	t.Helper()
	var a, b any
	if err := json.Unmarshal(got, &a); err != nil {
		t.Errorf("got %q: %v", got, err)
		return
	}
	if err := json.Unmarshal(want, &b); err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(a, b) {
		t.Errorf("got %s, want %s", bytes.TrimSpace(got), want)
	}
}
