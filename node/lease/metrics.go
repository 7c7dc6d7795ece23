package lease

import "github.com/prometheus/client_golang/prometheus"

type metrics struct {
	events        *prometheus.CounterVec
	tokensExpired prometheus.Counter
}

func newMetrics(reg prometheus.Registerer, state State) (*metrics, error) {
	m := &metrics{
		events: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "rollcall_lease_events_total", Help: "Leases granted, renewed, revoked, and revocations that failed, on this node.",
		}, []string{"event"}),
		tokensExpired: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "rollcall_tokens_expired_total", Help: "Tokens that this node, as leader, ended because their time was over.",
		}),
	}
	for _, e := range []string{"granted", "renewed", "revoked", "revoke_failed"} {
		m.events.WithLabelValues(e)
	}
	for _, c := range []prometheus.Collector{
		m.events, m.tokensExpired,
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "rollcall_leases", Help: "Leases in the state."},
			func() float64 { return float64(state.View().LeaseCount()) }),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "rollcall_tokens", Help: "Tokens in the state."},
			func() float64 { return float64(state.View().TokenCount()) }),
	} {
		if err := reg.Register(c); err != nil {
			return nil, err
		}
	}
	return m, nil
}
