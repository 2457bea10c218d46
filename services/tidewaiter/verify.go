package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"text/tabwriter"
	"time"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/registry"
	"github.com/tidewaiter/tidewaiter/services/attestor/statement"
	"github.com/tidewaiter/tidewaiter/services/matcher/policy"
)

// verifyCmd says whether an image carries a good attestation.
type verifyCmd struct {
	registryFlags
	Image  string        `arg:"" help:"registry/repository:tag or registry/repository@digest."`
	Key    []string      `help:"Public key (PEM) of a signer that is trusted; may be repeated." required:"" type:"path" placeholder:"PUB"`
	Policy string        `help:"Policy file the verdict must have been reached under." type:"path" placeholder:"FILE"`
	MaxAge time.Duration `help:"Refuse statements and advisories older than this." placeholder:"DURATION"`
	Accept string        `help:"The worst verdict to accept: pass, warn or fail." enum:"pass,warn,fail" default:"warn"`
	Output string        `help:"table or json." enum:"table,json" default:"table" short:"o"`
}

func (*verifyCmd) Help() string {
	return "Exit codes: 0 verified, 1 the verdict says no, 3 nothing that can be relied on, 4 the registry cannot be reached.\n\n" +
		"Examples:\n  tidewaiter verify registry.example.com/team/app:1.2 --key attestor.pub\n" +
		"  tidewaiter verify registry.example.com/team/app@sha256:… --key attestor.pub --max-age 24h --output json"
}

func (c *verifyCmd) Run(ctx context.Context, s *streams) error {
	ref, err := parseRef(c.Image)
	if err != nil {
		return err
	}
	keys, err := readKeys(c.Key)
	if err != nil {
		return err
	}
	options := statement.Options{Keys: keys, MaxAge: c.MaxAge, Accept: c.Accept}
	if c.Policy != "" {
		p, err := policy.Load(c.Policy)
		if err != nil {
			return usage(err)
		}
		options.Policy = p.Digest()
	}
	client, err := c.client(s, ref)
	if err != nil {
		return err
	}
	v, err := statement.VerifyImage(ctx, client, ref, options)
	if err := c.print(s, v, err); err != nil {
		return err
	}
	return verdictError(err)
}

func readKeys(files []string) ([]statement.Verifier, error) {
	var pems [][]byte
	for _, name := range files {
		b, err := os.ReadFile(name) //nolint:gosec // the user's own file
		if err != nil {
			return nil, usage(fmt.Errorf("read public key: %w", err))
		}
		pems = append(pems, b)
	}
	keys, err := statement.LoadVerifiers(pems...)
	if err != nil {
		return nil, usage(err)
	}
	return keys, nil
}

// verdictError gives the outcome of a verification its exit code.
func verdictError(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, statement.ErrVerdict):
		return policyError(err)
	case statement.NotVerifiable(err):
		return unverifiable(err)
	case errors.Is(err, registry.ErrNotFound):
		return unverifiable(err)
	}
	return registryError(err)
}

func (c *verifyCmd) print(s *streams, v contracts.Verification, err error) error {
	if err != nil && v.Reason == "" {
		v.Reason = err.Error()
	}
	if c.Output == "json" {
		return printJSON(s.out, v)
	}
	if v.Verified {
		fmt.Fprintf(s.out, "verified %s\n", v.Digest)
	} else {
		fmt.Fprintf(s.out, "NOT verified %s\n", v.Digest)
	}
	t := tabwriter.NewWriter(s.out, 0, 0, 2, ' ', 0)
	for _, st := range v.Statements {
		until := ""
		if st.ValidUntil != nil {
			until = "valid until " + st.ValidUntil.Format(time.RFC3339)
		}
		fmt.Fprintf(t, "  %s\t%s\tsigned %s\t%s\tsequence %d\n", st.PredicateType, st.Verdict, st.Time.Format(time.RFC3339), until, st.Sequence)
	}
	for _, i := range v.Ignored {
		fmt.Fprintf(t, "  ignored %s\t%s\n", i.Digest, i.Reason)
	}
	return t.Flush()
}
