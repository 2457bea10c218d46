package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"github.com/tidewaiter/tidewaiter/libs/registry"
	"github.com/tidewaiter/tidewaiter/services/advisor/builtin"
	"github.com/tidewaiter/tidewaiter/services/gatekeeper"
	"github.com/tidewaiter/tidewaiter/services/tidewaiter/sample"
)

// admission is what a cluster was answered about a Pod.
type admission struct {
	Allowed bool `json:"allowed"`
	Status  struct {
		Message string `json:"message"`
	} `json:"status"`
}

// cluster asks gatekeeper as an API server does (Kubernetes, admission.k8s.io/v1).
type cluster struct {
	url, token string
	client     *http.Client
}

// newCluster trusts the authority that gatekeeper made for itself in dir.
func newCluster(dir, address, token string) (*cluster, error) {
	pem, err := os.ReadFile(filepath.Join(dir, gatekeeper.BundleFile)) //nolint:gosec // what gatekeeper wrote in our own directory
	if err != nil {
		return nil, fmt.Errorf("read gatekeeper's authority: %w", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return nil, errors.New("gatekeeper's authority is no certificate")
	}
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}, DisableKeepAlives: true}
	return &cluster{url: "https://" + address + "/validate", token: token, client: &http.Client{Transport: transport, Timeout: 10 * time.Second}}, nil
}

// create asks whether a Pod with one image may be created.
func (c *cluster) create(ctx context.Context, ref registry.Ref) (admission, error) {
	review := map[string]any{
		"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview",
		"request": map[string]any{
			"uid": "demo", "operation": "CREATE", "namespace": "demo", "name": "demo",
			"kind":     map[string]any{"group": "", "version": "v1", "kind": "Pod"},
			"resource": map[string]any{"group": "", "version": "v1", "resource": "pods"},
			"object": map[string]any{
				"apiVersion": "v1", "kind": "Pod", "metadata": map[string]any{"name": "demo", "namespace": "demo"},
				"spec": map[string]any{"containers": []any{map[string]any{"name": "app", "image": ref.Registry + "/" + ref.Repository + "@" + ref.Digest}}},
			},
		},
	}
	body, err := json.Marshal(review)
	if err != nil {
		return admission{}, fmt.Errorf("encode review: %w", err)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, c.url, bytes.NewReader(body))
	if err != nil {
		return admission{}, fmt.Errorf("ask gatekeeper: %w", err)
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("Authorization", "Bearer "+c.token)
	resp, err := c.client.Do(req)
	if err != nil {
		return admission{}, fmt.Errorf("ask gatekeeper: %w", err)
	}
	var answer struct {
		Response admission `json:"response"`
	}
	if resp.StatusCode != http.StatusOK {
		return admission{}, errors.Join(fmt.Errorf("ask gatekeeper: %s", resp.Status), resp.Body.Close())
	}
	return answer.Response, decode(resp.Body, &answer)
}

// pod asks for a Pod with an image, tells the answer and checks it.
func (d *demo) pod(ctx context.Context, c *cluster, ref registry.Ref, want bool) error {
	a, err := c.create(ctx, ref)
	if err != nil {
		return err
	}
	d.n.admitted(ref, a)
	if a.Allowed != want {
		return fmt.Errorf("a Pod with %s: admitted %t, want %t: %s", ref.Repository, a.Allowed, want, a.Status.Message)
	}
	return nil
}

// newsPackage is what the demo's own advisory is about: a package that the
// mended image holds, and in which nothing was known to be wrong.
const newsPackage = "left-pad"

// news is the advisory that arrives while everything runs. It is made up, and
// says so.
const news = `{"id":"TIDEWAITER-DEMO-1","modified":"%s","summary":"Made up for the demo: left-pad pads on the wrong side",
"severity":[{"type":"CVSS_V3","score":"CVSS:3.1/AV:N/AC:L/PR:N/UI:N/S:U/C:H/I:H/A:H"}],
"affected":[{"package":{"ecosystem":"npm","name":"left-pad"},"ranges":[{"type":"SEMVER","events":[{"introduced":"0"},{"fixed":"1.3.1"}]}]}]}`

// sources returns what advisor watches: the advisories of the user's choice, or
// the built-in set, and a folder in which news arrives.
func (c *demoCmd) sources(dir string) (watched []string, newsDir string, err error) {
	newsDir = filepath.Join(dir, "news")
	if err := os.MkdirAll(newsDir, 0o700); err != nil {
		return nil, "", fmt.Errorf("make folder for news: %w", err)
	}
	base := c.Advisories
	if base == "" {
		base = filepath.Join(dir, "advisories")
		if err := builtin.Unpack(base); err != nil {
			return nil, "", fmt.Errorf("unpack the built-in advisories: %w", err)
		}
	}
	return []string{base, newsDir}, newsDir, publish(newsDir, nothingNew)
}

// nothingNew is what the folder of news holds until then: an archive cannot be empty.
const nothingNew = `{"id":"TIDEWAITER-DEMO-0","modified":"%s","summary":"Made up for the demo",
"affected":[{"package":{"ecosystem":"npm","name":"tidewaiter-demo-of-nothing"},"ranges":[{"type":"SEMVER","events":[{"introduced":"0"}]}]}]}`

// publish puts a record where advisor finds it.
func publish(newsDir, record string) error {
	body := fmt.Sprintf(record, time.Now().UTC().Format(time.RFC3339))
	archive, err := sample.Zip([]sample.File{{Path: "record.json", Body: []byte(body)}})
	if err != nil {
		return err
	}
	name := filepath.Join(newsDir, "npm.zip")
	if err := os.WriteFile(name+".new", archive, 0o600); err != nil {
		return fmt.Errorf("write news: %w", err)
	}
	if err := os.Rename(name+".new", name); err != nil {
		return fmt.Errorf("write news: %w", err)
	}
	return nil
}
