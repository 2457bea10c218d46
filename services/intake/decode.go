package intake

import (
	"encoding/base64"
	"errors"
	"fmt"
	"net/http"
	"strings"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/services/intake/hook"
)

// errNoMapping is what is wrong with reading the kind "generic" by its name alone.
var errNoMapping = errors.New(`the kind "generic" reads nothing without the mapping of a configured source`)

// DecodeOnce says what intake would make of one call, without sending anything:
// the answer's status and the events. secret is checked as the kind's senders
// present it (empty: not checked); registry is the source's configured host.
// Errors: hook.ErrUnknownKind, and that the kind "generic" needs DecodeAs.
func DecodeOnce(kind, secret, registry string, header http.Header, body []byte) (contracts.WebhookDecode, error) {
	return DecodeAs(Source{Kind: kind, Registry: registry}, secret, header, body)
}

// DecodeAs is DecodeOnce with the registry, the path mapping and the mapping of
// a source as it is configured. Its filters and its authentication are left out.
func DecodeAs(c Source, secret string, header http.Header, body []byte) (contracts.WebhookDecode, error) {
	out := contracts.WebhookDecode{Status: http.StatusAccepted, Events: []contracts.WebhookEvent{}}
	k, ok := hook.Find(c.Kind)
	if !ok {
		_, err := hook.Decode(c.Kind, hook.Request{})
		return out, err
	}
	src := &source{Source: c, kind: k}
	switch {
	case c.Mapping != nil:
		mapper, err := c.Mapping.Compile()
		if err != nil {
			return out, fmt.Errorf("mapping: %w", err)
		}
		src.mapper = mapper
	case c.Kind == generic:
		return out, errNoMapping
	}
	if secret != "" && !presents(k, secret, header, body) {
		out.Status = http.StatusUnauthorized
		return out, nil
	}
	if len(body) > DefaultMaxBody {
		out.Status = http.StatusRequestEntityTooLarge
		return out, nil
	}
	req := src.request(header, body)
	answer, ok := k.Handshake(req)
	if len(body) == 0 {
		answer, ok = k.Preflight(http.MethodOptions, header)
	}
	if ok {
		out.Status = answer.Status
		return out, nil
	}
	events, err := hook.Decode(c.Kind, req)
	if err != nil {
		return out, nil //nolint:nilerr // intake takes what it cannot read, and sets it aside
	}
	for _, e := range events {
		out.Events = append(out.Events, e.Contract())
	}
	return out, nil
}

// presents says whether a call carries secret in one of the ways in which the
// kind's senders do: their signature, the header that they have for it, or,
// where the operator chooses the header, any header as a whole and
// Authorization as a bearer token or as the password.
func presents(k hook.Kind, secretText string, header http.Header, body []byte) bool {
	one := &secret{values: []string{secretText}}
	offered := offer{header: header, signed: k.Signed(hook.Request{Header: header, Body: body})}
	if k.AgreedHeader != "" && (&verifier{header: k.AgreedHeader, secret: one, expected: itself}).verify(offered) {
		return true
	}
	for _, sig := range k.Signatures {
		if header.Get(sig.Header) != "" {
			return signed(sig, one).verify(offered)
		}
	}
	if len(k.Signatures) > 0 {
		return false
	}
	for name := range header {
		if (&verifier{header: name, secret: one, expected: itself}).verify(offered) {
			return true
		}
	}
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
	}, expected: itself}
	return bearer(one).verify(offered) || password.verify(offered)
}
