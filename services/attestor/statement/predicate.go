package statement

import (
	"cmp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/tidewaiter/tidewaiter/contracts"
)

const (
	scannerURI   = "https://tidewaiter.dev/matcher"
	resultPassed = "PASSED"
	resultFailed = "FAILED"
	slsaVersion  = "1.1"
)

// Facts are what the predicates say.
type Facts struct {
	Image        contracts.Image
	Report       *contracts.Report
	ReportDigest string
	SBOM         string // digest of the SBOM; "": none
	Snapshot     contracts.SnapshotRef
	SnapshotTime time.Time // newest modification among its advisories; zero: unknown
	EventID      string    // of the event that asked for the statement
	Time         time.Time // when the verdict was reached
	ValidUntil   time.Time
}

// VulnPredicate returns the vulnerability scan that cosign's policies read,
// with a summary of at most MaxTop findings.
func VulnPredicate(f Facts) contracts.VulnPredicate {
	r := f.Report
	return contracts.VulnPredicate{
		Invocation: contracts.VulnInvocation{
			URI:       "https://tidewaiter.dev/attestor",
			EventID:   f.EventID,
			BuilderID: contracts.VerifierID,
		},
		Scanner: contracts.VulnScanner{
			URI:     scannerURI,
			Version: "analyzer " + r.Analyzer + ", matcher " + r.Matcher,
			DB: contracts.VulnDB{
				URI:     "urn:tidewaiter:advisories:" + f.Snapshot.Digest,
				Version: strconv.FormatInt(f.Snapshot.Sequence, 10),
			},
			Result: contracts.VulnSummary{
				Verdict:      r.Verdict,
				Reasons:      short(r.Reasons),
				Counts:       r.Counts,
				Top:          top(r.Findings),
				Packages:     r.Packages,
				Gaps:         len(r.Gaps),
				Report:       f.ReportDigest,
				SBOM:         f.SBOM,
				Inventory:    r.Inventory,
				Snapshot:     f.Snapshot,
				SnapshotTime: f.SnapshotTime.UTC(),
				Policy:       r.Policy,
				ValidUntil:   f.ValidUntil.UTC(),
			},
		},
		Metadata: contracts.VulnMetadata{ScanStartedOn: f.Time.UTC(), ScanFinishedOn: f.Time.UTC()},
	}
}

// VSAPredicate returns the SLSA verification summary. A warning passes.
func VSAPredicate(f Facts) contracts.VSAPredicate {
	r := f.Report
	result, levels := resultPassed, []string{"TIDEWAITER_" + strings.ToUpper(r.Verdict)}
	if r.Verdict == contracts.VerdictFail {
		result, levels = resultFailed, []string{}
	}
	return contracts.VSAPredicate{
		Verifier: contracts.VSAVerifier{
			ID:      contracts.VerifierID,
			Version: map[string]string{"analyzer": r.Analyzer, "matcher": r.Matcher},
		},
		TimeVerified: f.Time.UTC(),
		ResourceURI:  "oci://" + f.Image.String(),
		Policy:       resource("urn:tidewaiter:policy", r.Policy),
		InputAttestations: []contracts.VSAResource{
			resource("urn:tidewaiter:report", f.ReportDigest),
			resource("urn:tidewaiter:inventory", r.Inventory),
		},
		VerificationResult: result,
		VerifiedLevels:     levels,
		SLSAVersion:        slsaVersion,
		Tidewaiter: contracts.VSATidewaiter{
			Verdict:      r.Verdict,
			Counts:       r.Counts,
			Snapshot:     f.Snapshot,
			SnapshotTime: f.SnapshotTime.UTC(),
			Report:       f.ReportDigest,
			ValidUntil:   f.ValidUntil.UTC(),
		},
	}
}

func resource(uri, digest string) contracts.VSAResource {
	return contracts.VSAResource{URI: uri, Digest: map[string]string{"sha256": strings.TrimPrefix(digest, "sha256:")}}
}

// maxWord bounds every string in a summary, so that a hostile package name
// cannot push the predicate over its limit.
const maxWord = 512

// top returns the worst findings: known to be exploited first, then by
// severity, then those that can be mended, then by name.
func top(findings []contracts.Finding) []contracts.SummaryItem {
	sorted := make([]contracts.Finding, 0, len(findings))
	for _, f := range findings {
		if f.Status == contracts.StatusAffected {
			sorted = append(sorted, f)
		}
	}
	slices.SortStableFunc(sorted, func(a, b contracts.Finding) int {
		return cmp.Or(
			-compareBool(a.KEV, b.KEV),
			-cmp.Compare(contracts.SeverityRank(a.Severity), contracts.SeverityRank(b.Severity)),
			-compareBool(len(a.Fixed) > 0, len(b.Fixed) > 0),
			cmp.Compare(a.ID, b.ID),
			cmp.Compare(a.Package.PURL, b.Package.PURL),
		)
	})
	var out []contracts.SummaryItem
	for _, f := range sorted[:min(len(sorted), MaxTop)] {
		item := contracts.SummaryItem{ID: cut(f.ID), PURL: cut(f.Package.PURL), Severity: f.Severity, KEV: f.KEV}
		if len(f.Fixed) > 0 {
			item.Fixed = cut(f.Fixed[0])
		}
		out = append(out, item)
	}
	return out
}

func short(reasons []string) []string {
	var out []string
	for _, r := range reasons[:min(len(reasons), MaxTop)] {
		out = append(out, cut(r))
	}
	return out
}

func cut(s string) string {
	if len(s) <= maxWord {
		return s
	}
	return strings.ToValidUTF8(s[:maxWord], "") + "…"
}

func compareBool(a, b bool) int {
	switch {
	case a == b:
		return 0
	case a:
		return 1
	default:
		return -1
	}
}
