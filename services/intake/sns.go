package intake

import (
	"context"
	"crypto"
	"crypto/rsa"
	"crypto/sha1" //nolint:gosec // signature version 1 of SNS, which topics have unless told otherwise
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/url"
	"regexp"
	"strings"
	"sync"
	"time"

	"github.com/tidewaiter/tidewaiter/services/intake/hook"
)

// SNSAuth is the signature that Amazon SNS makes of each message
// (docs.aws.amazon.com, SNS, "Verifying the signatures of Amazon SNS messages").
// The subscription of the topic is confirmed by itself.
type SNSAuth struct {
	TopicARN string `yaml:"topicARN"` // of the one topic that is listened to
}

// snsMessage is what SNS posts. Everything but the certificate's address and the
// signature itself is signed.
type snsMessage struct {
	Type             string  `json:"Type"`
	MessageID        string  `json:"MessageId"`
	TopicARN         string  `json:"TopicArn"`
	Subject          *string `json:"Subject"`
	Message          string  `json:"Message"`
	Timestamp        string  `json:"Timestamp"`
	Token            string  `json:"Token"`
	SubscribeURL     string  `json:"SubscribeURL"`
	SignatureVersion string  `json:"SignatureVersion"`
	Signature        string  `json:"Signature"`
	SigningCertURL   string  `json:"SigningCertURL"`
}

// Types of messages of SNS.
const (
	snsNotification = "Notification"
	snsSubscribe    = "SubscriptionConfirmation"
	snsUnsubscribe  = "UnsubscribeConfirmation"
)

var (
	snsTopic    = regexp.MustCompile(`^arn:aws[a-z-]*:sns:([a-z0-9-]+):[0-9]{12}:[A-Za-z0-9_-]{1,256}(?:\.fifo)?$`)
	snsCertPath = regexp.MustCompile(`^/SimpleNotificationService-[A-Za-z0-9]{1,64}\.pem$`)
)

// certsKept bounds the certificates that are kept; SNS uses one a region and
// replaces it now and then.
const certsKept = 8

const certsAtOnce = 4

// host returns the one host of the topic's region that is ever called.
func (a SNSAuth) host() (string, error) {
	m := snsTopic.FindStringSubmatch(a.TopicARN)
	if m == nil || hook.AWSDomain(m[1]) == "" {
		return "", fmt.Errorf("auth.sns.topicARN %q is not arn:aws:sns:<region>:<account>:<topic>", a.TopicARN)
	}
	return "sns." + m[1] + "." + hook.AWSDomain(m[1]), nil
}

// newSNS returns a verifier of SNS's messages. Nothing is fetched before the
// first call.
func newSNS(auth SNSAuth, transport http.RoundTripper, log *slog.Logger) (*verifier, error) {
	host, err := auth.host()
	if err != nil {
		return nil, err
	}
	s := &snsVerifier{
		topic: auth.TopicARN, host: host, client: fetcher(transport), now: time.Now, log: log,
		slots: make(chan struct{}, certsAtOnce), certs: map[string]*x509.Certificate{},
	}
	return &verifier{needBody: true, outside: s.check}, nil
}

type snsVerifier struct {
	topic, host string
	client      *http.Client
	now         func() time.Time
	log         *slog.Logger

	slots chan struct{} // one for each certificate that is being fetched

	mu    sync.Mutex
	certs map[string]*x509.Certificate // by URL
}

// check returns the message in a signed notification, and errGreeted for a
// confirmation, with which there is nothing left to do; errUnchecked; or, in
// words of ours, why the call is refused.
func (s *snsVerifier) check(ctx context.Context, offered offer) ([]byte, error) {
	var m snsMessage
	if err := json.Unmarshal(offered.signed, &m); err != nil {
		return nil, errors.New("the body is not a message of SNS")
	}
	if m.TopicARN != s.topic {
		return nil, errors.New("the message is of another topic")
	}
	if err := s.checkSignature(ctx, m); err != nil {
		return nil, err
	}
	switch m.Type {
	case snsNotification:
		return []byte(m.Message), nil
	case snsSubscribe:
		if err := s.confirm(ctx, m.Token); err != nil {
			return nil, fmt.Errorf("confirm the subscription: %w: %w", errUnchecked, err)
		}
		s.log.InfoContext(ctx, "subscription of a topic is confirmed", "topic", s.topic)
		return nil, errGreeted
	default: // signed as snsUnsubscribe
		s.log.WarnContext(ctx, "a topic sends nothing more: somebody ended the subscription", "topic", s.topic)
		return nil, errGreeted
	}
}

// errGreeted says that an authentic call tells of no image and is answered.
var errGreeted = errors.New("the call is a greeting")

func (s *snsVerifier) checkSignature(ctx context.Context, m snsMessage) error {
	text, err := m.canonical()
	if err != nil {
		return err
	}
	signature, err := base64.StdEncoding.DecodeString(m.Signature)
	if err != nil || len(signature) == 0 {
		return errors.New("the message has no signature, or one that is not base64")
	}
	var algorithm crypto.Hash
	var sum []byte
	switch m.SignatureVersion {
	case "1":
		h := sha1.Sum(text) //nolint:gosec // what the version says
		algorithm, sum = crypto.SHA1, h[:]
	case "2":
		h := sha256.Sum256(text)
		algorithm, sum = crypto.SHA256, h[:]
	default:
		return errors.New("the signature's version is neither 1 nor 2")
	}
	if err := s.allowed(m.SigningCertURL); err != nil {
		return err
	}
	cert, err := s.cert(ctx, m.SigningCertURL)
	if err != nil {
		return fmt.Errorf("the certificate: %w: %w", errUnchecked, err)
	}
	if now := s.now(); now.Before(cert.NotBefore) || now.After(cert.NotAfter) {
		return errors.New("the certificate is not valid today")
	}
	public, ok := cert.PublicKey.(*rsa.PublicKey)
	if !ok || public.N.BitLen() < minRSABits {
		return errors.New("the certificate has no RSA key of at least 2048 bits")
	}
	if rsa.VerifyPKCS1v15(public, algorithm, sum, signature) != nil {
		return errors.New("the signature is not the message's")
	}
	return nil
}

// canonical returns what is signed: names and values, a line each, in the order
// of the names.
func (m snsMessage) canonical() ([]byte, error) {
	var pairs []string
	switch m.Type {
	case snsNotification:
		pairs = []string{"Message", m.Message, "MessageId", m.MessageID}
		if m.Subject != nil {
			pairs = append(pairs, "Subject", *m.Subject)
		}
		pairs = append(pairs, "Timestamp", m.Timestamp)
	case snsSubscribe, snsUnsubscribe:
		pairs = []string{
			"Message", m.Message, "MessageId", m.MessageID, "SubscribeURL", m.SubscribeURL,
			"Timestamp", m.Timestamp, "Token", m.Token,
		}
	default:
		return nil, errors.New("the message's type is none of SNS's")
	}
	pairs = append(pairs, "TopicArn", m.TopicARN, "Type", m.Type)
	return []byte(strings.Join(pairs, "\n") + "\n"), nil
}

// allowed says what is wrong with a certificate's address. Only SNS in the
// topic's region is ever asked.
func (s *snsVerifier) allowed(address string) error {
	u, err := url.Parse(address)
	if err != nil || u.Scheme != "https" || u.Host != s.host || u.User != nil || u.RawQuery != "" || u.Fragment != "" ||
		!snsCertPath.MatchString(u.EscapedPath()) {
		return errors.New("the certificate's address is not one of SNS in the topic's region")
	}
	return nil
}

// cert returns a certificate from the cache or from SNS. That it is SNS's is
// proven by the TLS connection to the one allowed host.
func (s *snsVerifier) cert(ctx context.Context, address string) (*x509.Certificate, error) {
	if c := s.cached(address); c != nil {
		return c, nil
	}
	// Anybody can name certificates that are not there: few are asked for at once.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), fetchTimeout)
	defer cancel()
	select {
	case s.slots <- struct{}{}:
		defer func() { <-s.slots }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if c := s.cached(address); c != nil { // somebody else fetched it
		return c, nil
	}
	c, err := fetchCert(ctx, s.client, address)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.certs) >= certsKept {
		clear(s.certs)
	}
	s.certs[address] = c
	return c, nil
}

func (s *snsVerifier) cached(address string) *x509.Certificate {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.certs[address]
}

func fetchCert(ctx context.Context, client *http.Client, address string) (*x509.Certificate, error) {
	b, err := get(ctx, client, address)
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(b)
	if block == nil || block.Type != "CERTIFICATE" {
		return nil, errors.New("it is not PEM")
	}
	c, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("parse: %w", err)
	}
	return c, nil
}

// confirm tells SNS that the subscription is wanted (SNS API, ConfirmSubscription).
// The address is made here; of the message there is only the signed token.
func (s *snsVerifier) confirm(ctx context.Context, token string) error {
	query := url.Values{"Action": {"ConfirmSubscription"}, "TopicArn": {s.topic}, "Token": {token}, "Version": {"2010-03-31"}}
	ctx, cancel := context.WithTimeout(ctx, fetchTimeout)
	defer cancel()
	_, err := get(ctx, s.client, (&url.URL{Scheme: "https", Host: s.host, Path: "/", RawQuery: query.Encode()}).String())
	var failed *url.Error
	if errors.As(err, &failed) { // it would show the token
		return failed.Err
	}
	return err
}
