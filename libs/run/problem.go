package run

import (
	"cmp"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"

	"github.com/tidewaiter/tidewaiter/contracts"
)

// Problem is one mistake in a configuration.
type Problem = contracts.ConfigProblem

// ConfigError is a configuration with mistakes, one line each in its text.
// errors.Is(err, ErrConfig).
type ConfigError struct{ Problems []Problem }

func (e *ConfigError) Error() string {
	lines := make([]string, len(e.Problems))
	for i, p := range e.Problems {
		lines[i] = Line(p)
	}
	return strings.Join(lines, "\n")
}

// Unwrap returns ErrConfig.
func (e *ConfigError) Unwrap() error { return ErrConfig }

// Line returns a problem as one line: file:line: path: problem (cure).
func Line(p Problem) string {
	var b strings.Builder
	if p.File != "" {
		b.WriteString(p.File + ":")
		if p.Line > 0 {
			fmt.Fprintf(&b, "%d:", p.Line)
		}
		b.WriteByte(' ')
	}
	if p.Severity == contracts.ConfigWarning {
		b.WriteString("warning: ")
	}
	if p.Path != "" {
		b.WriteString(p.Path + ": ")
	}
	fmt.Fprintf(&b, "%s (%s)", p.Problem, p.Cure)
	return b.String()
}

// problems returns those that are mistakes as an error, nil where there are none.
func problemsError(list []Problem) error {
	list = slices.DeleteFunc(slices.Clone(list), func(p Problem) bool { return p.Severity == contracts.ConfigWarning })
	if len(list) == 0 {
		return nil
	}
	sortProblems(list)
	return &ConfigError{list}
}

func sortProblems(list []Problem) {
	slices.SortStableFunc(list, func(a, b Problem) int {
		return cmp.Or(cmp.Compare(a.Line, b.Line), cmp.Compare(a.Path, b.Path), cmp.Compare(a.Severity, b.Severity))
	})
}

// userinfo finds credentials in what looks like an address: user:password@.
var userinfo = regexp.MustCompile(`[^\s"'/@:]*:[^\s"'/@][^\s"'@]*@`)

// redact hides what looks like credentials in a text that quotes a setting.
func redact(text string) string { return userinfo.ReplaceAllString(text, "xxxxx@") }

// flatten returns the messages of an error that joins several, each with what
// was wrapped around the join.
func flatten(err error) []string {
	if err == nil {
		return nil
	}
	if e, ok := err.(interface{ Unwrap() []error }); ok {
		var out []string
		for _, one := range e.Unwrap() {
			out = append(out, flatten(one)...)
		}
		if len(out) > 1 || joins(err, out) {
			return out
		}
		return []string{err.Error()}
	}
	inner := errors.Unwrap(err)
	if inner == nil {
		return []string{err.Error()}
	}
	parts := flatten(inner)
	around, ok := strings.CutSuffix(err.Error(), inner.Error())
	if len(parts) < 2 || !ok {
		return []string{err.Error()}
	}
	for i := range parts {
		parts[i] = around + parts[i]
	}
	return parts
}

// joins says whether the text of err is that of its parts and nothing more.
func joins(err error, parts []string) bool { return err.Error() == strings.Join(parts, "\n") }

// imperatives begin the part of a message that says what to do.
var imperatives = regexp.MustCompile(`(?:, |; |: | \()((?:want|name|set|list|keep|use|write|add|give|change|it must|it needs|they belong|must|at least|at most|exactly|known|known are|need|` +
	`one of|only|likely|host:port|owner/|the project's|the name in)\b.*)$`)

// splitCure parts what is wrong from what to do, in a message of Validate.
func splitCure(message, path string) (problem, cure string) {
	if m := imperatives.FindStringSubmatchIndex(message); m != nil {
		return message[:m[0]], strings.TrimSuffix(message[m[2]:], ")")
	}
	if path == "" {
		return message, "change it in the configuration"
	}
	return message, "change " + path
}

// nearest returns the known name that was likely meant, "" for none.
func nearest(name string, known []string) string {
	best, bestDistance := "", max(2, len(name)/3)+1
	for _, k := range known {
		if strings.EqualFold(k, name) {
			return k
		}
		if d := distance(name, k); d < bestDistance {
			best, bestDistance = k, d
		}
	}
	return best
}

// distance is how many letters must be changed, added or left out to make b of a.
func distance(a, b string) int {
	previous := make([]int, len(b)+1)
	for j := range previous {
		previous[j] = j
	}
	for i := range len(a) {
		current := make([]int, len(b)+1)
		current[0] = i + 1
		for j := range len(b) {
			change := previous[j]
			if a[i] != b[j] {
				change++
			}
			current[j+1] = min(change, previous[j+1]+1, current[j]+1)
		}
		previous = current
	}
	return previous[len(b)]
}
