package catalog

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"strings"

	"github.com/tidewaiter/tidewaiter/contracts"
)

// Sources of the events that lead from a submitted push to its image.
const (
	sourceIntake  = "/services/intake"
	sourcePlanner = "/services/planner"
)

// Outcome is what became of one push.
type Outcome struct {
	// Ended says whether there is nothing more to wait for: where the image had a
	// verdict already, the one that the push asked for has come.
	Ended bool   `json:"ended"`
	State string `json:"state,omitempty"` // of the image, or of a push that led to none; absent: planner has not looked yet
	// Message says why a push led to no image.
	Message string      `json:"message,omitempty"`
	Image   *ImageEntry `json:"image,omitempty"` // what the push was about, once that is known
}

// Outcome says what became of a push that was submitted by hand: id is that of
// its event, subject registry/repository with :tag, @digest or both (ErrBadRef).
// What came of other pushes is told apart by the ids, which follow from its own:
// no clocks are compared.
func (s *Service) Outcome(ctx context.Context, id, subject string) (Outcome, error) {
	name, digest, _ := strings.Cut(subject, "@")
	r, err := parseRef(name)
	if err == nil && digest != "" && !contracts.ValidDigest(digest) {
		err = fmt.Errorf("%q: %w", subject, ErrBadRef)
	}
	if err != nil {
		return Outcome{}, err
	}
	r.digest = digest
	given := name // as planner names the push where it gives up
	if digest != "" {
		given = contracts.Image{Registry: r.registry, Repository: r.repository, Digest: digest}.String()
	}
	if r.digest == "" {
		observed, ok, err := s.ledTo(ctx, id, contracts.TagObservedV1, name)
		if err != nil {
			return Outcome{}, err
		}
		if ok && observed.digest == "" {
			return Outcome{Ended: true, State: StateGone, Message: observed.message}, nil
		}
		r.digest = observed.digest
	}
	if r.digest == "" {
		return s.refused(ctx, id, given)
	}
	im := contracts.Image{Registry: r.registry, Repository: r.repository, Digest: r.digest}
	looked := false
	for _, event := range []string{contracts.ImagePlannedV1, contracts.ImageUnsupportedV1, contracts.ImageGoneV1} {
		_, ok, err := s.ledTo(ctx, id, event, im.String())
		if err != nil {
			return Outcome{}, err
		}
		looked = looked || ok
	}
	if !looked {
		return s.refused(ctx, id, given)
	}
	images, err := s.Images(ctx, im.String(), "", "", 1)
	if err != nil || len(images) == 0 {
		return Outcome{}, err
	}
	var waits bool
	err = s.db.QueryRowContext(ctx, `SELECT requested <> 0 FROM catalog_images WHERE registry = $1 AND repository = $2 AND digest = $3`,
		im.Registry, im.Repository, im.Digest).Scan(&waits)
	if err != nil {
		return Outcome{}, fmt.Errorf("read image: %w", err)
	}
	state := images[0].State
	return Outcome{Ended: IsEnd(state) && (state != StateAttested || !waits), State: state, Image: &images[0]}, nil
}

// refused says whether planner gave the push up.
func (s *Service) refused(ctx context.Context, id, subject string) (Outcome, error) {
	failed, ok, err := s.ledTo(ctx, id, contracts.ImageFailedV1, subject)
	if err != nil || !ok {
		return Outcome{}, err
	}
	return Outcome{Ended: true, State: StateFailed, Message: failed.message}, nil
}

// ledTo returns what is remembered of the event that planner derived from a
// submitted push.
func (s *Service) ledTo(ctx context.Context, id, event, subject string) (e entry, ok bool, err error) {
	derived := contracts.OutputID("planner", sourceIntake, id, contracts.TypePrefix+event, subject)
	err = s.db.QueryRowContext(ctx, `SELECT digest, message FROM catalog_timeline WHERE source = $1 AND id = $2`, sourcePlanner, derived).
		Scan(&e.digest, &e.message)
	if errors.Is(err, sql.ErrNoRows) {
		return e, false, nil
	}
	if err != nil {
		return e, false, fmt.Errorf("read timeline: %w", err)
	}
	return e, true, nil
}
