package format

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"strings"
	"unicode"
	"unicode/utf8"

	"golang.org/x/term"

	"github.com/tidewaiter/tidewaiter/contracts"
)

// maxCell and maxGaps bound what a table shows; the other forms hold everything.
const (
	maxCell = 48 // runes
	maxGaps = 20
)

// Options say how tables are printed.
type Options struct {
	Plain bool // no colours, also on a terminal
}

// colour sequences (ECMA-48, SGR).
const (
	reset  = "\x1b[0m"
	bold   = "\x1b[1m"
	red    = "\x1b[31m"
	yellow = "\x1b[33m"
	blue   = "\x1b[34m"
	grey   = "\x1b[90m"
)

// painter colours text, or does not.
type painter bool

func (p painter) paint(colour, s string) string {
	if !p || colour == "" {
		return s
	}
	return colour + s + reset
}

// paints says whether colours suit w: a terminal whose user has not asked for
// none (no-color.org).
func paints(w io.Writer, o Options) painter {
	f, ok := w.(*os.File)
	_, no := os.LookupEnv("NO_COLOR")
	return painter(!o.Plain && !no && ok && term.IsTerminal(int(f.Fd())))
}

func severityColour(severity string) string {
	switch severity {
	case contracts.SeverityCritical:
		return bold + red
	case contracts.SeverityHigh:
		return red
	case contracts.SeverityMedium:
		return yellow
	case contracts.SeverityLow:
		return blue
	default:
		return grey
	}
}

// Findings prints a table of the findings that count, and their totals.
func Findings(w io.Writer, findings []contracts.Finding, o Options) error {
	out := bufio.NewWriter(w)
	printFindings(out, findings, paints(w, o))
	return out.Flush()
}

func writeTable(w io.Writer, scan *contracts.Scan, o Options) error {
	out := bufio.NewWriter(w)
	p := paints(w, o)
	fmt.Fprintln(out, p.paint(bold, clean(about(scan))))
	if scan.Image != nil {
		fmt.Fprintln(out, clean(scan.Image.Digest))
	}
	fmt.Fprintf(out, "Packages: %d. Advisories: %s (sequence %d)\n\n", len(scan.Packages), clean(scan.Snapshot.Digest), scan.Snapshot.Sequence)
	printFindings(out, scan.Findings, p)
	printLags(out, scan.Lags)
	printGaps(out, scan.Gaps)
	colour := ""
	switch scan.Verdict {
	case contracts.VerdictFail:
		colour = bold + red
	case contracts.VerdictWarn:
		colour = yellow
	}
	fmt.Fprintf(out, "\nVerdict: %s\n", p.paint(colour, clean(scan.Verdict)))
	for _, r := range scan.Reasons {
		fmt.Fprintln(out, "  "+clean(r))
	}
	return out.Flush()
}

// sameElsewhere says whether two findings are the same in two platforms of an
// image: they share a row.
func sameElsewhere(a, b *contracts.Finding) bool {
	return counts(a) && a.ID == b.ID && a.Package.PURL == b.Package.PURL && a.Platform != b.Platform &&
		a.Layer != nil && b.Layer != nil && a.Layer.Digest == b.Layer.Digest
}

func printFindings(out io.Writer, findings []contracts.Finding, p painter) {
	platforms := false
	for i := range findings {
		platforms = platforms || findings[i].Platform != ""
	}
	t := table{painter: p, header: []string{"SEVERITY", "ID", "PACKAGE", "VERSION", "FIXED IN", "KEV", "EPSS", "LAYER"}}
	if platforms {
		t.header = append(t.header, "PLATFORM")
	}
	var c contracts.Counts
	excused := 0
	for i := range findings {
		f := &findings[i]
		if !counts(f) {
			excused++
			continue
		}
		c.Add(f)
		row := []string{f.Severity, f.ID, f.Package.Name, f.Package.Version, fixed(f.Fixed), mark(f.KEV, "KEV"), f.EPSS, layer(f.Layer)}
		if platforms {
			row = append(row, f.Platform)
		}
		if platforms && i > 0 && sameElsewhere(&findings[i-1], f) && len(t.rows) > 0 {
			last := t.rows[len(t.rows)-1]
			last[len(last)-1] += ", " + f.Platform
			continue
		}
		t.rows = append(t.rows, row)
		t.colours = append(t.colours, severityColour(f.Severity))
	}
	if len(t.rows) > 0 {
		t.print(out)
		fmt.Fprintln(out)
	}
	fmt.Fprintf(out, "Findings: %d (%d critical, %d high, %d medium, %d low, %d unknown); %d can be fixed, %d known to be exploited\n",
		c.Total(), c.Critical, c.High, c.Medium, c.Low, c.Unknown, c.Fixable, c.KEV)
	if excused > 0 {
		fmt.Fprintf(out, "Beside these, not affecting it or excused by the policy: %d\n", excused)
	}
}

func printLags(out io.Writer, lags []contracts.Lag) {
	if len(lags) == 0 {
		return
	}
	t := table{header: []string{"PRODUCT", "VERSION", "LATEST", "LATEST OF ITS LINE", "BEHIND", "END OF LIFE"}}
	for _, l := range lags {
		behind := "unknown"
		if l.BehindDays != nil {
			behind = fmt.Sprintf("%d days", *l.BehindDays)
		}
		end := l.EndOfLife
		if l.EOL {
			end += " (ended)"
		}
		t.rows = append(t.rows, []string{l.Product, l.Version, l.Latest, l.LatestInCycle, behind, end})
	}
	fmt.Fprintln(out)
	t.print(out)
}

func printGaps(out io.Writer, gaps []contracts.Gap) {
	if len(gaps) == 0 {
		return
	}
	fmt.Fprintf(out, "\nNot looked at, so not clean but unknown (%d):\n", len(gaps))
	for i, g := range gaps {
		if i == maxGaps {
			fmt.Fprintf(out, "  and %d more\n", len(gaps)-maxGaps)
			return
		}
		fmt.Fprintln(out, "  "+clean(strings.TrimSpace(short(g.Layer)+" "+g.Path)+": "+g.Reason))
	}
}

func fixed(versions []string) string {
	switch {
	case len(versions) > 2:
		return fmt.Sprintf("%s, %s, +%d", versions[0], versions[1], len(versions)-2)
	default:
		return strings.Join(versions, ", ")
	}
}

func mark(yes bool, s string) string {
	if yes {
		return s
	}
	return ""
}

func layer(l *contracts.LayerRef) string {
	if l == nil {
		return ""
	}
	return fmt.Sprintf("%d %s", l.Index, short(l.Digest))
}

// short is a digest as people compare it.
func short(digest string) string {
	hex, ok := strings.CutPrefix(digest, "sha256:")
	if !ok || len(hex) < 12 {
		return digest
	}
	return hex[:12]
}

// table is printed with columns as wide as they need to be.
type table struct {
	painter
	header  []string
	rows    [][]string
	colours []string // of each row's first cell
}

func (t *table) print(out io.Writer) {
	widths := make([]int, len(t.header))
	for _, row := range append([][]string{t.header}, t.rows...) {
		for i := range row {
			row[i] = cell(row[i])
			widths[i] = max(widths[i], utf8.RuneCountInString(row[i]))
		}
	}
	t.line(out, widths, t.header, bold)
	for i, row := range t.rows {
		colour := ""
		if t.colours != nil {
			colour = t.colours[i]
		}
		t.line(out, widths, row, colour)
	}
}

func (t *table) line(out io.Writer, widths []int, row []string, colour string) {
	var b strings.Builder
	for i, s := range row {
		if i > 0 {
			b.WriteString("  ")
		}
		padding := strings.Repeat(" ", widths[i]-utf8.RuneCountInString(s))
		if i == 0 {
			s = t.paint(colour, s)
		}
		b.WriteString(s + padding)
	}
	fmt.Fprintln(out, strings.TrimRight(b.String(), " "))
}

func cell(s string) string {
	if s == "" {
		return "-"
	}
	s = clean(s)
	if runes := []rune(s); len(runes) > maxCell {
		return string(runes[:maxCell-1]) + "…"
	}
	return s
}

// clean replaces what could command a terminal: names of packages and paths
// are chosen by whoever made the image.
func clean(s string) string {
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return '�'
		}
		return r
	}, s)
}
