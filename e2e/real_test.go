//go:build real

package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/bus"
	"github.com/tidewaiter/tidewaiter/libs/credential"
	"github.com/tidewaiter/tidewaiter/libs/registry"
	"github.com/tidewaiter/tidewaiter/services/tidewaiter/sample"
)

// Two replicas of every service on real servers, from a push through the
// registry's own notification to a statement that verifies and admits, a finding
// that a consumer in another language understands and a ticket; a push that no
// webhook told of, an advisory that arrives later; and back, when the image is
// deleted. Nothing is done twice.
func TestRealPipeline(t *testing.T) {
	python := virtualEnvironment(t)
	i := install(t, layout{replicas: 2, whole: true})
	i.sweptUp(t)
	stories := story(t)
	shop := i.pushTo(i.servers.registry, "team/shop", "1.0", stories.Vulnerable...)
	i.attested(shop)
	i.connected(t)
	// The second one shares its base, and the old registry has a layer of it too.
	reports := i.pushTo(i.servers.registry, "team/reports", "1.0", stories.Sharing...)
	mended := i.pushTo(i.servers.old, "team/mended", "1.0", stories.Clean...)
	foreign := i.pushDocker(t, "team/foreign", stories.Sharing[0].Layers[:2])
	i.attested(reports, mended, foreign)
	i.quiet()
	i.undoubled(shop, reports, mended, foreign)
	i.ticketed(shop, reports, foreign)
	i.reviewed(t, mended, true)
	i.reviewed(t, shop, false)
	i.refused(t)

	for _, want := range []struct {
		image  string
		accept string
		code   int
	}{
		{mended.String(), contracts.VerdictWarn, 0},
		{mended.Ref.Registry + "/" + mended.Ref.Repository + ":1.0", contracts.VerdictWarn, 0},
		{shop.String(), contracts.VerdictWarn, 1},
		{shop.String(), contracts.VerdictFail, 0},
		{foreign.String(), contracts.VerdictFail, 0},
	} {
		code, stdout, stderr := i.cli("verify", want.image, "--key", os.Getenv("SERVERS_PUBLIC_KEY_FILE"), "--accept", want.accept)
		if code != want.code {
			t.Errorf("verify %s --accept %s: exit code %d, want %d\n%s%s", want.image, want.accept, code, want.code, stdout, stderr)
		}
	}

	problems := i.problems()
	told := i.consume(t, python)
	for _, p := range problems {
		if !slices.ContainsFunc(told, func(line string) bool { return strings.Contains(line, p.Key) }) {
			t.Errorf("the consumer in Python was not told of %s in %s", p.Package, p.Owner)
		}
	}

	lost := i.lose(t, "team/lost", stories.Clean...)
	i.found(t, lost)

	i.advised(t, mended, osv{id: "TEST-2026-1", name: "left-pad", fixed: "1.3.1"})
	i.reviewed(t, mended, false)
	i.quiet()
	i.undoubled(shop, reports, mended, foreign, lost)
	i.ticketed(shop, reports, foreign, mended, lost)

	i.deleteImage(t, i.servers.registry, shop)
	i.log.wait(t, func(l *events) string {
		for _, image := range images(shop) {
			if len(l.about(contracts.ImageGoneV1, image)) == 0 {
				return image + " is not gone"
			}
		}
		for _, p := range i.problems() {
			if strings.HasSuffix(p.Owner, "/"+shop.Ref.Repository) {
				return p.Package + " in " + p.Owner + " is still open"
			}
		}
		return ""
	})
	i.ticketed(reports, foreign, mended, lost)
	if letters := i.deadLetters(t); len(letters) > 0 {
		t.Errorf("dead letters: %+v", letters)
	}
}

// Every process is stopped and started, one after the other, while images are
// pushed: every push that the registry took is attested, once.
func TestRealRollingRestart(t *testing.T) {
	i := install(t, layout{replicas: 2})
	pushed := i.pushDuring(t, 40, func() {
		for _, p := range i.all {
			i.restart(p)
		}
	})
	i.attested(pushed...)
	i.quiet()
	i.undoubled(pushed...)
	i.ticketed(pushed...)
}

// The program of an earlier commit (TIDEWAITER_PREVIOUS, default the parent of
// this one) is replaced by the present one, replica by replica, while images are
// pushed; both work side by side meanwhile.
func TestRealMixedVersions(t *testing.T) {
	previous := buildCommit(t, os.Getenv("TIDEWAITER_PREVIOUS"))
	i := install(t, layout{replicas: 2, bin: previous})
	all := i.pushDuring(t, 5, func() {})
	i.bin = program(t)
	var between []sample.Pushed
	all = append(all, i.pushDuring(t, 30, func() {
		for n := range 2 {
			for _, p := range i.all {
				if p.number == n+1 {
					i.restart(p)
				}
			}
			// after the first round one of each is new, one is old, and both have work
			between = append(between, i.pushTo(i.servers.registry, fmt.Sprintf("mixed/between-%d", n), "1", fleet(t, n+1, 90<<10, 10<<10)[n]))
			i.attested(between...)
		}
	})...)
	all = append(all, between...)
	i.attested(all...)
	i.quiet()
	i.undoubled(all...)
	i.ticketed(all...)
}

// TestRealLatency prints push → attested on real servers, on a warm base with 1
// MB of new layer. It is a measurement, which `task bench` asks for.
func TestRealLatency(t *testing.T) {
	measuring(t)
	i := install(t, layout{replicas: 1})
	const n = 60
	all := fleet(t, n+1, 30<<20, 1<<20)
	i.attested(i.pushTo(i.servers.registry, "latency/base", "1", all[0]))
	var took []time.Duration
	for k, image := range all[1:] {
		p := i.pushTo(i.servers.registry, fmt.Sprintf("latency/app-%d", k), "1", image)
		began := time.Now()
		i.attested(p)
		took = append(took, time.Since(began))
	}
	slices.Sort(took)
	fmt.Printf("push → attested on real servers, %d brokers, warm base, 1 MB new layer: p50 %v, p95 %v (design: p95 < 5 s)\n",
		len(i.servers.kafka.Brokers), took[n/2].Round(time.Millisecond), took[n*95/100].Round(time.Millisecond))
}

// pushDuring pushes images, one after the other and at least n, until f has returned.
func (i *installation) pushDuring(t *testing.T, n int, f func()) []sample.Pushed {
	t.Helper()
	const most = 400
	images := fleet(t, most, 300<<10, 10<<10)
	series := fmt.Sprintf("during-%d", time.Now().UnixNano())
	var (
		group  sync.WaitGroup
		pushed []sample.Pushed
		failed error
		over   = make(chan struct{})
	)
	group.Go(func() {
		for k, image := range images {
			if k >= n {
				select {
				case <-over:
					return
				default:
				}
			}
			var p sample.Pushed
			p, failed = sample.Push(t.Context(), i.client, registry.Ref{Registry: i.servers.registry.Name, Repository: fmt.Sprintf("%s/%s/app-%d", i.name, series, k), Tag: "1"}, image)
			if failed != nil {
				return
			}
			pushed = append(pushed, p)
			pause(t, 250*time.Millisecond) // as teams push, not as a benchmark does
		}
	})
	f()
	close(over)
	group.Wait()
	if failed != nil {
		t.Fatal(failed)
	}
	t.Logf("%d images were pushed meanwhile", len(pushed))
	return pushed
}

// pushDocker pushes an image of Docker's own media types, as docker does, with
// another client than ours.
func (i *installation) pushDocker(t *testing.T, repository string, layers []sample.Layer) sample.Pushed {
	t.Helper()
	h := i.servers.old
	image := mutate.MediaType(empty.Image, types.DockerManifestSchema2)
	image = mutate.ConfigMediaType(image, types.DockerConfigJSON)
	for k, l := range layers {
		file := filepath.Join(t.TempDir(), fmt.Sprintf("layer-%d.tar.gz", k))
		if err := os.WriteFile(file, l.Content, 0o600); err != nil {
			t.Fatal(err)
		}
		layer, err := tarball.LayerFromFile(file, tarball.WithMediaType(types.DockerLayer))
		if err != nil {
			t.Fatal(err)
		}
		if image, err = mutate.AppendLayers(image, layer); err != nil {
			t.Fatal(err)
		}
	}
	config, err := image.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	config = config.DeepCopy()
	config.OS, config.Architecture = "linux", "amd64"
	if image, err = mutate.ConfigFile(image, config); err != nil {
		t.Fatal(err)
	}
	repository = i.name + "/" + repository
	ref, err := name.ParseReference(h.Name + "/" + repository + ":1.0")
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(ref, image, i.remoteOptions(t, h)...); err != nil {
		t.Fatal(err)
	}
	digest, err := image.Digest()
	if err != nil {
		t.Fatal(err)
	}
	return sample.Pushed{Ref: registry.Ref{Registry: h.Name, Repository: repository, Digest: digest.String()}}
}

// remoteOptions are how another client than ours reaches a registry.
func (i *installation) remoteOptions(t *testing.T, h registry.Host) []remote.Option {
	t.Helper()
	options := []remote.Option{remote.WithContext(t.Context()), remote.WithTransport(i.registryTransport(t))}
	if h.Username != "" {
		options = append(options, remote.WithAuth(&authn.Basic{Username: h.Username, Password: i.registryPassword(t)}))
	}
	return options
}

// registryTransport trusts the registries' authority, and shows them a certificate where they want one.
func (i *installation) registryTransport(t *testing.T) http.RoundTripper {
	t.Helper()
	h := i.servers.registry
	if h.CAFile == "" {
		return http.DefaultTransport
	}
	config, err := credential.TLS{CAFile: h.CAFile, CertFile: h.CertFile, KeyFile: h.KeyFile}.Load()
	if err != nil {
		t.Fatal(err)
	}
	transport := &http.Transport{TLSClientConfig: config}
	t.Cleanup(transport.CloseIdleConnections)
	return transport
}

func (i *installation) registryPassword(t *testing.T) string {
	t.Helper()
	b, err := os.ReadFile(i.servers.registry.PasswordFile)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// deleteImage deletes what was pushed, by digest, as registries allow it.
func (i *installation) deleteImage(t *testing.T, h registry.Host, p sample.Pushed) {
	t.Helper()
	for _, image := range images(p) {
		ref, err := name.ParseReference(image)
		if err != nil {
			t.Fatal(err)
		}
		if err := remote.Delete(ref, i.remoteOptions(t, h)...); err != nil {
			t.Fatalf("delete %s: %v", image, err)
		}
	}
}

// consume runs the consumer in Python over all findings so far and returns what
// it printed. What breaks the contract fails the test.
func (i *installation) consume(t *testing.T, python string) []string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	args := []string{"consumer/consumer.py", "--brokers", strings.Join(i.servers.kafka.Brokers, ","), "--topic", i.servers.kafka.Prefix + "finding.v1", "--until-end"}
	cmd := exec.CommandContext(ctx, python)
	cmd.Env = os.Environ()
	if user := i.servers.kafka.Username; user != "" {
		password, err := i.servers.kafka.PasswordSource()
		if err != nil {
			t.Fatal(err)
		}
		args = append(args, "--username", user)
		cmd.Env = append(cmd.Env, "KAFKA_PASSWORD="+password)
	}
	if ca := os.Getenv("SERVERS_CA_FILE"); ca != "" {
		args = append(args, "--ca", ca)
	}
	cmd.Args = append(cmd.Args, args...)
	var out, problems bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &problems
	if err := cmd.Run(); err != nil {
		t.Fatalf("consumer: %v\n%s", err, problems.String())
	}
	return strings.Split(strings.TrimSpace(out.String()), "\n")
}

func (i *installation) deadLetters(t *testing.T) []contracts.DeadLetter {
	t.Helper()
	b, err := bus.New(i.servers.kafka, "e2e-dlq", i.logger(), nil)
	if err != nil {
		t.Fatal(err)
	}
	letters, err := b.ListDeadLetters(t.Context(), bus.DeadLetterFilter{})
	if err = errors.Join(err, b.Close()); err != nil {
		t.Fatal(err)
	}
	return letters
}

// buildCommit builds the program of an earlier commit in a worktree of its own.
func buildCommit(t *testing.T, commit string) string {
	t.Helper()
	if commit == "" {
		commit = "HEAD~1"
	}
	tree := filepath.Join(t.TempDir(), "tree")
	bin := filepath.Join(t.TempDir(), "tidewaiter-previous")
	command := func(dir, name string, args ...string) {
		t.Helper()
		cmd := exec.CommandContext(t.Context(), name, args...)
		cmd.Dir = dir
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
		}
	}
	command("..", "git", "worktree", "add", "--detach", tree, commit)
	t.Cleanup(func() {
		if out, err := exec.Command("git", "worktree", "remove", "--force", tree).CombinedOutput(); err != nil {
			t.Errorf("remove the worktree: %v\n%s", err, out)
		}
	})
	command(tree, "go", "build", "-o", bin, "./services/tidewaiter")
	return bin
}
