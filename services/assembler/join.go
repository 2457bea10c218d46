package assembler

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"slices"

	"github.com/cloudevents/sdk-go/v2/event"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/bus"
	"github.com/tidewaiter/tidewaiter/services/assembler/merge"
)

// permanent are the reasons of layer.failed, in analyzer's words, that another
// try through the same repository cannot mend.
var permanent = []string{
	"not-found", "unauthorized", "digest-mismatch", "too-large", "not-configured", "forbidden-host", "refused",
}

// join is one transaction: what it reads, writes and emits.
type join struct {
	s        *Service
	tx       *sql.Tx
	prepared map[string]inventory // by work key, made outside of the transaction
	todo     []work               // what has to be prepared before this can commit
	asked    map[string]bool      // layers asked for again in this transaction
	out      []event.Event
}

// planRow is one row of assembler_plans.
type planRow struct {
	plan              contracts.ImagePlanned
	lane, traceparent string
	inventory         string
}

// planned records a plan; complete or not, it may be the last thing missing
// for itself, and a new plan of an image announces its inventory again.
func (j *join) planned(ctx context.Context, d contracts.ImagePlanned, in event.Event) error {
	encoded, err := json.Marshal(d)
	if err != nil {
		return bus.Permanent(fmt.Errorf("encode plan: %w", err))
	}
	im := d.Image
	_, err = j.tx.ExecContext(ctx, `INSERT INTO assembler_plans (registry, repository, digest, plan, lane, traceparent)
		VALUES ($1, $2, $3, $4, $5, $6)
		ON CONFLICT (registry, repository, digest) DO UPDATE
		SET plan = excluded.plan, lane = excluded.lane, traceparent = excluded.traceparent`,
		im.Registry, im.Repository, im.Digest, string(encoded), extension(in, contracts.ExtLane), extension(in, contracts.ExtTraceparent))
	if err != nil {
		return fmt.Errorf("store plan: %w", err)
	}
	for _, table := range []string{"assembler_plan_layers", "assembler_plan_parts"} {
		// The digest fixes layers and parts, but which of them can be had may change.
		_, err := j.tx.ExecContext(ctx, `DELETE FROM `+table+` WHERE registry = $1 AND repository = $2 AND digest = $3`, // #nosec G202 -- a constant name
			im.Registry, im.Repository, im.Digest)
		if err != nil {
			return fmt.Errorf("forget old plan: %w", err)
		}
	}
	for _, l := range d.Layers {
		if l.Missing != "" {
			continue
		}
		_, err := j.tx.ExecContext(ctx, `INSERT INTO assembler_plan_layers (layer, registry, repository, digest)
			VALUES ($1, $2, $3, $4) ON CONFLICT DO NOTHING`, l.Digest, im.Registry, im.Repository, im.Digest)
		if err != nil {
			return fmt.Errorf("store layers of plan: %w", err)
		}
	}
	for _, p := range d.Parts {
		if p.Skipped != "" {
			continue
		}
		_, err := j.tx.ExecContext(ctx, `INSERT INTO assembler_plan_parts (part, registry, repository, digest)
			VALUES ($1, $2, $3, $4) ON CONFLICT DO NOTHING`, p.Digest, im.Registry, im.Repository, im.Digest)
		if err != nil {
			return fmt.Errorf("store parts of plan: %w", err)
		}
	}
	return j.complete(ctx, im, true)
}

// analyzed records a layer's report and completes the images that waited for it.
func (j *join) analyzed(ctx context.Context, d contracts.LayerAnalyzed) error {
	var stored string
	err := j.tx.QueryRowContext(ctx, `SELECT report FROM assembler_layers WHERE layer = $1 AND analyzer = $2`, d.Digest, d.Analyzer).Scan(&stored)
	if err != nil && !errors.Is(err, sql.ErrNoRows) {
		return fmt.Errorf("read layer: %w", err)
	}
	if stored == d.Report.Digest {
		return nil // nothing is there that was not there before
	}
	_, err = j.tx.ExecContext(ctx, `INSERT INTO assembler_layers (layer, analyzer, report) VALUES ($1, $2, $3)
		ON CONFLICT (layer, analyzer) DO UPDATE SET report = excluded.report`, d.Digest, d.Analyzer, d.Report.Digest)
	if err != nil {
		return fmt.Errorf("store layer: %w", err)
	}
	return j.completeAll(ctx, "assembler_plan_layers", "layer", d.Digest)
}

// failed records that a layer could not be read through one repository. Images
// of that repository may be complete without it; for all others it is asked
// for again through one of their own repositories.
func (j *join) failed(ctx context.Context, d contracts.LayerFailed) error {
	final := 0
	if slices.Contains(permanent, d.Reason) {
		final = 1
	}
	why := d.Reason
	if d.Message != "" {
		why += ": " + d.Message
	}
	_, err := j.tx.ExecContext(ctx, `INSERT INTO assembler_failures (layer, registry, repository, failures, permanent, reason)
		VALUES ($1, $2, $3, 1, $4, $5)
		ON CONFLICT (layer, registry, repository) DO UPDATE
		SET failures = assembler_failures.failures + 1, permanent = excluded.permanent, reason = excluded.reason`,
		d.Digest, d.Image.Registry, d.Image.Repository, final, why)
	if err != nil {
		return fmt.Errorf("store failure of layer: %w", err)
	}
	if err := j.attempted(ctx, d.Digest, d.Attempt); err != nil {
		return err
	}
	return j.completeAll(ctx, "assembler_plan_layers", "layer", d.Digest)
}

// ended records that an image will have no inventory, which may complete the
// indexes it is a part of.
func (j *join) ended(ctx context.Context, im contracts.Image, reason string) error {
	_, err := j.tx.ExecContext(ctx, `INSERT INTO assembler_ended (registry, repository, digest, reason) VALUES ($1, $2, $3, $4)
		ON CONFLICT (registry, repository, digest) DO UPDATE SET reason = excluded.reason`,
		im.Registry, im.Repository, im.Digest, reason)
	if err != nil {
		return fmt.Errorf("store end of image: %w", err)
	}
	return j.parents(ctx, im)
}

// completeAll runs complete for every plan with a layer.
func (j *join) completeAll(ctx context.Context, table, column, digest string) error {
	images, err := j.images(ctx, `SELECT registry, repository, digest FROM `+table+` WHERE `+column+` = $1 ORDER BY 1, 2, 3`, digest) // #nosec G202 -- constant names
	if err != nil {
		return err
	}
	for _, im := range images {
		if err := j.complete(ctx, im, false); err != nil {
			return err
		}
	}
	return nil
}

// parents runs complete for every index of the same repository with a part.
func (j *join) parents(ctx context.Context, part contracts.Image) error {
	images, err := j.images(ctx, `SELECT registry, repository, digest FROM assembler_plan_parts
		WHERE part = $1 AND registry = $2 AND repository = $3 ORDER BY 3`, part.Digest, part.Registry, part.Repository)
	if err != nil {
		return err
	}
	for _, im := range images {
		if err := j.complete(ctx, im, false); err != nil {
			return err
		}
	}
	return nil
}

func (j *join) images(ctx context.Context, query string, args ...any) ([]contracts.Image, error) {
	rows, err := j.tx.QueryContext(ctx, query, args...)
	if err != nil {
		return nil, fmt.Errorf("find plans: %w", err)
	}
	defer rows.Close()
	var images []contracts.Image
	for rows.Next() {
		var im contracts.Image
		if err := rows.Scan(&im.Registry, &im.Repository, &im.Digest); err != nil {
			return nil, fmt.Errorf("find plans: %w", err)
		}
		images = append(images, im)
	}
	return images, rows.Err()
}

// complete asks of one plan whether everything is there, and announces its
// inventory if that is new, or in any case where again is set.
func (j *join) complete(ctx context.Context, im contracts.Image, again bool) error {
	row, ok, err := j.load(ctx, im)
	if err != nil || !ok {
		return err
	}
	var w work
	if row.plan.Kind == contracts.KindIndex {
		w, ok, err = j.indexWork(ctx, row.plan)
	} else {
		w, ok, err = j.imageWork(ctx, row.plan)
	}
	if err != nil || !ok {
		return err
	}
	inv, ok := j.prepared[w.key]
	if !ok {
		j.todo = append(j.todo, w)
		return nil
	}
	if len(inv.lost) > 0 {
		return j.lost(ctx, w, inv.lost)
	}
	if inv.blob.Digest == row.inventory && !again {
		return nil
	}
	return j.announce(ctx, row, w, inv)
}

func (j *join) load(ctx context.Context, im contracts.Image) (planRow, bool, error) {
	var row planRow
	var encoded string
	err := j.tx.QueryRowContext(ctx, `SELECT plan, lane, traceparent, inventory FROM assembler_plans
		WHERE registry = $1 AND repository = $2 AND digest = $3`, im.Registry, im.Repository, im.Digest).
		Scan(&encoded, &row.lane, &row.traceparent, &row.inventory)
	if errors.Is(err, sql.ErrNoRows) {
		return row, false, nil
	}
	if err != nil {
		return row, false, fmt.Errorf("read plan: %w", err)
	}
	if err := json.Unmarshal([]byte(encoded), &row.plan); err != nil {
		return row, false, bus.Permanent(fmt.Errorf("decode plan: %w", err))
	}
	return row, true, nil
}

// layerState is what is known of a layer for the images of one repository.
type layerState struct {
	analyzer, report string // "": no report
	settled          string // why there will be none through this repository; "": it is waited for
	failures         int    // through any repository
}

// imageWork returns what to merge if every layer of the plan has a report or
// never will. Otherwise it sees to it that layers which failed are asked for
// again: their first request may have been left to an event that then failed
// in another repository.
func (j *join) imageWork(ctx context.Context, plan contracts.ImagePlanned) (work, bool, error) {
	states, err := j.layers(ctx, plan.Image)
	if err != nil {
		return work{}, false, err
	}
	w := work{plan: plan, reports: map[string]string{}}
	w.plan.Layers = slices.Clone(plan.Layers)
	complete := true
	for i, l := range w.plan.Layers {
		state := states[l.Digest]
		switch {
		case l.Missing != "":
		case state.report != "":
			w.reports[l.Digest] = state.report
		case state.settled != "":
			w.plan.Layers[i].Missing = state.settled
		default:
			complete = false
			if state.failures > 0 {
				if err := j.ask(ctx, l.Digest); err != nil {
					return work{}, false, err
				}
			}
		}
	}
	w.key = w.inputs()
	return w, complete, nil
}

// layers returns the states of an image's layers.
func (j *join) layers(ctx context.Context, im contracts.Image) (map[string]layerState, error) {
	rows, err := j.tx.QueryContext(ctx, `SELECT p.layer, l.analyzer, l.report FROM assembler_plan_layers p
		JOIN assembler_layers l ON l.layer = p.layer
		WHERE p.registry = $1 AND p.repository = $2 AND p.digest = $3`, im.Registry, im.Repository, im.Digest)
	if err != nil {
		return nil, fmt.Errorf("read layers: %w", err)
	}
	defer rows.Close()
	states := map[string]layerState{}
	for rows.Next() {
		var layer string
		var s layerState
		if err := rows.Scan(&layer, &s.analyzer, &s.report); err != nil {
			return nil, fmt.Errorf("read layers: %w", err)
		}
		if old, ok := states[layer]; !ok || merge.CompareVersions(old.analyzer, s.analyzer) < 0 {
			states[layer] = s // the newest analyzer knows best
		}
	}
	if err := rows.Err(); err != nil {
		return nil, fmt.Errorf("read layers: %w", err)
	}
	return states, j.failures(ctx, im, states)
}

// failures adds to states what is known of layers that failed.
func (j *join) failures(ctx context.Context, im contracts.Image, states map[string]layerState) error {
	rows, err := j.tx.QueryContext(ctx, `SELECT p.layer, f.registry, f.repository, f.failures, f.permanent, f.reason
		FROM assembler_plan_layers p JOIN assembler_failures f ON f.layer = p.layer
		WHERE p.registry = $1 AND p.repository = $2 AND p.digest = $3`, im.Registry, im.Repository, im.Digest)
	if err != nil {
		return fmt.Errorf("read failures of layers: %w", err)
	}
	defer rows.Close()
	for rows.Next() {
		var layer, registry, repository, reason string
		var failures, final int
		if err := rows.Scan(&layer, &registry, &repository, &failures, &final, &reason); err != nil {
			return fmt.Errorf("read failures of layers: %w", err)
		}
		s := states[layer]
		s.failures += failures
		if registry == im.Registry && repository == im.Repository && j.s.settled(failures, final) {
			s.settled = reason
		}
		states[layer] = s
	}
	if err := rows.Err(); err != nil {
		return fmt.Errorf("read failures of layers: %w", err)
	}
	return nil
}

// settled says whether a repository has failed for good.
func (s *Service) settled(failures, final int) bool {
	return final != 0 || failures >= s.cfg.MaxAttempts
}

// indexWork returns what to put together if every selected part of the index
// has an inventory in this repository or never will.
func (j *join) indexWork(ctx context.Context, plan contracts.ImagePlanned) (work, bool, error) {
	w := work{plan: plan}
	for _, p := range plan.Parts {
		if p.Skipped != "" {
			continue
		}
		part := contracts.InventoryPart{Digest: p.Digest, Platform: p.Platform}
		err := j.tx.QueryRowContext(ctx, `SELECT inventory, packages FROM assembler_plans
			WHERE registry = $1 AND repository = $2 AND digest = $3 AND inventory <> ''`,
			plan.Image.Registry, plan.Image.Repository, p.Digest).Scan(&part.Inventory, &part.Packages)
		if err == nil {
			w.parts = append(w.parts, part)
			continue
		}
		if !errors.Is(err, sql.ErrNoRows) {
			return w, false, fmt.Errorf("read part: %w", err)
		}
		gap := contracts.Gap{Layer: p.Digest}
		if p.Platform != nil {
			gap.Path = p.Platform.String()
		}
		err = j.tx.QueryRowContext(ctx, `SELECT reason FROM assembler_ended WHERE registry = $1 AND repository = $2 AND digest = $3`,
			plan.Image.Registry, plan.Image.Repository, p.Digest).Scan(&gap.Reason)
		if errors.Is(err, sql.ErrNoRows) {
			return w, false, nil // waited for
		}
		if err != nil {
			return w, false, fmt.Errorf("read end of part: %w", err)
		}
		w.gaps = append(w.gaps, gap)
	}
	w.key = w.inputs()
	return w, true, nil
}

// announce stores an image's new inventory and emits it, in the lane and the
// trace that its plan came with: what completed it may belong to another image.
func (j *join) announce(ctx context.Context, row planRow, w work, inv inventory) error {
	im := row.plan.Image
	_, err := j.tx.ExecContext(ctx, `UPDATE assembler_plans SET inventory = $1, packages = $2
		WHERE registry = $3 AND repository = $4 AND digest = $5`, inv.blob.Digest, inv.packages, im.Registry, im.Repository, im.Digest)
	if err != nil {
		return fmt.Errorf("store inventory of plan: %w", err)
	}
	_, err = j.tx.ExecContext(ctx, `INSERT INTO assembler_inventories (inputs, inventory, size, packages, gaps, analyzer)
		VALUES ($1, $2, $3, $4, $5, $6) ON CONFLICT (inputs) DO NOTHING`,
		w.key, inv.blob.Digest, inv.blob.Size, inv.packages, inv.gaps, inv.analyzer)
	if err != nil {
		return fmt.Errorf("remember inventory: %w", err)
	}
	ev, err := bus.NewEvent(contracts.ImageAssembledV1, im.String(), contracts.ImageAssembled{
		Image: im, Source: row.plan.Source, Tag: row.plan.Tag, Kind: row.plan.Kind, Platform: row.plan.Platform,
		Inventory: inv.blob, Analyzer: inv.analyzer, Packages: inv.packages, Gaps: inv.gaps,
	})
	if err != nil {
		return bus.Permanent(err)
	}
	ev.SetID(contracts.JoinID(ev.Type(), ev.Subject(), inv.blob.Digest))
	ev.SetExtension(contracts.ExtDataRef, inv.blob.Digest)
	bus.Key(&ev, im.Digest)
	row.mark(&ev)
	j.out = append(j.out, ev)
	return j.parents(ctx, im)
}

// mark sets lane and starting trace of the image's plan on an event.
func (r planRow) mark(ev *event.Event) {
	if r.lane != "" {
		ev.SetExtension(contracts.ExtLane, r.lane)
	}
	if r.traceparent != "" {
		ev.SetExtension(contracts.ExtTraceparent, r.traceparent)
	}
}

// lost forgets layer reports whose blobs are not there any more and asks for
// the layers again.
func (j *join) lost(ctx context.Context, w work, layers []string) error {
	for _, layer := range layers {
		_, err := j.tx.ExecContext(ctx, `DELETE FROM assembler_layers WHERE layer = $1 AND report = $2`, layer, w.reports[layer])
		if err != nil {
			return fmt.Errorf("forget lost layer: %w", err)
		}
		if err := j.ask(ctx, layer); err != nil {
			return err
		}
	}
	return nil
}

// ask requests a layer again, through the repository of a waiting image that
// has failed least. One request is enough: its end, good or bad, is an event
// that comes back here, and then the next repository has its turn.
func (j *join) ask(ctx context.Context, layer string) error {
	if j.asked[layer] {
		return nil
	}
	j.asked[layer] = true
	im, ok, err := j.nextRepository(ctx, layer)
	if err != nil || !ok {
		return err
	}
	row, ok, err := j.load(ctx, im)
	if err != nil || !ok {
		return err
	}
	i := slices.IndexFunc(row.plan.Layers, func(l contracts.PlannedLayer) bool { return l.Digest == layer })
	if i < 0 {
		return nil
	}
	attempt, err := j.attempt(ctx, layer)
	if err != nil {
		return err
	}
	attempt++
	if err := j.attempted(ctx, layer, attempt); err != nil {
		return err
	}
	d := contracts.LayerRequested{
		Digest: layer, MediaType: row.plan.Layers[i].MediaType, Size: row.plan.Layers[i].Size,
		Image: im, Source: row.plan.Source, Attempt: attempt,
	}
	ev, err := bus.NewEvent(contracts.LayerRequestedV1, layer, d)
	if err != nil {
		return bus.Permanent(err)
	}
	ev.SetID(contracts.JoinID(ev.Type(), layer, contracts.DigestOf(ev.Data())))
	row.mark(&ev)
	j.out = append(j.out, ev)
	return nil
}

// nextRepository returns an image through whose repository the layer should be
// tried next; false when all have failed for good or nobody waits.
func (j *join) nextRepository(ctx context.Context, layer string) (contracts.Image, bool, error) {
	var im contracts.Image
	err := j.tx.QueryRowContext(ctx, `SELECT p.registry, p.repository, MIN(p.digest)
		FROM assembler_plan_layers p
		LEFT JOIN assembler_failures f ON f.layer = p.layer AND f.registry = p.registry AND f.repository = p.repository
		WHERE p.layer = $1 AND COALESCE(f.permanent, 0) = 0 AND COALESCE(f.failures, 0) < $2
		GROUP BY p.registry, p.repository
		ORDER BY MAX(COALESCE(f.failures, 0)), 1, 2 LIMIT 1`, layer, j.s.cfg.MaxAttempts).
		Scan(&im.Registry, &im.Repository, &im.Digest)
	if errors.Is(err, sql.ErrNoRows) {
		return im, false, nil
	}
	if err != nil {
		return im, false, fmt.Errorf("find a repository for layer %s: %w", layer, err)
	}
	return im, true, nil
}

func (j *join) attempt(ctx context.Context, layer string) (int, error) {
	var n int
	err := j.tx.QueryRowContext(ctx, `SELECT attempt FROM assembler_asks WHERE layer = $1`, layer).Scan(&n)
	if err != nil && !errors.Is(err, sql.ErrNoRows) {
		return 0, fmt.Errorf("read attempts: %w", err)
	}
	return n, nil
}

// attempted remembers the highest attempt of a layer, so that each request has
// an id of its own.
func (j *join) attempted(ctx context.Context, layer string, attempt int) error {
	_, err := j.tx.ExecContext(ctx, `INSERT INTO assembler_asks (layer, attempt) VALUES ($1, $2)
		ON CONFLICT (layer) DO UPDATE SET attempt = excluded.attempt WHERE assembler_asks.attempt < excluded.attempt`, layer, attempt)
	if err != nil {
		return fmt.Errorf("store attempt: %w", err)
	}
	return nil
}

func extension(ev event.Event, name string) string {
	v, ok := ev.Extensions()[name].(string)
	if !ok {
		return ""
	}
	return v
}
