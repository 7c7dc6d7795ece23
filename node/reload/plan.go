package reload

import (
	"context"
	"time"

	"rollcall/node/fault"
	commandv1 "rollcall/proto/command/v1"
)

// trialJob is a trial that somebody waits for.
type trialJob struct {
	ctx    context.Context
	spec   *commandv1.Spec
	depth  string
	result chan trialResult
}

type trialResult struct {
	report *commandv1.MountReport
	rss    uint64
	err    error
}

func (j *trialJob) answer(r trialResult) { j.result <- r }

// Plan tries the targets' specs on this node, one after the other, without any effect on what runs: bytes, sha256,
// architecture, start, handshake, type, and as much of the set-up as trial says. A report's stage is PREPARED or
// REFUSED; rss holds the resident memory of each tried process in bytes. Any goroutine may call it; a mount that is in
// the middle of a reload is fault.Exhausted.
func (r *Reloads) Plan(ctx context.Context, targets []*commandv1.Target, trial string) ([]*commandv1.MountReport, []uint64, error) {
	if r.ctx == nil {
		return nil, nil, fault.New(fault.Unavailable, "plan", "", "the node has not started")
	}
	if !r.trials.acquire(ctx) {
		return nil, nil, fault.Wrap(ctx.Err(), "plan", "")
	}
	defer r.trials.release()
	var reports []*commandv1.MountReport
	var rss []uint64
	for _, t := range targets {
		r.mu.Lock()
		l := r.loops[t.GetMountUuid()]
		r.mu.Unlock()
		if l == nil {
			return nil, nil, fault.New(fault.NotFound, "plan", t.GetPath(), "this node does not know the mount")
		}
		j := &trialJob{ctx: ctx, spec: t.GetTo(), depth: depthOf(trial, t.GetTrial()), result: make(chan trialResult, 1)}
		var res trialResult
		select {
		case l.jobs <- j:
		case <-ctx.Done():
			return nil, nil, fault.Wrap(ctx.Err(), "plan", t.GetPath())
		case <-r.ctx.Done():
			return nil, nil, fault.New(fault.Unavailable, "plan", t.GetPath(), "the node is stopping")
		}
		select {
		case res = <-j.result:
		case <-r.ctx.Done():
			return nil, nil, fault.New(fault.Unavailable, "plan", t.GetPath(), "the node is stopping")
		}
		if res.err != nil {
			return nil, nil, fault.Wrap(res.err, "plan", t.GetPath())
		}
		reports, rss = append(reports, res.report), append(rss, res.rss)
	}
	return reports, rss, nil
}

// try runs a trial in the reconciler, so that it counts as one of the mount's two processes.
func (l *mountLoop) try(j *trialJob) trialResult {
	if l.spare != nil || l.retired != nil {
		return trialResult{err: fault.New(fault.Exhausted, "try", l.mount.GetPath(),
			"a reload of this mount is under way; try again when it has ended")}
	}
	ctx, cancel := context.WithTimeout(j.ctx, l.r.cfg.StartTimeout)
	defer cancel()
	defer context.AfterFunc(l.r.ctx, cancel)()
	rep := &commandv1.MountReport{
		MountUuid: l.uuid, Stage: commandv1.MountReport_STAGE_PREPARED, WallMs: time.Now().UnixMilli(),
	}
	if l.run != nil {
		rep.From = facts(l.run.wanted.GetSpec(), l.run.wanted.GetGeneration(), l.run.proc.PID())
	}
	sp, steps, err := l.launch(ctx, l.mount, j.spec, depthOf(j.depth, l.mount.GetConfig().GetTrial()))
	rep.Steps, rep.To = steps, facts(j.spec, 0, 0)
	if err != nil {
		if j.ctx.Err() != nil || l.r.ctx.Err() != nil {
			return trialResult{err: err}
		}
		rep.Stage, rep.FailedPhase, rep.Cause = commandv1.MountReport_STAGE_REFUSED, phaseOf(err, "start"), cause(err)
		return trialResult{report: rep}
	}
	rep.To.Pid = int64(sp.proc.PID())
	rss := sp.proc.RSS()
	l.closeProcess(sp.proc)
	return trialResult{report: rep, rss: rss}
}

// TryMount tries a spec for a mount that does not exist yet, before EnableMount is proposed. m carries what the mount
// will be; its uuid need not be known to the state. The error is fault.Refused (or the fault of what refused) with the
// phase as its op.
func (r *Reloads) TryMount(ctx context.Context, m *commandv1.Mount, spec *commandv1.Spec) error {
	if !r.trials.acquire(ctx) {
		return fault.Wrap(ctx.Err(), "try mount", m.GetPath())
	}
	defer r.trials.release()
	ctx, cancel := context.WithTimeout(ctx, r.cfg.StartTimeout)
	defer cancel()
	c := limitCloser{r}
	sp, _, err := r.launch(ctx, m, spec, depthOf(m.GetConfig().GetTrial()), c)
	if err != nil {
		return err
	}
	c.closeProcess(sp.proc)
	return nil
}

// limitCloser ends processes that no reconciler owns.
type limitCloser struct{ r *Reloads }

func (c limitCloser) cleanup(b Backend) {
	ctx, cancel := context.WithTimeout(context.Background(), c.r.cfg.RetireTimeout)
	defer cancel()
	if err := b.Cleanup(ctx); err != nil {
		c.r.log.Debug("clean up plugin backend", "cause", err)
	}
}

func (c limitCloser) closeProcess(p Process) {
	ctx, cancel := context.WithTimeout(context.Background(), c.r.cfg.RetireTimeout)
	defer cancel()
	if err := p.Close(ctx); err != nil {
		c.r.log.Warn("end plugin process", "pid", p.PID(), "cause", err)
	}
	c.r.metrics.processes.Dec()
}
