package bus

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"

	"github.com/segmentio/kafka-go/sasl"
	"github.com/segmentio/kafka-go/sasl/plain"
	"github.com/segmentio/kafka-go/sasl/scram"

	"github.com/tidewaiter/tidewaiter/libs/credential"
)

// SASL mechanisms of Config.Mechanism.
const (
	ScramSHA512 = "SCRAM-SHA-512" // the default
	ScramSHA256 = "SCRAM-SHA-256"
	Plain       = "PLAIN" // over TLS only: it hands the password over
)

// login is a sasl.Mechanism that asks for the password at every connection.
type login struct {
	mechanism string
	username  string
	password  func() (string, error)
}

// newLogin returns nil where no user is configured.
func newLogin(cfg Config) (sasl.Mechanism, error) {
	if cfg.Username == "" {
		return nil, nil //nolint:nilnil // no authentication
	}
	l := &login{mechanism: cfg.Mechanism, username: cfg.Username, password: cfg.PasswordSource}
	if l.password == nil {
		l.password = func() (string, error) { return cfg.Password, nil }
	}
	if _, err := l.current(); err != nil {
		return nil, err
	}
	return l, nil
}

// Name implements sasl.Mechanism.
func (l *login) Name() string { return l.mechanism }

// Start implements sasl.Mechanism.
func (l *login) Start(ctx context.Context) (sasl.StateMachine, []byte, error) {
	m, err := l.current()
	if err != nil {
		return nil, nil, err
	}
	return m.Start(ctx)
}

// current returns the mechanism with the password of now.
func (l *login) current() (sasl.Mechanism, error) {
	password, err := l.password()
	if err != nil {
		return nil, fmt.Errorf("kafka: password: %w", err)
	}
	if l.mechanism == Plain {
		return plain.Mechanism{Username: l.username, Password: password}, nil
	}
	algorithm := scram.SHA512
	if l.mechanism == ScramSHA256 {
		algorithm = scram.SHA256
	}
	m, err := scram.Mechanism(algorithm, l.username, password)
	if err != nil {
		return nil, errors.New("kafka: the username or password cannot be used with SCRAM (RFC 4013)") // the error could hold it
	}
	return m, nil
}

// secured returns how connections are opened over plain: as they are, or with
// TLS and the certificates of that moment.
func secured(plain credential.Dial, cfg Config) credential.Dial {
	source := cfg.TLSSource
	if source == nil && cfg.TLS != nil {
		source = func() (*tls.Config, error) { return cfg.TLS, nil }
	}
	if source == nil {
		return plain
	}
	return credential.Over(plain, source)
}

func dialPlain(ctx context.Context, network, address string) (net.Conn, error) {
	var d net.Dialer
	return d.DialContext(ctx, network, address)
}
