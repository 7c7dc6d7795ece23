package router

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"rollcall/node/fault"
)

// metrics are this node's counters over all mounts: mounts are unbounded, so they are no label.
type metrics struct {
	requests    *prometheus.CounterVec
	seconds     *prometheus.HistogramVec
	waited      prometheus.Histogram
	hold        prometheus.Histogram
	forwards    *prometheus.CounterVec
	untold      prometheus.Counter
	invalidated prometheus.Counter
	overflows   prometheus.Counter
	repairs     prometheus.Counter
	switches    prometheus.Counter
	crashes     prometheus.Counter

	// ok and took are children of requests and seconds, looked up once.
	ok   [lanes]prometheus.Counter
	took [lanes]prometheus.Observer
}

var laneNames = [lanes]string{readLane: "read", writeLane: "write"}

func newMetrics(reg prometheus.Registerer) (*metrics, error) {
	const ns, sub = "rollcall", "router"
	counter := func(name, help string) prometheus.Counter {
		return prometheus.NewCounter(prometheus.CounterOpts{Namespace: ns, Subsystem: sub, Name: name, Help: help})
	}
	histogram := func(name, help string) prometheus.Histogram {
		return prometheus.NewHistogram(prometheus.HistogramOpts{
			Namespace: ns, Subsystem: sub, Name: name, Help: help, Buckets: prometheus.ExponentialBuckets(.001, 2, 15),
		})
	}
	m := &metrics{
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Namespace: ns, Subsystem: sub, Name: "requests_total",
			Help: "Plugin requests answered on this node, by kind (read, write) and outcome (ok, or a fault kind).",
		}, []string{"kind", "outcome"}),
		seconds: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Namespace: ns, Subsystem: sub, Name: "request_duration_seconds",
			Help:    "Time of plugin requests run on this node, waiting at the gate included.",
			Buckets: prometheus.ExponentialBuckets(.0005, 2, 16),
		}, []string{"kind"}),
		forwards: prometheus.NewCounterVec(prometheus.CounterOpts{
			Namespace: ns, Subsystem: sub, Name: "forwards_total",
			Help: "Attempts to run a request on the leader, by outcome (ok, or a fault kind).",
		}, []string{"outcome"}),
		waited:      histogram("held_seconds", "Time that requests waited at a closed gate."),
		hold:        histogram("hold_seconds", "Time that a gate was closed for one switch."),
		untold:      counter("untold_total", "Answers of forwarded writes released before this node's instance was told of them."),
		invalidated: counter("invalidated_keys_total", "Storage keys that instances were told have changed."),
		overflows:   counter("invalidation_overflows_total", "Invalidation queues that ran over, so that an instance was set up again."),
		repairs:     counter("repairs_total", "Instances set up again, or entered again, on the router's own account."),
		switches:    counter("switches_total", "Instances switched in."),
		crashes:     counter("crashes_total", "Instances whose process ended by itself."),
	}
	for _, c := range []prometheus.Collector{
		m.requests, m.seconds, m.forwards, m.waited, m.hold, m.untold, m.invalidated, m.overflows, m.repairs, m.switches,
		m.crashes,
	} {
		if err := reg.Register(c); err != nil {
			return nil, err
		}
	}
	for lane, name := range laneNames {
		m.ok[lane], m.took[lane] = m.requests.WithLabelValues(name, "ok"), m.seconds.WithLabelValues(name)
	}
	return m, nil
}

func (m *metrics) answered(lane int, took, waited time.Duration, err error) {
	if err == nil {
		m.ok[lane].Inc()
	} else {
		m.requests.WithLabelValues(laneNames[lane], outcomeOf(err)).Inc()
	}
	m.took[lane].Observe(took.Seconds())
	if waited > 0 {
		m.waited.Observe(waited.Seconds())
	}
}

func outcomeOf(err error) string {
	if err == nil {
		return "ok"
	}
	return fault.KindOf(err).String()
}

// damage reports whether an error counts as a failed request: the service's fault, not the client's.
func damage(err error) bool {
	if err == nil {
		return false
	}
	switch fault.KindOf(err) {
	case fault.Invalid, fault.NotFound, fault.Denied, fault.Conflict, fault.UnsupportedPath, fault.UnsupportedOperation,
		fault.TooLarge, fault.Canceled:
		return false
	default:
		return true
	}
}
