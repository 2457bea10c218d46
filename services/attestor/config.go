package attestor

import (
	"errors"
	"fmt"
	"time"

	"github.com/tidewaiter/tidewaiter/libs/run"
	"github.com/tidewaiter/tidewaiter/services/attestor/statement"
)

// DefaultValidity is how long a statement is valid after the verdict it carries.
const DefaultValidity = 7 * 24 * time.Hour

// minValidity keeps statements valid for longer than their renewal takes.
const minValidity = time.Hour

// Config is the section "attestor" of the configuration.
type Config struct {
	KeyFile      string        `yaml:"keyFile"`      // encrypted private key, PEM (tidewaiter keys generate, cosign generate-key-pair)
	KeyEnv       string        `yaml:"keyEnv"`       // environment variable that holds the key instead
	PasswordFile string        `yaml:"passwordFile"` // password of the key
	PasswordEnv  string        `yaml:"passwordEnv"`  // environment variable that holds the password instead
	Policy       string        `yaml:"policy"`       // policy file; empty: the default policy. Must be matcher's.
	Validity     time.Duration `yaml:"validity"`     // of statements, from the moment of the verdict
}

// DefaultConfig returns the configuration before anything is set.
func DefaultConfig() Config { return Config{Validity: DefaultValidity} }

// Validate says what is wrong with the configuration.
func (c Config) Validate() error {
	var problems []error
	if (c.KeyFile == "") == (c.KeyEnv == "") {
		problems = append(problems, errors.New("name the signing key by keyFile or by keyEnv, one of them"))
	}
	if c.PasswordFile != "" && c.PasswordEnv != "" {
		problems = append(problems, errors.New("name the key's password by passwordFile or by passwordEnv, not by both"))
	}
	if c.Validity < minValidity {
		problems = append(problems, fmt.Errorf("validity is %s, at least %s is needed", c.Validity, minValidity))
	}
	return errors.Join(problems...)
}

// Signer loads the key. It takes most of a second.
func (c Config) Signer(lookupEnv func(string) (string, bool)) (*statement.Signer, error) {
	key, err := run.Secret("attestor.keyFile", c.KeyFile, c.KeyEnv, lookupEnv)
	if err != nil {
		return nil, err
	}
	password, err := run.Secret("attestor.passwordFile", c.PasswordFile, c.PasswordEnv, lookupEnv)
	if err != nil {
		return nil, err
	}
	signer, err := statement.LoadSigner([]byte(key), []byte(password))
	if err != nil {
		return nil, fmt.Errorf("attestor: %w: %w", err, run.ErrConfig)
	}
	return signer, nil
}
