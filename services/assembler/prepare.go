package assembler

import (
	"container/list"
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"sync"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/store"
	"github.com/tidewaiter/tidewaiter/services/assembler/merge"
)

// work is an inventory to be made. It is made outside of the transaction that
// announces it, and named by everything it is made from: if any of that
// changes before the transaction runs again, it is other work.
type work struct {
	key     string
	plan    contracts.ImagePlanned // layers that will never come carry why in Missing
	reports map[string]string      // of an image: layer → digest of its report
	parts   []contracts.InventoryPart
	gaps    []contracts.Gap
}

// inventory is work done: a stored blob, or what kept it from being made.
type inventory struct {
	blob           contracts.Blob
	packages, gaps int
	analyzer       string
	lost           []string // layers whose report is not stored any more
}

// inputs returns the digest of all that the inventory depends on. The
// repository is not part of it: an inventory belongs to the digest alone.
func (w work) inputs() string {
	plan := w.plan
	plan.Image.Registry, plan.Image.Repository, plan.Source, plan.Tag = "", "", "", ""
	encoded, err := json.Marshal(struct {
		Version string
		Plan    contracts.ImagePlanned
		Reports map[string]string
		Parts   []contracts.InventoryPart
		Gaps    []contracts.Gap
	}{merge.Version, plan, w.reports, w.parts, w.gaps})
	if err != nil {
		// Strings and numbers only: this cannot happen, and an empty key would mix inventories up.
		panic(fmt.Sprintf("encode inputs of an inventory: %v", err))
	}
	return contracts.DigestOf(encoded)
}

// prepare makes an inventory and stores it as a blob, unless the same was made
// before for another repository.
func (s *Service) prepare(ctx context.Context, w work) (inventory, error) {
	known, ok, err := s.known(ctx, w.key)
	if err != nil || ok {
		return known, err
	}
	var inv *contracts.Inventory
	if w.plan.Kind == contracts.KindIndex {
		inv = merge.Index(w.plan, w.parts, w.gaps)
	} else {
		reports, lost, err := s.load(ctx, w)
		if err != nil || len(lost) > 0 {
			return inventory{lost: lost}, err
		}
		inv = merge.Image(w.plan, reports)
	}
	content, err := json.Marshal(inv)
	if err != nil {
		return inventory{}, fmt.Errorf("encode inventory: %w", err)
	}
	digest, err := s.db.PutBlob(ctx, content)
	if err != nil {
		return inventory{}, fmt.Errorf("store inventory: %w", err)
	}
	done := inventory{
		blob:     contracts.Blob{Digest: digest, Size: int64(len(content))},
		packages: len(inv.Packages), gaps: len(inv.Gaps), analyzer: inv.Analyzer,
	}
	for _, p := range w.parts {
		done.packages += p.Packages
	}
	return done, nil
}

// known returns an inventory that was made from the same inputs and is still stored.
func (s *Service) known(ctx context.Context, key string) (inventory, bool, error) {
	var inv inventory
	err := s.db.QueryRowContext(ctx, `SELECT inventory, size, packages, gaps, analyzer FROM assembler_inventories WHERE inputs = $1`, key).
		Scan(&inv.blob.Digest, &inv.blob.Size, &inv.packages, &inv.gaps, &inv.analyzer)
	if errors.Is(err, sql.ErrNoRows) {
		return inventory{}, false, nil
	}
	if err != nil {
		return inventory{}, false, fmt.Errorf("look for an inventory: %w", err)
	}
	stored, err := s.db.HasBlob(ctx, inv.blob.Digest)
	if err != nil {
		return inventory{}, false, fmt.Errorf("look for an inventory: %w", err)
	}
	if !stored {
		return inventory{}, false, nil
	}
	if err := s.db.TouchBlobs(ctx, inv.blob.Digest); err != nil {
		return inventory{}, false, fmt.Errorf("keep an inventory: %w", err)
	}
	return inv, true, nil
}

// load returns the layer reports of an image, by layer, and the layers whose
// report is gone.
func (s *Service) load(ctx context.Context, w work) (map[string]*contracts.LayerReport, []string, error) {
	reports := map[string]*contracts.LayerReport{}
	var lost []string
	for layer, digest := range w.reports {
		r, err := s.report(ctx, digest)
		if errors.Is(err, store.ErrNotFound) || errors.Is(err, store.ErrCorrupt) {
			s.log.WarnContext(ctx, "layer report is lost, the layer is asked for again", "layer", layer, "report", digest, "error", err)
			lost = append(lost, layer)
			continue
		}
		if err != nil {
			return nil, nil, fmt.Errorf("read report of layer %s: %w", layer, err)
		}
		reports[layer] = r
	}
	slices.Sort(lost)
	return reports, lost, nil
}

func (s *Service) report(ctx context.Context, digest string) (*contracts.LayerReport, error) {
	if r := s.reports.get(digest); r != nil {
		return r, nil
	}
	content, err := s.db.Blob(ctx, digest)
	if err != nil {
		return nil, err
	}
	r := new(contracts.LayerReport)
	if err := json.Unmarshal(content, r); err != nil {
		return nil, fmt.Errorf("decode: %w: %w", store.ErrCorrupt, err)
	}
	s.reports.put(digest, r, len(content))
	return r, nil
}

// reportCache keeps decoded layer reports, the least recently used go first.
// They are shared and only read.
type reportCache struct {
	mu    sync.Mutex
	limit int
	bytes int
	order *list.List // of cached, the most recently used in front
	items map[string]*list.Element
}

type cached struct {
	digest string
	report *contracts.LayerReport
	bytes  int
}

func newReportCache(limit int) *reportCache {
	return &reportCache{limit: limit, order: list.New(), items: map[string]*list.Element{}}
}

func (c *reportCache) get(digest string) *contracts.LayerReport {
	c.mu.Lock()
	defer c.mu.Unlock()
	e, ok := c.items[digest]
	if !ok {
		return nil
	}
	c.order.MoveToFront(e)
	return e.Value.(cached).report
}

func (c *reportCache) put(digest string, r *contracts.LayerReport, bytes int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, ok := c.items[digest]; ok || bytes > c.limit {
		return
	}
	c.items[digest] = c.order.PushFront(cached{digest, r, bytes})
	c.bytes += bytes
	for c.bytes > c.limit {
		last := c.order.Remove(c.order.Back()).(cached)
		delete(c.items, last.digest)
		c.bytes -= last.bytes
	}
}
