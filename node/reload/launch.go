package reload

import (
	"context"
	"time"

	"rollcall/node/failpoint"
	commandv1 "rollcall/proto/command/v1"
)

// prepare starts and tries the reload's process beside the running one, and votes. There is one attempt for each
// reload and incarnation: a vote is not a lottery.
func (l *mountLoop) prepare(m *commandv1.Mount, rl *commandv1.Reload) {
	l.tried = rl.GetId()
	guarded, stop := l.guard(func(v View) error {
		if v.Mount(l.uuid) == nil {
			return errUnmounted
		}
		now := v.Reload(rl.GetId())
		p := participant(now, l.r.self)
		if now.GetPhase() != commandv1.Phase_PHASE_PREPARING || p == nil || !votes(p) ||
			p.GetIncarnation() != l.r.cfg.Replica.Incarnation() {
			return errSuperseded
		}
		return nil
	})
	defer stop()
	t := targetOf(rl, l.uuid)
	l.log.Info("preparing", "reload_id", rl.GetId(), "version", t.GetTo().GetVersion(), "sha256", t.GetTo().GetSha256())
	sp, steps, err := l.launch(guarded, m, t.GetTo(), l.depth(m, rl))
	switch {
	case err == nil:
		sp.reloadID, l.spare = rl.GetId(), sp
		l.log.Info("prepared", "reload_id", rl.GetId(), "pid", sp.proc.PID())
		l.put(rl, &commandv1.MountReport{
			Stage: commandv1.MountReport_STAGE_PREPARED, From: l.fromFacts(rl),
			To: facts(t.GetTo(), 0, sp.proc.PID()), Steps: steps,
		})
	case obsolete(guarded):
		l.log.Info("preparation given up", "reload_id", rl.GetId(), "why", context.Cause(guarded))
	default:
		phase := phaseOf(err, "start")
		l.r.metrics.failures.WithLabelValues(phase).Inc()
		l.log.Warn("reload refused", "reload_id", rl.GetId(), "phase", phase, "cause", err)
		l.refuse(rl, phase, err, steps)
	}
}

// depth is how deep a reload tries the new process: what it asks for, else what the mount says.
func (l *mountLoop) depth(m *commandv1.Mount, rl *commandv1.Reload) string {
	return depthOf(rl.GetOptions().GetTrial(), targetOf(rl, l.uuid).GetTrial(), m.GetConfig().GetTrial())
}

func depthOf(words ...string) string {
	for _, w := range words {
		if w != "" {
			return w
		}
	}
	return "initialize"
}

// launch starts a process of spec and, when depth says so, tries it. A process that does not multiplex is used up by
// its trial: a fresh one takes its place before launch returns.
func (l *mountLoop) launch(
	ctx context.Context, m *commandv1.Mount, spec *commandv1.Spec, depth string,
) (*spare, []*commandv1.Step, error) {
	places := l.r.starts
	if l.run == nil {
		places = l.r.boot
	}
	if !places.acquire(ctx) {
		return nil, nil, context.Cause(ctx)
	}
	defer places.release()
	ctx, cancel := context.WithTimeout(ctx, l.r.cfg.StartTimeout)
	defer cancel()
	return l.r.launch(ctx, m, spec, depth, l)
}

// closer ends processes and cleans backends up, each within a limit of its own.
type closer interface {
	cleanup(b Backend)
	closeProcess(p Process)
}

func (r *Reloads) launch(
	ctx context.Context, m *commandv1.Mount, spec *commandv1.Spec, depth string, c closer,
) (*spare, []*commandv1.Step, error) {
	var steps []*commandv1.Step
	from := time.Now()
	if err := r.cfg.Plugins.Ensure(ctx, spec); err != nil {
		return nil, append(steps, step("verify", from)), inPhase(err, "verify")
	}
	steps = append(steps, step("verify", from))
	begin := func() (*spare, error) {
		from := time.Now()
		proc, err := r.cfg.Plugins.Start(ctx, m.GetUuid(), spec)
		if err != nil {
			steps = append(steps, step("start", from))
			return nil, inPhase(err, "start")
		}
		r.metrics.processes.Inc()
		r.metrics.starts.Inc()
		for _, own := range proc.Steps() {
			if own.GetName() != "verify" { // what Ensure took is told already
				steps = append(steps, own)
			}
		}
		return &spare{spec: spec, proc: proc, started: from}, nil
	}
	sp, err := begin()
	if err != nil || depth == "" {
		return sp, steps, err
	}
	b, err := sp.proc.Backend(ctx)
	if err != nil {
		c.closeProcess(sp.proc)
		return nil, steps, inPhase(err, "handshake")
	}
	from = time.Now()
	if err := failpoint.Hit(failpoint.ReloadTrial, r.self); err != nil {
		c.cleanup(b)
		c.closeProcess(sp.proc)
		return nil, steps, inPhase(err, "trial")
	}
	tried, err := r.cfg.Routes.Trial(ctx, m, spec, b, depth)
	if len(tried) == 0 {
		tried = []*commandv1.Step{step("trial", from)}
	}
	steps = append(steps, tried...)
	c.cleanup(b)
	if err != nil {
		c.closeProcess(sp.proc)
		return nil, steps, inPhase(err, "setup")
	}
	if !sp.proc.Multiplexes() {
		c.closeProcess(sp.proc)
		if sp, err = begin(); err != nil {
			return nil, steps, err
		}
	}
	steps = append(steps, &commandv1.Step{Name: "ready", AtUs: time.Now().UnixMicro()})
	return sp, steps, nil
}
