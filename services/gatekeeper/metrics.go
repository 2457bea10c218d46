package gatekeeper

import "github.com/prometheus/client_golang/prometheus"

// metrics of the service.
type metrics struct {
	reviews       *prometheus.CounterVec
	images        *prometheus.CounterVec
	seconds       *prometheus.HistogramVec
	fetchSeconds  prometheus.Histogram
	refused       *prometheus.CounterVec
	cacheFailures prometheus.Counter
	dropped       prometheus.Counter
}

func newMetrics(reg prometheus.Registerer) *metrics {
	m := &metrics{
		reviews: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "tidewaiter_gatekeeper_reviews_total",
			Help: "Reviews by mode and decision: admit, warn, deny.",
		}, []string{"mode", "decision"}),
		images: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "tidewaiter_gatekeeper_images_total",
			Help: "Images in reviews by decision, reason and whether the statement was remembered.",
		}, []string{"decision", "reason", "cached"}),
		seconds: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name:    "tidewaiter_gatekeeper_review_seconds",
			Help:    "Time from a review's header to its answer, by whether all statements were remembered.",
			Buckets: prometheus.ExponentialBuckets(0.0005, 2, 13),
		}, []string{"cached"}),
		fetchSeconds: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:    "tidewaiter_gatekeeper_fetch_seconds",
			Help:    "Time to read an image's statements from its registry.",
			Buckets: prometheus.ExponentialBuckets(0.001, 2, 14),
		}),
		refused: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "tidewaiter_gatekeeper_refused_calls_total",
			Help: "Calls that were no reviews to answer, by HTTP status.",
		}, []string{"status"}),
		cacheFailures: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "tidewaiter_gatekeeper_cache_failures_total",
			Help: "Requests to the cache that failed; the registry was asked instead.",
		}),
		dropped: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "tidewaiter_gatekeeper_dropped_events_total",
			Help: "Events that were not published because too many waited, or Kafka was away at the end.",
		}),
	}
	reg.MustRegister(m.reviews, m.images, m.seconds, m.fetchSeconds, m.refused, m.cacheFailures, m.dropped)
	return m
}
