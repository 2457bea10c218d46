package intake

import (
	"encoding/base64"
	"net/http"
	"strings"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/services/intake/hook"
)

// DecodeOnce says what intake would make of one call, without sending anything:
// the answer's status and the events. secret is checked as the kind's senders
// present it (empty: not checked); registry is the source's configured host.
// Errors: hook.ErrUnknownKind.
func DecodeOnce(kind, secret, registry string, header http.Header, body []byte) (contracts.WebhookDecode, error) {
	out := contracts.WebhookDecode{Status: http.StatusAccepted, Events: []contracts.WebhookEvent{}}
	k, ok := hook.Find(kind)
	if !ok {
		_, err := hook.Decode(kind, hook.Request{})
		return out, err
	}
	if secret != "" && !presents(k, secret, header, body) {
		out.Status = http.StatusUnauthorized
		return out, nil
	}
	if len(body) > DefaultMaxBody {
		out.Status = http.StatusRequestEntityTooLarge
		return out, nil
	}
	if len(body) == 0 {
		if answer, ok := k.Handshake(http.MethodOptions, header); ok {
			out.Status = answer.Status
			return out, nil
		}
	}
	events, err := hook.Decode(kind, hook.Request{Header: header, Body: body, Registry: registry})
	if err != nil {
		return out, nil //nolint:nilerr // intake takes what it cannot read, and sets it aside
	}
	for _, e := range events {
		out.Events = append(out.Events, e.Contract())
	}
	return out, nil
}

// presents says whether a call carries secret in one of the ways in which the
// kind's senders do: their signature, else Authorization as a whole, as a
// bearer token or as the password.
func presents(k hook.Kind, secretText string, header http.Header, body []byte) bool {
	one := &secret{values: []string{secretText}}
	for _, sig := range k.Signatures {
		if header.Get(sig.Header) != "" {
			return signed(canonical(sig.Header), sig.Algorithm, sig.Prefix, one).verify(header, body)
		}
	}
	if len(k.Signatures) > 0 {
		return false
	}
	whole := &verifier{header: "Authorization", secret: one, expected: func(s string, _ []byte) string { return s }}
	password := &verifier{header: "Authorization", secret: one, present: func(value string) (string, bool) {
		encoded, ok := schemed("Basic")(value)
		if !ok {
			return "", false
		}
		plain, err := base64.StdEncoding.DecodeString(encoded)
		if err != nil {
			return "", false
		}
		_, pass, ok := strings.Cut(string(plain), ":")
		return pass, ok
	}, expected: func(s string, _ []byte) string { return s }}
	return whole.verify(header, body) || bearer(one).verify(header, body) || password.verify(header, body)
}
