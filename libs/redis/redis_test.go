package redis

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/alicebob/miniredis/v2"
	"github.com/alicebob/miniredis/v2/server"

	"github.com/tidewaiter/tidewaiter/libs/credential/credentialtest"
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

// withTLS starts a Redis that asks for a certificate and for a user of the ACL.
func withTLS(t *testing.T, authority *credentialtest.Authority, password string) *miniredis.Miniredis {
	t.Helper()
	m := miniredis.NewMiniRedis()
	m.RequireUserAuth("analyzer", password)
	if err := m.StartTLS(authority.Server(t)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(m.Close)
	m.Server().SetPreHook(func(_ *server.Peer, cmd string, args ...string) bool {
		if cmd == "AUTH" && (len(args) != 2 || args[0] != "analyzer") {
			t.Errorf("AUTH with %d arguments", len(args))
		}
		return false
	})
	return m
}

func TestTLSAndUser(t *testing.T) {
	authority := credentialtest.New(t)
	m := withTLS(t, authority, "s3cret")
	url := "rediss://analyzer@" + m.Addr()
	files := authority.Client(t, "analyzer").Source()
	trusting := open(t, Config{URL: url, Password: "s3cret", TLSSource: files})
	if err := trusting.Ping(t.Context()); err != nil {
		t.Errorf("with its authority: %v", err)
	}
	named := open(t, Config{URL: "rediss://" + m.Addr(), Username: "analyzer", Password: "s3cret", TLSSource: files})
	if err := named.Ping(t.Context()); err != nil {
		t.Errorf("with the user beside the URL: %v", err)
	}
	doubting := open(t, Config{URL: url, Password: "s3cret"})
	var unknown x509.UnknownAuthorityError
	if err := doubting.Ping(t.Context()); !errors.As(err, &unknown) {
		t.Errorf("without its authority: %v", err)
	}
	stranger := open(t, Config{URL: url, Password: "s3cret", TLS: &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: authority.Pool()}})
	if err := stranger.Ping(t.Context()); !IsUnavailable(err) {
		t.Errorf("without a certificate: %v", err)
	}
}

// A password that is replaced is used by the next connection.
func TestThePasswordIsReadAtEveryConnection(t *testing.T) {
	m := miniredis.NewMiniRedis()
	m.RequireUserAuth("analyzer", "second")
	if err := m.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(m.Close)
	var password atomic.Pointer[string]
	set := func(p string) { password.Store(&p) }
	set("first")
	c := open(t, Config{URL: "redis://analyzer@" + m.Addr(), PasswordSource: func() (string, error) { return *password.Load(), nil }})
	if err := c.Ping(t.Context()); !IsUnavailable(err) {
		t.Errorf("before it was replaced: %v", err)
	}
	set("second")
	if err := c.Ping(t.Context()); err != nil {
		t.Errorf("after it was replaced: %v", err)
	}
}

func TestExactlyOneWayToReachRedis(t *testing.T) {
	sentinel := &Sentinel{Master: "m", Addresses: []string{"127.0.0.1:26379"}}
	for want, cfg := range map[string]Config{
		"exactly one":        {URL: "redis://localhost:6379", Sentinel: sentinel},
		"sentinel.master":    {Sentinel: &Sentinel{Addresses: sentinel.Addresses}},
		"sentinel.addresses": {Sentinel: &Sentinel{Master: "m"}},
		"cluster[1]":         {Cluster: []string{"a:6379", "b"}},
		"db is 3":            {Cluster: []string{"a:6379"}, DB: 3},
		"two users":          {URL: "redis://a@localhost:6379", Username: "b"},
		"rediss://":          {URL: "redis://localhost:6379", TLS: &tls.Config{MinVersion: tls.VersionTLS12}},
	} {
		if err := cfg.Validate(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %q", err, want)
		}
	}
	for _, cfg := range []Config{{URL: "redis://localhost:6379"}, {Sentinel: sentinel, DB: 2}, {Cluster: []string{"a:6379"}}} {
		if err := cfg.Validate(); err != nil {
			t.Errorf("%+v: %v", cfg, err)
		}
	}
}
