package contracts

import "time"

// TypePrefix stands before an event's name in the CloudEvents type attribute.
const TypePrefix = "dev.tidewaiter."

// Names of the events, which are their topics too (after a configured prefix).
// The CloudEvents type is TypePrefix + name.
const (
	ImagePushedV1      = "image.pushed.v1"
	ImageDeletedV1     = "image.deleted.v1"
	TagObservedV1      = "tag.observed.v1"
	ImagePlannedV1     = "image.planned.v1"
	ImageUnsupportedV1 = "image.unsupported.v1"
	ImageGoneV1        = "image.gone.v1"
	ImageFailedV1      = "image.failed.v1"
	LayerRequestedV1   = "layer.requested.v1"
	LayerAnalyzedV1    = "layer.analyzed.v1"
	LayerFailedV1      = "layer.failed.v1"
	ImageAssembledV1   = "image.assembled.v1"
	ImageRematchV1     = "image.rematch.v1"
	ImageMatchedV1     = "image.matched.v1"
	ImageAttestedV1    = "image.attested.v1"
	FindingOpenedV1    = "finding.opened.v1"
	FindingChangedV1   = "finding.changed.v1"
	FindingClosedV1    = "finding.closed.v1"
	AdmissionDecidedV1 = "admission.decided.v1"

	AdvisoriesChangedV1 = "advisories.changed.v1"
)

// FindingTopic carries the three finding events, so that the events of one
// problem keep their order.
const FindingTopic = "finding.v1"

// Names of the CloudEvents extension attributes that Tidewaiter sets.
const (
	ExtLane        = "lane"        // LaneFresh or LaneBulk, copied from input to output
	ExtTraceparent = "traceparent" // the starting trace (CloudEvents, distributed-tracing.md)
	ExtDataRef     = "dataref"     // digest of a blob that holds what is too big for an event (CloudEvents, dataref.md)
	ExtKey         = "partitionkey"
)

// The two lanes. Bulk work gets what fresh work leaves, and at least 5 %.
const (
	LaneFresh = "fresh"
	LaneBulk  = "bulk"
)

// BulkSuffix is appended to the topic of an event in the bulk lane.
const BulkSuffix = ".bulk"

// MaxEventBytes bounds the data of an event; what is bigger goes by digest.
const MaxEventBytes = 64 << 10

// EventKind describes one event: where it travels and what its data is.
type EventKind struct {
	Name  string     // for example ImagePushedV1
	Topic string     // the topic without prefix and lane
	Bulk  bool       // whether a second topic with BulkSuffix exists
	New   func() any // pointer to a zero value of the data
}

// Type returns the CloudEvents type of the event.
func (k EventKind) Type() string { return TypePrefix + k.Name }

// Events lists every event that exists, in the order of the pipeline.
func Events() []EventKind {
	return []EventKind{
		{ImagePushedV1, ImagePushedV1, true, func() any { return new(ImagePushed) }},
		{ImageDeletedV1, ImageDeletedV1, false, func() any { return new(ImageDeleted) }},
		{TagObservedV1, TagObservedV1, false, func() any { return new(TagObserved) }},
		{ImagePlannedV1, ImagePlannedV1, false, func() any { return new(ImagePlanned) }},
		{ImageUnsupportedV1, ImageUnsupportedV1, false, func() any { return new(ImageUnsupported) }},
		{ImageGoneV1, ImageGoneV1, false, func() any { return new(ImageGone) }},
		{ImageFailedV1, ImageFailedV1, false, func() any { return new(ImageFailed) }},
		{LayerRequestedV1, LayerRequestedV1, true, func() any { return new(LayerRequested) }},
		{LayerAnalyzedV1, LayerAnalyzedV1, false, func() any { return new(LayerAnalyzed) }},
		{LayerFailedV1, LayerFailedV1, false, func() any { return new(LayerFailed) }},
		{ImageAssembledV1, ImageAssembledV1, false, func() any { return new(ImageAssembled) }},
		{ImageRematchV1, ImageRematchV1, true, func() any { return new(ImageRematch) }},
		{ImageMatchedV1, ImageMatchedV1, true, func() any { return new(ImageMatched) }},
		{ImageAttestedV1, ImageAttestedV1, false, func() any { return new(ImageAttested) }},
		{FindingOpenedV1, FindingTopic, false, func() any { return new(Problem) }},
		{FindingChangedV1, FindingTopic, false, func() any { return new(Problem) }},
		{FindingClosedV1, FindingTopic, false, func() any { return new(Problem) }},
		{AdmissionDecidedV1, AdmissionDecidedV1, false, func() any { return new(AdmissionDecided) }},
		{AdvisoriesChangedV1, AdvisoriesChangedV1, false, func() any { return new(AdvisoriesChanged) }},
	}
}

// ImagePushed says that somebody says that something was pushed: a hint, of
// which nothing is believed but where to look. Subject: registry/repository
// with @digest or :tag, as far as known. Key: registry/repository.
type ImagePushed struct {
	Source     string     `json:"source"` // id of the configured source, or the service that asks
	Registry   string     `json:"registry"`
	Repository string     `json:"repository"`
	Tag        string     `json:"tag,omitempty"`
	Digest     string     `json:"digest,omitempty"`
	MediaType  string     `json:"mediaType,omitempty"`
	Cause      string     `json:"cause"`          // "push", "submit", "overdue", "admission", "sweep", "statement"
	Hint       string     `json:"hint,omitempty"` // why the sender's payload looks like no image, for example "signature tag"
	DeliveryID string     `json:"deliveryId,omitempty"`
	Actor      string     `json:"actor,omitempty"`
	OccurredAt *time.Time `json:"occurredAt,omitempty"` // the sender's clock
	ReceivedAt time.Time  `json:"receivedAt"`           // our clock
}

// Causes of image.pushed. CauseSweep: the registry holds it and no event came.
// CauseStatement: it is known, but its statements are not in the registry.
const (
	CausePush      = "push"
	CauseSubmit    = "submit"
	CauseOverdue   = "overdue"
	CauseAdmission = "admission"
	CauseSweep     = "sweep"
	CauseStatement = "statement"
)

// ImageDeleted is the hint that a tag or a manifest was deleted, which planner
// confirms, or, where neither is named, the whole repository, in which the
// sweeper finds what is gone. Subject and key as for ImagePushed.
type ImageDeleted struct {
	Source     string     `json:"source"`
	Registry   string     `json:"registry"`
	Repository string     `json:"repository"`
	Tag        string     `json:"tag,omitempty"`
	Digest     string     `json:"digest,omitempty"`
	DeliveryID string     `json:"deliveryId,omitempty"`
	Actor      string     `json:"actor,omitempty"`
	OccurredAt *time.Time `json:"occurredAt,omitempty"`
	ReceivedAt time.Time  `json:"receivedAt"`
}

// TagObserved says where a tag pointed when planner looked. Subject:
// registry/repository:tag. Key: registry/repository.
type TagObserved struct {
	Source     string    `json:"source"`
	Registry   string    `json:"registry"`
	Repository string    `json:"repository"`
	Tag        string    `json:"tag"`
	Digest     string    `json:"digest,omitempty"` // absent: the tag is gone
	ObservedAt time.Time `json:"observedAt"`
}

// Platform is an OCI platform (image-spec, image-index.md).
type Platform struct {
	OS           string `json:"os"`
	Architecture string `json:"architecture"`
	Variant      string `json:"variant,omitempty"`
}

// String returns os/architecture[/variant].
func (p Platform) String() string {
	s := p.OS + "/" + p.Architecture
	if p.Variant != "" {
		s += "/" + p.Variant
	}
	return s
}

// Kinds of image.
const (
	KindImage = "image" // one manifest with layers
	KindIndex = "index" // an index of manifests
)

// PlannedLayer is one layer of an image, lowest first.
type PlannedLayer struct {
	Digest      string `json:"digest"`
	MediaType   string `json:"mediaType"`
	Size        int64  `json:"size"`             // bytes, compressed
	DiffID      string `json:"diffId,omitempty"` // from the config: digest of the uncompressed tar
	Instruction string `json:"instruction,omitempty"`
	Missing     string `json:"missing,omitempty"` // why this layer cannot be had: a gap, for example "foreign layer"
}

// PlannedPart is one child of an index.
type PlannedPart struct {
	Digest    string    `json:"digest"`
	MediaType string    `json:"mediaType"`
	Size      int64     `json:"size"`
	Platform  *Platform `json:"platform,omitempty"`
	Skipped   string    `json:"skipped,omitempty"` // why it is listed and not scanned
	Gap       bool      `json:"gap,omitempty"`     // whether leaving it out is a coverage gap
}

// ImagePlanned says what an image consists of. Subject: the image. Key: its digest.
type ImagePlanned struct {
	Image     Image          `json:"image"`
	Source    string         `json:"source"`
	Tag       string         `json:"tag,omitempty"` // the tag it was pushed under, if any
	Kind      string         `json:"kind"`
	MediaType string         `json:"mediaType"`
	Platform  *Platform      `json:"platform,omitempty"`
	Layers    []PlannedLayer `json:"layers,omitempty"`
	Parts     []PlannedPart  `json:"parts,omitempty"`
}

// ImageUnsupported says that there is nothing to scan, and why: an end.
type ImageUnsupported struct {
	Image   Image  `json:"image"`
	Source  string `json:"source"`
	Tag     string `json:"tag,omitempty"`
	Reason  string `json:"reason"`  // a code, for example "referrer", "helm-chart", "no-image-layers"
	Message string `json:"message"` // a sentence
}

// ImageGone says that planner looked and an image is no longer there: an end.
type ImageGone struct {
	Image  Image  `json:"image"`
	Source string `json:"source"`
	Reason string `json:"reason"`
}

// ImageFailed says that an image could not be brought further: an end.
// Digest may be absent where a tag could never be resolved.
type ImageFailed struct {
	Registry   string `json:"registry"`
	Repository string `json:"repository"`
	Tag        string `json:"tag,omitempty"`
	Digest     string `json:"digest,omitempty"`
	Stage      string `json:"stage"` // the service that gave up
	Message    string `json:"message"`
}

// LayerRequested asks for one layer's analysis. Subject and key: the layer digest.
type LayerRequested struct {
	Digest    string `json:"digest"`
	MediaType string `json:"mediaType"`
	Size      int64  `json:"size"`
	Image     Image  `json:"image"` // through whose repository the layer is read
	Source    string `json:"source"`
	Attempt   int    `json:"attempt,omitempty"` // raised by assembler when it asks again
}

// LayerAnalyzed says that a layer's report is stored. Subject and key: the layer digest.
type LayerAnalyzed struct {
	Digest   string `json:"digest"`
	Report   Blob   `json:"report"`   // a LayerReport
	Analyzer string `json:"analyzer"` // version of the analyzer
	Reused   bool   `json:"reused"`   // true: it was stored already, nothing was read
	Packages int    `json:"packages"`
	Gaps     int    `json:"gaps"`
	Bytes    int64  `json:"bytes"` // uncompressed size
	CPUMs    int64  `json:"cpuMs"` // CPU time spent, milliseconds; 0 when reused
}

// LayerFailed says that a layer could not be read through one repository.
// It is that repository's failure, never the layer's.
type LayerFailed struct {
	Digest  string `json:"digest"`
	Image   Image  `json:"image"`
	Attempt int    `json:"attempt,omitempty"`
	Reason  string `json:"reason"` // a code, for example "not-found", "digest-mismatch", "unauthorized"
	Message string `json:"message"`
}

// Blob names stored content.
type Blob struct {
	Digest string `json:"digest"`
	Size   int64  `json:"size"` // bytes, uncompressed
}

// ImageAssembled says that an image's inventory is stored. Subject: the image. Key: its digest.
type ImageAssembled struct {
	Image     Image     `json:"image"`
	Source    string    `json:"source"`
	Tag       string    `json:"tag,omitempty"`
	Kind      string    `json:"kind"`
	Platform  *Platform `json:"platform,omitempty"`
	Inventory Blob      `json:"inventory"` // an Inventory
	Analyzer  string    `json:"analyzer"`
	Packages  int       `json:"packages"`
	Gaps      int       `json:"gaps"`
}

// SnapshotRef names an advisory snapshot.
type SnapshotRef struct {
	Digest   string `json:"digest"`
	Sequence int64  `json:"sequence"`
}

// ImageRematch asks for an image's verdict against a named snapshot. Subject: the image. Key: its digest.
type ImageRematch struct {
	Image     Image       `json:"image"`
	Source    string      `json:"source"`
	Kind      string      `json:"kind"`
	Platform  *Platform   `json:"platform,omitempty"`
	Inventory Blob        `json:"inventory"`
	Analyzer  string      `json:"analyzer"`
	Snapshot  SnapshotRef `json:"snapshot"`           // at least this sequence
	Location  string      `json:"location,omitempty"` // of the snapshot, see AdvisoriesChanged; absent: wherever matcher has it from
	Reason    string      `json:"reason"`             // "advisories", "refresh", "request"
}

// Reasons of image.rematch.
const (
	RematchAdvisories = "advisories"
	RematchRefresh    = "refresh"
	RematchRequest    = "request"
)

// AdvisoriesChanged says that a new advisory snapshot is published. Subject:
// the snapshot's digest. Key: "advisories", so that snapshots keep their order.
type AdvisoriesChanged struct {
	Snapshot    SnapshotRef  `json:"snapshot"`
	Previous    *SnapshotRef `json:"previous,omitempty"` // what Delta is against; absent: there was none, everything is new
	Location    string       `json:"location"`           // registry/repository@digest of the OCI artefact that holds the snapshot
	Delta       *Blob        `json:"delta,omitempty"`    // an AdvisoriesDelta; absent without Previous
	Changed     int          `json:"changed"`            // package names in Delta
	Records     int          `json:"records"`            // advisories that can match
	Newest      time.Time    `json:"newest,omitzero"`    // newest modification among the advisories; absent: unknown
	PublishedAt time.Time    `json:"publishedAt"`        // advisor's clock
}

// Counts are findings by severity.
type Counts struct {
	Critical int `json:"critical"`
	High     int `json:"high"`
	Medium   int `json:"medium"`
	Low      int `json:"low"`
	Unknown  int `json:"unknown"`
	Fixable  int `json:"fixable"` // of all of them, those with a fixed version
	KEV      int `json:"kev"`     // of all of them, those known to be exploited
}

// Total returns how many findings were counted.
func (c Counts) Total() int { return c.Critical + c.High + c.Medium + c.Low + c.Unknown }

// Add counts one more finding.
func (c *Counts) Add(f *Finding) {
	switch f.Severity {
	case SeverityCritical:
		c.Critical++
	case SeverityHigh:
		c.High++
	case SeverityMedium:
		c.Medium++
	case SeverityLow:
		c.Low++
	default:
		c.Unknown++
	}
	if len(f.Fixed) > 0 {
		c.Fixable++
	}
	if f.KEV {
		c.KEV++
	}
}

// Verdicts of a policy.
const (
	VerdictPass = "pass"
	VerdictWarn = "warn"
	VerdictFail = "fail"
)

// ImageMatched says what is known to be wrong with an image. Subject: the image. Key: its digest.
type ImageMatched struct {
	Image     Image       `json:"image"`
	Source    string      `json:"source"`
	Tag       string      `json:"tag,omitempty"`
	Kind      string      `json:"kind"`
	Platform  *Platform   `json:"platform,omitempty"`
	Inventory Blob        `json:"inventory"`
	Report    Blob        `json:"report"` // a Report
	Snapshot  SnapshotRef `json:"snapshot"`
	// SnapshotTime is the newest modification among the snapshot's advisories; absent: unknown.
	SnapshotTime time.Time `json:"snapshotTime,omitzero"`
	MatchedAt    time.Time `json:"matchedAt"` // decides between two verdicts of equal sequence
	Policy       string    `json:"policy"`    // digest of the policy
	Verdict      string    `json:"verdict"`
	Reasons      []string  `json:"reasons,omitempty"` // why not "pass", at most 20
	Counts       Counts    `json:"counts"`
	Packages     int       `json:"packages"`
	Gaps         int       `json:"gaps"`
}

// StatementRef is one statement attached to an image.
type StatementRef struct {
	PredicateType string `json:"predicateType"`
	Digest        string `json:"digest"`           // of the referrer's manifest
	Bundle        string `json:"bundle,omitempty"` // digest of the stored sigstore bundle; absent for plain referrers
}

// ImageAttested says that an image carries a verdict. Subject: the image. Key: its digest.
type ImageAttested struct {
	Image      Image          `json:"image"`
	Source     string         `json:"source"`
	Tag        string         `json:"tag,omitempty"`
	Kind       string         `json:"kind"`
	Platform   *Platform      `json:"platform,omitempty"`
	Report     Blob           `json:"report"`
	Snapshot   SnapshotRef    `json:"snapshot"`
	Policy     string         `json:"policy"`
	Verdict    string         `json:"verdict"`
	Counts     Counts         `json:"counts"`
	Statements []StatementRef `json:"statements"`
	Signer     string         `json:"signer"` // sha256 of the public key (DER), hex
	SignedAt   time.Time      `json:"signedAt"`
	ValidUntil time.Time      `json:"validUntil"`
}

// Problem is the data of finding.opened, finding.changed and finding.closed:
// one thing to do for one owner, namely to update one package in the images of
// one repository. Subject and key: Key.
type Problem struct {
	Key             string    `json:"key"`      // hex, stable over all revisions
	Revision        int64     `json:"revision"` // consumers ignore what is not above the last seen
	State           string    `json:"state"`    // "open" or "closed"
	Owner           string    `json:"owner"`    // registry/repository
	Package         string    `json:"package"`  // name
	Ecosystem       string    `json:"ecosystem"`
	Group           string    `json:"group"` // "fixable" or "unfixed"
	Versions        []string  `json:"versions"`
	FixedIn         []string  `json:"fixedIn,omitempty"` // lowest version that mends all that can be mended, one a release branch
	Severity        string    `json:"severity"`          // the worst
	KEV             bool      `json:"kev"`
	Vulnerabilities []string  `json:"vulnerabilities"` // ids, sorted, at most 200
	Images          []string  `json:"images"`          // registry/repository@digest, sorted, at most 100
	ImageCount      int       `json:"imageCount"`
	OpenedAt        time.Time `json:"openedAt"`
	ChangedAt       time.Time `json:"changedAt"`
}

// Decisions about a workload and each of its images.
const (
	DecisionAdmit = "admit"
	DecisionWarn  = "warn" // admitted with a warning to whoever asked
	DecisionDeny  = "deny"
)

// AdmissionDecided says what gatekeeper answered when a workload asked to be
// admitted to a cluster. Subject: UID. Key: the namespace.
type AdmissionDecided struct {
	UID         string           `json:"uid"`                   // of the AdmissionReview
	Operation   string           `json:"operation"`             // "CREATE" or "UPDATE"
	Kind        string           `json:"kind"`                  // of the workload, for example "Deployment"
	SubResource string           `json:"subResource,omitempty"` // for example "ephemeralcontainers"; absent for the workload itself
	Namespace   string           `json:"namespace"`
	Name        string           `json:"name,omitempty"` // absent where the cluster has not made one yet
	User        string           `json:"user,omitempty"` // who asked, as the cluster names them
	Mode        string           `json:"mode"`           // "enforce", "warn" or "audit"
	Decision    string           `json:"decision"`       // what was answered
	Exempt      bool             `json:"exempt"`         // whether the namespace is exempt, so that nothing was looked at
	Images      []AdmissionImage `json:"images"`         // at most 50
	ImageCount  int              `json:"imageCount"`
	DecidedAt   time.Time        `json:"decidedAt"`
	Millis      int64            `json:"millis"` // that it took
}

// AdmissionImage is the decision about one image of a workload.
type AdmissionImage struct {
	Reference  string     `json:"reference"`          // as the workload writes it
	Places     []string   `json:"places"`             // where it writes it, for example "container app", "image volume models"
	Image      *Image     `json:"image,omitempty"`    // what the reference means; absent where that is unknown
	Decision   string     `json:"decision"`           // as it would be in mode "enforce"
	Reason     string     `json:"reason"`             // a code, for example "verified", "missing", "expired"
	Message    string     `json:"message"`            // a sentence
	Sequence   *int64     `json:"sequence,omitempty"` // of the snapshot that the statement rests on; absent without a statement
	ValidUntil *time.Time `json:"validUntil,omitempty"`
	Cached     bool       `json:"cached"` // whether the registry was not asked
}
