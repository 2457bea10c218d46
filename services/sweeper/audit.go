package sweeper

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"log/slog"

	"github.com/cloudevents/sdk-go/v2/event"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/bus"
	"github.com/tidewaiter/tidewaiter/libs/registry"
	"github.com/tidewaiter/tidewaiter/services/catalog"
	"github.com/tidewaiter/tidewaiter/services/sweeper/list"
)

// statements looks whether what catalog knows to be attested still carries its
// statements, and pushes again what does not, or never did.
func (s *Sweeper) statements(ctx context.Context, src *source, p *progress) error {
	for {
		images, next, total, err := s.Catalog.Standings(ctx, src.Registry, p.Next, chunk)
		if err != nil {
			return err
		}
		p.Total = total
		page := s.audit(ctx, src, p, images)
		if p.DryRun {
			page.send = nil
		}
		if err := s.publish(ctx, src, contracts.CauseStatement, page.send); err != nil {
			return err
		}
		p.Figures.Checked += page.checked
		p.Figures.Unstated += page.unstated
		p.Figures.Unasked += page.unasked
		switch {
		case page.err != nil:
			p.Next = page.last
		case next == "":
			p.enter(phaseDeleted)
		default:
			p.Next = next
		}
		src.pace.advance(p.Figures)
		if err := p.save(ctx, s.DB.ExecContext); err != nil {
			return err
		}
		if page.err != nil || next == "" {
			return page.err
		}
	}
}

// audited is what was found of some images.
type audited struct {
	checked, unstated, unasked int
	send                       []event.Event
	last                       string // position after the last of them
	err                        error  // why it was the last; nil: there were no more
}

// audit looks for the statements of images, one after the other. One whose
// referrers the registry does not tell, or cannot serve after some pauses, is
// passed over: it is not known whether it lacks any.
func (s *Sweeper) audit(ctx context.Context, src *source, p *progress, images []catalog.Standing) audited {
	a := audited{last: p.Next}
	for _, image := range images {
		if src.rules.Wanted(image.Repository) {
			lacking, err := s.lacking(ctx, src, image)
			switch {
			case err == nil:
				p.Pauses = 0
			case ctx.Err() == nil && (fact(err) || errors.Is(err, registry.ErrUnavailable) && p.Pauses >= maxPauses):
				s.Log.WarnContext(ctx, "statements of an image cannot be looked for", slog.String("source", src.id),
					slog.String("image", src.Registry+"/"+image.Position()), slog.Any("error", err))
				a.unasked++
			default:
				a.err = err
				return a
			}
			if lacking {
				ev, err := pushed(src, image.Repository, list.Tag{Digest: image.Digest}, contracts.CauseStatement, p.id, s.Now())
				if err != nil {
					a.err = err
					return a
				}
				a.send = append(a.send, ev)
				a.unstated++
			}
			a.checked++
		}
		a.last = image.Position()
	}
	return a
}

// lacking says whether statements of an image are missing in the registry. They
// are where the image is gone: planner finds out what became of it.
func (s *Sweeper) lacking(ctx context.Context, src *source, image catalog.Standing) (bool, error) {
	if image.State == catalog.StateFailed {
		return true, nil
	}
	ref := registry.Ref{Registry: src.Registry, Repository: image.Repository, Digest: image.Digest}
	var listed []ocispec.Descriptor
	api := false
	err := s.ask(ctx, src, func() (err error) {
		if err := src.wait(ctx); err != nil {
			return err
		}
		listed, api, err = s.Registry.AllReferrers(ctx, ref)
		return err
	})
	if errors.Is(err, registry.ErrNotFound) {
		return true, nil
	}
	if err != nil {
		return false, err
	}
	present, bundles := map[string]bool{}, 0
	for _, d := range listed {
		present[d.Digest.String()] = true
		if d.ArtifactType == contracts.MediaTypeBundle {
			bundles++
		}
	}
	if len(image.Statements) == 0 { // attested by a version that did not remember them
		return bundles == 0, nil
	}
	for _, digest := range image.Statements {
		if !present[digest] {
			return true, nil
		}
	}
	if api {
		return false, nil
	}
	// A fallback tag names what was pushed, also when that is gone.
	for _, digest := range image.Statements {
		statement := registry.Ref{Registry: ref.Registry, Repository: ref.Repository, Digest: digest}
		err := s.ask(ctx, src, func() error {
			if err := src.wait(ctx); err != nil {
				return err
			}
			_, err := s.Registry.Resolve(ctx, statement)
			return err
		})
		if errors.Is(err, registry.ErrNotFound) {
			return true, nil
		}
		if err != nil {
			return false, err
		}
	}
	return false, nil
}

// deleted reports tags that are known and that the registry does not list any
// more. Of what could not be listed nothing is said.
func (s *Sweeper) deleted(ctx context.Context, src *source, p *progress) error {
	for {
		tags, next, err := s.Catalog.Tags(ctx, src.Registry, p.Next, chunk)
		if err != nil {
			return err
		}
		var send []event.Event
		gone := 0
		for _, t := range tags {
			missing, err := s.unseen(ctx, src, p, t)
			if err != nil {
				return err
			}
			if !missing {
				continue
			}
			gone++
			ev, err := deletedEvent(src, p, t, s)
			if err != nil {
				return err
			}
			send = append(send, ev)
		}
		if p.DryRun {
			send = nil
		}
		if err := s.publish(ctx, src, "deleted", send); err != nil {
			return err
		}
		p.Figures.Deleted += gone
		p.Next, p.Pauses = next, 0
		if next == "" {
			p.enter(phaseDone)
		}
		if err := p.save(ctx, s.DB.ExecContext); err != nil || next == "" {
			return err
		}
	}
}

// unseen says whether this sweep would have listed a tag if it were there: its
// repository was listed as a whole, or is not there where it was before. What
// was pushed since the sweep began may be newer than its listing.
func (s *Sweeper) unseen(ctx context.Context, src *source, p *progress, t catalog.RepositoryTag) (bool, error) {
	if left, err := src.rules.Push(src.Registry, t.Repository, t.Tag); left != "" || err != nil {
		return false, nil //nolint:nilerr // what the source is not about was not looked at
	}
	if t.ObservedAt.After(p.started()) {
		return false, nil
	}
	var sweep, listed int64
	var failure string
	err := s.DB.QueryRowContext(ctx, `SELECT sweep, listed, failure FROM sweeper_repositories WHERE source = $1 AND repository = $2`,
		src.id, t.Repository).Scan(&sweep, &listed, &failure)
	if errors.Is(err, sql.ErrNoRows) {
		return false, nil // no sweep ever saw it
	}
	if err != nil {
		return false, fmt.Errorf("read repository: %w", err)
	}
	if failure != "" || listed == 0 || sweep == p.id && listed != p.id {
		return false, nil
	}
	row, err := readTag(ctx, s.DB, src.id, t.Repository, t.Tag)
	return row.looked != p.id, err
}

func deletedEvent(src *source, p *progress, t catalog.RepositoryTag, s *Sweeper) (event.Event, error) {
	now := s.Now()
	subject := src.Registry + "/" + t.Repository + ":" + t.Tag + "@" + t.Digest
	ev, err := bus.NewEvent(contracts.ImageDeletedV1, subject, contracts.ImageDeleted{
		Source: src.id, Registry: src.Registry, Repository: t.Repository, Tag: t.Tag, Digest: t.Digest, ReceivedAt: now.UTC(),
	})
	if err != nil {
		return ev, fmt.Errorf("event about %s: %w", subject, err)
	}
	mark(&ev, src, t.Repository, "deleted", p.id, now)
	return ev, nil
}
