package sweeper

import (
	"os"
	"reflect"
	"strings"
	"testing"

	"github.com/goccy/go-yaml"

	"github.com/tidewaiter/tidewaiter/services/intake"
	"github.com/tidewaiter/tidewaiter/services/sweeper/list"
)

// The configuration in README.md is one that is accepted, shows every setting
// and the defaults; every API is explained.
func TestReadme(t *testing.T) {
	b, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(b), "```yaml\n")
	text, _, ok := strings.Cut(rest, "```")
	if !ok {
		t.Fatal("no configuration in README.md")
	}
	in := struct {
		Sweeper Config         `yaml:"sweeper"`
		Sources intake.Sources `yaml:"sources"`
	}{Sweeper: DefaultConfig()}
	if err := yaml.UnmarshalWithOptions([]byte(text), &in, yaml.Strict()); err != nil {
		t.Fatal(err)
	}
	if err := in.Sweeper.Validate(); err != nil {
		t.Error(err)
	}
	if err := in.Sources.Validate(); err != nil {
		t.Error(err)
	}
	if err := CheckSources(in.Sources); err != nil {
		t.Error(err)
	}
	for _, section := range []any{Config{}, intake.Sweep{}} {
		typ := reflect.TypeOf(section)
		for i := range typ.NumField() {
			if name := typ.Field(i).Tag.Get("yaml"); !strings.Contains(text, name) {
				t.Errorf("%s is not shown", name)
			}
		}
	}
	for _, api := range list.APIs() {
		if !strings.Contains(string(b), "| `"+api+"` |") {
			t.Errorf("the API %s is not explained", api)
		}
	}
	defaults, shown := DefaultConfig(), in.Sweeper
	if shown.Tick != defaults.Tick || shown.Attempts != defaults.Attempts || shown.Pause != defaults.Pause || shown.Keep != defaults.Keep {
		t.Error("the figures shown are not the defaults")
	}
	if s := in.Sources["main"].Sweep; s.Every != intake.DefaultSweepEvery || s.Rate != intake.DefaultSweepRate || s.Grace != intake.DefaultSweepGrace {
		t.Error("the figures shown of a sweep are not the defaults")
	}
}
