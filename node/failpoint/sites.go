// Package failpoint lets tests stop, break or end a node at named places of its work. A place is one line,
//
//	if err := failpoint.Hit(failpoint.ReloadDraining, node); err != nil { return err }
//
// and without the build tag "failpoints" it is an empty function that the compiler removes: a released binary holds
// neither the calls nor the names. Where a place has nobody to give an error to, it is called for its other effects.
//
// DESIGN.md beside this file says what a rule looks like and how a test shows that every place is reached.
package failpoint

// Site names a place. The names are in this file and nowhere else.
type Site string

// The places, in the order of a reload's life, then the edges of processes, disk and network.
const (
	// ReloadReceived: the door has read a reload's request and is about to propose it.
	ReloadReceived Site = "reload/received"
	// ReloadProposed: the leader has handed StartReload to Raft, and does not know what becomes of it.
	ReloadProposed Site = "reload/proposed"
	// ReloadPreparingApplied: this node's state shows a reload that prepares, and nothing is done about it yet.
	ReloadPreparingApplied Site = "reload/preparing-applied"
	// ReloadTrial: the new process is up, and is about to be tried on an overlay.
	ReloadTrial Site = "reload/trial"
	// ReloadPreparedReport: a vote "prepared" is about to be handed to the leader. An error is a lost report.
	ReloadPreparedReport Site = "reload/prepared-report"
	// ReloadPreparedHeard: a vote "prepared" has reached the leader, and has not been counted. An error is a lost report.
	ReloadPreparedHeard Site = "reload/prepared-heard"
	// ReloadRefusedReport: a vote "refused" is about to be handed to the leader.
	ReloadRefusedReport Site = "reload/refused-report"
	// ReloadSwitchProposed: the leader is about to propose the batch that holds the last vote, which is the switch.
	ReloadSwitchProposed Site = "reload/switch-proposed"
	// ReloadSwitchApplied: this node's state shows the commit, and nothing is done about it yet.
	ReloadSwitchApplied Site = "reload/switch-applied"
	// ReloadGateClosed: the mount's gate is closed, requests in flight are about to be waited for. An error is a switch
	// that failed.
	ReloadGateClosed Site = "reload/gate-closed"
	// ReloadDraining: the old instance has left the route, and its process is about to be ended.
	ReloadDraining Site = "reload/draining"
	// ReloadSwitchedReport: a report "switched" is about to be handed to the leader. An error is a lost report.
	ReloadSwitchedReport Site = "reload/switched-report"
	// ReloadSwitchedHeard: a report "switched" has reached the leader, and is not entered. An error is a lost report.
	ReloadSwitchedHeard Site = "reload/switched-heard"
	// ReloadDone: this node's state shows that a reload has ended.
	ReloadDone Site = "reload/done"

	// TakeOverProposed: the leader has handed a TakeOver to Raft.
	TakeOverProposed Site = "takeover/proposed"
	// TakeOverApplied: the leader's TakeOver is applied, and the gate is still closed.
	TakeOverApplied Site = "takeover/applied"
	// TakeOverSeen: a follower's state shows the leader's TakeOver, and the follower still forwards.
	TakeOverSeen Site = "takeover/seen"

	// ProcessExec: a plugin process is about to be started.
	ProcessExec Site = "process/exec"
	// ProcessStarted: it has been started, and has said nothing yet.
	ProcessStarted Site = "process/started"
	// ProcessHandshake: it has said where it listens, and the first call has worked.
	ProcessHandshake Site = "process/handshake"
	// ProcessKill: a plugin process is about to be ended.
	ProcessKill Site = "process/kill"

	// ContentFetch: another node is about to be asked for a plugin's bytes.
	ContentFetch Site = "content/fetch"
	// ContentSealed: a plugin's bytes are verified and sealed in memory.
	ContentSealed Site = "content/sealed"

	// DiskAppend: entries are about to be written to the Raft log.
	DiskAppend Site = "disk/append"
	// DiskFsync: entries are written and synced, and Raft has not heard it yet. An error is a write that may be there.
	DiskFsync Site = "disk/fsync"
	// DiskStableSet: Raft's term or vote is about to be written.
	DiskStableSet Site = "disk/stable-set"
	// DiskSnapshotCreate: a snapshot's file is about to be made.
	DiskSnapshotCreate Site = "disk/snapshot-create"
	// DiskSnapshotOpen: a snapshot is about to be read: at boot, or to send it to a follower.
	DiskSnapshotOpen Site = "disk/snapshot-open"

	// TransportAccept: a peer's connection has been accepted, and has proved nothing yet.
	TransportAccept Site = "transport/accept"
	// TransportDial: a peer is about to be dialled.
	TransportDial Site = "transport/dial"

	// LeaseGrant: the leader is about to grant a serving lease.
	LeaseGrant Site = "node/lease-grant"
	// NodeHello: a node is about to say Hello.
	NodeHello Site = "node/hello"
	// NodeLeave: a node that leaves is about to say so.
	NodeLeave Site = "node/leave"

	// ForwardSent: a request has been sent whole to the leader, and is not answered.
	ForwardSent Site = "forward/sent"
	// ForwardAnswered: the leader has run a forwarded request, and is about to answer. An error is an answer that is lost.
	ForwardAnswered Site = "forward/answered"

	// TokenExpire: the leader is about to end an expired token.
	TokenExpire Site = "token/expire"
	// SecretGiveBack: the leader is about to ask a plugin to revoke a secret.
	SecretGiveBack Site = "secret/give-back"
)

// All lists the places.
func All() []Site {
	return []Site{
		ReloadReceived, ReloadProposed, ReloadPreparingApplied, ReloadTrial, ReloadPreparedReport, ReloadPreparedHeard,
		ReloadRefusedReport, ReloadSwitchProposed, ReloadSwitchApplied, ReloadGateClosed, ReloadDraining,
		ReloadSwitchedReport, ReloadSwitchedHeard, ReloadDone,
		TakeOverProposed, TakeOverApplied, TakeOverSeen,
		ProcessExec, ProcessStarted, ProcessHandshake, ProcessKill,
		ContentFetch, ContentSealed,
		DiskAppend, DiskFsync, DiskStableSet, DiskSnapshotCreate, DiskSnapshotOpen,
		TransportAccept, TransportDial,
		LeaseGrant, NodeHello, NodeLeave,
		ForwardSent, ForwardAnswered,
		TokenExpire, SecretGiveBack,
	}
}
