//go:build real

package e2e

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/tidewaiter/tidewaiter/libs/credential"
	"github.com/tidewaiter/tidewaiter/libs/registry"
	"github.com/tidewaiter/tidewaiter/services/tidewaiter/access"
	"github.com/tidewaiter/tidewaiter/services/tidewaiter/access/accesstest"
	"github.com/tidewaiter/tidewaiter/services/tidewaiter/sample"
)

// ownCredentials are what each service of an installation proves itself with: a
// principal of Kafka, a user of Redis, a role of PostgreSQL, a user of the
// registries, each with a password of its own per service. (In docker-registry
// every user may do all: htpasswd knows no rights.)
type ownCredentials struct {
	name      string            // before the services' names
	passwords map[string]string // by service
	dir       string            // of the files with the passwords
}

// newCredentials thinks out passwords; nobody knows them yet.
func newCredentials(t *testing.T, name string) *ownCredentials {
	t.Helper()
	c := &ownCredentials{name: name, passwords: map[string]string{}, dir: t.TempDir()}
	for _, s := range access.Services() {
		c.passwords[s.Name] = rand.Text()
	}
	c.passwords["cli"] = rand.Text()
	for service, password := range c.passwords {
		if err := os.WriteFile(filepath.Join(c.dir, service), []byte(password), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return c
}

func (c *ownCredentials) user() string { return c.name + "-{service}" }
func (c *ownCredentials) role() string { return c.name + "_{service}" }

func (c *ownCredentials) of(template, service string) string {
	return strings.ReplaceAll(template, "{service}", service)
}

// configure says how the one file of all services names them.
func (c *ownCredentials) configure(t *testing.T, s realServers, sections map[string]any) {
	t.Helper()
	file := filepath.Join(c.dir, "{service}")
	kafka := sections["kafka"].(map[string]any)
	kafka["username"], kafka["passwordFile"] = c.user(), file
	redis := sections["redis"].(map[string]any)
	at, err := url.Parse(os.Getenv("SERVERS_REDIS_URL"))
	if err != nil {
		t.Fatal(err)
	}
	at.User = nil
	redis["url"], redis["username"], redis["passwordFile"] = at.String(), c.user(), file
	var registries []map[string]any
	if err := s.config.CheckSection("registries", &registries); err != nil {
		t.Fatal(err)
	}
	var own []any
	for _, r := range registries {
		r["username"], r["passwordFile"] = c.user(), file
		own = append(own, r)
	}
	sections["registries"] = own
	database := c.database(t)
	query := database.Query()
	query.Del("passfile")
	sections["database"] = map[string]any{
		"url": fmt.Sprintf("postgres://%s@%s/%s?%s", c.role(), database.Host, c.name, query.Encode()), "passwordFile": file,
	}
}

// database is the installation's, as an administrator reaches it.
func (c *ownCredentials) database(t *testing.T) *url.URL {
	t.Helper()
	u, err := url.Parse(os.Getenv("SERVERS_POSTGRES_ADMIN_URL"))
	if err != nil {
		t.Fatal(err)
	}
	u.Path = "/" + c.name
	return u
}

// grant does on the servers what the program prints, as deploy/security.md says.
func (i *installation) grant(t *testing.T, c *ownCredentials) {
	t.Helper()
	i.grantKafka(t, c)
	i.grantPostgres(t, c)
	i.grantRegistries(t, c)
	for line := range strings.Lines(i.printed("privileges", "redis", "--user", c.user())) {
		words := strings.Fields(line) // ACL SETUSER name …
		for _, command := range [][]string{words, {"ACL", "SETUSER", words[2], ">" + c.passwordOf(c.user(), words[2])}} {
			if out := ctl(t, append([]string{"redis-cli"}, command...)...); strings.TrimSpace(out) != "OK" {
				t.Fatalf("redis: %s: %s", words[2], out)
			}
		}
		t.Cleanup(func() { ctl(t, "redis-cli", "ACL", "DELUSER", words[2]) })
	}
}

// passwordOf returns the password of the service that has a name.
func (c *ownCredentials) passwordOf(template, name string) string {
	for service, password := range c.passwords {
		if c.of(template, service) == name {
			return password
		}
	}
	return ""
}

func (i *installation) grantKafka(t *testing.T, c *ownCredentials) {
	t.Helper()
	secret, err := credential.Secret{File: os.Getenv("SERVERS_KAFKA_ADMIN_PASSWORD_FILE")}.Read(noEnv)
	if err != nil {
		t.Fatal(err)
	}
	var authority *tls.Config
	if i.servers.kafka.TLSSource != nil {
		if authority, err = i.servers.kafka.TLSSource(); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	admin, err := accesstest.Client(i.servers.kafka.Brokers, authority, "admin", secret)
	if err != nil {
		t.Fatal(err)
	}
	defer admin.Close()
	for service, password := range c.passwords {
		if err := accesstest.Users(ctx, admin, password, c.of(c.user(), service)); err != nil {
			t.Fatal(err)
		}
	}
	if err := accesstest.Run(ctx, admin, i.printed("privileges", "kafka", "--user", c.user())); err != nil {
		t.Fatal(err)
	}
}

func (i *installation) grantPostgres(t *testing.T, c *ownCredentials) {
	t.Helper()
	ctl(t, "psql", "-c", "CREATE DATABASE "+c.name)
	t.Setenv("OWNER_URL", c.database(t).String())
	i.printed("privileges", "postgres", "--role", c.role(), "--apply-with-env", "OWNER_URL")
	roles := strings.Fields(ctl(t, "psql", "-c", "SELECT rolname FROM pg_roles WHERE starts_with(rolname, '"+c.name+"_')"))
	for _, role := range roles {
		ctl(t, "psql", "-c", fmt.Sprintf("ALTER ROLE %q PASSWORD '%s'", role, c.passwordOf(c.role(), role)))
	}
	t.Cleanup(func() {
		ctl(t, "psql", "-c", "DROP DATABASE "+c.name+" WITH (FORCE)")
		for _, role := range roles {
			ctl(t, "psql", "-c", fmt.Sprintf("DROP ROLE %q", role))
		}
	})
}

// grantRegistries makes a user a service in both registries.
func (i *installation) grantRegistries(t *testing.T, c *ownCredentials) {
	t.Helper()
	type user struct {
		Password string   `json:"password"`
		Scopes   []string `json:"scopes"`
	}
	file := os.Getenv("SERVERS_REGISTRY_USERS")
	content, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	users := map[string]user{}
	if err := json.Unmarshal(content, &users); err != nil {
		t.Fatal(err)
	}
	htpasswd, err := os.ReadFile(os.Getenv("SERVERS_REGISTRY_HTPASSWD"))
	if err != nil {
		t.Fatal(err)
	}
	scopes := i.scopes()
	for service, password := range c.passwords {
		name := c.of(c.user(), service)
		users[name] = user{password, scopes[service]}
		cmd := exec.CommandContext(t.Context(), "htpasswd", "-niBC", "5", name)
		cmd.Stdin = strings.NewReader(password)
		line, err := cmd.Output()
		if err != nil {
			t.Fatal(err)
		}
		htpasswd = fmt.Appendf(htpasswd, "%s\n", bytes.TrimSpace(line))
	}
	if content, err = json.Marshal(users); err != nil {
		t.Fatal(err)
	}
	replaceFile(t, file, content)
	replaceFile(t, os.Getenv("SERVERS_REGISTRY_HTPASSWD"), htpasswd)
}

// scopes are what the program prints for each service.
func (i *installation) scopes() map[string][]string {
	all := map[string][]string{"cli": {"repository:*:pull"}} // it verifies
	for line := range strings.Lines(i.printed("privileges", "registry")) {
		words := strings.Fields(line)
		all[words[0]] = slices.DeleteFunc(words[1:], func(w string) bool { return !strings.Contains(w, ":") })
	}
	return all
}

// refused checks that the registry lets nobody do what is not his to do.
func (i *installation) refused(t *testing.T) {
	t.Helper()
	if os.Getenv("SERVERS_AUTH") != "1" {
		return
	}
	as := func(service string) *registry.Client {
		t.Helper()
		h := i.servers.registry
		h.Username, h.PasswordFile = i.credentials.of(i.credentials.user(), service), filepath.Join(i.credentials.dir, service)
		return i.registryClient(h)
	}
	small := fleet(t, 1, 10<<10, 10<<10)[0]
	push := func(service, repository string) error {
		_, err := sample.Push(t.Context(), as(service), registry.Ref{Registry: i.servers.registry.Name, Repository: repository, Tag: "refused"}, small)
		return err
	}
	for _, s := range access.Services() {
		if s.Registry == access.NoRegistry {
			continue
		}
		if s.Registry != access.Push {
			if err := push(s.Name, i.name+"/refused/by-"+s.Name); !errors.Is(err, registry.ErrUnauthorized) {
				t.Errorf("%s pushes an image: %v, want ErrUnauthorized", s.Name, err)
			}
		}
		_, err := as(s.Name).ListRepositories(t.Context(), i.servers.registry.Name, "", 10)
		if s.Registry != access.List && !errors.Is(err, registry.ErrUnauthorized) {
			t.Errorf("%s lists repositories: %v, want ErrUnauthorized", s.Name, err)
		}
	}
}

// connected checks that Redis and PostgreSQL serve nobody but the services' own
// users, and every one of those that run. (In Kafka no other user is configured.)
func (i *installation) connected(t *testing.T) {
	t.Helper()
	if os.Getenv("SERVERS_AUTH") != "1" {
		return
	}
	roles := strings.Fields(ctl(t, "psql", "-c", "SELECT DISTINCT usename FROM pg_stat_activity WHERE datname = '"+i.name+"'"))
	var users []string
	for client := range strings.Lines(ctl(t, "redis-cli", "CLIENT", "LIST")) {
		for word := range strings.FieldsSeq(client) {
			if user, ok := strings.CutPrefix(word, "user="); ok && user != "admin" { // admin is who asks
				users = append(users, user)
			}
		}
	}
	slices.Sort(users)
	slices.Sort(roles)
	users = slices.Compact(users)
	var wantRoles, wantUsers []string
	for _, p := range i.all {
		s, _ := access.Find(p.service)
		if s.Database {
			wantRoles = append(wantRoles, i.name+"_"+s.Name)
		}
		if s.NeedsRedis {
			wantUsers = append(wantUsers, i.name+"-"+s.Name)
		}
	}
	missing := func(all, want []string) bool {
		return slices.ContainsFunc(want, func(w string) bool { return !slices.Contains(all, w) })
	}
	foreign := func(all []string, prefix string) bool {
		return slices.ContainsFunc(all, func(a string) bool { return !strings.HasPrefix(a, prefix) })
	}
	if missing(roles, wantRoles) || foreign(roles, i.name+"_") {
		t.Errorf("connected to PostgreSQL are %v, want %v", roles, wantRoles)
	}
	if missing(users, wantUsers) || foreign(users, i.name+"-") {
		t.Errorf("connected to Redis are %v, want at least %v", users, wantUsers)
	}
}

// printed is what the program prints, as the first process is configured.
func (i *installation) printed(args ...string) string {
	i.t.Helper()
	code, stdout, stderr := i.cli(args...)
	if code != 0 {
		i.t.Fatalf("tidewaiter %s: exit code %d\n%s", strings.Join(args, " "), code, stderr)
	}
	return stdout
}

// ctl runs servers.sh, for instance to kill a broker, and returns what it printed.
func ctl(t *testing.T, args ...string) string {
	t.Helper()
	var problems strings.Builder
	cmd := exec.CommandContext(context.WithoutCancel(t.Context()), os.Getenv("SERVERS_CTL"), args...)
	cmd.Stderr = &problems
	out, err := cmd.Output()
	if err != nil { // the arguments may hold a password
		t.Fatalf("servers.sh %s: %v\n%s%s", args[0], err, out, problems.String())
	}
	return string(out)
}
