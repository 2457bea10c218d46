package registry

import (
	"crypto/tls"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"sync"
	"testing"

	"github.com/tidewaiter/tidewaiter/libs/credential/credentialtest"
)

// A registry that asks for a certificate is shown one, that of the files as
// they are at the moment; where it redirects to is not.
func TestTheCertificateIsForTheRegistryAlone(t *testing.T) {
	authority := credentialtest.New(t)
	var mu sync.Mutex
	var registryWas, storageWas []string
	note := func(into *[]string, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		name := "nobody"
		if len(r.TLS.PeerCertificates) > 0 {
			name = r.TLS.PeerCertificates[0].Subject.CommonName
		}
		*into = append(*into, name)
	}
	content := "the content of a blob"
	start := func(handler http.HandlerFunc, config func(*httptest.Server)) *httptest.Server {
		s := httptest.NewUnstartedServer(handler)
		s.TLS = authority.Server(t)
		config(s)
		s.StartTLS()
		t.Cleanup(s.Close)
		return s
	}
	storage := start(func(w http.ResponseWriter, r *http.Request) {
		note(&storageWas, r)
		_, _ = io.WriteString(w, content)
	}, func(s *httptest.Server) { s.TLS.ClientAuth = tls.RequestClientCert })
	server := start(func(w http.ResponseWriter, r *http.Request) {
		note(&registryWas, r)
		if strings.Contains(r.URL.Path, "/blobs/") {
			http.Redirect(w, r, storage.URL+"/bucket", http.StatusTemporaryRedirect)
			return
		}
		manifestAnswer(w, r)
	}, func(*httptest.Server) {})

	files := authority.Client(t, "planner")
	cfg := Host{
		Name: strings.TrimPrefix(server.URL, "https://"), AllowPrivate: true,
		CAFile: files.CAFile, CertFile: files.CertFile, KeyFile: files.KeyFile,
	}
	c := newClient(t, cfg)
	ref := Ref{Registry: cfg.Name, Repository: "a/b", Tag: "v"}
	if _, err := c.Resolve(t.Context(), ref); err != nil {
		t.Fatal(err)
	}
	got, err := c.ReadBlob(t.Context(), cfg.Name, "a/b", descriptorOf("application/octet-stream", []byte(content)), 1<<10)
	if err != nil || string(got) != content {
		t.Errorf("blob: %q, %v", got, err)
	}

	// The next connection shows the certificate that is there by then.
	certFile, keyFile := authority.Issue(t, "planner-2", 0)
	for from, to := range map[string]string{certFile: files.CertFile, keyFile: files.KeyFile} {
		if err := os.Rename(from, to); err != nil {
			t.Fatal(err)
		}
	}
	server.CloseClientConnections()
	if _, err := c.Resolve(t.Context(), ref); err != nil {
		t.Fatal(err)
	}
	mu.Lock()
	defer mu.Unlock()
	if first, last := registryWas[0], registryWas[len(registryWas)-1]; first != "planner" || last != "planner-2" {
		t.Errorf("the registry was shown %v", registryWas)
	}
	if strings.Join(storageWas, " ") != "nobody" {
		t.Errorf("where it redirects to was shown %v", storageWas)
	}

	cfg.CertFile, cfg.KeyFile = "", ""
	stranger := newClient(t, cfg)
	if _, err := stranger.Resolve(t.Context(), ref); err == nil {
		t.Error("a client without a certificate was let in")
	}
	cfg.CertFile = files.CertFile
	if _, err := New([]Host{cfg}, discard()); err == nil || !strings.Contains(err.Error(), "go together") {
		t.Errorf("half a pair: %v", err)
	}
}
