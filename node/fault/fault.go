// Package fault says what went wrong in words that are the same on both sides of every wire: a Kind to decide by,
// the operation that was under way, its subject, and the cause. Callers compare kinds, never text.
package fault

import (
	"context"
	"errors"
	"fmt"
	"strings"
)

// Kind classifies an error by what the caller can do about it. The numbers and names are part of the peer protocol
// and of the log: append, never renumber.
type Kind uint8

// The kinds. Each has one HTTP status (node/api) and one gRPC code (grpc.go).
const (
	// Internal is a defect of ours or an error nobody classified. The caller can only report it.
	Internal Kind = iota
	// Invalid is a request that can never succeed as it stands.
	Invalid
	// NotFound names something that does not exist.
	NotFound
	// Denied is a request whose token is missing, unknown or not allowed to do this.
	Denied
	// Conflict is a request that contradicts what is already there (same reload_id, other body; path in use).
	Conflict
	// UnsupportedPath is a path that nothing serves.
	UnsupportedPath
	// UnsupportedOperation is a path that exists but not for this operation.
	UnsupportedOperation
	// Unavailable means that nothing ran, and that the same call may succeed later or elsewhere.
	Unavailable
	// Fenced is Unavailable because the node lost its serving lease.
	Fenced
	// NotLeader is an operation only the leader performs, asked of another node. Nothing ran.
	NotLeader
	// OutcomeUnknown is an operation that may or may not have taken effect. It must never be retried silently.
	OutcomeUnknown
	// Deadline is an operation that was given up for time before it is known to have had any effect.
	Deadline
	// Canceled is an operation that its own caller gave up.
	Canceled
	// TooLarge is a body, value or message beyond its limit.
	TooLarge
	// Exhausted is a bounded queue or table that is full; later is better.
	Exhausted
	// Stale is a write under an epoch, term, incarnation or generation that is no longer current.
	Stale
	// ReadOnly is a storage write by an instance that may only read; the request belongs to the leader.
	ReadOnly
	// Refused is a plugin that could not be prepared: the cause is in Phase and text.
	Refused
	// Corrupt is data that fails its own check. Never retried, never overwritten.
	Corrupt

	kindCount
)

var kindNames = [kindCount]string{
	"internal", "invalid", "not found", "denied", "conflict", "unsupported path", "unsupported operation",
	"unavailable", "fenced", "not leader", "outcome unknown", "deadline exceeded", "canceled", "too large",
	"exhausted", "stale", "read only", "refused", "corrupt",
}

// String returns the kind's name as it stands on every wire.
func (k Kind) String() string {
	if k < kindCount {
		return kindNames[k]
	}
	return fmt.Sprintf("kind %d", uint8(k))
}

// ParseKind is the reverse of Kind.String; an unknown name is Internal, because a newer peer may know more kinds.
func ParseKind(name string) Kind {
	for k, n := range kindNames {
		if n == name {
			return Kind(k)
		}
	}
	return Internal
}

// Safe reports whether an error of this kind proves that nothing ran, so that the caller may try again.
func (k Kind) Safe() bool {
	switch k {
	case Unavailable, Fenced, NotLeader, Exhausted:
		return true
	default:
		return false
	}
}

// Error is an error with a kind. Op says what was being done ("start plugin", "open raft log"), Subject to what
// ("secret/kv v1.2.0", "/data/raft.db"). Text is shown to users; Err, the cause, may be nil.
type Error struct {
	Kind    Kind
	Op      string
	Subject string
	Text    string
	Err     error
	// Code is the HTTP status that a plugin asked for with a coded error; 0 when it did not.
	Code int
}

// New makes an error. Op and subject may be empty; with neither, Error() is the text alone, as clients expect it.
func New(kind Kind, op, subject, format string, args ...any) *Error {
	e := &Error{Kind: kind, Op: op, Subject: subject}
	if len(args) == 0 {
		e.Text = format
		return e
	}
	err := fmt.Errorf(format, args...)
	e.Text, e.Err = err.Error(), errors.Unwrap(err)
	return e
}

// Text makes an error of a kind whose whole message is the text: the form for messages fixed by the HTTP contract.
func Text(kind Kind, format string, args ...any) *Error {
	return New(kind, "", "", format, args...)
}

// Wrap puts an operation and a subject around err and keeps its kind. Wrap(nil, …) is nil.
func Wrap(err error, op, subject string) error {
	if err == nil {
		return nil
	}
	return &Error{Kind: KindOf(err), Op: op, Subject: subject, Err: err, Code: codeOf(err)}
}

// As puts a kind, an operation and a subject around err. As(kind, nil, …) is nil.
func As(kind Kind, err error, op, subject string) error {
	if err == nil {
		return nil
	}
	return &Error{Kind: kind, Op: op, Subject: subject, Err: err, Code: codeOf(err)}
}

// Error reads "op subject: text", leaving out what is empty.
func (e *Error) Error() string {
	head := strings.TrimSpace(e.Op + " " + e.Subject)
	text := e.Text
	if text == "" && e.Err != nil {
		text = e.Err.Error()
	}
	if text == "" {
		text = e.Kind.String()
	}
	if head == "" {
		return text
	}
	return head + ": " + text
}

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// KindOf returns the kind of the outermost classified error in err's chain. Context errors that nobody classified are
// Deadline and Canceled; everything else is Internal. KindOf(nil) is Internal too: ask only when there is an error.
func KindOf(err error) Kind {
	if e, ok := errors.AsType[*Error](err); ok {
		return e.Kind
	}
	switch {
	case errors.Is(err, context.DeadlineExceeded):
		return Deadline
	case errors.Is(err, context.Canceled):
		return Canceled
	default:
		return Internal
	}
}

// Is reports whether err is not nil and of the kind.
func Is(err error, kind Kind) bool { return err != nil && KindOf(err) == kind }

func codeOf(err error) int {
	if e, ok := errors.AsType[*Error](err); ok {
		return e.Code
	}
	return 0
}
