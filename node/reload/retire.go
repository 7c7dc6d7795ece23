package reload

import (
	"context"
	"time"

	"rollcall/node/failpoint"
)

// endSpare ends the prepared process and waits for that: its place may be needed at once.
func (l *mountLoop) endSpare() {
	sp := l.spare
	l.spare = nil
	if sp == nil {
		return
	}
	if sp.backend != nil {
		l.cleanup(sp.backend)
	}
	l.closeProcess(sp.proc)
}

func (l *mountLoop) cleanup(b Backend) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(l.r.ctx), l.r.cfg.RetireTimeout)
	defer cancel()
	if err := b.Cleanup(ctx); err != nil {
		l.log.Debug("clean up plugin backend", "cause", err)
	}
}

func (l *mountLoop) closeProcess(p Process) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(l.r.ctx), l.r.cfg.RetireTimeout)
	defer cancel()
	if err := p.Close(ctx); err != nil {
		l.log.Warn("end plugin process", "pid", p.PID(), "cause", err)
	}
	l.r.metrics.processes.Dec()
}

// retire ends an instance that has left the route, beside the loop, so that a stubborn plugin does not keep the mount
// from following its role. It holds one of the mount's two places until it has ended.
func (l *mountLoop) retire(old *instance, alive bool) {
	done := make(chan struct{})
	l.retired, l.retireFrom, l.retireSteps = done, time.Now(), nil
	l.r.group.Go(func() {
		defer close(done)
		_ = failpoint.Hit(failpoint.ReloadDraining, l.r.self)
		if alive {
			l.cleanup(old.backend)
		}
		l.closeProcess(old.proc)
	})
}

func (l *mountLoop) hasRetired() {
	l.retired = nil
	if l.story != nil {
		l.story.steps = append(l.story.steps, step("drain", l.retireFrom))
	}
	l.log.Debug("old plugin process ended", "took", time.Since(l.retireFrom))
}

// end gives back everything when the mount is gone or the node stops.
func (l *mountLoop) end() {
	l.endSpare()
	if l.run != nil {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(l.r.ctx), l.r.cfg.RetireTimeout)
		if err := l.r.cfg.Routes.Drop(ctx, l.uuid); err != nil {
			l.log.Warn("drop route", "cause", err)
		}
		cancel()
		if !l.down {
			l.cleanup(l.run.backend)
		}
		l.closeProcess(l.run.proc)
		l.log.Info("plugin process ended", "generation", l.run.wanted.GetGeneration(), "pid", l.run.proc.PID())
	} else {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(l.r.ctx), l.r.cfg.RetireTimeout)
		_ = l.r.cfg.Routes.Drop(ctx, l.uuid)
		cancel()
	}
	if l.retired != nil {
		<-l.retired
	}
	l.r.forget(l.uuid)
}
