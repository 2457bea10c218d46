package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"text/tabwriter"
	"time"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/registry"
	"github.com/tidewaiter/tidewaiter/services/advisor/artefact"
	"github.com/tidewaiter/tidewaiter/services/advisor/compile"
	"github.com/tidewaiter/tidewaiter/services/advisor/snapshot"
)

// advisoriesCmd holds the commands about advisory snapshots.
type advisoriesCmd struct {
	Build  advisoriesBuildCmd  `cmd:"" help:"Compile OSV archives, KEV, EPSS and end-of-life data into one snapshot file."`
	Pull   advisoriesPullCmd   `cmd:"" help:"Fetch the newest snapshot that an advisor has published, and verify its signature."`
	Status advisoriesStatusCmd `cmd:"" help:"Say what a snapshot holds and how old it is."`
}

type advisoriesBuildCmd struct {
	From     []string `help:"Directory (or zip) with OSV archives, kev/, epss/ and eol/; later ones overlay earlier ones." required:"" type:"path" placeholder:"DIR"`
	Out      string   `help:"Snapshot file to write." required:"" type:"path" placeholder:"FILE"`
	Sequence *int64   `help:"Sequence of the snapshot; default: the newest modification among the advisories, in Unix seconds."`
	Output   string   `help:"table or json." enum:"table,json" default:"table" short:"o"`
}

func (*advisoriesBuildCmd) Help() string {
	return "Examples:\n  tidewaiter advisories build --from ./advisories --out advisories.db\n  tidewaiter advisories build --from ./advisories --from ./advisories/updates --out advisories.db --output json"
}

func (c *advisoriesBuildCmd) Run(ctx context.Context, s *streams) error {
	result, err := compile.Build(ctx, compile.Options{From: c.From, Out: c.Out, Sequence: c.Sequence})
	if err != nil {
		return usage(fmt.Errorf("build snapshot: %w", err))
	}
	if c.Output == "json" {
		return printJSON(s.out, result)
	}
	t := tabwriter.NewWriter(s.out, 0, 0, 2, ' ', 0)
	fmt.Fprintf(t, "snapshot\t%s\nsequence\t%d (%s)\nadvisories\t%d, and %d withdrawn\n", result.Snapshot, result.Sequence,
		time.Unix(result.Sequence, 0).UTC().Format(time.RFC3339), result.Records, result.Withdrawn)
	printEcosystems(t, result.Ecosystems)
	fmt.Fprintf(t, "known exploited\t%d\nEPSS scores\t%d\nproducts with end-of-life data\t%d\nrejected\t%d\n", result.KEV, result.EPSS, result.Products, len(result.Rejected))
	for _, r := range result.Rejected {
		fmt.Fprintf(t, "  %s\t%s\n", r.File, r.Reason)
	}
	return t.Flush()
}

func printEcosystems(t *tabwriter.Writer, counts map[string]int) {
	for _, name := range slices.Sorted(maps.Keys(counts)) {
		fmt.Fprintf(t, "  %s\t%d\n", name, counts[name])
	}
}

type advisoriesPullCmd struct {
	registryFlags
	Repository string `arg:"" help:"registry/repository that advisor publishes in."`
	Key        string `help:"Advisor's public key (PEM)." required:"" type:"path" placeholder:"PUB"`
	Out        string `help:"Directory to put the snapshot in." default:"." type:"path" placeholder:"DIR"`
	Output     string `help:"table or json." enum:"table,json" default:"table" short:"o"`
}

func (*advisoriesPullCmd) Help() string {
	return "Example:\n  tidewaiter advisories pull registry.example.com/tidewaiter/advisories --key advisor.pub --out /var/lib/advisories"
}

func (c *advisoriesPullCmd) Run(ctx context.Context, s *streams) error {
	from, err := artefact.ParseRepository(c.Repository)
	if err != nil {
		return usage(err)
	}
	keys, err := artefact.LoadPublicKeys(c.Key)
	if err != nil {
		return usage(err)
	}
	client, err := c.client(s, registry.Ref{Registry: from.Registry, Repository: from.Repository})
	if err != nil {
		return err
	}
	defer client.Close() //nolint:errcheck // it was only read
	published, err := artefact.Look(ctx, client, from, "", keys)
	if err != nil {
		return artefactError(err)
	}
	file, err := artefact.Fetch(ctx, client, from, published, c.Out)
	if err != nil {
		return artefactError(err)
	}
	if c.Output == "json" {
		return printJSON(s.out, contracts.AdvisoriesPull{File: file, Snapshot: published.Snapshot, Location: published.Location})
	}
	fmt.Fprintln(s.out, file)
	return nil
}

// artefactError gives trouble with a published snapshot its exit code.
func artefactError(err error) error {
	if errors.Is(err, artefact.ErrSignature) || errors.Is(err, artefact.ErrForeign) {
		return unverifiable(err)
	}
	return registryError(err)
}

type advisoriesStatusCmd struct {
	File   string        `arg:"" help:"Snapshot file." type:"path"`
	MaxAge time.Duration `help:"Exit 1 when the newest advisory is older than this." placeholder:"DURATION"`
	Output string        `help:"table or json." enum:"table,json" default:"table" short:"o"`
}

func (*advisoriesStatusCmd) Help() string {
	return "Example:\n  tidewaiter advisories status advisories.db --max-age 48h"
}

func (c *advisoriesStatusCmd) Run(s *streams) error {
	snap, err := snapshot.Open(c.File)
	if err != nil {
		return usage(err)
	}
	defer snap.Close() //nolint:errcheck // read-only
	stats := snap.Stats()
	age := time.Since(snap.Newest())
	status := contracts.AdvisoriesStatus{
		Snapshot: snap.Digest(), Sequence: snap.Sequence(), Newest: snap.Newest(), AgeHours: age.Hours(),
		Records: stats.Records, Ecosystems: stats.Ecosystems, KEV: stats.KEV, EPSS: stats.EPSS, Products: stats.Products, Bytes: stats.Bytes,
	}
	if c.Output == "json" {
		if err := printJSON(s.out, status); err != nil {
			return err
		}
	} else {
		t := tabwriter.NewWriter(s.out, 0, 0, 2, ' ', 0)
		fmt.Fprintf(t, "snapshot\t%s\nsequence\t%d\nnewest advisory\t%s (%.0f hours ago)\nadvisories\t%d\n", status.Snapshot, status.Sequence,
			status.Newest.UTC().Format(time.RFC3339), status.AgeHours, status.Records)
		printEcosystems(t, status.Ecosystems)
		fmt.Fprintf(t, "known exploited\t%d\nEPSS scores\t%d\nproducts with end-of-life data\t%d\nbytes\t%d\n", status.KEV, status.EPSS, status.Products, status.Bytes)
		if err := t.Flush(); err != nil {
			return fmt.Errorf("write output: %w", err)
		}
	}
	if c.MaxAge > 0 && age > c.MaxAge {
		return policyError(fmt.Errorf("the newest advisory is %s old, more than %s; build a newer snapshot", age.Round(time.Minute), c.MaxAge))
	}
	return nil
}
