//go:build kubernetes

package kubernetes

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/goccy/go-yaml"
)

// cluster is a Kubernetes API server with its etcd; it has no nodes and no controllers.
type cluster struct {
	url   string
	token string
	http  *http.Client
}

// credentials are how the API server proves itself to the webhook at an address.
type credentials map[string]map[string]any

// startCluster starts etcd and kube-apiserver on loopback, which end with the
// test. users are the webhooks' callers, by host:port.
func startCluster(t *testing.T, users credentials) *cluster {
	t.Helper()
	var said bytes.Buffer
	build := exec.CommandContext(t.Context(), "servers/build.sh")
	build.Stderr = &said
	out, err := build.Output()
	if err != nil {
		t.Fatalf("etcd and kube-apiserver cannot be built here: %v\n%s", err, tail(said.Bytes()))
	}
	bin := strings.TrimSpace(string(out))
	dir := t.TempDir()

	etcd := "http://" + freeAddress(t)
	peer := "http://" + freeAddress(t)
	start(t, filepath.Join(dir, "etcd.log"), filepath.Join(bin, "etcd"),
		"--data-dir", filepath.Join(dir, "etcd"), "--unsafe-no-fsync", "--log-level", "warn",
		"--listen-client-urls", etcd, "--advertise-client-urls", etcd,
		"--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster", "default="+peer)

	private, public := serviceAccountKey(t)
	c := &cluster{token: rand.Text()}
	address := freeAddress(t)
	c.url = "https://" + address
	_, port, err := net.SplitHostPort(address)
	if err != nil {
		t.Fatal(err)
	}
	apiserver := start(t, filepath.Join(dir, "apiserver.log"), filepath.Join(bin, "kube-apiserver"),
		"--etcd-servers", etcd, "--bind-address", "127.0.0.1", "--advertise-address", "127.0.0.1", "--secure-port", port,
		"--cert-dir", filepath.Join(dir, "certs"), "--authorization-mode", "RBAC",
		"--token-auth-file", file(t, dir, "tokens.csv", []byte(c.token+",admin,admin,system:masters\n")),
		"--service-account-issuer", "https://kubernetes.default.svc", "--service-cluster-ip-range", "10.0.0.0/24",
		"--service-account-key-file", file(t, dir, "sa.pub", public), "--service-account-signing-key-file", file(t, dir, "sa.key", private),
		"--disable-admission-plugins", "ServiceAccount", "--endpoint-reconciler-type", "none", "--profiling=false",
		"--admission-control-config-file", admissionConfig(t, dir, users))

	certificate := filepath.Join(dir, "certs", "apiserver.crt")
	for deadline := time.Now().Add(3 * time.Minute); ; pause() {
		if apiserver.ended() || time.Now().After(deadline) {
			log, _ := os.ReadFile(filepath.Join(dir, "apiserver.log"))
			t.Fatalf("kube-apiserver does not become ready:\n%s", tail(log))
		}
		if c.http == nil {
			c.http = clientFor(certificate)
			continue
		}
		if code, body, _ := c.try(t, http.MethodGet, "/readyz", nil); code == http.StatusOK && string(body) == "ok" {
			return c
		}
	}
}

// clientFor returns a client that trusts the certificate in a file, or nil while there is none.
func clientFor(certificate string) *http.Client {
	text, err := os.ReadFile(certificate)
	pool := x509.NewCertPool()
	if err != nil || !pool.AppendCertsFromPEM(text) {
		return nil
	}
	return &http.Client{
		Timeout:   time.Minute,
		Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}, MaxIdleConnsPerHost: 64},
	}
}

// try sends a request and returns the status, the body and the warnings; 0 when there was no answer.
func (c *cluster) try(t *testing.T, method, path string, body any) (code int, answer []byte, warnings []string) {
	t.Helper()
	content, err := json.Marshal(body)
	if err != nil {
		t.Fatal(err)
	}
	req, err := http.NewRequestWithContext(t.Context(), method, c.url+path, bytes.NewReader(content))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+c.token)
	req.Header.Set("Content-Type", "application/json")
	if method == http.MethodPatch {
		req.Header.Set("Content-Type", "application/strategic-merge-patch+json")
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return 0, nil, nil
	}
	defer resp.Body.Close()
	if answer, err = io.ReadAll(resp.Body); err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, answer, resp.Header.Values("Warning")
}

// create creates an object and fails the test when that is refused.
func (c *cluster) create(t *testing.T, path string, object any) {
	t.Helper()
	if code, answer, _ := c.try(t, http.MethodPost, path, object); code != http.StatusCreated {
		t.Fatalf("create at %s: %d %s", path, code, answer)
	}
}

// message returns the message of a Status object.
func message(t *testing.T, answer []byte) string {
	t.Helper()
	var s struct {
		Message string `json:"message"`
	}
	if err := json.Unmarshal(answer, &s); err != nil {
		t.Fatalf("answer %s: %v", answer, err)
	}
	return s.Message
}

// admissionConfig writes the file that tells the API server how to prove itself to webhooks.
func admissionConfig(t *testing.T, dir string, users credentials) string {
	t.Helper()
	list := []any{}
	for name, user := range users {
		list = append(list, map[string]any{"name": name, "user": user})
	}
	kubeconfig := file(t, dir, "webhooks.yaml", encodeYAML(t, map[string]any{"apiVersion": "v1", "kind": "Config", "users": list}))
	return file(t, dir, "admission.yaml", encodeYAML(t, map[string]any{
		"apiVersion": "apiserver.config.k8s.io/v1", "kind": "AdmissionConfiguration",
		"plugins": []any{map[string]any{
			"name": "ValidatingAdmissionWebhook",
			"configuration": map[string]any{
				"apiVersion": "apiserver.config.k8s.io/v1", "kind": "WebhookAdmissionConfiguration", "kubeConfigFile": kubeconfig,
			},
		}},
	}))
}

func encodeYAML(t *testing.T, v any) []byte {
	t.Helper()
	b, err := yaml.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// process is a server that was started.
type process struct{ done chan struct{} }

func (p *process) ended() bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

// start starts a server and stops it at the end of the test, by a signal at first.
func start(t *testing.T, log, path string, args ...string) *process {
	t.Helper()
	out, err := os.Create(log)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(path, args...) // it outlives the test's context, to be stopped in order
	cmd.Stdout, cmd.Stderr = out, out
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	p := &process{done: make(chan struct{})}
	go func() {
		defer close(p.done)
		_ = cmd.Wait() // it is killed in the end; its log says what else went wrong
		_ = out.Close()
	}()
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM) // it may have ended already
		select {
		case <-p.done:
		case <-time.After(10 * time.Second):
			_ = cmd.Process.Kill()
			<-p.done
		}
	})
	return p
}

func freeAddress(t *testing.T) string {
	t.Helper()
	var lc net.ListenConfig
	l, err := lc.Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	return l.Addr().String()
}

func file(t *testing.T, dir, name string, content []byte) string {
	t.Helper()
	path := filepath.Join(dir, name)
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func tail(b []byte) []byte { return b[max(0, len(b)-4000):] }

// pause lets servers work between two looks at a condition.
func pause() {
	ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
	defer cancel()
	<-ctx.Done()
}

func serviceAccountKey(t *testing.T) (private, public []byte) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	privateDER, err := x509.MarshalPKCS8PrivateKey(key)
	publicDER, publicErr := x509.MarshalPKIXPublicKey(&key.PublicKey)
	if err := errors.Join(err, publicErr); err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: privateDER}), pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: publicDER})
}

// clientCertificate returns an authority and a client certificate of it with a common name, PEM.
func clientCertificate(t *testing.T, name string) (authority, certificate, key []byte) {
	t.Helper()
	sign := func(serial int64, name string, ca bool, parent *x509.Certificate, parentKey *ecdsa.PrivateKey) (*x509.Certificate, *ecdsa.PrivateKey) {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		template := &x509.Certificate{
			SerialNumber: big.NewInt(serial), Subject: pkix.Name{CommonName: name}, IsCA: ca, BasicConstraintsValid: true,
			NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
			KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
		}
		if parent == nil {
			parent, parentKey = template, key
		}
		der, err := x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, parentKey)
		if err != nil {
			t.Fatal(err)
		}
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		return cert, key
	}
	ca, caKey := sign(1, "authority", true, nil, nil)
	leaf, leafKey := sign(2, name, false, ca, caKey)
	der, err := x509.MarshalPKCS8PrivateKey(leafKey)
	if err != nil {
		t.Fatal(err)
	}
	encode := func(c *x509.Certificate) []byte {
		return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})
	}
	return encode(ca), encode(leaf), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
}

// object returns an object with a pod spec at its place for the kind.
func object(apiVersion, kind, name string, spec map[string]any) map[string]any {
	labels := map[string]any{"app": name}
	template := map[string]any{"metadata": map[string]any{"labels": labels}, "spec": spec}
	out := map[string]any{"apiVersion": apiVersion, "kind": kind, "metadata": map[string]any{"name": name}}
	selector := map[string]any{"matchLabels": labels}
	switch kind {
	case "Pod":
		out["spec"] = spec
	case "PodTemplate":
		out["template"] = template
	case "CronJob":
		spec["restartPolicy"] = "Never"
		out["spec"] = map[string]any{"schedule": "0 0 * * *", "jobTemplate": map[string]any{"spec": map[string]any{"template": template}}}
	case "Job":
		spec["restartPolicy"] = "Never"
		out["spec"] = map[string]any{"template": template}
	case "ReplicationController":
		out["spec"] = map[string]any{"selector": labels, "template": template}
	case "StatefulSet":
		out["spec"] = map[string]any{"selector": selector, "template": template, "serviceName": name}
	default:
		out["spec"] = map[string]any{"selector": selector, "template": template}
	}
	return out
}

// places are where workloads of each kind are created.
var places = []struct{ apiVersion, kind, path string }{
	{"v1", "Pod", "/api/v1/namespaces/%s/pods"},
	{"v1", "PodTemplate", "/api/v1/namespaces/%s/podtemplates"},
	{"v1", "ReplicationController", "/api/v1/namespaces/%s/replicationcontrollers"},
	{"apps/v1", "Deployment", "/apis/apps/v1/namespaces/%s/deployments"},
	{"apps/v1", "StatefulSet", "/apis/apps/v1/namespaces/%s/statefulsets"},
	{"apps/v1", "DaemonSet", "/apis/apps/v1/namespaces/%s/daemonsets"},
	{"apps/v1", "ReplicaSet", "/apis/apps/v1/namespaces/%s/replicasets"},
	{"batch/v1", "Job", "/apis/batch/v1/namespaces/%s/jobs"},
	{"batch/v1", "CronJob", "/apis/batch/v1/namespaces/%s/cronjobs"},
}

func podsOf(namespace string) string { return fmt.Sprintf(places[0].path, namespace) }
