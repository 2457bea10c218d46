package planner

import (
	"errors"
	"reflect"
	"testing"

	"github.com/goccy/go-yaml"

	"github.com/tidewaiter/tidewaiter/libs/run"
	"github.com/tidewaiter/tidewaiter/services/intake/scope"
)

func TestScopes(t *testing.T) {
	var raw map[string]any
	err := yaml.Unmarshal([]byte(`
hub: {kind: distribution, registry: "registry.example:5000", paths: [team, other/app], auth: {none: true}}
one: {kind: cloudevents, anyRegistry: true}
few: {registry: r.example, repositories: {include: ["team/**"]}, tags: {exclude: ["dev-*"]}, platforms: [linux/arm64], rewrite: {addPrefix: "p/"}}
odd: {registry: r.example, paths: [1]}
`), &raw)
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]scope.Scope{
		"hub": {Registry: "registry.example:5000", Paths: []string{"team", "other/app"}},
		"one": {AnyRegistry: true},
		"few": {
			Registry: "r.example", Repositories: scope.Filter{Include: []string{"team/**"}}, Tags: scope.Filter{Exclude: []string{"dev-*"}},
			Platforms: []string{"linux/arm64"},
		},
		"odd": {Registry: "r.example", Paths: []string{"1"}},
	}
	if got, err := scopes(raw); err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("%+v, %v", got, err)
	}
	// what cannot be read does not open a source
	for name, v := range map[string]any{
		"text": "x", "registry": map[string]any{"registry": []int{1}}, "paths": map[string]any{"paths": map[string]int{"a": 1}},
		"tags": map[string]any{"tags": "v1"},
	} {
		if got, err := scopes(map[string]any{"s": v}); !errors.Is(err, run.ErrConfig) {
			t.Errorf("%s: %+v, %v", name, got, err)
		}
	}
	if _, err := New(DefaultConfig(), map[string]scope.Scope{"s": {Tags: scope.Filter{Include: []string{"{"}}}}, nil, nil); err == nil {
		t.Error("a bad glob is accepted")
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
	got, err := scopes(raw)
	if err != nil || !reflect.DeepEqual(cfg, want) || got["hub"].Registry != "r.example" {
		t.Errorf("%+v, %+v, %v", cfg, got, err)
	}
	bad, err := run.Parse("file", []byte("planner: {platform: [x]}"), none)
	if err != nil {
		t.Fatal(err)
	}
	if err := bad.CheckSection("planner", &cfg); !errors.Is(err, run.ErrConfig) {
		t.Errorf("unknown key: %v", err)
	}
}
