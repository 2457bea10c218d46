package gatekeeper

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/registry"
	"github.com/tidewaiter/tidewaiter/services/attestor/statement"
)

// Reasons of decisions, as they stand in admission.decided and in metrics.
const (
	ReasonVerified        = "verified"
	ReasonReference       = "bad-reference"
	ReasonUnknownRegistry = "unknown-registry"
	ReasonNoDigest        = "no-digest"
	ReasonNotFound        = "not-found"
	ReasonUnavailable     = "unavailable"
	ReasonMissing         = "missing"
	ReasonMalformed       = "malformed"
	ReasonForeignKey      = "foreign-key"
	ReasonTampered        = "tampered"
	ReasonOtherDigest     = "other-digest"
	ReasonOtherPolicy     = "other-policy"
	ReasonExpired         = "expired"
	ReasonTooOld          = "too-old"
	ReasonAdvisoriesOld   = "advisories-too-old"
	ReasonSuperseded      = "older-sequence"
	ReasonNoVerdict       = "no-verdict"
	ReasonVerdict         = "verdict"
)

const (
	// parallel is how many images of one review are looked at together.
	parallel = 8
	// fetchTimeout bounds reading an image's statements from its registry, also
	// when nobody waits for it any more.
	fetchTimeout = 10 * time.Second
	// absentFor is how long it is remembered that an image has no statement,
	// unless one is announced: whoever was denied tries again and again.
	absentFor = 20 * time.Second
)

// rejections say for each error why an image is refused and what to do.
var rejections = []struct {
	err    error
	reason string
	todo   string
}{
	{statement.ErrVerdict, ReasonVerdict, "deploy an image in which that is mended; tidewaiter where %s tells what was found"},
	{statement.ErrSuperseded, ReasonSuperseded, "somebody may have put back an old statement: have it scanned again with tidewaiter submit %s"},
	{statement.ErrExpired, ReasonExpired, "its statement was not renewed: have it scanned again with tidewaiter submit %s"},
	{statement.ErrTooOld, ReasonTooOld, "its statement was not renewed: have it scanned again with tidewaiter submit %s"},
	{statement.ErrSnapshotOld, ReasonAdvisoriesOld, "fetch newer advisories, then have it scanned again with tidewaiter submit %s"},
	{statement.ErrOtherPolicy, ReasonOtherPolicy, "attestor and gatekeeper must have the same policy; then have it scanned again with tidewaiter submit %s"},
	{statement.ErrBadSignature, ReasonTampered, "somebody may have changed it: have it scanned again with tidewaiter submit %s"},
	{statement.ErrOtherDigest, ReasonOtherDigest, "somebody may have copied it from another image: have it scanned with tidewaiter submit %s"},
	{statement.ErrForeignKey, ReasonForeignKey, "only statements of the configured keys count: have it scanned with tidewaiter submit %s"},
	{statement.ErrNoVerdictData, ReasonNoVerdict, "have it scanned with tidewaiter submit %s"},
	{statement.ErrMalformed, ReasonMalformed, "have it scanned again with tidewaiter submit %s"},
	{statement.ErrTooLarge, ReasonMalformed, "have it scanned again with tidewaiter submit %s"},
	{statement.ErrNoStatement, ReasonMissing, "a scan is asked for, try again in a minute; if it stays so, have it scanned with tidewaiter submit %s"},
}

// finding is the decision about one image.
type finding struct {
	contracts.AdmissionImage
	submit bool // a scan is to be asked for
	tag    string
}

// decideAll decides about all images of a review. Everything that is asked of
// others together has the configured budget.
func (g *Gatekeeper) decideAll(ctx context.Context, images []named) []finding {
	ctx, cancel := context.WithTimeout(ctx, g.cfg.Budget)
	defer cancel()
	out := make([]finding, len(images))
	var group errgroup.Group
	group.SetLimit(parallel)
	for i, n := range images {
		group.Go(func() error {
			out[i] = g.decide(ctx, n.reference)
			out[i].Reference, out[i].Places = clip(n.reference), n.places
			return nil
		})
	}
	_ = group.Wait() // none of them fails: what went wrong is in the findings
	return out
}

// decide decides about one image reference.
func (g *Gatekeeper) decide(ctx context.Context, reference string) finding {
	ref, err := parseReference(reference)
	if err != nil {
		return refuse(ReasonReference, err.Error()+"; mend it in the workload")
	}
	if err := g.Registry.Configured(ref.Registry, ref.Repository); err != nil {
		f := refuse(ReasonUnknownRegistry, fmt.Sprintf("%s/%s is not among the registries that gatekeeper may ask; use an image from one of them, or add it to its configuration", ref.Registry, ref.Repository))
		return byRule(f, g.cfg.UnknownRegistry)
	}
	tag := ref.Tag
	if ref.Digest == "" {
		if g.cfg.RequireDigest {
			return refuse(ReasonNoDigest, fmt.Sprintf("a tag can be moved to another image; write %s/%s@sha256:… instead", ref.Registry, ref.Repository))
		}
		d, err := g.resolve(ctx, ref)
		if err != nil {
			return g.registryFailed(err)
		}
		ref.Digest = d
	}
	image := contracts.Image{Registry: ref.Registry, Repository: ref.Repository, Digest: ref.Digest}
	d, known, err := g.lookup(ctx, image)
	f := g.judged(image, d, err)
	f.Image, f.Cached, f.tag = &image, known, tag
	return f
}

// resolve asks what a tag points at now.
func (g *Gatekeeper) resolve(ctx context.Context, ref registry.Ref) (string, error) {
	return g.tags.do(ctx, ref.String(), func(ctx context.Context) (string, error) {
		ctx, cancel := context.WithTimeout(ctx, fetchTimeout)
		defer cancel()
		d, err := g.Registry.Resolve(ctx, ref)
		return d.Digest.String(), err
	})
}

// lookup returns the statement that decides about an image, and whether the
// registry was not asked. What is remembered is verified each time and answers
// when it is genuine, valid and was looked for lately, whatever its verdict;
// where the registry cannot be asked, also when it was not. That there is none
// is remembered for a moment.
func (g *Gatekeeper) lookup(ctx context.Context, image contracts.Image) (d statement.Decision, remembered bool, err error) {
	key := image.String()
	i := g.recall(ctx, key)
	known := i.bundle
	if i.bundle != nil {
		d, err = g.verify(ctx, image.Digest, []statement.Bundle{*i.bundle}, i.seen)
		genuine := err == nil || errors.Is(err, statement.ErrVerdict)
		if genuine && g.Now().Sub(i.fetched) < g.cfg.Recheck {
			return d, true, err
		}
		if !genuine {
			i.bundle = nil
		}
	}
	if a, ok := g.absent.get(key); ok && known == nil && g.Now().Sub(a.fetched) < absentFor {
		d, err = g.verify(ctx, image.Digest, nil, i.seen)
		return d, true, err
	}
	found, foundErr := g.ask(ctx, image, known)
	if errors.Is(foundErr, statement.ErrNoStatement) {
		g.absent.put(key, item{bundle: &statement.Bundle{}, fetched: g.Now()})
	}
	if i.bundle != nil && transient(foundErr) {
		return d, true, err
	}
	return found, false, foundErr
}

// transient says whether err tells nothing about the image.
func transient(err error) bool {
	return err != nil && !errors.Is(err, statement.ErrVerdict) && !statement.NotVerifiable(err)
}

// ask reads an image's statements from its registry, verifies them and
// remembers the one that decides. Those who ask at the same time share one
// answer, also who comes when it has just been given: known is what the caller
// found in memory, and what is there by now beside it is not read again.
func (g *Gatekeeper) ask(ctx context.Context, image contracts.Image, known *statement.Bundle) (statement.Decision, error) {
	key := image.String()
	return g.statements.do(ctx, key, func(ctx context.Context) (statement.Decision, error) {
		if i, ok := g.memory.get(key); ok && i.bundle != nil && i.bundle != known {
			return g.verify(ctx, image.Digest, []statement.Bundle{*i.bundle}, i.seen)
		}
		ctx, cancel := context.WithTimeout(ctx, fetchTimeout)
		defer cancel()
		start := time.Now()
		bundles, err := statement.Fetch(ctx, g.Registry, registry.Ref{Registry: image.Registry, Repository: image.Repository, Digest: image.Digest})
		g.metrics.fetchSeconds.Observe(time.Since(start).Seconds())
		if err != nil {
			return statement.Decision{}, fmt.Errorf("ask for statements: %w", err)
		}
		return g.learn(ctx, image, bundles)
	})
}

// learn verifies bundles, remembers the one that decides, and judges it in the
// light of what was remembered before.
func (g *Gatekeeper) learn(ctx context.Context, image contracts.Image, bundles []statement.Bundle) (statement.Decision, error) {
	d, err := g.verify(ctx, image.Digest, bundles, statement.Seen{})
	if !d.Statement.HasVerdict {
		return d, err
	}
	if seen := g.remember(ctx, image.String(), d); d.Statement.Seen().Before(seen) {
		return g.verify(ctx, image.Digest, bundles, seen)
	}
	return d, err
}

func (g *Gatekeeper) verify(ctx context.Context, digest string, bundles []statement.Bundle, seen statement.Seen) (statement.Decision, error) {
	return statement.Decide(ctx, digest, bundles, statement.Options{
		Keys: g.Keys(), MaxAge: g.cfg.MaxAge, Policy: g.cfg.PolicyDigest, Accept: g.cfg.Accept, Seen: seen, Now: g.Now(),
	})
}

// judged turns the outcome of a lookup into a decision.
func (g *Gatekeeper) judged(image contracts.Image, d statement.Decision, err error) finding {
	var f finding
	switch {
	case err == nil:
		f = finding{AdmissionImage: contracts.AdmissionImage{
			Decision: contracts.DecisionAdmit, Reason: ReasonVerified,
			Message: fmt.Sprintf("verdict %q, valid until %s", d.Statement.Verdict, d.Statement.ValidUntil.UTC().Format(time.RFC3339)),
		}}
	case transient(err):
		f = g.registryFailed(err)
	default:
		f = refuse(ReasonMalformed, err.Error())
		for _, r := range rejections {
			if errors.Is(err, r.err) {
				f = refuse(r.reason, err.Error()+"; "+fmt.Sprintf(r.todo, image))
				break
			}
		}
		if f.Reason == ReasonMissing {
			f = byRule(f, g.cfg.Missing)
			f.submit = true
		}
	}
	if d.Statement.HasVerdict {
		sequence, until := d.Statement.Snapshot.Sequence, d.Statement.ValidUntil.UTC()
		f.Sequence, f.ValidUntil = &sequence, &until
	}
	return f
}

// registryFailed decides where the registry has no answer.
func (g *Gatekeeper) registryFailed(err error) finding {
	switch {
	case errors.Is(err, registry.ErrNotFound):
		return refuse(ReasonNotFound, "the registry does not have it; check the name, or push it")
	case errors.Is(err, registry.ErrUnauthorized), errors.Is(err, registry.ErrForbiddenHost), errors.Is(err, registry.ErrNotConfigured):
		return byRule(refuse(ReasonUnavailable, err.Error()+"; gatekeeper's configuration of this registry must be mended"), g.cfg.Unavailable)
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, context.Canceled):
		return byRule(refuse(ReasonUnavailable, fmt.Sprintf("the registry did not answer within %s; try again", g.cfg.Budget)), g.cfg.Unavailable)
	}
	return byRule(refuse(ReasonUnavailable, err.Error()+"; try again"), g.cfg.Unavailable)
}

func refuse(reason, message string) finding {
	return finding{AdmissionImage: contracts.AdmissionImage{Decision: contracts.DecisionDeny, Reason: reason, Message: clip(message)}}
}

// byRule softens a refusal as configured.
func byRule(f finding, rule string) finding {
	switch rule {
	case RuleWarn:
		f.Decision = contracts.DecisionWarn
	case RuleSubmit:
		f.Decision, f.submit = contracts.DecisionWarn, true
	case RuleAdmit:
		f.Decision = contracts.DecisionAdmit
	}
	return f
}

// maxMessage bounds what is said about one image, in bytes.
const maxMessage = 1024

// clip bounds a text that others had a part in, and keeps it on one line.
func clip(s string) string {
	s = strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return ' '
		}
		return r
	}, s)
	if len(s) <= maxMessage {
		return s
	}
	return strings.ToValidUTF8(s[:maxMessage], "") + "…"
}
