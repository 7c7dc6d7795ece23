package reload

import (
	"context"
	"errors"
	"math/rand/v2"
	"time"

	"google.golang.org/protobuf/proto"

	"rollcall/node/fault"
	commandv1 "rollcall/proto/command/v1"
)

// Causes with which a running action is cancelled.
var (
	errStopping   = errors.New("the node is stopping")
	errSuperseded = errors.New("the state wants something else by now")
	errRole       = errors.New("the node's role changed")
	errUnmounted  = errors.New("the mount was disabled")
)

// semaphore bounds how many of something run at once.
type semaphore chan struct{}

// acquire waits for a place; false when ctx ended first.
func (s semaphore) acquire(ctx context.Context) bool {
	select {
	case s <- struct{}{}:
		return true
	case <-ctx.Done():
		return false
	}
}

func (s semaphore) release() { <-s }

// sleep waits; false when ctx ended first.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// backoff is the pause before each attempt after the first: doubled from min to max, each with up to a half less of
// jitter so that many mounts of one broken plugin do not start in step.
type backoff struct {
	min, max time.Duration
	next     time.Duration
}

func (b *backoff) pause() time.Duration {
	b.next = min(max(b.next, b.min), b.max)
	d := b.next - time.Duration(rand.Int64N(int64(b.next)/2+1))
	b.next *= 2
	return d
}

func (b *backoff) reset() { b.next = 0 }

// phases are the words that a report may name as the place of a failure.
var phases = map[string]bool{
	"verify": true, "start": true, "handshake": true, "setup": true, "type": true, "initialize": true, "ready": true,
	"switch": true,
}

// phaseOf finds the innermost named phase in err, or answers otherwise.
func phaseOf(err error, otherwise string) string {
	found := otherwise
	for err != nil {
		if e, ok := err.(*fault.Error); ok && phases[e.Op] { //nolint:errorlint // every level of the chain is looked at
			found = e.Op
		}
		err = errors.Unwrap(err)
	}
	return found
}

// inPhase names the phase in which err came, unless err names one itself.
func inPhase(err error, phase string) error {
	if err == nil || phaseOf(err, "") != "" {
		return err
	}
	return fault.As(fault.KindOf(err), err, phase, "")
}

func sameSpec(a, b *commandv1.Spec) bool { return proto.Equal(a, b) }

// participant finds a node's part in a reload; nil when it has none.
func participant(rl *commandv1.Reload, node string) *commandv1.Participant {
	for _, p := range rl.GetParticipants() {
		if p.GetNodeId() == node {
			return p
		}
	}
	return nil
}

// outcome finds a participant's part for one mount; nil when there is none.
func outcome(p *commandv1.Participant, mountUUID string) *commandv1.MountOutcome {
	for _, o := range p.GetMounts() {
		if o.GetMountUuid() == mountUUID {
			return o
		}
	}
	return nil
}

// targetOf finds a reload's target; nil when the mount is none of them.
func targetOf(rl *commandv1.Reload, mountUUID string) *commandv1.Target {
	for _, t := range rl.GetTargets() {
		if t.GetMountUuid() == mountUUID {
			return t
		}
	}
	return nil
}

// terminal reports whether nothing more is decided about a reload in this phase.
func terminal(p commandv1.Phase) bool {
	switch p {
	case commandv1.Phase_PHASE_DONE, commandv1.Phase_PHASE_ABORTED, commandv1.Phase_PHASE_ROLLED_BACK:
		return true
	default:
		return false
	}
}

func facts(spec *commandv1.Spec, generation uint64, pid int) *commandv1.ProcessFacts {
	return &commandv1.ProcessFacts{
		Version: spec.GetVersion(), Sha256: spec.GetSha256(), Generation: generation, Pid: int64(pid),
	}
}

func step(name string, from time.Time) *commandv1.Step {
	return &commandv1.Step{Name: name, AtUs: from.UnixMicro(), TookUs: time.Since(from).Microseconds()}
}
