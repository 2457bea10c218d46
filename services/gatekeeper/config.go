package gatekeeper

import (
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"time"

	"github.com/tidewaiter/tidewaiter/contracts"
)

// Modes.
const (
	ModeEnforce = "enforce" // what is not good is denied
	ModeWarn    = "warn"    // everything is admitted, with warnings to whoever asks
	ModeAudit   = "audit"   // everything is admitted; audit annotations and events tell
)

// Rules for images that nothing is known of.
const (
	RuleDeny   = "deny"
	RuleWarn   = "warn"
	RuleAdmit  = "admit"
	RuleSubmit = "submit" // admit, and ask for a scan
)

// Where bundles named by image.attested are read.
const (
	FromRegistry = "registry"
	FromDatabase = "database" // the blob store; what is not there is read from the registry
)

// Defaults of Config.
const (
	DefaultListen       = ":8443"
	DefaultBudget       = 800 * time.Millisecond
	DefaultRecheck      = 10 * time.Minute
	DefaultMaxBody      = 8 << 20 // an object and the one before it, both of at most 3 MiB
	DefaultCacheEntries = 20_000
	DefaultCacheBytes   = 256 << 20
)

// Config is the section "gatekeeper".
type Config struct {
	Listen string `yaml:"listen"` // host:port of the webhook (HTTPS)
	Mode   string `yaml:"mode"`   // enforce, warn, audit

	KeyFiles     []string      `yaml:"keyFiles"`     // attestors' public keys, PEM; read again when they change
	Policy       string        `yaml:"policy"`       // policy file that verdicts must follow
	PolicyDigest string        `yaml:"policyDigest"` // or its digest; neither: any policy
	MaxAge       time.Duration `yaml:"maxAge"`       // of verdicts and of their advisories; 0: as long as they are valid
	Accept       string        `yaml:"accept"`       // worst verdict that is admitted: pass, warn

	RequireDigest   bool          `yaml:"requireDigest"`   // deny references without a digest; else tags are resolved
	UnknownRegistry string        `yaml:"unknownRegistry"` // for registries that are not configured: deny, warn, admit
	Missing         string        `yaml:"missing"`         // for images without any statement, which are submitted in any case: deny, warn, submit
	Unavailable     string        `yaml:"unavailable"`     // when the registry did not answer in time: deny, warn, submit
	Exempt          []string      `yaml:"exempt"`          // namespaces that are not looked at
	Budget          time.Duration `yaml:"budget"`          // for everything outside of this process, a review
	Recheck         time.Duration `yaml:"recheck"`         // after which a remembered statement is looked for again
	Bundles         string        `yaml:"bundles"`         // where announced statements are read: registry, database

	MaxBody      int64 `yaml:"maxBody"`      // bytes of a review
	CacheEntries int   `yaml:"cacheEntries"` // images remembered in memory
	CacheBytes   int64 `yaml:"cacheBytes"`   // of their statements

	Auth Auth `yaml:"auth"`
	TLS  TLS  `yaml:"tls"`
}

// Auth says how the API server proves itself: exactly one of the three.
type Auth struct {
	ClientCAFile string   `yaml:"clientCAFile"` // client certificates of these authorities, PEM
	ClientNames  []string `yaml:"clientNames"`  // with clientCAFile: common names that may call; empty: all
	TokenFile    string   `yaml:"tokenFile"`    // bearer token; two lines are two valid tokens
	None         bool     `yaml:"none"`         // whoever reaches it may ask
}

// TLS says where the webhook's certificate comes from: a directory in which it
// makes one itself, or files.
type TLS struct {
	Dir      string   `yaml:"dir"`   // own authority and certificate, made and renewed here
	Names    []string `yaml:"names"` // with dir: DNS names and addresses that the API server calls
	CertFile string   `yaml:"certFile"`
	KeyFile  string   `yaml:"keyFile"`
}

// DefaultConfig returns the configuration before anything is set.
func DefaultConfig() Config {
	return Config{
		Listen: DefaultListen, Mode: ModeEnforce, Accept: contracts.VerdictWarn, RequireDigest: true,
		UnknownRegistry: RuleDeny, Missing: RuleDeny, Unavailable: RuleDeny,
		Budget: DefaultBudget, Recheck: DefaultRecheck, Bundles: FromRegistry,
		MaxBody: DefaultMaxBody, CacheEntries: DefaultCacheEntries, CacheBytes: DefaultCacheBytes,
	}
}

// Validate returns everything that is wrong with the configuration.
func (c Config) Validate() error {
	var problems []error
	wrong := func(format string, args ...any) { problems = append(problems, fmt.Errorf(format, args...)) }
	oneOf := func(setting, value string, allowed ...string) {
		if !slices.Contains(allowed, value) {
			wrong("%s is %q, want one of %s", setting, value, strings.Join(allowed, ", "))
		}
	}
	oneOf("mode", c.Mode, ModeEnforce, ModeWarn, ModeAudit)
	oneOf("accept", c.Accept, contracts.VerdictPass, contracts.VerdictWarn)
	oneOf("unknownRegistry", c.UnknownRegistry, RuleDeny, RuleWarn, RuleAdmit)
	oneOf("missing", c.Missing, RuleDeny, RuleWarn, RuleSubmit)
	oneOf("unavailable", c.Unavailable, RuleDeny, RuleWarn, RuleSubmit)
	oneOf("bundles", c.Bundles, FromRegistry, FromDatabase)
	if c.Listen == "" {
		wrong("listen is empty")
	}
	if len(c.KeyFiles) == 0 {
		wrong("keyFiles is empty: name the attestor's public key")
	}
	if c.Policy != "" && c.PolicyDigest != "" {
		wrong("policy and policyDigest say the same, keep one")
	}
	if c.PolicyDigest != "" && !contracts.ValidDigest(c.PolicyDigest) {
		wrong("policyDigest %q is not sha256:<64 hex>", c.PolicyDigest)
	}
	if c.MaxAge < 0 || c.Budget <= 0 || c.Recheck <= 0 {
		wrong("maxAge must not be negative; budget and recheck must be above 0")
	}
	if c.MaxBody < 1 || c.CacheEntries < 1 || c.CacheBytes < 1 {
		wrong("maxBody, cacheEntries and cacheBytes must be above 0")
	}
	for _, n := range c.Exempt {
		if n == "" || strings.ContainsAny(n, "*? ") {
			wrong("exempt: %q is no namespace; patterns are not supported", n)
		}
	}
	return errors.Join(append(problems, c.Auth.validate(), c.TLS.validate())...)
}

func (a Auth) validate() error {
	n := 0
	for _, set := range []bool{a.ClientCAFile != "", a.TokenFile != "", a.None} {
		if set {
			n++
		}
	}
	if n != 1 {
		return errors.New("auth: set exactly one of clientCAFile, tokenFile and none: true")
	}
	if len(a.ClientNames) > 0 && a.ClientCAFile == "" {
		return errors.New("auth: clientNames goes with clientCAFile")
	}
	return nil
}

func (t TLS) validate() error {
	if (t.Dir != "") == (t.CertFile != "" || t.KeyFile != "") {
		return errors.New("tls: set either dir, or certFile and keyFile")
	}
	if t.Dir == "" {
		if t.CertFile == "" || t.KeyFile == "" {
			return errors.New("tls: certFile and keyFile go together")
		}
		return nil
	}
	if len(t.Names) == 0 {
		return errors.New("tls: names is empty: list the DNS names or addresses that the API server calls")
	}
	for _, n := range t.Names {
		if net.ParseIP(n) == nil && (n == "" || strings.ContainsAny(n, " :/*")) {
			return fmt.Errorf("tls: %q is neither a DNS name nor an address", n)
		}
	}
	return nil
}
