package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/services/advisor/artefact"
	"github.com/tidewaiter/tidewaiter/services/attestor/statement"
)

// keysCmd holds the commands about signing keys.
type keysCmd struct {
	Generate keysGenerateCmd `cmd:"" help:"Generate a key pair: PREFIX.key (encrypted) and PREFIX.pub."`
}

type keysGenerateCmd struct {
	For         string `help:"What the key signs: attestor (attestations; cosign's format) or advisor (snapshots; Ed25519)." enum:"attestor,advisor" default:"attestor"`
	Out         string `help:"Prefix of the two files." default:"tidewaiter" placeholder:"PREFIX" type:"path"`
	PasswordEnv string `help:"Environment variable that holds the private key's password." default:"TIDEWAITER_KEY_PASSWORD" placeholder:"NAME"`
	Output      string `help:"table or json." enum:"table,json" default:"table" short:"o"`
}

func (*keysGenerateCmd) Help() string {
	return "The private key belongs to its service alone; the public key goes to whoever verifies. Advisor's key has no password.\n\n" +
		"Examples:\n  TIDEWAITER_KEY_PASSWORD=… tidewaiter keys generate --out attestor\n  tidewaiter keys generate --for advisor --out advisor"
}

func (c *keysGenerateCmd) Run(s *streams) error {
	private, public, err := c.generate()
	if err != nil {
		return fmt.Errorf("generate key: %w", err)
	}
	pair := contracts.KeyPair{For: c.For, PrivateKey: c.Out + ".key", PublicKey: c.Out + ".pub"}
	for _, f := range []struct {
		name string
		body []byte
		mode os.FileMode
	}{{pair.PrivateKey, private, 0o600}, {pair.PublicKey, public, 0o644}} {
		if err := writeNew(f.name, f.body, f.mode); err != nil {
			return err
		}
		fmt.Fprintf(s.err, "wrote %s\n", f.name)
	}
	if c.Output == "json" {
		return printJSON(s.out, pair)
	}
	return nil
}

func (c *keysGenerateCmd) generate() (private, public []byte, err error) {
	if c.For == "advisor" {
		return artefact.GenerateKey()
	}
	password, ok := os.LookupEnv(c.PasswordEnv)
	if !ok {
		return nil, nil, usage(fmt.Errorf("environment variable %s is not set; set it (empty for a key without password)", c.PasswordEnv))
	}
	return statement.GenerateKey([]byte(password))
}

// writeNew never overwrites: a lost signing key cannot be made again.
func writeNew(name string, body []byte, mode os.FileMode) (err error) {
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode) //nolint:gosec // the user's own file
	if errors.Is(err, fs.ErrExist) {
		return usage(fmt.Errorf("%s exists already and is not overwritten; move it away or choose another --out", name))
	}
	if err != nil {
		return usage(fmt.Errorf("write key: %w", err))
	}
	defer func() {
		if closeErr := f.Close(); err == nil && closeErr != nil {
			err = fmt.Errorf("write key: %w", closeErr)
		}
	}()
	if _, err := f.Write(body); err != nil {
		return fmt.Errorf("write key: %w", err)
	}
	return nil
}
