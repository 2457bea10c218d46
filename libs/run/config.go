package run

import (
	"errors"
	"fmt"
	"maps"
	"net/url"
	"os"
	"reflect"
	"slices"
	"strings"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/parser"

	"github.com/tidewaiter/tidewaiter/libs/bus"
	"github.com/tidewaiter/tidewaiter/libs/credential"
	"github.com/tidewaiter/tidewaiter/libs/redis"
	"github.com/tidewaiter/tidewaiter/libs/registry"
)

// ErrConfig is returned for a configuration that cannot be used.
var ErrConfig = errors.New("configuration is not usable")

// LogConfig is the section "log".
type LogConfig struct {
	Level  string `yaml:"level"`  // debug, info, warn, error
	Format string `yaml:"format"` // json, text
}

// HTTPConfig is the section "http".
type HTTPConfig struct {
	Listen string `yaml:"listen"` // host:port for /healthz, /readyz, /metrics; empty: none
}

// KafkaConfig is the section "kafka".
type KafkaConfig struct {
	bus.Config   `yaml:",inline"`
	PasswordFile string          `yaml:"passwordFile"` // read at every connection
	PasswordEnv  string          `yaml:"passwordEnv"`
	TLSFiles     *credential.TLS `yaml:"tls"` // absent: no TLS; {}: TLS with the system's authorities
}

// RedisConfig is the section "redis".
type RedisConfig struct {
	redis.Config `yaml:",inline"`
	PasswordFile string          `yaml:"passwordFile"` // read at every connection
	PasswordEnv  string          `yaml:"passwordEnv"`
	TLSFiles     *credential.TLS `yaml:"tls"`
}

// DatabaseConfig is the section "database".
type DatabaseConfig struct {
	URL          string          `yaml:"url"`          // sqlite:///file or postgres://…
	URLEnv       string          `yaml:"urlEnv"`       // environment variable that holds it, since it may hold a password
	PasswordFile string          `yaml:"passwordFile"` // read at every connection
	PasswordEnv  string          `yaml:"passwordEnv"`
	TLSFiles     *credential.TLS `yaml:"tls"` // means verify-full
}

// Config is the one file behind all services. Each service has a section of
// its own beside the common ones, see Env.Section.
type Config struct {
	Log        LogConfig
	HTTP       HTTPConfig
	Kafka      KafkaConfig
	Redis      RedisConfig
	Database   DatabaseConfig
	Registries []registry.Host

	doc       *document
	root      map[string]ast.Node // by top-level key
	lookupEnv func(string) (string, bool)
}

// common are the sections that every service reads, beside Services.
var common = []string{"log", "http", "kafka", "redis", "database", "registries", "sources"}

// Services are the names of Tidewaiter's services, each of which may have a
// section in the configuration.
func Services() []string {
	return []string{
		"intake", "planner", "analyzer", "assembler", "matcher", "attestor", "advisor",
		"catalog", "sweeper", "ticketer", "gatekeeper",
	}
}

// Load reads a configuration file; path "" is an empty one. The environment
// goes before the file in the sections log, http, kafka, redis and database:
// TIDEWAITER_KAFKA_BROKERS (lists are separated by commas) is kafka.brokers,
// TIDEWAITER_REDIS_TLS_CA_FILE is redis.tls.caFile, and so on. errors.Is(err, ErrConfig).
func Load(path string, lookupEnv func(string) (string, bool)) (*Config, error) {
	var content []byte
	if path != "" {
		b, err := os.ReadFile(path) //nolint:gosec // the user's own file
		if err != nil {
			return nil, fmt.Errorf("read configuration: %w: %w", err, ErrConfig)
		}
		content = b
	}
	return Parse(path, content, lookupEnv)
}

// Parse is Load for content that is at hand; path only names it in errors.
func Parse(path string, content []byte, lookupEnv func(string) (string, bool)) (*Config, error) {
	c, problems := parse(path, content, lookupEnv)
	problems = append(problems, c.environment()...)
	if err := problemsError(problems); err != nil {
		return nil, err
	}
	return c, nil
}

// parse returns what could be read, and every mistake.
func parse(path string, content []byte, lookupEnv func(string) (string, bool)) (*Config, []Problem) {
	if path == "" {
		path = "configuration"
	}
	c := &Config{doc: newDocument(path, nil), root: map[string]ast.Node{}, lookupEnv: lookupEnv}
	file, err := parser.ParseBytes(content, 0, parser.AllowDuplicateMapKey())
	if err != nil {
		return c, []Problem{c.syntax(err)}
	}
	if len(file.Docs) > 1 {
		return c, []Problem{c.doc.problem("", fmt.Sprintf("the file holds %d YAML documents", len(file.Docs)), "keep one: take the lines --- out")}
	}
	var problems []Problem
	if len(file.Docs) == 1 && file.Docs[0].Body != nil {
		c.doc = newDocument(path, file.Docs[0].Body)
		problems = c.index(file.Docs[0].Body)
	}
	for section, into := range c.commonSections() {
		problems = append(problems, c.decode(section, into)...)
	}
	sortProblems(problems)
	return c, problems
}

func (c *Config) commonSections() map[string]any {
	return map[string]any{
		"log": &c.Log, "http": &c.HTTP, "kafka": &c.Kafka, "redis": &c.Redis, "database": &c.Database, "registries": &c.Registries,
	}
}

// index finds the sections.
func (c *Config) index(body ast.Node) []Problem {
	if t := body.Type(); t == ast.NullType || t == ast.CommentType {
		return nil
	}
	d := decoding{document: c.doc}
	entries, ok := d.entries(body, "", "a file of sections (\"kafka:\", \"registries:\", …)")
	if !ok {
		return d.problems
	}
	known := append(slices.Clone(common), Services()...)
	for _, e := range entries {
		if slices.Contains(known, e.key) {
			c.root[e.key] = e.value
			continue
		}
		cure := "known are " + strings.Join(known, ", ")
		if likely := nearest(e.key, known); likely != "" {
			cure = fmt.Sprintf("did you mean %q?", likely)
		}
		d.wrong(e.path, e.line, "unknown section", cure)
	}
	return d.problems
}

// decode reads one section into the struct, map or slice that into points at.
// Absent sections leave it as it is.
func (c *Config) decode(section string, into any) []Problem {
	node, ok := c.root[section]
	if !ok {
		return nil
	}
	d := decoding{document: c.doc}
	d.decode(node, reflect.ValueOf(into).Elem(), section)
	return d.problems
}

// Secret reads a secret from a file or an environment variable, whichever is
// named; neither gives "". what names the setting in errors. errors.Is(err, ErrConfig).
func Secret(what, file, env string, lookupEnv func(string) (string, bool)) (string, error) {
	secret, err := credential.Secret{File: file, Env: env}.Read(lookupEnv)
	if err != nil {
		return "", fmt.Errorf("%s: %w: %w", what, err, ErrConfig)
	}
	return secret, nil
}

// With returns the configuration with sections merged over it, as the
// all-in-one does with the addresses of its embedded servers: maps are merged
// key by key, anything else is replaced.
func (c *Config) With(sections map[string]any) (*Config, error) {
	merged := map[string]any{}
	d := decoding{document: c.doc}
	for name, node := range c.root {
		merged[name] = d.plain(node, name)
	}
	if err := problemsError(d.problems); err != nil {
		return nil, err
	}
	content, err := yaml.Marshal(merge(merged, sections))
	if err != nil {
		return nil, fmt.Errorf("merge configuration: %w", err)
	}
	// Addresses were merged in: of the environment, only variables that the file names are still looked up.
	out, problems := parse(c.doc.file, content, c.lookupEnv)
	if err := problemsError(problems); err != nil {
		return nil, err
	}
	return out, nil
}

// Without returns the configuration without a section.
func (c *Config) Without(section string) (*Config, error) {
	out := &Config{doc: c.doc, root: maps.Clone(c.root), lookupEnv: c.lookupEnv}
	delete(out.root, section)
	return out.With(nil)
}

// Fill returns a section as With takes it: what the file says goes before
// defaults, key by key.
func (c *Config) Fill(section string, defaults map[string]any) map[string]any {
	node, ok := c.root[section]
	if !ok {
		return defaults
	}
	d := decoding{document: c.doc}
	own, ok := d.plain(node, section).(map[string]any)
	if !ok {
		return defaults // no mapping: With and the section's own check say so
	}
	return merge(defaults, own)
}

func merge(into, from map[string]any) map[string]any {
	out := maps.Clone(into)
	for k, v := range from {
		a, okA := out[k].(map[string]any)
		b, okB := v.(map[string]any)
		if okA && okB {
			out[k] = merge(a, b)
			continue
		}
		out[k] = v
	}
	return out
}

// CheckSection decodes and validates a section without running anything. Every
// mistake in it is reported, with its line; errors.Is(err, ErrConfig).
func (c *Config) CheckSection(name string, into any) error {
	return problemsError(c.section(name, into))
}

// section decodes and validates.
func (c *Config) section(name string, into any) []Problem {
	problems := c.decode(name, into)
	v, ok := into.(interface{ Validate() error })
	if !ok {
		return problems
	}
	unread := slices.Clone(problems)
	for _, p := range c.validated(name, reflect.TypeOf(into), v.Validate()) {
		// What could not be read is not judged.
		if !slices.ContainsFunc(unread, func(u Problem) bool { return within(p.Path, u.Path) || within(u.Path, p.Path) && p.Path != name }) {
			problems = append(problems, p)
		}
	}
	return problems
}

// within says whether a path is that of outer, or of what is in it.
func within(path, outer string) bool {
	rest, ok := strings.CutPrefix(path, outer)
	return ok && (rest == "" || rest[0] == '.' || rest[0] == '[')
}

// validated returns what a Validate said, with its lines.
func (c *Config) validated(name string, t reflect.Type, err error) []Problem {
	var problems []Problem
	for _, message := range flatten(err) {
		message = strings.TrimPrefix(message, name+": ")
		path := c.doc.locate(name, t, message)
		problem, cure := splitCure(message, path)
		problems = append(problems, c.doc.problem(path, problem, cure))
	}
	return problems
}

// Has says whether the file holds a section.
func (c *Config) Has(section string) bool { return c.root[section] != nil }

// syntax turns an error of the YAML library into a problem, without the source
// text around it, which may hold a secret.
func (c *Config) syntax(err error) Problem {
	p := c.doc.problem("", "this is no YAML", "mind indentation and quotes")
	var y yaml.Error
	if errors.As(err, &y) {
		p.Problem = y.GetMessage()
		if t := y.GetToken(); t != nil && t.Position != nil {
			p.Line = t.Position.Line
		}
	}
	return p
}

// RedactURL returns a URL without its user's password; what is no URL is not
// shown at all.
func RedactURL(raw string) string {
	if raw == "" {
		return "not set"
	}
	u, err := url.Parse(raw)
	if err != nil {
		return "not a URL"
	}
	query := u.Query()
	for name := range query {
		if strings.Contains(strings.ToLower(name), "password") {
			query.Set(name, "xxxxx")
		}
	}
	u.RawQuery = query.Encode()
	return u.Redacted()
}
