package reload

import (
	"errors"
	"log/slog"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// Config is what New needs. The first block has no defaults; of the rest, zero means the default named.
type Config struct {
	State   State
	Plugins Plugins
	Routes  Routes
	Replica Replica
	Peers   Peers
	Logger  *slog.Logger
	Metrics prometheus.Registerer

	// BootParallelism bounds how many plugins start at once while the node comes up (2). More is no faster on two
	// cores (measured: 38-48 ms each with any number), and starves the requests of those that are up.
	BootParallelism int
	// StartParallelism bounds starts for reloads and after crashes (8).
	StartParallelism int
	// StartTimeout bounds one start, from the store to the end of the trial (30 s). The supervisor has a shorter one
	// of its own for the handshake.
	StartTimeout time.Duration
	// SwitchTimeout bounds what happens inside the gate after the drain on the leader (10 s): the router's own limit
	// of 2 s, and a proposal. Beyond it the switch counts as failed and is tried again.
	SwitchTimeout time.Duration
	// Hold is how long the gate may hold requests for the drain, for mounts that do not say (300 ms).
	Hold time.Duration
	// DrainTimeout is when requests in flight are cancelled for a switch that no running reload gives a deadline for
	// (60 s).
	DrainTimeout time.Duration
	// Grace is how long the old generation may go on after the commit while the new one does not even start (5 s, the
	// length of a serving lease). Then the mount answers 503 here until the new one works.
	Grace time.Duration
	// RetireTimeout bounds Cleanup of an old backend, and again the end of its process (5 s each).
	RetireTimeout time.Duration
	// BackoffMin, BackoffMax and BackoffReset shape restarts after a crash: 100 ms, doubled to 30 s with jitter, and
	// from the start again after 60 s up (DESIGN section 7).
	BackoffMin, BackoffMax, BackoffReset time.Duration
	// QueueDeadline, PrepareDeadline and RunDeadline end the phases of reloads that do not say how long they may last
	// (10 min, 60 s, 2 min). Every node should have the same: the leader uses its own.
	QueueDeadline, PrepareDeadline, RunDeadline time.Duration
	// Resync is how often a mount is looked at although nothing changed (1 s).
	Resync time.Duration
	// Flush is how long the leader waits for more reports before it enters those it has (100 ms, measured in
	// PROTOCOL 3).
	Flush time.Duration
	// QueueLimit bounds the reports that wait at the leader (10,000). Beyond it senders are told fault.Exhausted and
	// come back.
	QueueLimit int
	// KeepEvery is how often unneeded plugin bytes are looked for (1 min).
	KeepEvery time.Duration
	// RetainFor is how long detailed reload records stay (7 days of the log's clock).
	RetainFor time.Duration
}

// withDefaults fills what is zero.
func (c Config) withDefaults() Config {
	setInt := func(p *int, v int) {
		if *p == 0 {
			*p = v
		}
	}
	set := func(p *time.Duration, v time.Duration) {
		if *p == 0 {
			*p = v
		}
	}
	setInt(&c.BootParallelism, 2)
	setInt(&c.StartParallelism, 8)
	setInt(&c.QueueLimit, 10_000)
	set(&c.StartTimeout, 30*time.Second)
	set(&c.SwitchTimeout, 10*time.Second)
	set(&c.Hold, 300*time.Millisecond)
	set(&c.DrainTimeout, time.Minute)
	set(&c.Grace, 5*time.Second)
	set(&c.RetireTimeout, 5*time.Second)
	set(&c.BackoffMin, 100*time.Millisecond)
	set(&c.BackoffMax, 30*time.Second)
	set(&c.BackoffReset, time.Minute)
	set(&c.QueueDeadline, 10*time.Minute)
	set(&c.PrepareDeadline, time.Minute)
	set(&c.RunDeadline, 2*time.Minute)
	set(&c.Resync, time.Second)
	set(&c.Flush, 100*time.Millisecond)
	set(&c.KeepEvery, time.Minute)
	set(&c.RetainFor, 7*24*time.Hour)
	return c
}

// Validate reports every field that is missing or makes no sense.
func (c Config) Validate() error {
	var errs []error
	need := func(ok bool, text string) {
		if !ok {
			errs = append(errs, errors.New("reload config: "+text))
		}
	}
	need(c.State != nil, "State is missing")
	need(c.Plugins != nil, "Plugins is missing")
	need(c.Routes != nil, "Routes is missing")
	need(c.Replica != nil, "Replica is missing")
	need(c.Peers != nil, "Peers is missing")
	need(c.Logger != nil, "Logger is missing")
	need(c.Metrics != nil, "Metrics is missing")
	need(c.BootParallelism >= 0 && c.StartParallelism >= 0 && c.QueueLimit >= 0, "counts must not be negative")
	for _, d := range []time.Duration{
		c.StartTimeout, c.SwitchTimeout, c.Hold, c.DrainTimeout, c.Grace, c.RetireTimeout, c.BackoffMin, c.BackoffMax,
		c.BackoffReset,
		c.QueueDeadline, c.PrepareDeadline, c.RunDeadline, c.Resync, c.Flush, c.KeepEvery, c.RetainFor,
	} {
		need(d >= 0, "durations must not be negative")
	}
	need(c.BackoffMax == 0 || c.BackoffMin <= c.BackoffMax, "BackoffMin must not be above BackoffMax")
	return errors.Join(errs...)
}
