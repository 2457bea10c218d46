package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/credential/credentialtest"
	"github.com/tidewaiter/tidewaiter/libs/run"
)

// checkOf runs config check on a content, in which DIR stands for a folder with
// these files, and returns what it prints as JSON, in which it does so again.
func checkOf(t *testing.T, content string, files map[string]string, services ...string) (int, []contracts.ConfigProblem, string) {
	t.Helper()
	dir := t.TempDir()
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	file := filepath.Join(dir, "c.yaml")
	if err := os.WriteFile(file, []byte(strings.ReplaceAll(content, "DIR", dir)), 0o600); err != nil {
		t.Fatal(err)
	}
	args := append([]string{"config", "check", file}, services...)
	_, text, textErr := tidewaiter(t, "", args...)
	code, stdout, stderr := tidewaiter(t, "", append(args, "--output", "json")...)
	var problems []contracts.ConfigProblem
	if err := json.Unmarshal([]byte(strings.ReplaceAll(stdout, dir, "DIR")), &problems); err != nil {
		t.Fatalf("%v: %s%s", err, stdout, stderr)
	}
	return code, problems, text + textErr + stdout + stderr
}

// want is a problem that must be found: its line, its path, a part of it and of
// its cure.
type want struct {
	line                int
	path, problem, cure string
}

func compare(t *testing.T, got []contracts.ConfigProblem, wanted []want) {
	t.Helper()
	for i, w := range wanted {
		if i >= len(got) {
			t.Errorf("not found: %+v", w)
			continue
		}
		g := got[i]
		if g.Line != w.line || g.Path != w.path || !strings.Contains(g.Problem, w.problem) || !strings.Contains(g.Cure, w.cure) || g.Cure == "" {
			t.Errorf("%d: got  %s\n   want %+v", i, run.Line(g), w)
		}
	}
	for _, g := range got[min(len(wanted), len(got)):] {
		t.Errorf("not expected: %s", run.Line(g))
	}
}

// Every mistake is found at once, each with its line and its cure.
func TestConfigCheckFindsEveryMistakeAtOnce(t *testing.T) {
	content := `log: {level: loud}
kafka:
  brokers: [10.0.0.1]
  username: tidewaiter
  mechanism: PLAIN
  atempts: 3
  sessionTimeout: 10
redis:
  url: redis://u:hunter2@10.0.0.2:6379
database:
  url: sqlite:///tmp/x.db
regestries: []
registries:
  - host: r.example.com
    username: me
    caFile: DIR/none.pem
  - host: R.example.com
  - host: "not a host"
    concurrency: -1
sources:
  main:
    kind: fax
    registry: r.example.com
    auth: {}
  other:
    kind: distribution
    registry: elsewhere.example.com
    paths:
      - team-a
      - "BAD PATH"
    quota: many
    auth: {bearer: {tokenEnv: CHECK_TEST_UNSET}}
planner:
  attempts: 0
  platforms: [linux/amd64, windows]
  sourcePlatforms: {gone: [linux/arm64]}
matcher:
  advisories: DIR/none.db
  policy: DIR/policy.yaml
attestor:
  keyFile: DIR/attestor.key
  passwordFile: DIR/password
  validity: 1m
catalog:
  listen: 0.0.0.0:8480
intake:
  listen: 127.0.0.1:8480
gatekeeper:
  keyFiles: []
  mode: enforced
  auth: {none: true}
  tls: {dir: DIR}
ticketer:
  trackers:
    - {name: hub, kind: github, url: "https://me:hunter3@api.github.com/", secretFile: DIR/password}
  rules:
    - {tracker: hub, project: a/b}
    - tracker: nobody
`
	code, got, _ := checkOf(t, content, map[string]string{"attestor.key": "k", "password": "", "policy.yaml": "nonsense: true"})
	if code != run.ExitUsage {
		t.Errorf("exit code %d", code)
	}
	compare(t, got, []want{
		{1, "log.level", "loud", ""},
		{2, "kafka", "without TLS", "tls"},
		{3, "kafka.brokers[0]", "10.0.0.1", "host:port"},
		{4, "kafka.username", "without a password", "passwordFile"},
		{5, "kafka.mechanism", "PLAIN", "tls"},
		{6, "kafka.atempts", "no such key", `"attempts"`},
		{7, "kafka.sessionTimeout", "a duration is expected", "90s"},
		{9, "redis.url", "must not hold a password", "passwordFile"},
		{9, "redis.url", "without TLS", "rediss://"},
		{11, "database.url", "SQLite", "postgres://user@host/database"},
		{12, "regestries", "unknown section", `"registries"`},
		{15, "registries[0].username", "without a password", "passwordEnv"},
		{16, "registries[0].caFile", "DIR/none.pem cannot be read", "put it there"},
		{17, "registries[1].host", "registries[0]", "keep one"},
		{18, "registries[2].host", `"not a host"`, "host:port"},
		{19, "registries[2].concurrency", "-1", "negative"},
		{22, "sources.main.kind", `"fax"`, ""},
		{24, "sources.main.auth", "0 of", "exactly one"},
		{27, "sources.other.registry", "not configured", "registries"},
		{30, "sources.other.paths[1]", "BAD PATH", ""},
		{31, "sources.other.quota", "a whole number", "digits"},
		{32, "sources.other.auth.bearer.tokenEnv", "CHECK_TEST_UNSET", "set it"},
		{34, "planner.attempts", "0", "at least 1"},
		{35, "planner.platforms[1]", "windows", ""},
		{36, "planner.sourcePlatforms.gone", "no source", "sources"},
		{38, "matcher.advisories", "cannot be read", "put it there"},
		{39, "matcher.policy", "nonsense", "policy"},
		{42, "attestor.passwordFile", "is empty", "put into it"},
		{43, "attestor.validity", "1m0s", "at least"},
		{45, "catalog.listen", "token", ""},
		{45, "catalog.listen", "intake.listen", "another port"},
		{49, "gatekeeper.keyFiles", "is empty", "public key"},
		{50, "gatekeeper.mode", "enforced", "enforce, warn, audit"},
		{52, "gatekeeper.tls.names", "is empty", "DNS names"},
		{55, "ticketer.trackers[0].secretFile", "is empty", "put into it"},
		{55, "ticketer.trackers[0].url", "credentials", "secret"},
		{58, "ticketer.rules[1]", "nobody", ""},
	})
}

// What no section has alone.
func TestConfigCheckLooksAcrossSections(t *testing.T) {
	strict := "version: 1\nrules: {outdated: fail}\n"
	_, got, _ := checkOf(t, `kafka: {brokers: ["127.0.0.1:9092"]}
redis: {url: "redis://127.0.0.1:6379"}
registries: [{host: r.example.com}]
matcher:
  snapshots: other.example.com/advisories
  snapshotKeys: DIR/keys
  cache: DIR
attestor:
  keyFile: DIR/key
  policy: DIR/policy.yaml
gatekeeper:
  listen: ":8480"
  maxAge: 24h
  bundles: database
  keyFiles: [DIR/key]
  policyDigest: `+contracts.DigestOf([]byte("x"))+`
  auth: {none: true}
  tls: {dir: DIR, names: [localhost]}
intake: {listen: "127.0.0.1:8480"}
`, map[string]string{"key": "k", "keys": "k", "policy.yaml": strict})
	compare(t, got, []want{
		{0, "database.url", "needed by intake, analyzer, assembler, matcher, attestor, catalog", "urlEnv"},
		{0, "sources", "no webhook is believed", "add sources"},
		{5, "matcher.snapshots", "other.example.com is not configured", "registries"},
		{10, "attestor.policy", "another policy", "same file"},
		{12, "gatekeeper.listen", "intake.listen", "another port"},
		{13, "gatekeeper.maxAge", "when they are 126h0m0s old", "at least 126h"},
		{14, "gatekeeper.bundles", "not configured", "bundles: registry"},
		{16, "gatekeeper.policyDigest", "which is sha256:", "gatekeeper.policy"},
	})
}

// What services are named for is needed; what is not named is not.
func TestConfigCheckForServices(t *testing.T) {
	token := map[string]string{"token": "t"}
	content := "kafka: {brokers: [\"127.0.0.1:9092\"]}\nregistries: [{host: r.example.com}]\nsources: {s: {kind: distribution, registry: r.example.com, auth: {bearer: {tokenFile: DIR/token}}}}\n"
	if code, got, out := checkOf(t, content, token, "planner"); code != run.ExitOK || len(got) != 0 {
		t.Errorf("planner needs nothing more: exit code %d\n%s", code, out)
	}
	code, got, _ := checkOf(t, content, token, "attestor")
	if code != run.ExitUsage {
		t.Errorf("exit code %d", code)
	}
	compare(t, got, []want{
		{0, "attestor", "signing key", ""},
		{0, "database.url", "needed by attestor", ""},
		{0, "redis.url", "needed by attestor", ""},
	})
	if code, _, stderr := tidewaiter(t, "", "config", "check", exampleFile, "nobody"); code != run.ExitUsage || !strings.Contains(stderr, "nobody") {
		t.Errorf("a service that is none: exit code %d\n%s", code, stderr)
	}
	// For the all-in-one nothing is needed.
	if code, got, _ := checkOf(t, "log: {level: info}\n", nil); code != run.ExitOK || len(got) != 0 {
		t.Errorf("for the all-in-one: exit code %d, %v", code, got)
	}
}

func TestConfigCheckLooksIntoCertificates(t *testing.T) {
	a := credentialtest.New(t)
	expired, expiredKey := a.Issue(t, "old", -time.Hour)
	soon, soonKey := a.Issue(t, "soon", 48*time.Hour)
	_, foreignKey := a.Issue(t, "foreign", time.Hour)
	open := filepath.Join(a.Dir, "open")
	if err := os.WriteFile(open, []byte("hunter1"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(open, 0o644); err != nil {
		t.Fatal(err)
	}
	code, got, out := checkOf(t, fmt.Sprintf(`kafka:
  brokers: ["k.example.com:9093"]
  username: tidewaiter
  passwordFile: %[1]s
  tls:
    caFile: %[2]s
    certFile: %[3]s
    keyFile: %[4]s
registries:
  - host: r.example.com
    certFile: %[5]s
    keyFile: %[6]s
  - host: s.example.com
    certFile: %[5]s
    keyFile: %[7]s
  - host: t.example.com
    caFile: %[6]s
  - host: u.example.com
    certFile: %[5]s
`, open, a.CAFile, expired, expiredKey, soon, soonKey, foreignKey), nil, "planner")
	if code != run.ExitUsage || strings.Contains(out, "hunter") {
		t.Errorf("exit code %d\n%s", code, out)
	}
	compare(t, got, []want{
		{4, "kafka.passwordFile", "open to everybody (mode 0644)", "chmod 600"},
		{6, "kafka.tls.caFile", "expires on", "replace it"}, // an authority for an hour
		{7, "kafka.tls.certFile", "has expired on", "replace it"},
		{11, "registries[0].certFile", "expires on", "replace it soon"},
		{14, "registries[1].certFile", "expires on", "replace it soon"},
		{15, "registries[1].keyFile", "does not go with", "private key"},
		{17, "registries[2].caFile", "no certificate", "BEGIN CERTIFICATE"},
		{18, "registries[3]", "go together", "both or neither"},
		{19, "registries[3].certFile", "expires on", "replace it soon"},
	})
	for _, p := range got {
		if warning := strings.Contains(p.Problem, "expire") || strings.Contains(p.Problem, "open to everybody"); warning != (p.Severity == contracts.ConfigWarning) {
			t.Errorf("severity %q: %s", p.Severity, p.Problem)
		}
	}
}

// Warnings alone do not keep services from starting.
func TestConfigCheckWithWarnings(t *testing.T) {
	content := "kafka: {brokers: [\"k.example.com:9092\"]}\nregistries: [{host: r.example.com}]\nsources: {s: {kind: distribution, registry: r.example.com, auth: {bearer: {tokenFile: DIR/token}}}}\n"
	code, got, out := checkOf(t, content, map[string]string{"token": "t"}, "planner")
	if code != run.ExitOK || len(got) != 1 || got[0].Severity != contracts.ConfigWarning || !strings.Contains(out, "is good, with 1 warning\n") {
		t.Errorf("exit code %d, %v\n%s", code, got, out)
	}
}

func TestConfigCheckNamesWhereTheDatabaseIs(t *testing.T) {
	t.Setenv("CHECK_TEST_DATABASE", "postgres://u:hunter1@h/d")
	code, _, out := checkOf(t, "database: {urlEnv: CHECK_TEST_DATABASE}\n", nil)
	if code != run.ExitOK || !strings.Contains(out, "as CHECK_TEST_DATABASE in the environment says") || strings.Contains(out, "hunter1") {
		t.Errorf("exit code %d\n%s", code, out)
	}
}

// No service reads a section of this name.
func TestConfigCheckKnowsNoWatcher(t *testing.T) {
	if code, got, out := checkOf(t, "watcher: {}\n", nil); code != run.ExitUsage || len(got) != 1 || got[0].Problem != "unknown section" {
		t.Errorf("exit code %d, %v\n%s", code, got, out)
	}
}

// Wherever a secret stands, it is not printed.
func TestConfigCheckPrintsNoSecret(t *testing.T) {
	t.Setenv("CHECK_TEST_SECRET", "hunter0")
	secrets := map[string]string{"password": "hunter1", "two": "hunter1\nhunter2\nhunter3", "url": "postgres://u:hunter4@h/d"}
	for _, content := range []string{
		// in its place
		"kafka: {brokers: [\"127.0.0.1:1\"], username: u, passwordFile: DIR/password}\nredis: {url: \"redis://u@127.0.0.1:1\", passwordEnv: CHECK_TEST_SECRET}\ndatabase: {urlEnv: CHECK_TEST_SECRET}\n",
		"database: {url: \"postgres://u:hunter1@h/d\"}\nkafka: {brokers: [\"127.0.0.1:1\"]}\n",
		"database: {url: \"postgres://h/d?password=hunter1\"}\n",
		// where it does not belong
		"kafka: {password: hunter1, username: [hunter2], passwordFile: {a: hunter3}}\n",
		"kafka: {brokers: [\"u:hunter1@h:1\"], prefix: \"u:hunter1@x\", attempts: hunter1}\n",
		"redis: {url: \"redis://u:hunter1@h:1/x\"}\n",
		"redis: {url: \"hunter1\"}\n",
		"redis: {sentinel: {master: m, addresses: [\"u:hunter1@h\"], password: hunter2}}\n",
		"redis: {cluster: [\"redis://u:hunter1@h\"]}\n",
		"database: {url: \"mysql://u:hunter1@h/d\"}\n",
		"database: {url: \"postgres://u:hunter1@h:port/d\"}\n",
		"database: {url: \"postgres://u:hun%zzter1@h/d\"}\n",
		"registries: [{host: \"u:hunter1@r.example.com\", password: hunter2}]\n",
		"sources: {s: {kind: distribution, registry: \"https://u:hunter1@r.example.com\", auth: {bearer: {token: hunter2}}}}\n",
		"sources: {s: {kind: distribution, registry: r.example.com, auth: {basic: hunter1}}}\n",
		"sources: {s: {kind: distribution, registry: r.example.com, auth: {bearer: {tokenFile: DIR/two}}}}\n",
		"ticketer: {trackers: [{name: a, kind: webhook, url: \"https://u:hunter1@h/hunter2\", secretEnv: CHECK_TEST_SECRET}]}\n",
		"matcher: {snapshots: \"u:hunter1@r/x\"}\n",
		"attestor: {keyFile: DIR/password, key: hunter3}\n",
		"kafka: hunter1\n",
		"kafka: {username: \"hunter1\n",
		"hunter1\n",
		"a: &x hunter1\nb: *hunter\n",
	} {
		for _, services := range [][]string{nil, {"all"}} {
			if _, _, out := checkOf(t, content, secrets, services...); strings.Contains(out, "hunter1") || strings.Contains(out, "hunter2") ||
				strings.Contains(out, "hunter3") || strings.Contains(out, "hunter4") || strings.Contains(out, "hunter0") {
				t.Errorf("of %q is printed:\n%s", content, out)
			}
		}
	}
}

// run says the same as config check before it starts anything.
func TestRunRefusesABadConfiguration(t *testing.T) {
	file := filepath.Join(t.TempDir(), "c.yaml")
	if err := os.WriteFile(file, []byte("kafka:\n  brokers: [nowhere]\nplanner:\n  attempts: 0\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	code, _, stderr := tidewaiter(t, "", "run", "planner", "--config", file)
	for _, want := range []string{file + ":2: kafka.brokers[0]: ", file + ":4: planner.attempts: "} {
		if code != run.ExitUsage || !strings.Contains(stderr, want) {
			t.Errorf("exit code %d, want %q in\n%s", code, want, stderr)
		}
	}
}
