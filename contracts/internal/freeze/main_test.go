package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/tidewaiter/tidewaiter/contracts"
)

func TestFreeze(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "frozen")
	for range 2 {
		if err := freeze(dir, nil); err != nil {
			t.Fatal(err)
		}
	}
	entries, err := os.ReadDir(dir)
	if want := len(contracts.Events()) + len(contracts.Documents()); err != nil || len(entries) != want {
		t.Errorf("%d files, want %d, %v", len(entries), want, err)
	}
	file := filepath.Join(dir, "finding.opened.v1.schema.json")
	released, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte(strings.Replace(string(released), `"key": {`, `"was": {}, "key": {`, 1)), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := freeze(dir, []string{"finding.opened.v1"}); err == nil || !strings.Contains(err.Error(), `property "was" was removed`) {
		t.Errorf("got %v", err)
	}
	if err := freeze(dir, []string{"no.such.v1"}); err == nil {
		t.Error("a schema that does not exist is frozen")
	}
}
