// Package credentialtest makes certificate authorities and certificates for tests.
package credentialtest

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/tidewaiter/tidewaiter/libs/credential"
)

// Authority is a certificate authority with a directory of its own.
type Authority struct {
	Dir    string
	CAFile string

	certificate *x509.Certificate
	key         *ecdsa.PrivateKey
}

// New returns an authority whose files lie in a new directory.
func New(t testing.TB) *Authority {
	t.Helper()
	a := &Authority{Dir: t.TempDir(), key: newKey(t)}
	template := template("test authority", time.Now().Add(time.Hour))
	template.IsCA, template.KeyUsage = true, x509.KeyUsageCertSign|x509.KeyUsageDigitalSignature
	der, err := x509.CreateCertificate(rand.Reader, template, template, &a.key.PublicKey, a.key)
	if err != nil {
		t.Fatal(err)
	}
	if a.certificate, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	a.CAFile = filepath.Join(a.Dir, "ca.pem")
	Write(t, a.CAFile, "CERTIFICATE", der)
	return a
}

// Pool returns the authority as a pool.
func (a *Authority) Pool() *x509.CertPool {
	pool := x509.NewCertPool()
	pool.AddCert(a.certificate)
	return pool
}

// Issue writes NAME.pem and NAME.key for a certificate of that common name, for
// clients and for servers on 127.0.0.1, valid for the given time from now (an
// hour where that is 0), over what was there.
func (a *Authority) Issue(t testing.TB, name string, valid time.Duration) (certFile, keyFile string) {
	t.Helper()
	if valid == 0 {
		valid = time.Hour
	}
	key := newKey(t)
	template := template(name, time.Now().Add(valid))
	template.IPAddresses = []net.IP{net.IPv4(127, 0, 0, 1), net.IPv6loopback}
	template.DNSNames = []string{"localhost"}
	template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth}
	der, err := x509.CreateCertificate(rand.Reader, template, a.certificate, &key.PublicKey, a.key)
	if err != nil {
		t.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	certFile, keyFile = filepath.Join(a.Dir, name+".pem"), filepath.Join(a.Dir, name+".key")
	Write(t, certFile, "CERTIFICATE", der)
	Write(t, keyFile, "PRIVATE KEY", private)
	return certFile, keyFile
}

// Server returns the TLS configuration of a server of this authority that asks
// clients for certificates of the same.
func (a *Authority) Server(t testing.TB) *tls.Config {
	t.Helper()
	certFile, keyFile := a.Issue(t, "server", 0)
	pair, err := tls.LoadX509KeyPair(certFile, keyFile)
	if err != nil {
		t.Fatal(err)
	}
	return &tls.Config{
		MinVersion: tls.VersionTLS12, Certificates: []tls.Certificate{pair},
		ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: a.Pool(),
	}
}

// Client returns the files of a client with a certificate of that name.
func (a *Authority) Client(t testing.TB, name string) credential.TLS {
	t.Helper()
	certFile, keyFile := a.Issue(t, name, 0)
	return credential.TLS{CAFile: a.CAFile, CertFile: certFile, KeyFile: keyFile}
}

// Write writes one PEM block to a file that only its owner can read.
func Write(t testing.TB, name, kind string, der []byte) {
	t.Helper()
	if err := os.WriteFile(name, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
}

func template(name string, notAfter time.Time) *x509.Certificate {
	serial, _ := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 100)) // fails only without randomness
	return &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: name},
		NotBefore: time.Now().Add(-48 * time.Hour), NotAfter: notAfter, BasicConstraintsValid: true,
	}
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}
