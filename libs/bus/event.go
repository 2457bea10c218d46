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

// Decode reads the data of an event; data that is not a T is Permanent.
func Decode[T any](ev event.Event) (T, error) {
	var v T
	if err := ev.DataAs(&v); err != nil {
		return v, Permanent(fmt.Errorf("decode data of %s %s: %w", ev.Type(), ev.ID(), err))
	}
	return v, nil
}
