package statement

import (
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/registry"
)

// fetchParallel is how many bundles of one image are read at once.
const fetchParallel = 4

// Bundle is a signed statement as it was found: nothing of it is verified.
type Bundle struct {
	Digest  string // of the referrer's manifest, or of the stored bundle
	Content []byte // sigstore bundle, JSON

	unreadable error // why there is no content
}

// Seen is how new a statement is: its advisories' sequence, then its time. The
// zero value is older than any statement.
type Seen struct {
	Sequence int64
	Time     time.Time
}

// Before says whether s is older than o.
func (s Seen) Before(o Seen) bool {
	if s.Sequence != o.Sequence {
		return s.Sequence < o.Sequence
	}
	return s.Time.Before(o.Time)
}

// Seen returns how new the statement is.
func (s Statement) Seen() Seen { return Seen{Sequence: s.Snapshot.Sequence, Time: s.Time} }

// Fetch reads the bundles that are attached to an image (ref.Digest must be
// set), at most MaxBundles, the likely ones first. The attestor deletes what it
// has replaced, so that something listed may be gone by the time it is read;
// then the list is read once more. Errors are trouble with the registry; what
// is attached and cannot be used is among the bundles, for VerifyImage and
// Decide to tell of.
func Fetch(ctx context.Context, client RegistryReader, ref registry.Ref) ([]Bundle, error) {
	for attempt := 0; ; attempt++ {
		out, err := fetch(ctx, client, ref)
		if errors.Is(err, registry.ErrNotFound) && attempt == 0 {
			continue
		}
		return out, err
	}
}

func fetch(ctx context.Context, client RegistryReader, ref registry.Ref) ([]Bundle, error) {
	list, err := client.Referrers(ctx, ref, contracts.MediaTypeBundle)
	if err != nil {
		return nil, fmt.Errorf("list statements of %s/%s@%s: %w", ref.Registry, ref.Repository, ref.Digest, err)
	}
	list = likelyFirst(list)
	out := make([]Bundle, min(len(list), MaxBundles))
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(fetchParallel)
	for i := range out {
		group.Go(func() error {
			digest := list[i].Digest.String()
			out[i].Digest = digest
			a, err := client.ArtifactContent(ctx, ref.Registry, ref.Repository, digest, MaxBundle)
			if errors.Is(err, registry.ErrTooLarge) || errors.Is(err, registry.ErrDigestMismatch) || errors.Is(err, registry.ErrUnknownManifest) {
				out[i].unreadable = fmt.Errorf("%w: %w", ErrMalformed, err)
				return nil
			}
			if err != nil {
				return fmt.Errorf("read statement %s: %w", digest, err)
			}
			out[i].Content = a.Content
			return nil
		})
	}
	if err := group.Wait(); err != nil {
		return nil, err
	}
	if len(list) > MaxBundles {
		out = append(out, Bundle{
			Digest:     list[MaxBundles].Digest.String(),
			unreadable: fmt.Errorf("this and all further ones of %d are not looked at: %w", len(list), ErrTooLarge),
		})
	}
	return out, nil
}

// Decision is the statement that decides about an image.
type Decision struct {
	Statement Statement // without a verdict (HasVerdict) where none is genuine
	Bundle    Bundle    // it was read from
}

// Decide verifies bundles that are at hand, without any network access, and
// judges the newest genuine statement among them. Errors are those of
// VerifyImage; the decision is filled in as far as known with an error too.
func Decide(ctx context.Context, digest string, bundles []Bundle, o Options) (Decision, error) {
	if o.Now.IsZero() {
		o.Now = time.Now()
	}
	g, err := judge(readAll(ctx, digest, bundles, o.Keys), o)
	return Decision{Statement: g.Statement, Bundle: g.bundle}, err
}
