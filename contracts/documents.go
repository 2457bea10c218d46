package contracts

// LayerReport is what analysis of one layer found: raw facts, before anything
// is known about the image around it. Stored as a blob (canonical JSON).
type LayerReport struct {
	Analyzer string         `json:"analyzer"` // version
	Digest   string         `json:"digest"`
	DiffID   string         `json:"diffId,omitempty"` // absent: the layer could not be read to its end
	Bytes    int64          `json:"bytes"`            // uncompressed
	Entries  int            `json:"entries"`
	Packages []LayerPackage `json:"packages,omitempty"`
	// Databases are package databases as this layer leaves them; each replaces
	// the same file of a lower layer as a whole.
	Databases []PackageDatabase `json:"databases,omitempty"`
	OSRelease *OSRelease        `json:"osRelease,omitempty"`
	Whiteouts []string          `json:"whiteouts,omitempty"` // paths removed from lower layers
	Opaque    []string          `json:"opaque,omitempty"`    // directories whose lower content is hidden
	// Replaced are the paths of lower layers' packages that this layer may
	// overwrite: every regular file, link or non-directory it holds at a path
	// that an extractor would look at.
	Replaced []string `json:"replaced,omitempty"`
	Gaps     []Gap    `json:"gaps,omitempty"`
}

// LayerPackage is a package found in files of a layer.
type LayerPackage struct {
	Type      string   `json:"type"` // purl type: "npm", "pypi", "maven", "golang", "bitnami" (server software), …
	Name      string   `json:"name"` // as the ecosystem writes it; Maven: group:artifact
	Version   string   `json:"version"`
	PURL      string   `json:"purl"`
	Ecosystem string   `json:"ecosystem"`         // OSV's name
	Paths     []string `json:"paths"`             // files that prove it; nested archives joined with "!/"
	Server    bool     `json:"server,omitempty"`  // server software outside any package manager
	Product   string   `json:"product,omitempty"` // endoflife.date's name, for server software
}

// PackageDatabase is one file of a system package manager, or one file of
// dpkg's status.d.
type PackageDatabase struct {
	Kind     string          `json:"kind"` // "dpkg", "apk", "rpm"
	Path     string          `json:"path"`
	Packages []SystemPackage `json:"packages"` // empty: the database is there and lists nothing
}

// SystemPackage is one entry of a package database, without what depends on
// the distribution (purl and ecosystem are made when layers are merged).
type SystemPackage struct {
	Name          string `json:"name"`
	Version       string `json:"version"` // full, with epoch where there is one
	Source        string `json:"source,omitempty"`
	SourceVersion string `json:"sourceVersion,omitempty"`
	Arch          string `json:"arch,omitempty"`
	Module        string `json:"module,omitempty"` // rpm modularity label
}

// OSRelease is what os-release says (freedesktop.org, os-release(5)).
type OSRelease struct {
	Path       string `json:"path"`
	ID         string `json:"id"`
	IDLike     string `json:"idLike,omitempty"`
	VersionID  string `json:"versionId,omitempty"`
	Codename   string `json:"codename,omitempty"`
	PrettyName string `json:"prettyName,omitempty"`
}

// Gap is something that was not looked at: what it covers is never "clean".
type Gap struct {
	Layer  string `json:"layer,omitempty"` // layer digest, or the part's digest in an index
	Path   string `json:"path,omitempty"`
	Reason string `json:"reason"` // a code and a few words, for example "limit: more than 1000000 entries"
}

// LayerRef says which layer of an image something came from.
type LayerRef struct {
	Index       int    `json:"index"` // 0 is the lowest
	Digest      string `json:"digest"`
	DiffID      string `json:"diffID,omitempty"`
	Instruction string `json:"instruction,omitempty"`
}

// Package is a package in an image.
type Package struct {
	PURL          string    `json:"purl"`
	Name          string    `json:"name"`
	Version       string    `json:"version"`
	Ecosystem     string    `json:"ecosystem"`               // OSV's name with release, for example "Debian:12"
	Source        string    `json:"source,omitempty"`        // source package, where the distribution's advisories name it
	SourceVersion string    `json:"sourceVersion,omitempty"` // where it differs from Version
	Arch          string    `json:"arch,omitempty"`
	Module        string    `json:"module,omitempty"`
	Server        bool      `json:"server,omitempty"`
	Product       string    `json:"product,omitempty"`
	Paths         []string  `json:"paths,omitempty"`
	Layer         *LayerRef `json:"layer,omitempty"`
}

// Inventory is what an image consists of. It belongs to the digest alone,
// whatever repository holds it, and carries no clocks. Stored as a blob.
type Inventory struct {
	Digest    string          `json:"digest"` // of the manifest or index
	Kind      string          `json:"kind"`
	MediaType string          `json:"mediaType"`
	Platform  *Platform       `json:"platform,omitempty"`
	Analyzer  string          `json:"analyzer"`
	OS        *OSRelease      `json:"os,omitempty"`
	Layers    []LayerRef      `json:"layers,omitempty"`
	Packages  []Package       `json:"packages,omitempty"`
	Parts     []InventoryPart `json:"parts,omitempty"` // of an index
	Gaps      []Gap           `json:"gaps,omitempty"`
}

// InventoryPart is one scanned platform of an index.
type InventoryPart struct {
	Digest    string    `json:"digest"`
	Platform  *Platform `json:"platform,omitempty"`
	Inventory string    `json:"inventory"` // digest of its Inventory
	Packages  int       `json:"packages"`
}

// Severities, worst first.
const (
	SeverityCritical = "critical"
	SeverityHigh     = "high"
	SeverityMedium   = "medium"
	SeverityLow      = "low"
	SeverityUnknown  = "unknown"
)

// SeverityRank orders severities: unknown 0 … critical 4.
func SeverityRank(s string) int {
	switch s {
	case SeverityCritical:
		return 4
	case SeverityHigh:
		return 3
	case SeverityMedium:
		return 2
	case SeverityLow:
		return 1
	default:
		return 0
	}
}

// Statuses of a finding (OpenVEX, "Status Labels").
const (
	StatusAffected           = "affected"
	StatusNotAffected        = "not_affected"
	StatusFixed              = "fixed"
	StatusUnderInvestigation = "under_investigation"
)

// FindingPackage names the package of a finding.
type FindingPackage struct {
	PURL      string `json:"purl"`
	Name      string `json:"name"`
	Version   string `json:"version"`
	Ecosystem string `json:"ecosystem"`
}

// Finding is one vulnerability of one package in an image.
type Finding struct {
	ID       string         `json:"id"` // CVE where there is one, else the advisory's own
	Aliases  []string       `json:"aliases,omitempty"`
	Summary  string         `json:"summary,omitempty"`
	Package  FindingPackage `json:"package"`
	Severity string         `json:"severity"`
	Score    *float64       `json:"score,omitempty"`  // CVSS base score; absent: unknown
	Vector   string         `json:"vector,omitempty"` // the CVSS vector the score came from
	Fixed    []string       `json:"fixed,omitempty"`  // versions that mend it
	KEV      bool           `json:"kev"`
	EPSS     string         `json:"epss,omitempty"` // band, for example ">=0.5"; absent: no known score
	Malware  bool           `json:"malware,omitempty"`
	Status   string         `json:"status"`
	Reason   string         `json:"reason,omitempty"` // which advisory and range said so
	Layer    *LayerRef      `json:"layer,omitempty"`
	Paths    []string       `json:"paths,omitempty"`
	Platform string         `json:"platform,omitempty"` // in an index: os/architecture
}

// Lag says how far a product runs behind (endoflife.date).
type Lag struct {
	Product       string    `json:"product"`
	Version       string    `json:"version"`
	Cycle         string    `json:"cycle,omitempty"`
	Latest        string    `json:"latest,omitempty"`        // newest of all cycles
	LatestInCycle string    `json:"latestInCycle,omitempty"` // newest of its own cycle
	EndOfLife     string    `json:"endOfLife,omitempty"`     // date YYYY-MM-DD on which its cycle ended or will end, or "ended"
	EOL           bool      `json:"eol"`                     // as of the snapshot
	Outdated      bool      `json:"outdated"`
	BehindDays    *int      `json:"behindDays,omitempty"`  // between the releases of version's cycle-latest and latest; absent: unknown
	LinesBehind   *int      `json:"linesBehind,omitempty"` // release lines newer than version's own; absent: unknown
	Layer         *LayerRef `json:"layer,omitempty"`
}

// AdvisoriesDelta says whose match results can differ between two snapshots.
// All lists are sorted. Stored as a blob.
type AdvisoriesDelta struct {
	Previous   SnapshotRef    `json:"previous"`
	Snapshot   SnapshotRef    `json:"snapshot"`
	Packages   []DeltaPackage `json:"packages"`
	Ecosystems []string       `json:"ecosystems"` // with release ("Debian:12"); of these, all packages: advisories exist now, or no more
	Products   []string       `json:"products"`   // by their names at endoflife.date: release lines changed, or one has ended since
}

// DeltaPackage is one package name whose advisories changed, or what is known
// about the exploitation of the vulnerabilities that they name.
type DeltaPackage struct {
	Ecosystem string   `json:"ecosystem"` // without release
	Name      string   `json:"name"`      // as the ecosystem's advisories compare it
	Releases  []string `json:"releases"`  // "" is all of them
}

// Report is the verdict on an image in full. It carries no clocks: the same
// inventory, touching advisories, versions and policy give the same bytes.
// Stored as a blob and attached to the image as a plain referrer.
type Report struct {
	Digest    string       `json:"digest"` // of the image
	Kind      string       `json:"kind"`
	Platform  *Platform    `json:"platform,omitempty"`
	Inventory string       `json:"inventory"` // digest of the Inventory
	Analyzer  string       `json:"analyzer"`
	Matcher   string       `json:"matcher"`
	Policy    string       `json:"policy"` // digest of the policy
	Verdict   string       `json:"verdict"`
	Reasons   []string     `json:"reasons,omitempty"`
	Counts    Counts       `json:"counts"`
	Packages  int          `json:"packages"`
	Findings  []Finding    `json:"findings"`
	Lags      []Lag        `json:"lags,omitempty"`
	Parts     []ReportPart `json:"parts,omitempty"` // of an index
	Gaps      []Gap        `json:"gaps,omitempty"`
}

// ReportPart sums up one platform of an index.
type ReportPart struct {
	Digest   string    `json:"digest"`
	Platform *Platform `json:"platform,omitempty"`
	Counts   Counts    `json:"counts"`
	Packages int       `json:"packages"`
}

// Media types of what is attached to images.
const (
	MediaTypeReport     = "application/vnd.tidewaiter.report.v1+json"
	MediaTypeAdvisories = "application/vnd.tidewaiter.advisories.v1" // artifactType and layer of a published snapshot
	MediaTypeCycloneDX  = "application/vnd.cyclonedx+json"
	MediaTypeBundle     = "application/vnd.dev.sigstore.bundle.v0.3+json"
)

// AnnotationOwner marks manifests that Tidewaiter itself pushed.
const AnnotationOwner = "dev.tidewaiter.owner"
