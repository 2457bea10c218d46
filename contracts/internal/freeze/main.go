// Command freeze copies the schemas of contracts to contracts/frozen when they
// are released. From then on a test refuses changes that are more than
// additions. It refuses them too. Run in contracts:
//
//	go run ./internal/freeze           all schemas
//	go run ./internal/freeze NAME...   some, for example finding.opened.v1
package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/contracts/internal/additive"
)

func main() {
	if err := freeze("frozen", os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "freeze:", err)
		os.Exit(1)
	}
}

// freeze writes the named schemas, or all, into dir.
func freeze(dir string, names []string) error {
	if len(names) == 0 {
		for _, k := range contracts.Events() {
			names = append(names, k.Name)
		}
		for _, d := range contracts.Documents() {
			names = append(names, d.Name)
		}
	}
	schemas := map[string][]byte{}
	for _, name := range names {
		now, err := contracts.Schema(name)
		if err != nil {
			return err
		}
		file := filepath.Join(dir, name+contracts.SchemaSuffix)
		released, err := os.ReadFile(file) //nolint:gosec // the name of a schema that exists
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("read released schema: %w", err)
		}
		if err == nil {
			problems, err := additive.Compare(released, now)
			if err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
			if len(problems) > 0 {
				return fmt.Errorf("%s is no addition to what was released; make it a new version:\n  %s", name, strings.Join(problems, "\n  "))
			}
		}
		schemas[file] = now
	}
	if err := os.MkdirAll(dir, 0o750); err != nil {
		return fmt.Errorf("make the folder of released schemas: %w", err)
	}
	for file, now := range schemas {
		if err := os.WriteFile(file, now, 0o600); err != nil {
			return fmt.Errorf("write released schema: %w", err)
		}
	}
	return nil
}
