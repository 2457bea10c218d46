// Package attestor signs what matcher found out about images and attaches it
// to them: the scan verdict and a verification summary as signed statements,
// the report and an SBOM as plain referrers.
//
// It is no oracle: it loads the report by its digest, evaluates the policy
// itself and looks for the image in the registry before it signs.
//
// What is signed is stored before it is attached, so that a crash at any moment
// leads to the same bytes being attached, never to two sets of statements.
package attestor

import (
	"context"
	"database/sql"
	"embed"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strconv"
	"time"

	"github.com/cloudevents/sdk-go/v2/event"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/bus"
	"github.com/tidewaiter/tidewaiter/libs/registry"
	"github.com/tidewaiter/tidewaiter/libs/store"
	"github.com/tidewaiter/tidewaiter/services/attestor/sbom"
	"github.com/tidewaiter/tidewaiter/services/attestor/statement"
	"github.com/tidewaiter/tidewaiter/services/matcher/match"
)

// Name is the service's name.
const Name = "attestor"

//go:embed migrations
var migrations embed.FS

// ErrForged is returned for an image.matched event that does not say what the
// stored report says, or that was reached under another policy.
var ErrForged = errors.New("forged or stale image.matched")

// errTaken says that somebody else works on the image.
var errTaken = errors.New("another verdict on the image is being attached")

// errNew says that an input event has not been answered yet.
var errNew = errors.New("not answered yet")

const (
	// maxSkew is how far in the future, by our clock, a verdict may lie.
	maxSkew = 5 * time.Minute
	// takenWait is when an event is looked at again whose image somebody else works on.
	takenWait = time.Second
	// lockTTL is how long a lock on an image's fallback tag outlives its holder.
	lockTTL = 30 * time.Second
	// annotationSigner marks our referrers with the key's id, so that two
	// installations that share a registry leave each other's alone.
	annotationSigner = "dev.tidewaiter.signer"
	// annotationSequence is the advisories' sequence of what our referrers say,
	// so that nobody who works on an older verdict deletes newer ones.
	annotationSequence = "dev.tidewaiter.sequence"
)

// Registry is what attestor needs of registries.
type Registry interface {
	Resolve(ctx context.Context, ref registry.Ref) (ocispec.Descriptor, error)
	Referrers(ctx context.Context, ref registry.Ref, artifactType string) ([]ocispec.Descriptor, error)
	HasReferrersAPI(ctx context.Context, ref registry.Ref) (bool, error)
	Attach(ctx context.Context, registry, repository string, subject ocispec.Descriptor, a registry.Artifact) (ocispec.Descriptor, error)
	Detach(ctx context.Context, registry, repository string, subject, referrer ocispec.Descriptor) error
}

// Locker runs work while nobody else holds key.
type Locker interface {
	WithLock(ctx context.Context, key, holder string, ttl time.Duration, work func(ctx context.Context) error) error
}

// Policy is the policy that verdicts must follow from.
type Policy interface {
	Evaluate(report *contracts.Report) (verdict string, reasons []string)
	Digest() string
}

// Deps are what an Attestor works with.
type Deps struct {
	DB       *store.DB // migrated (Migrate)
	Registry Registry
	Locks    Locker
	Signer   *statement.Signer
	Policy   Policy
	Log      *slog.Logger
	Now      func() time.Time // nil: the present
}

// Attestor handles image.matched.
type Attestor struct {
	Deps
	validity time.Duration
}

// New returns an Attestor.
func New(cfg Config, d Deps) *Attestor {
	if d.Now == nil {
		d.Now = time.Now
	}
	return &Attestor{Deps: d, validity: cfg.Validity}
}

// Migrate creates and updates the service's tables.
func Migrate(ctx context.Context, db *store.DB) error { return db.Migrate(ctx, Name, migrations) }

// Handle answers image.matched with image.attested. It is a bus.Handler.
//
// Nothing is said, and nothing is stored, about an image that is gone, a
// verdict older than the one that stands, or one that would be expired already:
// catalog sees to it that the image comes again if it needs to.
func (a *Attestor) Handle(ctx context.Context, in event.Event) ([]event.Event, error) {
	m, err := bus.Decode[contracts.ImageMatched](in)
	if err != nil {
		return nil, err
	}
	if err := m.Image.Validate(); err != nil {
		return nil, bus.Permanent(fmt.Errorf("image of image.matched: %w", err))
	}
	// The same image may be in the other lane, or with another replica after a
	// rebalance: two who attach at once would not see what the other leaves behind.
	var out []event.Event
	ran, err := a.DB.Alone(ctx, Name+" "+m.Image.String(), func(ctx context.Context) (err error) {
		out, err = a.handle(ctx, in, m)
		return err
	})
	switch {
	case !ran && err != nil:
		return nil, dbError(err)
	case !ran:
		return nil, bus.NotYet(fmt.Errorf("%s: %w", m.Image, errTaken), time.Now().Add(takenWait))
	}
	return out, err
}

func (a *Attestor) handle(ctx context.Context, in event.Event, m contracts.ImageMatched) ([]event.Event, error) {
	log := a.Log.With(slog.String("image", m.Image.String()), slog.Int64("sequence", m.Snapshot.Sequence))

	out, err := a.DB.Once(ctx, Name, in, func(context.Context, *sql.Tx) ([]event.Event, error) { return nil, errNew })
	if err == nil {
		return a.again(ctx, log, m.Image, out)
	}
	if !errors.Is(err, errNew) {
		return nil, err
	}
	standing, err := loadRecord(ctx, a.DB, m.Image)
	if err != nil && !errors.Is(err, store.ErrNotFound) {
		return nil, dbError(err)
	}
	next := standing
	order := 1
	if standing != nil {
		order = standing.compare(m.Snapshot.Sequence, m.MatchedAt)
	}
	switch {
	case order < 0:
		log.InfoContext(ctx, "verdict is older than the one that stands")
		return nil, nil
	case order == 0 && standing.Attested.Report.Digest != m.Report.Digest:
		return nil, bus.Permanent(fmt.Errorf("two verdicts on %s of the same moment: %w", m.Image, ErrForged))
	case order == 0 && standing.Done:
		return a.answer(ctx, in, standing)
	}
	if a.Now().After(m.MatchedAt.Add(a.validity)) {
		log.WarnContext(ctx, "verdict is too old to be signed", slog.Time("matchedAt", m.MatchedAt))
		return nil, nil
	}
	report, err := a.check(ctx, m)
	if err != nil {
		return nil, err
	}
	subject, err := a.Registry.Resolve(ctx, ref(m.Image))
	if errors.Is(err, registry.ErrNotFound) {
		log.InfoContext(ctx, "image is gone, nothing is signed")
		return nil, nil
	}
	if err != nil {
		return nil, registryError(ctx, fmt.Errorf("look for %s: %w", m.Image, err))
	}
	if subject.Digest.String() != m.Image.Digest {
		return nil, registryError(ctx, &registry.Error{Kind: registry.ErrDigestMismatch, What: "look for " + m.Image.String(), Detail: "the registry has " + subject.Digest.String()})
	}
	if order > 0 {
		if next, err = a.prepare(ctx, in, m, report, standing); err != nil {
			return nil, err
		}
	}
	if err := a.attach(ctx, log, subject, next); err != nil {
		return nil, err
	}
	return a.answer(ctx, in, next)
}

// OnDead says that an image got no statement.
func (a *Attestor) OnDead(in event.Event, reason error) []event.Event {
	m, err := bus.Decode[contracts.ImageMatched](in)
	if err != nil {
		return nil // nobody can say which image
	}
	return bus.GivenUp(Name, m.Image, m.Tag, reason)
}

// check loads the report and returns it if the event says the same, and if the
// policy reaches the same verdict.
func (a *Attestor) check(ctx context.Context, m contracts.ImageMatched) (*contracts.Report, error) {
	forged := func(format string, args ...any) error {
		return bus.Permanent(fmt.Errorf(format+": %w", append(args, ErrForged)...))
	}
	if m.MatchedAt.After(a.Now().Add(maxSkew)) {
		return nil, forged("verdict of %s lies in the future", m.MatchedAt.Format(time.RFC3339))
	}
	content, err := a.DB.Blob(ctx, m.Report.Digest)
	if err != nil {
		return nil, dbError(fmt.Errorf("load report: %w", err))
	}
	report := new(contracts.Report)
	if err := json.Unmarshal(content, report); err != nil {
		return nil, forged("report %s is none", m.Report.Digest)
	}
	verdict, _ := a.Policy.Evaluate(report)
	switch {
	case report.Digest != m.Image.Digest:
		return nil, forged("report %s is about %s", m.Report.Digest, report.Digest)
	case report.Kind != m.Kind, report.Inventory != m.Inventory.Digest:
		return nil, forged("report %s is about another inventory than the event", m.Report.Digest)
	case report.Policy != m.Policy:
		return nil, forged("report %s was made under policy %s, the event says %s", m.Report.Digest, report.Policy, m.Policy)
	case m.Policy != a.Policy.Digest():
		return nil, forged("the event was made under policy %s, attestor's is %s", m.Policy, a.Policy.Digest())
	case report.Counts != m.Counts, report.Counts != match.Count(report.Findings):
		return nil, forged("report %s counts otherwise than the event, or than its findings", m.Report.Digest)
	case report.Verdict != m.Verdict, verdict != m.Verdict:
		return nil, forged("verdict is %q in the event, %q in the report, %q by policy", m.Verdict, report.Verdict, verdict)
	}
	return report, nil
}

// prepare signs what is to be said and stores it, before anything is attached.
// If the report is the one that stands, only the verification summary is new.
func (a *Attestor) prepare(ctx context.Context, in event.Event, m contracts.ImageMatched, report *contracts.Report, standing *record) (*record, error) {
	facts := statement.Facts{
		Image: m.Image, Report: report, ReportDigest: m.Report.Digest,
		Snapshot: m.Snapshot, SnapshotTime: snapshotTime(m, a.Now()),
		EventID: in.ID(), Time: m.MatchedAt, ValidUntil: m.MatchedAt.Add(a.validity),
	}
	next := &record{Image: m.Image, Sequence: m.Snapshot.Sequence, Matched: m.MatchedAt.UTC()}
	next.Attested = contracts.ImageAttested{
		Image: m.Image, Source: m.Source, Tag: m.Tag, Kind: m.Kind, Platform: m.Platform,
		Report: m.Report, Snapshot: m.Snapshot, Policy: m.Policy, Verdict: m.Verdict, Counts: m.Counts,
		Signer: a.Signer.ID(), SignedAt: facts.Time.UTC(), ValidUntil: facts.ValidUntil.UTC(),
	}
	if standing != nil && standing.Attested.Report == m.Report && standing.Attested.Signer == a.Signer.ID() {
		var err error
		if next.Artifacts, err = a.kept(ctx, standing); err != nil {
			return nil, err
		}
	}
	if len(next.Artifacts) == 0 {
		document, err := a.sbom(ctx, m)
		if err != nil {
			return nil, err
		}
		next.Artifacts = []artifact{
			a.artifact(facts, contracts.MediaTypeReport, "", m.Report.Digest),
			a.artifact(facts, contracts.MediaTypeCycloneDX, "", document),
		}
		facts.SBOM = document
		vuln, err := a.sign(ctx, facts, contracts.PredicateVuln, statement.VulnPredicate(facts))
		if err != nil {
			return nil, err
		}
		next.Artifacts = append(next.Artifacts, vuln)
	}
	summary, err := a.sign(ctx, facts, contracts.PredicateVSA, statement.VSAPredicate(facts))
	if err != nil {
		return nil, err
	}
	next.Artifacts = append(next.Artifacts, summary)
	if standing != nil {
		next.Superseded = standing.Superseded
		for _, old := range standing.Artifacts {
			kept := slices.ContainsFunc(next.Artifacts, func(n artifact) bool { return n.Manifest == old.Manifest })
			if old.Manifest != "" && !kept {
				next.Superseded = append(next.Superseded, old.Manifest)
			}
		}
	}
	err = a.DB.Tx(ctx, func(tx *sql.Tx) error { return saveRecord(ctx, tx, next) })
	if err != nil {
		return nil, dbError(err)
	}
	return next, nil
}

// kept returns what of a record stays when only the verification summary is
// new; nothing if some of its content is not stored any more, and could not be
// attached again. What is stored stays so for as long as it is used.
func (a *Attestor) kept(ctx context.Context, r *record) ([]artifact, error) {
	var kept []artifact
	for _, old := range r.Artifacts {
		if old.PredicateType == contracts.PredicateVSA {
			continue
		}
		stored, err := a.DB.HasBlob(ctx, old.Blob)
		if err != nil {
			return nil, dbError(err)
		}
		if !stored {
			return nil, nil
		}
		if err := a.DB.TouchBlobs(ctx, old.Blob); err != nil {
			return nil, dbError(err)
		}
		kept = append(kept, old)
	}
	return kept, nil
}

// snapshotTime returns the time of the newest advisory. Where matcher does not
// say, the sequence does, which is that time in Unix seconds unless somebody
// chose another number; zero: unknown.
func snapshotTime(m contracts.ImageMatched, now time.Time) time.Time {
	if !m.SnapshotTime.IsZero() {
		return m.SnapshotTime
	}
	t := time.Unix(m.Snapshot.Sequence, 0)
	if t.Year() < 2010 || t.After(now.Add(24*time.Hour)) {
		return time.Time{}
	}
	return t
}

// sbom writes the image's SBOM and returns the digest of the stored document.
func (a *Attestor) sbom(ctx context.Context, m contracts.ImageMatched) (string, error) {
	inv, err := a.inventory(ctx, m.Inventory.Digest)
	if err != nil {
		return "", err
	}
	document, err := sbom.CycloneDX(ctx, inv, m.Inventory.Digest, a.inventory)
	if err != nil {
		return "", fmt.Errorf("SBOM of %s: %w", m.Image, err)
	}
	digest, err := a.DB.PutBlob(ctx, document)
	if err != nil {
		return "", dbError(err)
	}
	return digest, nil
}

func (a *Attestor) inventory(ctx context.Context, digest string) (*contracts.Inventory, error) {
	content, err := a.DB.Blob(ctx, digest)
	if err != nil {
		return nil, dbError(fmt.Errorf("load inventory: %w", err))
	}
	inv := new(contracts.Inventory)
	if err := json.Unmarshal(content, inv); err != nil {
		return nil, bus.Permanent(fmt.Errorf("decode inventory %s: %w", digest, err))
	}
	return inv, nil
}

// sign signs a predicate and stores the bundle.
func (a *Attestor) sign(ctx context.Context, f statement.Facts, predicateType string, predicate any) (artifact, error) {
	bundle, err := statement.SignBundle(ctx, a.Signer, f.Image.Repo(), f.Image.Digest, predicateType, predicate)
	if err != nil {
		return artifact{}, fmt.Errorf("statement about %s: %w", f.Image, err)
	}
	digest, err := a.DB.PutBlob(ctx, bundle)
	if err != nil {
		return artifact{}, dbError(err)
	}
	return a.artifact(f, contracts.MediaTypeBundle, predicateType, digest), nil
}

func (a *Attestor) artifact(f statement.Facts, mediaType, predicateType, blob string) artifact {
	annotations := map[string]string{
		contracts.AnnotationOwner: Name,
		annotationSigner:          a.Signer.ID(),
		annotationSequence:        strconv.FormatInt(f.Snapshot.Sequence, 10),
		ocispec.AnnotationCreated: f.Time.UTC().Format(time.RFC3339Nano),
	}
	if predicateType != "" {
		maps.Copy(annotations, statement.BundleAnnotations(predicateType))
	}
	return artifact{PredicateType: predicateType, Type: mediaType, Blob: blob, Annotations: annotations}
}

// again answers an event that was answered before, after what is missing of
// the statements was attached again. That this cannot be done does not make
// the answer wrong.
func (a *Attestor) again(ctx context.Context, log *slog.Logger, image contracts.Image, out []event.Event) ([]event.Event, error) {
	err := a.mend(ctx, log, image)
	if outcome, _ := bus.Classify(err); outcome == bus.OutcomePermanent {
		log.WarnContext(ctx, "statements could not be attached again", slog.Any("error", err))
		err = nil
	}
	if err != nil {
		return nil, err
	}
	return out, nil
}

// mend attaches again what is missing of what stands. An image that was
// deleted and pushed again comes by under the event ids it had before.
func (a *Attestor) mend(ctx context.Context, log *slog.Logger, image contracts.Image) error {
	standing, err := loadRecord(ctx, a.DB, image)
	if errors.Is(err, store.ErrNotFound) {
		return nil
	}
	if err != nil {
		return dbError(err)
	}
	if !standing.Done {
		return nil // its own event is still on its way
	}
	subject, err := a.Registry.Resolve(ctx, ref(image))
	if errors.Is(err, registry.ErrNotFound) {
		return nil
	}
	if err != nil {
		return registryError(ctx, fmt.Errorf("look for %s: %w", image, err))
	}
	return a.attach(ctx, log, subject, standing)
}

// attach pushes what is missing of r to the registry, then deletes what it
// replaces. Where the registry has no referrers API, both change the fallback
// tag, which only one writer at a time may do.
func (a *Attestor) attach(ctx context.Context, log *slog.Logger, subject ocispec.Descriptor, r *record) error {
	api, err := a.Registry.HasReferrersAPI(ctx, ref(r.Image))
	if err != nil {
		return registryError(ctx, fmt.Errorf("ask for referrers of %s: %w", r.Image, err))
	}
	if api {
		return a.push(ctx, log, subject, r, nil)
	}
	var pushed error
	err = a.Locks.WithLock(ctx, "referrers:"+r.Image.String(), Name, lockTTL, func(ctx context.Context) error {
		gone, err := a.gone(ctx, r)
		if err != nil {
			pushed = err
			return err
		}
		pushed = a.push(ctx, log, subject, r, gone)
		return pushed
	})
	if pushed != nil {
		return pushed
	}
	if err != nil && ctx.Err() == nil {
		return bus.Unavailable(fmt.Errorf("lock the referrers of %s: %w", r.Image, err))
	}
	return err
}

// gone returns which of a record's manifests the registry does not have: a
// fallback tag lists what was pushed, also when garbage collection, or
// somebody, has removed it.
func (a *Attestor) gone(ctx context.Context, r *record) (map[string]bool, error) {
	gone := map[string]bool{}
	for _, art := range r.Artifacts {
		if art.Manifest == "" {
			continue
		}
		manifest := ref(r.Image)
		manifest.Digest = art.Manifest
		_, err := a.Registry.Resolve(ctx, manifest)
		if err != nil && !errors.Is(err, registry.ErrNotFound) {
			return nil, registryError(ctx, fmt.Errorf("look for what is attached to %s: %w", r.Image, err))
		}
		gone[art.Manifest] = err != nil
	}
	return gone, nil
}

// push attaches what is missing, also what is listed but gone.
func (a *Attestor) push(ctx context.Context, log *slog.Logger, subject ocispec.Descriptor, r *record, gone map[string]bool) error {
	listed, err := a.Registry.Referrers(ctx, ref(r.Image), "")
	if err != nil {
		return registryError(ctx, fmt.Errorf("list referrers of %s: %w", r.Image, err))
	}
	present := map[string]bool{}
	for _, d := range listed {
		present[d.Digest.String()] = !gone[d.Digest.String()]
	}
	current := map[string]bool{}
	for i := range r.Artifacts {
		art := &r.Artifacts[i]
		if !present[art.Manifest] {
			content, err := a.DB.Blob(ctx, art.Blob)
			if err != nil {
				return dbError(fmt.Errorf("load what is to be attached: %w", err))
			}
			d, err := a.Registry.Attach(ctx, r.Image.Registry, r.Image.Repository, subject, registry.Artifact{
				Type: art.Type, MediaType: art.Type, Content: content, Annotations: art.Annotations,
			})
			if err != nil {
				return registryError(ctx, fmt.Errorf("attach %s to %s: %w", art.Type, r.Image, err))
			}
			art.Manifest = d.Digest.String()
		}
		current[art.Manifest] = true
	}
	a.clean(ctx, log, subject, r, listed, current)
	return nil
}

// clean deletes what r replaces: what we know we attached before, and whatever
// else carries our mark (left over by a crash). What cannot be deleted does no
// harm, as verifiers take the newest; it is tried again next time.
func (a *Attestor) clean(ctx context.Context, log *slog.Logger, subject ocispec.Descriptor, r *record, listed []ocispec.Descriptor, current map[string]bool) {
	var left []string
	for _, d := range listed {
		digest := d.Digest.String()
		if current[digest] || !a.leftOver(r, d) && !slices.Contains(r.Superseded, digest) {
			continue
		}
		err := a.Registry.Detach(ctx, r.Image.Registry, r.Image.Repository, subject, d)
		if err != nil && !errors.Is(err, registry.ErrNotFound) {
			log.WarnContext(ctx, "superseded statement could not be deleted", slog.String("referrer", digest), slog.Any("error", err))
			left = append(left, digest)
		}
	}
	r.Superseded = left
}

// leftOver says whether a referrer carries our mark and is not newer than r.
// Annotations are not signed: they decide what is deleted, never what is believed.
func (a *Attestor) leftOver(r *record, d ocispec.Descriptor) bool {
	if d.Annotations[contracts.AnnotationOwner] != Name || d.Annotations[annotationSigner] != a.Signer.ID() {
		return false
	}
	sequence, err := strconv.ParseInt(d.Annotations[annotationSequence], 10, 64)
	if err != nil {
		return false
	}
	created, err := time.Parse(time.RFC3339Nano, d.Annotations[ocispec.AnnotationCreated])
	return err == nil && r.compare(sequence, created) <= 0
}

// answer stores that r is attached, together with the event that says so.
func (a *Attestor) answer(ctx context.Context, in event.Event, r *record) ([]event.Event, error) {
	attested := r.Attested
	attested.Statements = nil
	for _, art := range r.Artifacts {
		s := contracts.StatementRef{PredicateType: art.PredicateType, Digest: art.Manifest, Bundle: art.Blob}
		if art.PredicateType == "" {
			s.PredicateType, s.Bundle = art.Type, ""
		}
		attested.Statements = append(attested.Statements, s)
	}
	ev, err := bus.NewEvent(contracts.ImageAttestedV1, r.Image.String(), attested)
	if err != nil {
		return nil, err
	}
	bus.Key(&ev, r.Image.Digest)
	done := *r
	done.Done, done.Attested = true, attested
	out, err := a.DB.Once(ctx, Name, in, func(ctx context.Context, tx *sql.Tx) ([]event.Event, error) {
		if !r.Done {
			if err := saveRecord(ctx, tx, &done); err != nil {
				return nil, err
			}
		}
		return []event.Event{ev}, nil
	})
	if err != nil {
		return nil, dbError(err)
	}
	return out, nil
}

func ref(i contracts.Image) registry.Ref {
	return registry.Ref{Registry: i.Registry, Repository: i.Repository, Digest: i.Digest}
}

// dbError marks outages of the database; what is marked already stays so.
func dbError(err error) error {
	if store.IsUnavailable(err) {
		return bus.Unavailable(err)
	}
	return err
}

// registryError asks for another try later where that can help.
func registryError(ctx context.Context, err error) error {
	if at, ok := registry.RetryAt(err, bus.Attempt(ctx)); ok {
		if registry.Held(err) {
			return bus.NotYet(err, at)
		}
		return bus.Later(err, at)
	}
	for _, fact := range []error{registry.ErrNotConfigured, registry.ErrForbiddenHost, registry.ErrUnauthorized, registry.ErrTooLarge} {
		if errors.Is(err, fact) {
			return bus.Permanent(err)
		}
	}
	return err
}
