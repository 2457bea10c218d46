package main

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/run"
	"github.com/tidewaiter/tidewaiter/services/intake"
)

// webhookCmd holds the commands about webhooks.
type webhookCmd struct {
	Decode webhookDecodeCmd `cmd:"" help:"Read a webhook's body from standard input and show what intake would make of it."`
}

type webhookDecodeCmd struct {
	Source    string   `help:"Kind of the source, for example distribution, ghcr or harbor; a wrong one names them all." xor:"what" required:"" placeholder:"KIND"`
	As        string   `help:"Read it as the source of this id in --config does, with its registry and mapping." xor:"what" required:"" placeholder:"ID"`
	Header    []string `help:"Header of the call; may be repeated." short:"H" sep:"none" placeholder:"'NAME: VALUE'"`
	Registry  string   `help:"Registry host that the source is configured for." placeholder:"HOST"`
	Secret    string   `help:"Verify the call with this secret (better: --secret-env)." placeholder:"SECRET"`
	SecretEnv string   `help:"Environment variable that holds the secret." placeholder:"NAME"`
	Output    string   `help:"table or json." enum:"table,json" default:"json" short:"o"`
}

func (*webhookDecodeCmd) Help() string {
	return "Examples:\n  tidewaiter webhook decode --source distribution < body.json\n" +
		"  tidewaiter webhook decode --source cloudevents -H 'Content-Type: application/cloudevents+json' --secret-env HOOK < body.json\n" +
		"  tidewaiter webhook decode --as our-own-registry --config tidewaiter.yaml < body.json"
}

func (c *webhookDecodeCmd) Run(s *streams) error {
	secret := c.Secret
	if c.SecretEnv != "" {
		v, ok := os.LookupEnv(c.SecretEnv)
		if !ok {
			return usage(fmt.Errorf("environment variable %s is not set", c.SecretEnv))
		}
		secret = v
	}
	header := http.Header{}
	for _, h := range c.Header {
		name, value, ok := strings.Cut(h, ":")
		if !ok || strings.TrimSpace(name) == "" {
			return usage(errors.New("a --header is 'NAME: VALUE'; one has no colon"))
		}
		header.Add(strings.TrimSpace(name), strings.TrimSpace(value))
	}
	// one byte more than intake takes, so that it can say that it is too much
	body, err := io.ReadAll(io.LimitReader(s.in, intake.DefaultMaxBody+1))
	if err != nil {
		return usage(fmt.Errorf("read body: %w", err))
	}
	source, err := c.source(s.config)
	if err != nil {
		return usage(err)
	}
	decoded, err := intake.DecodeAs(source, secret, header, body)
	if err != nil {
		return usage(err)
	}
	if c.Output == "json" {
		return printJSON(s.out, decoded)
	}
	return c.table(s.out, decoded)
}

// source returns what the flags name: a kind, or a source of the configuration.
func (c *webhookDecodeCmd) source(config string) (intake.Source, error) {
	if c.As == "" {
		return intake.Source{Kind: c.Source, Registry: c.Registry}, nil
	}
	cfg, err := run.Load(config, os.LookupEnv)
	if err != nil {
		return intake.Source{}, err
	}
	sources := intake.Sources{}
	if err := cfg.CheckSection("sources", &sources); err != nil {
		return intake.Source{}, err
	}
	source, ok := sources[c.As]
	if !ok {
		return intake.Source{}, fmt.Errorf("--as %s: the configuration (--config) has no such source; it has %q", c.As, slices.Sorted(maps.Keys(sources)))
	}
	if c.Registry != "" {
		source.Registry = c.Registry
	}
	return source, nil
}

func (*webhookDecodeCmd) table(w io.Writer, decoded contracts.WebhookDecode) error {
	text := func(s *string) string {
		if s == nil {
			return "-"
		}
		return *s
	}
	fmt.Fprintf(w, "status %d\n", decoded.Status)
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, e := range decoded.Events {
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\n", e.Action, text(e.Registry), text(e.Repository), text(e.Tag), text(e.Digest), e.Reason)
	}
	return t.Flush()
}
