package main

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/bus"
	"github.com/tidewaiter/tidewaiter/libs/embedded"
	"github.com/tidewaiter/tidewaiter/libs/run"
)

// TestDLQ goes the way of an operator: look at what is there, show one, drop
// one, see what was dropped and by whom.
func TestDLQ(t *testing.T) {
	ctx, stop := context.WithCancel(context.Background())
	servers, err := embedded.Start(ctx, embedded.Options{Dir: t.TempDir()}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		stop()
		if err := servers.Wait(); err != nil {
			t.Error(err)
		}
	})
	kafka := bus.Config{Brokers: []string{servers.KafkaAddress}, Username: servers.KafkaUsername, Password: servers.KafkaPassword}
	b, err := bus.New(kafka, "intake", slog.New(slog.DiscardHandler), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close() //nolint:errcheck // nothing waits
	for i := range 3 {
		body := fmt.Appendf(nil, "body %d", i)
		if i == 2 {
			body = []byte{0xff, 0} // no text
		}
		if err := b.PublishDeadLetter(t.Context(), contracts.ImagePushedV1, fmt.Sprintf("not JSON at byte %d", 1000+i), body, nil); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("KAFKA_PASSWORD", servers.KafkaPassword)
	config := filepath.Join(t.TempDir(), "tidewaiter.yaml")
	if err := os.WriteFile(config, fmt.Appendf(nil,
		"kafka: {brokers: [%q], username: %s, passwordEnv: KAFKA_PASSWORD}\n", servers.KafkaAddress, servers.KafkaUsername), 0o600); err != nil {
		t.Fatal(err)
	}
	dlq := func(code int, args ...string) (stdout, stderr string) {
		t.Helper()
		got, stdout, stderr := tidewaiter(t, "", append([]string{"--config", config, "dlq"}, args...)...)
		if got != code {
			t.Fatalf("dlq %v: exit code %d, want %d: %s%s", args, got, code, stdout, stderr)
		}
		return stdout, stderr
	}
	list := func(args ...string) []contracts.DeadLetter {
		t.Helper()
		stdout, _ := dlq(run.ExitOK, append([]string{"list", "--output", "json"}, args...)...)
		return decodeLines[contracts.DeadLetter](t, stdout)
	}

	letters := list()
	if len(letters) != 3 {
		t.Fatalf("%d letters: %+v", len(letters), letters)
	}
	stdout, _ := dlq(run.ExitOK, "list", "--summary", "--output", "json")
	if sums := decodeLines[contracts.DeadLetterSummary](t, stdout); len(sums) != 1 || sums[0].Count != 3 || sums[0].Reason != "not JSON at byte …" {
		t.Errorf("summary %+v", sums)
	}
	if stdout, _ = dlq(run.ExitOK, "list", "--summary"); !strings.Contains(stdout, "not JSON at byte …") {
		t.Errorf("summary as a table:\n%s", stdout)
	}
	if stdout, _ = dlq(run.ExitOK, "show", letters[1].ID); !strings.Contains(stdout, "body 1") {
		t.Errorf("show: %s", stdout)
	}
	for id, want := range map[string]contracts.DeadLetterContent{
		letters[1].ID: {Letter: letters[1], Body: new("body 1")}, letters[2].ID: {Letter: letters[2], BodyBase64: "/wA="},
	} {
		stdout, _ = dlq(run.ExitOK, "show", id, "--output", "json")
		got := decodeOne[contracts.DeadLetterContent](t, stdout)
		if got.Headers["tidewaiter-reason"] != got.Letter.Reason {
			t.Errorf("headers of %s: %v", id, got.Headers)
		}
		if want.Headers = got.Headers; !reflect.DeepEqual(got, want) {
			t.Errorf("show %s: %+v, want %+v", id, got, want)
		}
	}
	if _, stderr := dlq(run.ExitUsage, "drop"); !strings.Contains(stderr, "--all") {
		t.Errorf("drop of nothing: %s", stderr)
	}
	if _, stderr := dlq(run.ExitUsage, "drop", "image.pushed.v1.intake.dlq/0/99"); !strings.Contains(stderr, "no such dead letter") {
		t.Errorf("drop of what is not there: %s", stderr)
	}
	if _, stderr := dlq(run.ExitUsage, "list", "--limit=-1"); !strings.Contains(stderr, "negative") {
		t.Errorf("a negative limit: %s", stderr)
	}
	if _, stderr := dlq(run.ExitOK, "drop", letters[1].ID, "--by", "ada", "--why", "a test by hand"); !strings.Contains(stderr, "dropped 1") {
		t.Errorf("drop: %s", stderr)
	}
	if left := list(); len(left) != 2 || left[0].ID != letters[0].ID || left[1].ID != letters[2].ID {
		t.Errorf("left are %+v", left)
	}
	if all := list("--dropped"); len(all) != 3 || !all[1].Dropped || all[1].DroppedBy != "ada" || all[1].DropReason != "a test by hand" {
		t.Errorf("with the dropped: %+v", all)
	}
	if stdout, _ = dlq(run.ExitOK, "list", "--dropped"); !strings.Contains(stdout, "dropped") {
		t.Errorf("list as a table:\n%s", stdout)
	}
	if _, stderr := dlq(run.ExitOK, "replay", "--all"); !strings.Contains(stderr, "replayed 0") || !strings.Contains(stderr, "2 left out: bodies that never were events") {
		t.Errorf("replay: %s", stderr)
	}
	stdout, _ = dlq(run.ExitOK, "replay", "--all", "--output", "json")
	if got := decodeOne[contracts.DeadLetterReplay](t, stdout); got != (contracts.DeadLetterReplay{Dropped: 1, Raw: 2}) {
		t.Errorf("replay: %+v", got)
	}
	stdout, _ = dlq(run.ExitOK, "drop", letters[1].ID, "--output", "json")
	if got := decodeOne[contracts.DeadLetterDrop](t, stdout); got != (contracts.DeadLetterDrop{Before: 1}) {
		t.Errorf("drop: %+v", got)
	}
	if _, stderr := dlq(run.ExitOK, "drop", "--all", "--purge"); !strings.Contains(stderr, "dropped 2") || !strings.Contains(stderr, "3 deleted from Kafka") {
		t.Errorf("drop of all: %s", stderr)
	}
	if gone := list("--dropped"); len(gone) != 0 {
		t.Errorf("after the purge: %+v", gone)
	}
}

// decodeOne reads one document strictly.
func decodeOne[T any](t *testing.T, document string) T {
	t.Helper()
	var v T
	d := json.NewDecoder(strings.NewReader(document))
	d.DisallowUnknownFields()
	if err := d.Decode(&v); err != nil {
		t.Fatalf("%s: %v", document, err)
	}
	return v
}

// decodeLines reads JSON lines strictly; contracts ties the types to their schemas.
func decodeLines[T any](t *testing.T, lines string) []T {
	t.Helper()
	var out []T
	for line := range strings.Lines(lines) {
		out = append(out, decodeOne[T](t, line))
	}
	return out
}
