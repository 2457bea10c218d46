package intake

import (
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha1" //nolint:gosec // Nexus signs with HMAC-SHA1, which is still sound as an HMAC
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io/fs"
	"log/slog"
	"net/http"
	"net/url"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/tidewaiter/tidewaiter/libs/credential"
	"github.com/tidewaiter/tidewaiter/services/intake/hook"
)

var hashes = map[string]func() hash.Hash{"sha256": sha256.New, "sha1": sha1.New}

// rereadEvery bounds how often a secret's file is looked at.
const rereadEvery = time.Second

// verifier checks what a sender presents. The zero value refuses everything.
type verifier struct {
	open   bool   // nothing is asked for
	header string // that holds the proof
	query  string // parameter of the URL that holds it, where there is no header
	// expected makes, from a secret, what the proof must be.
	expected func(secret string, signed []byte) string
	// present takes the proof out of the value; nil: it is the whole value.
	present  func(value string) (string, bool)
	needBody bool
	secret   *secret
	scheme   string // for WWW-Authenticate
	// outside checks a proof that was made with somebody else's key, instead of
	// all that. It returns what is authentic of the body (nil: all of it), or
	// errGreeted, errUnchecked, or in words of ours why the call is refused.
	outside func(context.Context, offer) ([]byte, error)
	// wait returns when what outside left to be done behind the calls is done;
	// nil: that is nothing.
	wait func()
}

// newVerifier reads the secrets that auth names. Keys and certificates of others
// are fetched through transport.
func newVerifier(auth Auth, kind hook.Kind, transport http.RoundTripper, log *slog.Logger) (*verifier, error) {
	switch {
	case auth == Auth{}: // of a source that is pulled: nothing is let in
		return &verifier{}, nil
	case auth.OIDC != nil:
		return newOIDC(*auth.OIDC, transport, log), nil
	case auth.SNS != nil:
		return newSNS(*auth.SNS, transport, log)
	case auth.None:
		return &verifier{open: true}, nil
	case auth.Bearer != nil:
		s, err := newSecret(auth.Bearer.TokenFile, auth.Bearer.TokenEnv, log)
		return bearer(s), err
	case auth.Basic != nil:
		s, err := newSecret(auth.Basic.PasswordFile, auth.Basic.PasswordEnv, log)
		return &verifier{
			header: "Authorization", secret: s, scheme: "Basic", present: schemed("Basic"),
			expected: func(secret string, _ []byte) string {
				return base64.StdEncoding.EncodeToString([]byte(auth.Basic.Username + ":" + secret))
			},
		}, err
	case auth.Header != nil:
		s, err := newSecret(auth.Header.ValueFile, auth.Header.ValueEnv, log)
		return &verifier{
			header: canonical(auth.Header.Name), secret: s,
			expected: itself,
		}, err
	case auth.HMAC != nil:
		s, err := newSecret(auth.HMAC.SecretFile, auth.HMAC.SecretEnv, log)
		return signed(auth.HMAC.signature(kind), s), err
	case auth.Query != nil:
		s, err := newSecret(auth.Query.ValueFile, auth.Query.ValueEnv, log)
		return &verifier{query: auth.Query.Name, secret: s, expected: itself}, err
	}
	return nil, errors.New("no authentication is configured")
}

func bearer(s *secret) *verifier {
	return &verifier{
		header: "Authorization", secret: s, scheme: "Bearer", present: schemed("Bearer"),
		expected: itself,
	}
}

// itself is what a verifier expects of a secret that is presented as it stands.
func itself(secret string, _ []byte) string { return secret }

func signed(sig hook.Signature, s *secret) *verifier {
	if sig.Algorithm == "" {
		sig.Algorithm = "sha256"
	}
	return &verifier{
		header: canonical(sig.Header), secret: s, needBody: true,
		present: func(value string) (string, bool) {
			digits, ok := strings.CutPrefix(value, sig.Prefix)
			return strings.ToLower(digits), ok || sig.Bare
		},
		expected: func(secret string, body []byte) string {
			mac := hmac.New(hashes[sig.Algorithm], []byte(secret))
			mac.Write(body)
			return hex.EncodeToString(mac.Sum(nil))
		},
	}
}

// decoy does for an unknown source what a verifier does for a known one, so
// that both take about the same time; it refuses.
func decoy() *verifier {
	return bearer(&secret{values: []string{rand.Text()}})
}

func schemed(scheme string) func(string) (string, bool) {
	return func(value string) (string, bool) {
		got, rest, ok := strings.Cut(value, " ")
		return strings.TrimLeft(rest, " "), ok && strings.EqualFold(got, scheme)
	}
}

// offer is what a call has to prove itself with.
type offer struct {
	header http.Header
	url    *url.URL
	signed []byte // what a signature covers
}

// check says whether the call proves itself, as outside does.
func (v *verifier) check(ctx context.Context, o offer) ([]byte, error) {
	if v.outside != nil {
		return v.outside(ctx, o)
	}
	if !v.verify(o) {
		return nil, errors.New(v.trouble(o))
	}
	return nil, nil
}

// verify says whether the call proves itself with a secret. A missing proof is a wrong one,
// and so is one that is there twice. All secrets are compared, each in
// constant time.
func (v *verifier) verify(o offer) bool {
	if v.open {
		return true
	}
	if v.secret == nil {
		return false
	}
	values := o.header.Values(v.header)
	if v.query != "" {
		values = o.url.Query()[v.query]
	}
	value := ""
	if len(values) == 1 {
		value = values[0]
	}
	proof, ok := value, value != ""
	if v.present != nil {
		proof, ok = v.present(value)
	}
	got := sha256.Sum256([]byte(proof)) // equal lengths, so that none shows
	match := 0
	for _, s := range v.secret.current() {
		want := sha256.Sum256([]byte(v.expected(s, o.signed)))
		match |= subtle.ConstantTimeCompare(got[:], want[:])
	}
	return ok && proof != "" && match == 1
}

// trouble says, of a call that verify refused, what is wrong with its proof, and
// nothing of the proof itself.
func (v *verifier) trouble(o offer) string {
	where, values := "the header "+v.header, o.header.Values(v.header)
	if v.query != "" {
		where, values = "the parameter "+v.query+" of the URL", o.url.Query()[v.query]
	}
	switch {
	case v.secret == nil:
		return "nothing that is presented can be checked"
	case len(values) == 0 || values[0] == "":
		return where + " is missing or empty"
	case len(values) > 1:
		return where + " is there more than once"
	}
	if v.present != nil {
		if proof, ok := v.present(values[0]); !ok || proof == "" {
			return where + " does not have the form that is configured"
		}
	}
	if v.needBody {
		return "the signature in " + where + " is not the body's, with none of the secrets"
	}
	return where + " holds none of the secrets"
}

// secret holds the values that are valid now. Those of a file are read again
// when it changes.
type secret struct {
	file string
	log  *slog.Logger
	now  func() time.Time

	mu      sync.Mutex
	values  []string
	checked time.Time
	stamp   stamp
}

// stamp tells versions of a file apart.
type stamp struct {
	modified time.Time
	size     int64
}

func stampOf(i fs.FileInfo) stamp { return stamp{i.ModTime(), i.Size()} }

// newSecret reads a secret from a file or an environment variable, whichever is
// named. One that is missing or empty is an error.
func newSecret(file, env string, log *slog.Logger) (*secret, error) {
	s := &secret{file: file, log: log, now: time.Now}
	if file == "" {
		v, ok := os.LookupEnv(env)
		if !ok {
			return nil, fmt.Errorf("environment variable %s is not set", env)
		}
		values, err := credential.Lines(v)
		if err != nil {
			return nil, fmt.Errorf("environment variable %s: %w", env, err)
		}
		s.values = values
		return s, nil
	}
	if err := s.read(); err != nil {
		return nil, err
	}
	s.checked = s.now()
	return s, nil
}

func (s *secret) read() error {
	info, err := os.Stat(s.file)
	if err != nil {
		return fmt.Errorf("read secret: %w", err)
	}
	if info.Size() > 64<<10 {
		return fmt.Errorf("read secret: %s is bigger than any secret", s.file)
	}
	b, err := os.ReadFile(s.file)
	if err != nil {
		return fmt.Errorf("read secret: %w", err)
	}
	values, err := credential.Lines(string(b))
	if err != nil {
		return fmt.Errorf("%s: %w", s.file, err)
	}
	s.values, s.stamp = values, stampOf(info)
	return nil
}

// current returns the values that are valid now. While a changed file cannot be
// used, those read before stay valid.
func (s *secret) current() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.file == "" || s.now().Sub(s.checked) < rereadEvery {
		return s.values
	}
	s.checked = s.now()
	info, err := os.Stat(s.file)
	if err == nil && stampOf(info) == s.stamp {
		return s.values
	}
	if err := s.read(); err != nil {
		s.log.WarnContext(context.Background(), "changed secret cannot be used, the one before stays valid", "error", err)
	}
	return s.values
}
