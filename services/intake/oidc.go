package intake

import (
	"context"
	"crypto/rsa"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
)

// OIDCAuth is "Authorization: Bearer <JWT>" with a token that an issuer signed
// with RS256 (OpenID Connect Core, 3.1.3.7), as Pub/Sub pushes and Event Grid
// with Entra send it. Since an issuer gives anybody a token for any audience,
// one claim more must say who it was given to.
type OIDCAuth struct {
	// Issuer, exactly as tokens have it. Its keys are found by its discovery
	// document (OpenID Connect Discovery, 4) unless KeysURL is set.
	Issuer   string `yaml:"issuer"`
	Audience string `yaml:"audience"`
	// Email of the sender's account; it must be verified by the issuer.
	Email string `yaml:"email"`
	// Subject is the sender's "sub".
	Subject string `yaml:"subject"`
	// Claims are further texts that the token must hold, for example appid.
	Claims map[string]string `yaml:"claims"`
	// KeysURL is where the issuer's keys are, for issuers without discovery.
	KeysURL string `yaml:"keysURL"`
}

const (
	clockSkew = time.Minute // between an issuer and us

	fetchTimeout = 5 * time.Second
	maxFetched   = 1 << 20 // bytes
	maxToken     = 16 << 10

	keysFresh  = time.Hour              // keys are fetched again when they are older
	keysUsable = 24 * time.Hour         // and used no longer, if that fails
	keysWait   = 500 * time.Millisecond // for newer ones, while those at hand are usable
	keysPause  = 30 * time.Second       // between two fetches for keys that are not there
	keysRetry  = 2 * time.Second        // between two that fail
	minRSABits = 2048
)

// errUnchecked says that a proof could be neither accepted nor refused: the
// sender is to try again.
var errUnchecked = errors.New("the proof cannot be checked now")

func (a OIDCAuth) validate() error {
	if err := secureURL(a.Issuer); err != nil {
		return fmt.Errorf("auth.oidc.issuer: %w", err)
	}
	if a.KeysURL != "" {
		if err := secureURL(a.KeysURL); err != nil {
			return fmt.Errorf("auth.oidc.keysURL: %w", err)
		}
	}
	if a.Audience == "" {
		return errors.New("auth.oidc.audience is missing")
	}
	if a.Email == "" && a.Subject == "" && len(a.Claims) == 0 {
		return errors.New("auth.oidc: email, subject or claims must say whose tokens are taken: the issuer gives anybody a token for the audience")
	}
	return nil
}

// secureURL says what is wrong with a URL that keys are fetched from: it must be
// https, or a server on this machine.
func secureURL(s string) error {
	u, err := url.Parse(s)
	if err != nil || u.Host == "" || u.User != nil || u.Fragment != "" {
		return fmt.Errorf("%q is not a URL", s)
	}
	ip := net.ParseIP(u.Hostname())
	local := u.Hostname() == "localhost" || ip != nil && ip.IsLoopback()
	if u.Scheme != "https" && (u.Scheme != "http" || !local) {
		return fmt.Errorf("%q is not https", s)
	}
	return nil
}

// newOIDC returns a verifier of tokens. Nothing is fetched before the first call.
func newOIDC(auth OIDCAuth, transport http.RoundTripper, log *slog.Logger) *verifier {
	o := &oidcVerifier{OIDCAuth: auth, keys: &keySet{
		issuer: auth.Issuer, keysURL: auth.KeysURL, client: fetcher(transport), now: time.Now, log: log,
	}}
	return &verifier{scheme: "Bearer", outside: o.check, wait: o.keys.behind.Wait}
}

// fetcher returns a client for keys and certificates: no redirects, since those
// would lead away from where the configuration points.
func fetcher(transport http.RoundTripper) *http.Client {
	return &http.Client{
		Transport: transport, Timeout: fetchTimeout,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}

type oidcVerifier struct {
	OIDCAuth
	keys *keySet
}

// check returns nil for a good token; errUnchecked; or, in words of ours, why it
// is refused.
func (o *oidcVerifier) check(ctx context.Context, offered offer) ([]byte, error) {
	values := offered.header.Values("Authorization")
	if len(values) != 1 {
		return nil, errors.New("the header Authorization is missing or there more than once")
	}
	text, ok := schemed("Bearer")(values[0])
	if !ok || text == "" || len(text) > maxToken {
		return nil, errors.New("the header Authorization holds no bearer token")
	}
	// Naming the one algorithm here is what keeps "none" and HMAC with the public key out.
	token, err := jwt.ParseSigned(text, []jose.SignatureAlgorithm{jose.RS256})
	if err != nil || len(token.Headers) != 1 {
		return nil, errors.New("the token is not a JWT that is signed with RS256")
	}
	candidates, err := o.keys.find(ctx, token.Headers[0].KeyID)
	if err != nil {
		return nil, err
	}
	var standard jwt.Claims
	var all map[string]any
	if !slices.ContainsFunc(candidates, func(k *rsa.PublicKey) bool { return token.Claims(k, &standard, &all) == nil }) {
		return nil, errors.New("the token is signed with none of the issuer's keys")
	}
	return nil, o.judge(standard, all)
}

// judge checks the claims of a token whose signature is right.
func (o *oidcVerifier) judge(standard jwt.Claims, all map[string]any) error {
	issuer := o.Issuer
	if standard.Issuer == "accounts.google.com" && issuer == "https://accounts.google.com" {
		issuer = standard.Issuer // Google writes it both ways
	}
	err := standard.ValidateWithLeeway(jwt.Expected{Issuer: issuer, AnyAudience: jwt.Audience{o.Audience}, Time: o.keys.now()}, clockSkew)
	switch {
	case errors.Is(err, jwt.ErrInvalidIssuer):
		return errors.New("the token is of another issuer")
	case errors.Is(err, jwt.ErrInvalidAudience):
		return errors.New("the token is for another audience")
	case errors.Is(err, jwt.ErrExpired):
		return errors.New("the token has expired")
	case err != nil:
		return errors.New("the token is not valid yet")
	case standard.Expiry == nil:
		return errors.New("the token never expires")
	case o.Subject != "" && standard.Subject != o.Subject:
		return errors.New("the token is of another subject")
	case o.Email != "" && (all["email"] != o.Email || all["email_verified"] != true):
		return errors.New("the token is of another email, or of one that is not verified")
	}
	for name, value := range o.Claims {
		if all[name] != value {
			return fmt.Errorf("the token's claim %q is another one", name)
		}
	}
	return nil
}

// keySet caches the keys of an issuer.
type keySet struct {
	issuer, keysURL string
	client          *http.Client
	now             func() time.Time
	log             *slog.Logger

	refreshing sync.Mutex     // held while keys are fetched; cached keys serve meanwhile
	behind     sync.WaitGroup // of fetches that no call waits for, each at most fetchTimeout

	mu      sync.Mutex
	keys    []jose.JSONWebKey
	fetched time.Time // when they were
	tried   time.Time // when they last were, or should have been
	failed  error     // of the last try
}

// find returns the keys of the given id, or all if the token names none. Keys
// that are no longer fresh are fetched again, and serve if that takes long. A key
// that is not there may be a new one: then they are fetched again, but not more
// often than keysPause, since anybody can name keys.
func (k *keySet) find(ctx context.Context, id string) ([]*rsa.PublicKey, error) {
	found, fresh := k.cached(id)
	switch {
	case len(found) > 0 && fresh:
		return found, nil
	case len(found) > 0:
		k.renew(ctx)
		found, _ = k.cached(id)
		return found, nil
	}
	k.refreshing.Lock()
	defer k.refreshing.Unlock()
	if found, _ = k.cached(id); len(found) > 0 { // somebody else fetched them
		return found, nil
	}
	if k.due() {
		k.refresh(ctx)
		found, _ = k.cached(id)
	}
	k.mu.Lock()
	failed := k.failed
	k.mu.Unlock()
	if len(found) == 0 && failed != nil {
		return nil, fmt.Errorf("the issuer's keys: %w: %w", errUnchecked, failed)
	}
	return found, nil
}

// renew fetches keys again unless somebody does, and waits a moment for them:
// usually they come, and withdrawn ones are refused. An issuer that hangs holds
// nobody up.
func (k *keySet) renew(ctx context.Context) {
	if !k.refreshing.TryLock() {
		return
	}
	if !k.due() {
		k.refreshing.Unlock()
		return
	}
	done := make(chan struct{})
	k.behind.Go(func() {
		defer close(done)
		defer k.refreshing.Unlock()
		k.refresh(ctx)
	})
	moment := time.NewTimer(keysWait)
	defer moment.Stop()
	select {
	case <-done:
	case <-moment.C:
	}
}

// cached returns what is known, and whether that is fresh.
func (k *keySet) cached(id string) (found []*rsa.PublicKey, fresh bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	age := k.now().Sub(k.fetched)
	if age > keysUsable {
		return nil, false
	}
	for _, key := range k.keys {
		if public, ok := key.Key.(*rsa.PublicKey); ok && (id == "" || key.KeyID == id) {
			found = append(found, public)
		}
	}
	return found, age <= keysFresh
}

func (k *keySet) due() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	pause := keysPause
	if k.failed != nil {
		pause = keysRetry
	}
	return k.tried.IsZero() || k.now().Sub(k.tried) >= pause
}

func (k *keySet) refresh(ctx context.Context) {
	// The caller may go; the keys serve others too.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), fetchTimeout)
	defer cancel()
	keys, err := k.fetch(ctx)
	if err != nil {
		k.log.WarnContext(ctx, "keys of an issuer cannot be fetched", "issuer", k.issuer, "error", err)
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.tried, k.failed = k.now(), err
	if err == nil {
		k.keys, k.fetched = keys, k.tried
	}
}

func (k *keySet) fetch(ctx context.Context) ([]jose.JSONWebKey, error) {
	from := k.keysURL
	if from == "" {
		var doc struct {
			Issuer string `json:"issuer"`
			Keys   string `json:"jwks_uri"`
		}
		if err := getJSON(ctx, k.client, strings.TrimSuffix(k.issuer, "/")+"/.well-known/openid-configuration", &doc); err != nil {
			return nil, fmt.Errorf("discovery document: %w", err)
		}
		if doc.Issuer != k.issuer {
			return nil, errors.New("discovery document: it is another issuer's: set issuer as it writes it, or keysURL")
		}
		if err := secureURL(doc.Keys); err != nil {
			return nil, fmt.Errorf("discovery document: jwks_uri: %w", err)
		}
		from = doc.Keys
	}
	var set jose.JSONWebKeySet
	if err := getJSON(ctx, k.client, from, &set); err != nil {
		return nil, fmt.Errorf("keys: %w", err)
	}
	usable := slices.DeleteFunc(set.Keys, func(key jose.JSONWebKey) bool {
		public, ok := key.Key.(*rsa.PublicKey)
		return !ok || !key.Valid() || public.N.BitLen() < minRSABits || key.Use != "" && key.Use != "sig"
	})
	if len(usable) == 0 {
		return nil, errors.New("keys: no RSA key of at least 2048 bits for signatures is among them")
	}
	return usable, nil
}

// get fetches a small document.
func get(ctx context.Context, client *http.Client, from string) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, from, nil)
	if err != nil {
		return nil, err
	}
	resp, err := client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%s answers %d", req.URL.Host, resp.StatusCode)
	}
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxFetched+1))
	if err != nil {
		return nil, fmt.Errorf("read: %w", err)
	}
	if len(b) > maxFetched {
		return nil, fmt.Errorf("%s sends more than %d bytes", req.URL.Host, maxFetched)
	}
	return b, nil
}

func getJSON(ctx context.Context, client *http.Client, from string, into any) error {
	b, err := get(ctx, client, from)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(b, into); err != nil {
		return fmt.Errorf("decode: %w", err)
	}
	return nil
}
