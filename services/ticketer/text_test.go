package ticketer

import (
	"regexp"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/tidewaiter/tidewaiter/contracts"
)

func TestCode(t *testing.T) {
	for in, want := range map[string]string{
		"@angular/core":    "`@angular/core`",
		"a`b":              "``a`b``",
		"`a``b":            "``` `a``b ```",
		"x\n/close":        "`x /close`",
		"":                 "(unknown)",
		"\u202eevil\u0000": "`evil`",
		"\xff":             "(unknown)",
	} {
		if got := code(in); got != want {
			t.Errorf("%q: got %q, want %q", in, got, want)
		}
	}
}

func TestLink(t *testing.T) {
	for in, want := range map[string]string{
		"CVE-2021-44228": "[`CVE-2021-44228`](https://nvd.nist.gov/vuln/detail/CVE-2021-44228)",
		"DSA-5000-1":     "[`DSA-5000-1`](https://osv.dev/vulnerability/DSA-5000-1)",
		"x](evil)":       "`x](evil)`",
	} {
		if got := link(in); got != want {
			t.Errorf("%q: got %q, want %q", in, got, want)
		}
	}
}

// Caps hold, and say what was left out.
func TestLongText(t *testing.T) {
	p := contracts.Problem{Key: "00", Package: strings.Repeat("p", 1000), Owner: strings.Repeat("o", 1000), FixedIn: []string{"1"}, ImageCount: 5000}
	for range 200 {
		p.Vulnerabilities = append(p.Vulnerabilities, "CVE-2021-"+strings.Repeat("1", 80))
		p.Images = append(p.Images, strings.Repeat("i", 300))
		p.Versions = append(p.Versions, strings.Repeat("v", 300))
	}
	body := text(p, "c")
	if len(body) > 60_000 || !strings.Contains(body, "- and 150 more") || !strings.Contains(body, "- and 4970 more") {
		t.Errorf("%d bytes: %s", len(body), body)
	}
	if n := utf8.RuneCountInString(title(p)); n > maxTitle {
		t.Errorf("title has %d characters", n)
	}
}

func TestUnfixed(t *testing.T) {
	p := contracts.Problem{Key: "00", Package: "openssl", Owner: "r/a"}
	if got := title(p); got != "No fix yet for openssl in r/a" {
		t.Errorf("got %q", got)
	}
	if got := text(p, "c"); !strings.Contains(got, "there is no fixed version of `openssl`") || strings.Contains(got, "Fixed in") {
		t.Errorf("got %q", got)
	}
}

func TestRewritten(t *testing.T) {
	begin := beginMarker("00", "c")
	ours := begin + "\nnew\n" + endMarker
	for name, c := range map[string]struct{ present, want string }{
		"around":    {"above\r\n" + begin + "\r\nold\r\n" + endMarker + "\r\nbelow", "above\n" + ours + "\nbelow"},
		"no end":    {begin + "\nold", ours},
		"taken out": {"mine", ours + "\n\nmine"},
		"empty":     {" \n", ours},
		"the same":  {"a\r\n" + begin + "\r\nnew\r\n" + endMarker, ""},
	} {
		got := rewritten(c.present, "00", "c", ours)
		if c.want == "" && got != nil || c.want != "" && (got == nil || *got != c.want) {
			t.Errorf("%s: got %v, want %q", name, got, c.want)
		}
	}
}

func TestRelabelled(t *testing.T) {
	got := relabelled([]string{"a", "theirs"}, []string{"a"}, []string{"b"})
	if got == nil || !slices.Equal(*got, []string{"b", "theirs"}) {
		t.Errorf("got %v", got)
	}
	if got := relabelled([]string{"theirs", "b"}, []string{"b"}, []string{"b"}); got != nil {
		t.Errorf("got %v", *got)
	}
}

// FuzzText: whatever names are, they stay in their code spans: no line of the
// text begins with a command, and nothing outside code spans names anybody.
func FuzzText(f *testing.F) {
	f.Add("@team", "/close", "--> <img src=x onerror=alert(1)>", "CVE-1")
	f.Add("a`b``c```", "1.0\r\n# title", "#1 !2", "](http://evil)")
	f.Fuzz(func(t *testing.T, name, version, owner, id string) {
		p := contracts.Problem{
			Key: "00", Package: name, Owner: owner, Ecosystem: version, Versions: []string{version}, FixedIn: []string{version},
			Vulnerabilities: []string{id}, Images: []string{owner},
		}
		s := title(p)
		if strings.ContainsAny(s, "\r\n") || !utf8.ValidString(s) || utf8.RuneCountInString(s) > maxTitle {
			t.Errorf("title %q", s)
		}
		body := text(p, "c")
		if !utf8.ValidString(body) || strings.Count(body, "\n") != 16 {
			t.Errorf("%d lines: %q", strings.Count(body, "\n"), body)
		}
		plain := withoutCode(body)
		if strings.ContainsAny(plain, "@!`\x00") && strings.Count(plain, "!") != 2 || strings.Count(plain, "#") != 6 || strings.Count(plain, "<") != 2 {
			t.Errorf("outside code: %q in %q", plain, body)
		}
	})
}

var fences = regexp.MustCompile("`+")

// withoutCode takes the code spans out of a text, as CommonMark finds them: a
// run of backticks up to the next run of the same length.
func withoutCode(s string) string {
	var b strings.Builder
	for {
		open := fences.FindStringIndex(s)
		if open == nil {
			b.WriteString(s)
			return b.String()
		}
		b.WriteString(s[:open[0]])
		fence, rest := s[open[0]:open[1]], s[open[1]:]
		end := -1
		for _, c := range fences.FindAllStringIndex(rest, -1) {
			if c[1]-c[0] == len(fence) {
				end = c[1]
				break
			}
		}
		if end < 0 {
			b.WriteString(fence)
			s = rest
			continue
		}
		s = rest[end:]
	}
}
