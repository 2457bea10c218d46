package catalog

import (
	"cmp"
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/cloudevents/sdk-go/v2/event"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/bus"
	"github.com/tidewaiter/tidewaiter/libs/store"
)

// A statement is asked for anew at 75 % of its validity at the latest, and again
// after each further 5 %, in case that was lost. What was attested together is
// spread over the 5 % before.
const (
	refreshAfter  = 75 // per cent
	refreshSpread = 5  // per cent
	refreshAgain  = 5  // per cent
)

// RefreshAge returns how old statements of a validity become before they are
// signed anew.
func RefreshAge(validity time.Duration) time.Duration { return validity / 100 * refreshAfter }

// refreshAt returns when an image's statement is asked for anew, in Unix
// nanoseconds; 0: never. The digest spreads what was signed at one time.
func refreshAt(digest string, signed, validUntil int64) int64 {
	validity := validUntil - signed
	if validity <= 0 {
		return 0
	}
	spread := validity / 100 * refreshSpread
	return signed + int64(RefreshAge(time.Duration(validity))) - number(digest)%(spread+1)
}

// A verdict that failed to be renewed is asked for again after retryFirst, then
// after twice as long each time, up to retryMost.
const (
	retryFirst = 5 * time.Minute
	retryMost  = 6 * time.Hour
)

// Values of catalog_images.requested; see its migration.
const (
	requestNow  = 1
	requestAll  = 2
	requestSent = -1
)

// errLost is why everything is matched again where a delta should tell what to.
var errLost = errors.New("what the snapshot changed is not stored")

// published is one row of catalog_snapshots.
type published struct {
	sequence, previous      int64
	digest, location, delta string
	traceparent             string
}

func advisoriesChanged(f *fact, d contracts.AdvisoriesChanged) {
	f.rematch = true
	previous, delta := int64(-1), ""
	if d.Previous != nil && d.Delta != nil {
		previous, delta = d.Previous.Sequence, d.Delta.Digest
	}
	f.apply = func(ctx context.Context, b *batch) error {
		_, err := b.exec(ctx, `INSERT INTO catalog_snapshots (sequence, digest, location, previous, delta, traceparent, done)
			VALUES ($1, $2, $3, $4, $5, $6, 0) ON CONFLICT DO NOTHING`,
			d.Snapshot.Sequence, d.Snapshot.Digest, d.Location, previous, delta, extension(f.ev, contracts.ExtTraceparent))
		if err != nil {
			return fmt.Errorf("store snapshot: %w", err)
		}
		return nil
	}
}

// standing notes of a verdict that was taken over what matching it again needs:
// whether a newer snapshot was published before it came, which is seen in the
// same transaction, when it is to be refreshed, and that it is what was asked for.
func (b *batch) standing(ctx context.Context, d contracts.ImageAttested, signed int64) error {
	refresh := refreshAt(d.Image.Digest, signed, d.ValidUntil.UnixNano())
	_, err := b.exec(ctx, `UPDATE catalog_images SET snapshot = $1, refresh_at = $2, retries = 0,
		requested = CASE WHEN requested = $8 THEN 0 ELSE requested END,
		late = CASE WHEN $3 < COALESCE((SELECT MAX(sequence) FROM catalog_snapshots), $4) THEN 1 ELSE 0 END
		WHERE registry = $5 AND repository = $6 AND digest = $7`,
		d.Snapshot.Digest, refresh, d.Snapshot.Sequence, int64(-1), d.Image.Registry, d.Image.Repository, d.Image.Digest, requestSent)
	if err != nil {
		return fmt.Errorf("store standing of verdict: %w", err)
	}
	return nil
}

// failedAgain has a verdict asked for again after a while, if what failed came
// after it: matcher or attestor gave up on renewing it.
func (b *batch) failedAgain(ctx context.Context, im contracts.Image, at time.Time) error {
	var retries int
	err := b.tx.QueryRowContext(ctx, `SELECT retries FROM catalog_images WHERE registry = $1 AND repository = $2 AND digest = $3
		AND attested_at > 0 AND attested_at < $4`, im.Registry, im.Repository, im.Digest, at.UnixNano()).Scan(&retries)
	if errors.Is(err, sql.ErrNoRows) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("read failures: %w", err)
	}
	wait := retryFirst
	for range retries {
		wait = min(2*wait, retryMost)
	}
	due := at.Add(wait).UnixNano()
	_, err = b.exec(ctx, `UPDATE catalog_images SET retries = retries + 1,
		refresh_at = CASE WHEN refresh_at = 0 OR refresh_at > $1 THEN $1 ELSE refresh_at END
		WHERE registry = $2 AND repository = $3 AND digest = $4`, due, im.Registry, im.Repository, im.Digest)
	if err != nil {
		return fmt.Errorf("note that it failed: %w", err)
	}
	return nil
}

// overtaken marks a verdict that a snapshot was published after which could not
// find it: its inventory was not known then, or its image was gone.
func (b *batch) overtaken(ctx context.Context, im contracts.Image) error {
	_, err := b.exec(ctx, `UPDATE catalog_images SET late = 1 WHERE registry = $1 AND repository = $2 AND digest = $3
		AND attested_at > 0 AND sequence < COALESCE((SELECT MAX(sequence) FROM catalog_snapshots), $4)`,
		im.Registry, im.Repository, im.Digest, int64(-1))
	if err != nil {
		return fmt.Errorf("mark verdict as late: %w", err)
	}
	return nil
}

// Rematch asks for new verdicts on all images that need one: those that somebody
// asked for, those that a newly published snapshot touches, those whose verdict
// rests on an older one and came after it, and those whose statement nears its
// end. What runs goes first and in the fresh lane. Nothing is asked twice,
// whenever it is stopped and called again.
func (s *Service) Rematch(ctx context.Context, now time.Time) error {
	s.drawing.Lock()
	defer s.drawing.Unlock()
	snapshots, open, err := s.snapshots(ctx)
	if err != nil {
		return err
	}
	if err := s.requests(ctx, snapshots, now); err != nil {
		return fmt.Errorf("verdicts asked for by hand: %w", err)
	}
	for _, p := range open {
		if err := s.consequences(ctx, p, now); err != nil {
			return fmt.Errorf("consequences of snapshot %d: %w", p.sequence, err)
		}
	}
	if len(snapshots) > 0 {
		if err := s.latecomers(ctx, snapshots, now); err != nil {
			return fmt.Errorf("verdicts that came late: %w", err)
		}
	}
	if err := s.refresh(ctx, snapshots, now); err != nil {
		return fmt.Errorf("refresh statements: %w", err)
	}
	if err := s.forgetSnapshots(ctx, snapshots); err != nil {
		return err
	}
	return s.send(ctx) // what an outage kept back
}

// snapshots returns the known snapshots, oldest first, and those of them whose
// consequences are not drawn.
func (s *Service) snapshots(ctx context.Context) (all, open []published, err error) {
	rows, err := s.db.QueryContext(ctx, `SELECT sequence, previous, digest, location, delta, traceparent, done FROM catalog_snapshots ORDER BY sequence`)
	if err != nil {
		return nil, nil, fmt.Errorf("read snapshots: %w", err)
	}
	defer rows.Close()
	for rows.Next() {
		var p published
		var done int
		if err := rows.Scan(&p.sequence, &p.previous, &p.digest, &p.location, &p.delta, &p.traceparent, &done); err != nil {
			return nil, nil, fmt.Errorf("read snapshots: %w", err)
		}
		all = append(all, p)
		if done == 0 {
			open = append(open, p)
		}
	}
	return all, open, rows.Err()
}

func (s *Service) forgetSnapshots(ctx context.Context, all []published) error {
	if len(all) <= s.cfg.KeepSnapshots {
		return nil
	}
	_, err := s.db.ExecContext(ctx, `DELETE FROM catalog_snapshots WHERE sequence < $1`, all[len(all)-s.cfg.KeepSnapshots].sequence)
	if err != nil {
		return fmt.Errorf("forget snapshots: %w", err)
	}
	return nil
}

// changes returns the numbers of the inventories that a snapshot touches; nil: all.
func (s *Service) changes(ctx context.Context, p published) (map[int64]bool, error) {
	if p.delta == "" {
		return nil, nil
	}
	content, err := s.db.Blob(ctx, p.delta)
	switch {
	case errors.Is(err, store.ErrNotFound) || errors.Is(err, store.ErrCorrupt):
		s.log.WarnContext(ctx, "everything is matched again", "snapshot", p.digest, "error", fmt.Errorf("%w: %w", errLost, err))
		return nil, nil
	case err != nil:
		return nil, fmt.Errorf("read delta: %w", err)
	}
	var d contracts.AdvisoriesDelta
	if err := json.Unmarshal(content, &d); err != nil {
		s.log.WarnContext(ctx, "everything is matched again", "snapshot", p.digest, "error", fmt.Errorf("%w: %w", errLost, err))
		return nil, nil
	}
	return s.touched(ctx, &d)
}

// candidate is an image whose verdict may be asked for.
type candidate struct {
	contracts.Image
	source, kind, platform string
	inventory, analyzer    string
	size, number           int64
	sequence               int64
	snapshot               string
	refreshAt, validity    int64
	requested              int
}

const candidateColumns = `i.registry, i.repository, i.digest, i.source, i.kind, i.platform, i.inventory, v.analyzer, v.size, v.number,
	i.sequence, i.snapshot, i.refresh_at, i.valid_until - i.attested_at, i.requested`

func (c *candidate) fields() []any {
	return []any{
		&c.Registry, &c.Repository, &c.Digest, &c.source, &c.kind, &c.platform, &c.inventory, &c.analyzer, &c.size, &c.number,
		&c.sequence, &c.snapshot, &c.refreshAt, &c.validity, &c.requested,
	}
}

func (s *Service) candidates(ctx context.Context, where string, args ...any) ([]candidate, error) {
	rows, err := s.db.QueryContext(ctx, `SELECT `+candidateColumns+` FROM catalog_images i
		JOIN catalog_inventories v ON v.inventory = i.inventory WHERE i.state <> 'gone' AND i.attested_at > 0 AND `+where, args...)
	if err != nil {
		return nil, fmt.Errorf("read images: %w", err)
	}
	defer rows.Close()
	var all []candidate
	for rows.Next() {
		var c candidate
		if err := rows.Scan(c.fields()...); err != nil {
			return nil, fmt.Errorf("read images: %w", err)
		}
		all = append(all, c)
	}
	return all, rows.Err()
}

// consequences asks for a verdict on everything that a snapshot touches. An
// image without a verdict yet is seen to when that comes.
func (s *Service) consequences(ctx context.Context, p published, now time.Time) error {
	if err := s.indexMissing(ctx); err != nil {
		return err
	}
	numbers, err := s.changes(ctx, p)
	if err != nil {
		return err
	}
	behind, err := s.candidates(ctx, `i.sequence < $1 AND i.asked < $1 ORDER BY i.registry, i.repository, i.digest`, p.sequence)
	if err != nil {
		return err
	}
	if numbers != nil {
		behind = slices.DeleteFunc(behind, func(c candidate) bool { return !numbers[c.number] })
	}
	n, err := s.ask(ctx, behind, p, contracts.RematchAdvisories, now)
	if err != nil {
		return err
	}
	if _, err := s.db.ExecContext(ctx, `UPDATE catalog_snapshots SET done = 1 WHERE sequence = $1`, p.sequence); err != nil {
		return fmt.Errorf("store that it is done: %w", err)
	}
	s.log.InfoContext(ctx, "advisory snapshot published, images are matched again", "snapshot", p.digest, "sequence", p.sequence, "images", n)
	return nil
}

// latecomers looks at verdicts that rest on an older snapshot and came after a
// newer one: those that any snapshot in between touches are asked for again.
func (s *Service) latecomers(ctx context.Context, snapshots []published, now time.Time) error {
	late, err := s.candidates(ctx, `i.late = 1 ORDER BY i.registry, i.repository, i.digest`)
	if err != nil || len(late) == 0 {
		return err
	}
	newest := snapshots[len(snapshots)-1]
	numbers := map[int64]map[int64]bool{}
	for _, p := range snapshots {
		if slices.ContainsFunc(late, func(c candidate) bool { return c.sequence < p.sequence }) {
			if numbers[p.sequence], err = s.changes(ctx, p); err != nil {
				return err
			}
		}
	}
	again := slices.DeleteFunc(slices.Clone(late), func(c candidate) bool { return !touches(c, snapshots, numbers) })
	if _, err := s.ask(ctx, again, newest, contracts.RematchAdvisories, now); err != nil {
		return err
	}
	return s.db.Tx(ctx, func(tx *sql.Tx) error {
		for _, c := range late {
			// a verdict that came meanwhile is looked at on its own
			_, err := tx.ExecContext(ctx, `UPDATE catalog_images SET late = 0
				WHERE registry = $1 AND repository = $2 AND digest = $3 AND sequence = $4`, c.Registry, c.Repository, c.Digest, c.sequence)
			if err != nil {
				return fmt.Errorf("store that it was looked at: %w", err)
			}
		}
		return nil
	})
}

// touches says whether a snapshot after an image's verdict touches it, or what
// was changed since is not known in full.
func touches(c candidate, snapshots []published, numbers map[int64]map[int64]bool) bool {
	known := c.sequence
	for _, p := range snapshots {
		if p.sequence <= c.sequence {
			continue
		}
		if p.previous > known || p.previous < 0 || numbers[p.sequence] == nil || numbers[p.sequence][c.number] {
			return true
		}
		known = p.sequence
	}
	return false
}

// ask asks for verdicts with a snapshot: what runs first. It returns how many.
func (s *Service) ask(ctx context.Context, images []candidate, p published, reason string, now time.Time) (int, error) {
	running, err := s.running(ctx)
	if err != nil {
		return 0, err
	}
	slices.SortStableFunc(images, func(a, b candidate) int {
		return cmp.Compare(lane(running, b.Digest), lane(running, a.Digest)) // "fresh" before "bulk"
	})
	asked := 0
	for batch := range slices.Chunk(images, sendBatch) {
		n := 0
		err := s.db.Tx(ctx, func(tx *sql.Tx) error {
			n = 0
			b := newEnqueuer(tx)
			for _, c := range batch {
				ok, err := b.ask(ctx, c, p, reason, lane(running, c.Digest), now)
				if err != nil {
					return err
				}
				if ok {
					n++
				}
			}
			return nil
		})
		if err != nil {
			return asked, outage(err)
		}
		asked += n
		if err := s.send(ctx); err != nil {
			return asked, err
		}
	}
	return asked, nil
}

func lane(running map[string]bool, digest string) string {
	if running[digest] {
		return contracts.LaneFresh
	}
	return contracts.LaneBulk
}

// newEnqueuer returns a batch that only asks.
func newEnqueuer(tx *sql.Tx) *batch { return &batch{tx: tx, stmts: map[string]*sql.Stmt{}} }

// ask notes that a verdict is asked for and stores the event, unless that was
// done or is no longer needed.
func (b *batch) ask(ctx context.Context, c candidate, p published, reason, lane string, now time.Time) (bool, error) {
	result, err := b.exec(ctx, `UPDATE catalog_images SET asked = $1
		WHERE registry = $2 AND repository = $3 AND digest = $4 AND asked < $1 AND sequence < $1`, p.sequence, c.Registry, c.Repository, c.Digest)
	if err != nil {
		return false, fmt.Errorf("note what is asked: %w", err)
	}
	n, err := result.RowsAffected()
	if err != nil || n == 0 {
		return false, err
	}
	ev, err := c.rematch(contracts.SnapshotRef{Digest: p.digest, Sequence: p.sequence}, p.location, reason, p.digest, now)
	if err != nil {
		return false, err
	}
	ev.SetExtension(contracts.ExtLane, lane)
	if p.traceparent != "" {
		ev.SetExtension(contracts.ExtTraceparent, p.traceparent)
	}
	return true, enqueue(ctx, b.exec, ev)
}

// rematch returns the event; cause is what its id is derived from beside the image.
func (c *candidate) rematch(snapshot contracts.SnapshotRef, location, reason, cause string, now time.Time) (event.Event, error) {
	ev, err := bus.NewEvent(contracts.ImageRematchV1, c.String(), contracts.ImageRematch{
		Image: c.Image, Source: c.source, Kind: c.kind, Platform: platformOf(c.platform),
		Inventory: contracts.Blob{Digest: c.inventory, Size: c.size}, Analyzer: c.analyzer,
		Snapshot: snapshot, Location: location, Reason: reason,
	})
	if err != nil {
		return ev, bus.Permanent(err)
	}
	ev.SetID(contracts.JoinID(ev.Type(), ev.Subject(), reason+" "+cause+" "+c.inventory))
	ev.SetTime(now)
	bus.Key(&ev, c.Digest)
	return ev, nil
}

func platformOf(s string) *contracts.Platform {
	parts := strings.SplitN(s, "/", 3)
	if len(parts) < 2 {
		return nil
	}
	p := &contracts.Platform{OS: parts[0], Architecture: parts[1]}
	if len(parts) == 3 {
		p.Variant = parts[2]
	}
	return p
}

// refresh asks for statements that near their end, in the bulk lane.
func (s *Service) refresh(ctx context.Context, snapshots []published, now time.Time) error {
	for {
		due, err := s.candidates(ctx, `i.refresh_at > 0 AND i.refresh_at <= $1 AND i.state = 'attested' ORDER BY i.refresh_at LIMIT $2`,
			now.UnixNano(), sendBatch)
		if err != nil || len(due) == 0 {
			return err
		}
		err = s.db.Tx(ctx, func(tx *sql.Tx) error {
			b := newEnqueuer(tx)
			for _, c := range due {
				if err := b.refresh(ctx, c, snapshots, now); err != nil {
					return fmt.Errorf("refresh %s: %w", c.Image, err)
				}
			}
			return nil
		})
		if err != nil {
			return outage(err)
		}
		if err := s.send(ctx); err != nil {
			return err
		}
	}
}

// newest returns the newest of the snapshots, or that of the verdict if none is
// newer, and where it is.
func (c *candidate) newest(snapshots []published) (ref contracts.SnapshotRef, location string) {
	if n := len(snapshots); n > 0 && snapshots[n-1].sequence > c.sequence {
		newest := snapshots[n-1]
		return contracts.SnapshotRef{Digest: newest.digest, Sequence: newest.sequence}, newest.location
	}
	return contracts.SnapshotRef{Digest: c.snapshot, Sequence: c.sequence}, ""
}

func (b *batch) refresh(ctx context.Context, c candidate, snapshots []published, now time.Time) error {
	snapshot, location := c.newest(snapshots)
	again := now.UnixNano() + max(c.validity/100*refreshAgain, int64(time.Minute))
	result, err := b.exec(ctx, `UPDATE catalog_images SET refresh_at = $1
		WHERE registry = $2 AND repository = $3 AND digest = $4 AND refresh_at = $5`, again, c.Registry, c.Repository, c.Digest, c.refreshAt)
	if err != nil {
		return fmt.Errorf("note what is asked: %w", err)
	}
	if n, err := result.RowsAffected(); err != nil || n == 0 {
		return err
	}
	ev, err := c.rematch(snapshot, location, contracts.RematchRefresh, fmt.Sprint(c.refreshAt), now)
	if err != nil {
		return err
	}
	ev.SetExtension(contracts.ExtLane, contracts.LaneBulk)
	return enqueue(ctx, b.exec, ev)
}

// RequestRematch has every attested image of a reference matched again, against
// the newest advisories and by the policy that matcher has now: of
// registry/repository with or without :tag or @digest, of a digest, or, where it
// is "", of the whole fleet. It returns how many they are; ErrBadRef.
func (s *Service) RequestRematch(ctx context.Context, ref string) (int64, error) {
	r, err := s.resolve(ctx, ref)
	if err != nil {
		return 0, err
	}
	if r.tag != "" && r.digest == "" {
		return 0, nil // it points nowhere
	}
	how := requestAll
	if r.digest != "" {
		how = requestNow
	}
	result, err := s.db.ExecContext(ctx, `UPDATE catalog_images SET requested = $1 WHERE state = 'attested'
		AND ($2 = '' OR registry = $2) AND ($3 = '' OR repository = $3) AND ($4 = '' OR digest = $4)`, how, r.registry, r.repository, r.digest)
	if err != nil {
		return 0, outage(fmt.Errorf("note what is asked for: %w", err))
	}
	n, err := result.RowsAffected()
	if err != nil {
		return 0, fmt.Errorf("count what is asked for: %w", err)
	}
	s.nudge()
	return n, nil
}

// requested notes that somebody waits for a new verdict on an image that has one.
func (b *batch) requested(ctx context.Context, im contracts.Image) error {
	_, err := b.exec(ctx, `UPDATE catalog_images SET requested = $1 WHERE registry = $2 AND repository = $3 AND digest = $4 AND state = 'attested'`,
		requestNow, im.Registry, im.Repository, im.Digest)
	if err != nil {
		return fmt.Errorf("note what is asked for: %w", err)
	}
	return nil
}

// requests asks for the verdicts that somebody asked for.
func (s *Service) requests(ctx context.Context, snapshots []published, now time.Time) error {
	for {
		due, err := s.candidates(ctx, `i.requested > 0 AND i.state = 'attested' ORDER BY i.requested, i.registry, i.repository, i.digest LIMIT $1`, sendBatch)
		if err != nil || len(due) == 0 {
			return err
		}
		running, err := s.running(ctx)
		if err != nil {
			return err
		}
		err = s.db.Tx(ctx, func(tx *sql.Tx) error {
			b := newEnqueuer(tx)
			for _, c := range due {
				if err := b.request(ctx, c, snapshots, lane(running, c.Digest), now); err != nil {
					return fmt.Errorf("ask for %s: %w", c.Image, err)
				}
			}
			return nil
		})
		if err != nil {
			return outage(err)
		}
		if err := s.send(ctx); err != nil {
			return err
		}
	}
}

func (b *batch) request(ctx context.Context, c candidate, snapshots []published, lane string, now time.Time) error {
	result, err := b.exec(ctx, `UPDATE catalog_images SET requested = $1
		WHERE registry = $2 AND repository = $3 AND digest = $4 AND requested = $5`, requestSent, c.Registry, c.Repository, c.Digest, c.requested)
	if err != nil {
		return fmt.Errorf("note what is asked: %w", err)
	}
	if n, err := result.RowsAffected(); err != nil || n == 0 {
		return err
	}
	if c.requested == requestNow {
		lane = contracts.LaneFresh
	}
	snapshot, location := c.newest(snapshots)
	ev, err := c.rematch(snapshot, location, contracts.RematchRequest, fmt.Sprint(now.UnixNano()), now)
	if err != nil {
		return err
	}
	ev.SetExtension(contracts.ExtLane, lane)
	return enqueue(ctx, b.exec, ev)
}

// Deployed takes over what an origin says that runs, instead of what it said
// before.
func (s *Service) Deployed(ctx context.Context, origin string, images []contracts.Image, now time.Time) error {
	err := s.db.Tx(ctx, func(tx *sql.Tx) error {
		if _, err := tx.ExecContext(ctx, `DELETE FROM catalog_deployed WHERE origin = $1`, origin); err != nil {
			return err
		}
		b := newEnqueuer(tx)
		for _, im := range images {
			_, err := b.exec(ctx, `INSERT INTO catalog_deployed (origin, registry, repository, digest, seen_at) VALUES ($1, $2, $3, $4, $5)
				ON CONFLICT DO NOTHING`, origin, im.Registry, im.Repository, im.Digest, now.UnixNano())
			if err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return outage(fmt.Errorf("store what runs: %w", err))
	}
	return nil
}

// running returns the digests that are known to run, with the indexes and the
// parts of indexes that belong to them: a cluster may name either.
func (s *Service) running(ctx context.Context) (map[string]bool, error) {
	digests, err := s.strings(ctx, `SELECT digest FROM catalog_deployed
		UNION SELECT p.part FROM catalog_parts p JOIN catalog_deployed d ON d.digest = p.digest
		UNION SELECT p.digest FROM catalog_parts p JOIN catalog_deployed d ON d.digest = p.part`)
	if err != nil {
		return nil, fmt.Errorf("read what runs: %w", err)
	}
	running := make(map[string]bool, len(digests))
	for _, d := range digests {
		running[d] = true
	}
	return running, nil
}
