package gatekeeper

import (
	"bytes"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/x509"
	"errors"
	"log/slog"
	"net/http"
	"slices"
	"strings"
)

// maxTokens are valid at once: the present one and the one that replaces it.
const maxTokens = 2

// caller says whether a request comes from somebody who may ask.
type caller struct {
	tokens *files[[][sha256.Size]byte] // bearer tokens; nil: none are asked for
	cas    *files[*x509.CertPool]      // client authorities, checked in the TLS handshake; nil: none are asked for
	names  []string                    // common names that may call; empty: all
}

func newCaller(a Auth, log *slog.Logger) (*caller, error) {
	c := &caller{names: a.ClientNames}
	var err error
	switch {
	case a.TokenFile != "":
		c.tokens, err = newFiles(log, parseTokens, a.TokenFile)
	case a.ClientCAFile != "":
		c.cas, err = newFiles(log, parsePool, a.ClientCAFile)
	}
	return c, err
}

func parseTokens(contents [][]byte) ([][sha256.Size]byte, error) {
	var out [][sha256.Size]byte
	for line := range bytes.Lines(contents[0]) {
		if line = bytes.TrimSpace(line); len(line) > 0 {
			out = append(out, sha256.Sum256(line)) // equal lengths, so that none shows
		}
	}
	if len(out) == 0 || len(out) > maxTokens {
		return nil, errors.New("the token file must hold one token, or two, one a line")
	}
	return out, nil
}

func parsePool(contents [][]byte) (*x509.CertPool, error) {
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(contents[0]) {
		return nil, errors.New("the file of client authorities holds no PEM certificate")
	}
	return pool, nil
}

// may says whether the request may be answered. All tokens are compared, each
// in constant time.
func (c *caller) may(r *http.Request) bool {
	if c.cas != nil {
		if r.TLS == nil || len(r.TLS.VerifiedChains) == 0 {
			return false
		}
		name := r.TLS.VerifiedChains[0][0].Subject.CommonName
		return len(c.names) == 0 || slices.Contains(c.names, name)
	}
	if c.tokens == nil {
		return true
	}
	scheme, token, _ := strings.Cut(r.Header.Get("Authorization"), " ")
	got := sha256.Sum256([]byte(strings.TrimSpace(token)))
	match := 0
	for _, want := range c.tokens.get() {
		match |= subtle.ConstantTimeCompare(got[:], want[:])
	}
	return strings.EqualFold(scheme, "Bearer") && match == 1
}
