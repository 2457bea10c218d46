package intake

import (
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/goccy/go-yaml"

	"github.com/tidewaiter/tidewaiter/services/intake/hook"
)

// TestRegistriesPage: deploy/registries.md has a row and a section for every
// kind, in the order of the table of kinds; what a row says of a kind is so; and
// every source that it shows is one that is accepted without a warning.
func TestRegistriesPage(t *testing.T) {
	content, err := os.ReadFile("../../deploy/registries.md")
	if err != nil {
		t.Fatal(err)
	}
	page := string(content)
	intro, _, _ := strings.Cut(page, "\n## ")
	rows, sections := map[string][]string{}, map[string]string{}
	var rowOrder, sectionOrder, kinds []string
	for line := range strings.Lines(intro) {
		cells := strings.Split(strings.Trim(strings.TrimSpace(line), "|"), "|")
		if name := strings.Trim(strings.TrimSpace(cells[0]), "`"); strings.HasPrefix(line, "| `") && len(cells) == 6 {
			rows[name] = cells
			rowOrder = append(rowOrder, name)
		}
	}
	for _, part := range strings.Split(page, "\n## ")[1:] {
		name, text, _ := strings.Cut(part, "\n")
		sections[name] = text
		sectionOrder = append(sectionOrder, name)
	}
	for _, k := range hook.Kinds() {
		kinds = append(kinds, k.Name)
		row := rows[k.Name]
		if len(row) == 0 {
			continue // told below
		}
		for i, is := range map[int]bool{1: len(k.Signatures) > 0, 2: k.Says.Registry, 3: k.Says.Digest} {
			want := "no"
			if is {
				want = "yes"
			}
			if got := strings.TrimSpace(row[i]); got != want {
				t.Errorf("%s: column %d says %q, the kind %q", k.Name, i+1, got, want)
			}
		}
		checkSection(t, k, sections[k.Name], strings.Trim(strings.TrimSpace(row[5]), "`"))
	}
	if !slices.Equal(rowOrder, kinds) {
		t.Errorf("rows %q, kinds %q", rowOrder, kinds)
	}
	if !slices.Equal(sectionOrder, kinds) {
		t.Errorf("sections %q, kinds %q", sectionOrder, kinds)
	}
}

// yamlBlock finds sources, and the lines of one that go in the place of others.
var yamlBlock = regexp.MustCompile("(?s)```yaml\n((?:sources:|    [a-z]+:)\n.*?)```")

func checkSection(t *testing.T, k hook.Kind, text, api string) {
	t.Helper()
	shown, swept := 0, false
	for _, found := range yamlBlock.FindAllStringSubmatch(text, -1) {
		var in struct {
			Sources Sources `yaml:"sources"`
		}
		block := found[1]
		if !strings.HasPrefix(block, "sources:") {
			block = "sources:\n  instead:\n    kind: " + k.Name + "\n    registry: registry.example.com\n" + block
		}
		if err := yaml.UnmarshalWithOptions([]byte(block), &in, yaml.Strict()); err != nil {
			t.Errorf("%s: %v", k.Name, err)
			continue
		}
		if err := in.Sources.Validate(); err != nil {
			t.Errorf("%s: %v", k.Name, err)
		}
		for _, w := range in.Sources.Warnings() {
			t.Errorf("%s: %s", k.Name, w)
		}
		for id, src := range in.Sources {
			shown++
			if src.Kind != k.Name {
				t.Errorf("%s: the source %q is of kind %q", k.Name, id, src.Kind)
			}
			// its URL must be shown, with the secret if that is part of it
			url := "/hooks/" + id
			if src.Auth.Query != nil {
				url += "?token="
			}
			named := map[string]bool{"ibm-icr": true, "generic": true, "cloudevents": true, "docker-local": true}
			if src.Pull == nil && !named[k.Name] && !named[id] && id != "instead" && !strings.Contains(text, url) {
				t.Errorf("%s: the URL %s is not shown", k.Name, url)
			}
			if src.Sweep != nil {
				swept = true
				if src.Sweep.API != api {
					t.Errorf("%s: swept through %q, the table says %q", k.Name, src.Sweep.API, api)
				}
			}
		}
	}
	if shown == 0 {
		t.Errorf("%s: no source is shown", k.Name)
	}
	if !swept && k.Name != "generic" && k.Name != "cloudevents" {
		t.Errorf("%s: no sweep is shown", k.Name)
	}
}
