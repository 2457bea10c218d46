//go:build real

package e2e

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/bus"
	"github.com/tidewaiter/tidewaiter/services/advisor/artefact"
	"github.com/tidewaiter/tidewaiter/services/advisor/builtin"
	"github.com/tidewaiter/tidewaiter/services/gatekeeper"
	"github.com/tidewaiter/tidewaiter/services/sweeper"
	"github.com/tidewaiter/tidewaiter/services/tidewaiter/sample"
)

// Sources of the configuration that servers.sh writes.
const sourceDistribution = "distribution"

// configureWhole adds what advisor, gatekeeper and sweeper need: advisories that
// a test can change, and sources that are swept when it asks.
func (i *installation) configureWhole(t *testing.T, sections map[string]any) {
	t.Helper()
	private, public, err := artefact.GenerateKey()
	if err != nil {
		t.Fatal(err)
	}
	file := func(name string) string { return filepath.Join(i.dir, name) }
	for name, content := range map[string][]byte{"advisor.key": private, "advisor.pub": public} {
		if err := os.WriteFile(file(name), content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(i.news(), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := builtin.Unpack(file("advisories")); err != nil {
		t.Fatal(err)
	}
	i.advise(t, osv{id: "TEST-2026-0", name: "tidewaiter-test-of-nothing", fixed: "1.0.0"}) // an archive cannot be empty
	token := os.Getenv("SERVERS_API_TOKEN_FILE")
	snapshots := i.servers.registry.Name + "/" + i.name + "/advisories"
	sections["advisor"] = map[string]any{
		"from": []any{file("advisories"), i.news()}, "publish": snapshots, "keyFile": file("advisor.key"), "poll": "500ms",
	}
	sections["matcher"] = map[string]any{
		"snapshots": snapshots, "snapshotKeys": file("advisor.pub"), "poll": "1h", // what is published is only found when somebody names it
	}
	sections["gatekeeper"] = map[string]any{
		"keyFiles": []any{os.Getenv("SERVERS_PUBLIC_KEY_FILE")}, "auth": map[string]any{"tokenFile": token},
	}
	sections["sweeper"] = map[string]any{"tokenFile": token, "catalogTokenFile": token, "tick": "100ms"}
	own := map[string]any{
		"paths": []any{i.name},
		"sweep": map[string]any{"api": "distribution", "every": "24h", "grace": "1ms", "rate": 1000},
	}
	sections["sources"] = map[string]any{sourceDistribution: own, "docker-registry": own}
}

// news is the folder in which advisories arrive.
func (i *installation) news() string { return filepath.Join(i.dir, "news") }

// advise replaces the advisories that arrived.
func (i *installation) advise(t *testing.T, a osv) {
	t.Helper()
	a.modified = time.Now().UTC().Format(time.RFC3339)
	writeOSV(t, i.news(), a)
}

// reviewed waits until every gatekeeper answers an API server so about a Pod with an image.
func (i *installation) reviewed(t *testing.T, p sample.Pushed, allowed bool) {
	t.Helper()
	for _, g := range i.all {
		if g.service != "gatekeeper" {
			continue
		}
		i.log.wait(t, func(*events) string {
			if got, message := i.review(t, g, p.String()); got != allowed {
				return fmt.Sprintf("%s: a Pod with %s: allowed %t, want %t: %s", g, p, got, allowed, message)
			}
			return ""
		})
	}
}

// review asks a gatekeeper (Kubernetes, admission.k8s.io/v1).
func (i *installation) review(t *testing.T, p *process, image string) (allowed bool, message string) {
	t.Helper()
	authorities, err := os.ReadFile(filepath.Join(p.folder(i, "tls"), gatekeeper.BundleFile))
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(authorities)
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}}
	defer transport.CloseIdleConnections()
	body, err := json.Marshal(map[string]any{
		"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview",
		"request": map[string]any{
			"uid": "e2e", "operation": "CREATE", "namespace": "shop", "name": "app",
			"kind":     map[string]any{"group": "", "version": "v1", "kind": "Pod"},
			"resource": map[string]any{"group": "", "version": "v1", "resource": "pods"},
			"object": map[string]any{
				"apiVersion": "v1", "kind": "Pod", "metadata": map[string]any{"name": "app", "namespace": "shop"},
				"spec": map[string]any{"containers": []any{map[string]any{"name": "app", "image": image}}},
			},
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "https://"+p.listen+"/validate", bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("Authorization", "Bearer "+i.Token)
	resp, err := (&http.Client{Transport: transport, Timeout: 30 * time.Second}).Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	var answer struct {
		Response struct {
			Allowed bool `json:"allowed"`
			Status  struct {
				Message string `json:"message"`
			} `json:"status"`
		} `json:"response"`
	}
	if resp.StatusCode != http.StatusOK {
		t.Fatalf("%s: %s", p, resp.Status)
	}
	if err := json.NewDecoder(resp.Body).Decode(&answer); err != nil {
		t.Fatal(err)
	}
	return answer.Response.Allowed, answer.Response.Status.Message
}

// lose pushes an image of which no webhook tells: intake is down, and the
// registry, which keeps its queue in memory, is stopped before it is back.
func (i *installation) lose(t *testing.T, repository string, images ...sample.Image) sample.Pushed {
	t.Helper()
	var intakes []*process
	for _, p := range i.all {
		if p.service == "intake" {
			intakes = append(intakes, p)
			i.stop(p)
		}
	}
	lost := i.pushTo(i.servers.registry, repository, "1.0", images...)
	ctl(t, "kill", "distribution")
	ctl(t, "start", "distribution")
	for _, p := range intakes {
		i.launch(p)
		i.ready(p)
	}
	return lost
}

// sweptUp waits until every replica of sweeper may have looked at the registries once.
func (i *installation) sweptUp(t *testing.T) {
	t.Helper()
	i.Sweeper = "http://" + i.addresses("sweeper")[0]
	i.sweepOf(sourceDistribution, false)
}

// found checks that a sweep, asked of the other replica, finds what was lost, and only that.
func (i *installation) found(t *testing.T, lost sample.Pushed) {
	t.Helper()
	i.Sweeper = "http://" + i.addresses("sweeper")[len(i.addresses("sweeper"))-1]
	if sweep := i.sweepOf(sourceDistribution, false); sweep.State != contracts.SweepComplete {
		t.Errorf("%+v", sweep)
	}
	i.attested(lost)
	i.log.wait(t, func(*events) string { // a webhook is lost when its time is over
		var now sweeper.SourceSweeps
		i.ask("GET", i.Sweeper+"/v1/sweeps/"+sourceDistribution, map[string]string{"Authorization": "Bearer " + i.Token}, 200, &now)
		if now.Last == nil || now.Last.Figures.Lost != 1 || now.Last.Figures.Missed != 1 {
			return fmt.Sprintf("one push was lost and missed, the sweep says %+v", now.Last)
		}
		return ""
	})
	pushes := i.log.about(contracts.ImagePushedV1, fmt.Sprintf("%s/%s:1.0@%s", lost.Ref.Registry, lost.Ref.Repository, lost.Ref.Digest))
	if !slices.ContainsFunc(pushes, func(m bus.Tailed) bool {
		d, err := bus.Decode[contracts.ImagePushed](m.Event)
		return err == nil && d.Cause == contracts.CauseSweep
	}) {
		t.Errorf("%s was not pushed by a sweep: %d pushes", lost, len(pushes))
	}
}

// advised has an advisory arrive about a package of an image, and waits until
// its statements say so.
func (i *installation) advised(t *testing.T, p sample.Pushed, a osv) {
	t.Helper()
	before := len(i.log.about(contracts.ImageAttestedV1, p.String()))
	i.advise(t, a)
	i.log.wait(t, func(l *events) string {
		attested := l.about(contracts.ImageAttestedV1, p.String())
		if len(attested) == before {
			return p.String() + " was not attested again"
		}
		d, err := bus.Decode[contracts.ImageAttested](attested[len(attested)-1].Event)
		if err != nil {
			return err.Error()
		}
		if d.Verdict != contracts.VerdictFail {
			return "the verdict is still " + d.Verdict
		}
		return ""
	})
	i.log.wait(t, func(*events) string {
		for _, open := range i.problems() {
			if open.Package == a.name && strings.HasSuffix(open.Owner, "/"+p.Ref.Repository) {
				return ""
			}
		}
		return "no problem of " + a.name + " is open"
	})
}
