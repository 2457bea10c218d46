package intake

import (
	"errors"
	"fmt"
	"time"
)

// Defaults of Sweep.
const (
	DefaultSweepEvery = 6 * time.Hour
	DefaultSweepRate  = 5
	DefaultSweepGrace = 2 * time.Minute
)

// Sweep says how sweeper lists the source's registry, to find pushes whose
// event never came. What API, URL and Within may be is sweeper's to say.
type Sweep struct {
	API    string   `yaml:"api"`    // distribution (default), harbor, ghcr, gitlab, quay, ecr, gar, dockerhub
	URL    string   `yaml:"url"`    // of the API; empty: the vendor's, or the registry's
	Within []string `yaml:"within"` // what of the account is listed
	Region string   `yaml:"region"` // of ECR
	// Username, and SecretFile or SecretEnv with the password or token, are the
	// API's; they are read for each request. The registry itself is asked with
	// its own credentials of the section "registries".
	Username   string `yaml:"username"`
	SecretFile string `yaml:"secretFile"`
	SecretEnv  string `yaml:"secretEnv"`
	CAFile     string `yaml:"caFile"` // PEM, beside the system's
	// Every is how often; Rate how many requests a second the registry and its API get.
	Every time.Duration `yaml:"every"`
	Rate  float64       `yaml:"rate"`
	// Grace is how long a webhook may take before it counts as lost.
	Grace time.Duration `yaml:"grace"`
	// NoStatements leaves out the look whether statements are still attached.
	NoStatements bool `yaml:"noStatements"`
}

// Defaulted returns s with defaults in place of what is not set.
func (s Sweep) Defaulted() Sweep {
	if s.API == "" {
		s.API = "distribution"
	}
	if s.Every == 0 {
		s.Every = DefaultSweepEvery
	}
	if s.Rate == 0 {
		s.Rate = DefaultSweepRate
	}
	if s.Grace == 0 {
		s.Grace = DefaultSweepGrace
	}
	return s
}

func (s Sweep) validate() error {
	var problems []error
	d := s.Defaulted()
	if s.SecretFile != "" && s.SecretEnv != "" {
		problems = append(problems, errors.New("secretFile and secretEnv exclude each other"))
	}
	if d.Rate <= 0 || d.Rate > 1000 {
		problems = append(problems, fmt.Errorf("rate is %v requests a second, it must be above 0 and at most 1000", d.Rate))
	}
	if d.Grace <= 0 || d.Every <= d.Grace {
		problems = append(problems, fmt.Errorf("grace is %s and every %s: grace must be above 0 and every longer", d.Grace, d.Every))
	}
	return errors.Join(problems...)
}
