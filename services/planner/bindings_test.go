package planner

import (
	"errors"
	"reflect"
	"testing"

	"github.com/goccy/go-yaml"

	"github.com/tidewaiter/tidewaiter/libs/run"
)

func TestBindings(t *testing.T) {
	var raw map[string]any
	err := yaml.Unmarshal([]byte(`
hub: {kind: distribution, registry: "registry.example:5000", paths: [team, other/app], auth: {none: true}}
one: {kind: cloudevents, anyRegistry: true}
odd: {registry: r.example, paths: [1]}
bad: text
`), &raw)
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]Source{
		"hub": {Registry: "registry.example:5000", Paths: []string{"team", "other/app"}},
		"one": {AnyRegistry: true},
		"odd": {Registry: "r.example", Paths: []string{"1"}},
		"bad": {},
	}
	if got := bindings(raw); !reflect.DeepEqual(got, want) {
		t.Errorf("%+v", got)
	}
}

// TestSections: both sections are read as they stand in the one file.
func TestSections(t *testing.T) {
	file := `
planner: {platforms: [linux/amd64], sourcePlatforms: {hub: [linux/arm64]}}
sources: {hub: {kind: distribution, registry: "r.example", auth: {none: true}}}
`
	none := func(string) (string, bool) { return "", false }
	c, err := run.Parse("file", []byte(file), none)
	if err != nil {
		t.Fatal(err)
	}
	cfg := DefaultConfig()
	var raw map[string]any
	if err := errors.Join(c.CheckSection("planner", &cfg), c.CheckSection("sources", &raw)); err != nil {
		t.Fatal(err)
	}
	want := Config{Platforms: []string{"linux/amd64"}, SourcePlatforms: map[string][]string{"hub": {"linux/arm64"}}, Attempts: DefaultAttempts}
	if !reflect.DeepEqual(cfg, want) || bindings(raw)["hub"].Registry != "r.example" {
		t.Errorf("%+v, %+v", cfg, bindings(raw))
	}
	bad, err := run.Parse("file", []byte("planner: {platform: [x]}"), none)
	if err != nil {
		t.Fatal(err)
	}
	if err := bad.CheckSection("planner", &cfg); !errors.Is(err, run.ErrConfig) {
		t.Errorf("unknown key: %v", err)
	}
}
