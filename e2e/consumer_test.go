//go:build real

package e2e

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cloudevents/sdk-go/v2/event"
	"github.com/segmentio/kafka-go"
	"github.com/segmentio/kafka-go/sasl/scram"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/bus"
	"github.com/tidewaiter/tidewaiter/libs/embedded"
)

// TestConsumerInPython runs the example consumer, which shares nothing with us
// but the contracts, against the embedded Kafka, and against the one at
// TIDEWAITER_KAFKA (host:port; servers/servers.sh starts it) if there is one.
func TestConsumerInPython(t *testing.T) {
	python := virtualEnvironment(t)
	t.Run("embedded", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		servers, err := embedded.Start(ctx, embedded.Options{Dir: t.TempDir()}, slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			cancel()
			if err := servers.Wait(); err != nil {
				t.Errorf("servers: %v", err)
			}
		})
		testConsumer(t, python, bus.Config{Brokers: []string{servers.KafkaAddress}, Username: servers.KafkaUsername, Password: servers.KafkaPassword})
	})
	if address := os.Getenv("TIDEWAITER_KAFKA"); address != "" {
		t.Run("real", func(t *testing.T) {
			testConsumer(t, python, bus.Config{Brokers: []string{address}, Prefix: fmt.Sprintf("consumer%d.", time.Now().UnixNano())})
		})
	}
}

// virtualEnvironment returns the Python that has the consumer's requirements.
// It is kept in the user's cache, under their digest.
func virtualEnvironment(t *testing.T) string {
	t.Helper()
	requirements, err := os.ReadFile("consumer/requirements.txt")
	if err != nil {
		t.Fatal(err)
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(requirements)
	dir := filepath.Join(cache, "tidewaiter", "consumer-"+hex.EncodeToString(sum[:6]))
	python := filepath.Join(dir, "bin", "python")
	whole := filepath.Join(dir, "complete")
	if _, err := os.Stat(whole); err == nil {
		return python
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	for _, command := range [][]string{
		{"python3", "-m", "venv", "--clear", dir},
		{python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", "consumer/requirements.txt"},
	} {
		if out, err := exec.CommandContext(ctx, command[0], command[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%s (Debian: apt-get install python3-venv): %v\n%s", command, err, out)
		}
	}
	if err := os.WriteFile(whole, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	return python
}

func testConsumer(t *testing.T, python string, cfg bus.Config) {
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	cfg.Partitions = 3
	b, err := bus.New(cfg, "catalog", slog.New(slog.DiscardHandler), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := b.Close(); err != nil {
			t.Errorf("close the bus: %v", err)
		}
	}()
	if err := b.EnsureTopics(ctx, contracts.FindingOpenedV1); err != nil {
		t.Fatal(err)
	}
	topic, err := b.TopicOf(contracts.FindingOpenedV1, contracts.LaneFresh)
	if err != nil {
		t.Fatal(err)
	}
	consume := func() (lines []string, stderr string, code int) {
		t.Helper()
		args := []string{"consumer/consumer.py", "--brokers", cfg.Brokers[0], "--topic", topic, "--until-end"}
		if cfg.Username != "" {
			args = append(args, "--username", cfg.Username)
		}
		cmd := exec.CommandContext(ctx, python, args...)
		cmd.Env = append(os.Environ(), "KAFKA_PASSWORD="+cfg.Password)
		var out, problems bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, &problems
		var exit *exec.ExitError
		if err := cmd.Run(); err != nil && (!errors.As(err, &exit) || exit.ExitCode() != 1 || strings.Contains(problems.String(), "Traceback")) {
			t.Fatalf("consumer: %v\n%s", err, problems.String())
		}
		lines = strings.Split(strings.TrimSpace(out.String()), "\n")
		slices.Sort(lines) // the order holds within a partition only
		return lines, problems.String(), cmd.ProcessState.ExitCode()
	}

	log4j := contracts.Problem{
		Key: "0123456789abcdef0123456789abcdef", Revision: 1, State: "open", Owner: "registry.example/team/app",
		Package: "org.apache.logging.log4j:log4j-core", Ecosystem: "Maven", Group: "fixable", Versions: []string{"2.14.1"}, FixedIn: []string{"2.17.1"},
		Severity: contracts.SeverityCritical, KEV: true, Vulnerabilities: []string{"CVE-2021-44228"},
		Images:     []string{"registry.example/team/app@" + contracts.DigestOf([]byte("image"))},
		ImageCount: 1, OpenedAt: time.Now().UTC(), ChangedAt: time.Now().UTC(),
	}
	openssl := log4j
	openssl.Key, openssl.Package, openssl.Ecosystem, openssl.Group, openssl.FixedIn = "fedcba9876543210fedcba9876543210", "openssl", "Debian:12", "unfixed", nil
	openssl.Severity, openssl.KEV = contracts.SeverityHigh, false
	closed := log4j
	closed.Revision, closed.State, closed.ImageCount, closed.Images = 2, "closed", 0, []string{}
	events := []event.Event{
		finding(t, contracts.FindingOpenedV1, log4j), finding(t, contracts.FindingOpenedV1, openssl),
		finding(t, contracts.FindingClosedV1, closed), finding(t, contracts.FindingOpenedV1, log4j), // a replay
	}
	for _, name := range []string{contracts.FindingOpenedV1, contracts.FindingChangedV1, contracts.FindingClosedV1} {
		events = append(events, golden(t, name))
	}
	if err := b.Publish(ctx, events...); err != nil {
		t.Fatal(err)
	}
	openssl.Revision, openssl.ImageCount = 2, 7
	binaryMode(ctx, t, cfg, topic, finding(t, contracts.FindingChangedV1, openssl))

	lines, stderr, code := consume()
	for _, want := range []string{
		"opened 0123456789abcdef0123456789abcdef r1: org.apache.logging.log4j:log4j-core in registry.example/team/app: update to 2.17.1 (critical, known to be exploited; 1 vulnerabilities, 1 images)",
		"closed 0123456789abcdef0123456789abcdef r2: org.apache.logging.log4j:log4j-core in registry.example/team/app: update to 2.17.1 (critical, known to be exploited; 1 vulnerabilities, 0 images)",
		"opened fedcba9876543210fedcba9876543210 r1: openssl in registry.example/team/app: no fix yet (high; 1 vulnerabilities, 1 images)",
		"changed fedcba9876543210fedcba9876543210 r2: openssl in registry.example/team/app: no fix yet (high; 1 vulnerabilities, 7 images)",
	} {
		if !slices.Contains(lines, want) {
			t.Errorf("%q is not among\n%s", want, strings.Join(lines, "\n"))
		}
	}
	if code != 0 || stderr != "" || len(lines) < 5 || len(lines) > 7 {
		t.Errorf("exit code %d, %d lines, %s", code, len(lines), stderr)
	}

	// What breaks the contract is seen.
	log4j.Severity = "dreadful"
	log4j.Key = "00000000000000000000000000000000"
	if err := b.Publish(ctx, finding(t, contracts.FindingOpenedV1, log4j)); err != nil {
		t.Fatal(err)
	}
	again, stderr, code := consume()
	if code != 1 || !strings.Contains(stderr, "$.severity: 'dreadful' is not one of") || !slices.Equal(again, lines) {
		t.Errorf("exit code %d, %s\n%s", code, stderr, strings.Join(again, "\n"))
	}
}

func finding(t *testing.T, name string, p contracts.Problem) event.Event {
	t.Helper()
	ev, err := bus.NewEvent(name, p.Key, p)
	if err != nil {
		t.Fatal(err)
	}
	return ev
}

// golden returns the golden example of an event.
func golden(t *testing.T, name string) event.Event {
	t.Helper()
	content, err := contracts.Example(name)
	if err != nil {
		t.Fatal(err)
	}
	var ev event.Event
	if err := json.Unmarshal(content, &ev); err != nil {
		t.Fatal(err)
	}
	return ev
}

// binaryMode stores an event in binary mode, which we read and never send, in
// the partition of its key.
func binaryMode(ctx context.Context, t *testing.T, cfg bus.Config, topic string, ev event.Event) {
	t.Helper()
	w := &kafka.Writer{Addr: kafka.TCP(cfg.Brokers...), Topic: topic, Balancer: &kafka.Hash{}, RequiredAcks: kafka.RequireAll, BatchTimeout: time.Millisecond}
	if cfg.Username != "" {
		mechanism, err := scram.Mechanism(scram.SHA512, cfg.Username, cfg.Password)
		if err != nil {
			t.Fatal(err)
		}
		transport := &kafka.Transport{SASL: mechanism}
		defer transport.CloseIdleConnections()
		w.Transport = transport
	}
	headers := map[string]string{
		"content-type": "application/json", "ce_specversion": "1.0", "ce_id": "binary-1", "ce_source": "/services/catalog",
		"ce_type": ev.Type(), "ce_subject": ev.Subject(), "ce_time": time.Now().UTC().Format(time.RFC3339), "ce_lane": contracts.LaneFresh,
	}
	m := kafka.Message{Key: []byte(ev.Subject()), Value: ev.Data()}
	for name, value := range headers {
		m.Headers = append(m.Headers, kafka.Header{Key: name, Value: []byte(value)})
	}
	err := w.WriteMessages(ctx, m)
	if err = errors.Join(err, w.Close()); err != nil {
		t.Fatal(err)
	}
}
