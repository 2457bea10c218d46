package intake

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"log/slog"
	"maps"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

const (
	testTopic   = "arn:aws:sns:eu-central-1:210987654321:ecr-events"
	testSNSHost = "sns.eu-central-1.amazonaws.com"
	testCertURL = "https://" + testSNSHost + "/SimpleNotificationService-0123abcd.pem"
)

// amazon is SNS on this machine: TLS with a certificate for its host name, from
// an authority of our own, and the signing certificate that it serves.
type amazon struct {
	transport *http.Transport
	signing   *rsa.PrivateKey

	mu        sync.Mutex
	files     map[string][]byte
	hosts     []string     // that were dialled
	asked     []url.Values // queries
	confirmed int          // status of the answer to a confirmation
}

func newAmazon(t *testing.T) *amazon {
	t.Helper()
	a := &amazon{signing: rsaKey(t), files: map[string][]byte{}, confirmed: http.StatusOK}
	authority := rsaKey(t)
	root := certificate(t, authority.Public(), authority, nil, x509.Certificate{
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	})
	hostKey := rsaKey(t)
	host := certificate(t, hostKey.Public(), authority, root, x509.Certificate{DNSNames: []string{testSNSHost}})
	a.serve("/SimpleNotificationService-0123abcd.pem", certificate(t, a.signing.Public(), authority, root, x509.Certificate{}))

	server := httptest.NewUnstartedServer(http.HandlerFunc(a.answer))
	server.TLS = &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{host.Raw}, PrivateKey: hostKey}}, MinVersion: tls.VersionTLS12}
	server.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)
	server.StartTLS()
	t.Cleanup(server.Close)
	roots := x509.NewCertPool()
	roots.AddCert(root)
	a.transport = &http.Transport{
		DisableKeepAlives: true, TLSClientConfig: &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12},
		DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			a.mu.Lock()
			a.hosts = append(a.hosts, addr)
			a.mu.Unlock()
			var d net.Dialer
			return d.DialContext(ctx, network, server.Listener.Addr().String())
		},
	}
	return a
}

func (a *amazon) serve(path string, c *x509.Certificate) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.files[path] = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})
}

func (a *amazon) answer(w http.ResponseWriter, r *http.Request) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if r.URL.Path == "/" {
		a.asked = append(a.asked, r.URL.Query())
		w.WriteHeader(a.confirmed)
		return
	}
	file, ok := a.files[r.URL.Path]
	if !ok {
		w.WriteHeader(http.StatusNotFound)
		return
	}
	_, _ = w.Write(file)
}

func certificate(t *testing.T, public crypto.PublicKey, by crypto.Signer, parent *x509.Certificate, c x509.Certificate) *x509.Certificate {
	t.Helper()
	c.SerialNumber, c.Subject = big.NewInt(1), pkix.Name{CommonName: "sns.amazonaws.com"}
	if c.NotAfter.IsZero() {
		c.NotBefore, c.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
	}
	if parent == nil {
		parent = &c
	}
	der, err := x509.CreateCertificate(rand.Reader, &c, parent, public, by)
	if err != nil {
		t.Fatal(err)
	}
	parsed, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return parsed
}

// snsBody is a message by its fields.
type snsBody map[string]string

func ecrPush(tag string) string {
	return `{"id":"e-` + tag + `","detail-type":"ECR Image Action","source":"aws.ecr","account":"210987654321","region":"eu-central-1",` +
		`"detail":{"result":"SUCCESS","action-type":"PUSH","repository-name":"team/app","image-tag":"` + tag + `"}}`
}

func notice() snsBody {
	return snsBody{
		"Type": snsNotification, "MessageId": "m-1", "TopicArn": testTopic, "Message": ecrPush("1"), "Timestamp": "2026-01-02T03:04:05.678Z",
		"SignatureVersion": "2", "SigningCertURL": testCertURL,
		"UnsubscribeURL": "https://" + testSNSHost + "/?Action=Unsubscribe",
	}
}

func confirmation(typ string) snsBody {
	return snsBody{
		"Type": typ, "MessageId": "m-2", "TopicArn": testTopic, "Message": "You have chosen to subscribe", "Token": "t0k&en",
		"SubscribeURL": "https://" + testSNSHost + "/?Action=ConfirmSubscription", "Timestamp": "2026-01-02T03:04:05.678Z",
		"SignatureVersion": "1", "SigningCertURL": testCertURL,
	}
}

// signed puts the signature in, as Amazon's description has it, written apart
// from the code under test.
func (b snsBody) signed(t *testing.T, key *rsa.PrivateKey) snsBody {
	t.Helper()
	out := maps.Clone(b)
	names := []string{"Message", "MessageId", "Subject", "Timestamp", "TopicArn", "Type"}
	if b["Type"] != snsNotification {
		names = []string{"Message", "MessageId", "SubscribeURL", "Timestamp", "Token", "TopicArn", "Type"}
	}
	var text bytes.Buffer
	for _, n := range names {
		if v, ok := b[n]; ok {
			text.WriteString(n + "\n" + v + "\n")
		}
	}
	algorithm, sum := crypto.SHA256, sha256.New()
	if b["SignatureVersion"] == "1" {
		algorithm, sum = crypto.SHA1, sha1.New()
	}
	sum.Write(text.Bytes())
	sig, err := rsa.SignPKCS1v15(rand.Reader, key, algorithm, sum.Sum(nil))
	if err != nil {
		t.Fatal(err)
	}
	out["Signature"] = base64.StdEncoding.EncodeToString(sig)
	return out
}

func (b snsBody) with(name, value string) snsBody {
	out := maps.Clone(b)
	out[name] = value
	return out
}

func (b snsBody) bytes(t *testing.T) []byte {
	t.Helper()
	out, err := json.Marshal(b)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func startSNS(t *testing.T, transport http.RoundTripper) (*Intake, *memory) {
	t.Helper()
	m := &memory{}
	sources := Sources{"s": {Kind: "ecr", AnyRegistry: true, Auth: Auth{SNS: &SNSAuth{TopicARN: testTopic}}}}
	s, err := newIntake(DefaultConfig(), sources, m, transport, slog.New(slog.DiscardHandler), prometheus.NewRegistry())
	if err != nil {
		t.Fatal(err)
	}
	return s, m
}

func postSNS(s *Intake, body []byte) int {
	h := http.Header{"Content-Type": {"text/plain; charset=UTF-8"}}
	return call(s, http.MethodPost, "/hooks/s", h, body).Code
}

func TestSNS(t *testing.T) {
	a := newAmazon(t)
	other := rsaKey(t)
	elsewhere := certificate(t, other.Public(), other, nil, x509.Certificate{})
	a.serve("/SimpleNotificationService-old.pem", certificate(t, a.signing.Public(), a.signing, nil, x509.Certificate{
		NotBefore: time.Now().Add(-2 * time.Hour), NotAfter: time.Now().Add(-time.Hour),
	}))
	curve, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	a.serve("/SimpleNotificationService-curve.pem", certificate(t, curve.Public(), curve, nil, x509.Certificate{}))
	a.serve("/other.pem", elsewhere)
	a.mu.Lock()
	a.files["/SimpleNotificationService-text.pem"] = []byte("hello")
	a.mu.Unlock()
	good := notice().signed(t, a.signing)
	at := func(address string) []byte { return good.with("SigningCertURL", address).bytes(t) }
	replaced := func(name, value string) []byte { return good.with(name, value).bytes(t) }
	without := func(name string) []byte {
		b := maps.Clone(good)
		delete(b, name)
		return b.bytes(t)
	}
	for name, c := range map[string]struct {
		body []byte
		want int
		why  string
	}{
		"version 2":              {good.bytes(t), http.StatusAccepted, ""},
		"version 1":              {notice().with("SignatureVersion", "1").signed(t, a.signing).bytes(t), http.StatusAccepted, ""},
		"with a subject":         {notice().with("Subject", "hello").signed(t, a.signing).bytes(t), http.StatusAccepted, ""},
		"missing":                {without("Signature"), 401, "no signature"},
		"not base64":             {replaced("Signature", "%"), 401, "no signature"},
		"another body":           {replaced("Message", ecrPush("2")), 401, "not the message's"},
		"another time":           {replaced("Timestamp", "2026-01-02T03:04:06Z"), 401, "not the message's"},
		"a subject added":        {replaced("Subject", "x"), 401, "not the message's"},
		"another type":           {replaced("Type", snsSubscribe), 401, "not the message's"},
		"type that is none":      {replaced("Type", "Hello"), 401, "type"},
		"of another key":         {notice().signed(t, other).bytes(t), 401, "not the message's"},
		"version 1 as version 2": {notice().with("SignatureVersion", "1").signed(t, a.signing).with("SignatureVersion", "2").bytes(t), 401, "not the message's"},
		"version 3":              {replaced("SignatureVersion", "3"), 401, "neither 1 nor 2"},
		"another topic":          {notice().with("TopicArn", testTopic+"2").signed(t, a.signing).bytes(t), 401, "another topic"},
		"no JSON":                {[]byte("hello"), 401, "not a message"},
		"empty":                  {nil, 401, "not a message"},

		"no certificate":             {without("SigningCertURL"), 401, "address"},
		"certificate over HTTP":      {at(strings.Replace(testCertURL, "https:", "http:", 1)), 401, "address"},
		"on a foreign host":          {at("https://evil.example/SimpleNotificationService-0123abcd.pem"), 401, "address"},
		"on a host that looks alike": {at("https://" + testSNSHost + ".evil.example/SimpleNotificationService-0123abcd.pem"), 401, "address"},
		"in another region":          {at(strings.Replace(testCertURL, "eu-central-1", "us-east-1", 1)), 401, "address"},
		"on another service":         {at(strings.Replace(testCertURL, "sns.", "s3.", 1)), 401, "address"},
		"with a user":                {at(strings.Replace(testCertURL, "//", "//"+testSNSHost+"@", 1)), 401, "address"},
		"on another port":            {at(strings.Replace(testCertURL, ".com/", ".com:8443/", 1)), 401, "address"},
		"with a query":               {at(testCertURL + "?x=.pem"), 401, "address"},
		"on another path":            {at("https://" + testSNSHost + "/other.pem"), 401, "address"},
		"on a path with an escape":   {at("https://" + testSNSHost + "/%2e%2e/SimpleNotificationService-0123abcd.pem"), 401, "address"},
		"that has expired":           {at("https://" + testSNSHost + "/SimpleNotificationService-old.pem"), 401, "not valid today"},
		"of another algorithm":       {at("https://" + testSNSHost + "/SimpleNotificationService-curve.pem"), 401, "RSA"},
		// What cannot be fetched may be there later.
		"that is not there": {at("https://" + testSNSHost + "/SimpleNotificationService-none.pem"), 503, "cannot be checked"},
		"that is none":      {at("https://" + testSNSHost + "/SimpleNotificationService-text.pem"), 503, "cannot be checked"},
	} {
		t.Run(name, func(t *testing.T) {
			s, m := startSNS(t, a.transport)
			var refused delivery
			s.refused = func(d delivery) { refused = d }
			if got := postSNS(s, c.body); got != c.want || (len(m.events) == 1) != (c.want == http.StatusAccepted) || !strings.Contains(refused.trouble, c.why) {
				t.Errorf("got %d and %d events, %q, want %d, %q", got, len(m.events), refused.trouble, c.want, c.why)
			}
			if len(m.letters) != 0 {
				t.Errorf("letters: %+v", m.letters)
			}
		})
	}
	for _, h := range a.hosts {
		if h != testSNSHost+":443" {
			t.Errorf("%s was dialled", h)
		}
	}
}

// TestSNSEnvelope: of a signed message only what is signed counts.
func TestSNSEnvelope(t *testing.T) {
	a := newAmazon(t)
	s, m := startSNS(t, a.transport)
	body := notice().signed(t, a.signing).bytes(t)
	forged := bytes.Replace(body, []byte(`{"`), []byte(`{"Records":[{"body":`+string(mustJSON(t, ecrPush("forged")))+`}],"specversion":"1.0","body":"x","`), 1)
	if got := postSNS(s, forged); got != http.StatusAccepted {
		t.Fatalf("got %d", got)
	}
	if pushes := m.pushes(t); len(pushes) != 1 || pushes[0].Tag != "1" {
		t.Errorf("published %+v, want the signed push alone", pushes)
	}
}

func mustJSON(t *testing.T, v any) []byte {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestSNSConfirmation(t *testing.T) {
	a := newAmazon(t)
	s, m := startSNS(t, a.transport)
	var calls []delivery
	s.record = func(d delivery) { calls = append(calls, d) }
	evil := confirmation(snsSubscribe).with("SubscribeURL", "https://evil.example/?Action=ConfirmSubscription")

	if got := postSNS(s, confirmation(snsSubscribe).with("Signature", "eA==").bytes(t)); got != 401 || len(a.asked) != 0 {
		t.Fatalf("unsigned: got %d and %d confirmations", got, len(a.asked))
	}
	// Even a signed URL is not followed; the one that is asked is ours.
	for i, body := range []snsBody{confirmation(snsSubscribe), evil} {
		if got := postSNS(s, body.signed(t, a.signing).bytes(t)); got != http.StatusOK || len(a.asked) != i+1 {
			t.Fatalf("got %d and %d confirmations", got, len(a.asked))
		}
		if q := a.asked[i]; q.Get("Action") != "ConfirmSubscription" || q.Get("TopicArn") != testTopic || q.Get("Token") != "t0k&en" {
			t.Errorf("asked for %v", q)
		}
	}
	a.mu.Lock()
	a.confirmed = http.StatusForbidden
	a.mu.Unlock()
	if got := postSNS(s, confirmation(snsSubscribe).signed(t, a.signing).bytes(t)); got != http.StatusServiceUnavailable {
		t.Errorf("a confirmation that failed: got %d, want 503, so that SNS asks again", got)
	}
	asked := len(a.asked)
	if got := postSNS(s, confirmation(snsUnsubscribe).signed(t, a.signing).bytes(t)); got != http.StatusOK || len(a.asked) != asked {
		t.Errorf("unsubscribed: got %d, and %d calls", got, len(a.asked)-asked)
	}
	for _, h := range a.hosts {
		if h != testSNSHost+":443" {
			t.Errorf("%s was dialled", h)
		}
	}
	if len(m.events)+len(m.letters) != 0 || len(calls) != 3 || calls[0].reason != reasonHandshake {
		t.Errorf("%d events, %d letters, %+v", len(m.events), len(m.letters), calls)
	}
}

// TestSNSRotation: certificates are cached, and a new one is taken.
func TestSNSRotation(t *testing.T) {
	a := newAmazon(t)
	s, _ := startSNS(t, a.transport)
	next := rsaKey(t)
	a.serve("/SimpleNotificationService-next.pem", certificate(t, next.Public(), next, nil, x509.Certificate{}))
	for range 3 {
		if got := postSNS(s, notice().signed(t, a.signing).bytes(t)); got != http.StatusAccepted {
			t.Fatalf("got %d", got)
		}
	}
	if len(a.hosts) != 1 {
		t.Errorf("the certificate was fetched %d times", len(a.hosts))
	}
	moved := notice().with("SigningCertURL", "https://"+testSNSHost+"/SimpleNotificationService-next.pem")
	if got := postSNS(s, moved.signed(t, next).bytes(t)); got != http.StatusAccepted {
		t.Errorf("new certificate: got %d", got)
	}
	if got := postSNS(s, moved.signed(t, a.signing).bytes(t)); got != 401 {
		t.Errorf("the old key under the new certificate: got %d, want 401", got)
	}
}

// TestSNSUntrusted: a server that TLS does not trust gives no certificate.
func TestSNSUntrusted(t *testing.T) {
	a := newAmazon(t)
	transport := a.transport.Clone()
	transport.TLSClientConfig = &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: x509.NewCertPool()}
	s, m := startSNS(t, transport)
	if got := postSNS(s, notice().signed(t, a.signing).bytes(t)); got != http.StatusServiceUnavailable || len(m.events) != 0 {
		t.Errorf("got %d and %d events", got, len(m.events))
	}
}

func TestSNSErrorHidesToken(t *testing.T) {
	s := &snsVerifier{topic: testTopic, host: testSNSHost, client: &http.Client{Transport: failing{}}}
	if err := s.confirm(t.Context(), "hunter2"); err == nil || strings.Contains(err.Error(), "hunter2") {
		t.Errorf("got %v", err)
	}
}

type failing struct{}

func (failing) RoundTrip(*http.Request) (*http.Response, error) { return nil, errors.New("no network") }

func TestSNSMistakes(t *testing.T) {
	for topic, ok := range map[string]bool{
		testTopic: true,
		"arn:aws-cn:sns:cn-north-1:210987654321:t.fifo":   true,
		"arn:aws-us-gov:sns:us-gov-west-1:210987654321:t": true,
		"": false,
		"arn:aws:sqs:eu-central-1:210987654321:t":       false,
		"arn:aws:sns:evil.example/:210987654321:t":      false,
		"arn:aws:sns:eu-central-1:21:t":                 false,
		"arn:aws:sns:eu-central-1:210987654321:t/../x":  false,
		"arn:aws:sns:eu_central_1:210987654321:t":       false,
		"https://sns.eu-central-1.amazonaws.com/":       false,
		"arn:aws:sns:eu-central-1:210987654321:a\nb":    false,
		"arn:aws:sns:eu-central-1:210987654321:" + "t ": false,
	} {
		err := Sources{"x": {Kind: "ecr", AnyRegistry: true, Auth: Auth{SNS: &SNSAuth{TopicARN: topic}}}}.Validate()
		if (err == nil) != ok {
			t.Errorf("%q: got %v", topic, err)
		}
	}
	if host, err := (SNSAuth{TopicARN: "arn:aws-cn:sns:cn-north-1:210987654321:t"}).host(); err != nil || host != "sns.cn-north-1.amazonaws.com.cn" {
		t.Errorf("China: %q, %v", host, err)
	}
	err := Sources{"x": {Kind: "gar", AnyRegistry: true, Auth: Auth{SNS: &SNSAuth{TopicARN: testTopic}}}}.Validate()
	if err == nil || !strings.Contains(err.Error(), "kind ecr") {
		t.Errorf("another kind: got %v", err)
	}
}
