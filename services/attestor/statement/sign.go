package statement

import (
	"bytes"
	"context"
	"fmt"

	"github.com/sigstore/cosign/v2/pkg/cosign/bundle"
	"github.com/sigstore/sigstore/pkg/signature/dsse"
	"github.com/sigstore/sigstore/pkg/signature/options"
)

// SignBundle says predicate about the image subjectName with the given digest:
// an in-toto Statement v1, signed as a DSSE envelope, in a sigstore bundle v0.3
// (JSON). Signatures are not deterministic: what was signed once is kept, not
// signed again.
func SignBundle(ctx context.Context, s *Signer, subjectName, digest, predicateType string, predicate any) ([]byte, error) {
	body, err := payload(subjectName, digest, predicateType, predicate)
	if err != nil {
		return nil, err
	}
	signed, err := dsse.WrapSigner(s.signer, payloadType).SignMessage(bytes.NewReader(body), options.WithContext(ctx))
	if err != nil {
		return nil, fmt.Errorf("sign %s: %w", predicateType, err)
	}
	out, err := bundle.MakeNewBundle(s.public, nil, body, signed, nil, nil)
	if err != nil {
		return nil, fmt.Errorf("bundle %s: %w", predicateType, err)
	}
	return out, nil
}

// BundleAnnotations returns the annotations that sigstore's readers expect on
// the referrer that carries a bundle (cosign, specs/BUNDLE_SPEC.md).
func BundleAnnotations(predicateType string) map[string]string {
	return map[string]string{
		"dev.sigstore.bundle.content":       "dsse-envelope",
		"dev.sigstore.bundle.predicateType": predicateType,
	}
}
