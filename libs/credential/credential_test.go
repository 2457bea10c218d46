package credential_test

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/tidewaiter/tidewaiter/libs/credential"
	"github.com/tidewaiter/tidewaiter/libs/credential/credentialtest"
)

// server answers every connection with the common name of its certificate.
func server(t *testing.T, config *tls.Config) string {
	t.Helper()
	l, err := tls.Listen("tcp", "127.0.0.1:0", config)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			if c := conn.(*tls.Conn); c.HandshakeContext(context.Background()) == nil {
				_, _ = io.WriteString(c, c.ConnectionState().PeerCertificates[0].Subject.CommonName)
			}
			_ = conn.Close()
		}
	}()
	t.Cleanup(func() { _ = l.Close(); <-done })
	return l.Addr().String()
}

func who(t *testing.T, dial credential.Dial, address string) (string, error) {
	t.Helper()
	conn, err := dial(t.Context(), "tcp", address)
	if err != nil {
		return "", err
	}
	defer conn.Close() //nolint:errcheck // nothing was written
	b, err := io.ReadAll(conn)
	return string(b), err
}

// What is replaced is used by the next connection, and what cannot be read
// while it is being replaced does not end what works.
func TestCertificatesAreReadAtEveryConnection(t *testing.T) {
	old, next := credentialtest.New(t), credentialtest.New(t)
	files := old.Client(t, "first")
	var d net.Dialer
	dial := credential.Over(d.DialContext, files.Source())
	address := server(t, old.Server(t))
	if got, err := who(t, dial, address); err != nil || got != "first" {
		t.Fatalf("got %q, %v", got, err)
	}

	certFile, keyFile := old.Issue(t, "second", 0)
	rename(t, certFile, files.CertFile)
	if got, err := who(t, dial, address); err != nil || got != "first" {
		t.Errorf("with half of the files replaced: %q, %v", got, err)
	}
	rename(t, keyFile, files.KeyFile)
	if got, err := who(t, dial, address); err != nil || got != "second" {
		t.Errorf("after both were replaced: %q, %v", got, err)
	}

	moved := server(t, next.Server(t))
	if _, err := who(t, dial, moved); err == nil || !strings.Contains(err.Error(), "tls.caFile") {
		t.Errorf("a server of another authority: %v", err)
	}
	certFile, keyFile = next.Issue(t, "third", 0)
	rename(t, next.CAFile, files.CAFile)
	rename(t, certFile, files.CertFile)
	rename(t, keyFile, files.KeyFile)
	if got, err := who(t, dial, moved); err != nil || got != "third" {
		t.Errorf("after the authority was replaced: %q, %v", got, err)
	}
}

func rename(t *testing.T, from, to string) {
	t.Helper()
	if err := os.Rename(from, to); err != nil {
		t.Fatal(err)
	}
}

func TestTheServersNameIsVerified(t *testing.T) {
	a := credentialtest.New(t)
	address := server(t, a.Server(t))
	files := a.Client(t, "client")
	var d net.Dialer
	files.ServerName = "another.example.com"
	if _, err := who(t, credential.Over(d.DialContext, files.Source()), address); err == nil || !strings.Contains(err.Error(), "tls.serverName") {
		t.Errorf("a server of another name: %v", err)
	}
	files.ServerName = "localhost"
	if got, err := who(t, credential.Over(d.DialContext, files.Source()), address); err != nil || got != "client" {
		t.Errorf("a name that the certificate holds: %q, %v", got, err)
	}
}

func TestAServerWithoutTLS(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		conn, err := l.Accept()
		if err == nil {
			_, _ = io.WriteString(conn, "-ERR what is that?\r\n")
			_ = conn.Close()
		}
	}()
	defer func() { _ = l.Close(); <-done }()
	var d net.Dialer
	_, err = who(t, credential.Over(d.DialContext, credential.TLS{}.Source()), l.Addr().String())
	if err == nil || !strings.Contains(err.Error(), "does not speak TLS") {
		t.Errorf("got %v", err)
	}
}

func TestLoadRefuses(t *testing.T) {
	a := credentialtest.New(t)
	certFile, keyFile := a.Issue(t, "x", time.Hour)
	otherCert, _ := a.Issue(t, "y", time.Hour)
	for name, files := range map[string]credential.TLS{
		"no such authority": {CAFile: filepath.Join(a.Dir, "none")},
		"no certificate":    {CAFile: keyFile},
		"half a pair":       {CertFile: certFile},
		"a foreign key":     {CertFile: otherCert, KeyFile: keyFile},
	} {
		if _, err := files.Load(); err == nil {
			t.Errorf("%s: it was accepted", name)
		}
	}
}

func TestSecret(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "secret")
	if err := os.WriteFile(file, []byte(" two words \r\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	empty := filepath.Join(dir, "empty")
	if err := os.WriteFile(empty, []byte("\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	env := func(name string) (string, bool) { return "from-env", name == "SET" }
	for _, test := range []struct {
		secret credential.Secret
		want   string
		wrong  bool
	}{
		{credential.Secret{}, "", false},
		{credential.Secret{File: file}, " two words ", false},
		{credential.Secret{Env: "SET"}, "from-env", false},
		{credential.Secret{Env: "UNSET"}, "", true},
		{credential.Secret{File: empty}, "", true},
		{credential.Secret{File: filepath.Join(dir, "none")}, "", true},
		{credential.Secret{File: file, Env: "SET"}, "", true},
	} {
		got, err := test.secret.Read(env)
		if got != test.want || test.wrong != errors.Is(err, credential.ErrSecret) {
			t.Errorf("%+v: %q, %v", test.secret, got, err)
		}
	}
}
