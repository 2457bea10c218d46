package ticketer

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"unicode"

	"github.com/tidewaiter/tidewaiter/contracts"
)

// Bounds of a ticket's text. GitHub takes 256 characters of title and 65536 of
// body, GitLab 255 and more.
const (
	maxTitle           = 250
	maxVulnerabilities = 50
	maxImages          = 30
	maxVersions        = 20
	maxName            = 200 // characters of any foreign text
)

const endMarker = "<!-- /tidewaiter -->"

// beginMarker opens our part of a ticket's body. It names the claim that made
// the ticket, which nobody can know before the ticket exists: a ticket that
// somebody else made with a copy of it is always the younger one.
func beginMarker(key, claim string) string {
	return "<!-- tidewaiter problem=" + key + " claim=" + claim + " -->"
}

// commentMarker marks a comment by what it says since which revision.
func commentMarker(key string, revision int64, text string) string {
	sum := sha256.Sum256(fmt.Appendf(nil, "%s %d %s", key, revision, text))
	return "<!-- tidewaiter news=" + hex.EncodeToString(sum[:8]) + " -->"
}

// title says what to do, in one line.
func title(p contracts.Problem) string {
	name, owner := oneLine(p.Package), oneLine(p.Owner)
	s := fmt.Sprintf("No fix yet for %s in %s", name, owner)
	if len(p.FixedIn) > 0 {
		s = fmt.Sprintf("Update %s to %s in %s", name, list(p.FixedIn, " or ", oneLine), owner)
	}
	if r := []rune(s); len(r) > maxTitle {
		s = string(r[:maxTitle-1]) + "…"
	}
	return s
}

// text is our part of a ticket's body, markers included. Foreign text stands in
// code spans, where it can name nobody, link nowhere and give no command.
func text(p contracts.Problem, claim string) string {
	var b strings.Builder
	line := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	line("%s", beginMarker(p.Key, claim))
	if len(p.FixedIn) > 0 {
		line("**What to do first:** update %s (%s) to %s in the images of %s, and push them again.",
			code(p.Package), code(p.Ecosystem), list(p.FixedIn, " or ", code), code(p.Owner))
	} else {
		line("**What to do first:** there is no fixed version of %s (%s) yet. See whether the images of %s need it, or can do without what is vulnerable.",
			code(p.Package), code(p.Ecosystem), code(p.Owner))
	}
	line("")
	if p.KEV {
		line("- **Known to be exploited** (CISA KEV)")
	}
	line("- Severity: **%s**", severity(p.Severity))
	line("- Installed: %s", list(p.Versions, ", ", code))
	if len(p.FixedIn) > 0 {
		line("- Fixed in: %s", list(p.FixedIn, ", ", code))
	}
	if !p.OpenedAt.IsZero() {
		line("- Known here since: %s", p.OpenedAt.UTC().Format("2006-01-02 15:04 MST"))
	}
	line("\n### Vulnerabilities\n")
	for _, id := range head(p.Vulnerabilities, maxVulnerabilities) {
		line("- %s", link(id))
	}
	more(line, len(p.Vulnerabilities), maxVulnerabilities)
	line("\n### Images\n")
	for _, image := range head(p.Images, maxImages) {
		line("- %s", code(image))
	}
	more(line, max(p.ImageCount, len(p.Images)), maxImages)
	line("\nTidewaiter keeps the text above up to date, and closes this ticket when no current image has the problem any more. What you write below stays.")
	b.WriteString(endMarker)
	return b.String()
}

func more(line func(string, ...any), n, shown int) {
	if n > shown {
		line("- and %d more", n-shown)
	}
}

func head(s []string, n int) []string { return s[:min(len(s), n)] }

func list(s []string, between string, as func(string) string) string {
	var out []string
	for _, v := range head(s, maxVersions) {
		out = append(out, as(v))
	}
	if len(s) > maxVersions {
		out = append(out, "…")
	}
	return strings.Join(out, between)
}

// severity returns one of the known words.
func severity(s string) string {
	if contracts.SeverityRank(s) == 0 {
		return contracts.SeverityUnknown
	}
	return s
}

// oneLine takes out of a foreign text what could end the line or turn it
// around, and bounds it.
func oneLine(s string) string {
	s = strings.Map(func(r rune) rune {
		if unicode.IsControl(r) || unicode.Is(unicode.Cf, r) || unicode.Is(unicode.Zl, r) || unicode.Is(unicode.Zp, r) || r == unicode.ReplacementChar {
			return ' '
		}
		return r
	}, strings.ToValidUTF8(s, " "))
	s = strings.TrimSpace(s)
	if r := []rune(s); len(r) > maxName {
		s = string(r[:maxName-1]) + "…"
	}
	return s
}

// code returns a foreign text as a Markdown code span (CommonMark, "Code
// spans"): fenced by more backticks than it holds in a row.
func code(s string) string {
	s = oneLine(s)
	if s == "" {
		return "(unknown)"
	}
	longest, run := 0, 0
	for _, r := range s {
		if run++; r != '`' {
			run = 0
		}
		longest = max(longest, run)
	}
	fence := strings.Repeat("`", longest+1)
	if strings.HasPrefix(s, "`") || strings.HasSuffix(s, "`") {
		s = " " + s + " "
	}
	return fence + s + fence
}

var advisoryID = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._:-]{1,99}$`)

// link returns an advisory's id with a link to what is known about it.
func link(id string) string {
	switch {
	case !advisoryID.MatchString(id):
		return code(id)
	case strings.HasPrefix(id, "CVE-"):
		return fmt.Sprintf("[%s](https://nvd.nist.gov/vuln/detail/%s)", code(id), id)
	default:
		return fmt.Sprintf("[%s](https://osv.dev/vulnerability/%s)", code(id), id)
	}
}

// labels returns the labels of a ticket of ours, sorted.
func labels(p contracts.Problem, label string, r Rule) []string {
	out := append([]string{label, "severity:" + severity(p.Severity)}, r.Labels...)
	if p.KEV {
		out = append(out, "known-exploited")
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// relabelled returns a ticket's labels with ours changed from before to after
// and everybody else's as they are; nil: nothing changes.
func relabelled(present, before, after []string) *[]string {
	out := slices.Clone(after)
	for _, l := range present {
		if !slices.Contains(before, l) {
			out = append(out, l)
		}
	}
	slices.Sort(out)
	out = slices.Compact(out)
	if slices.Equal(out, slices.Sorted(slices.Values(present))) {
		return nil
	}
	return &out
}

// rewritten returns a ticket's body with our part replaced and what others
// wrote around it as it is; nil: nothing changes. Where our part was taken out,
// it is put at the beginning.
func rewritten(present, key, claim, ours string) *string {
	present = strings.ReplaceAll(present, "\r\n", "\n")
	out := ours
	before, rest, ok := strings.Cut(present, beginMarker(key, claim))
	if ok {
		_, after, ok := strings.Cut(rest, endMarker)
		if !ok {
			after = ""
		}
		out = before + ours + after
	} else if strings.TrimSpace(present) != "" {
		out = ours + "\n\n" + present
	}
	if out == present {
		return nil
	}
	return &out
}

// worse says in what respect a problem is worse than its ticket showed, as sentences.
func worse(r *record, p contracts.Problem) []string {
	var out []string
	if p.KEV && !r.KEV {
		out = append(out, "One of the vulnerabilities is now known to be exploited.")
	}
	if contracts.SeverityRank(p.Severity) > contracts.SeverityRank(r.Severity) {
		out = append(out, fmt.Sprintf("The severity rose from %s to %s.", severity(r.Severity), severity(p.Severity)))
	}
	return out
}
