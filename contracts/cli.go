package contracts

import "time"

// WebhookDecode is what `tidewaiter webhook decode` prints.
type WebhookDecode struct {
	Status int            `json:"status"` // what intake would answer
	Events []WebhookEvent `json:"events"` // one an event of the body, in its order
}

// WebhookEvent is one decoded event. What the payload does not say is null.
type WebhookEvent struct {
	Action     string  `json:"action"` // "push", "delete" or "ignore"
	Registry   *string `json:"registry"`
	Repository *string `json:"repository"`
	Tag        *string `json:"tag"`
	Digest     *string `json:"digest"`
	Reason     string  `json:"reason"`
}

// Delivery is one line of `tidewaiter hooks log --output json`: one call of a
// sender, or those of ten minutes that were refused for the same reason.
type Delivery struct {
	ID         string     `json:"id"`               // of the entry
	Time       time.Time  `json:"time"`             // when it arrived; of several calls the last
	First      *time.Time `json:"first,omitempty"`  // of several calls the first
	Calls      int        `json:"calls"`            // how many calls the entry sums up; more than 1 only of refused ones
	Source     string     `json:"source"`           // id of the source; "unknown" for calls to no configured source, "submit" for pushes by hand
	Status     int        `json:"status"`           // HTTP status of the answer
	Reason     string     `json:"reason"`           // code; the list may grow
	Means      string     `json:"means,omitempty"`  // what the code means, a sentence
	Action     string     `json:"action,omitempty"` // what to do about it; absent: nothing
	Failure    bool       `json:"failure"`          // whether something is to be mended, here or at the sender
	Trouble    string     `json:"trouble,omitempty"`
	DeliveryID string     `json:"deliveryId,omitempty"`
	Bytes      int        `json:"bytes"`      // of the body, as far as it was read
	Events     int        `json:"events"`     // in the body
	Published  int        `json:"published"`  // events that went on to planner
	Ignored    int        `json:"ignored"`    // events that say nothing of an image
	Filtered   int        `json:"filtered"`   // events that the source's filters leave out
	Duplicates int        `json:"duplicates"` // events that were published before
	Dead       int        `json:"dead"`       // events that went to the dead letters
	OverQuota  int        `json:"overQuota"`  // published events that the quota put into the bulk lane
	Subjects   []string   `json:"subjects,omitempty"`
}

// SourceStatus is one line of `tidewaiter hooks status --output json`: how the
// calls of one source went.
type SourceStatus struct {
	Source     string         `json:"source"` // id of the source; "unknown" for calls to no configured source, "submit" for pushes by hand
	Kind       string         `json:"kind,omitempty"`
	Registry   string         `json:"registry,omitempty"`
	Configured bool           `json:"configured"` // whether the configuration names the source now
	Since      time.Time      `json:"since"`      // begin of the hour from which calls are counted
	Calls      int            `json:"calls"`      // since then
	Reasons    map[string]int `json:"reasons"`    // calls by reason code
	LastCall   *time.Time     `json:"lastCall"`   // the last one since then; null: none
	LastStored *time.Time     `json:"lastStored"` // the last call since then that brought something new; null: none
	// LastFailure is the last call since then with which something was wrong; null: none.
	LastFailure *Delivery `json:"lastFailure"`
}

// Scan is what `tidewaiter scan --output json` prints; `tidewaiter match`
// prints the same without image and with packages that have no layers.
type Scan struct {
	Image     *ScanImage  `json:"image,omitempty"`
	Platform  *Platform   `json:"platform,omitempty"`
	Packages  []Package   `json:"packages"`
	Findings  []Finding   `json:"findings"`
	Lags      []Lag       `json:"lags,omitempty"`
	Gaps      []Gap       `json:"gaps"`
	Verdict   string      `json:"verdict"`
	Reasons   []string    `json:"reasons,omitempty"`
	Snapshot  SnapshotRef `json:"snapshot"`
	Inventory string      `json:"inventory"`
	Report    string      `json:"report"`
}

// ScanImage names what was scanned.
type ScanImage struct {
	Ref    string `json:"ref"` // as the user wrote it
	Digest string `json:"digest"`
}

// Verification is what `tidewaiter verify` prints.
type Verification struct {
	Verified   bool                `json:"verified"`
	Digest     string              `json:"digest"`
	Statements []VerifiedStatement `json:"statements"`
	Reason     string              `json:"reason,omitempty"` // why not
	// Ignored are the statements that count for nothing, beside those above.
	Ignored []IgnoredStatement `json:"ignored,omitempty"`
}

// IgnoredStatement is an attached statement that could not be verified.
type IgnoredStatement struct {
	Digest string `json:"digest"` // of the referrer's manifest
	Reason string `json:"reason"`
}

// VerifiedStatement is a statement whose signature holds.
type VerifiedStatement struct {
	PredicateType string     `json:"predicateType"`
	Signer        string     `json:"signer"`
	Time          time.Time  `json:"time"`
	ValidUntil    *time.Time `json:"validUntil,omitempty"`
	Sequence      int64      `json:"sequence"`
	Verdict       string     `json:"verdict,omitempty"`
}

// Steps of the story that `tidewaiter demo` and `tidewaiter where` tell.
const (
	StepPushed       = "pushed"
	StepPlanned      = "planned"
	StepAnalyzed     = "analyzed"
	StepDeduplicated = "deduplicated"
	StepAssembled    = "assembled"
	StepMatched      = "matched"
	StepAttested     = "attested"
	StepVerified     = "verified"
	StepUnsupported  = "unsupported"
	StepDeleted      = "deleted"
	StepFailed       = "failed"
	StepDone         = "done"
)

// TimelineEntry is one JSON line of `tidewaiter where` and of `tidewaiter demo`.
type TimelineEntry struct {
	Time      time.Time      `json:"time"`
	Step      string         `json:"step"`
	Subject   string         `json:"subject,omitempty"`
	Service   string         `json:"service,omitempty"`
	Message   string         `json:"message,omitempty"`
	Registry  string         `json:"registry,omitempty"`
	Image     string         `json:"image,omitempty"` // with digest
	OK        *bool          `json:"ok,omitempty"`
	PublicKey string         `json:"publicKey,omitempty"` // PEM
	Details   map[string]any `json:"details,omitempty"`
}

// TagPeriod is one line of `tidewaiter where --tags --output json`: how long a
// tag was seen to point at one digest.
type TagPeriod struct {
	Repository string     `json:"repository"` // with the registry
	Tag        string     `json:"tag"`
	Digest     *string    `json:"digest"` // null: the tag was gone
	From       time.Time  `json:"from"`   // when it was first observed there
	Until      *time.Time `json:"until"`  // when it was first observed elsewhere; null: it still is there
}

// AdvisoriesBuild is what `tidewaiter advisories build` prints.
type AdvisoriesBuild struct {
	Snapshot   string         `json:"snapshot"` // digest of the file
	Sequence   int64          `json:"sequence"`
	Records    int            `json:"records"`   // advisories that can match
	Withdrawn  int            `json:"withdrawn"` // advisories that never match
	Ecosystems map[string]int `json:"ecosystems"`
	Rejected   []Rejected     `json:"rejected"`
	KEV        int            `json:"kev"`
	EPSS       int            `json:"epss"`
	Products   int            `json:"products"`
}

// AdvisoriesPull is what `tidewaiter advisories pull` prints.
type AdvisoriesPull struct {
	File     string      `json:"file"`     // where the snapshot was put
	Snapshot SnapshotRef `json:"snapshot"` // what it is
	Location string      `json:"location"` // where it was published: registry/repository@digest
}

// Rejected is an input that could not be used.
type Rejected struct {
	File   string `json:"file"`
	Reason string `json:"reason"`
}

// AdvisoriesStatus is what `tidewaiter advisories status` prints.
type AdvisoriesStatus struct {
	Snapshot   string         `json:"snapshot"`
	Sequence   int64          `json:"sequence"`
	Newest     time.Time      `json:"newest"` // newest modification among the advisories
	AgeHours   float64        `json:"ageHours"`
	Records    int            `json:"records"`
	Ecosystems map[string]int `json:"ecosystems"`
	KEV        int            `json:"kev"`
	EPSS       int            `json:"epss"`
	Products   int            `json:"products"`
	Bytes      int64          `json:"bytes"`
}

// ImageEntry is what `tidewaiter submit --wait` prints: what catalog knows of an
// image. Unknown is absent.
type ImageEntry struct {
	Image      string     `json:"image"`
	Tags       []string   `json:"tags"`    // that point at it now
	State      string     `json:"state"`   // "attested", "unsupported", "failed" and "gone" are ends; the list may grow
	Current    bool       `json:"current"` // what its repository offers now, see FleetReport
	Kind       string     `json:"kind,omitempty"`
	Platform   string     `json:"platform,omitempty"`
	Source     string     `json:"source,omitempty"`
	Verdict    string     `json:"verdict,omitempty"`
	Counts     *Counts    `json:"counts,omitempty"`
	Report     string     `json:"report,omitempty"`
	Sequence   int64      `json:"sequence,omitempty"`
	FirstSeen  time.Time  `json:"firstSeen"`          // when it was first heard of
	SignedAt   *time.Time `json:"signedAt,omitempty"` // when its statements were signed
	ValidUntil *time.Time `json:"validUntil,omitempty"`
}

// DeployedImport is what `tidewaiter deployed import --output json` prints.
type DeployedImport struct {
	Origin string `json:"origin"` // name of where they run
	Images int    `json:"images"` // how many run there now
}

// Rematch is what `tidewaiter rematch --output json` prints.
type Rematch struct {
	Images int64 `json:"images"` // how many are matched again
}

// KeyPair is what `tidewaiter keys generate --output json` prints: the two files
// that it wrote.
type KeyPair struct {
	For        string `json:"for"`        // what it signs
	PrivateKey string `json:"privateKey"` // path of the private key
	PublicKey  string `json:"publicKey"`  // path of the public key
}

// FleetReport is what `tidewaiter report` prints: the three figures of a fleet.
type FleetReport struct {
	Images        int           `json:"images"`          // current ones with a verdict
	Vulnerable    int           `json:"vulnerable"`      // with at least one finding
	ShareVuln     *float64      `json:"shareVulnerable"` // 0…1; null: no image yet
	Outdated      int           `json:"outdated"`        // with server software or an OS behind its latest version
	WithServers   int           `json:"withServers"`     // images in which lag could be measured
	ShareOutdated *float64      `json:"shareOutdated"`   // of WithServers; null: none
	Servers       []ServerLag   `json:"servers"`
	Verdicts      VerdictCounts `json:"verdicts"`
	Counts        Counts        `json:"counts"`
	Open          int           `json:"openProblems"`
	Unfinished    int           `json:"unfinished"` // images that have not reached an end
	// Registries are the last complete sweeps of the sources that are swept, with
	// what their registries lost; absent: nothing is swept, or sweeper was not asked.
	Registries []Sweep `json:"registries,omitempty"`
}

// VerdictCounts are images by verdict.
type VerdictCounts struct {
	Pass int `json:"pass"`
	Warn int `json:"warn"`
	Fail int `json:"fail"`
}

// ServerLag sums up one product over the fleet.
type ServerLag struct {
	Product    string   `json:"product"`
	Images     int      `json:"images"`
	Outdated   int      `json:"outdated"`
	EOL        int      `json:"eol"`
	Oldest     string   `json:"oldest"`
	Latest     string   `json:"latest,omitempty"`
	WorstDays  *int     `json:"worstDays,omitempty"`
	WorstLines *int     `json:"worstLines,omitempty"` // release lines that the worst is behind
	Versions   []string `json:"versions"`
}

// DeadLetter is one line of `tidewaiter dlq list --output json`.
type DeadLetter struct {
	ID        string    `json:"id"` // topic/partition/offset
	Topic     string    `json:"topic"`
	Service   string    `json:"service"`
	Partition int       `json:"partition"`
	Offset    int64     `json:"offset"`
	Time      time.Time `json:"time"`
	Reason    string    `json:"reason"`
	Attempts  int       `json:"attempts"`
	EventType string    `json:"eventType,omitempty"`
	Subject   string    `json:"subject,omitempty"`
	Origin    string    `json:"origin"` // topic/partition/offset it came from
	Replayed  bool      `json:"replayed"`

	ReplayedAt *time.Time `json:"replayedAt,omitempty"` // the last time
	ReplayedBy string     `json:"replayedBy,omitempty"` // who sent it again
	Dropped    bool       `json:"dropped,omitempty"`    // nobody has to look at it any more
	DroppedAt  *time.Time `json:"droppedAt,omitempty"`  // when it was dropped
	DroppedBy  string     `json:"droppedBy,omitempty"`  // who dropped it
	DropReason string     `json:"dropReason,omitempty"` // what was said when it was dropped
}

// DeadLetterSummary is one line of `tidewaiter dlq list --summary --output json`.
type DeadLetterSummary struct {
	Topic    string    `json:"topic"` // of the dead letters
	Service  string    `json:"service"`
	Reason   string    `json:"reason"`   // digests, addresses, quoted and long numbers left out ("…")
	Count    int       `json:"count"`    // how many there are
	Replayed int       `json:"replayed"` // of Count
	Dropped  int       `json:"dropped"`  // of Count
	Oldest   time.Time `json:"oldest"`   // when the first of them was given up
	Newest   time.Time `json:"newest"`   // when the last of them was given up
}

// DeadLetterContent is what `tidewaiter dlq show --output json` prints.
type DeadLetterContent struct {
	Letter  DeadLetter        `json:"letter"`
	Headers map[string]string `json:"headers"` // of Kafka, as they are
	Body    *string           `json:"body"`    // null: it is no UTF-8, see bodyBase64
	// BodyBase64 is the body where it is no UTF-8.
	BodyBase64 string `json:"bodyBase64,omitempty"`
}

// DeadLetterReplay is what `tidewaiter dlq replay --output json` prints: how
// many letters were sent again, and why others were not.
type DeadLetterReplay struct {
	Sent     int `json:"sent"`     // put back into their topics
	Found    int `json:"found"`    // found there: sent by a replay that was interrupted
	Replayed int `json:"replayed"` // left out: replayed before
	Dropped  int `json:"dropped"`  // left out: dropped
	Raw      int `json:"raw"`      // left out: bodies that never were events
	Busy     int `json:"busy"`     // left out: another replay has them in hand
	Gone     int `json:"gone"`     // left out: Kafka has deleted them in the meantime
}

// DeadLetterDrop is what `tidewaiter dlq drop --output json` prints.
type DeadLetterDrop struct {
	Dropped int `json:"dropped"` // dropped now
	Before  int `json:"before"`  // left out: dropped before
	Purged  int `json:"purged"`  // deleted from Kafka
}

// Privilege is a line of `tidewaiter privileges --output json`: what one service
// must be allowed on a server.
type Privilege struct {
	Service string   `json:"service"`
	User    string   `json:"user,omitempty"` // what it logs in as; absent: of registries, where that is free
	Kind    string   `json:"kind,omitempty"` // of Kafka: "topic" or "group"
	On      string   `json:"on"`             // a topic, group, schema, table, pattern of keys, or resource of a registry's scope
	Allowed []string `json:"allowed"`        // what it may do there, in the server's words
}

// States of a sweep.
const (
	SweepRunning    = "running"
	SweepComplete   = "complete"   // everything was listed
	SweepIncomplete = "incomplete" // some repositories could not be listed; nothing is said of them
	SweepFailed     = "failed"     // the registry could not be listed
)

// Sweep is what `tidewaiter sweep` prints: how far one look through a registry
// is, and what it found.
type Sweep struct {
	Source      string       `json:"source"`
	Registry    string       `json:"registry"`
	DryRun      bool         `json:"dryRun"`            // nothing was sent and nothing remembered
	State       string       `json:"state"`             // SweepRunning …
	Phase       string       `json:"phase"`             // "repositories", "tags", "statements", "deleted" or "done"
	Message     string       `json:"message,omitempty"` // what it waits for, or why it is not complete
	StartedAt   time.Time    `json:"startedAt"`         // names the sweep within its source
	FinishedAt  *time.Time   `json:"finishedAt"`        // null: it is not finished
	SecondsLeft *int64       `json:"secondsLeft"`       // an estimate; null: there is none
	Figures     SweepFigures `json:"figures"`
	Unlisted    []Unlisted   `json:"unlisted"` // what could not be listed, at most 100 repositories and 100 tags
}

// SweepFigures are the counts of a sweep.
type SweepFigures struct {
	Repositories int `json:"repositories"`      // listed
	Tags         int `json:"tags"`              // listed
	Missed       int `json:"missed"`            // tags whose image was not known, and was pushed into the bulk lane
	Deleted      int `json:"deleted"`           // tags that are known and were not listed: hints that planner confirms
	Checked      int `json:"checked"`           // images whose statements were looked for
	Unstated     int `json:"unstated"`          // of them, those that lack some, or never had any
	Unasked      int `json:"unasked,omitempty"` // of Checked, those whose statements the registry did not tell
	Unlisted     int `json:"unlisted"`          // repositories that could not be listed
	Unread       int `json:"unread,omitempty"`  // tags of which the registry did not say where they point
	Changed      int `json:"changed"`           // tags that were pushed or moved since the last complete sweep
	Heard        int `json:"heard"`             // of them, those that a webhook told of
	Lost         int `json:"lost"`              // of them, those of which no webhook came within the source's grace
	Pending      int `json:"pending"`           // of them, those that are within it
	// ShareLost is Lost of Heard and Lost, 0…1; null: there were none.
	ShareLost *float64 `json:"shareLost"`
}

// Unlisted is a repository whose tags could not be listed, or one tag that could
// not be read.
type Unlisted struct {
	Repository string `json:"repository"`
	Tag        string `json:"tag,omitempty"` // absent: the repository as a whole
	Reason     string `json:"reason"`
}

// Severities of a ConfigProblem.
const (
	ConfigError   = "error"   // services do not start with it
	ConfigWarning = "warning" // they do, and somebody should look
)

// ConfigProblem is one entry of what `tidewaiter config check --output json`
// prints: a mistake in a configuration. It holds no secret.
type ConfigProblem struct {
	File     string `json:"file,omitempty"` // absent: the environment
	Line     int    `json:"line,omitempty"` // from 1; absent: of no line
	Path     string `json:"path,omitempty"` // of the setting, for example registries[0].caFile
	Problem  string `json:"problem"`        // what is wrong; values are not repeated where they may be secret
	Cure     string `json:"cure"`           // what to do about it
	Severity string `json:"severity"`       // "error" or "warning"
}
