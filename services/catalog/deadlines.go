package catalog

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/cloudevents/sdk-go/v2/event"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/bus"
)

// causeOverdue is the cause of image.pushed events that catalog itself sends.
const causeOverdue = "overdue"

// dueBatch bounds how many deadlines one transaction handles.
const dueBatch = 500

// deadline is one row of catalog_deadlines.
type deadline struct {
	registry, repository string
	target               string // a digest, or ":" and a tag
	tag, source          string
	since, due           int64
	attempt              int
}

func (d deadline) digest() string {
	if strings.HasPrefix(d.target, ":") {
		return ""
	}
	return d.target
}

// expect starts a deadline for what was pushed or planned, unless one runs.
func (b *batch) expect(ctx context.Context, registry, repository, tag, digest, source string, at time.Time) error {
	target := digest
	if digest == "" {
		if tag == "" {
			return nil // nothing to look for
		}
		target = ":" + tag
	}
	_, err := b.exec(ctx, `INSERT INTO catalog_deadlines (registry, repository, target, tag, source, since, due, attempt)
		VALUES ($1, $2, $3, $4, $5, $6, $7, 0)
		ON CONFLICT (registry, repository, target) DO UPDATE SET since = excluded.since WHERE catalog_deadlines.since < excluded.since`,
		registry, repository, target, tag, source, at.UnixNano(), at.Add(b.s.cfg.Deadlines[0]).UnixNano())
	if err != nil {
		return fmt.Errorf("store deadline: %w", err)
	}
	return nil
}

// unresolved ends the wait for a tag that never became an image.
func (b *batch) unresolved(ctx context.Context, registry, repository, tag string, at time.Time) error {
	_, err := b.exec(ctx, `DELETE FROM catalog_deadlines
		WHERE registry = $1 AND repository = $2 AND target = $3 AND since <= $4`, registry, repository, ":"+tag, at.UnixNano())
	if err != nil {
		return fmt.Errorf("end deadline: %w", err)
	}
	return nil
}

// CheckDeadlines pushes what is overdue at now again, in the bulk lane, and
// lets fail what has been pushed again often enough. Then it sends all that is
// pending.
func (s *Service) CheckDeadlines(ctx context.Context, now time.Time) error {
	for {
		handled := 0
		err := s.db.Tx(ctx, func(tx *sql.Tx) error {
			due, err := dueBefore(ctx, tx, now)
			if err != nil {
				return err
			}
			handled = len(due)
			for _, d := range due {
				if err := s.overdue(ctx, tx, d, now); err != nil {
					return fmt.Errorf("overdue %s/%s %s: %w", d.registry, d.repository, d.target, err)
				}
			}
			return nil
		})
		if err != nil {
			return fmt.Errorf("check deadlines: %w", err)
		}
		if handled < dueBatch {
			return s.send(ctx)
		}
	}
}

func dueBefore(ctx context.Context, tx *sql.Tx, now time.Time) ([]deadline, error) {
	rows, err := tx.QueryContext(ctx, `SELECT registry, repository, target, tag, source, since, due, attempt
		FROM catalog_deadlines WHERE due <= $1 ORDER BY due, registry, repository, target LIMIT $2`, now.UnixNano(), dueBatch)
	if err != nil {
		return nil, fmt.Errorf("read deadlines: %w", err)
	}
	defer rows.Close()
	var all []deadline
	for rows.Next() {
		var d deadline
		if err := rows.Scan(&d.registry, &d.repository, &d.target, &d.tag, &d.source, &d.since, &d.due, &d.attempt); err != nil {
			return nil, fmt.Errorf("read deadlines: %w", err)
		}
		all = append(all, d)
	}
	return all, rows.Err()
}

// overdue handles one deadline that has passed: the image has reached its end,
// is pushed again, or has failed.
func (s *Service) overdue(ctx context.Context, tx *sql.Tx, d deadline, now time.Time) error {
	done, err := reachedEnd(ctx, tx, d)
	if err != nil {
		return err
	}
	if done {
		return forget(ctx, tx, d)
	}
	if d.attempt >= len(s.cfg.Deadlines)-1 {
		ev, err := d.failed(s.cfg.Deadlines)
		if err != nil {
			return err
		}
		ev.SetTime(now)
		if err := enqueue(ctx, tx.ExecContext, ev); err != nil {
			return err
		}
		return forget(ctx, tx, d)
	}
	ev, err := d.pushed(now)
	if err != nil {
		return err
	}
	if err := enqueue(ctx, tx.ExecContext, ev); err != nil {
		return err
	}
	_, err = tx.ExecContext(ctx, `UPDATE catalog_deadlines SET attempt = $1, due = $2
		WHERE registry = $3 AND repository = $4 AND target = $5`,
		d.attempt+1, now.Add(s.cfg.Deadlines[d.attempt+1]).UnixNano(), d.registry, d.repository, d.target)
	if err != nil {
		return fmt.Errorf("store deadline: %w", err)
	}
	return nil
}

func forget(ctx context.Context, tx *sql.Tx, d deadline) error {
	_, err := tx.ExecContext(ctx, `DELETE FROM catalog_deadlines WHERE registry = $1 AND repository = $2 AND target = $3`,
		d.registry, d.repository, d.target)
	if err != nil {
		return fmt.Errorf("forget deadline: %w", err)
	}
	return nil
}

// reachedEnd says whether nothing more is to be waited for. A tag is resolved
// when planner looked at it after the push; the image it found, if any, has a
// deadline of its own.
func reachedEnd(ctx context.Context, tx *sql.Tx, d deadline) (bool, error) {
	if d.digest() != "" {
		var state string
		err := tx.QueryRowContext(ctx, `SELECT state FROM catalog_images WHERE registry = $1 AND repository = $2 AND digest = $3`,
			d.registry, d.repository, d.target).Scan(&state)
		if errors.Is(err, sql.ErrNoRows) {
			return false, nil
		}
		if err != nil {
			return false, fmt.Errorf("read state: %w", err)
		}
		return IsEnd(state), nil
	}
	var resolved int
	err := tx.QueryRowContext(ctx, `SELECT COUNT(*) FROM catalog_tags
		WHERE registry = $1 AND repository = $2 AND tag = $3 AND observed_at >= $4`,
		d.registry, d.repository, strings.TrimPrefix(d.target, ":"), d.since).Scan(&resolved)
	if err != nil {
		return false, fmt.Errorf("read tag: %w", err)
	}
	return resolved > 0, nil
}

// subject returns what the event of a deadline is about.
func (d deadline) subject() string {
	if d.digest() != "" {
		return d.registry + "/" + d.repository + "@" + d.digest()
	}
	return d.registry + "/" + d.repository + d.target
}

// id derives the id of an event from what led to it, so that a second look at
// the same deadline sends the same event.
func (d deadline) id(ev event.Event) string {
	return contracts.JoinID(ev.Type(), ev.Subject(), fmt.Sprintf("%d %d", d.since, d.attempt))
}

func (d deadline) pushed(now time.Time) (event.Event, error) {
	ev, err := bus.NewEvent(contracts.ImagePushedV1, d.subject(), contracts.ImagePushed{
		Source: d.source, Registry: d.registry, Repository: d.repository, Tag: d.tag, Digest: d.digest(),
		Cause: causeOverdue, ReceivedAt: now,
	})
	if err != nil {
		return ev, bus.Permanent(err)
	}
	ev.SetID(d.id(ev))
	ev.SetTime(now)
	ev.SetExtension(contracts.ExtLane, contracts.LaneBulk)
	bus.Key(&ev, d.registry+"/"+d.repository)
	return ev, nil
}

func (d deadline) failed(deadlines []time.Duration) (event.Event, error) {
	var total time.Duration
	for _, wait := range deadlines {
		total += wait
	}
	ev, err := bus.NewEvent(contracts.ImageFailedV1, d.subject(), contracts.ImageFailed{
		Registry: d.registry, Repository: d.repository, Tag: d.tag, Digest: d.digest(), Stage: Name,
		Message: fmt.Sprintf("no end after %s and %d repeated pushes", total, d.attempt),
	})
	if err != nil {
		return ev, bus.Permanent(err)
	}
	ev.SetID(d.id(ev))
	ev.SetExtension(contracts.ExtLane, contracts.LaneBulk)
	key := d.digest()
	if key == "" {
		key = d.registry + "/" + d.repository
	}
	bus.Key(&ev, key)
	return ev, nil
}

// CleanUp keeps the blobs that current images refer to from expiring, and
// forgets what is older than configured.
func (s *Service) CleanUp(ctx context.Context, now time.Time) error {
	blobs, err := s.referred(ctx)
	if err != nil {
		return fmt.Errorf("find blobs in use: %w", err)
	}
	if err := s.db.TouchBlobs(ctx, blobs...); err != nil {
		return fmt.Errorf("keep blobs: %w", err)
	}
	expired, err := s.db.ExpireBlobs(ctx, s.cfg.KeepBlobs)
	if err != nil {
		return fmt.Errorf("expire blobs: %w", err)
	}
	pruned, err := s.db.PruneOutbox(ctx, s.cfg.KeepOutputs)
	if err != nil {
		return fmt.Errorf("prune outbox: %w", err)
	}
	err = s.db.Tx(ctx, func(tx *sql.Tx) error {
		if _, err := tx.ExecContext(ctx, `DELETE FROM catalog_timeline WHERE time < $1`, now.Add(-s.cfg.KeepTimeline).UnixNano()); err != nil {
			return err
		}
		if err := forgetHeard(ctx, tx, now.Add(-s.cfg.KeepTimeline)); err != nil {
			return err
		}
		return forgetInventories(ctx, tx)
	})
	if err != nil {
		return fmt.Errorf("prune timeline, webhooks and index: %w", err)
	}
	s.log.InfoContext(ctx, "cleaned up", "blobs_kept", len(blobs), "blobs_expired", expired, "outputs_forgotten", pruned)
	return nil
}

// referred returns the blobs of all images that are not gone: also those that
// no tag points at now may be asked for, by digest.
func (s *Service) referred(ctx context.Context) ([]string, error) {
	rows, err := s.db.QueryContext(ctx, `SELECT inventory FROM catalog_images WHERE state <> 'gone' AND inventory <> ''
		UNION SELECT report FROM catalog_images WHERE state <> 'gone' AND report <> ''
		UNION SELECT delta FROM catalog_snapshots WHERE delta <> ''`)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	var blobs []string
	for rows.Next() {
		var digest string
		if err := rows.Scan(&digest); err != nil {
			return nil, err
		}
		blobs = append(blobs, digest)
	}
	return blobs, rows.Err()
}
