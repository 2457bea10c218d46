package statement

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"

	"github.com/sigstore/cosign/v2/pkg/cosign"
	"github.com/sigstore/sigstore/pkg/cryptoutils"
	"github.com/sigstore/sigstore/pkg/cryptoutils/goodkey"
	"github.com/sigstore/sigstore/pkg/signature"
)

// ErrKey is returned for keys that cannot be used.
var ErrKey = errors.New("not a usable key")

// GenerateKey returns a new ECDSA P-256 key pair in PEM: the private key
// encrypted with password (scrypt, as cosign writes it) and the public key.
func GenerateKey(password []byte) (private, public []byte, err error) {
	keys, err := cosign.GenerateKeyPair(func(bool) ([]byte, error) { return password, nil })
	if err != nil {
		return nil, nil, fmt.Errorf("generate key: %w", err)
	}
	return keys.PrivateBytes, keys.PublicBytes, nil
}

// Signer signs statements. It is safe for use by many goroutines.
type Signer struct {
	signer signature.SignerVerifier
	public crypto.PublicKey
	id     string
	pem    []byte
}

// LoadSigner decrypts a private key that cosign or GenerateKey wrote (ECDSA,
// Ed25519 or RSA). It costs most of a second (scrypt): load once. Errors hold
// neither key nor password.
func LoadSigner(privatePEM, password []byte) (*Signer, error) {
	// Statements are signed as DSSE envelopes, for which cosign and sigstore-go
	// expect plain Ed25519; cosign's default for Ed25519 keys is the pre-hashed
	// kind, hence the empty options.
	sv, err := cosign.LoadPrivateKey(privatePEM, password, &[]signature.LoadOption{})
	if err != nil {
		return nil, fmt.Errorf("load private key (wrong password, or not an encrypted cosign or sigstore key in PEM): %w", ErrKey)
	}
	public, err := sv.PublicKey()
	if err != nil {
		return nil, fmt.Errorf("public part of private key: %w", err)
	}
	if err := checkKey(public); err != nil {
		return nil, err
	}
	id, err := keyID(public)
	if err != nil {
		return nil, err
	}
	publicPEM, err := cryptoutils.MarshalPublicKeyToPEM(public)
	if err != nil {
		return nil, fmt.Errorf("encode public key: %w", err)
	}
	return &Signer{signer: sv, public: public, id: id, pem: publicPEM}, nil
}

// ID returns the sha256 of the public key (DER, SubjectPublicKeyInfo), in hex.
func (s *Signer) ID() string { return s.id }

// PublicPEM returns the public key.
func (s *Signer) PublicPEM() []byte { return bytes.Clone(s.pem) }

// Verifier returns what verifies the signer's statements.
func (s *Signer) Verifier() Verifier { return Verifier{id: s.id, verifier: s.signer} }

// Verifier verifies statements made with one key.
type Verifier struct {
	id       string
	verifier signature.Verifier
}

// ID returns the sha256 of the public key (DER, SubjectPublicKeyInfo), in hex.
func (v Verifier) ID() string { return v.id }

// LoadVerifiers reads public keys in PEM (ECDSA, Ed25519, RSA); each argument
// may hold several blocks. At least one key must be there.
func LoadVerifiers(publicPEM ...[]byte) ([]Verifier, error) {
	var out []Verifier
	for _, rest := range publicPEM {
		for len(bytes.TrimSpace(rest)) > 0 {
			var block *pem.Block
			if block, rest = pem.Decode(rest); block == nil {
				return nil, fmt.Errorf("public key is not PEM: %w", ErrKey)
			}
			v, err := loadVerifier(pem.EncodeToMemory(block))
			if err != nil {
				return nil, err
			}
			out = append(out, v)
		}
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("no public key given: %w", ErrKey)
	}
	return out, nil
}

func loadVerifier(publicPEM []byte) (Verifier, error) {
	public, err := cryptoutils.UnmarshalPEMToPublicKey(publicPEM)
	if err != nil {
		return Verifier{}, fmt.Errorf("read public key: %w: %w", ErrKey, err)
	}
	if err := checkKey(public); err != nil {
		return Verifier{}, err
	}
	v, err := signature.LoadDefaultVerifier(public)
	if err != nil {
		return Verifier{}, fmt.Errorf("use public key: %w: %w", ErrKey, err)
	}
	id, err := keyID(public)
	if err != nil {
		return Verifier{}, err
	}
	return Verifier{id: id, verifier: v}, nil
}

// checkKey refuses kinds of key that are not supported and weak ones.
func checkKey(public crypto.PublicKey) error {
	switch public.(type) {
	case *ecdsa.PublicKey, ed25519.PublicKey, *rsa.PublicKey:
	default:
		return fmt.Errorf("key of type %T: %w", public, ErrKey)
	}
	if err := goodkey.ValidatePubKey(public); err != nil {
		return fmt.Errorf("weak key: %w: %w", ErrKey, err)
	}
	return nil
}

func keyID(public crypto.PublicKey) (string, error) {
	der, err := cryptoutils.MarshalPublicKeyToDER(public)
	if err != nil {
		return "", fmt.Errorf("encode public key: %w", err)
	}
	sum := sha256.Sum256(der)
	return hex.EncodeToString(sum[:]), nil
}
