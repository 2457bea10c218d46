package main

import (
	"bytes"
	"context"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/tidewaiter/tidewaiter/libs/run"
	"github.com/tidewaiter/tidewaiter/services/tidewaiter/allinone"
)

// A file that was written for services on real servers does for `up` too: they
// listen where it says, and what belongs to servers, tokens and keys of others is
// not used beside those of the data directory.
func TestUpWithAFileForRun(t *testing.T) {
	free := func() string {
		address, err := allinone.FreeAddress(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return address
	}
	intake, catalog, monitor, given := free(), free(), free(), free()
	dir := t.TempDir()
	config := filepath.Join(dir, "tidewaiter.yaml")
	if err := os.WriteFile(config, fmt.Appendf(nil, `
http: {listen: %q}
kafka: {brokers: ["kafka.example.com:9093"], mechanism: PLAIN, username: "u", passwordEnv: NOT_SET, tls: {caFile: /none}, attempts: 7}
redis: {sentinel: {master: m, addresses: ["s:1"]}, username: u, passwordEnv: NOT_SET, tls: {caFile: /none}}
intake: {listen: %q, admin: {tokenEnv: NOT_SET}}
catalog: {listen: %q, tokenEnv: NOT_SET}
attestor: {keyEnv: NOT_SET, passwordEnv: NOT_SET}
gatekeeper: {auth: {none: true}, tls: {names: [gatekeeper.example.com]}}
sources: {s: {kind: distribution, registry: 127.0.0.1:1, auth: {none: true}, sweep: {api: distribution}}}
registries: [{host: "127.0.0.1:1", plainHTTP: true}]
sweeper: {tokenEnv: SWEEPER_TOKEN}
`, monitor, intake, catalog), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("SWEEPER_TOKEN", "of sweeper")
	data := filepath.Join(dir, "data")
	ctx, stop := context.WithCancel(t.Context())
	var out bytes.Buffer
	var log diary
	ended := make(chan int, 1)
	go func() {
		ended <- Main(ctx, []string{"up", "--data", data, "--config", config, "--registry-listen", free(), "--gatekeeper", given},
			strings.NewReader(""), &out, &log)
	}()
	var at allinone.Addresses
	for {
		var err error
		if at, err = allinone.ReadAddresses(data); err == nil {
			break
		}
		select {
		case code := <-ended:
			t.Fatalf("exit code %d\n%s", code, &log)
		case <-time.After(20 * time.Millisecond):
		}
	}
	for what, pair := range map[string][2]string{
		"intake": {at.Intake, intake}, "catalog": {at.Catalog, catalog}, "monitor": {at.Monitor, monitor},
	} {
		if pair[0] != "http://"+pair[1] {
			t.Errorf("%s is at %s, the file says %s", what, pair[0], pair[1])
		}
	}
	for _, url := range []string{at.Intake + "/v1/deliveries", at.Catalog + "/v1/report"} {
		if status := statusOf(t, url, at.Token); status != http.StatusOK {
			t.Errorf("%s answers %d to the token of the data directory", url, status)
		}
	}
	if status := statusOf(t, at.Sweeper+"/v1/sweeps", "of sweeper"); status != http.StatusOK {
		t.Errorf("sweeper answers %d to the token of the file", status)
	}
	stop()
	if code := <-ended; code != run.ExitOK || !strings.Contains(log.String(), "the small built-in set") {
		t.Errorf("exit code %d\n%s", code, &log)
	}
}

// What the command line says goes before the file, and the file before what is built in.
func TestUpTakesAdvisoriesAndAddressesInOrder(t *testing.T) {
	dir := t.TempDir()
	config := filepath.Join(dir, "tidewaiter.yaml")
	if err := os.WriteFile(config, fmt.Appendf(nil, "matcher: {advisories: %s/own.db}\nintake: {listen: \"127.0.0.1:1\"}\n", dir), 0o600); err != nil {
		t.Fatal(err)
	}
	cfg, err := run.Load(config, os.LookupEnv)
	if err != nil {
		t.Fatal(err)
	}
	all, err := allinone.Start(t.Context(), allinone.Options{Dir: filepath.Join(dir, "data"), Config: cfg})
	if err != nil {
		t.Fatal(err)
	}
	defer all.Stop() //nolint:errcheck // the other test looks at that
	var matcher struct{ Advisories string }
	if err := all.Config.CheckSection("matcher", &matcher); err != nil || matcher.Advisories != dir+"/own.db" || all.BuiltIn {
		t.Errorf("matcher reads %q (built in: %v), %v", matcher.Advisories, all.BuiltIn, err)
	}
	if listen(cfg, "intake") != "127.0.0.1:1" || listen(cfg, "catalog") != "" {
		t.Errorf("intake listens on %q, catalog on %q", listen(cfg, "intake"), listen(cfg, "catalog"))
	}
}

func statusOf(t *testing.T, url, token string) int {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+token)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Error(err)
		return 0
	}
	defer resp.Body.Close()
	return resp.StatusCode
}

// diary is written by the services and by the command, as a process's stderr is.
type diary struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (d *diary) Write(p []byte) (int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.text.Write(p)
}

func (d *diary) String() string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.text.String()
}
