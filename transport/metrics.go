package transport

import (
	"context"
	"log/slog"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

type metrics struct {
	conns      *prometheus.GaugeVec   // direction, protocol
	handshakes *prometheus.CounterVec // result
	calls      *prometheus.CounterVec // method, code
	seconds    *prometheus.HistogramVec
	panics     prometheus.Counter
	rotations  prometheus.Counter
	recheck    prometheus.Counter
}

func newMetrics(reg prometheus.Registerer, creds *Credentials) (*metrics, error) {
	const ns, sub = "rollcall", "transport"
	m := &metrics{
		conns: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Namespace: ns, Subsystem: sub, Name: "connections",
			Help: "Authenticated connections on the cluster port, by direction (in, out) and protocol (raft, grpc).",
		}, []string{"direction", "protocol"}),
		handshakes: prometheus.NewCounterVec(prometheus.CounterOpts{
			Namespace: ns, Subsystem: sub, Name: "incoming_total",
			Help: "Incoming connections by result: accepted, refused (certificate or identity), " +
				"silent (no handshake in time), full.",
		}, []string{"result"}),
		calls: prometheus.NewCounterVec(prometheus.CounterOpts{
			Namespace: ns, Subsystem: sub, Name: "served_calls_total",
			Help: "gRPC calls served to peers, by method and gRPC code.",
		}, []string{"method", "code"}),
		seconds: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Namespace: ns, Subsystem: sub, Name: "served_call_seconds",
			Help:    "Time from a call's start to its end, by method.",
			Buckets: []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30},
		}, []string{"method"}),
		panics: prometheus.NewCounter(prometheus.CounterOpts{
			Namespace: ns, Subsystem: sub, Name: "handler_panics_total",
			Help: "gRPC handlers that panicked; each is a defect.",
		}),
		rotations: prometheus.NewCounter(prometheus.CounterOpts{
			Namespace: ns, Subsystem: sub, Name: "credential_changes_total",
			Help: "Times that the certificate or the trusted authorities were replaced while running.",
		}),
		recheck: prometheus.NewCounter(prometheus.CounterOpts{
			Namespace: ns, Subsystem: sub, Name: "recheck_closed_total",
			Help: "Established connections closed because their certificate or identity is no longer accepted.",
		}),
	}
	expiry := prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Namespace: ns, Subsystem: sub, Name: "certificate_expiry_timestamp_seconds",
		Help: "When this node's certificate ends, in seconds since 1970.",
	}, func() float64 { return float64(creds.Identity().NotAfter.Unix()) })
	all := []prometheus.Collector{m.conns, m.handshakes, m.calls, m.seconds, m.panics, m.rotations, m.recheck, expiry}
	for _, c := range all {
		if err := reg.Register(c); err != nil {
			return nil, err
		}
	}
	return m, nil
}

// quietLog lets one line a second through, so that a stranger cannot fill the disk, and says how many it kept back.
type quietLog struct {
	mu   sync.Mutex
	next time.Time
	kept int
}

func (q *quietLog) warn(l *slog.Logger, msg string, args ...any) {
	q.mu.Lock()
	now := time.Now()
	if now.Before(q.next) {
		q.kept++
		q.mu.Unlock()
		return
	}
	kept := q.kept
	q.kept, q.next = 0, now.Add(time.Second)
	q.mu.Unlock()
	if kept > 0 {
		args = append(args, "suppressed", kept)
	}
	l.Log(context.Background(), slog.LevelWarn, msg, args...)
}
