package statement

import (
	"context"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"

	"github.com/sigstore/cosign/v2/pkg/cosign"
	"github.com/sigstore/sigstore-go/pkg/bundle"
	"github.com/sigstore/sigstore-go/pkg/root"
	"github.com/sigstore/sigstore-go/pkg/verify"

	"github.com/tidewaiter/tidewaiter/contracts"
)

// Verify checks that a sigstore bundle (JSON, at most MaxBundle bytes) holds a
// statement about the image with the given digest, signed with one of the
// keys, and returns it. Its age and verdict are the caller's to judge. Errors:
// ErrMalformed, ErrTooLarge, ErrForeignKey, ErrBadSignature, ErrOtherDigest.
func Verify(ctx context.Context, bundleJSON []byte, digest string, keys []Verifier) (Statement, error) {
	if len(bundleJSON) > MaxBundle {
		return Statement{}, fmt.Errorf("bundle of %d bytes: %w", len(bundleJSON), ErrTooLarge)
	}
	if !contracts.ValidDigest(digest) {
		return Statement{}, fmt.Errorf("digest %q: %w", digest, contracts.ErrInvalidImage)
	}
	var b bundle.Bundle
	if err := b.UnmarshalJSON(bundleJSON); err != nil {
		return Statement{}, fmt.Errorf("read bundle: %w: %w", ErrMalformed, err)
	}
	dsse := b.GetDsseEnvelope()
	if dsse == nil || dsse.GetPayloadType() != payloadType {
		return Statement{}, fmt.Errorf("bundle holds no in-toto statement: %w", ErrMalformed)
	}
	signer, err := verifySigned(ctx, &b, digest, keys)
	if err != nil {
		return Statement{}, err
	}
	s, err := parse(dsse.GetPayload())
	if err != nil {
		return Statement{}, err
	}
	s.Subject, s.Signer = digest, signer
	return s, nil
}

// verifySigned has cosign verify signature and subject, and returns the id of
// the key that signed.
func verifySigned(ctx context.Context, b *bundle.Bundle, digest string, keys []Verifier) (string, error) {
	sum, err := hex.DecodeString(strings.TrimPrefix(digest, "sha256:"))
	if err != nil {
		return "", fmt.Errorf("digest %q: %w", digest, contracts.ErrInvalidImage)
	}
	named := b.GetVerificationMaterial().GetPublicKey().GetHint()
	known := false
	var last error
	for _, key := range keys {
		known = known || named == hint(key.id)
		err := cosignVerify(ctx, b, verify.WithArtifactDigest("sha256", sum), key)
		if err == nil {
			return key.id, nil
		}
		// The same without the subject tells a statement about another image
		// from one that is not genuine.
		if cosignVerify(ctx, b, verify.WithoutArtifactUnsafe(), key) == nil {
			return "", fmt.Errorf("%w: %w", ErrOtherDigest, err)
		}
		last = err
	}
	switch {
	case last == nil:
		return "", errors.New("no key to verify with")
	case known:
		return "", fmt.Errorf("%w: %w", ErrBadSignature, last)
	default:
		return "", fmt.Errorf("%w: %w", ErrForeignKey, last)
	}
}

func cosignVerify(ctx context.Context, b *bundle.Bundle, artifact verify.ArtifactPolicyOption, key Verifier) error {
	_, err := cosign.VerifyNewBundle(ctx, CheckOpts(key), artifact, b)
	return err
}

// CheckOpts returns the options with which cosign verifies statements made with
// a key, without any network access of its own.
func CheckOpts(key Verifier) *cosign.CheckOpts {
	return &cosign.CheckOpts{
		SigVerifier:     key.verifier,
		TrustedMaterial: &root.BaseTrustedMaterial{}, // statements signed with a key need no certificates
		ClaimVerifier:   cosign.IntotoSubjectClaimVerifier,
		IgnoreTlog:      true,
		Offline:         true,
		NewBundleFormat: true,
	}
}

// hint is how cosign names a key in a bundle.
func hint(keyID string) string {
	raw, err := hex.DecodeString(keyID)
	if err != nil {
		return ""
	}
	return base64.StdEncoding.EncodeToString(raw)
}
