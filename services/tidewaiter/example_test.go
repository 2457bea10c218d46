package main

import (
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/tidewaiter/tidewaiter/libs/run"
)

const exampleFile = "../../deploy/tidewaiter.example.yaml"

// The example names every key that there is, used or as a comment, in its
// section.
func TestTheExampleNamesEveryKey(t *testing.T) {
	content, err := os.ReadFile(exampleFile)
	if err != nil {
		t.Fatal(err)
	}
	parts := sectionsOf(string(content))
	var cfg run.Config
	sections := []run.Section{
		{Name: "log", Into: &cfg.Log},
		{Name: "http", Into: &cfg.HTTP},
		{Name: "kafka", Into: &cfg.Kafka},
		{Name: "redis", Into: &cfg.Redis},
		{Name: "database", Into: &cfg.Database},
		{Name: "registries", Into: &cfg.Registries},
	}
	for _, s := range append(sections, newSettings().sections()...) {
		text, ok := parts[s.Name]
		if !ok {
			t.Errorf("there is no section %q", s.Name)
			continue
		}
		for _, key := range keysOf(reflect.TypeOf(s.Into), map[reflect.Type]bool{}) {
			// One that no prose would hold may be named in passing ("or tokenEnv").
			pattern := `(?m)(^|[\s{,#-])` + regexp.QuoteMeta(key) + `:`
			if strings.ToLower(key) != key {
				pattern = `\b` + regexp.QuoteMeta(key) + `\b`
			}
			if !regexp.MustCompile(pattern).MatchString(text) {
				t.Errorf("section %q does not mention %s", s.Name, key)
			}
		}
	}
}

// The example is good as it is, once the files that it names are there.
func TestTheExampleIsGood(t *testing.T) {
	content, err := os.ReadFile(exampleFile)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	text := strings.NewReplacer("/run/secrets/", dir+"/", "/var/lib/tidewaiter/", dir+"/").Replace(string(content))
	for _, name := range []string{"attestor.key", "attestor.password", "api-token", "advisories.db"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("hunter1"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	file := filepath.Join(dir, "tidewaiter.yaml")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("EXAMPLE_REGISTRY_PASSWORD", "hunter2")
	t.Setenv("EXAMPLE_HOOK_TOKEN", "hunter3")
	code, stdout, stderr := tidewaiter(t, "", "config", "check", file)
	if code != run.ExitOK || !strings.HasPrefix(stdout, file+" is good\n") {
		t.Errorf("exit code %d\n%s%s", code, stdout, stderr)
	}
	if strings.Contains(stdout+stderr, "hunter") {
		t.Error("a secret was printed")
	}
	// On another machine, where nothing of it is there.
	if code, stdout, _ := tidewaiter(t, "", "config", "check", exampleFile, "--elsewhere"); code != run.ExitOK {
		t.Errorf("elsewhere: exit code %d\n%s", code, stdout)
	}
	code, stdout, _ = tidewaiter(t, "", "config", "check", exampleFile)
	if code != run.ExitUsage || strings.Count(stdout, "cannot be read") != 4 {
		t.Errorf("without its files: exit code %d\n%s", code, stdout)
	}
}

// sectionsOf returns the text of each section, whether it is used or a comment.
func sectionsOf(content string) map[string]string {
	heading := regexp.MustCompile(`^(?:# )?([a-z]+):`)
	parts, section := map[string]string{}, ""
	for line := range strings.Lines(content) {
		if m := heading.FindStringSubmatch(line); m != nil {
			section = m[1]
		}
		parts[section] += line
	}
	return parts
}

// keysOf returns the keys of a type and of what is below it.
func keysOf(t reflect.Type, seen map[reflect.Type]bool) []string {
	switch t.Kind() {
	case reflect.Pointer, reflect.Slice, reflect.Map:
		return keysOf(t.Elem(), seen)
	case reflect.Struct:
	default:
		return nil
	}
	if seen[t] || t == reflect.TypeFor[time.Time]() {
		return nil
	}
	seen[t] = true
	var keys []string
	for i := range t.NumField() {
		f := t.Field(i)
		tag, _, _ := strings.Cut(f.Tag.Get("yaml"), ",")
		switch {
		case tag == "-" || !f.IsExported():
		case strings.Contains(f.Tag.Get("yaml"), ",inline"):
			keys = append(keys, keysOf(f.Type, seen)...)
		default:
			if tag == "" {
				tag = strings.ToLower(f.Name)
			}
			keys = append(append(keys, tag), keysOf(f.Type, seen)...)
		}
	}
	return keys
}
