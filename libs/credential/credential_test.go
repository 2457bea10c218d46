package credential_test

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
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

func TestSecrets(t *testing.T) {
	write := func(content string) credential.Secret {
		t.Helper()
		name := filepath.Join(t.TempDir(), "token")
		if err := os.WriteFile(name, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		return credential.Secret{File: name}
	}
	env := func(name string) (string, bool) { return "from-env\n", name == "TOKEN" }
	for name, c := range map[string]struct {
		secret credential.Secret
		want   []string
		fails  bool
	}{
		"one":             {write("old\n"), []string{"old"}, false},
		"two":             {write("old\r\n new \n\n"), []string{"old", "new"}, false},
		"three":           {write("a-word\nb-word\nc-word\n"), nil, true},
		"blank":           {write(" \n \t"), nil, true},
		"empty":           {write(""), nil, true},
		"variable":        {credential.Secret{Env: "TOKEN"}, []string{"from-env"}, false},
		"variable, unset": {credential.Secret{Env: "OTHER"}, nil, true},
		"none named":      {credential.Secret{}, nil, false},
		"both, none wins": {credential.Secret{File: "x", Env: "TOKEN"}, nil, true},
		"file not there":  {credential.Secret{File: "/nowhere"}, nil, true},
	} {
		got, err := c.secret.All(env)
		if !slices.Equal(got, c.want) || (err != nil) != c.fails || c.fails && !errors.Is(err, credential.ErrSecret) {
			t.Errorf("%s: %q, %v", name, got, err)
		}
		if strings.Contains(fmt.Sprint(err), "word") {
			t.Errorf("%s: %v quotes a secret", name, err)
		}
		first, err := c.secret.First(env)
		if (err != nil) != c.fails || len(c.want) > 0 && first != c.want[0] || len(c.want) == 0 && first != "" {
			t.Errorf("%s: first %q, %v", name, first, err)
		}
	}
}

func TestBearer(t *testing.T) {
	for authorization, want := range map[string]bool{
		"Bearer one": true, "bearer two": true, "Bearer three": false, "Bearer one\ntwo": false, "Bearer  one": false,
		"Bearer ": false, "Bearer": false, "": false, "Basic one": false, "one": false, "Bearer onet": false,
	} {
		if got := credential.Bearer(authorization, []string{"one", "two"}); got != want {
			t.Errorf("%q: %v", authorization, got)
		}
	}
	if credential.Bearer("Bearer ", nil) || credential.Bearer("Bearer ", []string{""}) {
		t.Error("nothing is a token")
	}
}
