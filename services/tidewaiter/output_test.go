package main

import (
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/run"
)

// Whatever prints prints JSON too.
func TestEveryCommandHasAnOutput(t *testing.T) {
	parser, err := newParser(&root{}, io.Discard, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	seen := 0
	for _, command := range parser.Model.Leaves(false) {
		if command.Name == "up" || command.Name == "run" { // they print nothing for machines
			continue
		}
		seen++
		has := false
		for _, f := range command.Flags {
			has = has || f.Name == "output" && slices.Contains(strings.Split(f.Enum, ","), "json")
		}
		if !has {
			t.Errorf("%s has no --output json", command.Path())
		}
	}
	if seen < 20 {
		t.Errorf("only %d commands were looked at", seen)
	}
}

// Each line of JSON is in the script, and each user of the script has lines.
func TestPrivilegesForMachines(t *testing.T) {
	for server, want := range map[string]contracts.Privilege{
		"kafka":    {Service: "sweeper", User: "tidewaiter-sweeper", Kind: "topic", On: "image.pushed.v1.bulk", Allowed: []string{"Write"}},
		"postgres": {Service: "catalog", User: "tidewaiter_catalog", On: "outbox", Allowed: []string{"SELECT", "DELETE"}},
		"redis": {Service: "gatekeeper", User: "tidewaiter-gatekeeper", On: "gatekeeper:*", Allowed: []string{
			"cluster|shards", "cluster|slots", "command", "decr", "eval", "evalsha", "get", "pexpire", "ping", "pttl", "select", "set", "time",
			"zadd", "zcard", "zremrangebyscore",
		}},
		"registry": {Service: "sweeper", On: "registry:catalog", Allowed: []string{"*"}},
	} {
		_, script, _ := tidewaiter(t, "", "privileges", server)
		code, stdout, stderr := tidewaiter(t, "", "privileges", server, "--output", "json")
		if code != run.ExitOK {
			t.Fatalf("%s: exit code %d\n%s", server, code, stderr)
		}
		lines := decodeLines[contracts.Privilege](t, stdout)
		if !slices.ContainsFunc(lines, func(p contracts.Privilege) bool { return reflect.DeepEqual(p, want) }) {
			t.Errorf("%s: %+v is not among\n%s", server, want, stdout)
		}
		for _, p := range lines {
			if !strings.Contains(script, p.On) || !strings.Contains(script, p.User) {
				t.Errorf("%s: the script lacks %+v", server, p)
			}
		}
	}
}

func TestKeysGeneratePrintsWhereTheKeysAre(t *testing.T) {
	out := filepath.Join(t.TempDir(), "advisor")
	code, stdout, stderr := tidewaiter(t, "", "keys", "generate", "--for", "advisor", "--out", out, "--output", "json")
	if code != run.ExitOK {
		t.Fatalf("exit code %d\n%s", code, stderr)
	}
	pair := decodeOne[contracts.KeyPair](t, stdout)
	if pair != (contracts.KeyPair{For: "advisor", PrivateKey: out + ".key", PublicKey: out + ".pub"}) {
		t.Errorf("printed %+v", pair)
	}
	for _, name := range []string{pair.PrivateKey, pair.PublicKey} {
		if _, err := os.Stat(name); err != nil {
			t.Error(err)
		}
	}
}

func TestDeployedImportPrintsHowMany(t *testing.T) {
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/v1/deployed" {
			w.WriteHeader(http.StatusNotFound)
		}
	}))
	t.Cleanup(server.Close)
	list := "registry.example.com/app@sha256:" + strings.Repeat("a", 64) + "\n# a comment\n"
	code, stdout, stderr := tidewaiter(t, list, "deployed", "import", "-", "--server", server.URL, "--origin", "production", "--output", "json")
	if code != run.ExitOK {
		t.Fatalf("exit code %d\n%s", code, stderr)
	}
	if got := decodeOne[contracts.DeployedImport](t, stdout); got != (contracts.DeployedImport{Origin: "production", Images: 1}) {
		t.Errorf("printed %+v", got)
	}
}
