package intake

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"sync"
	"time"
)

// Pull fetches a source's events from a queue instead of waiting for calls:
// exactly one of the fields. Such a source has no URL and no authentication:
// whoever may write to the queue is believed.
type Pull struct {
	SQS    *SQSPull    `yaml:"sqs"`
	PubSub *PubSubPull `yaml:"pubsub"`
}

const (
	pullStoreWithin = 10 * time.Second // for storing one message; then it is tried again
	pullPauseMin    = time.Second      // before something that failed is tried again
	pullPauseMax    = time.Minute
	// maxBuried is how much is kept of a message that is bigger than maxBody.
	maxBuried = 64 << 10
)

func (p Pull) validate() error {
	switch {
	case (p.SQS == nil) == (p.PubSub == nil):
		return errors.New("pull: exactly one of sqs and pubsub is needed")
	case p.SQS != nil:
		return p.SQS.validate()
	default:
		return p.PubSub.validate()
	}
}

// poller fetches messages and hands each to take until ctx ends; take says
// whether the message is stored, so that it may be removed. poll returns why it
// cannot go on.
type poller interface {
	poll(ctx context.Context, take func(context.Context, http.Header, []byte) bool, working func()) error
}

// pulls are the pollers of all sources that pull.
type pulls struct {
	s    *Intake
	note func(what string, err error) // where trouble shows
	done sync.WaitGroup
}

// start runs a poller for each source that pulls, until ctx ends. A poller that
// cannot start or go on is tried again; webhooks do not suffer from it.
func (p *pulls) start(ctx context.Context) {
	for _, src := range p.s.sources {
		if src.Pull == nil {
			continue
		}
		p.done.Go(func() { p.run(ctx, src) })
	}
}

func (p *pulls) run(ctx context.Context, src *source) {
	log := p.s.log.With("source", src.id)
	what := Name + " pulls source " + src.id
	up := p.s.metrics.pullUp.WithLabelValues(src.id)
	pause := pullPauseMin
	working := func() {
		pause = pullPauseMin
		up.Set(1)
		p.note(what, nil)
	}
	take := func(ctx context.Context, h http.Header, body []byte) bool { return p.s.takeMessage(ctx, src, h, body) }
	for ctx.Err() == nil {
		err := src.poll(ctx, log, take, working)
		if ctx.Err() != nil {
			return
		}
		if err == nil {
			err = errors.New("the connection ended")
		}
		up.Set(0)
		p.note(what, err)
		log.WarnContext(ctx, "source cannot be pulled", "error", err, "again", pause)
		sleep(ctx, pause)
		pause = min(2*pause, pullPauseMax)
	}
}

// poll runs the source's poller.
func (src *source) poll(
	ctx context.Context, log *slog.Logger, take func(context.Context, http.Header, []byte) bool, working func(),
) error {
	var p poller
	var err error
	if src.Pull.SQS != nil {
		p, err = newSQS(ctx, *src.Pull.SQS, log)
	} else {
		p, err = newPubSub(ctx, *src.Pull.PubSub, log)
	}
	if err != nil {
		return err
	}
	return p.poll(ctx, take, working)
}

// takeMessage stores what one message says and returns whether that was done. It
// goes the way of an authenticated call. The message is finished even if ctx
// ends, within pullStoreWithin.
func (s *Intake) takeMessage(ctx context.Context, src *source, h http.Header, body []byte) bool {
	received := s.now()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), pullStoreWithin)
	defer cancel()
	o := outcome{delivery: delivery{source: src.id, received: received, bytes: len(body)}, known: true}
	if int64(len(body)) > s.cfg.MaxBody {
		o.dead = 1
		o = s.bury(ctx, src, h, body[:min(len(body), maxBuried)], reasonTooLarge,
			fmt.Sprintf("%d bytes, more than intake.maxBody; this is their beginning", len(body)), o)
	} else {
		o = s.store(ctx, src, src.request(h, body), received, o)
	}
	s.metrics.pulled.WithLabelValues(src.id, o.reason).Inc()
	level := slog.LevelDebug
	if o.err != nil {
		level = slog.LevelWarn
	}
	s.log.Log(ctx, level, "pulled message", "source", src.id, "reason", o.reason, "bytes", o.bytes, "events", o.events,
		"published", o.published, "dead", o.dead, "delivery", o.deliveryID, "error", o.err)
	s.remember(o)
	return o.status == http.StatusAccepted
}

// sleep waits, less if ctx ends.
func sleep(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	}
}
