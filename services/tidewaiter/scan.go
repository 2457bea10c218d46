package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/registry"
	"github.com/tidewaiter/tidewaiter/services/advisor/builtin"
	"github.com/tidewaiter/tidewaiter/services/advisor/snapshot"
	"github.com/tidewaiter/tidewaiter/services/analyzer/layer"
	"github.com/tidewaiter/tidewaiter/services/analyzer/worker"
	"github.com/tidewaiter/tidewaiter/services/matcher/match"
	"github.com/tidewaiter/tidewaiter/services/matcher/policy"
	"github.com/tidewaiter/tidewaiter/services/tidewaiter/format"
	"github.com/tidewaiter/tidewaiter/services/tidewaiter/once"
)

// matchFlags are common to scan and match.
type matchFlags struct {
	Advisories string `help:"Advisory snapshot (see: advisories build); default: the small built-in set." type:"path" placeholder:"FILE"`
	Policy     string `help:"Policy file; default: the default policy." type:"path" placeholder:"FILE"`
	FailOn     string `help:"Exit 1 on findings of this severity or worse (critical, high, medium, low, unknown), or 'policy' when the policy fails the image." enum:",critical,high,medium,low,unknown,policy" default:"" placeholder:"SEVERITY"`
	Output     string `help:"table, json, sarif, cyclonedx or spdx." enum:"table,json,sarif,cyclonedx,spdx" default:"table" short:"o"`
}

// matcher opens the snapshot and the policy; done must be called at the end.
func (f matchFlags) matcher(s *streams) (m *match.Matcher, ref contracts.SnapshotRef, done func(), err error) {
	pol := policy.Default()
	if f.Policy != "" {
		if pol, err = policy.Load(f.Policy); err != nil {
			return nil, ref, nil, usage(err)
		}
	}
	file := f.Advisories
	remove := func() {}
	if file == "" {
		dir, err := os.MkdirTemp("", "tidewaiter-")
		if err != nil {
			return nil, ref, nil, fmt.Errorf("make a temporary directory: %w", err)
		}
		remove = func() { _ = os.RemoveAll(dir) }
		file = filepath.Join(dir, "builtin.db")
		if err := builtin.Write(file); err != nil {
			remove()
			return nil, ref, nil, err
		}
		fmt.Fprintln(s.err, "Advisories: the small built-in set. For all that is known: tidewaiter advisories build, then --advisories FILE.")
	}
	snap, err := snapshot.Open(file)
	if err != nil {
		remove()
		return nil, ref, nil, usage(err)
	}
	done = func() {
		_ = snap.Close() // it was only read
		remove()
	}
	return match.New(snap, pol), contracts.SnapshotRef{Digest: snap.Digest(), Sequence: snap.Sequence()}, done, nil
}

// finish prints the result and gives it its exit code.
func (f matchFlags) finish(s *streams, scan *contracts.Scan, write func(io.Writer, string, *contracts.Scan) error) error {
	if err := write(s.out, f.Output, scan); err != nil {
		return fmt.Errorf("write output: %w", err)
	}
	if f.FailOn == "" {
		return nil
	}
	if f.FailOn == "policy" {
		if scan.Verdict == contracts.VerdictFail {
			return policyError(fmt.Errorf("the policy fails it: %s", strings.Join(scan.Reasons, "; ")))
		}
		return nil
	}
	n := 0
	for i := range scan.Findings {
		if policy.Counts(&scan.Findings[i]) && contracts.SeverityRank(scan.Findings[i].Severity) >= contracts.SeverityRank(f.FailOn) {
			n++
		}
	}
	if n > 0 {
		return policyError(fmt.Errorf("%d findings of severity %s or worse", n, f.FailOn))
	}
	return nil
}

// scanCmd scans one image once.
type scanCmd struct {
	registryFlags
	matchFlags
	Image    string        `arg:"" help:"Image in a registry, ocidir://DIR[@digest], or a file that docker save wrote."`
	Platform []string      `help:"Of an index, only these platforms (os/architecture)." placeholder:"OS/ARCH"`
	Parallel int           `help:"Layers analysed at once; default: one a core."`
	Timeout  time.Duration `help:"Give up after this long." default:"30m"`
}

func (*scanCmd) Help() string {
	return "The same packages do this work as in the services. Advisories are matched against the snapshot given.\n\n" +
		"Examples:\n  tidewaiter scan docker.io/library/redis:6 --advisories advisories.db\n" +
		"  tidewaiter scan ocidir://./image --fail-on high\n  tidewaiter scan image.tar --output sarif > image.sarif"
}

func (c *scanCmd) Run(ctx context.Context, s *streams) error {
	ctx, cancel := context.WithTimeout(ctx, c.Timeout)
	defer cancel()
	m, snap, done, err := c.matcher(s)
	if err != nil {
		return err
	}
	defer done()
	client, ref, closeSource, err := c.source(s)
	if err != nil {
		return err
	}
	defer closeSource()
	parallel := c.Parallel
	if parallel < 1 {
		parallel = runtime.NumCPU()
	}
	pool, err := worker.New(worker.Config{Workers: parallel}, s.log)
	if err != nil {
		return err
	}
	defer pool.Close()
	scanner := &once.Scanner{
		Registry: client, Matcher: m, Snapshot: snap, Parallel: parallel, Platform: c.Platform,
		Analyze: func(ctx context.Context, r io.Reader, o layer.Options) (*contracts.LayerReport, error) {
			report, _, err := pool.Analyze(ctx, r, o)
			return report, err
		},
	}
	scan, inventories, err := scanner.Scan(ctx, ref)
	switch {
	case errors.Is(err, once.ErrUnsupported), errors.Is(err, once.ErrGone):
		return usage(fmt.Errorf("%s: %w", c.Image, err))
	case err != nil:
		return registryError(fmt.Errorf("scan %s: %w", c.Image, err))
	}
	scan.Image.Ref = c.Image
	return c.finish(s, scan, func(w io.Writer, kind string, scan *contracts.Scan) error {
		return format.Write(w, kind, scan, inventories.Get)
	})
}

// source opens where the image is.
func (c *scanCmd) source(s *streams) (*registry.Client, registry.Ref, func(), error) {
	nothing := func() {}
	if strings.HasPrefix(c.Image, "ocidir://") {
		client, ref, err := registry.OpenLayout(c.Image)
		if err != nil {
			return nil, ref, nil, usage(err)
		}
		return client, ref, nothing, nil
	}
	if info, err := os.Stat(c.Image); err == nil && info.Mode().IsRegular() {
		dir, err := os.MkdirTemp("", "tidewaiter-")
		if err != nil {
			return nil, registry.Ref{}, nil, fmt.Errorf("make a temporary directory: %w", err)
		}
		remove := func() { _ = os.RemoveAll(dir) }
		client, ref, err := registry.OpenArchive(c.Image, dir)
		if err != nil {
			remove()
			return nil, ref, nil, usage(err)
		}
		return client, ref, remove, nil
	}
	ref, err := parseRef(c.Image)
	if err != nil {
		return nil, ref, nil, err
	}
	client, err := c.client(s, ref)
	if err != nil {
		return nil, ref, nil, err
	}
	return client, ref, nothing, nil
}

// matchCmd matches a software bill of materials.
type matchCmd struct {
	matchFlags
	SBOM string `arg:"" help:"CycloneDX or SPDX document (JSON); - for standard input."`
}

func (*matchCmd) Help() string {
	return "Example:\n  tidewaiter match sbom.cdx.json --advisories advisories.db --output json"
}

// maxSBOM bounds a document that is read, in bytes.
const maxSBOM = 256 << 20

func (c *matchCmd) Run(ctx context.Context, s *streams) error {
	in := s.in
	if c.SBOM != "-" {
		f, err := os.Open(c.SBOM)
		if err != nil {
			return usage(fmt.Errorf("read document: %w", err))
		}
		defer func() { _ = f.Close() }() // it was only read
		in = f
	}
	content, err := io.ReadAll(io.LimitReader(in, maxSBOM+1))
	if err != nil {
		return usage(fmt.Errorf("read document: %w", err))
	}
	if len(content) > maxSBOM {
		return usage(fmt.Errorf("the document is larger than %d MiB", maxSBOM>>20))
	}
	inv, err := format.ReadSBOM(content)
	if err != nil {
		return usage(err)
	}
	m, snap, done, err := c.matcher(s)
	if err != nil {
		return err
	}
	defer done()
	inventories := once.Inventories{}
	scanner := &once.Scanner{Matcher: m, Snapshot: snap}
	scan, err := scanner.Report(ctx, inv, inventories)
	if err != nil {
		return err
	}
	return c.finish(s, scan, func(w io.Writer, kind string, scan *contracts.Scan) error {
		return format.Write(w, kind, scan, inventories.Get)
	})
}
