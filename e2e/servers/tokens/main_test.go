package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"math/big"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"reflect"
	"testing"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
)

func TestTokensHoldWhatAUserMay(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	signer, err := newSigner(tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key})
	if err != nil {
		t.Fatal(err)
	}
	users := filepath.Join(t.TempDir(), "users")
	content := `{"reader":{"password":"r","scopes":["repository:*:pull","registry:catalog:*"]},"own":{"password":"o","scopes":["repository:team/own:pull,push"]}}`
	if err := os.WriteFile(users, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	server := &tokens{users: users, service: "registry", issuer: "tokens", signer: signer}
	for _, c := range []struct {
		name, password, query string
		status                int
		access                []grant
	}{
		{"reader", "r", "service=registry&scope=repository:a/b:pull,push", 200, []grant{{"repository", "a/b", []string{"pull"}}}},
		{"reader", "r", "service=registry&scope=registry:catalog:*", 200, []grant{{"registry", "catalog", []string{"*"}}}},
		{"reader", "r", "service=registry&scope=repository:a/b:delete", 200, []grant{}},
		{"own", "o", "service=registry&scope=repository:team/own:pull,push+repository:team/other:pull", 200, []grant{{"repository", "team/own", []string{"pull", "push"}}}},
		{"own", "o", "service=registry", 200, []grant{}},
		{"own", "r", "service=registry", 401, nil},
		{"nobody", "", "service=registry", 401, nil},
		{"own", "o", "service=another", 400, nil},
	} {
		r := httptest.NewRequest(http.MethodGet, "/token?"+c.query, nil)
		r.SetBasicAuth(c.name, c.password)
		w := httptest.NewRecorder()
		server.ServeHTTP(w, r)
		if w.Code != c.status {
			t.Errorf("%s, %s: %d, want %d", c.name, c.query, w.Code, c.status)
		}
		if w.Code != http.StatusOK {
			continue
		}
		var answer struct{ Token string }
		if err := json.Unmarshal(w.Body.Bytes(), &answer); err != nil {
			t.Fatal(err)
		}
		parsed, err := jwt.ParseSigned(answer.Token, []jose.SignatureAlgorithm{jose.ES256})
		if err != nil {
			t.Fatal(err)
		}
		var claims struct {
			jwt.Claims
			Access []grant `json:"access"`
		}
		if err := parsed.Claims(&key.PublicKey, &claims); err != nil {
			t.Fatal(err)
		}
		if claims.Subject != c.name || claims.Issuer != "tokens" || !claims.Audience.Contains("registry") {
			t.Errorf("%+v", claims)
		}
		if !reflect.DeepEqual(claims.Access, c.access) {
			t.Errorf("%s, %s: %v, want %v", c.name, c.query, claims.Access, c.access)
		}
	}
}
