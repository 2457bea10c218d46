package main

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/tidewaiter/tidewaiter/libs/run"
	"github.com/tidewaiter/tidewaiter/services/tidewaiter/allinone"
)

// Services that run by themselves are found by their own configuration, each
// with its token.
func TestServicesAreFoundInTheConfiguration(t *testing.T) {
	dir := t.TempDir()
	asked := map[string]string{}
	listen := func(service, answer string) string {
		server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			asked[service] = r.URL.Path + " " + r.Header.Get("Authorization")
			_, _ = fmt.Fprint(w, answer)
		}))
		t.Cleanup(server.Close)
		return strings.TrimPrefix(server.URL, "http://")
	}
	token := func(name, content string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	t.Setenv("SWEEPER_TOKEN", "of sweeper")
	config := token("tidewaiter.yaml", fmt.Sprintf(`
kafka: {brokers: ["kafka.example.com:9093"]}
catalog: {listen: %q, tokenFile: %q}
intake: {listen: %q, admin: {tokenFile: %q}}
sweeper: {listen: %q, tokenEnv: SWEEPER_TOKEN, catalog: "http://catalog:8481", catalogTokenEnv: SWEEPER_TOKEN}
`, listen("catalog", `{"images":0}`), token("c", "of catalog\n"), listen("intake", `{"deliveries":[]}`), token("i", "of intake\nthe one before\n"),
		listen("sweeper", `{"sweeps":[]}`)))

	for _, c := range []struct {
		args  []string
		asked map[string]string
	}{
		{[]string{"report"}, map[string]string{"catalog": "/v1/report Bearer of catalog", "sweeper": "/v1/sweeps Bearer of sweeper"}},
		{[]string{"hooks", "log"}, map[string]string{"intake": "/v1/deliveries Bearer of intake"}},
	} {
		clear(asked)
		if code, _, stderr := tidewaiter(t, "", append(c.args, "--config", config)...); code != run.ExitOK {
			t.Errorf("%v: exit code %d\n%s", c.args, code, stderr)
		}
		for service, want := range c.asked {
			if asked[service] != want {
				t.Errorf("%v: %s was asked %q, want %q", c.args, service, asked[service], want)
			}
		}
	}

	t.Setenv("TIDEWAITER_TOKEN", "given")
	if code, _, stderr := tidewaiter(t, "", "hooks", "log", "--config", config); code != run.ExitOK || asked["intake"] != "/v1/deliveries Bearer given" {
		t.Errorf("exit code %d, intake was asked %q, want the token of the environment\n%s", code, asked["intake"], stderr)
	}
}

func TestServicesThatTheConfigurationLacks(t *testing.T) {
	config := filepath.Join(t.TempDir(), "tidewaiter.yaml")
	if err := os.WriteFile(config, []byte("kafka: {brokers: [\"kafka.example.com:9093\"]}\nintake: {lisden: 127.0.0.1:1}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	code, _, stderr := tidewaiter(t, "", "hooks", "log", "--config", config)
	if code != run.ExitUsage || !strings.Contains(stderr, "tidewaiter.yaml:2: intake.lisden") {
		t.Errorf("exit code %d, want the mistake with its line\n%s", code, stderr)
	}
	if err := os.WriteFile(config, []byte("kafka: {brokers: [\"kafka.example.com:9093\"]}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	code, _, stderr = tidewaiter(t, "", "where", "r.example/app:1", "--config", config)
	if code != run.ExitUsage || !strings.Contains(stderr, "--server URL") || !strings.Contains(stderr, "catalog.listen") {
		t.Errorf("exit code %d, want what to give\n%s", code, stderr)
	}
}

func TestReachable(t *testing.T) {
	for listen, want := range map[string]string{
		"127.0.0.1:8480": "http://127.0.0.1:8480", ":8480": "http://localhost:8480", "0.0.0.0:8480": "http://localhost:8480",
		"[::]:8480": "http://localhost:8480", "[::1]:8480": "http://[::1]:8480", "intake.example.com:80": "http://intake.example.com:80", "": "",
	} {
		if got := allinone.Reachable(listen); got != want {
			t.Errorf("Reachable(%q) = %q, want %q", listen, got, want)
		}
	}
}
