package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/bus"
	"github.com/tidewaiter/tidewaiter/services/tidewaiter/sample"
)

// followed are the events whose story is told.
var followed = []string{
	contracts.ImagePlannedV1, contracts.ImageUnsupportedV1, contracts.ImageFailedV1, contracts.LayerAnalyzedV1,
	contracts.LayerFailedV1, contracts.LayerRequestedV1, contracts.AdvisoriesChangedV1, contracts.ImageAssembledV1, contracts.ImageMatchedV1, contracts.ImageAttestedV1,
}

// follower reads the events of the pipeline as they happen and tells those of
// the image whose push is being waited for.
type follower struct {
	n      *narrator
	cancel context.CancelFunc
	ended  chan error

	mu       sync.Mutex
	changed  chan struct{} // closed and replaced whenever something was learned
	planned  map[string]contracts.ImagePlanned
	layers   map[string][]contracts.LayerAnalyzed // by layer, in order of arrival
	attested map[string]contracts.ImageAttested   // by image
	failed   map[string]string                    // by image digest: why
	requests int                                  // layers that were asked for
	told     map[string]bool
	claimed  map[string]string // layer → image whose push had it analysed
	current  sample.Pushed
	waiting  []bus.Tailed // events seen before their push was announced
}

// follow starts reading.
func follow(ctx context.Context, cfg bus.Config, log *slog.Logger, n *narrator) (*follower, error) {
	b, err := bus.New(cfg, "demo", log, nil)
	if err != nil {
		return nil, fmt.Errorf("kafka: %w", err)
	}
	if err := b.EnsureTopics(ctx, followed...); err != nil {
		return nil, errors.Join(err, b.Close())
	}
	var topics []string
	for _, name := range followed {
		for _, lane := range []string{contracts.LaneFresh, contracts.LaneBulk} {
			topic, err := b.TopicOf(name, lane)
			if err != nil {
				return nil, errors.Join(err, b.Close())
			}
			if !slices.Contains(topics, topic) {
				topics = append(topics, topic)
			}
		}
	}
	ctx, cancel := context.WithCancel(ctx)
	f := &follower{
		n: n, cancel: cancel, ended: make(chan error, 1), changed: make(chan struct{}),
		planned: map[string]contracts.ImagePlanned{}, layers: map[string][]contracts.LayerAnalyzed{},
		attested: map[string]contracts.ImageAttested{}, failed: map[string]string{},
		told: map[string]bool{}, claimed: map[string]string{},
	}
	go func() {
		err := b.Tail(ctx, topics, true, f.event)
		f.ended <- errors.Join(err, b.Close())
	}()
	return f, nil
}

// stop ends the reading.
func (f *follower) stop() error {
	f.cancel()
	return <-f.ended
}

// event takes in one event.
func (f *follower) event(t bus.Tailed) error {
	if t.Err != nil {
		return nil //nolint:nilerr // what is no event is in the dead letters, and no part of the story
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.waiting = append(f.waiting, t)
	return f.drain()
}

// drain takes in what has arrived, once a push was announced that it may belong to.
func (f *follower) drain() error {
	if f.current.Ref.Digest == "" {
		return nil
	}
	for _, t := range f.waiting {
		if err := f.take(t); err != nil {
			return err
		}
	}
	f.waiting = nil
	close(f.changed)
	f.changed = make(chan struct{})
	return nil
}

func (f *follower) take(t bus.Tailed) error {
	ev := t.Event
	switch ev.Type() {
	case contracts.TypePrefix + contracts.ImagePlannedV1:
		e, err := bus.Decode[contracts.ImagePlanned](ev)
		if err != nil {
			return err
		}
		f.planned[e.Image.String()] = e
		f.tell("planned "+e.Image.String(), func() { f.n.planned(t.Time, e) })
		for _, l := range e.Layers {
			f.tellLayer(t, l.Digest)
		}
	case contracts.TypePrefix + contracts.LayerAnalyzedV1:
		e, err := bus.Decode[contracts.LayerAnalyzed](ev)
		if err != nil {
			return err
		}
		f.layers[e.Digest] = append(f.layers[e.Digest], e)
		f.tellLayer(t, e.Digest)
	case contracts.TypePrefix + contracts.LayerRequestedV1:
		f.requests++
	case contracts.TypePrefix + contracts.AdvisoriesChangedV1:
		e, err := bus.Decode[contracts.AdvisoriesChanged](ev)
		if err != nil {
			return err
		}
		f.tell(ev.ID(), func() { f.n.advised(t.Time, e) })
	case contracts.TypePrefix + contracts.ImageAssembledV1:
		e, err := bus.Decode[contracts.ImageAssembled](ev)
		if err != nil {
			return err
		}
		f.tell(ev.ID(), func() { f.n.assembled(t.Time, e) })
	case contracts.TypePrefix + contracts.ImageMatchedV1:
		e, err := bus.Decode[contracts.ImageMatched](ev)
		if err != nil {
			return err
		}
		f.tell("matched "+e.Image.String()+e.Report.Digest, func() { f.n.matched(t.Time, e) })
	case contracts.TypePrefix + contracts.ImageAttestedV1:
		e, err := bus.Decode[contracts.ImageAttested](ev)
		if err != nil {
			return err
		}
		f.attested[e.Image.String()] = e
		f.tell("attested "+e.Image.String()+e.Report.Digest, func() { f.n.attested(t.Time, e) })
	case contracts.TypePrefix + contracts.ImageUnsupportedV1:
		e, err := bus.Decode[contracts.ImageUnsupported](ev)
		if err != nil {
			return err
		}
		f.failed[e.Image.Digest] = "unsupported: " + e.Message
	case contracts.TypePrefix + contracts.ImageFailedV1:
		e, err := bus.Decode[contracts.ImageFailed](ev)
		if err != nil {
			return err
		}
		f.failed[e.Digest] = "failed in " + e.Stage + ": " + e.Message
	case contracts.TypePrefix + contracts.LayerFailedV1:
		e, err := bus.Decode[contracts.LayerFailed](ev)
		if err != nil {
			return err
		}
		f.n.layerFailed(t.Time, e)
	}
	return nil
}

func (f *follower) tell(id string, line func()) {
	if !f.told[id] {
		f.told[id] = true
		line()
	}
}

// tellLayer tells of a layer once its image is planned and its report is there:
// analysed by this push, or by an earlier one.
func (f *follower) tellLayer(t bus.Tailed, layer string) {
	if !slices.Contains(f.currentLayers(), layer) || len(f.layers[layer]) == 0 {
		return
	}
	push := f.current.String()
	first := f.layers[layer][0]
	if f.claimed[layer] == "" {
		f.claimed[layer] = push
	}
	f.tell("layer "+layer+push, func() {
		if f.claimed[layer] == push {
			f.n.analyzed(t.Time, first)
		} else {
			f.n.deduplicated(t.Time, first)
		}
	})
}

// currentLayers are the layers of the push that is being waited for.
func (f *follower) currentLayers() []string {
	layers := f.current.Layers
	for _, image := range f.imagesOf(f.current) {
		for _, l := range f.planned[image].Layers {
			layers = append(layers, l.Digest)
		}
	}
	return layers
}

// imagesOf are the image and, of an index, its platforms, as far as planned.
func (f *follower) imagesOf(p sample.Pushed) []string {
	images := []string{p.String()}
	for _, part := range f.planned[p.String()].Parts {
		if part.Skipped == "" {
			images = append(images, p.Ref.Registry+"/"+p.Ref.Repository+"@"+part.Digest)
		}
	}
	return images
}

// attested waits until an image and all its platforms carry statements.
func (f *follower) awaitAttested(ctx context.Context, p sample.Pushed) error {
	f.mu.Lock()
	f.current = p
	if err := f.drain(); err != nil {
		f.mu.Unlock()
		return err
	}
	for {
		done, err := f.complete(p)
		changed := f.changed
		f.mu.Unlock()
		if done || err != nil {
			return err
		}
		select {
		case <-changed:
		case err := <-f.ended:
			f.ended <- err
			return fmt.Errorf("reading the events ended: %w", err)
		case <-ctx.Done():
			return fmt.Errorf("%s has no statement yet: %w", p.Ref.Repository, ctx.Err())
		}
		f.mu.Lock()
	}
}

func (f *follower) complete(p sample.Pushed) (bool, error) {
	if _, ok := f.planned[p.String()]; !ok {
		if why, failed := f.failed[p.Ref.Digest]; failed {
			return false, fmt.Errorf("%s: %s", p.Ref.Repository, why)
		}
		return false, nil
	}
	for _, image := range f.imagesOf(p) {
		if why, failed := f.failed[f.planned[image].Image.Digest]; failed {
			return false, fmt.Errorf("%s: %s", image, why)
		}
		if _, ok := f.attested[image]; !ok {
			return false, nil
		}
	}
	// the layers' own events may still be on their way
	for _, layer := range f.currentLayers() {
		if len(f.layers[layer]) == 0 {
			return false, nil
		}
	}
	return true, nil
}

// layerRequests returns how many layers were asked for so far.
func (f *follower) layerRequests() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.requests
}

// awaitVerdict waits until an image's newest statement has a verdict.
func (f *follower) awaitVerdict(ctx context.Context, p sample.Pushed, verdict string) error {
	for {
		f.mu.Lock()
		got, changed := f.attested[p.String()].Verdict, f.changed
		f.mu.Unlock()
		if got == verdict {
			return nil
		}
		select {
		case <-changed:
		case err := <-f.ended:
			f.ended <- err
			return fmt.Errorf("reading the events ended: %w", err)
		case <-ctx.Done():
			return fmt.Errorf("the verdict on %s is still %q, want %q: %w", p.Ref.Repository, got, verdict, ctx.Err())
		}
	}
}

// verdict returns what was attested about an image.
func (f *follower) verdict(p sample.Pushed) string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.attested[p.String()].Verdict
}

// analyzedBy returns the layers that an image's push caused to be analysed.
func (f *follower) analyzedBy(p sample.Pushed) []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	var layers []string
	for layer, push := range f.claimed {
		if push == p.String() {
			layers = append(layers, layer)
		}
	}
	slices.Sort(layers)
	return layers
}

// oncePerLayer checks that no layer was analysed twice.
func (f *follower) oncePerLayer() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	for layer, events := range f.layers {
		n := 0
		for _, e := range events {
			if !e.Reused {
				n++
			}
		}
		if n != 1 {
			return fmt.Errorf("layer %s was analysed %d times, want once", layer, n)
		}
	}
	f.n.ratio(len(f.layers))
	return nil
}
