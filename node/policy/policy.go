// Package policy decides who a token is and what it may do: a pure function of a state view and a request.
package policy

import (
	"slices"

	commandv1 "rollcall/proto/command/v1"

	"rollcall/fsm"
	"rollcall/node/fault"
)

// Root is the policy that allows everything. It cannot be changed.
const Root = "root"

// Capability is what a policy grants on a path.
type Capability string

// The capabilities of Vault's policy language.
const (
	Create Capability = "create"
	Read   Capability = "read"
	Update Capability = "update"
	Delete Capability = "delete"
	List   Capability = "list"
	Patch  Capability = "patch"
	Sudo   Capability = "sudo"
)

// Identity is an authenticated caller.
type Identity struct {
	Token *commandv1.Token
	// Hash is the token's hash: what plugins see in its place, and what the state knows it by.
	Hash []byte
}

// ErrDenied is the one answer to a missing, unknown, expired or revoked token: none of them may be told apart.
var ErrDenied = fault.Text(fault.Denied, "permission denied")

// ErrRefused is the answer to a known token whose policies do not allow the call.
var ErrRefused = &fault.Error{Kind: fault.Denied, Op: "", Text: "1 error occurred:\n\t* permission denied\n\n"}

// Authenticate finds the token's identity in a view. Any goroutine. The error is ErrDenied.
func Authenticate(view *fsm.View, token string) (*Identity, error) {
	if token == "" {
		return nil, ErrDenied
	}
	hash := view.HashToken(token)
	row := view.TokenByHash(hash)
	if row == nil || expired(view, row) {
		return nil, ErrDenied
	}
	return &Identity{Token: row, Hash: hash}, nil
}

func expired(view *fsm.View, t *commandv1.Token) bool {
	return t.GetExpiresClockNs() != 0 && view.ClockNS() >= t.GetExpiresClockNs()
}

// Allow reports whether the identity may use the capability on a canonical path of a namespace: nil, or ErrRefused.
func Allow(_ *fsm.View, who *Identity, _, _ string, _ Capability) error {
	if slices.Contains(who.Token.GetPolicies(), Root) {
		return nil
	}
	return ErrRefused
}
