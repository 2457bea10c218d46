package artefact

import (
	"crypto/ed25519"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
)

// ErrKey is returned for a file that holds no Ed25519 key.
var ErrKey = errors.New("not an Ed25519 key in PEM")

// GenerateKey makes a key to sign snapshots with: PEM of PKCS #8 and of its
// public half (RFC 8410).
func GenerateKey() (private, public []byte, err error) {
	pub, priv, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, nil, fmt.Errorf("generate key: %w", err)
	}
	privateDER, err := x509.MarshalPKCS8PrivateKey(priv)
	if err != nil {
		return nil, nil, fmt.Errorf("encode key: %w", err)
	}
	publicDER, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		return nil, nil, fmt.Errorf("encode key: %w", err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: privateDER}),
		pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: publicDER}), nil
}

// LoadKey reads the private key in a PEM file.
func LoadKey(file string) (ed25519.PrivateKey, error) {
	content, err := os.ReadFile(file) //nolint:gosec // the operator names the file
	if err != nil {
		return nil, fmt.Errorf("read signing key: %w", err)
	}
	block, _ := pem.Decode(content)
	if block == nil {
		return nil, fmt.Errorf("%s: %w", file, ErrKey)
	}
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", file, ErrKey) // the parser's error is left out: it speaks of the content
	}
	private, ok := key.(ed25519.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("%s: %w", file, ErrKey)
	}
	return private, nil
}

// LoadPublicKeys reads every public key in a PEM file, at least one: while keys
// are changed, both the old and the new one are in it.
func LoadPublicKeys(file string) ([]ed25519.PublicKey, error) {
	content, err := os.ReadFile(file) //nolint:gosec // the operator names the file
	if err != nil {
		return nil, fmt.Errorf("read public keys: %w", err)
	}
	var keys []ed25519.PublicKey
	for {
		var block *pem.Block
		if block, content = pem.Decode(content); block == nil {
			break
		}
		key, err := x509.ParsePKIXPublicKey(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("%s: %w: %w", file, err, ErrKey)
		}
		public, ok := key.(ed25519.PublicKey)
		if !ok {
			return nil, fmt.Errorf("%s: %w", file, ErrKey)
		}
		keys = append(keys, public)
	}
	if len(keys) == 0 {
		return nil, fmt.Errorf("%s: %w", file, ErrKey)
	}
	return keys, nil
}
