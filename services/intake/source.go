package intake

import (
	"errors"
	"fmt"
	"maps"
	"net/textproto"
	"regexp"
	"slices"
	"strings"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/services/intake/hook"
	"github.com/tidewaiter/tidewaiter/services/intake/scope"
)

// Sources are the configured senders by id, the section "sources" of the
// configuration. The id is the last part of the URL: /hooks/<id>.
type Sources map[string]Source

// Source is one configured sender of webhooks.
type Source struct {
	// Kind of what it sends: one of hook.Kinds.
	Kind string `yaml:"kind"`
	// Registry is the host[:port] the source is bound to: its events are about this
	// registry, whatever they name. Those of the kinds ecr and gar that name another
	// one of the vendor are left out.
	Registry string `yaml:"registry"`
	// AnyRegistry lets the payload name the registry; only registries of the
	// configuration are ever connected to.
	AnyRegistry bool `yaml:"anyRegistry"`
	// PathMapping says how Artifactory or Nexus shows its repositories to container
	// clients: "repo-path", "subdomain" or "port"; empty: the kind's usual way.
	PathMapping string `yaml:"pathMapping"`
	// RepositoryKey is the one repository of Artifactory or Nexus that the source
	// is about: events of others end. Empty: all of them.
	RepositoryKey string `yaml:"repositoryKey"`
	// Paths bounds the repositories: each is a repository or the path above some.
	// Empty: all of the registry.
	Paths []string `yaml:"paths"`
	// Repositories and Tags leave out what is not to be scanned.
	Repositories scope.Filter `yaml:"repositories"`
	Tags         scope.Filter `yaml:"tags"`
	// Platforms are the parts of an index that are scanned, os/architecture[/variant].
	// Empty: as planner is configured.
	Platforms []string `yaml:"platforms"`
	// Rewrite turns the repositories of payloads into those in the registry.
	Rewrite scope.Rewrite `yaml:"rewrite"`
	Auth    Auth          `yaml:"auth"`
	// Pull fetches the events from a queue; then there is no auth.
	Pull *Pull `yaml:"pull"`
	// Mapping reads the bodies of the kind "generic", which alone has one.
	Mapping *hook.Mapping `yaml:"mapping"`
	// Lane of its pushes: "fresh" (default) or "bulk".
	Lane string `yaml:"lane"`
	// Quota is how many pushes a minute, ones that were not sent before, may go in its
	// lane; what is over goes in the bulk lane. 0: no bound.
	Quota int `yaml:"quota"`
	// Origins are allowed to make a CloudEvents handshake without authentication,
	// for senders that cannot authenticate it.
	Origins []string `yaml:"origins"`
	// Sweep lets sweeper look for pushes whose event was lost; absent: it does not.
	Sweep *Sweep `yaml:"sweep"`
}

// Auth says how a source proves itself: exactly one of the fields. Secrets are
// read from files or environment variables; each line of them is a valid
// secret, at most two, so that one can be replaced by another.
type Auth struct {
	Bearer *BearerAuth `yaml:"bearer"`
	Basic  *BasicAuth  `yaml:"basic"`
	HMAC   *HMACAuth   `yaml:"hmac"`
	Header *HeaderAuth `yaml:"header"`
	Query  *QueryAuth  `yaml:"query"`
	OIDC   *OIDCAuth   `yaml:"oidc"`
	SNS    *SNSAuth    `yaml:"sns"`
	// None takes events from anybody. It must be asked for.
	None bool `yaml:"none"`
}

// BearerAuth is "Authorization: Bearer <token>" (RFC 6750, 2.1).
type BearerAuth struct {
	TokenFile string `yaml:"tokenFile"`
	TokenEnv  string `yaml:"tokenEnv"`
}

// BasicAuth is "Authorization: Basic …" (RFC 7617).
type BasicAuth struct {
	Username     string `yaml:"username"`
	PasswordFile string `yaml:"passwordFile"`
	PasswordEnv  string `yaml:"passwordEnv"`
}

// HMACAuth is a header with the hex HMAC (RFC 2104) of the body. Of a kind whose
// senders sign only the secret needs to be named.
type HMACAuth struct {
	Header     string `yaml:"header"`
	Algorithm  string `yaml:"algorithm"` // "sha256" (default) or "sha1"
	Prefix     string `yaml:"prefix"`    // before the hex digits, for example "sha256="
	SecretFile string `yaml:"secretFile"`
	SecretEnv  string `yaml:"secretEnv"`
}

// signature returns the signature that is asked for: the configured one, or
// where no header is named, the one that the kind's senders make.
func (a HMACAuth) signature(kind hook.Kind) hook.Signature {
	if a.Header == "" && len(kind.Signatures) > 0 {
		return kind.Signatures[0]
	}
	return hook.Signature{Header: a.Header, Algorithm: a.Algorithm, Prefix: a.Prefix}
}

// HeaderAuth is a header with an agreed value.
type HeaderAuth struct {
	Name      string `yaml:"name"`
	ValueFile string `yaml:"valueFile"`
	ValueEnv  string `yaml:"valueEnv"`
}

// QueryAuth is a parameter of the URL with an agreed value, for senders that
// can only be told a URL. Whoever logs URLs on the way logs the secret.
type QueryAuth struct {
	Name      string `yaml:"name"`
	ValueFile string `yaml:"valueFile"`
	ValueEnv  string `yaml:"valueEnv"`
}

// generic is the kind whose sources say themselves how they are read.
const generic = "generic"

// reservedIDs are not for sources: planner lets our own services speak of every
// registry, and the delivery log has names for calls to no source.
var reservedIDs = []string{"submit", "catalog", "sweeper", "gatekeeper", "demo", sourceUnknown}

var sourceID = regexp.MustCompile(`^[a-z0-9][a-z0-9._-]{0,62}$`)

// Validate returns everything that is wrong with the sources.
func (s Sources) Validate() error {
	var problems []error
	for _, id := range slices.Sorted(maps.Keys(s)) {
		if !sourceID.MatchString(id) {
			problems = append(problems, fmt.Errorf("source %q: an id is made of a-z, 0-9, \".\", \"_\" and \"-\", at most 63", id))
		}
		if slices.Contains(reservedIDs, id) {
			problems = append(problems, fmt.Errorf("source %q: this id is Tidewaiter's own, take another", id))
		}
		if err := s[id].validate(); err != nil {
			problems = append(problems, fmt.Errorf("source %q: %w", id, err))
		}
	}
	return errors.Join(problems...)
}

func (s Source) validate() error {
	var problems []error
	add := func(format string, args ...any) { problems = append(problems, fmt.Errorf(format, args...)) }
	kind, known := hook.Find(s.Kind)
	if !known {
		add("kind %q is none of %s", s.Kind, strings.Join(hook.KindNames(), ", "))
	}
	switch {
	case s.Registry == "" && !s.AnyRegistry:
		add("registry is missing: name the host, or set anyRegistry to let the payload name it")
	case s.Registry != "" && s.AnyRegistry:
		add("registry and anyRegistry exclude each other")
	case s.Registry != "" && !contracts.ValidRegistry(s.Registry):
		add("registry %q is not host[:port]", s.Registry)
	}
	if s.AnyRegistry && known && !kind.Says.Registry {
		add("kind %q never names its registry: set registry in the place of anyRegistry", s.Kind)
	}
	problems = append(problems, s.validateMapping(kind))
	if _, err := s.Rules(); err != nil {
		problems = append(problems, err)
	}
	problems = append(problems, s.Rewrite.Validate())
	if s.Lane != "" && s.Lane != contracts.LaneFresh && s.Lane != contracts.LaneBulk {
		add("lane %q is neither fresh nor bulk", s.Lane)
	}
	if s.Quota < 0 {
		add("quota %d is below 0", s.Quota)
	}
	switch {
	case s.Kind == generic && s.Mapping == nil:
		add("mapping is missing: kind %s needs one", generic)
	case s.Kind != generic && s.Mapping != nil:
		add("mapping is for kind %s, not for %s", generic, s.Kind)
	case s.Mapping != nil:
		_, err := s.Mapping.Compile()
		problems = append(problems, err)
	}
	switch {
	case s.Pull != nil && s.Auth != (Auth{}):
		add("pull and auth exclude each other: a source that is pulled has no URL")
	case s.Pull != nil:
		problems = append(problems, s.Pull.validate())
	default:
		problems = append(problems, s.Auth.validate(kind))
	}
	if s.Sweep != nil {
		if s.AnyRegistry {
			add("sweep needs registry: there is nothing to list of any registry")
		}
		if err := s.Sweep.validate(); err != nil {
			add("sweep: %w", err)
		}
	}
	return errors.Join(problems...)
}

func (s Source) validateMapping(kind hook.Kind) error {
	switch {
	case s.PathMapping == "" && s.RepositoryKey == "":
		return nil
	case len(kind.PathMappings) == 0:
		return fmt.Errorf("pathMapping and repositoryKey are not for kind %q, whose images have one name alone", s.Kind)
	case s.PathMapping != "" && !slices.Contains(kind.PathMappings, s.PathMapping):
		return fmt.Errorf("pathMapping %q is none of %s", s.PathMapping, strings.Join(kind.PathMappings, ", "))
	case s.PathMapping == hook.MappingPort && s.AnyRegistry:
		return errors.New(`pathMapping "port" needs registry: no payload names the port`)
	case s.PathMapping != "" && s.PathMapping != hook.MappingPath && s.Registry != "" && s.RepositoryKey == "":
		return fmt.Errorf("repositoryKey is missing: with pathMapping %q registry %q serves one repository, and events of others must not pass for its own",
			s.PathMapping, s.Registry)
	}
	return nil
}

// Warnings returns what is allowed but less safe than it could be, in order of the sources' ids.
func (s Sources) Warnings() []string {
	var warnings []string
	for _, id := range slices.Sorted(maps.Keys(s)) {
		if w := s[id].warning(); w != "" {
			warnings = append(warnings, fmt.Sprintf("source %q: %s", id, w))
		}
	}
	return warnings
}

func (s Source) warning() string {
	kind, known := hook.Find(s.Kind)
	signs := len(kind.Signatures) > 0
	secretHeader := s.Auth.Header != nil && kind.AgreedHeader != "" && canonical(s.Auth.Header.Name) == kind.AgreedHeader
	switch {
	case !known:
		return ""
	case s.Auth.None && signs:
		return fmt.Sprintf("anybody may send to it, though senders of kind %q sign: use auth.hmac", s.Kind)
	case s.Auth.None:
		return "anybody may send to it: use any other auth"
	case signs && s.Auth.HMAC == nil && !secretHeader:
		return fmt.Sprintf("senders of kind %q sign, which proves the body too: auth.hmac is better", s.Kind)
	case len(kind.PathMappings) > 0 && s.Registry != "" && kind.PathMappings[0] != hook.MappingPath && s.PathMapping == "" && s.RepositoryKey == "":
		return fmt.Sprintf("repositoryKey is missing: events of any repository pass for ones of registry %q", s.Registry)
	}
	return ""
}

func (a Auth) validate(kind hook.Kind) error {
	chosen := 0
	for _, is := range []bool{a.Bearer != nil, a.Basic != nil, a.HMAC != nil, a.Header != nil, a.Query != nil, a.OIDC != nil, a.SNS != nil, a.None} {
		if is {
			chosen++
		}
	}
	if chosen != 1 {
		return fmt.Errorf("auth: %d of bearer, basic, hmac, header, query, oidc, sns and none are set, exactly one is needed", chosen)
	}
	switch {
	case a.Bearer != nil:
		return oneOf("auth.bearer.token", a.Bearer.TokenFile, a.Bearer.TokenEnv)
	case a.Basic != nil && a.Basic.Username == "":
		return errors.New("auth.basic.username is missing")
	case a.Basic != nil:
		return oneOf("auth.basic.password", a.Basic.PasswordFile, a.Basic.PasswordEnv)
	case a.Header != nil && !headerName(a.Header.Name):
		return fmt.Errorf("auth.header.name %q is not a header", a.Header.Name)
	case a.Header != nil:
		return oneOf("auth.header.value", a.Header.ValueFile, a.Header.ValueEnv)
	case a.OIDC != nil:
		return a.OIDC.validate()
	case a.SNS != nil && kind.Name != "ecr":
		return fmt.Errorf("auth.sns is for kind ecr, not for %s: others do not send through SNS", kind.Name)
	case a.SNS != nil:
		_, err := a.SNS.host()
		return err
	case a.Query != nil && !parameterName.MatchString(a.Query.Name):
		return fmt.Errorf("auth.query.name %q is not made of a-z, 0-9, \"_\" and \"-\"", a.Query.Name)
	case a.Query != nil:
		return oneOf("auth.query.value", a.Query.ValueFile, a.Query.ValueEnv)
	case a.HMAC != nil && a.HMAC.Header == "" && (a.HMAC.Algorithm != "" || a.HMAC.Prefix != ""):
		return errors.New("auth.hmac.header is missing: algorithm and prefix are of no use without it")
	case a.HMAC != nil && a.HMAC.Header == "" && len(kind.Signatures) == 0:
		return fmt.Errorf("auth.hmac.header is missing: kind %q has no signature of its own", kind.Name)
	case a.HMAC != nil && a.HMAC.Header != "" && !headerName(a.HMAC.Header):
		return fmt.Errorf("auth.hmac.header %q is not a header", a.HMAC.Header)
	case a.HMAC != nil && a.HMAC.Algorithm != "" && hashes[a.HMAC.Algorithm] == nil:
		return fmt.Errorf("auth.hmac.algorithm %q is neither sha256 nor sha1", a.HMAC.Algorithm)
	case a.HMAC != nil:
		return oneOf("auth.hmac.secret", a.HMAC.SecretFile, a.HMAC.SecretEnv)
	}
	return nil
}

func oneOf(what, file, env string) error {
	if (file == "") == (env == "") {
		return fmt.Errorf("%sFile or %sEnv: exactly one is needed", what, what)
	}
	return nil
}

var headerPattern = regexp.MustCompile("^[A-Za-z0-9!#$%&'*+.^_`|~-]+$")

var parameterName = regexp.MustCompile(`^[a-z0-9_-]{1,64}$`)

func headerName(s string) bool { return headerPattern.MatchString(s) }

// Rules returns what decides whether a push through this source is wanted, for
// all who find pushes.
func (s Source) Rules() (*scope.Rules, error) {
	return scope.Compile(scope.Scope{
		Registry: s.Registry, AnyRegistry: s.AnyRegistry, Paths: s.Paths,
		Repositories: s.Repositories, Tags: s.Tags, Platforms: s.Platforms,
	})
}

func canonical(header string) string { return textproto.CanonicalMIMEHeaderKey(header) }
