package intake

import (
	"bytes"
	"context"
	"errors"
	"net/http"
	"net/url"
	"strings"
	"testing"

	"github.com/tidewaiter/tidewaiter/services/intake/hook"
)

// TestEventGridHandshakes: the URL is proven only to whoever has its secret,
// with 200 and the code, and nothing is stored of it.
func TestEventGridHandshakes(t *testing.T) {
	src := Source{
		Kind: "azure-eventgrid", AnyRegistry: true, Origins: []string{"eventgrid.azure.net"},
		Auth: Auth{Query: &QueryAuth{Name: "token", ValueFile: file(t, "secret")}},
	}
	s, m := start(t, src)
	var remembered []delivery
	s.record = func(d delivery) { remembered = append(remembered, d) }
	body := []byte(`[{"id":"1","eventType":"Microsoft.EventGrid.SubscriptionValidationEvent","eventTime":"2026-01-02T03:04:05Z",
		"data":{"validationCode":"code-1","validationUrl":"https://validate.invalid/"}}]`)
	for query, want := range map[string]int{"": 401, "?token=wrong": 401, "?token=secret": 200} {
		w := call(s, http.MethodPost, "/hooks/s"+query, http.Header{"Aeg-Event-Type": {"SubscriptionValidation"}}, body)
		wantBody := ""
		if want == http.StatusOK {
			wantBody = `{"validationResponse":"code-1"}`
			if got := w.Header().Get("Content-Type"); got != "application/json" {
				t.Errorf("content type %q", got)
			}
		}
		if w.Code != want || w.Body.String() != wantBody {
			t.Errorf("%q: got %d %q, want %d %q", query, w.Code, w.Body, want, wantBody)
		}
	}
	if len(m.events)+len(m.letters) != 0 || len(remembered) != 1 || remembered[0].reason != reasonHandshake {
		t.Errorf("%d events, %d letters, remembered %+v", len(m.events), len(m.letters), remembered)
	}
	for name, c := range map[string]struct {
		origin, query string
		want          int
	}{
		"an allowed origin":               {"eventgrid.azure.net", "", 200},
		"another one":                     {"elsewhere.example", "", 401},
		"another one, with the secret":    {"elsewhere.example", "?token=secret", 200},
		"no origin, with the secret":      {"", "?token=secret", 204},
		"an allowed origin, with a wrong": {"eventgrid.azure.net", "?token=x", 200},
	} {
		h := http.Header{}
		if c.origin != "" {
			h.Set("WebHook-Request-Origin", c.origin)
		}
		w := call(s, http.MethodOptions, "/hooks/s"+c.query, h, nil)
		if w.Code != c.want || (w.Code == http.StatusOK) != (w.Header().Get("WebHook-Allowed-Origin") == c.origin && c.origin != "") {
			t.Errorf("%s: got %d, %v, want %d", name, w.Code, w.Header(), c.want)
		}
	}
}

// TestUnconfirmedSubscription: without auth.sns nobody confirms it but a person,
// who must be told and finds the URL in the dead letters.
func TestUnconfirmedSubscription(t *testing.T) {
	src := Source{Kind: "ecr", AnyRegistry: true, Auth: Auth{Query: &QueryAuth{Name: "token", ValueFile: file(t, "secret")}}}
	s, m := start(t, src)
	var got delivery
	s.record = func(d delivery) { got = d }
	body := []byte(`{"Type":"SubscriptionConfirmation","TopicArn":"arn:aws:sns:eu-central-1:210987654321:t","SubscribeURL":"https://sns.eu-central-1.amazonaws.com/?Token=1"}`)
	post := func(typ string) int {
		return call(s, http.MethodPost, "/hooks/s?token=secret", http.Header{"X-Amz-Sns-Message-Type": {typ}}, body).Code
	}
	if status := post("SubscriptionConfirmation"); status != http.StatusOK {
		t.Errorf("got %d, want 200", status)
	}
	if len(m.letters) != 1 || !bytes.Equal(m.letters[0].body, body) || !strings.Contains(m.letters[0].reason, "open the SubscribeURL in this body by hand") {
		t.Errorf("letters %+v", m.letters)
	}
	if !reasonOf(got.reason).Failure || !strings.Contains(got.trouble, "auth.sns") || got.dead != 1 {
		t.Errorf("the log says %+v", got)
	}
	m.fail = func(context.Context) error { return errors.New("no broker") }
	if status := post("SubscriptionConfirmation"); status != http.StatusServiceUnavailable {
		t.Errorf("without Kafka: got %d, want 503", status)
	}
	if status := post("UnsubscribeConfirmation"); status != http.StatusOK || got.reason != reasonHandshake {
		t.Errorf("got %d, %+v", status, got)
	}
}

// TestPings: a kind's test call is answered with 200 and leaves nothing behind.
func TestPings(t *testing.T) {
	for kind, c := range map[string]struct{ event, body string }{
		"ghcr":       {"ping", `{"zen":"x","hook_id":1}`},
		"acr":        {"", `{"action":"ping"}`},
		"cloudsmith": {"", `{"data":{},"meta":{"event_id":"ping"}}`},
	} {
		s, m := start(t, Source{Kind: kind, AnyRegistry: true, Auth: Auth{None: true}})
		w := call(s, http.MethodPost, "/hooks/s", http.Header{"X-Github-Event": {c.event}}, []byte(c.body))
		if w.Code != http.StatusOK || len(m.events)+len(m.letters) != 0 {
			t.Errorf("%s: got %d, %d events and %d letters, want 200 and nothing", kind, w.Code, len(m.events), len(m.letters))
		}
	}
}

// TestUnnamedPushes: where nothing tells a push from a later one of the same
// tag, each is published, under an id of its own.
func TestUnnamedPushes(t *testing.T) {
	for kind, body := range map[string]string{
		"quay":        `{"repository":"shop/api","docker_url":"quay.example/shop/api","updated_tags":["latest"]}`,
		"dockerhub":   `{"push_data":{"tag":"latest"},"repository":{"repo_name":"shop/api"}}`,
		"artifactory": `{"domain":"docker","event_type":"pushed","data":{"repo_key":"local","image_name":"api","tag":"latest"},"jpd_origin":"https://a.example"}`,
	} {
		s, m := start(t, Source{Kind: kind, AnyRegistry: true, Auth: Auth{None: true}})
		for range 2 {
			if w := call(s, http.MethodPost, "/hooks/s", nil, []byte(body)); w.Code != http.StatusAccepted {
				t.Errorf("%s: got %d, want 202", kind, w.Code)
			}
		}
		if len(m.events) != 2 || m.events[0].ID() == m.events[1].ID() {
			t.Errorf("%s: two pushes gave %d events", kind, len(m.events))
		}
	}
	// A time is enough to tell them apart, and a repetition from both.
	s, m := start(t, Source{Kind: "dockerhub", AnyRegistry: true, Auth: Auth{None: true}})
	for _, at := range []string{"1700000000", "1700000000", "1700000001"} {
		call(s, http.MethodPost, "/hooks/s", nil, []byte(`{"push_data":{"tag":"latest","pushed_at":`+at+`},"repository":{"repo_name":"shop/api"}}`))
	}
	if len(m.events) != 2 {
		t.Errorf("two pushes, one of them told twice, gave %d events", len(m.events))
	}
}

// TestSignedForms: GitHub signs the form as it is sent, Gitea the JSON in it; a
// signature of the other one's bytes is wrong.
func TestSignedForms(t *testing.T) {
	gitHub := `{"action":"published","package":{"name":"api","namespace":"shop","ecosystem":"CONTAINER","package_version":{"version":"` + testDigest + `"}}}`
	gitea := `{"action":"created","package":{"owner":{"login":"shop"},"type":"container","name":"api","version":"1","html_url":"https://g.example/x"}}`
	for kind, payload := range map[string]string{"ghcr": gitHub, "gitea": gitea} {
		form := url.Values{"payload": {payload}}.Encode()
		s, m := start(t, Source{Kind: kind, AnyRegistry: true, Auth: Auth{HMAC: &HMACAuth{SecretFile: file(t, "key")}}})
		name, prefix := "X-Hub-Signature-256", "sha256="
		if kind == "gitea" {
			name, prefix = "X-Gitea-Signature", ""
		}
		for _, over := range []string{form, payload} {
			want := http.StatusUnauthorized
			if (over == form) == (kind == "ghcr") {
				want = http.StatusAccepted
			}
			h := http.Header{"Content-Type": {"application/x-www-form-urlencoded"}}
			h.Set(name, prefix+mac("sha256", "key", []byte(over)))
			if w := call(s, http.MethodPost, "/hooks/s", h, []byte(form)); w.Code != want {
				t.Errorf("%s, signature over the form: %v: got %d, want %d", kind, over == form, w.Code, want)
			}
		}
		if len(m.events) != 1 {
			t.Errorf("%s: %d events, want 1", kind, len(m.events))
		}
	}
}

// TestOwnSignatures: of a kind that signs the secret is all that is configured,
// and a secret in the place of a signature is refused.
func TestOwnSignatures(t *testing.T) {
	for _, k := range hook.Kinds() {
		if len(k.Signatures) == 0 {
			continue
		}
		src := Source{Kind: k.Name, Registry: "r.example", Auth: Auth{HMAC: &HMACAuth{SecretFile: file(t, "key")}}}
		body := []byte(`{}`)
		sig := k.Signatures[0]
		right := sig.Prefix + mac(sig.Algorithm, "key", body)
		for value, want := range map[string]int{
			right:                             202,
			strings.ToUpper(right):            401, // but for the digits alone
			right + "0":                       401,
			mac(sig.Algorithm, "other", body): 401,
			"key":                             401,
			"":                                401,
		} {
			if value == strings.ToUpper(right) && sig.Prefix == "" {
				want = 202
			}
			s, _ := start(t, src)
			h := http.Header{}
			h.Set(sig.Header, value)
			if w := call(s, http.MethodPost, "/hooks/s", h, body); w.Code != want {
				t.Errorf("%s, %q: got %d, want %d", k.Name, value, w.Code, want)
			}
		}
		s, _ := start(t, src)
		h := http.Header{}
		h.Set(sig.Header, strings.TrimPrefix(right, sig.Prefix))
		want := http.StatusUnauthorized
		if sig.Bare || sig.Prefix == "" {
			want = http.StatusAccepted
		}
		if w := call(s, http.MethodPost, "/hooks/s", h, body); w.Code != want {
			t.Errorf("%s, without the prefix: got %d, want %d", k.Name, w.Code, want)
		}
	}
}

// TestDecodeOnceSecrets: `webhook decode` knows the secret as Artifactory sends
// it, signed or as it stands, and any header where the operator chooses it.
func TestDecodeOnceSecrets(t *testing.T) {
	body := []byte(`{"action":"push","target":{"repository":"a","tag":"1"}}`)
	for name, c := range map[string]struct {
		kind  string
		name  string
		value string
		want  int
	}{
		"artifactory, signed":     {"artifactory", "X-JFrog-Event-Auth", mac("sha256", "key", body), 202},
		"artifactory, as it is":   {"artifactory", "X-JFrog-Event-Auth", "key", 202},
		"artifactory, other":      {"artifactory", "X-JFrog-Event-Auth", "other", 401},
		"artifactory, elsewhere":  {"artifactory", "Authorization", "key", 401},
		"acr, its own header":     {"acr", "X-Agreed", "key", 202},
		"acr, another value":      {"acr", "X-Agreed", "key2", 401},
		"ghcr, not signed":        {"ghcr", "X-Hub-Signature-256", "key", 401},
		"ghcr, elsewhere":         {"ghcr", "Authorization", "Bearer key", 401},
		"ghcr, signed":            {"ghcr", "X-Hub-Signature-256", "sha256=" + mac("sha256", "key", body), 202},
		"gitea, GitHub's header":  {"gitea", "X-Hub-Signature-256", "sha256=" + mac("sha256", "key", body), 202},
		"gitea, Forgejo's header": {"gitea", "X-Forgejo-Signature", mac("sha256", "key", body), 202},
	} {
		h := http.Header{}
		h.Set(c.name, c.value)
		got, err := DecodeOnce(c.kind, "key", "", h, body)
		if err != nil || got.Status != c.want || c.want == 401 && len(got.Events) != 0 {
			t.Errorf("%s: got %+v, %v, want %d", name, got, err, c.want)
		}
	}
}

// TestPathMapping: a source that stands for one repository of Artifactory takes
// no other for it.
func TestPathMapping(t *testing.T) {
	body := func(key string) []byte {
		return []byte(`{"domain":"docker","event_type":"pushed","data":{"repo_key":"` + key + `","path":"api/1/manifest.json","name":"manifest.json",
			"image_name":"api","tag":"1"},"jpd_origin":"https://a.example"}`)
	}
	s, m := start(t, Source{
		Kind: "artifactory", Registry: "docker.a.example", PathMapping: hook.MappingSubdomain, RepositoryKey: "docker",
		Auth: Auth{None: true},
	})
	for _, key := range []string{"docker", "docker-prod"} {
		if w := call(s, http.MethodPost, "/hooks/s", nil, body(key)); w.Code != http.StatusAccepted {
			t.Errorf("%s: got %d, want 202", key, w.Code)
		}
	}
	pushes := m.pushes(t)
	if len(pushes) != 1 || pushes[0].Registry != "docker.a.example" || pushes[0].Repository != "api" || len(m.letters) != 0 {
		t.Errorf("got %+v and %d letters, want one push of docker.a.example/api", pushes, len(m.letters))
	}
}
