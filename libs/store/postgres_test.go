package store

import (
	"crypto/tls"
	"errors"
	"net"
	"os"
	"strings"
	"sync"
	"testing"

	"github.com/jackc/pgx/v5/pgproto3"

	"github.com/tidewaiter/tidewaiter/libs/credential/credentialtest"
)

// login is what a connection to the server below has shown.
type login struct{ certificate, user, password string }

// loginServer speaks as much of PostgreSQL's protocol as it takes to log in
// over TLS and to ping.
func loginServer(t *testing.T, config *tls.Config) (address string, logins func() []login) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	var seen []login
	var group sync.WaitGroup
	group.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			group.Go(func() {
				defer conn.Close() //nolint:errcheck // nothing was written
				who, b, err := accept(conn, config)
				if err != nil {
					return
				}
				mu.Lock()
				seen = append(seen, who)
				mu.Unlock()
				for {
					m, err := b.Receive()
					if err != nil {
						return
					}
					if _, ok := m.(*pgproto3.Terminate); ok {
						return
					}
					b.Send(&pgproto3.EmptyQueryResponse{})
					b.Send(&pgproto3.ReadyForQuery{TxStatus: 'I'})
					if b.Flush() != nil {
						return
					}
				}
			})
		}
	})
	t.Cleanup(func() { _ = l.Close(); group.Wait() })
	return l.Addr().String(), func() []login {
		mu.Lock()
		defer mu.Unlock()
		return append([]login(nil), seen...)
	}
}

func accept(conn net.Conn, config *tls.Config) (login, *pgproto3.Backend, error) {
	if _, ok := must(pgproto3.NewBackend(conn, conn).ReceiveStartupMessage()).(*pgproto3.SSLRequest); !ok {
		return login{}, nil, errors.New("a start without TLS")
	}
	if _, err := conn.Write([]byte("S")); err != nil {
		return login{}, nil, err
	}
	secure := tls.Server(conn, config)
	b := pgproto3.NewBackend(secure, secure)
	start, ok := must(b.ReceiveStartupMessage()).(*pgproto3.StartupMessage)
	if !ok {
		return login{}, nil, errors.New("no start")
	}
	b.Send(&pgproto3.AuthenticationCleartextPassword{})
	if err := b.Flush(); err != nil {
		return login{}, nil, err
	}
	if err := b.SetAuthType(pgproto3.AuthTypeCleartextPassword); err != nil {
		return login{}, nil, err
	}
	password, ok := must(b.Receive()).(*pgproto3.PasswordMessage)
	if !ok {
		return login{}, nil, errors.New("no password")
	}
	b.Send(&pgproto3.AuthenticationOk{})
	b.Send(&pgproto3.ReadyForQuery{TxStatus: 'I'})
	who := login{secure.ConnectionState().PeerCertificates[0].Subject.CommonName, start.Parameters["user"], password.Password}
	return who, b, b.Flush()
}

// must returns nil for what could not be received.
func must[T any](v T, err error) any {
	if err != nil {
		return nil
	}
	return v
}

func TestPostgresWithCertificatesAndAPasswordThatChange(t *testing.T) {
	authority := credentialtest.New(t)
	address, logins := loginServer(t, authority.Server(t))
	password := "first"
	files := authority.Client(t, "catalog")
	cfg := Config{
		URL:            "postgres://tidewaiter_catalog@" + address + "/tidewaiter",
		PasswordSource: func() (string, error) { return password, nil },
		TLSSource:      files.Source(),
	}
	db, err := open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close() //nolint:errcheck // the test is over
	if err := db.PingContext(t.Context()); err != nil {
		t.Fatal(err)
	}
	password = "second"
	certFile, keyFile := authority.Issue(t, "catalog-2", 0)
	for from, to := range map[string]string{certFile: files.CertFile, keyFile: files.KeyFile} {
		if err := os.Rename(from, to); err != nil {
			t.Fatal(err)
		}
	}
	db.SetMaxIdleConns(0) // the next ping connects
	if err := db.PingContext(t.Context()); err != nil {
		t.Fatal(err)
	}
	got := logins()
	if len(got) != 2 || got[0] != (login{"catalog", "tidewaiter_catalog", "first"}) || got[1] != (login{"catalog-2", "tidewaiter_catalog", "second"}) {
		t.Errorf("logged in as %v", got)
	}

	cfg.TLSSource = credentialtest.New(t).Client(t, "catalog").Source()
	foreign, err := open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer foreign.Close() //nolint:errcheck // the test is over
	if err := foreign.PingContext(t.Context()); !IsUnavailable(err) || !strings.Contains(err.Error(), "x509") {
		t.Errorf("a server of another authority: %v", err)
	}
	if len(logins()) != 2 {
		t.Error("a password was handed to a server that had not proved itself")
	}
}

// What is said twice is refused, and no error repeats a password.
func TestCheckURL(t *testing.T) {
	source := func() (*tls.Config, error) { return &tls.Config{MinVersion: tls.VersionTLS12}, nil }
	password := func() (string, error) { return "x", nil }
	for want, cfg := range map[string]Config{
		"sslmode=require":       {URL: "postgres://u@h/d?sslmode=require", TLSSource: source},
		"sslrootcert":           {URL: "postgres://u@h/d?sslrootcert=x", TLSSource: source},
		"holds a password":      {URL: "postgres://u:hunter2@h/d", PasswordSource: password},
		"password, and another": {URL: "postgres://u@h/d?password=hunter2", PasswordSource: password},
		"neither passwords":     {URL: "sqlite:///x.db", PasswordSource: password},
		"want sqlite":           {URL: "mysql://u:hunter2@h/d"},
		"no URL":                {URL: "postgres://u:hunter2@h:x y/d"},
	} {
		if err := cfg.CheckURL(); err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("got %v, want %q", err, want)
		}
	}
	for _, url := range []string{"postgres://u@h1,h2/d", "postgres://u@h/d?sslmode=verify-full"} {
		if err := (Config{URL: url, TLSSource: source, PasswordSource: password}).CheckURL(); err != nil {
			t.Errorf("%s: %v", url, err)
		}
	}
}
