package statement

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/registry"
)

// RegistryReader is what VerifyImage needs of a registry.
type RegistryReader interface {
	Resolve(ctx context.Context, ref registry.Ref) (ocispec.Descriptor, error)
	Referrers(ctx context.Context, ref registry.Ref, artifactType string) ([]ocispec.Descriptor, error)
	ArtifactContent(ctx context.Context, registry, repository, manifestDigest string, limit int64) (registry.Artifact, error)
}

// Options say what VerifyImage asks for.
type Options struct {
	Keys   []Verifier
	MaxAge time.Duration // of the verdict and of its advisories; 0: any, as long as it is valid
	Policy string        // digest of the policy that the verdict must have been reached under; "": any
	// Accept is the worst verdict that is accepted: VerdictPass, VerdictWarn
	// (the default) or VerdictFail, which asks for a genuine, fresh statement only.
	Accept string
	// Seen is the newest statement about the image that the caller remembers: an
	// older one is ErrSuperseded, also if nothing else is wrong with it.
	Seen Seen
	Now  time.Time // zero: the present
}

// VerifyImage looks for a good and fresh statement on an image. An index is
// verified by the statement about the index itself. The newest genuine
// statement decides (highest sequence, then latest time); others that are not
// genuine are listed and count for nothing.
//
// The Verification is filled in as far as known also when an error is returned:
// ErrVerdict, an error for which NotVerifiable holds, or trouble with the
// registry.
func VerifyImage(ctx context.Context, client RegistryReader, ref registry.Ref, o Options) (contracts.Verification, error) {
	v := contracts.Verification{Digest: ref.Digest, Statements: []contracts.VerifiedStatement{}}
	if o.Now.IsZero() {
		o.Now = time.Now()
	}
	if ref.Digest == "" {
		d, err := client.Resolve(ctx, ref)
		if err != nil {
			return v, fmt.Errorf("resolve %s/%s:%s: %w", ref.Registry, ref.Repository, ref.Tag, err)
		}
		ref.Digest = d.Digest.String()
		v.Digest = ref.Digest
	}
	bundles, err := Fetch(ctx, client, ref)
	if err != nil {
		return v, err
	}
	return verifyBundles(ctx, v, bundles, o)
}

// verifyBundles completes v with what bundles say about the image v.Digest.
func verifyBundles(ctx context.Context, v contracts.Verification, bundles []Bundle, o Options) (contracts.Verification, error) {
	found := readAll(ctx, v.Digest, bundles, o.Keys)
	v.Ignored = found.ignored
	for _, s := range found.good {
		v.Statements = append(v.Statements, s.contract())
	}
	_, err := judge(found, o)
	if err != nil {
		v.Reason = err.Error()
		return v, err
	}
	v.Verified = true
	return v, nil
}

// statements are what is attached to an image.
type statements struct {
	good    []genuine // newest first
	ignored []contracts.IgnoredStatement
	bad     []error // why the ignored ones are ignored
}

// genuine is a statement whose signature and subject were verified, and the
// bundle it was read from.
type genuine struct {
	Statement
	bundle Bundle
}

// readAll verifies bundles.
func readAll(ctx context.Context, digest string, bundles []Bundle, keys []Verifier) statements {
	var out statements
	for _, b := range bundles {
		if b.unreadable != nil {
			out.ignore(b.Digest, b.unreadable)
			continue
		}
		s, err := Verify(ctx, b.Content, digest, keys)
		if err != nil {
			out.ignore(b.Digest, err)
			continue
		}
		out.good = append(out.good, genuine{s, b})
	}
	slices.SortStableFunc(out.good, func(a, b genuine) int {
		switch {
		case a.newer(b.Statement):
			return -1
		case b.newer(a.Statement):
			return 1
		default:
			return 0
		}
	})
	return out
}

func (s *statements) ignore(digest string, why error) {
	s.bad = append(s.bad, why)
	s.ignored = append(s.ignored, contracts.IgnoredStatement{Digest: digest, Reason: why.Error()})
}

// likelyFirst puts what says that it is ours, and the newest of that, first:
// only MaxBundles are read, and anybody who can push can attach more than that.
// The order decides nothing else, as annotations are not signed.
func likelyFirst(list []ocispec.Descriptor) []ocispec.Descriptor {
	list = slices.Clone(list)
	ours := func(d ocispec.Descriptor) int {
		if _, ok := d.Annotations[contracts.AnnotationOwner]; ok {
			return 0
		}
		return 1
	}
	slices.SortStableFunc(list, func(a, b ocispec.Descriptor) int {
		return cmp.Or(
			cmp.Compare(ours(a), ours(b)),
			-cmp.Compare(a.Annotations[ocispec.AnnotationCreated], b.Annotations[ocispec.AnnotationCreated]),
		)
	})
	return list
}

// judge returns the statement that decides and nil, or why it is not enough.
func judge(found statements, o Options) (genuine, error) {
	i := slices.IndexFunc(found.good, func(s genuine) bool { return s.HasVerdict })
	if i < 0 {
		return genuine{}, noneGood(found)
	}
	return found.good[i], found.good[i].judge(o)
}

// judge returns nil, or why a statement that carries a verdict is not enough.
func (s Statement) judge(o Options) error {
	switch {
	case s.Seen().Before(o.Seen):
		return fmt.Errorf("the newest statement has sequence %d of %s, one with sequence %d of %s was seen: %w",
			s.Snapshot.Sequence, stamp(s.Time), o.Seen.Sequence, stamp(o.Seen.Time), ErrSuperseded)
	case !o.Now.Before(s.ValidUntil):
		return fmt.Errorf("the newest statement was valid until %s: %w", stamp(s.ValidUntil), ErrExpired)
	case o.MaxAge > 0 && o.Now.Sub(s.Time) > o.MaxAge:
		return fmt.Errorf("the newest statement is of %s, at most %s are allowed: %w", stamp(s.Time), o.MaxAge, ErrTooOld)
	case o.MaxAge > 0 && s.SnapshotTime.IsZero():
		return fmt.Errorf("how old the advisories of the newest statement are is unknown: %w", ErrSnapshotOld)
	case o.MaxAge > 0 && o.Now.Sub(s.SnapshotTime) > o.MaxAge:
		return fmt.Errorf("the newest statement relies on advisories of %s, at most %s are allowed: %w", stamp(s.SnapshotTime), o.MaxAge, ErrSnapshotOld)
	case o.Policy != "" && s.Policy != o.Policy:
		return fmt.Errorf("the newest statement was made under policy %s, not %s: %w", s.Policy, o.Policy, ErrOtherPolicy)
	case verdictRank(s.Verdict) > verdictRank(o.Accept):
		return fmt.Errorf("the verdict is %q (%d critical, %d high, %d known to be exploited): %w",
			s.Verdict, s.Counts.Critical, s.Counts.High, s.Counts.KEV, ErrVerdict)
	}
	return nil
}

// noneGood says why nothing can be relied on: the reason that tells most.
func noneGood(found statements) error {
	if len(found.good) > 0 {
		return fmt.Errorf("%d genuine statements, none with a verdict: %w", len(found.good), ErrNoVerdictData)
	}
	if len(found.bad) == 0 {
		return fmt.Errorf("nobody has said anything about this image: %w", ErrNoStatement)
	}
	for _, kind := range []error{ErrBadSignature, ErrOtherDigest, ErrForeignKey, ErrMalformed, ErrTooLarge} {
		for _, err := range found.bad {
			if errors.Is(err, kind) {
				return fmt.Errorf("none of %d statements can be relied on: %w", len(found.bad), kind)
			}
		}
	}
	return fmt.Errorf("none of %d statements can be relied on: %w", len(found.bad), ErrMalformed)
}

func verdictRank(verdict string) int {
	switch verdict {
	case contracts.VerdictPass:
		return 0
	case contracts.VerdictWarn, "":
		return 1
	default:
		return 2
	}
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }

// contract returns the statement as `tidewaiter verify` prints it.
func (s Statement) contract() contracts.VerifiedStatement {
	out := contracts.VerifiedStatement{
		PredicateType: s.PredicateType, Signer: s.Signer, Time: s.Time,
		Sequence: s.Snapshot.Sequence, Verdict: s.Verdict,
	}
	if !s.ValidUntil.IsZero() {
		until := s.ValidUntil
		out.ValidUntil = &until
	}
	return out
}
