//go:build kubernetes

package kubernetes

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/goccy/go-yaml"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/bus"
	"github.com/tidewaiter/tidewaiter/libs/embedded"
	"github.com/tidewaiter/tidewaiter/libs/registry"
	"github.com/tidewaiter/tidewaiter/libs/run"
	"github.com/tidewaiter/tidewaiter/services/gatekeeper"
	gt "github.com/tidewaiter/tidewaiter/services/gatekeeper/gatekeepertest"
)

// rig is a cluster whose workloads two gatekeepers look at: one that enforces
// and knows its caller by a certificate, one that warns and knows it by a token.
type rig struct {
	*cluster
	client *registry.Client
	host   string
	bus    *bus.Bus
	images map[string]contracts.Image
}

// Namespaces of the two.
const (
	enforced = "enforced"
	warned   = "warned"
)

func newRig(t *testing.T) *rig {
	t.Helper()
	log := slog.New(slog.DiscardHandler)
	dir := t.TempDir()
	serversCtx, stopServers := context.WithCancel(context.Background())
	servers, err := embedded.Start(serversCtx, embedded.Options{Dir: filepath.Join(dir, "servers")}, log)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		stopServers()
		if err := servers.Wait(); err != nil {
			t.Errorf("stop servers: %v", err)
		}
	})
	authority, certificate, key := clientCertificate(t, "kube-apiserver")
	enforce, warn := freeAddress(t), freeAddress(t)
	r := &rig{host: servers.RegistryAddress, images: map[string]contracts.Image{}}
	common := map[string]any{
		"kafka": map[string]any{
			"brokers": []string{servers.KafkaAddress}, "username": servers.KafkaUsername, "replication": 1,
			"passwordFile": file(t, dir, "kafka.password", []byte(servers.KafkaPassword)),
		},
		"redis": map[string]any{"url": servers.RedisURL, "passwordFile": file(t, dir, "redis.password", []byte(servers.RedisPassword))},
		"registries": []any{map[string]any{
			"host": servers.RegistryAddress, "plainHTTP": true, "username": servers.RegistryUsername,
			"passwordFile": file(t, dir, "registry.password", []byte(servers.RegistryPassword)),
		}},
	}
	publicKey := file(t, dir, "attestor.pub", gt.Key(t, 0).PublicPEM())
	gatekeepers := map[string]map[string]any{
		enforce: {"auth": map[string]any{"clientCAFile": file(t, dir, "client-ca.crt", authority), "clientNames": []string{"kube-apiserver"}}},
		warn:    {"mode": gatekeeper.ModeWarn, "auth": map[string]any{"tokenFile": file(t, dir, "token", []byte("webhook-token\n"))}},
	}
	bundles := map[string]string{}
	for address, section := range gatekeepers {
		certificates := filepath.Join(dir, "certificates-"+strings.ReplaceAll(address, ":", "-"))
		section["listen"], section["keyFiles"] = address, []string{publicKey}
		section["maxAge"], section["budget"] = "24h", "3s" // a machine that does much else
		section["tls"] = map[string]any{"dir": certificates, "names": []string{"127.0.0.1"}}
		common["gatekeeper"] = section
		content, err := yaml.Marshal(common)
		if err != nil {
			t.Fatal(err)
		}
		cfg, err := run.Parse("gatekeeper.yaml", content, func(string) (string, bool) { return "", false })
		if err != nil {
			t.Fatal(err)
		}
		startGatekeeper(t, cfg)
		bundles[address] = filepath.Join(certificates, gatekeeper.BundleFile)
		if r.bus == nil {
			r.connect(t, cfg)
		}
	}
	r.cluster = startCluster(t, credentials{
		enforce: {"client-certificate-data": certificate, "client-key-data": key},
		warn:    {"token": "webhook-token"},
	})
	for namespace, address := range map[string]string{enforced: enforce, warned: warn} {
		ca, err := os.ReadFile(bundles[address])
		if err != nil {
			t.Fatal(err)
		}
		r.create(t, "/apis/admissionregistration.k8s.io/v1/validatingwebhookconfigurations", webhook(t, namespace, address, ca))
		r.create(t, "/api/v1/namespaces", map[string]any{
			"apiVersion": "v1", "kind": "Namespace", "metadata": map[string]any{"name": namespace},
		})
	}
	return r
}

// startGatekeeper runs the service as its own program would.
func startGatekeeper(t *testing.T, cfg *run.Config) {
	t.Helper()
	env := cfg.Env(gatekeeper.Name, slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelInfo})), prometheus.NewRegistry(), run.NewHealth())
	ctx, stop := context.WithCancel(context.Background())
	ready, ended := make(chan string, 1), make(chan error, 1)
	go func() { ended <- gatekeeper.Listening(func(a string) { ready <- a })(ctx, env) }()
	t.Cleanup(func() {
		stop()
		if err := <-ended; err != nil {
			t.Errorf("gatekeeper ended with %v", err)
		}
		if err := env.Close(); err != nil {
			t.Errorf("close connections: %v", err)
		}
	})
	select {
	case <-ready:
	case err := <-ended:
		ended <- err
		t.Fatalf("gatekeeper ended with %v", err)
	case <-time.After(time.Minute):
		t.Fatal("gatekeeper does not answer")
	}
}

// connect opens what the tests themselves use.
func (r *rig) connect(t *testing.T, cfg *run.Config) {
	t.Helper()
	env := cfg.Env("e2e", slog.New(slog.DiscardHandler), nil, run.NewHealth())
	t.Cleanup(func() {
		if err := env.Close(); err != nil {
			t.Errorf("close connections: %v", err)
		}
	})
	client, err := env.Registry()
	if err != nil {
		t.Fatal(err)
	}
	if r.bus, err = env.Bus(); err != nil {
		t.Fatal(err)
	}
	r.client = client
}

// webhook returns the registration that deploy/gatekeeper describes, for one
// namespace and an address on loopback.
func webhook(t *testing.T, namespace, address string, ca []byte) map[string]any {
	t.Helper()
	text, err := os.ReadFile("../../deploy/gatekeeper/webhook.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var out map[string]any
	if err := yaml.Unmarshal(text, &out); err != nil {
		t.Fatal(err)
	}
	out["metadata"] = map[string]any{"name": "tidewaiter-" + namespace}
	hook := out["webhooks"].([]any)[0].(map[string]any)
	hook["clientConfig"] = map[string]any{"url": "https://" + address + "/validate", "caBundle": ca}
	hook["timeoutSeconds"] = 20
	hook["namespaceSelector"] = map[string]any{"matchLabels": map[string]any{"kubernetes.io/metadata.name": namespace}}
	return out
}

// push pushes an image, and attaches a statement of our key where a verdict is given.
func (r *rig) push(t *testing.T, repository, verdict string) contracts.Image {
	t.Helper()
	image := gt.Push(t, r.client, r.host, repository, "v1")
	if verdict != "" {
		gt.Attached(t, r.client, gt.Key(t, 0), gt.Statement{Verdict: verdict, Sequence: 100}, image)
	}
	return image
}

func containers(image string) map[string]any {
	return map[string]any{"containers": []any{map[string]any{"name": "app", "image": image}}}
}

// active waits until the API server asks the webhook for a namespace: a
// registration takes seconds to act.
func (r *rig) active(t *testing.T, namespace string) {
	t.Helper()
	pod := object("v1", "Pod", "probe", containers("nowhere.example/probe:v1"))
	for deadline := time.Now().Add(time.Minute); ; pause() {
		code, answer, warnings := r.try(t, http.MethodPost, podsOf(namespace)+"?dryRun=All", pod)
		if strings.Contains(string(answer)+strings.Join(warnings, ""), "not among the registries") {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("the webhook is not asked: %d %s %q", code, answer, warnings)
		}
	}
}

// denied checks that an object is refused, with every word.
func (r *rig) denied(t *testing.T, method, path string, object any, words ...string) {
	t.Helper()
	code, answer, _ := r.try(t, method, path, object)
	if code != http.StatusForbidden {
		t.Errorf("%s: %d %s", path, code, answer)
		return
	}
	said := message(t, answer)
	for _, word := range words {
		if !strings.Contains(said, word) {
			t.Errorf("%s: %q does not say %q", path, said, word)
		}
	}
}

func TestAdmission(t *testing.T) {
	r := newRig(t)
	r.active(t, enforced)
	r.active(t, warned)
	good, warning := r.push(t, "shop/good", contracts.VerdictPass), r.push(t, "shop/warning", contracts.VerdictWarn)
	failing, unattested := r.push(t, "shop/failing", contracts.VerdictFail), r.push(t, "shop/unattested", "")
	decided := r.decisions(t)

	t.Run("every kind", func(t *testing.T) {
		for _, p := range places {
			path := fmt.Sprintf(p.path, enforced)
			name := strings.ToLower(p.kind)
			r.create(t, path, object(p.apiVersion, p.kind, name, containers(good.String())))
			r.denied(t, http.MethodPost, path, object(p.apiVersion, p.kind, name+"-failing", containers(failing.String())),
				failing.String(), "container app", `the verdict is "fail"`, "tidewaiter where")
			r.denied(t, http.MethodPost, path, object(p.apiVersion, p.kind, name+"-unattested", containers(unattested.String())),
				unattested.String(), "no statement is attached", "tidewaiter submit")
		}
		r.create(t, podsOf(enforced), object("v1", "Pod", "warning", containers(warning.String())))
	})

	t.Run("every place", func(t *testing.T) {
		for place, spec := range map[string]map[string]any{
			"init container setup": {"initContainers": []any{map[string]any{"name": "setup", "image": failing.String()}}},
			"image volume models": {"volumes": []any{map[string]any{
				"name": "models", "image": map[string]any{"reference": failing.String(), "pullPolicy": "IfNotPresent"},
			}}},
		} {
			spec["containers"] = containers(good.String())["containers"]
			r.denied(t, http.MethodPost, podsOf(enforced), object("v1", "Pod", "places", spec), "("+place+")", `the verdict is "fail"`)
		}
		ephemeral := func(image string) map[string]any {
			return map[string]any{"spec": map[string]any{"ephemeralContainers": []any{map[string]any{"name": "debug", "image": image}}}}
		}
		path := podsOf(enforced) + "/pod/ephemeralcontainers"
		r.denied(t, http.MethodPatch, path, ephemeral(unattested.String()), "(ephemeral container debug)", "no statement")
		if code, answer, _ := r.try(t, http.MethodPatch, path, ephemeral(warning.String())); code != http.StatusOK {
			t.Errorf("a good ephemeral container: %d %s", code, answer)
		}
		// One line for each image.
		both := map[string]any{"containers": []any{
			map[string]any{"name": "a", "image": failing.String()}, map[string]any{"name": "b", "image": unattested.String()},
		}}
		code, answer, _ := r.try(t, http.MethodPost, podsOf(enforced), object("v1", "Pod", "both", both))
		if said := message(t, answer); code != http.StatusForbidden || strings.Count(said, "\n") != 1 {
			t.Errorf("%d %q", code, said)
		}
	})

	t.Run("update", func(t *testing.T) {
		path := fmt.Sprintf(places[3].path, enforced) + "/deployment"
		r.denied(t, http.MethodPatch, path, map[string]any{
			"spec": map[string]any{"template": map[string]any{"spec": containers(failing.String())}},
		}, failing.String())
		if code, answer, _ := r.try(t, http.MethodPatch, path, map[string]any{"spec": map[string]any{"replicas": 3}}); code != http.StatusOK {
			t.Errorf("scale: %d %s", code, answer)
		}
	})

	t.Run("references", func(t *testing.T) {
		for image, words := range map[string]string{
			good.Repo() + ":v1":             "a tag can be moved",
			"nginx":                         "docker.io/library/nginx is not among the registries",
			"evil.example/x@" + good.Digest: "evil.example/x is not among the registries",
		} {
			r.denied(t, http.MethodPost, podsOf(enforced), object("v1", "Pod", "reference", containers(image)), words)
		}
	})

	t.Run("warn", func(t *testing.T) {
		code, answer, warnings := r.try(t, http.MethodPost, podsOf(warned), object("v1", "Pod", "failing", containers(failing.String())))
		if code != http.StatusCreated || len(warnings) != 1 || !strings.Contains(warnings[0], "tidewaiter: "+failing.Registry) {
			t.Errorf("%d %s %q", code, answer, warnings)
		}
		code, _, warnings = r.try(t, http.MethodPost, podsOf(warned), object("v1", "Pod", "good", containers(good.String())))
		if code != http.StatusCreated || len(warnings) != 0 {
			t.Errorf("a good one: %d %q", code, warnings)
		}
	})

	t.Run("superseded", func(t *testing.T) {
		image := r.push(t, "shop/today", contracts.VerdictPass)
		pods := podsOf(enforced)
		r.create(t, pods, object("v1", "Pod", "yesterday", containers(image.String())))
		s := gt.Statement{Verdict: contracts.VerdictFail, Sequence: 200, Time: time.Now()}
		gt.Attached(t, r.client, gt.Key(t, 0), s, image)
		ev, err := bus.NewEvent(contracts.ImageAttestedV1, image.String(), contracts.ImageAttested{
			Image: image, Snapshot: contracts.SnapshotRef{Sequence: s.Sequence}, SignedAt: s.Time,
		})
		if err != nil {
			t.Fatal(err)
		}
		bus.Key(&ev, image.Digest)
		if err := r.bus.Publish(t.Context(), ev); err != nil {
			t.Fatal(err)
		}
		for deadline := time.Now().Add(time.Minute); ; pause() {
			code, answer, _ := r.try(t, http.MethodPost, pods+"?dryRun=All", object("v1", "Pod", "today", containers(image.String())))
			if code == http.StatusForbidden && strings.Contains(message(t, answer), `the verdict is "fail"`) {
				break
			}
			if time.Now().After(deadline) {
				t.Fatalf("still admitted: %d %s", code, answer)
			}
		}
	})

	t.Run("many at once", func(t *testing.T) {
		var group sync.WaitGroup
		codes := make([]int, 200)
		for i := range codes {
			group.Go(func() {
				image := good
				if i%2 == 1 {
					image = failing
				}
				codes[i], _, _ = r.try(t, http.MethodPost, podsOf(enforced), object("v1", "Pod", fmt.Sprintf("many-%d", i), containers(image.String())))
			})
		}
		group.Wait()
		for i, code := range codes {
			if want := [2]int{http.StatusCreated, http.StatusForbidden}[i%2]; code != want {
				t.Errorf("review %d: %d, want %d", i, code, want)
			}
		}
	})

	t.Run("events", func(t *testing.T) {
		for deadline := time.Now().Add(time.Minute); ; pause() {
			d, ok := decided("many-199")
			if ok {
				if d.Decision != contracts.DecisionDeny || d.Kind != "Pod" || d.Namespace != enforced || d.User != "admin" ||
					len(d.Images) != 1 || *d.Images[0].Image != failing || d.Images[0].Reason != gatekeeper.ReasonVerdict {
					t.Errorf("decided %+v", d)
				}
				return
			}
			if time.Now().After(deadline) {
				t.Fatal("the decision is not published")
			}
		}
	})
}

// decisions follows admission.decided and returns a look-up by the workload's name.
func (r *rig) decisions(t *testing.T) func(name string) (contracts.AdmissionDecided, bool) {
	t.Helper()
	ctx, stop := context.WithCancel(context.Background())
	var mu sync.Mutex
	seen := map[string]contracts.AdmissionDecided{}
	ended := make(chan error, 1)
	if err := r.bus.EnsureTopics(t.Context(), contracts.AdmissionDecidedV1); err != nil {
		t.Fatal(err)
	}
	go func() {
		ended <- r.bus.Tail(ctx, r.bus.Topics(contracts.AdmissionDecidedV1), true, func(m bus.Tailed) error {
			var d contracts.AdmissionDecided
			if err := json.Unmarshal(m.Event.Data(), &d); err != nil {
				return fmt.Errorf("decode decision: %w", err)
			}
			mu.Lock()
			defer mu.Unlock()
			seen[d.Name] = d
			return nil
		})
	}()
	t.Cleanup(func() {
		stop()
		if err := <-ended; err != nil {
			t.Errorf("follow decisions: %v", err)
		}
	})
	return func(name string) (contracts.AdmissionDecided, bool) {
		mu.Lock()
		defer mu.Unlock()
		d, ok := seen[name]
		return d, ok
	}
}
