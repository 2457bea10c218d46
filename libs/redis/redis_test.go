package redis

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/alicebob/miniredis/v2"
	"github.com/alicebob/miniredis/v2/server"
)

func TestPing(t *testing.T) {
	if err := open(t, backend(t)).Ping(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestOpenRefuses(t *testing.T) {
	for _, url := range []string{"", "http://localhost", "redis://user:hunter2@localhost:6379", "redis://localhost:6379/x%zzhunter2"} {
		_, err := Open(Config{URL: url})
		if err == nil {
			t.Errorf("%q was accepted", url)
		} else if strings.Contains(err.Error(), "hunter2") {
			t.Errorf("the error holds the password: %v", err)
		}
	}
}

func TestAnOutageIsUnavailable(t *testing.T) {
	m := miniredis.NewMiniRedis()
	m.RequireAuth("right")
	if err := m.Start(); err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	c := open(t, Config{URL: "redis://" + m.Addr(), Password: "right"})
	if err := c.Ping(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, answer := range []string{"LOADING Redis is loading the dataset in memory", "OOM command not allowed", "READONLY You can't write"} {
		m.SetError(answer)
		if _, err := c.Acquire(t.Context(), layer, "event-1", long); !IsUnavailable(err) {
			t.Errorf("%s: %v is no outage", answer, err)
		}
	}
	m.SetError("ERR unknown command")
	if err := c.Ping(t.Context()); err == nil || IsUnavailable(err) {
		t.Errorf("a wrong command: %v is an outage", err)
	}
	m.SetError("")

	wrong := open(t, Config{URL: "redis://" + m.Addr(), Password: "wrong"})
	if err := wrong.Ping(t.Context()); !IsUnavailable(err) {
		t.Errorf("wrong password: %v is no outage", err)
	} else if strings.Contains(err.Error(), "wrong\"") {
		t.Errorf("the error holds the password: %v", err)
	}

	m.Close()
	if _, err := c.Acquire(t.Context(), layer, "event-1", long); !IsUnavailable(err) {
		t.Errorf("server gone: %v is no outage", err)
	}
	if err := m.Restart(); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Acquire(t.Context(), layer, "event-1", long); err != nil {
		t.Errorf("server back: %v", err)
	}
}

func TestLeaseOfAnOutageIsLost(t *testing.T) {
	m := miniredis.RunT(t)
	c := open(t, Config{URL: "redis://" + m.Addr()})
	l := acquire(t, c, "event-1", short)
	err := c.Hold(t.Context(), l, short, func(ctx context.Context) error {
		m.Close()
		<-ctx.Done()
		return ctx.Err()
	})
	if !errors.Is(err, ErrLost) {
		t.Errorf("got %v, want ErrLost", err)
	}
}

func TestIsUnavailable(t *testing.T) {
	for _, test := range []struct {
		err  error
		want bool
	}{
		{nil, false},
		{errors.New("other"), false},
		{context.Canceled, false},
		{context.DeadlineExceeded, false},
		{fmt.Errorf("renew: %w", ErrLost), false},
		{&TakenError{}, false},
		{fmt.Errorf("read: %w", io.EOF), true},
		{io.ErrUnexpectedEOF, true},
		{&net.OpError{Op: "dial", Err: errors.New("connection refused")}, true},
	} {
		if got := IsUnavailable(test.err); got != test.want {
			t.Errorf("IsUnavailable(%v) is %v", test.err, got)
		}
	}
}

func TestTLSAndUser(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	certificate, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	m := miniredis.NewMiniRedis()
	m.RequireUserAuth("analyzer", "s3cret")
	if err := m.StartTLS(&tls.Config{MinVersion: tls.VersionTLS12, Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}}); err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	m.Server().SetPreHook(func(p *server.Peer, cmd string, args ...string) bool {
		if cmd == "AUTH" && (len(args) != 2 || args[0] != "analyzer") {
			t.Errorf("AUTH %v", len(args))
		}
		return false
	})
	authorities := x509.NewCertPool()
	authorities.AddCert(certificate)
	url := "rediss://analyzer@" + m.Addr()
	trusting := open(t, Config{URL: url, Password: "s3cret", TLS: &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: authorities}})
	if err := trusting.Ping(t.Context()); err != nil {
		t.Errorf("with its authority: %v", err)
	}
	doubting := open(t, Config{URL: url, Password: "s3cret"})
	var unknown x509.UnknownAuthorityError
	if err := doubting.Ping(t.Context()); !errors.As(err, &unknown) {
		t.Errorf("without its authority: %v", err)
	}
}
