package main

import (
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"slices"
	"strings"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/run"
	"github.com/tidewaiter/tidewaiter/services/advisor"
	"github.com/tidewaiter/tidewaiter/services/analyzer"
	"github.com/tidewaiter/tidewaiter/services/assembler"
	"github.com/tidewaiter/tidewaiter/services/attestor"
	"github.com/tidewaiter/tidewaiter/services/catalog"
	"github.com/tidewaiter/tidewaiter/services/gatekeeper"
	"github.com/tidewaiter/tidewaiter/services/intake"
	"github.com/tidewaiter/tidewaiter/services/matcher"
	"github.com/tidewaiter/tidewaiter/services/matcher/policy"
	"github.com/tidewaiter/tidewaiter/services/planner"
	"github.com/tidewaiter/tidewaiter/services/sweeper"
	"github.com/tidewaiter/tidewaiter/services/ticketer"
	"github.com/tidewaiter/tidewaiter/services/tidewaiter/access"
)

// settings are the sections of the services, with their defaults.
type settings struct {
	sources    intake.Sources
	intake     intake.Config
	planner    planner.Config
	analyzer   analyzer.Config
	assembler  assembler.Config
	matcher    matcher.Config
	attestor   attestor.Config
	catalog    catalog.Config
	advisor    advisor.Config
	ticketer   ticketer.Config
	gatekeeper gatekeeper.Config
	sweeper    sweeper.Config
}

func newSettings() *settings {
	return &settings{
		intake: intake.DefaultConfig(), planner: planner.DefaultConfig(), analyzer: analyzer.DefaultConfig(),
		assembler: assembler.DefaultConfig(), matcher: matcher.DefaultConfig(), attestor: attestor.DefaultConfig(),
		catalog: catalog.DefaultConfig(), advisor: advisor.DefaultConfig(), ticketer: ticketer.DefaultConfig(),
		gatekeeper: gatekeeper.DefaultConfig(), sweeper: sweeper.DefaultConfig(),
	}
}

func (s *settings) sections() []run.Section {
	return []run.Section{
		{Name: "sources", Into: &s.sources},
		{Name: "intake", Into: &s.intake},
		{Name: "planner", Into: &s.planner},
		{Name: "analyzer", Into: &s.analyzer},
		{Name: "assembler", Into: &s.assembler},
		{Name: "matcher", Into: &s.matcher},
		{Name: "attestor", Into: &s.attestor},
		{Name: "catalog", Into: &s.catalog},
		{Name: "advisor", Into: &s.advisor},
		{Name: "ticketer", Into: &s.ticketer},
		{Name: "gatekeeper", Into: &s.gatekeeper},
		{Name: "sweeper", Into: &s.sweeper},
	}
}

// check reads a configuration for some services, "all" as for run; none: for
// all where the file (or the environment) names a Kafka or a Redis, else for
// the all-in-one.
func check(file string, services []string, elsewhere bool, lookupEnv func(string) (string, bool)) (*run.Checked, error) {
	// Which services there are to run depends on the file.
	loaded := run.Check(file, run.Checking{LookupEnv: lookupEnv, Elsewhere: true})
	if loaded.Config == nil {
		return loaded, nil
	}
	if r := loaded.Redis; len(services) == 0 && (len(loaded.Kafka.Brokers) > 0 || r.URL != "" || r.Sentinel != nil || len(r.Cluster) > 0) {
		services = []string{"all"}
	}
	named, err := chosen(services, loaded.Config)
	if err != nil {
		return nil, err
	}
	var needs []run.Needs
	for _, s := range named {
		if row, ok := access.Find(s.Name); ok {
			needs = append(needs, row.Needs())
		}
	}
	s := newSettings()
	c := run.Check(file, run.Checking{LookupEnv: lookupEnv, Sections: s.sections(), Services: needs, Elsewhere: elsewhere})
	across{c, s, named}.check()
	c.Sort()
	return c, nil
}

// across finds mistakes that no section has alone.
type across struct {
	*run.Checked
	*settings
	services []run.Named // that shall run on real servers; none: the all-in-one
}

func (a across) check() {
	a.Judge("sources", &a.sources, sweeper.CheckSources(a.sources), contracts.ConfigError)
	for _, w := range a.sources.Warnings() {
		a.Judge("sources", &a.sources, errors.New(w), contracts.ConfigWarning)
	}
	a.registriesOfSources()
	a.snapshots()
	a.policies()
	a.maxAges()
	a.addresses()
	for id := range a.planner.SourcePlatforms {
		if _, ok := a.sources[id]; !ok {
			a.Warn("planner.sourcePlatforms."+id, fmt.Sprintf("there is no source %q", id), "take it out, or name one of sources")
		}
	}
	if a.runs("intake") && len(a.sources) == 0 && a.intake.Admin == nil {
		a.Warn("sources", "no source is configured, so no webhook is believed", "add sources: {<id>: {kind: …, registry: …, auth: …}}")
	}
	if a.runs("gatekeeper") && a.gatekeeper.Bundles == gatekeeper.FromDatabase && a.Database.URL == "" && a.Database.URLEnv == "" {
		a.Wrong("gatekeeper.bundles", "bundles are read from a database that is not configured", "add database.url, or write bundles: registry")
	}
}

// maxAges warns where gatekeeper calls statements too old that attestor does not
// renew yet.
func (a across) maxAges() {
	renewed := catalog.RefreshAge(a.attestor.Validity)
	if m := a.gatekeeper.MaxAge; m > 0 && m < renewed && (a.runs("gatekeeper") || len(a.services) == 0 && a.Has("gatekeeper")) {
		a.Warn("gatekeeper.maxAge", fmt.Sprintf("statements are renewed when they are %s old: in the time before, images are refused as too old", renewed),
			fmt.Sprintf("write at least %s, or lower attestor.validity (now %s)", renewed, a.attestor.Validity))
	}
}

// runs says whether a service is one of those that shall run.
func (a across) runs(name string) bool {
	return slices.ContainsFunc(a.services, func(s run.Named) bool { return s.Name == name })
}

// known says whether a registry is configured.
func (a across) known(host string) bool {
	for _, h := range a.Registries {
		if strings.EqualFold(h.Name, host) {
			return true
		}
	}
	// The all-in-one has one of its own, on loopback.
	return len(a.services) == 0 && loopback(host)
}

func (a across) registriesOfSources() {
	for _, id := range slices.Sorted(maps.Keys(a.sources)) {
		s := a.sources[id]
		if s.Registry != "" && !a.known(s.Registry) {
			a.Wrong("sources."+id+".registry", fmt.Sprintf("registry %s is not configured, so nothing of this source can be looked at", s.Registry),
				"add it to registries, or correct its name: it is compared with registries[].host")
		}
	}
}

// snapshots checks where advisories come from.
func (a across) snapshots() {
	m := a.matcher
	for path, at := range map[string]string{"matcher.snapshots": m.Snapshots, "advisor.publish": a.advisor.Publish} {
		host, _, _ := strings.Cut(at, "/")
		if at != "" && !a.known(host) {
			a.Wrong(path, fmt.Sprintf("registry %s is not configured", host), "add it to registries")
		}
	}
	if a.runs("matcher") && m.Advisories == "" && m.Snapshots == "" {
		a.Wrong("matcher.advisories", "there is nothing to match with", "name a file (tidewaiter advisories build), or snapshots with snapshotKeys and cache")
	}
	if a.Has("matcher") && m.Snapshots != "" && a.advisor.Publish != "" && m.Snapshots != a.advisor.Publish {
		a.Warn("matcher.snapshots", "advisor publishes elsewhere: "+a.advisor.Publish, "write the same here")
	}
	a.File("matcher.snapshotKeys", m.SnapshotKeys, contracts.ConfigError)
	a.File("matcher.advisories", m.Advisories, contracts.ConfigWarning) // matcher waits for it
}

// policies checks that all judge by the same rules.
func (a across) policies() {
	digests := map[string]string{}
	for _, p := range []struct{ service, path string }{
		{"matcher", a.matcher.Policy}, {"attestor", a.attestor.Policy}, {"gatekeeper", a.gatekeeper.Policy},
	} {
		setting := p.service + ".policy"
		if p.path == "" {
			digests[p.service] = policy.Default().Digest()
			continue
		}
		if !a.File(setting, p.path, contracts.ConfigError) {
			continue
		}
		loaded, err := policy.Load(p.path)
		if err != nil {
			first, _, _ := strings.Cut(err.Error(), "\n") // what follows shows the file
			a.Wrong(setting, first, "correct the policy; deploy/policy.example.yaml shows its form")
			continue
		}
		digests[p.service] = loaded.Digest()
	}
	matched, ok := digests["matcher"]
	if !ok {
		return
	}
	if attested, ok := digests["attestor"]; ok && attested != matched && (a.Has("attestor") || a.Has("matcher")) {
		a.Wrong("attestor.policy", "attestor judges by another policy than matcher, and would refuse every verdict", "name the same file in matcher.policy and attestor.policy")
	}
	if wanted, ok := digests["gatekeeper"]; ok && a.gatekeeper.Policy != "" && wanted != matched {
		a.Wrong("gatekeeper.policy", "gatekeeper wants another policy than matcher judges by, and would refuse every image", "name the same file in matcher.policy and gatekeeper.policy")
	}
	if d := a.gatekeeper.PolicyDigest; d != "" && d != matched {
		a.Warn("gatekeeper.policyDigest", "it is not the digest of matcher's policy, which is "+matched, "write that, or name the file as gatekeeper.policy")
	}
}

// addresses finds two that listen in one place.
func (a across) addresses() {
	type listener struct{ path, address string }
	var all []listener
	add := func(service, path, address string) {
		if address != "" && (a.runs(service) || len(a.services) == 0 && a.Has(service)) {
			all = append(all, listener{path, address})
		}
	}
	if a.HTTP.Listen != "" {
		all = append(all, listener{"http.listen", a.HTTP.Listen})
	}
	add("intake", "intake.listen", a.intake.Listen)
	add("catalog", "catalog.listen", a.catalog.Listen)
	add("gatekeeper", "gatekeeper.listen", a.gatekeeper.Listen)
	add("sweeper", "sweeper.listen", a.sweeper.Listen)
	for i, second := range all {
		for _, first := range all[:i] {
			if sameAddress(first.address, second.address) {
				a.Wrong(second.path, fmt.Sprintf("it listens on %s, where %s does", second.address, first.path), "give one of them another port")
			}
		}
	}
}

// sameAddress says whether two cannot both be listened on.
func sameAddress(a, b string) bool {
	hostA, portA, errA := net.SplitHostPort(a)
	hostB, portB, errB := net.SplitHostPort(b)
	if errA != nil || errB != nil || portA != portB || portA == "0" {
		return false
	}
	everywhere := func(host string) bool {
		ip := net.ParseIP(host)
		return host == "" || ip != nil && ip.IsUnspecified()
	}
	return hostA == hostB || everywhere(hostA) || everywhere(hostB)
}

// checked is check for a command that is about to run services: mistakes are
// its error, warnings are printed.
func checked(s *streams, services []string) (*run.Config, error) {
	c, err := check(s.config, services, false, os.LookupEnv)
	if err != nil {
		return nil, err
	}
	if err := c.Err(); err != nil {
		return nil, usage(fmt.Errorf("the configuration cannot be used:\n%w", err))
	}
	for _, p := range c.Problems {
		fmt.Fprintln(s.err, run.Line(p))
	}
	return c.Config, nil
}
