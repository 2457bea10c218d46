// Package credential reads passwords and certificates anew for every
// connection, so that they can be replaced while a service runs. What is
// replaced must stay valid until the connections that were made with it end.
package credential

import (
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"sync"
	"time"
)

// maxSecret bounds a file that holds a secret, in bytes.
const maxSecret = 64 << 10

// MaxValid is how many secrets a caller may present at one time: the present one
// and the one that replaces it.
const MaxValid = 2

// handshakeTimeout bounds a TLS handshake.
const handshakeTimeout = 10 * time.Second

// ErrSecret is wrapped by errors about a secret that is named but not there.
var ErrSecret = errors.New("secret is not there")

// Secret says where a secret is kept: in a file or in an environment variable,
// one of them. Neither is no secret.
type Secret struct {
	File string
	Env  string
}

// Read returns the secret as it is now, without line ends at its end; "" where
// none is named. errors.Is(err, ErrSecret); the text never holds the secret.
func (s Secret) Read(lookupEnv func(string) (string, bool)) (string, error) {
	switch {
	case s.File != "" && s.Env != "":
		return "", fmt.Errorf("it is named both as a file and as an environment variable, keep one: %w", ErrSecret)
	case s.File != "":
		info, err := os.Stat(s.File)
		if err != nil {
			return "", fmt.Errorf("%w: %w", ErrSecret, err)
		}
		if info.Size() > maxSecret {
			return "", fmt.Errorf("%s is bigger than any secret: %w", s.File, ErrSecret)
		}
		b, err := os.ReadFile(s.File)
		if err != nil {
			return "", fmt.Errorf("%w: %w", ErrSecret, err)
		}
		value := strings.TrimRight(string(b), "\r\n")
		if value == "" {
			return "", fmt.Errorf("%s is empty: %w", s.File, ErrSecret)
		}
		return value, nil
	case s.Env != "":
		value, ok := lookupEnv(s.Env)
		if !ok || value == "" {
			return "", fmt.Errorf("environment variable %s is not set: %w", s.Env, ErrSecret)
		}
		return value, nil
	}
	return "", nil
}

// Lines splits a text into the secrets that it holds, one a line, with the space
// around them taken away. errors.Is(err, ErrSecret) unless they are 1 to MaxValid;
// the text of the error never holds them.
func Lines(text string) ([]string, error) {
	var secrets []string
	for line := range strings.Lines(text) {
		if line = strings.TrimSpace(line); line != "" {
			secrets = append(secrets, line)
		}
	}
	if len(secrets) == 0 || len(secrets) > MaxValid {
		return nil, fmt.Errorf("holds %d secrets, one a line, instead of 1 to %d: %w", len(secrets), MaxValid, ErrSecret)
	}
	return secrets, nil
}

// All returns the secrets that are valid now, for whoever is called; none where
// none is named. Errors are those of Read and Lines.
func (s Secret) All(lookupEnv func(string) (string, bool)) ([]string, error) {
	text, err := s.Read(lookupEnv)
	if err != nil || text == "" {
		return nil, err
	}
	secrets, err := Lines(text)
	switch {
	case err != nil && s.File != "":
		return nil, fmt.Errorf("%s: %w", s.File, err)
	case err != nil:
		return nil, fmt.Errorf("environment variable %s: %w", s.Env, err)
	}
	return secrets, nil
}

// First returns the first of All, for whoever calls; "" where none is named.
func (s Secret) First(lookupEnv func(string) (string, bool)) (string, error) {
	secrets, err := s.All(lookupEnv)
	if err != nil || len(secrets) == 0 {
		return "", err
	}
	return secrets[0], nil
}

// Bearer says whether authorization, the value of that header, is "Bearer" and
// one of the tokens (RFC 6750, 2.1). All are compared, each in constant time
// whatever its length; without any the answer is no.
func Bearer(authorization string, tokens []string) bool {
	scheme, token, _ := strings.Cut(authorization, " ")
	got := sha256.Sum256([]byte(token))
	match := 0
	for _, t := range tokens {
		want := sha256.Sum256([]byte(t))
		match |= subtle.ConstantTimeCompare(got[:], want[:])
	}
	return strings.EqualFold(scheme, "Bearer") && token != "" && match == 1
}

// Source returns a function that reads the secret anew at each call.
func (s Secret) Source(lookupEnv func(string) (string, bool)) func() (string, error) {
	return func() (string, error) { return s.Read(lookupEnv) }
}

// TLS names the PEM files of a client, and is the section "tls" of what it connects to.
type TLS struct {
	CAFile     string `yaml:"caFile"`     // authorities of the server; empty: the system's
	CertFile   string `yaml:"certFile"`   // certificate of the client, with its chain
	KeyFile    string `yaml:"keyFile"`    // its private key
	ServerName string `yaml:"serverName"` // that the server's certificate is for; empty: the host that is dialled

	BesideSystem bool `yaml:"-"` // CAFile adds to the system's authorities instead of replacing them
}

// Load reads the files. The server's certificate is always verified.
func (t TLS) Load() (*tls.Config, error) {
	out := &tls.Config{MinVersion: tls.VersionTLS12, ServerName: t.ServerName}
	if t.CAFile != "" {
		pool := t.authorities()
		if err := AddAuthorities(pool, t.CAFile); err != nil {
			return nil, err
		}
		out.RootCAs = pool
	}
	pair, err := t.pair()
	if err != nil {
		return nil, err
	}
	if pair != nil {
		out.Certificates = []tls.Certificate{*pair}
	}
	return out, nil
}

// authorities returns those that CAFile adds to.
func (t TLS) authorities() *x509.CertPool {
	if t.BesideSystem {
		if pool, err := x509.SystemCertPool(); err == nil {
			return pool
		}
	}
	return x509.NewCertPool()
}

// pair returns the client's certificate, nil where none is named.
func (t TLS) pair() (*tls.Certificate, error) {
	if (t.CertFile == "") != (t.KeyFile == "") {
		return nil, errors.New("certFile and keyFile go together")
	}
	if t.CertFile == "" {
		return nil, nil //nolint:nilnil // no certificate is named
	}
	pair, err := tls.LoadX509KeyPair(t.CertFile, t.KeyFile)
	if err != nil {
		return nil, fmt.Errorf("certFile and keyFile: %w", err)
	}
	return &pair, nil
}

// AddAuthorities adds the certificates of a PEM file to a pool.
func AddAuthorities(pool *x509.CertPool, file string) error {
	pem, err := os.ReadFile(file) //nolint:gosec // a file that the configuration names
	if err != nil {
		return fmt.Errorf("caFile: %w", err)
	}
	if !pool.AppendCertsFromPEM(pem) {
		return fmt.Errorf("caFile %s holds no PEM certificate", file)
	}
	return nil
}

// Source returns a function that reads the files anew at each call. While they
// cannot be used, because they are being replaced, it returns what it read last.
func (t TLS) Source() func() (*tls.Config, error) {
	var mu sync.Mutex
	var last *tls.Config
	return func() (*tls.Config, error) {
		mu.Lock()
		defer mu.Unlock()
		now, err := t.Load()
		if err != nil && last == nil {
			return nil, err
		}
		if err == nil {
			last = now
		}
		return last.Clone(), nil
	}
}

// Dial is a function that opens connections, as in net.Dialer.DialContext.
type Dial func(ctx context.Context, network, address string) (net.Conn, error)

// Over returns a Dial that speaks TLS over the connections of plain, with what
// source returns at that moment.
func Over(plain Dial, source func() (*tls.Config, error)) Dial {
	return func(ctx context.Context, network, address string) (net.Conn, error) {
		config, err := source()
		if err != nil {
			return nil, fmt.Errorf("TLS to %s: %w", address, err)
		}
		raw, err := plain(ctx, network, address)
		if err != nil {
			return nil, err
		}
		conn, err := Handshake(ctx, raw, config, address)
		if err != nil {
			return nil, fmt.Errorf("%w%s", err, cure(err))
		}
		return conn, nil
	}
}

// Handshake makes the client's side of TLS over raw, which it closes when that
// fails. The server's name is config's, or the host of address.
func Handshake(ctx context.Context, raw net.Conn, config *tls.Config, address string) (*tls.Conn, error) {
	if config.ServerName == "" {
		host, _, err := net.SplitHostPort(address)
		if err != nil {
			return nil, errors.Join(fmt.Errorf("address %q: %w", address, err), raw.Close())
		}
		config = config.Clone()
		config.ServerName = host
	}
	ctx, cancel := context.WithTimeout(ctx, handshakeTimeout)
	defer cancel()
	conn := tls.Client(raw, config)
	if err := conn.HandshakeContext(ctx); err != nil {
		_ = raw.Close() // the handshake's error says more
		return nil, fmt.Errorf("TLS handshake with %s: %w", address, err)
	}
	return conn, nil
}

// cure says what may help against an error of a handshake.
func cure(err error) string {
	var authority x509.UnknownAuthorityError
	var name x509.HostnameError
	var plain tls.RecordHeaderError
	switch {
	case errors.As(err, &authority):
		return " (name its certificate authority as tls.caFile)"
	case errors.As(err, &name):
		return " (connect by a name that its certificate holds, or set tls.serverName)"
	case errors.As(err, &plain):
		return " (the server does not speak TLS on this port)"
	}
	return ""
}
