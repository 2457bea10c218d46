// Command prepare writes what the configuration of servers.sh names beside the
// servers: attestor's key pair and a snapshot of the built-in advisories.
package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/tidewaiter/tidewaiter/services/advisor/builtin"
	"github.com/tidewaiter/tidewaiter/services/attestor/statement"
)

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: prepare DIR")
		os.Exit(2)
	}
	if err := prepare(os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, "prepare:", err)
		os.Exit(1)
	}
}

// prepare encrypts the key with the password in DIR/secrets/attestor. The
// snapshot comes last: where it is, all is.
func prepare(dir string) error {
	secrets := filepath.Join(dir, "secrets")
	password, err := os.ReadFile(filepath.Join(secrets, "attestor")) //nolint:gosec // the caller's own directory
	if err != nil {
		return fmt.Errorf("read the key's password: %w", err)
	}
	private, public, err := statement.GenerateKey(password)
	if err != nil {
		return fmt.Errorf("generate the key: %w", err)
	}
	err = errors.Join(
		os.WriteFile(filepath.Join(secrets, "attestor.key"), private, 0o600), //nolint:gosec // the caller's own directory
		os.WriteFile(filepath.Join(secrets, "attestor.pub"), public, 0o600),  //nolint:gosec // the caller's own directory
	)
	if err != nil {
		return fmt.Errorf("write the key: %w", err)
	}
	if err := builtin.Write(filepath.Join(dir, "advisories.db")); err != nil {
		return fmt.Errorf("write the advisories: %w", err)
	}
	return nil
}
