package contracts_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/contracts/internal/additive"
)

// TestOnlyAdditions: what was released may grow, and nothing else.
func TestOnlyAdditions(t *testing.T) {
	files, err := filepath.Glob("frozen/*" + contracts.SchemaSuffix)
	if err != nil || len(files) < 17 {
		t.Fatalf("%d released schemas, %v", len(files), err)
	}
	for _, file := range files {
		released, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		name := strings.TrimSuffix(filepath.Base(file), contracts.SchemaSuffix)
		now, err := contracts.Schema(name)
		if err != nil {
			t.Errorf("%s was released and is gone; readers still count on it: %v", name, err)
			continue
		}
		problems, err := additive.Compare(released, now)
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
		for _, p := range problems {
			t.Errorf("%s%s\n  was released otherwise (frozen/): only optional fields may be added. Make it a new version (README.md, \"Changing them\").", name, p)
		}
	}
}
