package bus

import (
	"errors"
	"time"
)

// Outcome classifies a handler's error.
type Outcome int

// The five outcomes of a handler.
const (
	OutcomeOK          Outcome = iota // outputs are sent, the input is committed
	OutcomePermanent                  // the input goes to the dead letters
	OutcomeUnavailable                // tried again without end
	OutcomeLater                      // the input goes to the retry topic
	OutcomeRetry                      // tried again in place, a bounded number of times
)

// String returns the outcome as it stands in metrics.
func (o Outcome) String() string {
	switch o {
	case OutcomeOK:
		return "ok"
	case OutcomePermanent:
		return "permanent"
	case OutcomeUnavailable:
		return "unavailable"
	case OutcomeLater:
		return "later"
	default:
		return "retry"
	}
}

// outcomeError is an error that carries the outcome it asks for. What it wraps
// stays visible to errors.Is and errors.As.
type outcomeError struct {
	outcome Outcome
	due     time.Time // OutcomeLater only
	untried bool      // OutcomeLater only: see NotYet
	err     error
}

func (e *outcomeError) Error() string { return e.err.Error() }

func (e *outcomeError) Unwrap() error { return e.err }

// Permanent marks err as not worth another try. nil stays nil.
func Permanent(err error) error {
	if err == nil {
		return nil
	}
	return &outcomeError{outcome: OutcomePermanent, err: err}
}

// Unavailable marks err as the outage of something the service cannot work
// without. nil stays nil.
func Unavailable(err error) error {
	if err == nil {
		return nil
	}
	return &outcomeError{outcome: OutcomeUnavailable, err: err}
}

// Later marks err as something to try again at or after t, out of the way of
// other events. nil stays nil.
func Later(err error, t time.Time) error {
	if err == nil {
		return nil
	}
	return &outcomeError{outcome: OutcomeLater, due: t, err: err}
}

// NotYet is Later for an event that was not really tried, because it was not its
// turn: neither an attempt nor a deferral is counted. nil stays nil.
func NotYet(err error, t time.Time) error {
	if err == nil {
		return nil
	}
	return &outcomeError{outcome: OutcomeLater, due: t, untried: true, err: err}
}

// untried says whether err is of NotYet.
func untried(err error) bool {
	var o *outcomeError
	return errors.As(err, &o) && o.untried
}

// Classify returns the outcome that err asks for: the outermost mark, or
// OutcomeRetry where there is none. For OutcomeLater it also returns the time.
func Classify(err error) (Outcome, time.Time) {
	if err == nil {
		return OutcomeOK, time.Time{}
	}
	var o *outcomeError
	if errors.As(err, &o) {
		return o.outcome, o.due
	}
	return OutcomeRetry, time.Time{}
}
