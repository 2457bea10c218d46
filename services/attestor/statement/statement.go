// Package statement makes and verifies what Tidewaiter says about images: an
// in-toto statement in a DSSE envelope in a sigstore bundle, signed with a
// key. Everything that links sigstore code for keys, signatures and bundles is
// in this package, so that a newer sigstore is a change of this package alone.
package statement

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/tidewaiter/tidewaiter/contracts"
)

// Limits.
const (
	MaxPredicate = 64 << 10 // bytes of a predicate that is signed
	MaxBundle    = 1 << 20  // bytes of a bundle that is read
	MaxBundles   = 50       // bundles of one image that are looked at
	MaxTop       = 20       // findings and reasons in a signed summary
)

// statementType is the _type of an in-toto statement
// (in-toto/attestation, spec/v1/statement.md).
const statementType = "https://in-toto.io/Statement/v1"

// payloadType is the DSSE payload type of an in-toto statement
// (in-toto/attestation, spec/v1/envelope.md).
const payloadType = "application/vnd.in-toto+json"

// Reasons why an image is not verified. All but ErrVerdict mean that there is
// nothing to rely on; ErrVerdict means that what is relied on says no.
var (
	ErrNoStatement   = errors.New("no statement is attached")
	ErrMalformed     = errors.New("not a statement that can be read")
	ErrForeignKey    = errors.New("signed with another key")
	ErrBadSignature  = errors.New("the signature does not hold")
	ErrOtherDigest   = errors.New("made for another image")
	ErrOtherPolicy   = errors.New("made under another policy")
	ErrExpired       = errors.New("no longer valid")
	ErrTooOld        = errors.New("older than allowed")
	ErrSnapshotOld   = errors.New("advisories older than allowed")
	ErrSuperseded    = errors.New("older than a statement that was seen before")
	ErrVerdict       = errors.New("refused by policy")
	ErrTooLarge      = errors.New("larger than allowed")
	ErrNoVerdictData = errors.New("a statement without a verdict")
)

// NotVerifiable says whether err, returned by VerifyImage or Verify, means that
// there is no statement to rely on (as opposed to a verdict that says no, or to
// trouble with the registry).
func NotVerifiable(err error) bool {
	for _, kind := range []error{
		ErrNoStatement, ErrMalformed, ErrForeignKey, ErrBadSignature, ErrOtherDigest,
		ErrOtherPolicy, ErrExpired, ErrTooOld, ErrSnapshotOld, ErrSuperseded, ErrTooLarge, ErrNoVerdictData,
	} {
		if errors.Is(err, kind) {
			return true
		}
	}
	return false
}

// Statement is a statement whose signature and subject were verified.
type Statement struct {
	PredicateType string
	Subject       string // digest, as asked for
	Signer        string // sha256 of the signer's public key (DER), hex

	// What follows is set for predicates that carry a verdict of ours.
	HasVerdict   bool
	Verdict      string
	Counts       contracts.Counts
	Snapshot     contracts.SnapshotRef
	SnapshotTime time.Time // newest modification among the advisories; zero: unknown
	Policy       string    // digest
	Report       string    // digest
	Time         time.Time // when the verdict was reached
	ValidUntil   time.Time
}

// envelope is an in-toto statement. Its fields are written in this order, so
// that the same facts are signed as the same bytes.
type envelope[P any] struct {
	Type          string    `json:"_type"`
	Subject       []subject `json:"subject"`
	PredicateType string    `json:"predicateType"`
	Predicate     P         `json:"predicate"`
}

type subject struct {
	Name   string            `json:"name"`
	Digest map[string]string `json:"digest"`
}

// payload returns the bytes to sign.
func payload(subjectName, digest, predicateType string, predicate any) ([]byte, error) {
	if !contracts.ValidDigest(digest) {
		return nil, fmt.Errorf("subject digest %q: %w", digest, contracts.ErrInvalidImage)
	}
	body, err := json.Marshal(predicate)
	if err != nil {
		return nil, fmt.Errorf("encode predicate %s: %w", predicateType, err)
	}
	if len(body) > MaxPredicate {
		return nil, fmt.Errorf("predicate %s has %d bytes, at most %d: %w", predicateType, len(body), MaxPredicate, ErrTooLarge)
	}
	out, err := json.Marshal(envelope[json.RawMessage]{
		Type:          statementType,
		Subject:       []subject{{Name: subjectName, Digest: map[string]string{"sha256": strings.TrimPrefix(digest, "sha256:")}}},
		PredicateType: predicateType,
		Predicate:     body,
	})
	if err != nil {
		return nil, fmt.Errorf("encode statement: %w", err)
	}
	return out, nil
}

// parse reads a verified payload. What it returns has no Subject and no Signer.
func parse(payload []byte) (Statement, error) {
	var e envelope[json.RawMessage]
	if err := json.Unmarshal(payload, &e); err != nil {
		return Statement{}, fmt.Errorf("decode statement: %w: %w", ErrMalformed, err)
	}
	if e.Type != statementType {
		return Statement{}, fmt.Errorf("statement type %q: %w", e.Type, ErrMalformed)
	}
	s := Statement{PredicateType: e.PredicateType}
	switch e.PredicateType {
	case contracts.PredicateVSA:
		return s.withVSA(e.Predicate)
	case contracts.PredicateVuln:
		return s.withVuln(e.Predicate)
	default:
		return s, nil
	}
}

func (s Statement) withVSA(predicate []byte) (Statement, error) {
	var p contracts.VSAPredicate
	if err := json.Unmarshal(predicate, &p); err != nil {
		return s, fmt.Errorf("decode verification summary: %w: %w", ErrMalformed, err)
	}
	if p.Verifier.ID != contracts.VerifierID {
		return s, nil // somebody else's summary, signed with the same key: no verdict of ours
	}
	t := p.Tidewaiter
	s.Verdict, s.Counts, s.Snapshot, s.SnapshotTime = t.Verdict, t.Counts, t.Snapshot, t.SnapshotTime
	s.Report, s.ValidUntil, s.Time = t.Report, t.ValidUntil, p.TimeVerified
	if hex := p.Policy.Digest["sha256"]; hex != "" {
		s.Policy = "sha256:" + hex
	}
	if passed := p.VerificationResult == resultPassed; passed != (s.Verdict != contracts.VerdictFail) {
		return s, fmt.Errorf("verdict %q with verification result %q: %w", s.Verdict, p.VerificationResult, ErrMalformed)
	}
	return s.checked()
}

func (s Statement) withVuln(predicate []byte) (Statement, error) {
	var p contracts.VulnPredicate
	if err := json.Unmarshal(predicate, &p); err != nil {
		return s, fmt.Errorf("decode vulnerability scan: %w: %w", ErrMalformed, err)
	}
	if p.Scanner.URI != scannerURI {
		return s, nil // another scanner's result, signed with the same key
	}
	r := p.Scanner.Result
	s.Verdict, s.Counts, s.Snapshot, s.SnapshotTime = r.Verdict, r.Counts, r.Snapshot, r.SnapshotTime
	s.Report, s.Policy, s.ValidUntil, s.Time = r.Report, r.Policy, r.ValidUntil, p.Metadata.ScanFinishedOn
	return s.checked()
}

func (s Statement) checked() (Statement, error) {
	switch s.Verdict {
	case contracts.VerdictPass, contracts.VerdictWarn, contracts.VerdictFail:
	default:
		return s, fmt.Errorf("verdict %q: %w", s.Verdict, ErrMalformed)
	}
	if s.ValidUntil.IsZero() || s.Time.IsZero() {
		return s, fmt.Errorf("verdict without times: %w", ErrMalformed)
	}
	s.HasVerdict = true
	return s, nil
}

// newer says whether s is to be believed rather than o: a higher sequence, then
// a later time, then the verification summary, which alone is renewed when only
// time has passed.
func (s Statement) newer(o Statement) bool {
	if s.Snapshot.Sequence != o.Snapshot.Sequence {
		return s.Snapshot.Sequence > o.Snapshot.Sequence
	}
	if !s.Time.Equal(o.Time) {
		return s.Time.After(o.Time)
	}
	return s.PredicateType == contracts.PredicateVSA && o.PredicateType != contracts.PredicateVSA
}
