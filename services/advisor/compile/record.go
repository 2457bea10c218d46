package compile

import (
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	gocvss20 "github.com/pandatix/go-cvss/20"
	gocvss30 "github.com/pandatix/go-cvss/30"
	gocvss31 "github.com/pandatix/go-cvss/31"
	gocvss40 "github.com/pandatix/go-cvss/40"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/services/advisor/snapshot"
)

// summaryLength bounds a summary in a report, in characters.
const summaryLength = 160

// osvRecord is what we read of an OSV record (OSV schema 1.7).
type osvRecord struct {
	ID               string          `json:"id"`
	Modified         string          `json:"modified"`
	Withdrawn        *string         `json:"withdrawn"`
	Aliases          []string        `json:"aliases"`
	Upstream         []string        `json:"upstream"`
	Related          []string        `json:"related"`
	Summary          string          `json:"summary"`
	Details          string          `json:"details"`
	Severity         []osvSeverity   `json:"severity"`
	DatabaseSpecific json.RawMessage `json:"database_specific"`
	Affected         []osvAffected   `json:"affected"`
}

type osvSeverity struct {
	Type  string `json:"type"`
	Score string `json:"score"`
}

type osvAffected struct {
	Package *struct {
		Ecosystem string `json:"ecosystem"`
		Name      string `json:"name"`
	} `json:"package"`
	Severity          []osvSeverity   `json:"severity"`
	Versions          []string        `json:"versions"`
	Ranges            []osvRange      `json:"ranges"`
	EcosystemSpecific json.RawMessage `json:"ecosystem_specific"`
	DatabaseSpecific  json.RawMessage `json:"database_specific"`
}

type osvRange struct {
	Type   string     `json:"type"`
	Events []osvEvent `json:"events"`
}

type osvEvent struct {
	Introduced   string `json:"introduced"`
	Fixed        string `json:"fixed"`
	LastAffected string `json:"last_affected"`
	Limit        string `json:"limit"`
}

// parse reads an OSV record.
func (b *builder) parse(content []byte) (*record, error) {
	var o osvRecord
	if err := json.Unmarshal(content, &o); err != nil {
		return nil, fmt.Errorf("not an OSV record: %w", err)
	}
	if o.ID == "" {
		return nil, errors.New("not an OSV record: no id")
	}
	modified, err := time.Parse(time.RFC3339, o.Modified)
	if err != nil {
		return nil, fmt.Errorf("not an OSV record: modified: %w", err)
	}
	r := &record{Advisory: snapshot.Advisory{ID: o.ID, Modified: modified.Unix()}}
	if o.Withdrawn != nil && *o.Withdrawn != "" {
		r.withdrawn = true
		return r, nil
	}
	r.Aliases = b.internAll(o.Aliases)
	r.Upstream = b.internAll(o.Upstream)
	r.Summary = summary(o.Summary, o.Details)
	r.Malware = strings.HasPrefix(o.ID, "MAL-") || slices.ContainsFunc(o.Aliases, func(a string) bool { return strings.HasPrefix(a, "MAL-") })
	b.distribution(r, &o)
	whole := rate(o.Severity, o.DatabaseSpecific, nil)
	if whole.severity == contracts.SeverityUnknown {
		whole.severity = wordFromSummary(o.Summary)
	}
	for i := range o.Affected {
		if a, ok := b.affected(&o.Affected[i], whole); ok {
			r.Affected = append(r.Affected, a)
		}
	}
	return r, nil
}

// distribution reads what distributions write in ways of their own: the errata
// of the Red Hat family name the vulnerabilities they answer as related ones,
// and their module in the summary.
func (b *builder) distribution(r *record, o *osvRecord) {
	errata := false
	for _, a := range o.Affected {
		if a.Package == nil {
			continue
		}
		switch base, _ := snapshot.Split(a.Package.Ecosystem); base {
		case "AlmaLinux", "Rocky Linux", "Red Hat", "openEuler", "Mageia":
			errata = true
		}
	}
	if !errata {
		return
	}
	if len(r.Upstream) == 0 && len(r.Aliases) == 0 {
		for _, id := range o.Related {
			if strings.HasPrefix(id, "CVE-") {
				r.Upstream = append(r.Upstream, b.intern(id))
			}
		}
	}
	r.Module = b.intern(modulesOf(o.Summary))
	// ALBA, ALEA, RLBA, RHEA …: bug fixes and enhancements.
	kind := strings.SplitN(r.ID, "-", 2)[0]
	r.Informational = len(kind) == 4 && (kind[2:] == "BA" || kind[2:] == "EA") && len(r.Upstream) == 0 && len(r.Aliases) == 0
}

var modulePattern = regexp.MustCompile(`^[a-z0-9][a-z0-9_-]*:[A-Za-z0-9][A-Za-z0-9._-]*$`)

// modulesOf returns the "name:stream" of a modular advisory's summary, for
// example of "Important: nodejs:18 security update", separated by spaces.
func modulesOf(summary string) string {
	var modules []string
	for _, word := range strings.Fields(summary) {
		if word = strings.Trim(word, ",."); modulePattern.MatchString(word) {
			modules = append(modules, word)
		}
	}
	return strings.Join(modules, " ")
}

func (b *builder) affected(o *osvAffected, whole rating) (snapshot.Affected, bool) {
	if o.Package == nil || o.Package.Name == "" || o.Package.Ecosystem == "" || o.Package.Ecosystem == "GIT" {
		return snapshot.Affected{}, false
	}
	r := whole
	if own := rate(o.Severity, o.DatabaseSpecific, o.EcosystemSpecific); own.severity != contracts.SeverityUnknown {
		r = own
	}
	a := snapshot.Affected{
		Ecosystem: b.intern(o.Package.Ecosystem), Name: b.intern(o.Package.Name), Versions: b.internAll(o.Versions),
		Severity: r.severity, Score: r.score, HasScore: r.scored, Vector: b.intern(r.vector),
	}
	for _, g := range o.Ranges {
		if g.Type != "SEMVER" && g.Type != "ECOSYSTEM" {
			continue
		}
		var events []snapshot.RangeEvent
		for _, e := range g.Events {
			for _, x := range [...]struct {
				kind    int
				version string
			}{{snapshot.Introduced, e.Introduced}, {snapshot.Fixed, e.Fixed}, {snapshot.LastAffected, e.LastAffected}, {snapshot.Limit, e.Limit}} {
				if x.version != "" && (x.kind != snapshot.Limit || x.version != "*") {
					events = append(events, snapshot.RangeEvent{Kind: x.kind, Version: b.intern(x.version)})
				}
			}
		}
		if len(events) > 0 {
			a.Ranges = append(a.Ranges, events)
		}
	}
	return a, len(a.Ranges) > 0 || len(a.Versions) > 0
}

func (b *builder) intern(s string) string {
	if old, ok := b.interned[s]; ok {
		return old
	}
	b.interned[s] = s
	return s
}

func (b *builder) internAll(list []string) []string {
	for i := range list {
		list[i] = b.intern(list[i])
	}
	return list
}

// summary returns one short line.
func summary(summary, details string) string {
	if summary == "" {
		summary = details
		if line, _, ok := strings.Cut(details, "\n"); ok && strings.TrimSpace(line) != "" {
			summary = line
		}
	}
	summary = strings.Join(strings.Fields(strings.ToValidUTF8(summary, "?")), " ")
	if utf8.RuneCountInString(summary) <= summaryLength {
		return summary
	}
	cut := string([]rune(summary)[:summaryLength-1])
	if i := strings.LastIndexByte(cut, ' '); i > summaryLength/2 {
		cut = cut[:i]
	}
	return cut + "…"
}

// rating is how bad an advisory says something is.
type rating struct {
	severity string
	score    float64
	scored   bool
	vector   string
}

// rate takes the highest score of the CVSS v3 and v4 vectors, else of the v2
// ones, else the database's own score, else its word.
func rate(vectors []osvSeverity, database, ecosystem json.RawMessage) rating {
	best := rating{severity: contracts.SeverityUnknown}
	for _, old := range []bool{false, true} {
		for _, v := range vectors {
			if (v.Type == "CVSS_V2") != old {
				continue
			}
			score, ok := Score(v.Score)
			if ok && (!best.scored || score > best.score) {
				best = rating{Severity(score), score, true, strings.TrimSpace(v.Score)}
			}
		}
		if best.scored {
			return best
		}
	}
	for _, raw := range []json.RawMessage{ecosystem, database} {
		if r := rateSpecific(raw); r.severity != contracts.SeverityUnknown {
			return r
		}
	}
	for _, v := range vectors { // Ubuntu and others give a word as a severity of their own type
		if word := Word(v.Score); word != contracts.SeverityUnknown {
			return rating{severity: word}
		}
	}
	return best
}

// rateSpecific reads the severity fields that databases use in their own objects.
func rateSpecific(raw json.RawMessage) rating {
	unknown := rating{severity: contracts.SeverityUnknown}
	if len(raw) == 0 {
		return unknown
	}
	var fields struct {
		Severity any `json:"severity"`
		CVSS     any `json:"cvss"`
		CVSSv2   any `json:"cvss_v2"`
		CVSSv3   any `json:"cvss_v3"`
		CVSSv4   any `json:"cvss_v4"`
	}
	if json.Unmarshal(raw, &fields) != nil {
		return unknown
	}
	best := unknown
	for _, value := range []any{fields.CVSSv4, fields.CVSSv3, fields.CVSS} {
		if r := rateValue(value); r.scored && (!best.scored || r.score > best.score) {
			best = r
		}
	}
	if !best.scored {
		best = rateValue(fields.CVSSv2)
	}
	if best.scored {
		return best
	}
	if word, ok := fields.Severity.(string); ok {
		return rating{severity: Word(word)}
	}
	return unknown
}

func rateValue(value any) rating {
	switch v := value.(type) {
	case float64:
		if v > 0 && v <= 10 {
			return rating{severity: Severity(v), score: v, scored: true}
		}
	case string:
		if score, ok := Score(v); ok {
			return rating{Severity(score), score, true, strings.TrimSpace(v)}
		}
		if score, err := strconv.ParseFloat(v, 64); err == nil && score > 0 && score <= 10 {
			return rating{severity: Severity(score), score: score, scored: true}
		}
	}
	return rating{severity: contracts.SeverityUnknown}
}

// Score returns the base score of a CVSS vector of version 2, 3.0, 3.1 or 4.0.
func Score(vector string) (float64, bool) {
	vector = strings.TrimSpace(vector)
	switch {
	case strings.HasPrefix(vector, "CVSS:4.0/"):
		if v, err := gocvss40.ParseVector(vector); err == nil {
			return v.Score(), true
		}
	case strings.HasPrefix(vector, "CVSS:3.1/"):
		if v, err := gocvss31.ParseVector(vector); err == nil {
			return v.BaseScore(), true
		}
	case strings.HasPrefix(vector, "CVSS:3.0/"):
		if v, err := gocvss30.ParseVector(vector); err == nil {
			return v.BaseScore(), true
		}
	default:
		vector = strings.TrimSuffix(strings.TrimPrefix(vector, "("), ")")
		if v, err := gocvss20.ParseVector(vector); err == nil {
			return v.BaseScore(), true
		}
	}
	return 0, false
}

// Severity returns the word for a CVSS score (CVSS v3.1, "Qualitative Severity
// Rating Scale"); a score of 0 is low.
func Severity(score float64) string {
	switch {
	case score >= 9:
		return contracts.SeverityCritical
	case score >= 7:
		return contracts.SeverityHigh
	case score >= 4:
		return contracts.SeverityMedium
	default:
		return contracts.SeverityLow
	}
}

// Word translates a database's word.
func Word(word string) string {
	switch strings.ToLower(strings.TrimSpace(word)) {
	case "critical":
		return contracts.SeverityCritical
	case "high", "important":
		return contracts.SeverityHigh
	case "medium", "moderate":
		return contracts.SeverityMedium
	case "low", "minor", "negligible", "unimportant":
		return contracts.SeverityLow
	default:
		return contracts.SeverityUnknown
	}
}

// wordFromSummary reads "Important: kernel security update".
func wordFromSummary(summary string) string {
	word, _, ok := strings.Cut(summary, ":")
	if !ok {
		return contracts.SeverityUnknown
	}
	return Word(word)
}
