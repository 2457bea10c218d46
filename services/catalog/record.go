package catalog

import (
	"cmp"
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/cloudevents/sdk-go/v2/event"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/bus"
	"github.com/tidewaiter/tidewaiter/libs/store"
)

// States of an image.
const (
	StatePushed      = "pushed"
	StatePlanned     = "planned"
	StateAssembled   = "assembled"
	StateMatched     = "matched"
	StateAttested    = "attested"
	StateUnsupported = "unsupported"
	StateFailed      = "failed"
	StateGone        = "gone"
)

// Stages of image.failed that renew a verdict.
const (
	stageMatcher  = "matcher"
	stageAttestor = "attestor"
)

// IsEnd says whether an image in this state needs nothing more.
func IsEnd(state string) bool {
	return state == StateAttested || state == StateUnsupported || state == StateFailed || state == StateGone
}

// fact is one event, understood.
type fact struct {
	ev      event.Event
	at      time.Time
	entry   entry
	apply   func(ctx context.Context, b *batch) error // nil: only the timeline
	verdict *contracts.ImageAttested                  // whose report must be read first
	// inventory is the digest of an inventory that is to be indexed; empty: none.
	inventory string
	rematch   bool // whether images may have to be matched again because of it
}

// entry is one row of the timeline.
type entry struct {
	step, registry, repository, tag, digest, layer, message string
	details                                                 map[string]any
}

// batch is one transaction.
type batch struct {
	s       *Service
	tx      *sql.Tx
	reports map[string]summary   // read before the transaction
	indexes map[string]indexed   // the same, of inventories that are not indexed yet
	dirty   map[string]dirtying  // owners whose problems may have changed
	stmts   map[string]*sql.Stmt // prepared in this transaction, which ends them
}

// exec is ExecContext with the statement prepared once a batch: parsing costs
// as much as running these.
func (b *batch) exec(ctx context.Context, query string, args ...any) (sql.Result, error) {
	stmt := b.stmts[query]
	if stmt == nil {
		var err error
		if stmt, err = b.tx.PrepareContext(ctx, query); err != nil {
			return nil, err
		}
		b.stmts[query] = stmt
	}
	return stmt.ExecContext(ctx, args...)
}

// dirtying is the newest of the events that touched an owner.
type dirtying struct {
	registry, repository string
	at                   time.Time
	traceparent          string
}

// Handle records one event. It is a bus.Handler; what it decides is sent before
// it returns, by itself, so that nothing is lost with the answer.
func (s *Service) Handle(ctx context.Context, in event.Event) ([]event.Event, error) {
	return s.Batch(ctx, []event.Event{in})
}

// Batch records events in one transaction and sends what follows from them. An
// event that was recorded before changes nothing.
func (s *Service) Batch(ctx context.Context, in []event.Event) ([]event.Event, error) {
	facts := make([]fact, 0, len(in))
	for _, ev := range in {
		f, err := understand(ev)
		if err != nil {
			return nil, err
		}
		facts = append(facts, f)
	}
	reports, err := s.readReports(ctx, facts)
	if err != nil {
		return nil, outage(fmt.Errorf("read reports: %w", err))
	}
	indexes, err := s.readInventories(ctx, facts)
	if err != nil {
		return nil, outage(fmt.Errorf("read inventories: %w", err))
	}
	err = s.db.Tx(ctx, func(tx *sql.Tx) error {
		b := &batch{s: s, tx: tx, reports: reports, indexes: indexes, dirty: map[string]dirtying{}, stmts: map[string]*sql.Stmt{}}
		for _, f := range facts {
			if err := b.record(ctx, f); err != nil {
				return fmt.Errorf("record %s %s: %w", f.ev.Type(), f.ev.Subject(), err)
			}
		}
		for _, owner := range slices.Sorted(maps.Keys(b.dirty)) {
			if err := b.problems(ctx, b.dirty[owner]); err != nil {
				return fmt.Errorf("problems of %s: %w", owner, err)
			}
		}
		return nil
	})
	if err != nil {
		return nil, outage(err)
	}
	if slices.ContainsFunc(facts, func(f fact) bool { return f.rematch || f.verdict != nil }) {
		s.nudge()
	}
	return nil, s.send(ctx)
}

// outage marks an error of the database as such.
func outage(err error) error {
	if store.IsUnavailable(err) {
		return bus.Unavailable(err)
	}
	return err
}

// record writes an event's timeline row and, if that is new, what it means.
func (b *batch) record(ctx context.Context, f fact) error {
	details := ""
	if len(f.entry.details) > 0 {
		encoded, err := json.Marshal(f.entry.details)
		if err != nil {
			return bus.Permanent(fmt.Errorf("encode details: %w", err))
		}
		details = string(encoded)
	}
	e := f.entry
	result, err := b.exec(ctx, `INSERT INTO catalog_timeline
		(source, id, time, step, service, registry, repository, tag, digest, layer, message, details)
		VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12) ON CONFLICT (source, id) DO NOTHING`,
		f.ev.Source(), f.ev.ID(), f.at.UnixNano(), e.step, strings.TrimPrefix(f.ev.Source(), "/services/"),
		e.registry, e.repository, e.tag, e.digest, e.layer, e.message, details)
	if err != nil {
		return fmt.Errorf("store in timeline: %w", err)
	}
	n, err := result.RowsAffected()
	if err != nil {
		return fmt.Errorf("store in timeline: %w", err)
	}
	if n == 0 || f.apply == nil {
		return nil
	}
	return f.apply(ctx, b)
}

// touch marks the problems of an image's repository as possibly changed.
func (b *batch) touch(f fact, registry, repository string) {
	owner := registry + "/" + repository
	d := dirtying{registry: registry, repository: repository, at: f.at, traceparent: extension(f.ev, contracts.ExtTraceparent)}
	if old, ok := b.dirty[owner]; ok && old.at.After(d.at) {
		return
	}
	b.dirty[owner] = d
}

// image is one row of catalog_images, as far as it decides about the state.
type image struct {
	contracts.Image
	source, kind, platform              string
	state                               string
	firstSeen                           int64
	planned, assembled, matched         int64
	attested, unsupported, failed, gone int64
	inventory, report                   string
	sequence                            int64
	verdict, counts                     string
	validUntil                          int64
	statements                          string
}

const imageColumns = `registry, repository, digest, source, kind, platform, state, first_seen, planned_at, assembled_at, matched_at,
	attested_at, unsupported_at, failed_at, gone_at, inventory, report, sequence, verdict, counts, valid_until, statements`

func (i *image) fields() []any {
	return []any{
		&i.Registry, &i.Repository, &i.Digest, &i.source, &i.kind, &i.platform, &i.state, &i.firstSeen, &i.planned, &i.assembled, &i.matched,
		&i.attested, &i.unsupported, &i.failed, &i.gone, &i.inventory, &i.report, &i.sequence, &i.verdict, &i.counts, &i.validUntil,
		&i.statements,
	}
}

// stateOf derives the state from what is known. A verdict outlives a repeated
// plan and a later failure; only that the image is gone ends it, and only if
// nothing was seen of the image after that.
func (i *image) stateOf() string {
	newest := max(i.planned, i.unsupported, i.attested)
	switch {
	case i.gone > 0 && i.gone >= newest:
		return StateGone
	case i.attested > 0:
		return StateAttested
	case i.unsupported > 0 && i.unsupported >= i.planned:
		return StateUnsupported
	case i.failed > 0 && i.failed >= i.planned:
		return StateFailed
	case i.matched > 0:
		return StateMatched
	case i.assembled > 0:
		return StateAssembled
	case i.planned > 0:
		return StatePlanned
	}
	return StatePushed
}

// update reads an image's row, changes it and writes it back with its state.
// It returns the states before and after.
func (b *batch) update(ctx context.Context, im contracts.Image, at time.Time, change func(i *image)) (before, after string, err error) {
	row := image{Image: im, firstSeen: at.UnixNano()}
	err = b.tx.QueryRowContext(ctx, `SELECT `+imageColumns+` FROM catalog_images
		WHERE registry = $1 AND repository = $2 AND digest = $3`, im.Registry, im.Repository, im.Digest).Scan(row.fields()...)
	if err != nil && !errors.Is(err, sql.ErrNoRows) {
		return "", "", fmt.Errorf("read image: %w", err)
	}
	before = row.state
	row.firstSeen = min(row.firstSeen, at.UnixNano())
	change(&row)
	row.state = row.stateOf()
	_, err = b.exec(ctx, `INSERT INTO catalog_images (`+imageColumns+`)
		VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18, $19, $20, $21, $22)
		ON CONFLICT (registry, repository, digest) DO UPDATE SET source = excluded.source, kind = excluded.kind,
		platform = excluded.platform, state = excluded.state, first_seen = excluded.first_seen, planned_at = excluded.planned_at,
		assembled_at = excluded.assembled_at, matched_at = excluded.matched_at, attested_at = excluded.attested_at,
		unsupported_at = excluded.unsupported_at, failed_at = excluded.failed_at, gone_at = excluded.gone_at,
		inventory = excluded.inventory, report = excluded.report, sequence = excluded.sequence, verdict = excluded.verdict,
		counts = excluded.counts, valid_until = excluded.valid_until, statements = excluded.statements`,
		row.Registry, row.Repository, row.Digest, row.source, row.kind, row.platform, row.state, row.firstSeen, row.planned, row.assembled, row.matched,
		row.attested, row.unsupported, row.failed, row.gone, row.inventory, row.report, row.sequence, row.verdict, row.counts, row.validUntil, row.statements)
	if err != nil {
		return "", "", fmt.Errorf("store image: %w", err)
	}
	return before, row.state, nil
}

// understand decodes an event. Data that cannot be understood is Permanent.
func understand(ev event.Event) (fact, error) {
	f := fact{ev: ev, at: ev.Time().UTC()}
	if f.at.IsZero() {
		f.at = time.Now().UTC() // no service of ours leaves it out
	}
	var err error
	switch strings.TrimPrefix(ev.Type(), contracts.TypePrefix) {
	case contracts.ImagePushedV1:
		err = decoded(ev, &f, pushed)
	case contracts.ImageDeletedV1:
		err = decoded(ev, &f, deleted)
	case contracts.TagObservedV1:
		err = decoded(ev, &f, observed)
	case contracts.ImagePlannedV1:
		err = decoded(ev, &f, planned)
	case contracts.ImageUnsupportedV1:
		err = decoded(ev, &f, unsupported)
	case contracts.ImageGoneV1:
		err = decoded(ev, &f, gone)
	case contracts.ImageFailedV1:
		err = decoded(ev, &f, failed)
	case contracts.LayerAnalyzedV1:
		err = decoded(ev, &f, analyzed)
	case contracts.LayerFailedV1:
		err = decoded(ev, &f, layerFailed)
	case contracts.ImageAssembledV1:
		err = decoded(ev, &f, assembled)
	case contracts.ImageMatchedV1:
		err = decoded(ev, &f, matched)
	case contracts.ImageAttestedV1:
		err = decoded(ev, &f, attested)
	case contracts.AdvisoriesChangedV1:
		err = decoded(ev, &f, advisoriesChanged)
	default:
		err = bus.Permanent(fmt.Errorf("%s is not for %s", ev.Type(), Name))
	}
	return f, err
}

func decoded[T any](ev event.Event, f *fact, fill func(f *fact, d T)) error {
	d, err := bus.Decode[T](ev)
	if err != nil {
		return err
	}
	fill(f, d)
	return nil
}

func pushed(f *fact, d contracts.ImagePushed) {
	f.entry = entry{
		step: contracts.StepPushed, registry: d.Registry, repository: d.Repository, tag: d.Tag, digest: d.Digest,
		message: fmt.Sprintf("%s by %s", d.Cause, d.Source),
	}
	if d.Hint != "" {
		f.entry.details = map[string]any{"hint": d.Hint}
	}
	if d.Cause == causeOverdue {
		return // our own reminder starts no new deadline
	}
	received := cmp.Or(d.ReceivedAt.UTC(), f.at)
	f.apply = func(ctx context.Context, b *batch) error {
		if d.Digest != "" {
			im := contracts.Image{Registry: d.Registry, Repository: d.Repository, Digest: d.Digest}
			if _, _, err := b.update(ctx, im, f.at, func(i *image) { i.source = cmp.Or(i.source, d.Source) }); err != nil {
				return err
			}
		}
		if d.Cause == contracts.CausePush {
			if err := b.heard(ctx, d, received); err != nil {
				return err
			}
		}
		return b.expect(ctx, d.Registry, d.Repository, d.Tag, d.Digest, d.Source, received)
	}
}

// deleted is a hint that planner confirms or not.
func deleted(f *fact, d contracts.ImageDeleted) {
	f.entry = entry{
		step: contracts.StepDeleted, registry: d.Registry, repository: d.Repository, tag: d.Tag, digest: d.Digest,
		message: "reported by " + d.Source, details: map[string]any{"confirmed": false},
	}
}

func observed(f *fact, d contracts.TagObserved) {
	f.entry = entry{registry: d.Registry, repository: d.Repository, tag: d.Tag, digest: d.Digest}
	if d.Digest == "" {
		f.entry.step, f.entry.message = contracts.StepDeleted, "the tag is gone"
	}
	at := cmp.Or(d.ObservedAt.UTC(), f.at).UnixNano()
	f.apply = func(ctx context.Context, b *batch) error {
		_, err := b.exec(ctx, `INSERT INTO catalog_tag_history (registry, repository, digest, tag, observed_at)
			VALUES ($1, $2, $3, $4, $5) ON CONFLICT DO NOTHING`, d.Registry, d.Repository, d.Digest, d.Tag, at)
		if err != nil {
			return fmt.Errorf("store tag: %w", err)
		}
		_, err = b.exec(ctx, `INSERT INTO catalog_tags (registry, repository, tag, digest, observed_at) VALUES ($1, $2, $3, $4, $5)
			ON CONFLICT (registry, repository, tag) DO UPDATE SET digest = excluded.digest, observed_at = excluded.observed_at
			WHERE catalog_tags.observed_at < excluded.observed_at
			OR (catalog_tags.observed_at = excluded.observed_at AND catalog_tags.digest < excluded.digest)`,
			d.Registry, d.Repository, d.Tag, d.Digest, at)
		if err != nil {
			return fmt.Errorf("store tag: %w", err)
		}
		b.touch(*f, d.Registry, d.Repository)
		return nil
	}
}

func planned(f *fact, d contracts.ImagePlanned) {
	f.entry = ofImage(contracts.StepPlanned, d.Image, d.Tag)
	if d.Kind == contracts.KindIndex {
		f.entry.message = fmt.Sprintf("an index of %d manifests", len(d.Parts))
		f.entry.details = map[string]any{"kind": d.Kind, "parts": len(d.Parts)}
	} else {
		f.entry.message = fmt.Sprintf("an image of %d layers", len(d.Layers))
		f.entry.details = map[string]any{"kind": d.Kind, "layers": len(d.Layers)}
	}
	byHand := d.Source == contracts.CauseSubmit
	f.rematch = byHand
	f.apply = func(ctx context.Context, b *batch) error {
		before, after, err := b.update(ctx, d.Image, f.at, func(i *image) {
			i.planned = max(i.planned, f.at.UnixNano())
			i.source, i.kind = d.Source, d.Kind
			if d.Platform != nil {
				i.platform = d.Platform.String()
			}
		})
		if err != nil {
			return err
		}
		if before == StateGone && after != StateGone {
			b.touch(*f, d.Image.Registry, d.Image.Repository)
			if err := b.overtaken(ctx, d.Image); err != nil {
				return err
			}
		}
		if byHand {
			if err := b.requested(ctx, d.Image); err != nil {
				return err
			}
		}
		for _, l := range d.Layers {
			_, err := b.exec(ctx, `INSERT INTO catalog_layers (registry, repository, digest, layer) VALUES ($1, $2, $3, $4)
				ON CONFLICT DO NOTHING`, d.Image.Registry, d.Image.Repository, d.Image.Digest, l.Digest)
			if err != nil {
				return fmt.Errorf("store layers: %w", err)
			}
		}
		for _, p := range d.Parts {
			_, err := b.exec(ctx, `INSERT INTO catalog_parts (registry, repository, part, digest) VALUES ($1, $2, $3, $4)
				ON CONFLICT DO NOTHING`, d.Image.Registry, d.Image.Repository, p.Digest, d.Image.Digest)
			if err != nil {
				return fmt.Errorf("store parts: %w", err)
			}
		}
		if len(d.Parts) > 0 {
			b.touch(*f, d.Image.Registry, d.Image.Repository) // parts count through their index
		}
		return b.expect(ctx, d.Image.Registry, d.Image.Repository, d.Tag, d.Image.Digest, d.Source, f.at)
	}
}

func unsupported(f *fact, d contracts.ImageUnsupported) {
	f.entry = ofImage(contracts.StepUnsupported, d.Image, d.Tag)
	f.entry.message, f.entry.details = d.Message, map[string]any{"reason": d.Reason}
	f.apply = func(ctx context.Context, b *batch) error {
		_, _, err := b.update(ctx, d.Image, f.at, func(i *image) {
			i.unsupported, i.source = max(i.unsupported, f.at.UnixNano()), d.Source
		})
		b.touch(*f, d.Image.Registry, d.Image.Repository) // nothing is waited for any more
		return err
	}
}

func gone(f *fact, d contracts.ImageGone) {
	f.entry = ofImage(contracts.StepDeleted, d.Image, "")
	f.entry.message = d.Reason
	f.apply = func(ctx context.Context, b *batch) error {
		before, after, err := b.update(ctx, d.Image, f.at, func(i *image) { i.gone = max(i.gone, f.at.UnixNano()) })
		if before != after {
			b.touch(*f, d.Image.Registry, d.Image.Repository)
		}
		return err
	}
}

func failed(f *fact, d contracts.ImageFailed) {
	f.entry = entry{
		step: contracts.StepFailed, registry: d.Registry, repository: d.Repository, tag: d.Tag, digest: d.Digest,
		message: d.Message, details: map[string]any{"stage": d.Stage},
	}
	f.apply = func(ctx context.Context, b *batch) error {
		if d.Digest == "" {
			return b.unresolved(ctx, d.Registry, d.Repository, d.Tag, f.at)
		}
		im := contracts.Image{Registry: d.Registry, Repository: d.Repository, Digest: d.Digest}
		_, after, err := b.update(ctx, im, f.at, func(i *image) { i.failed = max(i.failed, f.at.UnixNano()) })
		if err != nil || after != StateAttested || d.Stage != stageMatcher && d.Stage != stageAttestor {
			return err
		}
		return b.failedAgain(ctx, im, f.at)
	}
}

func analyzed(f *fact, d contracts.LayerAnalyzed) {
	f.entry = entry{step: contracts.StepAnalyzed, layer: d.Digest, message: fmt.Sprintf("%d packages", d.Packages)}
	if d.Reused {
		f.entry.step = contracts.StepDeduplicated
	}
	f.entry.details = map[string]any{"packages": d.Packages, "gaps": d.Gaps, "bytes": d.Bytes, "cpuMs": d.CPUMs, "report": d.Report.Digest}
}

func layerFailed(f *fact, d contracts.LayerFailed) {
	f.entry = ofImage(contracts.StepFailed, d.Image, "")
	f.entry.layer, f.entry.message = d.Digest, "layer: "+cmp.Or(d.Message, d.Reason)
	f.entry.details = map[string]any{"reason": d.Reason, "attempt": d.Attempt}
}

func assembled(f *fact, d contracts.ImageAssembled) {
	f.entry = ofImage(contracts.StepAssembled, d.Image, d.Tag)
	f.entry.message = fmt.Sprintf("%d packages", d.Packages)
	f.entry.details = map[string]any{"packages": d.Packages, "gaps": d.Gaps, "inventory": d.Inventory.Digest}
	f.inventory = d.Inventory.Digest
	f.apply = func(ctx context.Context, b *batch) error {
		if err := b.index(ctx, d.Inventory.Digest); err != nil {
			return err
		}
		_, _, err := b.update(ctx, d.Image, f.at, func(i *image) {
			at := f.at.UnixNano()
			if at > i.assembled || (at == i.assembled && d.Inventory.Digest > i.inventory) {
				i.assembled, i.inventory = at, d.Inventory.Digest
			}
		})
		if err != nil {
			return err
		}
		return b.overtaken(ctx, d.Image)
	}
}

func matched(f *fact, d contracts.ImageMatched) {
	f.entry = ofImage(contracts.StepMatched, d.Image, d.Tag)
	f.entry.message = fmt.Sprintf("%s: %d findings", d.Verdict, d.Counts.Total())
	f.entry.details = map[string]any{"verdict": d.Verdict, "counts": d.Counts, "sequence": d.Snapshot.Sequence, "report": d.Report.Digest}
	f.inventory = d.Inventory.Digest
	f.apply = func(ctx context.Context, b *batch) error {
		if err := b.index(ctx, d.Inventory.Digest); err != nil {
			return err
		}
		_, _, err := b.update(ctx, d.Image, f.at, func(i *image) { i.matched = max(i.matched, f.at.UnixNano()) })
		return err
	}
}

func attested(f *fact, d contracts.ImageAttested) {
	f.entry = ofImage(contracts.StepAttested, d.Image, d.Tag)
	f.entry.message = fmt.Sprintf("%s: %d findings, valid until %s", d.Verdict, d.Counts.Total(), d.ValidUntil.UTC().Format(time.RFC3339))
	f.entry.details = map[string]any{
		"verdict": d.Verdict, "counts": d.Counts, "sequence": d.Snapshot.Sequence, "report": d.Report.Digest,
		"statements": len(d.Statements), "signer": d.Signer,
	}
	f.verdict = &d
	f.apply = func(ctx context.Context, b *batch) error { return b.verdict(ctx, *f, d) }
}

// verdict takes over an image's verdict unless a newer one is known: a higher
// sequence of the advisories, and at equal sequence the later signature.
func (b *batch) verdict(ctx context.Context, f fact, d contracts.ImageAttested) error {
	sum, ok := b.reports[d.Report.Digest]
	if !ok {
		b.s.log.WarnContext(ctx, "report of a verdict is not stored, the verdict is not taken over", "image", d.Image.String(), "report", d.Report.Digest)
		return nil
	}
	counts, err := json.Marshal(d.Counts)
	if err != nil {
		return bus.Permanent(fmt.Errorf("encode counts: %w", err))
	}
	statements, err := statementsOf(d)
	if err != nil {
		return bus.Permanent(fmt.Errorf("encode statements: %w", err))
	}
	signed := cmp.Or(d.SignedAt.UTC(), f.at).UnixNano()
	newer := false
	_, _, err = b.update(ctx, d.Image, f.at, func(i *image) {
		order := cmp.Or(cmp.Compare(d.Snapshot.Sequence, i.sequence), cmp.Compare(signed, i.attested), cmp.Compare(d.Report.Digest, i.report))
		if i.attested > 0 && order <= 0 {
			return
		}
		newer = true
		i.sequence, i.attested, i.report, i.verdict, i.counts = d.Snapshot.Sequence, signed, d.Report.Digest, d.Verdict, string(counts)
		i.validUntil, i.statements = d.ValidUntil.UnixNano(), statements
		i.source, i.kind = cmp.Or(i.source, d.Source), cmp.Or(i.kind, d.Kind)
	})
	if err != nil || !newer {
		return err
	}
	if err := b.standing(ctx, d, signed); err != nil {
		return err
	}
	encoded, err := json.Marshal(sum)
	if err != nil {
		return bus.Permanent(fmt.Errorf("encode summary: %w", err))
	}
	_, err = b.exec(ctx, `INSERT INTO catalog_reports (report, summary) VALUES ($1, $2) ON CONFLICT (report) DO NOTHING`,
		d.Report.Digest, string(encoded))
	if err != nil {
		return fmt.Errorf("store summary: %w", err)
	}
	b.touch(f, d.Image.Registry, d.Image.Repository)
	return nil
}

func ofImage(step string, im contracts.Image, tag string) entry {
	return entry{step: step, registry: im.Registry, repository: im.Repository, tag: tag, digest: im.Digest}
}

func extension(ev event.Event, name string) string {
	v, ok := ev.Extensions()[name].(string)
	if !ok {
		return ""
	}
	return v
}
