package node

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"testing"
	"testing/synctest"
	"time"
)

func TestStoppingUndoesStepsInReverseAndReportsEveryFailure(t *testing.T) {
	l := &lifecycle{log: slog.New(slog.DiscardHandler)}
	var order []string
	bad := errors.New("stuck")
	l.did("first", func(context.Context) error { order = append(order, "first"); return bad })
	l.did("second", func(context.Context) error { order = append(order, "second"); return nil })
	err := l.unwind(t.Context())
	if !errors.Is(err, bad) || !slices.Equal(order, []string{"second", "first"}) {
		t.Fatalf("err %v, order %v", err, order)
	}
	if err := l.unwind(t.Context()); err != nil {
		t.Fatalf("a second unwind: %v", err)
	}
}

func TestAStepThatHangsDoesNotKeepTheOthersFromStopping(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := &lifecycle{log: slog.New(slog.DiscardHandler)}
		release, first := make(chan struct{}), false
		l.did("first", func(context.Context) error { first = true; return nil })
		l.did("hangs", func(context.Context) error { <-release; return nil })
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := l.unwind(ctx); err == nil || !first {
			t.Fatalf("err %v, first undone %v", err, first)
		}
		close(release)
	})
}
