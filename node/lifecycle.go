package node

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"rollcall/node/fault"
)

// lifecycle remembers how to undo each step that was done, and undoes them last in, first out.
type lifecycle struct {
	log   *slog.Logger
	steps []step
}

type step struct {
	name string
	undo func(context.Context) error
}

// did registers the undoing of a step at once, so that a later failure unwinds exactly what was done.
func (l *lifecycle) did(name string, undo func(context.Context) error) {
	l.steps = append(l.steps, step{name, undo})
}

// unwind undoes every step under the one deadline of ctx and joins the errors. A step that does not come back in
// time is named and left behind: the steps before it are still undone.
func (l *lifecycle) unwind(ctx context.Context) error {
	var errs []error
	for len(l.steps) > 0 {
		s := l.steps[len(l.steps)-1]
		l.steps = l.steps[:len(l.steps)-1]
		began := time.Now()
		if err := undo(ctx, s); err != nil {
			errs = append(errs, err)
			l.log.Warn("stop", "step", s.name, "took", time.Since(began), "error", err)
			continue
		}
		l.log.Debug("stopped", "step", s.name, "took", time.Since(began))
	}
	return errors.Join(errs...)
}

// straggle is how much longer than the deadline a step may take: long enough for what ends by being killed.
const straggle = 5 * time.Second

func undo(ctx context.Context, s step) error {
	done := make(chan error, 1)
	go func() { done <- s.undo(ctx) }()
	select {
	case err := <-done:
		return fault.Wrap(err, "stop", s.name)
	case <-ctx.Done():
	}
	select {
	case err := <-done:
		return fault.Wrap(err, "stop", s.name)
	case <-time.After(straggle):
		return fault.New(fault.Deadline, "stop", s.name, "did not end within the deadline for stopping; it was left behind")
	}
}
