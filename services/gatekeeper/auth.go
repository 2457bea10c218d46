package gatekeeper

import (
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"strings"

	"github.com/tidewaiter/tidewaiter/libs/credential"
)

// caller says whether a request comes from somebody who may ask.
type caller struct {
	tokens *files[[]string]       // bearer tokens; nil: none are asked for
	cas    *files[*x509.CertPool] // client authorities, checked in the TLS handshake; nil: none are asked for
	names  []string               // common names that may call; empty: all
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

func parseTokens(contents [][]byte) ([]string, error) {
	tokens, err := credential.Lines(string(contents[0]))
	if err != nil {
		return nil, fmt.Errorf("the token file: %w", err)
	}
	return tokens, nil
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
	return credential.Bearer(scheme+" "+strings.TrimSpace(token), c.tokens.get())
}
