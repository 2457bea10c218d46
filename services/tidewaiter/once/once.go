// Package once does the pipeline's work for one image in this process, with
// the very packages that the services use: plan, analyse, merge, match.
package once

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/registry"
	"github.com/tidewaiter/tidewaiter/services/analyzer/layer"
	"github.com/tidewaiter/tidewaiter/services/assembler/merge"
	"github.com/tidewaiter/tidewaiter/services/matcher/match"
	"github.com/tidewaiter/tidewaiter/services/planner/plan"
)

// Errors of Scan.
var (
	ErrUnsupported = errors.New("there is nothing to scan")
	ErrGone        = errors.New("no such image")
)

// Registry is where images come from.
type Registry interface {
	plan.Source
	Blob(ctx context.Context, registry, repository string, d ocispec.Descriptor) (io.ReadCloser, error)
}

// Analyzer analyses one layer.
type Analyzer func(ctx context.Context, r io.Reader, o layer.Options) (*contracts.LayerReport, error)

// Scanner scans images one by one.
type Scanner struct {
	Registry Registry
	Analyze  Analyzer
	Matcher  *match.Matcher
	Snapshot contracts.SnapshotRef
	Parallel int      // layers analysed at once
	Platform []string // of an index, the platforms to scan; empty: all
}

// Scan returns what is in an image and what is known to be wrong with it, and
// its inventories by digest. Of an index, packages of all its platforms are
// listed; one that several platforms share stands there once.
func (s *Scanner) Scan(ctx context.Context, ref registry.Ref) (*contracts.Scan, Inventories, error) {
	planned, err := plan.Image(ctx, s.Registry, ref, plan.WithPlatforms(s.Platform...))
	if err != nil {
		return nil, nil, fmt.Errorf("plan: %w", err)
	}
	if planned.Unsupported != nil {
		return nil, nil, fmt.Errorf("%s: %w", planned.Unsupported.Message, ErrUnsupported)
	}
	if planned.Gone != "" {
		return nil, nil, fmt.Errorf("%s: %w", planned.Gone, ErrGone)
	}
	reports, err := s.layers(ctx, planned.Layers)
	if err != nil {
		return nil, nil, err
	}
	inventories := Inventories{}
	root, err := inventories.assemble(planned, reports)
	if err != nil {
		return nil, nil, err
	}
	out, err := s.Report(ctx, root, inventories)
	if err != nil {
		return nil, nil, err
	}
	out.Image = &contracts.ScanImage{Digest: planned.Image.Digest}
	return out, inventories, nil
}

// layers analyses distinct layers, several at once.
func (s *Scanner) layers(ctx context.Context, wanted []contracts.LayerRequested) (map[string]*contracts.LayerReport, error) {
	var mu sync.Mutex
	reports := make(map[string]*contracts.LayerReport, len(wanted))
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(max(s.Parallel, 1))
	for _, l := range wanted {
		group.Go(func() error {
			report, err := s.layer(ctx, l)
			if err != nil {
				return fmt.Errorf("analyse layer %s: %w", l.Digest, err)
			}
			mu.Lock()
			defer mu.Unlock()
			reports[l.Digest] = report
			return nil
		})
	}
	return reports, group.Wait()
}

func (s *Scanner) layer(ctx context.Context, l contracts.LayerRequested) (*contracts.LayerReport, error) {
	blob, err := s.Registry.Blob(ctx, l.Image.Registry, l.Image.Repository, ocispec.Descriptor{
		MediaType: l.MediaType, Digest: digest.Digest(l.Digest), Size: l.Size,
	})
	if err != nil {
		return nil, err
	}
	defer blob.Close()
	return s.Analyze(ctx, blob, layer.Options{Digest: l.Digest})
}

// Inventories are inventories by the digest of their canonical JSON.
type Inventories map[string]*contracts.Inventory

// Add takes in an inventory and returns its digest.
func (i Inventories) Add(inv *contracts.Inventory) (string, error) {
	b, err := json.Marshal(inv)
	if err != nil {
		return "", fmt.Errorf("encode inventory: %w", err)
	}
	d := contracts.DigestOf(b)
	i[d] = inv
	return d, nil
}

// Get returns an inventory by its digest.
func (i Inventories) Get(_ context.Context, d string) (*contracts.Inventory, error) {
	inv, ok := i[d]
	if !ok {
		return nil, fmt.Errorf("inventory %s is not there", d)
	}
	return inv, nil
}

// assemble merges what was planned, parts before the indexes that list them.
func (i Inventories) assemble(planned plan.Result, reports map[string]*contracts.LayerReport) (*contracts.Inventory, error) {
	done := map[string]contracts.InventoryPart{}
	var root *contracts.Inventory
	for _, p := range slices.Backward(planned.Planned) {
		var inv *contracts.Inventory
		if p.Kind == contracts.KindIndex {
			var parts []contracts.InventoryPart
			for _, part := range p.Parts {
				if found, ok := done[part.Digest]; ok {
					parts = append(parts, found)
				}
			}
			inv = merge.Index(p, parts, nil)
		} else {
			inv = merge.Image(p, reports)
		}
		d, err := i.Add(inv)
		if err != nil {
			return nil, err
		}
		done[p.Image.Digest] = contracts.InventoryPart{
			Digest: p.Image.Digest, Platform: p.Platform, Inventory: d, Packages: len(inv.Packages),
		}
		if p.Image.Digest == planned.Image.Digest {
			root = inv
		}
	}
	if root == nil {
		return nil, fmt.Errorf("the plan of %s does not hold the image itself", planned.Image)
	}
	return root, nil
}

// Report matches an inventory and writes the outcome in the form that the
// command line prints.
func (s *Scanner) Report(ctx context.Context, inv *contracts.Inventory, all Inventories) (*contracts.Scan, error) {
	d, err := all.Add(inv)
	if err != nil {
		return nil, err
	}
	report, err := s.Matcher.Match(ctx, inv, all.Get)
	if err != nil {
		return nil, fmt.Errorf("match: %w", err)
	}
	b, err := json.Marshal(report)
	if err != nil {
		return nil, fmt.Errorf("encode report: %w", err)
	}
	out := &contracts.Scan{
		Platform: inv.Platform,
		Packages: slices.Clone(inv.Packages), Findings: report.Findings, Lags: report.Lags, Gaps: report.Gaps,
		Verdict: report.Verdict, Reasons: report.Reasons,
		Snapshot: s.Snapshot, Inventory: d, Report: contracts.DigestOf(b),
	}
	for _, part := range inv.Parts {
		child, err := all.Get(ctx, part.Inventory)
		if err != nil {
			return nil, err
		}
		out.Packages = append(out.Packages, child.Packages...)
	}
	if len(inv.Parts) > 0 {
		out.Packages = distinct(out.Packages)
	}
	if out.Packages == nil {
		out.Packages = []contracts.Package{}
	}
	if out.Findings == nil {
		out.Findings = []contracts.Finding{}
	}
	if out.Gaps == nil {
		out.Gaps = []contracts.Gap{}
	}
	return out, nil
}

// distinct keeps one of the packages that are the same in the same layer.
func distinct(packages []contracts.Package) []contracts.Package {
	layerOf := func(p contracts.Package) string {
		if p.Layer == nil {
			return ""
		}
		return p.Layer.Digest
	}
	slices.SortStableFunc(packages, func(a, b contracts.Package) int {
		return cmp.Or(cmp.Compare(a.PURL, b.PURL), cmp.Compare(layerOf(a), layerOf(b)))
	})
	return slices.CompactFunc(packages, func(a, b contracts.Package) bool {
		return a.PURL == b.PURL && layerOf(a) == layerOf(b)
	})
}
