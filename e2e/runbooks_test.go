package e2e

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// The runbooks name metrics, log lines and commands; all of them exist.
func TestRunbooks(t *testing.T) {
	var code strings.Builder
	for _, dir := range []string{"../libs", "../services"} {
		err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
				return err
			}
			b, err := os.ReadFile(path)
			code.Write(b)
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	source := code.String()
	pages, err := filepath.Glob("../deploy/runbooks/*.md")
	if err != nil || len(pages) < 9 {
		t.Fatalf("%d pages, %v", len(pages), err)
	}
	var (
		quoted  = regexp.MustCompile("`([^`]+)`")
		metric  = regexp.MustCompile(`tidewaiter_[a-z_]+`)
		command = regexp.MustCompile(`^tidewaiter ([a-z]+)`)
		message = regexp.MustCompile(`^[a-z][A-Za-z', ]+ [A-Za-z', ]+$`)
		link    = regexp.MustCompile(`\]\(([^)#]+)\)`)
		foreign = map[string]bool{ // what servers of others say
			"no space left on device": true, "could not extend file": true, "database or disk is full": true, "disk full": true,
		}
	)
	seen := 0
	for _, page := range pages {
		b, err := os.ReadFile(page)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range link.FindAllStringSubmatch(string(b), -1) {
			if _, err := os.Stat(filepath.Join(filepath.Dir(page), m[1])); err != nil {
				t.Errorf("%s: link to %s: %v", page, m[1], err)
			}
		}
		for _, q := range quoted.FindAllStringSubmatch(string(b), -1) {
			text := strings.Join(strings.Fields(q[1]), " ")
			switch {
			case metric.MatchString(text):
				for _, name := range metric.FindAllString(text, -1) {
					seen++
					if !strings.Contains(source, `"`+name+`"`) {
						t.Errorf("%s names the metric %s, which does not exist", page, name)
					}
				}
			case command.MatchString(text):
				seen++
				name := command.FindStringSubmatch(text)[1]
				if !strings.Contains(strings.ToLower(source), name+"cmd struct") {
					t.Errorf("%s names the command tidewaiter %s, which does not exist", page, name)
				}
			case message.MatchString(text) && !foreign[text] && !strings.HasPrefix(text, "dlq "):
				seen++
				if !strings.Contains(source, text) {
					t.Errorf("%s names the message %q, which nobody says", page, text)
				}
			}
		}
	}
	if seen < 60 {
		t.Errorf("only %d names were looked up", seen)
	}
}
