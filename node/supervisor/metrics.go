package supervisor

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// metrics of all processes together. Names of plugins are not labels: operators choose them, and there may be many.
type metrics struct {
	starts  *prometheus.CounterVec
	seconds *prometheus.HistogramVec
	exits   *prometheus.CounterVec
	dropped prometheus.Counter
	orphans prometheus.Counter

	reg        prometheus.Registerer
	collectors []prometheus.Collector
}

func newMetrics(reg prometheus.Registerer) *metrics {
	m := &metrics{reg: reg}
	m.starts = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "rollcall_plugin_starts_total", Help: "Starts of plugin processes, by plugin type and the phase that failed (ok when none did).",
	}, []string{"type", "result"})
	m.seconds = prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name: "rollcall_plugin_start_seconds", Help: "Time of a start, by phase.",
		Buckets: []float64{.002, .005, .01, .02, .05, .1, .2, .5, 1, 2, 5, 10},
	}, []string{"phase"})
	m.exits = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "rollcall_plugin_exits_total", Help: "Ends of plugin processes: asked (by RPC), term, kill, or crash when nobody asked.",
	}, []string{"how"})
	m.dropped = prometheus.NewCounter(prometheus.CounterOpts{
		Name: "rollcall_plugin_log_dropped_bytes_total", Help: "Output of plugins beyond the rate that is logged.",
	})
	m.orphans = prometheus.NewCounter(prometheus.CounterOpts{
		Name: "rollcall_plugin_orphans_killed_total", Help: "Processes that plugins had left behind, and that were killed.",
	})
	m.collectors = []prometheus.Collector{m.starts, m.seconds, m.exits, m.dropped, m.orphans}
	return m
}

// watch registers everything. A name that is taken already (two supervisors on one registry) stays the first one's.
func (m *metrics) watch(s *Supervisor) {
	running := prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "rollcall_plugin_processes", Help: "Plugin processes that run now.",
	}, func() float64 {
		s.mu.Lock()
		defer s.mu.Unlock()
		return float64(len(s.processes))
	})
	m.collectors = append(m.collectors, running)
	if m.reg == nil {
		return
	}
	for i, c := range m.collectors {
		if m.reg.Register(c) != nil {
			m.collectors[i] = nil
		}
	}
}

func (m *metrics) unregister() {
	if m.reg == nil {
		return
	}
	for _, c := range m.collectors {
		if c != nil {
			m.reg.Unregister(c)
		}
	}
}

func (m *metrics) started(spec Spec, result string, t Timings) {
	m.starts.WithLabelValues(spec.Type, result).Inc()
	if result != "ok" {
		return
	}
	for phase, d := range map[string]time.Duration{"verify": t.Verify, "start": t.Start, "handshake": t.Handshake} {
		m.seconds.WithLabelValues(phase).Observe(d.Seconds())
	}
}
