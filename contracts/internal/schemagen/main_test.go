package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/tidewaiter/tidewaiter/contracts"
)

// TestSchemasAreCurrent: the files are what the types say now.
func TestSchemasAreCurrent(t *testing.T) {
	root := filepath.Join("..", "..")
	want, err := generate(root)
	if err != nil {
		t.Fatal(err)
	}
	for name, content := range want {
		got, err := os.ReadFile(filepath.Join(root, "schemas", name))
		if err != nil {
			t.Error(err)
			continue
		}
		if !bytes.Equal(got, content) {
			t.Errorf("%s is not current: run go generate ./contracts", name)
		}
	}
}

// TestDescriptionsAreUsed: an entry for a field that is gone goes too.
func TestDescriptionsAreUsed(t *testing.T) {
	schemas, err := generate(filepath.Join("..", ".."))
	if err != nil {
		t.Fatal(err)
	}
	var all strings.Builder
	for _, content := range schemas {
		all.Write(content)
	}
	for key, text := range descriptions {
		quoted := strings.ReplaceAll(text, `"`, `\"`)
		if !strings.Contains(all.String(), `"`+quoted+`"`) {
			t.Errorf("description of %q is used nowhere", key)
		}
	}
}

func TestRunRemovesWhatIsGone(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"doc.go", "events.go", "documents.go", "predicates.go", "cli.go", "identity.go"} {
		content, err := os.ReadFile(filepath.Join("..", "..", name))
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(filepath.Join(dir, "schemas"), 0o700); err != nil {
		t.Fatal(err)
	}
	gone := filepath.Join(dir, "schemas", "gone.v1"+contracts.SchemaSuffix)
	if err := os.WriteFile(gone, []byte("{}"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := run(dir); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(gone); !os.IsNotExist(err) {
		t.Errorf("the schema of nothing is still there: %v", err)
	}
	if n := len(contracts.Events()) + len(contracts.Documents()); count(t, dir) != n {
		t.Errorf("%d schemas, want %d", count(t, dir), n)
	}
}

func count(t *testing.T, dir string) int {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(dir, "schemas", "*"+contracts.SchemaSuffix))
	if err != nil {
		t.Fatal(err)
	}
	return len(names)
}
