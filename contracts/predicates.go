package contracts

import "time"

// Predicate types of what is signed.
const (
	PredicateVuln = "https://cosign.sigstore.dev/attestation/vuln/v1"
	PredicateVSA  = "https://slsa.dev/verification_summary/v1"
)

// VerifierID is the verifier.id of our verification summaries.
const VerifierID = "https://tidewaiter.dev/verifier/v1"

// VulnPredicate is cosign's vulnerability scan predicate (cosign,
// specs/COSIGN_VULN_ATTESTATION_SPEC.md) with a small summary as its result.
type VulnPredicate struct {
	Invocation VulnInvocation `json:"invocation"`
	Scanner    VulnScanner    `json:"scanner"`
	Metadata   VulnMetadata   `json:"metadata"`
}

// VulnInvocation is the invocation of a VulnPredicate.
type VulnInvocation struct {
	URI        string `json:"uri"`
	EventID    string `json:"event_id"`
	BuilderID  string `json:"builder.id"`
	Parameters any    `json:"parameters"`
}

// VulnScanner is the scanner of a VulnPredicate.
type VulnScanner struct {
	URI     string      `json:"uri"`
	Version string      `json:"version"`
	DB      VulnDB      `json:"db"`
	Result  VulnSummary `json:"result"`
}

// VulnDB is the advisory snapshot of a VulnPredicate.
type VulnDB struct {
	URI     string `json:"uri"`
	Version string `json:"version"`
}

// VulnMetadata says when the scan ran.
type VulnMetadata struct {
	ScanStartedOn  time.Time `json:"scanStartedOn"`
	ScanFinishedOn time.Time `json:"scanFinishedOn"`
}

// VulnSummary is our scanner result: what a verifier needs, and the digest of
// everything else.
type VulnSummary struct {
	Verdict      string        `json:"verdict"`
	Reasons      []string      `json:"reasons,omitempty"`
	Counts       Counts        `json:"counts"`
	Top          []SummaryItem `json:"top,omitempty"` // the worst, at most 20
	Packages     int           `json:"packages"`
	Gaps         int           `json:"gaps"`
	Report       string        `json:"report"` // digest of the Report
	SBOM         string        `json:"sbom,omitempty"`
	Inventory    string        `json:"inventory"`
	Snapshot     SnapshotRef   `json:"snapshot"`
	SnapshotTime time.Time     `json:"snapshotTime"` // newest modification among its advisories
	Policy       string        `json:"policy"`
	ValidUntil   time.Time     `json:"validUntil"`
}

// SummaryItem is one finding in a VulnSummary.
type SummaryItem struct {
	ID       string `json:"id"`
	PURL     string `json:"purl"`
	Severity string `json:"severity"`
	Fixed    string `json:"fixed,omitempty"`
	KEV      bool   `json:"kev,omitempty"`
}

// VSAPredicate is a SLSA verification summary (slsa.dev/spec/v1.1/verification_summary)
// with two extension fields of our own, named by URI as in-toto asks.
type VSAPredicate struct {
	Verifier           VSAVerifier   `json:"verifier"`
	TimeVerified       time.Time     `json:"timeVerified"`
	ResourceURI        string        `json:"resourceUri"`
	Policy             VSAResource   `json:"policy"`
	InputAttestations  []VSAResource `json:"inputAttestations,omitempty"`
	VerificationResult string        `json:"verificationResult"` // "PASSED" or "FAILED"
	VerifiedLevels     []string      `json:"verifiedLevels"`
	SLSAVersion        string        `json:"slsaVersion,omitempty"`
	Tidewaiter         VSATidewaiter `json:"https://tidewaiter.dev/vsa/v1"`
}

// VSAVerifier names who verified.
type VSAVerifier struct {
	ID      string            `json:"id"`
	Version map[string]string `json:"version,omitempty"`
}

// VSAResource is an in-toto resource descriptor, as far as we use it.
type VSAResource struct {
	URI    string            `json:"uri,omitempty"`
	Digest map[string]string `json:"digest,omitempty"` // algorithm → hex
}

// VSATidewaiter is what gatekeepers need to know beyond SLSA's fields.
type VSATidewaiter struct {
	Verdict      string      `json:"verdict"`
	Counts       Counts      `json:"counts"`
	Snapshot     SnapshotRef `json:"snapshot"`
	SnapshotTime time.Time   `json:"snapshotTime"`
	Report       string      `json:"report"`
	ValidUntil   time.Time   `json:"validUntil"`
}
