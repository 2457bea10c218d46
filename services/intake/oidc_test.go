package intake

import (
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/prometheus/client_golang/prometheus"
)

// issuer is an OpenID Connect issuer on this machine.
type issuer struct {
	url     string
	mu      sync.Mutex
	keys    map[string]*rsa.PrivateKey // published, by id
	down    bool
	fetches int           // of the keys
	hung    chan struct{} // closed: it goes on; nil: it never hung
}

// hang lets the issuer answer nothing until release.
func (i *issuer) hang() {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.hung = make(chan struct{})
}

func (i *issuer) release() { close(i.hung) }

// wait for release, or for the caller to go.
func (i *issuer) wait(r *http.Request) {
	i.mu.Lock()
	hung := i.hung
	i.mu.Unlock()
	if hung == nil {
		return
	}
	select {
	case <-hung:
	case <-r.Context().Done():
	}
}

func newIssuer(t *testing.T) *issuer {
	t.Helper()
	i := &issuer{keys: map[string]*rsa.PrivateKey{"one": rsaKey(t)}}
	mux := http.NewServeMux()
	mux.HandleFunc("/.well-known/openid-configuration", func(w http.ResponseWriter, r *http.Request) {
		i.wait(r)
		if i.isDown() {
			w.WriteHeader(http.StatusBadGateway)
			return
		}
		fmt.Fprintf(w, `{"issuer":%q,"jwks_uri":%q}`, i.url, i.url+"/keys")
	})
	mux.HandleFunc("/keys", func(w http.ResponseWriter, _ *http.Request) { _ = json.NewEncoder(w).Encode(i.set()) })
	server := httptest.NewServer(mux)
	t.Cleanup(server.Close)
	i.url = server.URL
	return i
}

func (i *issuer) isDown() bool {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.down
}

func (i *issuer) set() jose.JSONWebKeySet {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.fetches++
	var set jose.JSONWebKeySet
	for id, k := range i.keys {
		set.Keys = append(set.Keys, jose.JSONWebKey{Key: k.Public(), KeyID: id, Algorithm: "RS256", Use: "sig"})
	}
	return set
}

func rsaKey(t *testing.T) *rsa.PrivateKey {
	t.Helper()
	k, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// token signs claims; key may be an RSA key or the bytes of an HMAC's.
func token(t *testing.T, algorithm jose.SignatureAlgorithm, id string, key any, claims map[string]any) string {
	t.Helper()
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: algorithm, Key: jose.JSONWebKey{Key: key, KeyID: id}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	b, err := json.Marshal(claims)
	if err != nil {
		t.Fatal(err)
	}
	signed, err := signer.Sign(b)
	if err != nil {
		t.Fatal(err)
	}
	text, err := signed.CompactSerialize()
	if err != nil {
		t.Fatal(err)
	}
	return text
}

const garPush = `{"message":{"data":"eyJhY3Rpb24iOiJJTlNFUlQiLCJ0YWciOiJldS5nY3IuaW8vcC9hcHA6MSJ9","messageId":"7","publishTime":"2026-01-02T03:04:05Z"}}`

// claims are those of a push of Pub/Sub, with what changes.
func (i *issuer) claims(changes map[string]any) map[string]any {
	c := map[string]any{
		"iss": i.url, "aud": "https://hooks.example/hooks/s", "email": "push@p.iam.example", "email_verified": true,
		"sub": "1234", "azp": "1234", "iat": time.Now().Unix(), "exp": time.Now().Add(time.Hour).Unix(),
	}
	maps.Copy(c, changes)
	for name, v := range c {
		if v == nil {
			delete(c, name)
		}
	}
	return c
}

// quiet is a transport that keeps no connection, so that tests leave nothing behind.
func quiet() *http.Transport { return &http.Transport{DisableKeepAlives: true} }

func startOIDC(t *testing.T, auth OIDCAuth) (*Intake, *memory) {
	t.Helper()
	m := &memory{}
	s, err := newIntake(DefaultConfig(), Sources{"s": {Kind: "gar", AnyRegistry: true, Auth: Auth{OIDC: &auth}}}, m, quiet(),
		slog.New(slog.DiscardHandler), prometheus.NewRegistry())
	if err != nil {
		t.Fatal(err)
	}
	return s, m
}

func (i *issuer) auth() OIDCAuth {
	return OIDCAuth{Issuer: i.url, Audience: "https://hooks.example/hooks/s", Email: "push@p.iam.example"}
}

func bearing(token string) http.Header { return http.Header{"Authorization": {"Bearer " + token}} }

func TestOIDC(t *testing.T) {
	i := newIssuer(t)
	key := i.keys["one"]
	good := token(t, jose.RS256, "one", key, i.claims(nil))
	public, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	part := func(v string) string { return base64.RawURLEncoding.EncodeToString([]byte(v)) }
	payload := strings.Split(good, ".")[1]
	with := func(changes map[string]any) http.Header {
		return bearing(token(t, jose.RS256, "one", key, i.claims(changes)))
	}
	hs := func(secret []byte) http.Header {
		return bearing(token(t, jose.HS256, "one", secret, i.claims(nil)))
	}
	for name, c := range map[string]struct {
		header http.Header
		want   int
		why    string
	}{
		"good":                       {bearing(good), http.StatusAccepted, ""},
		"one of several audiences":   {with(map[string]any{"aud": []string{"x", "https://hooks.example/hooks/s"}}), http.StatusAccepted, ""},
		"expired within the skew":    {with(map[string]any{"exp": time.Now().Add(-clockSkew / 2).Unix()}), http.StatusAccepted, ""},
		"without the key's id":       {bearing(token(t, jose.RS256, "", key, i.claims(nil))), http.StatusAccepted, ""},
		"missing":                    {http.Header{}, 401, "missing"},
		"empty":                      {bearing(""), 401, "no bearer token"},
		"twice":                      {http.Header{"Authorization": {"Bearer " + good, "Bearer " + good}}, 401, "more than once"},
		"another scheme":             {http.Header{"Authorization": {"Basic " + good}}, 401, "no bearer token"},
		"no token":                   {bearing("abc"), 401, "not a JWT"},
		"huge":                       {bearing(strings.Repeat("a", maxToken+1)), 401, "no bearer token"},
		"another audience":           {with(map[string]any{"aud": "https://other.example"}), 401, "another audience"},
		"no audience":                {with(map[string]any{"aud": nil}), 401, "another audience"},
		"another issuer":             {with(map[string]any{"iss": "https://accounts.google.com"}), 401, "another issuer"},
		"no issuer":                  {with(map[string]any{"iss": nil}), 401, "another issuer"},
		"expired":                    {with(map[string]any{"exp": time.Now().Add(-2 * clockSkew).Unix()}), 401, "expired"},
		"never expires":              {with(map[string]any{"exp": nil}), 401, "never expires"},
		"not yet":                    {with(map[string]any{"nbf": time.Now().Add(2 * clockSkew).Unix()}), 401, "not valid yet"},
		"another email":              {with(map[string]any{"email": "evil@p.iam.example"}), 401, "another email"},
		"no email":                   {with(map[string]any{"email": nil}), 401, "another email"},
		"email that is not verified": {with(map[string]any{"email_verified": false}), 401, "another email"},
		"email verified as a text":   {with(map[string]any{"email_verified": "true"}), 401, "another email"},
		"another key, known id":      {bearing(token(t, jose.RS256, "one", rsaKey(t), i.claims(nil))), 401, "none of the issuer's keys"},
		"another key, another id":    {bearing(token(t, jose.RS256, "two", rsaKey(t), i.claims(nil))), 401, "none of the issuer's keys"},
		"PS256":                      {bearing(token(t, jose.PS256, "one", key, i.claims(nil))), 401, "RS256"},
		"alg none":                   {bearing(part(`{"alg":"none","kid":"one"}`) + "." + payload + "."), 401, "RS256"},
		"alg none with a signature":  {bearing(part(`{"alg":"none"}`) + "." + payload + "." + strings.Split(good, ".")[2]), 401, "RS256"},
		"HMAC with the public key":   {hs(public), 401, "RS256"},
		"HMAC with it as PEM":        {hs(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: public})), 401, "RS256"},
		"another payload":            {bearing(strings.Replace(good, payload, part(`{"iss":"x"}`), 1)), 401, "none of the issuer's keys"},
		"a key of its own":           {ownKey(t, i), 401, "none of the issuer's keys"},
	} {
		t.Run(name, func(t *testing.T) {
			s, m := startOIDC(t, i.auth())
			var refused delivery
			s.refused = func(d delivery) { refused = d }
			w := call(s, http.MethodPost, "/hooks/s", c.header, []byte(garPush))
			if w.Code != c.want || (len(m.events) == 1) != (c.want == http.StatusAccepted) || !strings.Contains(refused.trouble, c.why) {
				t.Fatalf("got %d and %d events, %q, want %d, %q", w.Code, len(m.events), refused.trouble, c.want, c.why)
			}
			if c.want == 401 && w.Header().Get("WWW-Authenticate") != `Bearer realm="hooks"` {
				t.Errorf("challenge %q", w.Header().Get("WWW-Authenticate"))
			}
			if len(m.letters) != 0 {
				t.Error("a refused call was stored")
			}
		})
	}
}

// ownKey is a token that brings the key to check it with (the header "jwk").
func ownKey(t *testing.T, i *issuer) http.Header {
	t.Helper()
	key := rsaKey(t)
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.RS256, Key: key}, &jose.SignerOptions{EmbedJWK: true})
	if err != nil {
		t.Fatal(err)
	}
	b, _ := json.Marshal(i.claims(nil))
	signed, err := signer.Sign(b)
	if err != nil {
		t.Fatal(err)
	}
	text, err := signed.CompactSerialize()
	if err != nil {
		t.Fatal(err)
	}
	return bearing(text)
}

// TestOIDCClaims: Entra's tokens are told by their application.
func TestOIDCClaims(t *testing.T) {
	i := newIssuer(t)
	auth := i.auth()
	auth.Email, auth.Subject, auth.Claims = "", "1234", map[string]string{"appid": "event-grid", "tid": "tenant"}
	for name, c := range map[string]struct {
		changes map[string]any
		want    int
	}{
		"good":            {map[string]any{"appid": "event-grid", "tid": "tenant"}, http.StatusAccepted},
		"another app":     {map[string]any{"appid": "other", "tid": "tenant"}, 401},
		"no app":          {map[string]any{"tid": "tenant"}, 401},
		"app as a list":   {map[string]any{"appid": []string{"event-grid"}, "tid": "tenant"}, 401},
		"another subject": {map[string]any{"appid": "event-grid", "tid": "tenant", "sub": "4321"}, 401},
	} {
		s, _ := startOIDC(t, auth)
		if w := call(s, http.MethodPost, "/hooks/s", bearing(token(t, jose.RS256, "one", i.keys["one"], i.claims(c.changes))), []byte(garPush)); w.Code != c.want {
			t.Errorf("%s: got %d, want %d", name, w.Code, c.want)
		}
	}
}

// TestOIDCKeys: new keys are found when they are used, withdrawn ones are
// refused in time, and whoever names keys that are not there cannot make us fetch them all the time.
func TestOIDCKeys(t *testing.T) {
	i := newIssuer(t)
	s, _ := startOIDC(t, i.auth())
	now := time.Now()
	keys := (&oidcVerifier{OIDCAuth: i.auth(), keys: &keySet{
		issuer: i.url, client: fetcher(quiet()), now: func() time.Time { return now }, log: slog.New(slog.DiscardHandler),
	}})
	s.sources["s"].verifier.outside = keys.check
	post := func(id string, key crypto.Signer) int {
		t.Helper()
		claims := i.claims(map[string]any{"exp": now.Add(time.Hour).Unix()})
		return call(s, http.MethodPost, "/hooks/s", bearing(token(t, jose.RS256, id, key, claims)), []byte(garPush)).Code
	}
	expect := func(what string, got, want, fetches int) {
		t.Helper()
		i.mu.Lock()
		defer i.mu.Unlock()
		if got != want || i.fetches != fetches {
			t.Fatalf("%s: got %d after %d fetches, want %d after %d", what, got, i.fetches, want, fetches)
		}
	}
	publish := func(change func()) {
		i.mu.Lock()
		defer i.mu.Unlock()
		change()
	}
	one, two, three := i.keys["one"], rsaKey(t), rsaKey(t)

	publish(func() { i.down = true })
	expect("issuer is down", post("one", one), http.StatusServiceUnavailable, 0)
	expect("at once again", post("one", one), http.StatusServiceUnavailable, 0)
	publish(func() { i.down = false })
	now = now.Add(keysRetry)
	expect("back", post("one", one), http.StatusAccepted, 1)
	expect("cached", post("one", one), http.StatusAccepted, 1)

	publish(func() { i.keys["two"] = two })
	expect("rotated, too soon after the last fetch", post("two", two), 401, 1)
	now = now.Add(keysPause)
	expect("rotated", post("two", two), http.StatusAccepted, 2)
	for range 5 {
		expect("unknown key", post("three", three), 401, 2)
	}
	now = now.Add(keysPause)
	expect("unknown key, later", post("three", three), 401, 3)
	expect("the others go on", post("one", one), http.StatusAccepted, 3)

	publish(func() { delete(i.keys, "one") })
	now = now.Add(keysFresh + time.Second)
	expect("withdrawn", post("one", one), 401, 4)
	publish(func() { i.down = true })
	now = now.Add(keysFresh + time.Second)
	expect("down with keys at hand", post("two", two), http.StatusAccepted, 4)
	i.hang()
	now = now.Add(keysRetry)
	tried := keys.keys.tried
	for range 2 { // who starts the fetch, and who finds it started
		expect("hangs with keys at hand", post("two", two), http.StatusAccepted, 4)
		keys.keys.mu.Lock()
		if !keys.keys.tried.Equal(tried) {
			t.Error("the call waited until the fetch was given up")
		}
		keys.keys.mu.Unlock()
	}
	i.release()
	keys.keys.behind.Wait()
	now = now.Add(keysUsable)
	expect("down for too long", post("two", two), http.StatusServiceUnavailable, 4)
}

func TestOIDCDiscovery(t *testing.T) {
	weak, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	answers := map[string]string{}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.HasPrefix(answers[r.URL.Path], "http") {
			http.Redirect(w, r, answers[r.URL.Path], http.StatusFound)
			return
		}
		fmt.Fprint(w, answers[r.URL.Path])
	}))
	t.Cleanup(server.Close)
	const doc = "/.well-known/openid-configuration"
	set := func(key any, use string) string {
		b, err := json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: key, KeyID: "one", Use: use}}})
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	strong := rsaKey(t)
	right := fmt.Sprintf(`{"issuer":%q,"jwks_uri":%q}`, server.URL, server.URL+"/keys")
	for name, c := range map[string]struct {
		doc, keys, keysURL string
		want               int
	}{
		"right":                  {right, set(strong.Public(), "sig"), "", http.StatusAccepted},
		"keys without discovery": {"", set(strong.Public(), ""), server.URL + "/keys", http.StatusAccepted},
		"of another issuer":      {strings.Replace(right, server.URL, "https://x.example", 1), set(strong.Public(), "sig"), "", 503},
		"keys over plain HTTP":   {fmt.Sprintf(`{"issuer":%q,"jwks_uri":"http://192.0.2.1/keys"}`, server.URL), "", "", 503},
		"keys on a file":         {fmt.Sprintf(`{"issuer":%q,"jwks_uri":"file:///etc/passwd"}`, server.URL), "", "", 503},
		"redirected":             {server.URL + "/elsewhere", "", "", 503},
		"not JSON":               {"<html>", "", "", 503},
		"no keys":                {right, `{"keys":[]}`, "", 503},
		"weak key":               {right, set(weak.Public(), "sig"), "", 503},
		"key for encryption":     {right, set(strong.Public(), "enc"), "", 503},
		"too big":                {right, `{"keys":[` + strings.Repeat(" ", maxFetched) + `]}`, "", 503},
	} {
		t.Run(name, func(t *testing.T) {
			clear(answers)
			answers[doc], answers["/keys"] = c.doc, c.keys
			answers["/elsewhere"] = right
			s, _ := startOIDC(t, OIDCAuth{Issuer: server.URL, Audience: "a", Subject: "me", KeysURL: c.keysURL})
			signed := token(t, jose.RS256, "one", strong, map[string]any{"iss": server.URL, "aud": "a", "sub": "me", "exp": time.Now().Add(time.Hour).Unix()})
			if w := call(s, http.MethodPost, "/hooks/s", bearing(signed), []byte(garPush)); w.Code != c.want {
				t.Errorf("got %d, want %d", w.Code, c.want)
			}
		})
	}
}

func TestOIDCMistakes(t *testing.T) {
	good := OIDCAuth{Issuer: "https://accounts.google.com", Audience: "a", Email: "e"}
	for name, c := range map[string]struct {
		change func(*OIDCAuth)
		want   string
	}{
		"plain HTTP":      {func(a *OIDCAuth) { a.Issuer = "http://issuer.example" }, "not https"},
		"no URL":          {func(a *OIDCAuth) { a.Issuer = "accounts.google.com" }, "not a URL"},
		"with a password": {func(a *OIDCAuth) { a.Issuer = "https://u:p@issuer.example" }, "not a URL"},
		"keys over HTTP":  {func(a *OIDCAuth) { a.KeysURL = "http://issuer.example/keys" }, "keysURL"},
		"no audience":     {func(a *OIDCAuth) { a.Audience = "" }, "audience"},
		"anybody":         {func(a *OIDCAuth) { a.Email = "" }, "whose tokens"},
	} {
		a := good
		c.change(&a)
		err := Sources{"x": {Kind: "gar", AnyRegistry: true, Auth: Auth{OIDC: &a}}}.Validate()
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: got %v, want %q", name, err, c.want)
		}
	}
	if err := (Sources{"x": {Kind: "gar", AnyRegistry: true, Auth: Auth{OIDC: &good}}}).Validate(); err != nil {
		t.Error(err)
	}
}
