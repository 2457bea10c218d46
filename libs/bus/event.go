package bus

import (
	"fmt"

	"github.com/cloudevents/sdk-go/v2/event"

	"github.com/tidewaiter/tidewaiter/contracts"
)

// NewEvent returns an event of the given contracts name about subject. Its id
// and source are empty: the bus derives the id from the input that caused it,
// unless the caller sets one (contracts.JoinID).
func NewEvent(name, subject string, data any) (event.Event, error) {
	ev := event.New()
	ev.SetType(contracts.TypePrefix + name)
	ev.SetSubject(subject)
	if err := ev.SetData(event.ApplicationJSON, data); err != nil {
		return event.Event{}, fmt.Errorf("encode data of %s: %w", name, err)
	}
	return ev, nil
}

// Key sets the Kafka key of ev; without one it is the subject.
func Key(ev *event.Event, key string) { ev.SetExtension(contracts.ExtKey, key) }

// GivenUp returns what an OnDead says of an image that a service, the stage,
// gave up: image.failed, keyed by the digest. Of what is no image it is nothing.
func GivenUp(stage string, image contracts.Image, tag string, reason error) []event.Event {
	if image.Validate() != nil {
		return nil // nobody's event
	}
	ev, err := NewEvent(contracts.ImageFailedV1, image.String(), contracts.ImageFailed{
		Registry: image.Registry, Repository: image.Repository, Tag: tag, Digest: image.Digest, Stage: stage, Message: reason.Error(),
	})
	if err != nil {
		return nil // never: the data are plain texts
	}
	Key(&ev, image.Digest)
	return []event.Event{ev}
}

// Decode reads the data of an event; data that is not a T is Permanent.
func Decode[T any](ev event.Event) (T, error) {
	var v T
	if err := ev.DataAs(&v); err != nil {
		return v, Permanent(fmt.Errorf("decode data of %s %s: %w", ev.Type(), ev.ID(), err))
	}
	return v, nil
}
