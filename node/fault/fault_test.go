package fault

import (
	"context"
	"errors"
	"fmt"
	"testing"
)

func TestEveryKindSurvivesTheWireWithOperationSubjectAndText(t *testing.T) {
	for k := range kindCount {
		sent := fmt.Errorf("outer: %w", &Error{Kind: k, Op: "start plugin", Subject: "secret/kv", Text: "no such file", Code: 418})
		got := FromGRPC(ToGRPC(sent))
		e, ok := errors.AsType[*Error](got)
		if !ok || e.Kind != k || e.Op != "start plugin" || e.Subject != "secret/kv" || e.Text != "no such file" || e.Code != 418 {
			t.Errorf("kind %v arrived as %#v", k, got)
		}
	}
}

func TestEveryKindHasItsOwnName(t *testing.T) {
	seen := map[string]bool{}
	for k := range kindCount {
		if seen[k.String()] || k.String() == "" || ParseKind(k.String()) != k {
			t.Errorf("kind %d: name %q is empty, taken, or does not parse back", k, k)
		}
		seen[k.String()] = true
	}
}

func TestWrapKeepsKindAndCause(t *testing.T) {
	base := Text(Stale, "epoch 3 is not current")
	err := Wrap(Wrap(base, "put", "a/b"), "write", "kv/")
	if KindOf(err) != Stale || !errors.Is(err, base) {
		t.Fatalf("kind %v, is base: %v", KindOf(err), errors.Is(err, base))
	}
	if got, want := err.Error(), "write kv/: put a/b: epoch 3 is not current"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	if Wrap(nil, "x", "y") != nil || As(Internal, nil, "x", "y") != nil {
		t.Error("wrapping nil is not nil")
	}
}

func TestContextErrorsAreClassified(t *testing.T) {
	if KindOf(fmt.Errorf("x: %w", context.DeadlineExceeded)) != Deadline || KindOf(context.Canceled) != Canceled {
		t.Error("context errors are not classified")
	}
}
