package format

import (
	"fmt"
	"io"
	"net/url"
	"strconv"
	"strings"

	"github.com/owenrumney/go-sarif/v3/pkg/report/v210/sarif"

	"github.com/tidewaiter/tidewaiter/contracts"
)

const informationURI = "https://tidewaiter.dev/"

// writeSARIF writes SARIF 2.1.0 (OASIS): a rule for each vulnerability, a
// result for each finding. Findings that do not count are suppressed results,
// with the reason.
func writeSARIF(w io.Writer, scan *contracts.Scan) error {
	report := sarif.NewReport()
	run := sarif.NewRunWithInformationURI("tidewaiter", informationURI)
	run.Properties = sarif.NewPropertyBag()
	run.Properties.Properties = sarif.Properties{
		"subject": about(scan), "inventory": scan.Inventory, "report": scan.Report, "verdict": scan.Verdict,
		"snapshot": scan.Snapshot.Digest, "sequence": scan.Snapshot.Sequence,
	}
	if scan.Image != nil {
		run.Properties.Properties["digest"] = scan.Image.Digest
	}
	known := map[string]int{}
	for i := range scan.Findings {
		f := &scan.Findings[i]
		index, ok := known[f.ID]
		if !ok {
			index = len(known)
			known[f.ID] = index
			describeRule(run.AddRule(f.ID), f)
		}
		run.AddResult(result(f, index, about(scan)))
	}
	report.AddRun(run)
	if err := report.PrettyWrite(w); err != nil {
		return fmt.Errorf("encode SARIF: %w", err)
	}
	return nil
}

func describeRule(rule *sarif.ReportingDescriptor, f *contracts.Finding) {
	text := f.Summary
	if text == "" {
		text = f.ID
	}
	rule.WithShortDescription(&sarif.MultiformatMessageString{Text: &text})
	rule.WithHelpURI("https://osv.dev/vulnerability/" + url.PathEscape(f.ID))
	rule.WithName(f.ID)
	rule.Properties = sarif.NewPropertyBag()
	rule.Properties.Tags = []string{"security", "vulnerability", f.Severity}
	rule.Properties.Properties = sarif.Properties{"security-severity": securitySeverity(f)}
	if len(f.Aliases) > 0 {
		rule.Properties.Properties["aliases"] = f.Aliases
	}
}

func result(f *contracts.Finding, rule int, subject string) *sarif.Result {
	r := sarif.NewRuleResult(f.ID)
	r.RuleIndex = rule
	r.Level = level(f.Severity)
	text := fmt.Sprintf("%s (%s) in %s %s", f.ID, f.Severity, f.Package.Name, f.Package.Version)
	switch {
	case len(f.Fixed) > 0:
		text += ", fixed in " + strings.Join(f.Fixed, ", ")
	default:
		text += ", no fix is known"
	}
	if f.KEV {
		text += "; known to be exploited"
	}
	r.WithMessage(sarif.NewTextMessage(text))
	at := subject
	if len(f.Paths) > 0 {
		at = f.Paths[0]
	}
	place := sarif.NewPhysicalLocation().
		WithArtifactLocation(sarif.NewSimpleArtifactLocation((&url.URL{Path: at}).String())).
		WithRegion(sarif.NewRegion().WithStartLine(1))
	location := sarif.NewLocationWithPhysicalLocation(place)
	name, kind := f.Package.PURL, "package"
	logical := sarif.NewLogicalLocation()
	logical.FullyQualifiedName, logical.Kind = &name, &kind
	location.LogicalLocations = append(location.LogicalLocations, logical)
	r.Locations = append(r.Locations, location)
	r.PartialFingerprints = map[string]string{
		"tidewaiter/v1": contracts.DigestOf([]byte(f.ID + "\n" + f.Package.PURL + "\n" + f.Platform)),
	}
	r.Properties = sarif.NewPropertyBag()
	r.Properties.Properties = sarif.Properties{"purl": f.Package.PURL, "kev": f.KEV, "status": f.Status}
	set := func(name, value string) {
		if value != "" {
			r.Properties.Properties[name] = value
		}
	}
	set("epss", f.EPSS)
	set("platform", f.Platform)
	set("vector", f.Vector)
	if f.Layer != nil {
		set("layer", f.Layer.Digest)
		set("instruction", f.Layer.Instruction)
	}
	if !counts(f) {
		kind, status, why := "external", "accepted", f.Status+": "+f.Reason
		r.Suppressions = append(r.Suppressions, &sarif.Suppression{Kind: &kind, Status: &status, Justification: &why})
	}
	return r
}

func level(severity string) string {
	switch severity {
	case contracts.SeverityCritical, contracts.SeverityHigh:
		return sarif.LevelError
	case contracts.SeverityLow:
		return sarif.LevelNote
	default:
		return sarif.LevelWarning
	}
}

// securitySeverity is a number from 0.0 to 10.0, as code scanning services
// read it; where no score is known, the middle of the severity's range (CVSS
// v3.1, section 5).
func securitySeverity(f *contracts.Finding) string {
	if f.Score != nil {
		return strconv.FormatFloat(*f.Score, 'f', 1, 64)
	}
	switch f.Severity {
	case contracts.SeverityCritical:
		return "9.5"
	case contracts.SeverityHigh:
		return "8.0"
	case contracts.SeverityMedium:
		return "5.5"
	case contracts.SeverityLow:
		return "2.0"
	default:
		return "0.0"
	}
}
