package telemetry

import (
	"fmt"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-metrics"
	metricsprom "github.com/hashicorp/go-metrics/prometheus"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
)

// Namespace is the first part of the name of every metric that is ours.
const Namespace = "rollcall"

// DurationBuckets are the upper bounds, in seconds, of every duration histogram: from a routed request (half a
// millisecond) to a reload that runs into its deadline. One list, so that dashboards may add series up.
var DurationBuckets = []float64{
	0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300,
}

// NewRegistry makes the registry of one node: its own, never the default one, so that several nodes in one process do
// not meet. It holds the process and Go runtime collectors and rollcall_build_info{version,go}.
func NewRegistry(version string) *prometheus.Registry {
	reg := prometheus.NewRegistry()
	info := prometheus.NewGauge(prometheus.GaugeOpts{
		Namespace: Namespace, Name: "build_info", Help: "Always 1; the labels say which build this is.",
		ConstLabels: prometheus.Labels{"version": version, "go": runtime.Version()},
	})
	info.Set(1)
	reg.MustRegister(
		info, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
	)
	return reg
}

// libraryPrefixes are the metrics that are let through from go-metrics. raft and memberlist are the only libraries
// that emit there.
var libraryPrefixes = []string{"raft.", "memberlist."}

// hub stands in go-metrics' global for as long as at least one bridge is attached, and hands on what it is told.
// raft and memberlist offer no other way: they call package functions.
var hub struct {
	sync.Mutex // guards attach and detach, and the global of go-metrics
	sinks      atomic.Pointer[[]metrics.MetricSink]
}

// BridgeLibraryMetrics registers at reg what raft and memberlist report through go-metrics, under the names that
// those libraries document with "_" for "." (raft_commitTime, memberlist_msg_suspect). Durations are summaries in
// milliseconds. stop takes the bridge away again and is safe to call twice; after the last one go-metrics' global
// discards, as before the first.
//
// The libraries do not say which node of a process a number belongs to: with several nodes in one process every
// bridge shows the sum.
func BridgeLibraryMetrics(reg prometheus.Registerer) (stop func(), err error) {
	sink, err := metricsprom.NewPrometheusSinkFrom(metricsprom.PrometheusOpts{
		Registerer: reg,
		Name:       Namespace + "_library_metrics",
		// A peer that left, or a state that this node is no longer in, drops out of the page after this.
		Expiration: 10 * time.Minute,
	})
	if err != nil {
		return nil, fmt.Errorf("register library metrics: %w", err)
	}
	if err := attach(sink); err != nil {
		reg.Unregister(sink)
		return nil, err
	}
	return sync.OnceFunc(func() {
		detach(sink)
		reg.Unregister(sink)
	}), nil
}

func attach(sink metrics.MetricSink) error {
	hub.Lock()
	defer hub.Unlock()
	var list []metrics.MetricSink
	if old := hub.sinks.Load(); old != nil {
		list = *old
	}
	if len(list) == 0 {
		if _, err := metrics.NewGlobal(globalConfig(), fanout{}); err != nil {
			return fmt.Errorf("take over library metrics: %w", err)
		}
	}
	list = append(slices.Clone(list), sink)
	hub.sinks.Store(&list)
	return nil
}

func detach(sink metrics.MetricSink) {
	hub.Lock()
	defer hub.Unlock()
	old := hub.sinks.Load()
	if old == nil {
		return
	}
	list := slices.DeleteFunc(slices.Clone(*old), func(s metrics.MetricSink) bool { return s == sink })
	hub.sinks.Store(&list)
	if len(list) == 0 {
		// NewGlobal with this configuration cannot fail: it only builds a prefix filter.
		_, _ = metrics.NewGlobal(globalConfig(), &metrics.BlackholeSink{})
	}
}

// globalConfig leaves out what go-metrics would add by itself: host names in keys, and a goroutine for runtime
// metrics that nothing can stop.
func globalConfig() *metrics.Config {
	return &metrics.Config{
		TimerGranularity: time.Millisecond,
		AllowedPrefixes:  libraryPrefixes,
		FilterDefault:    false,
	}
}

// fanout hands every number to each bridge that is attached now. metrics.FanoutSink has a fixed list.
type fanout struct{}

var (
	_ metrics.MetricSink               = fanout{}
	_ metrics.PrecisionGaugeMetricSink = fanout{}
)

func each(f func(metrics.MetricSink)) {
	if list := hub.sinks.Load(); list != nil {
		for _, s := range *list {
			f(s)
		}
	}
}

func (fanout) SetGauge(key []string, val float32) {
	each(func(s metrics.MetricSink) { s.SetGauge(key, val) })
}

func (fanout) SetGaugeWithLabels(key []string, val float32, labels []metrics.Label) {
	each(func(s metrics.MetricSink) { s.SetGaugeWithLabels(key, val, labels) })
}

func (fanout) SetPrecisionGauge(key []string, val float64) {
	fanout{}.SetPrecisionGaugeWithLabels(key, val, nil)
}

func (fanout) SetPrecisionGaugeWithLabels(key []string, val float64, labels []metrics.Label) {
	each(func(s metrics.MetricSink) {
		if p, ok := s.(metrics.PrecisionGaugeMetricSink); ok {
			p.SetPrecisionGaugeWithLabels(key, val, labels)
		}
	})
}

// EmitKey is not handed on: Prometheus has no type for it, and neither library uses it.
func (fanout) EmitKey([]string, float32) {}

func (fanout) IncrCounter(key []string, val float32) {
	each(func(s metrics.MetricSink) { s.IncrCounter(key, val) })
}

func (fanout) IncrCounterWithLabels(key []string, val float32, labels []metrics.Label) {
	each(func(s metrics.MetricSink) { s.IncrCounterWithLabels(key, val, labels) })
}

func (fanout) AddSample(key []string, val float32) {
	each(func(s metrics.MetricSink) { s.AddSample(key, val) })
}

func (fanout) AddSampleWithLabels(key []string, val float32, labels []metrics.Label) {
	each(func(s metrics.MetricSink) { s.AddSampleWithLabels(key, val, labels) })
}
