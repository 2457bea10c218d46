package gatekeeper

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cloudevents/sdk-go/v2/event"
	"pgregory.net/rapid"

	"github.com/tidewaiter/tidewaiter/services/attestor/statement"
)

var quiet = slog.New(slog.DiscardHandler)

func TestConfig(t *testing.T) {
	good := DefaultConfig()
	good.KeyFiles, good.Auth.TokenFile, good.TLS = []string{"k"}, "t", TLS{Dir: "d", Names: []string{"gatekeeper.tidewaiter.svc", "10.0.0.1", "::1"}}
	if err := good.Validate(); err != nil {
		t.Fatal(err)
	}
	for says, change := range map[string]func(*Config){
		"mode":            func(c *Config) { c.Mode = "off" },
		"accept":          func(c *Config) { c.Accept = "fail" },
		"unknownRegistry": func(c *Config) { c.UnknownRegistry = "submit" },
		"missing":         func(c *Config) { c.Missing = "admit" },
		"unavailable":     func(c *Config) { c.Unavailable = "" },
		"bundles":         func(c *Config) { c.Bundles = "disk" },
		"listen":          func(c *Config) { c.Listen = "" },
		"keyFiles":        func(c *Config) { c.KeyFiles = nil },
		"keep one":        func(c *Config) { c.Policy, c.PolicyDigest = "f", "sha256:"+strings.Repeat("0", 64) },
		"policyDigest":    func(c *Config) { c.PolicyDigest = "sha256:1" },
		"budget":          func(c *Config) { c.Budget = 0 },
		"maxBody":         func(c *Config) { c.MaxBody = 0 },
		"exempt":          func(c *Config) { c.Exempt = []string{"kube-*"} },
		"exactly one":     func(c *Config) { c.Auth = Auth{} },
		"auth: set":       func(c *Config) { c.Auth.None = true },
		"clientNames":     func(c *Config) { c.Auth.ClientNames = []string{"x"} },
		"tls: set either": func(c *Config) { c.TLS.CertFile = "c" },
		"go together":     func(c *Config) { c.TLS = TLS{CertFile: "c"} },
		"names is empty":  func(c *Config) { c.TLS.Names = nil },
		"neither a DNS":   func(c *Config) { c.TLS.Names = []string{"https://x"} },
	} {
		bad := good
		change(&bad)
		if err := bad.Validate(); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%s: %v", says, err)
		}
	}
}

// Whatever is put in which order, the memory stays within its bounds, marks
// never fall and a bundle is never replaced by an older one.
func TestMemory(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		m := newMemory(4, 4*itemOverhead+3000)
		marks := map[string]statement.Seen{}
		for range rapid.IntRange(1, 60).Draw(rt, "steps") {
			image := rapid.SampledFrom([]string{"a", "b", "c", "d", "e", "f"}).Draw(rt, "image")
			before, known := m.get(image)
			if !known {
				delete(marks, image)
			}
			i := item{seen: statement.Seen{Sequence: rapid.Int64Range(0, 9).Draw(rt, "sequence")}}
			if rapid.Bool().Draw(rt, "bundled") {
				i.bundle = &statement.Bundle{Content: make([]byte, rapid.IntRange(0, 2000).Draw(rt, "size"))}
				i.fetched = time.Unix(rapid.Int64Range(1, 9).Draw(rt, "fetched"), 0)
			}
			m.put(image, i)
			if marks[image].Before(i.seen) {
				marks[image] = i.seen
			}
			after, ok := m.get(image)
			if !ok || after.seen != marks[image] {
				rt.Fatalf("seen %+v, want %+v", after.seen, marks[image])
			}
			if known && before.bundle != nil && (after.bundle == nil || after.fetched.Before(before.fetched)) {
				rt.Fatal("a bundle was replaced by an older one or by none")
			}
			total := int64(0)
			for e := m.order.Front(); e != nil; e = e.Next() {
				total += e.Value.(*slot).item.bytes()
			}
			if total != m.bytes || m.order.Len() != len(m.items) || m.order.Len() > 4 || m.order.Len() > 1 && m.bytes > m.maxBytes {
				rt.Fatalf("%d items (%d), %d bytes, counted %d", m.order.Len(), len(m.items), total, m.bytes)
			}
		}
	})
}

// Marks are written so that the greater one is the newer one.
func TestSeenOrder(t *testing.T) {
	draw := func(rt *rapid.T, name string) statement.Seen {
		return statement.Seen{
			Sequence: rapid.OneOf(rapid.Int64Range(0, 3), rapid.Int64Range(0, math.MaxInt64)).Draw(rt, name+" sequence"),
			Time:     time.Unix(0, rapid.OneOf(rapid.Int64Range(0, 3), rapid.Int64Range(0, math.MaxInt64)).Draw(rt, name+" time")).UTC(),
		}
	}
	rapid.Check(t, func(rt *rapid.T) {
		a, b := draw(rt, "a"), draw(rt, "b")
		if a.Before(b) != (formatSeen(a) < formatSeen(b)) {
			rt.Fatalf("%+v, %+v", a, b)
		}
		if got, err := parseSeen(formatSeen(a)); err != nil || got != a {
			rt.Fatalf("%+v, %v", got, err)
		}
	})
	for _, bad := range []string{"x", "1", "1.", ".1", "99999999999999999999.1"} {
		if _, err := parseSeen(bad); err == nil {
			t.Errorf("%q was read", bad)
		}
	}
}

func TestFlights(t *testing.T) {
	f := newFlights[int](context.Background())
	open := make(chan struct{})
	var runs atomic.Int64
	work := func(context.Context) (int, error) {
		runs.Add(1)
		<-open
		return 7, errors.New("so it is")
	}
	impatient, cancel := context.WithCancel(t.Context())
	var group sync.WaitGroup
	group.Go(func() { // its work goes on
		if _, err := f.do(impatient, "k", work); !errors.Is(err, context.Canceled) {
			t.Errorf("got %v", err)
		}
	})
	for deadline := time.Now().Add(10 * time.Second); runs.Load() == 0; {
		if time.Now().After(deadline) {
			t.Fatal("nothing runs")
		}
	}
	cancel()
	if _, err := f.do(impatient, "never", work); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	for range 50 {
		group.Go(func() {
			if v, err := f.do(context.Background(), "k", work); v != 7 || err == nil {
				t.Errorf("got %d, %v", v, err)
			}
		})
	}
	if v, err := f.do(t.Context(), "other", func(context.Context) (int, error) { return 1, nil }); v != 1 || err != nil {
		t.Errorf("got %d, %v", v, err)
	}
	if n := runs.Load(); n != 1 {
		t.Errorf("%d ran at once", n)
	}
	close(open)
	group.Wait()
	f.wait()
	if len(f.running) != 0 {
		t.Errorf("%d still run", len(f.running))
	}

	// What is over the bound is told so at once.
	open = make(chan struct{})
	before := runs.Load() // those who came after the end ran it again
	for i := range maxFlights {
		group.Go(func() { _, _ = f.do(context.Background(), fmt.Sprint(i), work) }) // as above
	}
	for deadline := time.Now().Add(10 * time.Second); runs.Load() != before+maxFlights; {
		if time.Now().After(deadline) {
			t.Fatalf("%d run", runs.Load()-before)
		}
	}
	if _, err := f.do(t.Context(), "one more", work); !errors.Is(err, errBusy) {
		t.Errorf("got %v", err)
	}
	close(open)
	group.Wait()
	f.wait()
}

func write(t testing.TB, path string, content []byte) {
	t.Helper()
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestFilesAreReadAgain(t *testing.T) {
	path := filepath.Join(t.TempDir(), "token")
	write(t, path, []byte("first"))
	f, err := newFiles(quiet, func(c [][]byte) (string, error) {
		if len(c[0]) == 0 {
			return "", errors.New("empty")
		}
		return string(c[0]), nil
	}, path)
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	f.now = func() time.Time { return now }
	step := func(want string) {
		t.Helper()
		now = now.Add(2 * rereadEvery)
		if got := f.get(); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
	step("first")
	write(t, path, []byte("the second"))
	step("the second")
	write(t, path, nil)
	step("the second")
	write(t, path, []byte("third"))
	step("third")
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	step("third")
	write(t, path, make([]byte, maxFile+1))
	step("third")
}

func TestBearerToken(t *testing.T) {
	path := filepath.Join(t.TempDir(), "token")
	write(t, path, []byte("old\nnew\n"))
	c, err := newCaller(Auth{TokenFile: path}, quiet)
	if err != nil {
		t.Fatal(err)
	}
	for header, want := range map[string]bool{
		"Bearer old": true, "bearer new": true, "Bearer  new": true,
		"": false, "Bearer": false, "Bearer ": false, "Bearer old2": false, "Basic old": false, "old": false, "Bearer old\nnew": false,
	} {
		r := httptest.NewRequestWithContext(t.Context(), http.MethodPost, "/validate", nil)
		r.Header["Authorization"] = []string{header}
		if c.may(r) != want {
			t.Errorf("%q: %t", header, !want)
		}
	}
	for _, bad := range []string{"", "\n \n", "a\nb\nc"} {
		write(t, path, []byte(bad))
		if _, err := newCaller(Auth{TokenFile: path}, quiet); err == nil {
			t.Errorf("%q was accepted", bad)
		}
	}
}

// The certificate is renewed and the authority replaced without a moment at
// which somebody who trusts the bundle of a year ago is refused.
func TestOwnCertificate(t *testing.T) {
	dir := t.TempDir()
	now := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	names := []string{"gatekeeper.tidewaiter.svc", "127.0.0.1"}
	own, err := newOwnCertificate(dir, names, quiet, func() time.Time { return now })
	if err != nil {
		t.Fatal(err)
	}
	bundleNow := func() []byte {
		b, err := os.ReadFile(filepath.Join(dir, BundleFile))
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	trusted := bundleNow() // as configured in the cluster, once a year
	serials, authorities := map[string]bool{}, map[string]bool{string(trusted): true}
	for day := range 25 * 365 {
		now = now.Add(24 * time.Hour)
		if day%10 != 0 {
			continue
		}
		if err := own.renew(); err != nil {
			t.Fatal(err)
		}
		if day%300 == 0 {
			trusted = bundleNow()
			authorities[string(trusted)] = true
		}
		pool := x509.NewCertPool()
		pool.AppendCertsFromPEM(trusted)
		leaf := own.current().Leaf
		serials[leaf.SerialNumber.String()] = true
		for _, name := range names {
			if _, err := leaf.Verify(x509.VerifyOptions{DNSName: name, Roots: pool, CurrentTime: now}); err != nil {
				t.Fatalf("day %d, %s: %v", day, name, err)
			}
		}
		if left := leaf.NotAfter.Sub(now); left < servingRenew-10*24*time.Hour {
			t.Fatalf("day %d: %s left", day, left)
		}
	}
	if len(serials) < 200 || len(authorities) < 4 {
		t.Errorf("%d certificates, %d bundles in 25 years", len(serials), len(authorities))
	}

	// A second replica uses the same; other names need another certificate.
	second, err := newOwnCertificate(dir, names, quiet, func() time.Time { return now })
	if err != nil {
		t.Fatal(err)
	}
	if !second.current().Leaf.Equal(own.current().Leaf) {
		t.Error("the second replica made a certificate of its own")
	}
	renamed, err := newOwnCertificate(dir, []string{"other.svc"}, quiet, func() time.Time { return now })
	if err != nil {
		t.Fatal(err)
	}
	if err := renamed.current().Leaf.VerifyHostname("other.svc"); err != nil {
		t.Error(err)
	}
	for _, secret := range []string{servingFile} {
		info, err := os.Stat(filepath.Join(dir, secret))
		if err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", secret, info.Mode(), err)
		}
	}
	write(t, filepath.Join(dir, servingFile), []byte("broken"))
	if err := own.renew(); err == nil || own.current() == nil {
		t.Errorf("a broken file: %v", err)
	}
}

// Replicas that start at once agree on one authority.
func TestOwnCertificateTogether(t *testing.T) {
	dir := t.TempDir()
	var group sync.WaitGroup
	made := make([]*ownCertificate, 8)
	for i := range made {
		group.Go(func() {
			o, err := newOwnCertificate(dir, []string{"localhost"}, quiet, time.Now)
			if err != nil {
				t.Errorf("replica %d: %v", i, err)
				return
			}
			made[i] = o
		})
	}
	group.Wait()
	bundle, err := os.ReadFile(filepath.Join(dir, BundleFile))
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(bundle)
	for _, o := range made {
		if o == nil {
			continue
		}
		if _, err := o.current().Leaf.Verify(x509.VerifyOptions{DNSName: "localhost", Roots: pool}); err != nil {
			t.Error(err)
		}
	}
}

// The client's certificate decides who may call.
func TestClientCertificates(t *testing.T) {
	dir := t.TempDir()
	pairOf := func(name string, signer *pair, ca bool) *pair {
		p, err := newPair(&x509.Certificate{
			Subject: pkix.Name{CommonName: name}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IsCA: ca, BasicConstraintsValid: true,
			KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
		}, signer)
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	authority, foreign := pairOf("authority", nil, true), pairOf("authority", nil, true)
	caFile := filepath.Join(dir, "ca.crt")
	write(t, caFile, authority.pem)
	c, err := newCaller(Auth{ClientCAFile: caFile, ClientNames: []string{"kube-apiserver"}}, quiet)
	if err != nil {
		t.Fatal(err)
	}
	own, err := newOwnCertificate(filepath.Join(dir, "own"), []string{"127.0.0.1"}, quiet, time.Now)
	if err != nil {
		t.Fatal(err)
	}
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !c.may(r) {
			w.WriteHeader(http.StatusUnauthorized)
		}
	}))
	server.TLS = serverTLS(own.current, c)
	server.Config.ErrorLog = slog.NewLogLogger(quiet.Handler(), slog.LevelError)
	server.StartTLS()
	defer server.Close()
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(own.bundle)
	for name, test := range map[string]struct {
		client *pair
		want   int // 0: the handshake fails
	}{
		"the API server":      {pairOf("kube-apiserver", authority, false), http.StatusOK},
		"another name":        {pairOf("kubelet", authority, false), http.StatusUnauthorized},
		"another authority":   {pairOf("kube-apiserver", foreign, false), 0},
		"without certificate": {nil, 0},
	} {
		config := &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12}
		if test.client != nil {
			config.Certificates = []tls.Certificate{{Certificate: [][]byte{test.client.cert.Raw}, PrivateKey: test.client.key}}
		}
		client := &http.Client{Transport: &http.Transport{TLSClientConfig: config}}
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, server.URL+"/validate", nil)
		if err != nil {
			t.Fatal(err)
		}
		got := 0
		if resp, err := client.Do(req); err == nil {
			got = resp.StatusCode
			_ = resp.Body.Close()
		}
		client.CloseIdleConnections()
		if got != test.want {
			t.Errorf("%s: %d, want %d", name, got, test.want)
		}
	}
}

// publisher is a Kafka that can be away.
type publisher struct {
	mu     sync.Mutex
	away   int // calls that fail
	events []event.Event
}

func (p *publisher) Publish(_ context.Context, events ...event.Event) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.away > 0 {
		p.away--
		return errors.New("away")
	}
	p.events = append(p.events, events...)
	return nil
}

func (p *publisher) count() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.events)
}

// Events wait for Kafka within bounds; nobody waits for them.
func TestQueue(t *testing.T) {
	w := newWorld(t, nil)
	q, p := w.g.queue, &publisher{away: 1}
	for i := range queueEvents + 5 {
		ev := event.New()
		ev.SetID(fmt.Sprint(i))
		q.add(ev)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		q.run(ctx, p)
	}()
	for deadline := time.Now().Add(30 * time.Second); p.count() < queueEvents; {
		if time.Now().After(deadline) {
			t.Fatalf("%d events were published", p.count())
		}
	}
	cancel()
	<-done
	for i, ev := range p.events {
		if ev.ID() != fmt.Sprint(i) {
			t.Fatalf("event %d is %s", i, ev.ID())
		}
	}
	// What waits when it stops is published still.
	q.add(event.New())
	q.run(ctx, p)
	if p.count() != queueEvents+1 {
		t.Errorf("%d events", p.count())
	}
}
