package gatekeeper

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"
)

// Lives of the own certificates. The API server trusts the bundle of
// authorities that its webhook configuration holds: a new authority stands in
// the bundle for most of a year before it signs, so that there is time to
// configure it.
const (
	authorityLife    = 10 * 365 * 24 * time.Hour
	authorityNext    = 365 * 24 * time.Hour // before the end, the next one is made
	authorityRetires = 60 * 24 * time.Hour  // before the end, the next one signs
	servingLife      = 60 * 24 * time.Hour
	servingRenew     = 30 * 24 * time.Hour // before the end
	backdate         = time.Hour           // clocks differ
	renewalEvery     = time.Minute         // how often it is looked whether something is due
)

// BundleFile is the file in TLS.Dir that holds the authorities for the
// webhook configuration's caBundle, PEM.
const BundleFile = "ca-bundle.crt"

const (
	authorityPattern = "authority-*.pem" // certificate and key
	servingFile      = "serving.pem"
	pemCertificate   = "CERTIFICATE"
	pemKey           = "PRIVATE KEY"
)

// ownCertificate makes and renews a certificate and the authority that signs
// it, kept in a directory that several replicas may share.
type ownCertificate struct {
	dir   string
	names []string
	log   *slog.Logger
	now   func() time.Time

	mu      sync.Mutex
	serving *tls.Certificate
	bundle  []byte
}

// newOwnCertificate reads what the directory holds and makes what is missing.
func newOwnCertificate(dir string, names []string, log *slog.Logger, now func() time.Time) (*ownCertificate, error) {
	o := &ownCertificate{dir: dir, names: names, log: log, now: now}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make certificate directory: %w", err)
	}
	if err := o.renew(); err != nil {
		return nil, err
	}
	return o, nil
}

// current returns the certificate to serve with.
func (o *ownCertificate) current() *tls.Certificate {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.serving
}

// run renews until ctx ends. What cannot be renewed now is tried again.
func (o *ownCertificate) run(ctx context.Context) {
	tick := time.NewTicker(renewalEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			if err := o.renew(); err != nil {
				o.log.ErrorContext(ctx, "certificate cannot be renewed", slog.Any("error", err))
			}
		}
	}
}

// pair is a certificate and its key.
type pair struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pem  []byte // both
}

// renew makes what is missing or due, and takes over what another replica made.
func (o *ownCertificate) renew() error {
	authorities, err := o.authorities()
	if err != nil {
		return err
	}
	now := o.now()
	if len(authorities) == 0 || now.Add(authorityNext).After(authorities[len(authorities)-1].cert.NotAfter) {
		if err := o.makeAuthority(len(authorities)); err != nil {
			return err
		}
		if authorities, err = o.authorities(); err != nil {
			return err
		}
	}
	// The oldest signs as long as it can: everybody trusts it already.
	signer := authorities[len(authorities)-1]
	var bundle []byte
	for _, a := range slices.Backward(authorities) {
		bundle = append(bundle, pem.EncodeToMemory(&pem.Block{Type: pemCertificate, Bytes: a.cert.Raw})...)
		if now.Add(authorityRetires).Before(a.cert.NotAfter) {
			signer = a
		}
	}
	serving, err := o.readServing(signer)
	if err != nil {
		return err
	}
	if serving == nil {
		if serving, err = o.makeServing(signer); err != nil {
			return err
		}
	}
	return o.use(serving, bundle)
}

// use serves with p from now on, and writes the bundle where it has changed.
func (o *ownCertificate) use(p *pair, bundle []byte) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	if !bytes.Equal(bundle, o.bundle) {
		path := filepath.Join(o.dir, BundleFile)
		if err := replace(path, bundle, 0o644); err != nil {
			return err
		}
		o.bundle = bundle
		o.log.InfoContext(context.Background(), "authorities for the webhook configuration's caBundle", slog.String("file", path))
	}
	o.serving = &tls.Certificate{Certificate: [][]byte{p.cert.Raw}, PrivateKey: p.key, Leaf: p.cert}
	return nil
}

// authorities returns those that still count, the first to end first.
func (o *ownCertificate) authorities() ([]*pair, error) {
	paths, err := filepath.Glob(filepath.Join(o.dir, authorityPattern))
	if err != nil {
		return nil, fmt.Errorf("list authorities: %w", err)
	}
	var out []*pair
	for _, path := range paths {
		p, err := readPair(path)
		if err != nil {
			return nil, err
		}
		if o.now().Before(p.cert.NotAfter) {
			out = append(out, p)
		}
	}
	slices.SortFunc(out, func(a, b *pair) int { return a.cert.NotAfter.Compare(b.cert.NotAfter) })
	return out, nil
}

// makeAuthority makes the next authority. Of several replicas that do so at
// once one wins, and the others use what it made.
func (o *ownCertificate) makeAuthority(have int) error {
	now := o.now()
	p, err := newPair(&x509.Certificate{
		Subject:               pkix.Name{CommonName: "Tidewaiter gatekeeper authority " + now.UTC().Format("2006-01-02")},
		NotBefore:             now.Add(-backdate),
		NotAfter:              now.Add(authorityLife),
		IsCA:                  true,
		BasicConstraintsValid: true,
		MaxPathLenZero:        true,
		KeyUsage:              x509.KeyUsageCertSign,
	}, nil)
	if err != nil {
		return err
	}
	// The year in the name: the files of one generation have the same name.
	name := fmt.Sprintf("authority-%s-%d.pem", now.UTC().Format("2006"), have)
	temporary, err := writeTemporary(o.dir, p.pem, 0o600)
	if err != nil {
		return err
	}
	defer os.Remove(temporary) //nolint:errcheck // a left-over file does no harm
	if err := os.Link(temporary, filepath.Join(o.dir, name)); err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("keep authority: %w", err)
	}
	return nil
}

// readServing returns the kept certificate, or nil when a new one is due.
func (o *ownCertificate) readServing(signer *pair) (*pair, error) {
	p, err := readPair(filepath.Join(o.dir, servingFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil //nolint:nilnil // nothing is kept yet: it is due
	}
	if err != nil {
		return nil, err
	}
	if o.now().Add(servingRenew).After(p.cert.NotAfter) || p.cert.CheckSignatureFrom(signer.cert) != nil {
		return nil, nil //nolint:nilnil // as above
	}
	for _, name := range o.names {
		if p.cert.VerifyHostname(name) != nil {
			return nil, nil //nolint:nilnil // as above
		}
	}
	return p, nil
}

func (o *ownCertificate) makeServing(signer *pair) (*pair, error) {
	now := o.now()
	template := &x509.Certificate{
		Subject:     pkix.Name{CommonName: "Tidewaiter gatekeeper"},
		NotBefore:   now.Add(-backdate),
		NotAfter:    now.Add(servingLife),
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	for _, name := range o.names {
		if ip := net.ParseIP(name); ip != nil {
			template.IPAddresses = append(template.IPAddresses, ip)
		} else {
			template.DNSNames = append(template.DNSNames, name)
		}
	}
	p, err := newPair(template, signer)
	if err != nil {
		return nil, err
	}
	return p, replace(filepath.Join(o.dir, servingFile), p.pem, 0o600)
}

// newPair makes a key and a certificate for it, signed by signer, or by itself
// where that is nil.
func newPair(template *x509.Certificate, signer *pair) (*pair, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("generate key: %w", err)
	}
	if template.SerialNumber, err = rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120)); err != nil {
		return nil, fmt.Errorf("choose serial number: %w", err)
	}
	if signer == nil {
		signer = &pair{cert: template, key: key}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, signer.cert, &key.PublicKey, signer.key)
	if err != nil {
		return nil, fmt.Errorf("make certificate: %w", err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("read certificate: %w", err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, fmt.Errorf("encode key: %w", err)
	}
	text := append(pem.EncodeToMemory(&pem.Block{Type: pemCertificate, Bytes: der}),
		pem.EncodeToMemory(&pem.Block{Type: pemKey, Bytes: keyDER})...)
	return &pair{cert: cert, key: key, pem: text}, nil
}

func readPair(path string) (*pair, error) {
	text, err := os.ReadFile(path) //nolint:gosec // in the directory that the configuration names
	if err != nil {
		return nil, fmt.Errorf("read certificate: %w", err)
	}
	loaded, err := tls.X509KeyPair(text, text)
	if err != nil {
		return nil, fmt.Errorf("certificate and key in %s: %w", path, err)
	}
	key, ok := loaded.PrivateKey.(*ecdsa.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("key in %s is not ECDSA", path)
	}
	return &pair{cert: loaded.Leaf, key: key, pem: text}, nil
}

// replace puts content in a file's place at once.
func replace(path string, content []byte, mode fs.FileMode) error {
	temporary, err := writeTemporary(filepath.Dir(path), content, mode)
	if err != nil {
		return err
	}
	if err := os.Rename(temporary, path); err != nil {
		return fmt.Errorf("keep %s: %w", path, err)
	}
	return nil
}

func writeTemporary(dir string, content []byte, mode fs.FileMode) (path string, err error) {
	f, err := os.CreateTemp(dir, ".new-*")
	if err != nil {
		return "", fmt.Errorf("make file: %w", err)
	}
	_, err = f.Write(content)
	if err := errors.Join(err, f.Chmod(mode), f.Close()); err != nil {
		return "", fmt.Errorf("write %s: %w", f.Name(), err)
	}
	return f.Name(), nil
}

// serverTLS returns the TLS configuration of the webhook. certificate is asked
// at every handshake, and so are the client authorities.
func serverTLS(certificate func() *tls.Certificate, c *caller) *tls.Config {
	base := &tls.Config{
		MinVersion: tls.VersionTLS12,
		NextProtos: []string{"h2", "http/1.1"},
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			return certificate(), nil
		},
	}
	if c.cas == nil {
		return base
	}
	base.ClientAuth = tls.RequireAndVerifyClientCert
	base.GetConfigForClient = func(*tls.ClientHelloInfo) (*tls.Config, error) {
		own := base.Clone()
		own.GetConfigForClient = nil
		own.ClientCAs = c.cas.get()
		return own, nil
	}
	return base
}

func parseKeyPair(contents [][]byte) (*tls.Certificate, error) {
	p, err := tls.X509KeyPair(contents[0], contents[1])
	if err != nil {
		return nil, fmt.Errorf("webhook certificate: %w", err)
	}
	return &p, nil
}
