package run

import (
	"errors"
	"fmt"
	"io/fs"
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

	path      string
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
		"catalog", "sweeper", "ticketer", "gatekeeper", "watcher",
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
	c, err := parse(path, content, lookupEnv)
	if err != nil {
		return nil, err
	}
	if err := c.environment(); err != nil {
		return nil, err
	}
	return c, nil
}

func parse(path string, content []byte, lookupEnv func(string) (string, bool)) (*Config, error) {
	c := &Config{path: path, root: map[string]ast.Node{}, lookupEnv: lookupEnv}
	file, err := parser.ParseBytes(content, 0)
	if err != nil {
		return nil, c.problem(err)
	}
	if len(file.Docs) > 1 {
		return nil, fmt.Errorf("%s: holds %d YAML documents, one is expected: %w", c.name(), len(file.Docs), ErrConfig)
	}
	var problems []error
	if len(file.Docs) == 1 && file.Docs[0].Body != nil {
		problems = c.index(file.Docs[0].Body)
	}
	for section, into := range map[string]any{
		"log": &c.Log, "http": &c.HTTP, "kafka": &c.Kafka, "redis": &c.Redis,
		"database": &c.Database, "registries": &c.Registries,
	} {
		problems = append(problems, c.decode(section, into))
	}
	if err := errors.Join(problems...); err != nil {
		return nil, err
	}
	return c, nil
}

func (c *Config) index(body ast.Node) []error {
	var entries []*ast.MappingValueNode
	switch n := body.(type) {
	case *ast.MappingNode:
		entries = n.Values
	case *ast.MappingValueNode:
		entries = []*ast.MappingValueNode{n}
	case *ast.NullNode, *ast.CommentGroupNode:
		return nil
	default:
		return []error{fmt.Errorf("%s:%d: the file must hold sections (\"kafka:\", \"registries:\", …): %w",
			c.name(), body.GetToken().Position.Line, ErrConfig)}
	}
	known := append(slices.Clone(common), Services()...)
	var problems []error
	for _, e := range entries {
		key := e.Key.String()
		if quoted, ok := e.Key.(*ast.StringNode); ok {
			key = quoted.Value
		}
		if !slices.Contains(known, key) {
			problems = append(problems, fmt.Errorf("%s:%d: unknown section %q, known are %s: %w",
				c.name(), e.GetToken().Position.Line, key, strings.Join(known, ", "), ErrConfig))
			continue
		}
		c.root[key] = e.Value
	}
	return problems
}

// decode reads one section into the struct or slice that into points at.
// Absent sections leave it as it is.
func (c *Config) decode(section string, into any) error {
	node, ok := c.root[section]
	if !ok || node.Type() == ast.NullType {
		return nil
	}
	if err := yaml.NodeToValue(node, into, yaml.Strict()); err != nil {
		return c.problem(err)
	}
	return nil
}

// Secret reads a secret from a file or an environment variable, whichever is
// named; neither gives "". what names the setting in errors.
func Secret(what, file, env string, lookupEnv func(string) (string, bool)) (string, error) {
	switch {
	case file != "" && env != "":
		return "", fmt.Errorf("%s: a secret is named both as a file and as an environment variable, keep one: %w", what, ErrConfig)
	case file != "":
		b, err := os.ReadFile(file) //nolint:gosec // a file that the configuration names
		if err != nil {
			return "", fmt.Errorf("%s: read secret: %w: %w", what, err, ErrConfig)
		}
		return strings.TrimRight(string(b), "\r\n"), nil
	case env != "":
		v, ok := lookupEnv(env)
		if !ok {
			return "", fmt.Errorf("%s: environment variable %s is not set: %w", what, env, ErrConfig)
		}
		return v, nil
	}
	return "", nil
}

// With returns the configuration with sections merged over it, as the
// all-in-one does with the addresses of its embedded servers: maps are merged
// key by key, anything else is replaced.
func (c *Config) With(sections map[string]any) (*Config, error) {
	merged := map[string]any{}
	for name, node := range c.root {
		var v any
		if err := yaml.NodeToValue(node, &v); err != nil {
			return nil, c.problem(err)
		}
		merged[name] = v
	}
	content, err := yaml.Marshal(merge(merged, sections))
	if err != nil {
		return nil, fmt.Errorf("merge configuration: %w", err)
	}
	// Addresses were merged in: of the environment, only variables that the file names are still looked up.
	return parse(c.path, content, c.lookupEnv)
}

// Without returns the configuration without a section.
func (c *Config) Without(section string) (*Config, error) {
	out := &Config{path: c.path, root: maps.Clone(c.root), lookupEnv: c.lookupEnv}
	delete(out.root, section)
	return out.With(nil)
}

// Fill returns a section as With takes it: what the file says goes before
// defaults, key by key.
func (c *Config) Fill(section string, defaults map[string]any) map[string]any {
	own := map[string]any{}
	if node, ok := c.root[section]; ok {
		if err := yaml.NodeToValue(node, &own); err != nil {
			return defaults // no mapping: With and the section's own check say so
		}
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

// CheckSection decodes and validates a section without running anything.
func (c *Config) CheckSection(name string, into any) error {
	if err := c.decode(name, into); err != nil {
		return err
	}
	v, ok := into.(interface{ Validate() error })
	if !ok {
		return nil
	}
	if err := v.Validate(); err != nil {
		where := c.name()
		if node, ok := c.root[name]; ok {
			where = fmt.Sprintf("%s:%d", where, node.GetToken().Position.Line)
		}
		return fmt.Errorf("%s: section %q: %w: %w", where, name, err, ErrConfig)
	}
	return nil
}

// Has says whether the file holds a section.
func (c *Config) Has(section string) bool { return c.root[section] != nil }

func (c *Config) name() string {
	if c.path == "" {
		return "configuration"
	}
	return c.path
}

// problem turns an error of the YAML library into one line that says where,
// without the source text around it, which may hold a secret.
func (c *Config) problem(err error) error {
	var pathErr *fs.PathError
	if errors.As(err, &pathErr) {
		return fmt.Errorf("%s: %w: %w", c.name(), err, ErrConfig)
	}
	var y yaml.Error
	if errors.As(err, &y) {
		line := 0
		if t := y.GetToken(); t != nil && t.Position != nil {
			line = t.Position.Line
		}
		return fmt.Errorf("%s:%d: %s: %w", c.name(), line, y.GetMessage(), ErrConfig)
	}
	return fmt.Errorf("%s: %s: %w", c.name(), reflect.TypeOf(err), ErrConfig)
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
