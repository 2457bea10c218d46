package access

import (
	"os"
	"slices"
	"testing"

	"github.com/goccy/go-yaml"

	"github.com/tidewaiter/tidewaiter/contracts"
)

// Whoever reads the contract learns the same of who sends and who reads each
// event as whoever gives permissions.
func TestAsyncAPINamesTheSameServices(t *testing.T) {
	content, err := os.ReadFile("../../../contracts/asyncapi.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var doc struct {
		Components struct {
			Messages map[string]struct {
				Producers []string `yaml:"x-producers"`
				Consumers []string `yaml:"x-consumers"`
			}
		}
	}
	if err := yaml.Unmarshal(content, &doc); err != nil {
		t.Fatal(err)
	}
	for _, kind := range contracts.Events() {
		var writes, reads []string
		for _, s := range Services() {
			if slices.Contains(s.Writes, kind.Name) {
				writes = append(writes, s.Name)
			}
			if slices.Contains(s.Reads, kind.Name) {
				reads = append(reads, s.Name)
			}
		}
		said := doc.Components.Messages[kind.Name]
		producers := slices.DeleteFunc(said.Producers, func(s string) bool { return s == "cli" })
		for what, pair := range map[string][2][]string{"x-producers": {producers, writes}, "x-consumers": {said.Consumers, reads}} {
			slices.Sort(pair[0])
			slices.Sort(pair[1])
			if !slices.Equal(pair[0], pair[1]) {
				t.Errorf("%s: %s are %v, the table has %v", kind.Name, what, pair[0], pair[1])
			}
		}
	}
}
