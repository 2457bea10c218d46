package gatekeeper

import (
	"os"
	"reflect"
	"strings"
	"testing"

	"github.com/goccy/go-yaml"

	"github.com/tidewaiter/tidewaiter/libs/registry"
)

// The configuration in README.md is one that is accepted and shows every
// setting; the reasons are all there.
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
		Gatekeeper Config          `yaml:"gatekeeper"`
		Registries []registry.Host `yaml:"registries"`
	}{Gatekeeper: DefaultConfig()}
	if err := yaml.UnmarshalWithOptions([]byte(text), &in, yaml.Strict()); err != nil {
		t.Fatal(err)
	}
	if err := in.Gatekeeper.Validate(); err != nil {
		t.Error(err)
	}
	for _, section := range []any{Config{}, Auth{}, TLS{}} {
		typ := reflect.TypeOf(section)
		for i := range typ.NumField() {
			if name := typ.Field(i).Tag.Get("yaml"); !strings.Contains(string(b), name) {
				t.Errorf("%s is not shown", name)
			}
		}
	}
	for _, r := range rejections {
		if !strings.Contains(string(b), "`"+r.reason+"`") {
			t.Errorf("reason %s is not named", r.reason)
		}
	}
	shown := in.Gatekeeper
	defaults := DefaultConfig()
	if shown.Budget != defaults.Budget || shown.Recheck != defaults.Recheck || shown.MaxBody != defaults.MaxBody ||
		shown.CacheEntries != defaults.CacheEntries || shown.CacheBytes != defaults.CacheBytes || shown.RequireDigest != defaults.RequireDigest {
		t.Error("the figures shown are not the defaults")
	}
}
