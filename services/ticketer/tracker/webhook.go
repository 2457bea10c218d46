package tracker

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/cloudevents/sdk-go/v2/event"
)

// Headers of a delivery. They and the signature are those of the Standard
// Webhooks specification 1.0.0 (standardwebhooks.com), for which verifiers
// exist in many languages:
//
//	webhook-id:         the CloudEvents id; the same in every delivery of an event
//	webhook-timestamp:  Unix seconds of this delivery; refuse what is older than five minutes
//	webhook-signature:  "v1," + base64(HMAC-SHA256(secret, id + "." + timestamp + "." + body)),
//	                    one for each secret, separated by blanks; one that holds is enough
//
// A secret "whsec_…" is base64 of the key; any other is the key itself.
const (
	HeaderID        = "Webhook-Id"
	HeaderTimestamp = "Webhook-Timestamp"
	HeaderSignature = "Webhook-Signature"
)

// MinSecret is the shortest key that deliveries are signed with, in bytes.
const MinSecret = 16

// Webhook delivers CloudEvents over HTTP in structured mode (CloudEvents
// http-webhook.md, without its handshake: the address is configured).
type Webhook struct {
	client *http.Client
	url    string
	secret func() (string, error)
	now    func() time.Time
}

// NewWebhook returns a client that posts to o.URL. The secret holds one secret
// a line, so that a receiver can change over from one to the next.
func NewWebhook(o Options) (*Webhook, error) {
	h, base, err := newHTTP(o, func(http.Header, string) {})
	if err != nil {
		return nil, err
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	return &Webhook{client: h, url: base.String(), secret: o.Secret, now: o.Now}, nil
}

// Deliver posts an event and returns when it was taken. Errors as for Tracker.
func (w *Webhook) Deliver(ctx context.Context, ev event.Event) error {
	const doing = "deliver to the webhook"
	body, err := json.Marshal(ev)
	if err != nil {
		return fmt.Errorf("%s: %w", doing, &Error{Kind: ErrInvalid, Message: clean(err.Error())})
	}
	secret, err := w.secret()
	if err != nil {
		return fmt.Errorf("%s: %w", doing, &Error{Kind: ErrDenied, Message: err.Error()})
	}
	now := w.now()
	signature, err := Sign(secret, ev.ID(), now, body)
	if err != nil {
		return fmt.Errorf("%s: %w", doing, &Error{Kind: ErrDenied, Message: err.Error()})
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, w.url, bytes.NewReader(body))
	if err != nil {
		return fmt.Errorf("%s: %w", doing, &Error{Kind: ErrInvalid, Message: "the address is no URL"})
	}
	req.Header.Set("Content-Type", event.ApplicationCloudEventsJSON+"; charset=utf-8")
	req.Header.Set("User-Agent", "tidewaiter")
	req.Header.Set(HeaderID, ev.ID())
	req.Header.Set(HeaderTimestamp, strconv.FormatInt(now.Unix(), 10))
	req.Header.Set(HeaderSignature, signature)
	resp, err := w.client.Do(req)
	if err != nil {
		return failure(ctx, doing, err)
	}
	defer resp.Body.Close()
	if resp.StatusCode >= 300 {
		return fmt.Errorf("%s: %w", doing, &Error{Kind: ErrInvalid, Status: resp.StatusCode, Message: "an answer 2xx is expected"})
	}
	// What it says does not matter; reading it lets the connection be used again.
	_, _ = io.Copy(io.Discard, io.LimitReader(resp.Body, maxErrorBody))
	return nil
}

// Sign returns the value of the signature header for a delivery: one signature
// for each line of secrets.
func Sign(secrets, id string, at time.Time, body []byte) (string, error) {
	var out []string
	for line := range strings.Lines(secrets) {
		line = strings.TrimSpace(line)
		if line == "" {
			continue
		}
		key := []byte(line)
		if encoded, ok := strings.CutPrefix(line, "whsec_"); ok {
			decoded, err := base64.StdEncoding.DecodeString(encoded)
			if err != nil {
				return "", errors.New("a webhook secret with whsec_ is not base64")
			}
			key = decoded
		}
		if len(key) < MinSecret {
			return "", fmt.Errorf("a webhook secret is shorter than %d bytes", MinSecret)
		}
		mac := hmac.New(sha256.New, key)
		fmt.Fprintf(mac, "%s.%d.", id, at.Unix())
		mac.Write(body)
		out = append(out, "v1,"+base64.StdEncoding.EncodeToString(mac.Sum(nil)))
	}
	if len(out) == 0 {
		return "", errors.New("the webhook secret is empty")
	}
	return strings.Join(out, " "), nil
}
