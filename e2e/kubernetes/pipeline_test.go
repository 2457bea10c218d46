//go:build kubernetes

package kubernetes

import (
	"context"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/tidewaiter/tidewaiter/libs/registry"
	"github.com/tidewaiter/tidewaiter/services/analyzer/worker"
	"github.com/tidewaiter/tidewaiter/services/gatekeeper"
	"github.com/tidewaiter/tidewaiter/services/tidewaiter/allinone"
	"github.com/tidewaiter/tidewaiter/services/tidewaiter/sample"
)

func TestMain(m *testing.M) {
	worker.Main() // the pipeline's analyzer runs its parsers in children of this program
	os.Exit(m.Run())
}

// From a push to the cluster: what the pipeline found decides what runs, and an
// image that nobody looked at is scanned because somebody deploys it.
func TestPipeline(t *testing.T) {
	const namespace = "shop"
	address := freeAddress(t)
	cluster := startCluster(t, credentials{address: {"token": "webhook-token"}})
	dir := t.TempDir()
	all, err := allinone.Start(context.WithoutCancel(t.Context()), allinone.Options{
		Dir: filepath.Join(dir, "data"), Log: slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelWarn})),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := all.Stop(); err != nil {
			t.Errorf("stop: %v", err)
		}
	})
	certificates := filepath.Join(dir, "certificates")
	cfg, err := all.Config.With(map[string]any{"gatekeeper": map[string]any{
		"listen": address, "keyFiles": []string{file(t, dir, "attestor.pub", []byte(all.PublicKey))}, "bundles": gatekeeper.FromDatabase,
		"missing": gatekeeper.RuleSubmit, "budget": "3s",
		"auth": map[string]any{"tokenFile": file(t, dir, "token", []byte("webhook-token"))},
		"tls":  map[string]any{"dir": certificates, "names": []string{"127.0.0.1"}},
	}})
	if err != nil {
		t.Fatal(err)
	}
	startGatekeeper(t, cfg)
	ca, err := os.ReadFile(filepath.Join(certificates, gatekeeper.BundleFile))
	if err != nil {
		t.Fatal(err)
	}
	r := &rig{cluster: cluster, host: all.Registry.Host}
	r.connect(t, cfg)
	r.create(t, "/apis/admissionregistration.k8s.io/v1/validatingwebhookconfigurations", webhook(t, namespace, address, ca))
	r.create(t, "/api/v1/namespaces", map[string]any{"apiVersion": "v1", "kind": "Namespace", "metadata": map[string]any{"name": namespace}})
	r.active(t, namespace)

	executable, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	program, err := os.ReadFile(executable)
	if err != nil {
		t.Fatal(err)
	}
	story, err := sample.NewStory(program)
	if err != nil {
		t.Fatal(err)
	}
	push := func(repository string, images ...sample.Image) sample.Pushed {
		p, err := sample.Push(t.Context(), r.client, registry.Ref{Registry: r.host, Repository: repository, Tag: "1.0"}, images...)
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	mended, vulnerable := push("shop/mended", story.Clean...), push("shop/cart", story.Vulnerable...)
	// admitted waits until a Pod with the image is answered as wanted: attested
	// images need a moment. Before that they are admitted with a warning.
	admitted := func(image string, want bool) {
		t.Helper()
		pod := object("v1", "Pod", "probe", containers(image))
		for deadline := time.Now().Add(3 * time.Minute); ; pause() {
			code, answer, warnings := r.try(t, http.MethodPost, podsOf(namespace)+"?dryRun=All", pod)
			switch {
			case want && code == http.StatusCreated && len(warnings) == 0:
				return
			case !want && code == http.StatusForbidden && strings.Contains(message(t, answer), `the verdict is "fail"`):
				return
			case time.Now().After(deadline):
				t.Fatalf("%s: %d %s %q", image, code, answer, warnings)
			}
		}
	}
	admitted(mended.String(), true)
	admitted(vulnerable.String(), false)
	for _, platform := range vulnerable.Platforms {
		admitted(r.host+"/shop/cart@"+platform.Digest.String(), false)
	}

	// Nobody is told of the stranger: the first Pod that wants it has it scanned.
	all.Servers.SetHook("", "")
	stranger := push("shop/stranger", story.Unattested...)
	code, answer, warnings := r.try(t, http.MethodPost, podsOf(namespace), object("v1", "Pod", "stranger", containers(stranger.String())))
	if code != http.StatusCreated || len(warnings) != 1 || !strings.Contains(warnings[0], stranger.Ref.Repository) {
		t.Fatalf("%d %s %q", code, answer, warnings)
	}
	admitted(stranger.String(), true)
}
