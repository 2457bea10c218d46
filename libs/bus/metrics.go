package bus

import (
	"errors"

	"github.com/prometheus/client_golang/prometheus"
)

// metrics of one service's bus. Several buses may share a registerer: the
// vectors are shared then, and the service is a label.
type metrics struct {
	handled         *prometheus.CounterVec // type, outcome
	seconds         prometheus.ObserverVec // type
	deadLetters     *prometheus.CounterVec // topic
	lag             *prometheus.GaugeVec   // topic
	publishFailures prometheus.Counter     //
}

func newMetrics(reg prometheus.Registerer, service string) *metrics {
	label := prometheus.Labels{"service": service}
	handled := register(reg, prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "tidewaiter_bus_events_handled_total",
		Help: "Attempts at events, by what came of them.",
	}, []string{"service", "type", "outcome"}))
	seconds := register(reg, prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name:    "tidewaiter_bus_handle_seconds",
		Help:    "Time of one attempt at an event.",
		Buckets: []float64{.001, .005, .02, .1, .5, 2, 10, 60, 300},
	}, []string{"service", "type"}))
	deadLetters := register(reg, prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "tidewaiter_bus_dead_letters_total",
		Help: "Messages sent to the dead letters, by the topic they came from.",
	}, []string{"service", "topic"}))
	lag := register(reg, prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Name: "tidewaiter_bus_lag_events",
		Help: "Events that wait for the service, as the broker says.",
	}, []string{"service", "topic"}))
	failures := register(reg, prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "tidewaiter_bus_publish_failures_total",
		Help: "Events that could not be stored at a first try.",
	}, []string{"service"}))
	return &metrics{
		handled:         handled.MustCurryWith(label),
		seconds:         seconds.MustCurryWith(label),
		deadLetters:     deadLetters.MustCurryWith(label),
		lag:             lag.MustCurryWith(label),
		publishFailures: failures.With(label),
	}
}

// register registers c, or returns the collector that is registered already.
func register[C prometheus.Collector](reg prometheus.Registerer, c C) C {
	if reg == nil {
		return c
	}
	err := reg.Register(c)
	var already prometheus.AlreadyRegisteredError
	if errors.As(err, &already) {
		if existing, ok := already.ExistingCollector.(C); ok {
			return existing
		}
	}
	return c
}
