// Package allinone runs every service in one process on the embedded Kafka,
// Redis, registry and database, each reached over its real protocol.
package allinone

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	dto "github.com/prometheus/client_model/go"

	"github.com/tidewaiter/tidewaiter/libs/embedded"
	"github.com/tidewaiter/tidewaiter/libs/run"
	"github.com/tidewaiter/tidewaiter/services/advisor"
	"github.com/tidewaiter/tidewaiter/services/advisor/artefact"
	"github.com/tidewaiter/tidewaiter/services/advisor/builtin"
	"github.com/tidewaiter/tidewaiter/services/analyzer"
	"github.com/tidewaiter/tidewaiter/services/assembler"
	"github.com/tidewaiter/tidewaiter/services/attestor"
	"github.com/tidewaiter/tidewaiter/services/attestor/statement"
	"github.com/tidewaiter/tidewaiter/services/catalog"
	"github.com/tidewaiter/tidewaiter/services/gatekeeper"
	"github.com/tidewaiter/tidewaiter/services/intake"
	"github.com/tidewaiter/tidewaiter/services/matcher"
	"github.com/tidewaiter/tidewaiter/services/planner"
	"github.com/tidewaiter/tidewaiter/services/sweeper"
	"github.com/tidewaiter/tidewaiter/services/ticketer"
)

// Source is the id of the source that the embedded registry's push
// notifications belong to.
const Source = "embedded"

// Services lists the services that exist, in the order of the pipeline.
func Services() []run.Named {
	return []run.Named{
		{Name: "intake", Run: intake.Run},
		{Name: "planner", Run: planner.Run},
		{Name: "analyzer", Run: analyzer.Run},
		{Name: "assembler", Run: assembler.Run},
		{Name: "matcher", Run: matcher.Run},
		{Name: "attestor", Run: attestor.Run},
		{Name: "catalog", Run: catalog.Run},
	}
}

// Optional lists the services that run where the configuration has their
// section: advisor follows advisories, ticketer writes tickets, gatekeeper
// answers a cluster, sweeper finds what webhooks did not tell.
func Optional() []run.Named {
	return []run.Named{
		{Name: "advisor", Run: advisor.Run},
		{Name: "ticketer", Run: ticketer.Run},
		{Name: "gatekeeper", Run: gatekeeper.Run},
		{Name: "sweeper", Run: sweeper.Run},
	}
}

// Options say how an all-in-one runs. The zero value of each field is a good default.
type Options struct {
	Dir        string      // where everything is kept; required
	Config     *run.Config // the user's own: more registries and sources, limits
	Advisories string      // snapshot file; empty: what Config says or Follow holds, else the built-in set
	Follow     []string    // sources of advisories that advisor watches: folders, archives, URLs
	Policy     string      // policy file; empty: the default policy
	// Addresses to listen on, host:port; empty: a free loopback port.
	IntakeListen, CatalogListen, MonitorListen, RegistryListen string
	// GatekeeperListen is where gatekeeper answers AdmissionReviews; empty: it
	// runs only if it is configured.
	GatekeeperListen string
	Partitions       int  // of each topic
	AnonymousPull    bool // whether the embedded registry lets anyone who reaches it read
	Log              *slog.Logger
}

// AllInOne is a running pipeline.
type AllInOne struct {
	Addresses
	Config  *run.Config // the effective configuration
	BuiltIn bool        // whether images are matched with the small built-in advisories
	Servers *embedded.Servers
	Health  *run.Health

	dir         string
	log         *slog.Logger
	metrics     *gatherer
	ctx         context.Context // of all services
	cancel      context.CancelFunc
	stopServers context.CancelFunc
	failed      chan error
	mu          sync.Mutex
	running     map[string]*service
	group       sync.WaitGroup
	monitors    sync.WaitGroup
}

type service struct {
	cancel context.CancelFunc
	done   chan error
}

// Start starts the embedded servers and every service and returns when intake
// and catalog answer. Stop it with Stop, or by ending ctx and calling Wait.
func Start(ctx context.Context, o Options) (*AllInOne, error) {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Config == nil {
		c, err := run.Parse("", nil, func(string) (string, bool) { return "", false })
		if err != nil {
			return nil, err
		}
		o.Config = c
	}
	for _, address := range []*string{&o.IntakeListen, &o.CatalogListen, &o.MonitorListen} {
		if *address != "" {
			continue
		}
		free, err := FreeAddress(ctx)
		if err != nil {
			return nil, err
		}
		*address = free
	}
	if err := os.MkdirAll(o.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("make data directory: %w", err)
	}
	secrets, err := loadSecrets(o.Dir)
	if err != nil {
		return nil, err
	}
	// Services drain before what they stand on stops.
	serversCtx, stopServers := context.WithCancel(context.WithoutCancel(ctx))
	ctx, cancel := context.WithCancel(ctx)
	servers, err := embedded.Start(serversCtx, embedded.Options{
		Dir: filepath.Join(o.Dir, "servers"), RegistryAddress: o.RegistryListen, Partitions: o.Partitions, AnonymousPull: o.AnonymousPull,
	}, o.Log)
	if err != nil {
		cancel()
		stopServers()
		return nil, fmt.Errorf("start embedded servers: %w", err)
	}
	a := &AllInOne{
		Servers: servers, Health: run.NewHealth(), dir: o.Dir, log: o.Log, ctx: ctx, cancel: cancel, stopServers: stopServers,
		metrics: &gatherer{registries: map[string]*prometheus.Registry{}}, failed: make(chan error, 1), running: map[string]*service{},
		Addresses: Addresses{
			PID:    os.Getpid(),
			Intake: Reachable(o.IntakeListen), Catalog: Reachable(o.CatalogListen), Monitor: Reachable(o.MonitorListen),
			Token: secrets.token, PublicKey: secrets.publicKey,
			Kafka:    Kafka{servers.KafkaAddress, servers.KafkaUsername, servers.KafkaPassword},
			Registry: Registry{servers.RegistryAddress, servers.RegistryUsername, servers.RegistryPassword},
		},
	}
	process := prometheus.NewRegistry()
	process.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	a.metrics.set("", process)
	if err := a.start(ctx, o, secrets); err != nil {
		cancel()
		return nil, errors.Join(err, a.Wait())
	}
	return a, nil
}

func (a *AllInOne) start(ctx context.Context, o Options, secrets secrets) error {
	matched := o.Config.Fill("matcher", map[string]any{})
	if o.Advisories == "" && len(o.Follow) == 0 && !o.Config.Has("advisor") && matched["advisories"] == nil && matched["snapshots"] == nil {
		a.BuiltIn = true
		o.Advisories = filepath.Join(o.Dir, "advisories.builtin.db")
		if err := builtin.Write(o.Advisories); err != nil {
			return fmt.Errorf("write the built-in advisories: %w", err)
		}
	}
	config, err := a.configure(o, secrets)
	if err != nil {
		return err
	}
	a.Config = config
	a.monitors.Go(func() {
		env := config.Env("monitor", a.log, nil, a.Health)
		if err := env.Serve(ctx, o.MonitorListen, run.Monitor(a.Health, a.metrics), nil); err != nil {
			a.fail(err)
		}
	})
	for _, s := range append(Services(), Optional()...) {
		if slices.ContainsFunc(Optional(), func(o run.Named) bool { return o.Name == s.Name }) && !config.Has(s.Name) {
			continue
		}
		if err := a.StartService(s.Name); err != nil {
			return err
		}
	}
	a.Servers.SetHook(a.Intake+"/hooks/"+Source, "Bearer "+secrets.hook)
	for _, address := range []string{
		o.IntakeListen, o.CatalogListen, o.MonitorListen, o.GatekeeperListen, strings.TrimPrefix(a.Sweeper, "http://"),
	} {
		if address == "" {
			continue
		}
		if err := a.listening(ctx, address); err != nil {
			return err
		}
	}
	if err := a.write(o.Dir); err != nil {
		return err
	}
	return nil
}

// configure lays the embedded servers' addresses, the secrets of this directory
// and what the options say over the user's configuration.
func (a *AllInOne) configure(o Options, s secrets) (*run.Config, error) {
	registries := []any{map[string]any{
		"host": a.Registry.Host, "plainHTTP": true, "username": a.Registry.Username, "passwordFile": s.file("registry.password"),
	}}
	var own []any
	if err := o.Config.CheckSection("registries", &own); err != nil {
		return nil, err
	}
	registries = append(registries, own...)
	if err := keep(s.file("registry.password"), a.Registry.Password); err != nil {
		return nil, err
	}
	if err := keep(s.file("kafka.password"), a.Kafka.Password); err != nil {
		return nil, err
	}
	if err := keep(s.file("redis.password"), a.Servers.RedisPassword); err != nil {
		return nil, err
	}
	// Of what the file says of servers that are ours, nothing else is used: nil takes a setting out.
	kafka := map[string]any{
		"brokers": []string{a.Kafka.Broker}, "username": a.Kafka.Username, "passwordFile": s.file("kafka.password"), "passwordEnv": nil,
		"mechanism": nil, "tls": nil, "replication": 1,
	}
	if o.Partitions > 0 {
		kafka["partitions"] = o.Partitions
	}
	config, err := o.Config.Without("redis")
	if err != nil {
		return nil, err
	}
	sections := map[string]any{
		"kafka":      kafka,
		"redis":      map[string]any{"url": a.Servers.RedisURL, "passwordFile": s.file("redis.password")},
		"registries": registries,
		"sources": map[string]any{Source: map[string]any{
			"kind": "distribution", "registry": a.Registry.Host,
			"auth": map[string]any{"bearer": map[string]any{"tokenFile": s.file("hook.secret")}},
		}},
		"intake":  map[string]any{"listen": o.IntakeListen, "admin": map[string]any{"tokenFile": s.file("token"), "tokenEnv": nil}},
		"catalog": map[string]any{"listen": o.CatalogListen, "tokenFile": s.file("token"), "tokenEnv": nil},
	}
	switch d := o.Config.Database; {
	case d.URL != "":
		sections["database"] = map[string]any{"url": d.URL} // a PostgreSQL of the user's
	case d.URLEnv == "":
		sections["database"] = map[string]any{"url": a.Servers.DatabaseURL, "passwordFile": nil, "passwordEnv": nil, "tls": nil}
	}
	matcherSection := map[string]any{}
	if len(o.Follow) > 0 || o.Config.Has("advisor") {
		advisorSection := map[string]any{
			"publish": a.Registry.Host + "/tidewaiter/advisories", "keyFile": s.file("advisor.key"), "work": filepath.Join(o.Dir, "advisor"),
		}
		if local(o.Follow) {
			advisorSection["poll"] = "5s"
		}
		advisorSection = o.Config.Fill("advisor", advisorSection)
		if len(o.Follow) > 0 {
			advisorSection["from"] = o.Follow
		}
		sections["advisor"] = advisorSection
		matcherSection = o.Config.Fill("matcher", map[string]any{
			"snapshots": advisorSection["publish"], "snapshotKeys": s.file("advisor.pub"), "cache": filepath.Join(o.Dir, "snapshots"),
		})
	}
	attestorSection := map[string]any{
		"keyFile": s.file("attestor.key"), "keyEnv": nil, "passwordFile": s.file("attestor.password"), "passwordEnv": nil,
	}
	if o.Advisories != "" {
		matcherSection["advisories"] = o.Advisories
	}
	if o.Policy != "" {
		matcherSection["policy"], attestorSection["policy"] = o.Policy, o.Policy
	}
	sections["matcher"], sections["attestor"] = matcherSection, attestorSection
	if o.GatekeeperListen != "" || o.Config.Has("gatekeeper") {
		sections["gatekeeper"] = gatekeeperSection(o, s)
	}
	if o.Config.Has("sweeper") {
		free, err := FreeAddress(a.ctx)
		if err != nil {
			return nil, err
		}
		section := o.Config.Fill("sweeper", map[string]any{"listen": free, "catalog": a.Catalog})
		for _, token := range []string{"token", "catalogToken"} {
			if section[token+"File"] == nil && section[token+"Env"] == nil {
				section[token+"File"] = s.file("token")
			}
		}
		sections["sweeper"] = section
		if listen, ok := section["listen"].(string); ok {
			a.Sweeper = Reachable(listen)
		}
	}
	return config.With(sections)
}

// gatekeeperSection has what the file says; only where it says nothing, the
// API's token, our own key and a certificate that gatekeeper makes.
func gatekeeperSection(o Options, s secrets) map[string]any {
	section := o.Config.Fill("gatekeeper", map[string]any{"keyFiles": []string{s.file("attestor.pub")}})
	if section["auth"] == nil {
		section["auth"] = map[string]any{"tokenFile": s.file("token")}
	}
	if t, ok := section["tls"].(map[string]any); !ok || t["certFile"] == nil {
		section["tls"] = o.Config.Fill("gatekeeper", map[string]any{
			"tls": map[string]any{"dir": filepath.Join(o.Dir, "gatekeeper"), "names": []string{"127.0.0.1", "localhost"}},
		})["tls"]
	}
	if o.GatekeeperListen != "" {
		section["listen"] = o.GatekeeperListen
	}
	return section
}

// local says whether all sources are on this machine, where looking costs nothing.
func local(sources []string) bool {
	return len(sources) > 0 && !slices.ContainsFunc(sources, func(s string) bool { return strings.Contains(s, "://") })
}

// StartService starts a service that is stopped.
func (a *AllInOne) StartService(name string) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.running[name] != nil {
		return fmt.Errorf("service %s is running", name)
	}
	for _, s := range append(Services(), Optional()...) {
		if s.Name != name {
			continue
		}
		ctx, cancel := context.WithCancel(a.ctx)
		r := &service{cancel: cancel, done: make(chan error, 1)}
		a.running[name] = r
		a.group.Go(func() {
			defer cancel()
			metrics := prometheus.NewRegistry()
			a.metrics.set(name, metrics)
			env := a.Config.Env(name, a.log.With("service", name), metrics, a.Health)
			err := errors.Join(run.Ended(ctx, s.Run(ctx, env)), env.Close())
			if err != nil {
				err = fmt.Errorf("service %s: %w", name, err)
				a.fail(err)
			}
			r.done <- err
		})
		return nil
	}
	return fmt.Errorf("there is no service %q", name)
}

// StopService stops a service as a signal would, and returns when it has drained.
func (a *AllInOne) StopService(name string) error {
	a.mu.Lock()
	r := a.running[name]
	delete(a.running, name)
	a.mu.Unlock()
	if r == nil {
		return fmt.Errorf("service %s is not running", name)
	}
	r.cancel()
	return <-r.done
}

// fail keeps the first failure and stops everything.
func (a *AllInOne) fail(err error) {
	select {
	case a.failed <- err:
	default:
	}
	a.cancel()
}

// Stop stops everything and waits for it.
func (a *AllInOne) Stop() error {
	a.cancel()
	return a.Wait()
}

// Wait returns when everything has stopped, with the first failure.
func (a *AllInOne) Wait() error {
	a.group.Wait()
	a.monitors.Wait()
	a.cancel()
	a.stopServers()
	err := a.Servers.Wait()
	if rmErr := os.Remove(filepath.Join(a.dir, addressesFile)); rmErr != nil && !errors.Is(rmErr, fs.ErrNotExist) {
		err = errors.Join(err, rmErr)
	}
	select {
	case failure := <-a.failed:
		return errors.Join(failure, err)
	default:
		return err
	}
}

// listening waits until somebody listens on address or a service has failed.
func (a *AllInOne) listening(ctx context.Context, address string) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	var dialer net.Dialer
	for {
		conn, err := dialer.DialContext(ctx, "tcp", address)
		if err == nil {
			return conn.Close()
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("nothing listens on %s: %w", address, err)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// FreeAddress returns a loopback address on which nothing listens.
func FreeAddress(ctx context.Context) (string, error) {
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return "", fmt.Errorf("find a free port: %w", err)
	}
	return l.Addr().String(), l.Close()
}

// secrets are the passwords and keys of one data directory.
type secrets struct {
	dir, token, hook, publicKey string
}

func (s secrets) file(name string) string { return filepath.Join(s.dir, name) }

// loadSecrets makes what is missing, so that a second start finds the same.
func loadSecrets(dir string) (secrets, error) {
	s := secrets{dir: filepath.Join(dir, "secrets")}
	if err := os.MkdirAll(s.dir, 0o700); err != nil {
		return s, fmt.Errorf("make directory of secrets: %w", err)
	}
	var password string
	for name, into := range map[string]*string{"token": &s.token, "hook.secret": &s.hook, "attestor.password": &password} {
		b, err := os.ReadFile(s.file(name))
		if errors.Is(err, fs.ErrNotExist) {
			b = []byte(random())
			err = os.WriteFile(s.file(name), b, 0o600)
		}
		if err != nil {
			return s, fmt.Errorf("secret %s: %w", name, err)
		}
		*into = string(b)
	}
	if err := s.advisorKey(); err != nil {
		return s, fmt.Errorf("key of advisor: %w", err)
	}
	public, err := os.ReadFile(s.file("attestor.pub"))
	if errors.Is(err, fs.ErrNotExist) {
		var private []byte
		private, public, err = statement.GenerateKey([]byte(password))
		if err == nil {
			err = os.WriteFile(s.file("attestor.key"), private, 0o600)
		}
		if err == nil {
			err = os.WriteFile(s.file("attestor.pub"), public, 0o600) // last: both are there once it is
		}
	}
	if err != nil {
		return s, fmt.Errorf("signing key: %w", err)
	}
	s.publicKey = string(public)
	return s, nil
}

// advisorKey makes the key that signs advisory snapshots.
func (s secrets) advisorKey() error {
	if _, err := os.Stat(s.file("advisor.pub")); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	private, public, err := artefact.GenerateKey()
	if err != nil {
		return err
	}
	return errors.Join(keep(s.file("advisor.key"), string(private)), keep(s.file("advisor.pub"), string(public)))
}

func keep(name, secret string) error {
	if err := os.WriteFile(name, []byte(secret), 0o600); err != nil {
		return fmt.Errorf("keep secret: %w", err)
	}
	return nil
}

func random() string {
	b := make([]byte, 16)
	_, _ = rand.Read(b) // documented never to fail
	return hex.EncodeToString(b)
}

// GatekeeperDir returns where gatekeeper keeps its authority and certificate.
func (a *AllInOne) GatekeeperDir() string { return filepath.Join(a.dir, "gatekeeper") }

// SecretFile returns where a secret of this data directory is kept.
func (a *AllInOne) SecretFile(name string) string {
	return secrets{dir: filepath.Join(a.dir, "secrets")}.file(name)
}

// gatherer collects the metrics of all services. A service that is started
// again begins with new ones, as a new process would.
type gatherer struct {
	mu         sync.Mutex
	registries map[string]*prometheus.Registry
}

func (g *gatherer) set(service string, r *prometheus.Registry) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.registries[service] = r
}

// Gather implements prometheus.Gatherer.
func (g *gatherer) Gather() ([]*dto.MetricFamily, error) {
	g.mu.Lock()
	var all prometheus.Gatherers
	for _, name := range slices.Sorted(maps.Keys(g.registries)) {
		all = append(all, g.registries[name])
	}
	g.mu.Unlock()
	return all.Gather()
}
