//go:build real

package access_test

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/tidewaiter/tidewaiter/libs/credential"
	"github.com/tidewaiter/tidewaiter/libs/redis"
	"github.com/tidewaiter/tidewaiter/services/tidewaiter/access"
)

// On a real Redis (SERVERS_REDIS_CTL is how redis-cli is called as an
// administrator; see e2e/servers) each user does its work, and is refused keys and
// commands of others.
func TestUsersInRedis(t *testing.T) {
	url := os.Getenv("SERVERS_REDIS_URL")
	servers := os.Getenv("SERVERS_DIR")
	if url == "" || servers == "" {
		t.Fatal("SERVERS_REDIS_URL is not set; run: SERVERS=redis AUTH=1 e2e/servers/servers.sh with go test -tags real …")
	}
	const password = "of-a-user"
	names := access.Names{Keys: "tw:", User: "access-test-{service}"}
	for again := range 2 { // it may be run again, and the passwords stay
		for line := range strings.Lines(access.Redis(access.Services(), names)) {
			args := strings.Fields(line)
			cli(t, servers, args...)
			if again == 0 {
				cli(t, servers, "ACL", "SETUSER", args[2], ">"+password)
			}
		}
	}
	url, _ = strings.CutSuffix(url, "/0")
	in := func(database, service string) *redis.Client {
		cfg := redis.Config{
			URL:      strings.Replace(url, "tidewaiter@", "", 1) + "/" + database,
			Username: strings.ReplaceAll(names.User, "{service}", service), Password: password, Prefix: names.Keys,
		}
		if ca := os.Getenv("SERVERS_CA_FILE"); ca != "" {
			cfg.TLSSource = credential.TLS{CAFile: ca}.Source()
		}
		c, err := redis.Open(cfg)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Close() })
		return c
	}
	as := func(service string) *redis.Client { return in("0", service) }
	ctx := t.Context()
	work := func(context.Context) error { return nil }
	analyzer, attestor, gatekeeper := as("analyzer"), as("attestor"), as("gatekeeper")
	for what, err := range map[string]error{
		"analyzer answers":      analyzer.Ping(ctx),
		"another database":      in("1", "analyzer").Ping(ctx),
		"planner's budget":      budget(ctx, as("planner")),
		"analyzer's lease":      analyzer.WithLock(ctx, "layer/1/sha256:aa", "e", time.Minute, work),
		"attestor's lock":       attestor.WithLock(ctx, "referrers:r/a@sha256:aa", "e", time.Minute, work),
		"gatekeeper's bundle":   gatekeeper.Put(ctx, "gatekeeper:bundle:x", []byte("b"), time.Minute),
		"gatekeeper's sequence": second(gatekeeper.Raise(ctx, "gatekeeper:seen:x", "1", time.Minute)),
	} {
		if err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
	for what, err := range map[string]error{
		"attestor takes analyzer's lease":   attestor.WithLock(ctx, "layer/1/sha256:aa", "e", time.Minute, work),
		"analyzer takes attestor's lock":    analyzer.WithLock(ctx, "referrers:r/a@sha256:aa", "e", time.Minute, work),
		"analyzer writes gatekeeper's mark": second(analyzer.Raise(ctx, "gatekeeper:seen:x", "9", time.Minute)),
		"planner writes a bundle":           as("planner").Put(ctx, "gatekeeper:bundle:x", []byte("b"), time.Minute),
	} {
		if err == nil || !strings.Contains(err.Error(), "NOPERM") {
			t.Errorf("%s: %v, want NOPERM", what, err)
		}
	}
}

// budget does all that there is to do with one: the second time it is bounded, and refused for a while.
func budget(ctx context.Context, c *redis.Client) error {
	err := c.Left(ctx, "registry", 100, time.Minute)
	for range 2 {
		_, _, _, taken := c.Take(ctx, "registry", time.Minute, 1, 0)
		err = errors.Join(err, taken)
	}
	return errors.Join(err, c.Quiet(ctx, "registry", time.Millisecond))
}

func second[T any](_ T, err error) error { return err }

// cli runs redis-cli as an administrator.
func cli(t *testing.T, servers string, args ...string) {
	t.Helper()
	command := exec.CommandContext(t.Context(), "../../../e2e/servers/servers.sh", append([]string{"redis-cli"}, args...)...)
	command.Env = append(os.Environ(), "DIR="+servers)
	out, err := command.CombinedOutput()
	if err != nil || strings.TrimSpace(string(out)) != "OK" {
		t.Fatalf("redis-cli %v: %v: %s", args[:min(3, len(args))], err, out)
	}
}
