package contracts

import (
	"embed"
	"fmt"
)

//go:generate go run ./internal/schemagen

// SchemaBase is where the schemas' ids live; the id of a schema is SchemaBase +
// name + SchemaSuffix.
const (
	SchemaBase   = "https://tidewaiter.dev/schemas/"
	SchemaSuffix = ".schema.json"
)

//go:embed schemas/*.json examples/*.json
var files embed.FS

// DocumentKind describes a document that is no event: what is stored as a
// blob, signed, or printed by the command line.
type DocumentKind struct {
	Name string     // for example "inventory"; names its schema and its example
	New  func() any // pointer to a zero value
}

// Documents lists every document that exists: those that are stored, those
// that are signed, those that the command line prints.
func Documents() []DocumentKind {
	return []DocumentKind{
		{"layer-report", func() any { return new(LayerReport) }},
		{"inventory", func() any { return new(Inventory) }},
		{"report", func() any { return new(Report) }},
		{"advisories-delta", func() any { return new(AdvisoriesDelta) }},
		{"predicate-vuln", func() any { return new(VulnPredicate) }},
		{"predicate-vsa", func() any { return new(VSAPredicate) }},
		{"cli-scan", func() any { return new(Scan) }},
		{"cli-verify", func() any { return new(Verification) }},
		{"cli-where", func() any { return new(TimelineEntry) }},
		{"cli-where-tags", func() any { return new(TagPeriod) }},
		{"cli-advisories-build", func() any { return new(AdvisoriesBuild) }},
		{"cli-advisories-status", func() any { return new(AdvisoriesStatus) }},
		{"cli-advisories-pull", func() any { return new(AdvisoriesPull) }},
		{"cli-submit", func() any { return new(ImageEntry) }},
		{"cli-rematch", func() any { return new(Rematch) }},
		{"cli-deployed-import", func() any { return new(DeployedImport) }},
		{"cli-keys-generate", func() any { return new(KeyPair) }},
		{"cli-webhook-decode", func() any { return new(WebhookDecode) }},
		{"cli-hooks-log", func() any { return new(Delivery) }},
		{"cli-hooks-status", func() any { return new(SourceStatus) }},
		{"cli-sweep", func() any { return new(Sweep) }},
		{"cli-report", func() any { return new(FleetReport) }},
		{"cli-dlq", func() any { return new(DeadLetter) }},
		{"cli-config-check", func() any { return new(ConfigProblem) }},
		{"cli-dlq-summary", func() any { return new(DeadLetterSummary) }},
		{"cli-privileges", func() any { return new(Privilege) }},
		{"cli-dlq-show", func() any { return new(DeadLetterContent) }},
		{"cli-dlq-replay", func() any { return new(DeadLetterReplay) }},
		{"cli-dlq-drop", func() any { return new(DeadLetterDrop) }},
	}
}

// Schema returns the JSON Schema (2020-12) of an event's data, by the event's
// name, or of a document.
func Schema(name string) ([]byte, error) {
	b, err := files.ReadFile("schemas/" + name + SchemaSuffix)
	if err != nil {
		return nil, fmt.Errorf("schema of %q: %w", name, err)
	}
	return b, nil
}

// Example returns the golden example of an event, as a whole CloudEvent in
// structured mode, or of a document.
func Example(name string) ([]byte, error) {
	b, err := files.ReadFile("examples/" + name + ".json")
	if err != nil {
		return nil, fmt.Errorf("example of %q: %w", name, err)
	}
	return b, nil
}
