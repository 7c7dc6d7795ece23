package replica

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"rollcall/node/fault"
)

// metrics of a replica. The gauges are computed when they are read.
type metrics struct {
	registry   prometheus.Registerer
	all        []prometheus.Collector
	proposals  *prometheus.CounterVec
	latency    prometheus.Histogram
	diskStalls prometheus.Counter
	fences     prometheus.Counter
}

func newMetrics(registry prometheus.Registerer, r *Replica) (*metrics, error) {
	const ns, sub = "rollcall", "replica"
	gauge := func(name, help string, f func() float64) prometheus.Collector {
		return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Namespace: ns, Subsystem: sub, Name: name, Help: help}, f)
	}
	counter := func(name, help string, f func() float64) prometheus.Collector {
		return prometheus.NewCounterFunc(prometheus.CounterOpts{Namespace: ns, Subsystem: sub, Name: name, Help: help}, f)
	}
	ofGuard := func(f func(*guard) uint64) func() float64 {
		return func() float64 {
			if r.raft.Load() == nil {
				return 0
			}
			return float64(f(r.guard))
		}
	}
	m := &metrics{
		registry: registry,
		proposals: prometheus.NewCounterVec(prometheus.CounterOpts{
			Namespace: ns, Subsystem: sub, Name: "proposals_total",
			Help: "Commands that this node appended as leader, by what became of them (ok, or the kind of the error).",
		}, []string{"outcome"}),
		latency: prometheus.NewHistogram(prometheus.HistogramOpts{
			Namespace: ns, Subsystem: sub, Name: "commit_seconds", Help: "Time from append to applied on the leader.",
			Buckets: prometheus.ExponentialBuckets(0.0002, 2, 16),
		}),
		diskStalls: prometheus.NewCounter(prometheus.CounterOpts{
			Namespace: ns, Subsystem: sub, Name: "disk_stalls_total", Help: "Times that a write outlived the limit and this node gave up leading.",
		}),
		fences: prometheus.NewCounter(prometheus.CounterOpts{
			Namespace: ns, Subsystem: sub, Name: "lease_losses_total", Help: "Times that this node lost its serving lease.",
		}),
	}
	m.all = []prometheus.Collector{
		m.proposals, m.latency, m.diskStalls, m.fences,
		gauge("leader", "1 while this node leads.", func() float64 { return bit(r.Role().Leader) }),
		gauge("term", "Current Raft term.", func() float64 { return float64(r.Role().Term) }),
		gauge("applied_index", "Index of the last applied command.", func() float64 { return float64(r.fsm.Index()) }),
		gauge("serving", "1 while this node holds a serving lease.", func() float64 { return bit(r.Serving() == nil) }),
		gauge("data_keys", "Data keys that something on this node's disk may need; 0 where nothing is sealed.", func() float64 {
			st, _ := r.KeyStatus()
			return float64(st.Keys)
		}),
		gauge("disk_stall_seconds", "Age of the oldest write to the log that is under way.", func() float64 { return r.DiskStalled().Seconds() }),
		counter("guard_snapshots_skipped_total", "Snapshots that were not newer than the state, hence not installed.",
			ofGuard(func(g *guard) uint64 { return g.skippedSnapshots.Load() })),
		counter("guard_appends_trimmed_total", "Appends whose start was compacted away already.",
			ofGuard(func(g *guard) uint64 { return g.trimmedAppends.Load() })),
		counter("guard_refused_total", "Raft messages that this node has no business with.",
			ofGuard(func(g *guard) uint64 { return g.refused.Load() })),
	}
	for i, c := range m.all {
		if err := registry.Register(c); err != nil {
			for _, done := range m.all[:i] {
				registry.Unregister(done)
			}
			return nil, fault.As(fault.Invalid, err, "register metrics", sub)
		}
	}
	return m, nil
}

func (m *metrics) unregister() {
	for _, c := range m.all {
		m.registry.Unregister(c)
	}
}

func (m *metrics) proposed(started time.Time, err error) {
	if err != nil {
		m.proposals.WithLabelValues(fault.KindOf(err).String()).Inc()
		return
	}
	m.proposals.WithLabelValues("ok").Inc()
	m.latency.Observe(time.Since(started).Seconds())
}

func bit(b bool) float64 {
	if b {
		return 1
	}
	return 0
}
