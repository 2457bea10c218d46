package run

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"reflect"
	"slices"
	"strings"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/credential"
	"github.com/tidewaiter/tidewaiter/libs/registry"
	"github.com/tidewaiter/tidewaiter/libs/store"
)

// Section is a section of the configuration, and a pointer to what it is read
// into, which holds its defaults and may have a method Validate() error.
type Section struct {
	Name string
	Into any
}

// Needs says what a service connects to.
type Needs struct {
	Service                          string
	Kafka, Redis, Database, Registry bool
}

// Checked is a configuration that Check has read.
type Checked struct {
	*Config
	Problems []Problem

	elsewhere bool
}

// Checking says what Check looks at.
type Checking struct {
	LookupEnv func(string) (string, bool)
	// Sections are those of the services.
	Sections []Section
	// Services are those that shall run with the file on real servers; none: it
	// is for the all-in-one, which brings servers of its own.
	Services []Needs
	// Elsewhere says that the file is for another machine: files and variables
	// that it names are not looked for.
	Elsewhere bool
}

// Check reads a file and reports everything that is wrong with it and can be
// seen without connecting: unknown keys, wrong types, values that cannot be,
// files, certificates and environment variables that are not there or cannot be
// used.
func Check(path string, o Checking) *Checked {
	content, err := os.ReadFile(path) //nolint:gosec // the user's own file
	if err != nil && path != "" {
		return &Checked{Problems: []Problem{{
			File: path, Problem: "the file cannot be read: " + pathless(err), Cure: "name a configuration file", Severity: contracts.ConfigError,
		}}}
	}
	c, problems := parse(path, content, o.LookupEnv)
	out := &Checked{Config: c, Problems: append(problems, c.environment()...), elsewhere: o.Elsewhere}
	services := names(o.Services)
	for _, s := range o.Sections {
		if !c.Has(s.Name) && !slices.Contains(services, s.Name) {
			continue // a process runs some services; what it does not name it does not need
		}
		out.add(c.section(s.Name, s.Into)...)
		out.files(reflect.ValueOf(s.Into), s.Name, services)
	}
	out.common(o.Services)
	return out
}

func pathless(err error) string {
	var p *os.PathError
	if errors.As(err, &p) {
		return p.Err.Error()
	}
	return err.Error()
}

func names(services []Needs) []string {
	out := make([]string, len(services))
	for i, s := range services {
		out[i] = s.Service
	}
	return out
}

// files notes what is wrong with what a section's settings name.
func (c *Checked) files(v reflect.Value, path string, services []string) {
	if !c.elsewhere {
		c.add(c.Config.files(v, path, services)...)
	}
}

// File notes it, as a mistake or a warning, when a file that a setting names,
// and whose key does not end with "File", cannot be read. It says whether it can.
func (c *Checked) File(path, name, severity string) bool {
	if name == "" || c.elsewhere {
		return false
	}
	_, err := os.Stat(name)
	if err == nil {
		return true
	}
	p := c.doc.problem(path, fmt.Sprintf("%s cannot be read: %s", name, pathless(err)), "put it there, readable for the user that services run as")
	p.Severity = severity
	c.add(p)
	return false
}

// add notes problems.
func (c *Checked) add(list ...Problem) { c.Problems = append(c.Problems, list...) }

// Wrong notes a mistake at a path, for example matcher.policy.
func (c *Checked) Wrong(path, problem, cure string) { c.add(c.doc.problem(path, problem, cure)) }

// Warn notes what services can work with and somebody should look at.
func (c *Checked) Warn(path, problem, cure string) {
	p := c.doc.problem(path, problem, cure)
	p.Severity = contracts.ConfigWarning
	c.add(p)
}

// Judge notes what else is known of a section: messages in the form of
// Validate, see place.
func (c *Checked) Judge(section string, into any, err error, severity string) {
	for _, p := range c.validated(section, reflect.TypeOf(into), err) {
		p.Severity = severity
		c.add(p)
	}
}

// Sort orders the problems by line.
func (c *Checked) Sort() { sortProblems(c.Problems) }

// Err returns the mistakes as a *ConfigError, nil where there are only warnings.
func (c *Checked) Err() error { return problemsError(c.Problems) }

// common checks the sections that all services share.
func (c *Checked) common(services []Needs) {
	that := func(needs func(Needs) bool) []string {
		return names(slices.DeleteFunc(slices.Clone(services), func(n Needs) bool { return !needs(n) }))
	}
	if _, err := NewLogger(c.Log, io.Discard); err != nil {
		c.add(c.validated("log", reflect.TypeFor[LogConfig](), errors.New(strings.TrimSuffix(err.Error(), ": "+ErrConfig.Error())))...)
	}
	if l := c.HTTP.Listen; l != "" {
		if _, _, err := net.SplitHostPort(l); err != nil {
			c.Wrong("http.listen", fmt.Sprintf("%q is no address to listen on", l), "write host:port, for example 127.0.0.1:8482")
		}
	}
	c.kafka(that(func(n Needs) bool { return n.Kafka }))
	c.redis(that(func(n Needs) bool { return n.Redis }))
	c.database(that(func(n Needs) bool { return n.Database }))
	c.registries(that(func(n Needs) bool { return n.Registry }))
}

func (c *Checked) kafka(services []string) {
	c.files(reflect.ValueOf(c.Kafka), "kafka", services)
	k := c.Kafka
	if len(k.Brokers) == 0 {
		c.needed("kafka.brokers", services, "list the brokers, host:port each, or set TIDEWAITER_KAFKA_BROKERS")
		return
	}
	if k.TLSFiles != nil {
		k.TLSSource = k.TLSFiles.Source()
	}
	c.add(c.validated("kafka", reflect.TypeFor[KafkaConfig](), k.Validate())...)
	for i, b := range k.Brokers {
		if _, _, err := net.SplitHostPort(b); err != nil {
			c.Wrong(fmt.Sprintf("kafka.brokers[%d]", i), fmt.Sprintf("%q is no address of a broker", b), "write host:port")
		}
	}
	password := k.PasswordFile != "" || k.PasswordEnv != ""
	switch {
	case k.Username != "" && !password:
		c.Wrong("kafka.username", "there is a user without a password", "add passwordFile or passwordEnv")
	case k.Username == "" && password:
		c.Wrong("kafka.passwordFile", "there is a password without a user", "add username")
	}
	if k.TLSFiles == nil && !slices.ContainsFunc(k.Brokers, local) && len(services) > 0 {
		c.Warn("kafka", "events travel to other machines without TLS", "add tls: {caFile: …}, or tls: {} for the system's authorities")
	}
}

func (c *Checked) redis(services []string) {
	c.files(reflect.ValueOf(c.Redis), "redis", services)
	r := c.Redis
	if r.URL == "" && r.Sentinel == nil && len(r.Cluster) == 0 {
		c.needed("redis.url", services, "write redis://host:port/0, or sentinel, or cluster, or set TIDEWAITER_REDIS_URL")
		return
	}
	if r.TLSFiles != nil {
		r.TLSSource = r.TLSFiles.Source()
	}
	c.add(c.validated("redis", reflect.TypeFor[RedisConfig](), r.Validate())...)
	if r.Username != "" && r.PasswordFile == "" && r.PasswordEnv == "" {
		c.Wrong("redis.username", "there is a user without a password", "add passwordFile or passwordEnv")
	}
	if u, err := url.Parse(r.URL); err == nil && u.Scheme == "redis" && !local(u.Host) && len(services) > 0 {
		c.Warn("redis.url", "Redis on another machine is reached without TLS", "write rediss://, and tls: {caFile: …} for a private authority")
	}
}

func (c *Checked) database(services []string) {
	c.files(reflect.ValueOf(c.Database), "database", services)
	d := c.Database
	if d.URLEnv != "" {
		d.URL, _ = c.lookupEnv(d.URLEnv) // that it is not set has been said
	}
	if d.URL == "" {
		if d.URLEnv == "" {
			c.needed("database.url", services, "write postgres://user@host/database, or set urlEnv or TIDEWAITER_DATABASE_URL")
		}
		return
	}
	cfg := store.Config{URL: For(d.URL, "service")}
	if d.TLSFiles != nil {
		cfg.TLSSource = d.TLSFiles.Source()
	}
	if d.PasswordFile != "" || d.PasswordEnv != "" {
		cfg.PasswordSource = credential.Secret{File: d.PasswordFile, Env: d.PasswordEnv}.Source(c.lookupEnv)
	}
	c.add(c.validated("database", reflect.TypeFor[DatabaseConfig](), cfg.CheckURL())...)
	u, err := url.Parse(cfg.URL)
	switch {
	case err != nil:
	case u.Scheme == "sqlite" && len(services) > 0:
		c.Wrong("database.url", "services that run as processes of their own cannot share SQLite", "write postgres://user@host/database; SQLite is for tidewaiter up")
	case u.Scheme == "sqlite": // has no network
	case d.TLSFiles == nil && u.Query().Get("sslmode") == "" && u.Host != "" && !local(u.Host) && len(services) > 0:
		c.Warn("database.url", "PostgreSQL on another machine may be reached without TLS, and need not prove itself", "add tls: {caFile: …}, or ?sslmode=verify-full")
	}
}

func (c *Checked) registries(services []string) {
	c.files(reflect.ValueOf(c.Registries), "registries", services)
	at := map[string]int{}
	for i, h := range c.Registries {
		path := fmt.Sprintf("registries[%d]", i)
		c.add(c.validated(path, reflect.TypeFor[registry.Host](), h.Validate())...)
		if first, twice := at[strings.ToLower(h.Name)]; twice && h.Name != "" {
			c.Wrong(join(path, "host"), fmt.Sprintf("registry %s is there already, as registries[%d]", h.Name, first), "keep one of them")
			continue
		}
		at[strings.ToLower(h.Name)] = i
		password := h.PasswordFile != "" || h.PasswordEnv != ""
		switch {
		case h.Username != "" && !password:
			c.Wrong(join(path, "username"), "there is a user without a password", "add passwordFile or passwordEnv")
		case h.Username == "" && password:
			c.Wrong(path, "there is a password without a user", "add username")
		case h.PlainHTTP && password && !local(h.Name) && (h.Address == "" || !local(h.Address)):
			c.Warn(join(path, "plainHTTP"), "a password travels to another machine without TLS", "leave plainHTTP out; caFile is for a private authority")
		}
	}
	if len(c.Registries) == 0 && len(services) > 0 {
		c.Warn("registries", "no registry is configured, so no image can be read", "add registries: [{host: …}]")
	}
}

// needed notes that a setting is missing which services need.
func (c *Checked) needed(path string, services []string, cure string) {
	if len(services) > 0 {
		c.Wrong(path, "it is not set, and needed by "+strings.Join(services, ", "), cure)
	}
}

// local says whether an address is of this machine.
func local(address string) bool {
	host := address
	if h, _, err := net.SplitHostPort(address); err == nil {
		host = h
	}
	ip := net.ParseIP(strings.Trim(host, "[]"))
	return host == "localhost" || ip != nil && ip.IsLoopback()
}
