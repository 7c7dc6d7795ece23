package reload

import (
	"errors"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	commandv1 "rollcall/proto/command/v1"
)

type metrics struct {
	reloads   *prometheus.CounterVec
	phases    *prometheus.HistogramVec
	holds     *prometheus.HistogramVec
	failures  *prometheus.CounterVec
	starts    prometheus.Counter
	crashes   prometheus.Counter
	processes prometheus.Gauge
}

func newMetrics(reg prometheus.Registerer) (*metrics, error) {
	seconds := []float64{.001, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60, 120, 300}
	m := &metrics{
		reloads: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "rollcall_reloads_total", Help: "Reloads that this node has seen end, by outcome.",
		}, []string{"outcome"}),
		phases: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "rollcall_reload_phase_seconds", Help: "How long phases of reloads lasted.", Buckets: seconds,
		}, []string{"phase"}),
		holds: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "rollcall_reload_hold_seconds", Help: "How long the gate of a mount held requests for a switch.",
			Buckets: seconds,
		}, []string{"result"}),
		failures: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "rollcall_reload_failures_total", Help: "Preparations and switches that failed here, by phase.",
		}, []string{"phase"}),
		starts: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "rollcall_mount_starts_total", Help: "Plugin processes started here.",
		}),
		crashes: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "rollcall_mount_crashes_total", Help: "Plugin processes that ended by themselves while they served.",
		}),
		processes: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "rollcall_mount_processes", Help: "Plugin processes that the reconcilers of this node hold.",
		}),
	}
	var errs []error
	for _, c := range []prometheus.Collector{
		m.reloads, m.phases, m.holds, m.failures, m.starts, m.crashes, m.processes,
	} {
		errs = append(errs, reg.Register(c))
	}
	return m, errors.Join(errs...)
}

// ended counts a reload that has ended. The lengths come from the proposers' wall clocks: good enough for people.
func (m *metrics) ended(rl *commandv1.Reload) {
	m.reloads.WithLabelValues(rl.GetOutcome()).Inc()
	between := func(phase string, from, to int64) {
		if from > 0 && to >= from {
			m.phases.WithLabelValues(phase).Observe((time.Duration(to-from) * time.Millisecond).Seconds())
		}
	}
	between("queued", rl.GetStartWallMs(), rl.GetPrepareWallMs())
	decided := rl.GetCommitWallMs()
	if decided == 0 {
		decided = rl.GetEndWallMs()
	}
	between("preparing", rl.GetPrepareWallMs(), decided)
	between("committed", rl.GetCommitWallMs(), rl.GetEndWallMs())
}
