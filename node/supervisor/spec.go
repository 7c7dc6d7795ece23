package supervisor

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"strings"

	"rollcall/node/fault"
	"rollcall/node/supervisor/internal/content"
)

// The types of plugins, as the catalog names them.
const (
	TypeAuth     = "auth"
	TypeSecret   = "secret"
	TypeDatabase = "database"
)

// Spec is exactly what to run. It never changes; two equal specs run the same bytes in the same way.
type Spec struct {
	// Type is "auth", "secret" or "database".
	Type string
	// Name and Version are the catalog's; Version may be empty.
	Name    string
	Version string
	// Command names a file in the plugin directory. It is where the bytes may be found; SHA256 says which they are.
	Command string
	Args    []string
	// Env holds "KEY=VALUE". What the host sets itself for the handshake cannot be overridden.
	Env []string
	// SHA256 is lower-case hex.
	SHA256 string
}

// String names the spec in logs and errors: "secret/kv v0.25.0".
func (s Spec) String() string {
	name := s.Type + "/" + s.Name
	if s.Version != "" {
		name += " " + s.Version
	}
	return name
}

// Key identifies the spec: equal keys mean equal specs.
func (s Spec) Key() string {
	// A JSON array of strings and string arrays is unambiguous, and cannot fail.
	raw, _ := json.Marshal([]any{s.Type, s.Name, s.Version, s.Command, s.Args, s.Env, s.SHA256})
	sum := sha256.Sum256(raw)
	return hex.EncodeToString(sum[:])
}

func (s Spec) validate() error {
	bad := func(format string, args ...any) error {
		return fault.New(fault.Invalid, "check plugin", s.String(), format, args...)
	}
	switch s.Type {
	case TypeAuth, TypeSecret, TypeDatabase:
	default:
		return bad("its type is %q; it must be auth, secret or database", s.Type)
	}
	if err := content.ValidCommand(s.Command); err != nil {
		return err
	}
	if !content.ValidSHA256(s.SHA256) {
		return bad("its sha256 %q is not 64 lower-case hex digits", s.SHA256)
	}
	for _, kv := range s.Env {
		if name, _, ok := strings.Cut(kv, "="); !ok || name == "" || strings.Contains(kv, "\x00") {
			return bad("%q in its environment is not KEY=VALUE", name)
		}
	}
	for i, a := range s.Args {
		if strings.Contains(a, "\x00") {
			return bad("argument %d holds a zero byte", i+1)
		}
	}
	return nil
}

// StartError says why a plugin could not be started. It is of kind fault.Refused, or fault.Canceled when the caller
// gave up, or fault.Unavailable when the supervisor is closed.
type StartError struct {
	Spec Spec
	// Phase is where it failed: "verify" (the bytes), "start" (the process), "handshake".
	Phase string
	// Cause tells an operator in one or two sentences what happened and what to do.
	Cause string
	// Stderr holds the last lines that the plugin wrote there, at most 20.
	Stderr []string

	err error
}

func startError(spec Spec, phase string, kind fault.Kind, cause string, err error) *StartError {
	return &StartError{
		Spec: spec, Phase: phase, Cause: cause,
		err: &fault.Error{Kind: kind, Op: phase, Subject: spec.String(), Text: cause, Err: err},
	}
}

// Error reads "start secret/kv v1: <cause>".
func (e *StartError) Error() string { return fmt.Sprintf("%s %s: %s", e.Phase, e.Spec, e.Cause) }

// Unwrap returns the fault, and through it the cause.
func (e *StartError) Unwrap() error { return e.err }
