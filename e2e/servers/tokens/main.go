// Command tokens says who may do what in the registry of servers.sh: it issues
// tokens as the Distribution token specification describes them (CNCF
// distribution, docs/content/spec/auth: token, scope, jwt). Registries do not
// know rights of their own; this is where each service gets the least it needs.
package main

import (
	"context"
	"crypto/subtle"
	"crypto/tls"
	"encoding/base64"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
)

// lifetime of a token. What is taken from a user is gone after it.
const lifetime = time.Minute

// user is what stands in the file of users, a JSON object of them by name.
type user struct {
	Password string   `json:"password"`
	Scopes   []string `json:"scopes"` // type:name:action,action; * stands for any name, or any action
}

// grant is an entry of the claim "access".
type grant struct {
	Type    string   `json:"type"`
	Name    string   `json:"name"`
	Actions []string `json:"actions"`
}

// tokens answers for one registry.
type tokens struct {
	users   string // file, read for each request
	service string
	issuer  string
	signer  jose.Signer
}

func main() {
	listen := flag.String("listen", "", "host:port")
	users := flag.String("users", "", "file of users (JSON)")
	certificate := flag.String("cert", "", "certificate that registries trust, PEM")
	key := flag.String("key", "", "its key, which signs the tokens, PEM")
	service := flag.String("service", "", "the registry's name")
	issuer := flag.String("issuer", "", "the name that the registry knows this by")
	tlsCert := flag.String("tls-cert", "", "certificate of this server; empty: plain HTTP")
	tlsKey := flag.String("tls-key", "", "its key")
	flag.Parse()
	pair, err := tls.LoadX509KeyPair(*certificate, *key)
	if err == nil {
		var signer jose.Signer
		if signer, err = newSigner(pair); err == nil {
			err = serve(*listen, *tlsCert, *tlsKey, &tokens{users: *users, service: *service, issuer: *issuer, signer: signer})
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "tokens:", err)
		os.Exit(1)
	}
}

// newSigner puts the certificate into each token, by which the registry finds the key.
func newSigner(pair tls.Certificate) (jose.Signer, error) {
	chain := make([]string, len(pair.Certificate))
	for i, der := range pair.Certificate {
		chain[i] = base64.StdEncoding.EncodeToString(der)
	}
	options := (&jose.SignerOptions{}).WithType("JWT").WithHeader("x5c", chain)
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: pair.PrivateKey}, options)
	if err != nil {
		return nil, fmt.Errorf("make signer: %w", err)
	}
	return signer, nil
}

func serve(listen, certificate, key string, handler http.Handler) error {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	server := &http.Server{Addr: listen, Handler: handler, ReadTimeout: 5 * time.Second, WriteTimeout: 5 * time.Second}
	defer context.AfterFunc(ctx, func() { _ = server.Close() })()
	var err error
	if certificate == "" {
		err = server.ListenAndServe()
	} else {
		err = server.ListenAndServeTLS(certificate, key)
	}
	if !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve: %w", err)
	}
	return nil
}

// ServeHTTP answers GET /token?service=…&scope=…&scope=… with Basic
// authentication: 200 with a token for what of it the user may do, which may be
// nothing; 401 for whom it does not know.
func (t *tokens) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodGet || r.URL.Path != "/token" {
		http.NotFound(w, r)
		return
	}
	name, password, _ := r.BasicAuth()
	known, err := t.read()
	if err != nil {
		slog.ErrorContext(r.Context(), "users cannot be read", slog.Any("error", err))
		http.Error(w, "no users", http.StatusServiceUnavailable)
		return
	}
	u, ok := known[name]
	if !ok || subtle.ConstantTimeCompare([]byte(u.Password), []byte(password)) != 1 {
		w.Header().Set("WWW-Authenticate", `Basic realm="tokens"`)
		http.Error(w, "user and password are not known", http.StatusUnauthorized)
		return
	}
	if r.URL.Query().Get("service") != t.service {
		http.Error(w, "tokens are for "+t.service, http.StatusBadRequest)
		return
	}
	token, err := t.issue(name, granted(u, r.URL.Query()["scope"]), time.Now())
	if err != nil {
		slog.ErrorContext(r.Context(), "a token cannot be signed", slog.Any("error", err))
		http.Error(w, "no token", http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(map[string]any{"token": token, "expires_in": int(lifetime.Seconds())})
}

func (t *tokens) read() (map[string]user, error) {
	b, err := os.ReadFile(t.users)
	if err != nil {
		return nil, fmt.Errorf("read users: %w", err)
	}
	var all map[string]user
	if err := json.Unmarshal(b, &all); err != nil {
		return nil, fmt.Errorf("read users: %w", err)
	}
	return all, nil
}

func (t *tokens) issue(name string, access []grant, now time.Time) (string, error) {
	claims := struct {
		jwt.Claims
		Access []grant `json:"access"`
	}{jwt.Claims{
		Issuer: t.issuer, Subject: name, Audience: jwt.Audience{t.service}, IssuedAt: jwt.NewNumericDate(now),
		NotBefore: jwt.NewNumericDate(now.Add(-10 * time.Second)), Expiry: jwt.NewNumericDate(now.Add(lifetime)),
	}, access}
	token, err := jwt.Signed(t.signer).Claims(claims).Serialize()
	if err != nil {
		return "", fmt.Errorf("sign: %w", err)
	}
	return token, nil
}

// granted returns what of the scopes that are asked for a user may do.
func granted(u user, asked []string) []grant {
	access := []grant{}
	for _, one := range asked {
		for scope := range strings.FieldsSeq(one) {
			want, ok := parse(scope)
			if !ok {
				continue
			}
			var actions []string
			for _, action := range want.Actions {
				if u.may(want.Type, want.Name, action) {
					actions = append(actions, action)
				}
			}
			if len(actions) > 0 {
				access = append(access, grant{want.Type, want.Name, actions})
			}
		}
	}
	return access
}

func (u user) may(kind, name, action string) bool {
	return slices.ContainsFunc(u.Scopes, func(scope string) bool {
		own, ok := parse(scope)
		return ok && own.Type == kind && (own.Name == "*" || own.Name == name) &&
			(slices.Contains(own.Actions, "*") || slices.Contains(own.Actions, action))
	})
}

// parse reads type:name:action,action; a name may hold the port of a registry.
func parse(scope string) (grant, bool) {
	kind, rest, ok := strings.Cut(scope, ":")
	i := strings.LastIndexByte(rest, ':')
	if !ok || i < 0 {
		return grant{}, false
	}
	return grant{kind, rest[:i], strings.Split(rest[i+1:], ",")}, true
}
