package planner

import (
	"reflect"
	"testing"

	"github.com/goccy/go-yaml"
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
