package check

// Kind is what a client called for.
type Kind string

// The calls that the checker knows. Others may be recorded; they count for I10 and I11 alone.
const (
	// Write stores Input under Key of Mount; the values of one key must all be different.
	Write Kind = "write"
	// Add counts the number under Key of Mount up by Input.
	Add Kind = "add"
	// Read answers Output, "" where there is nothing.
	Read Kind = "read"
	// Delete removes Key of Mount.
	Delete Kind = "delete"
	// Final is a Read after the load has ended and everything is healed: it must show every acknowledged write.
	Final Kind = "final"

	// Register enters Key (type/name/version) into the catalog with the sha256 Input.
	Register Kind = "register"
	// Deregister removes it.
	Deregister Kind = "deregister"
	// Catalog reads it: Output is its sha256, "" where there is none.
	Catalog Kind = "catalog"

	// Start asks for the reload Key with the body Input; Output is the id that was answered. Refused is a 409.
	Start Kind = "start"
	// Status asks for the reload Key: Output is its phase, in the words of package api. Gone (404) is "".
	Status Kind = "status"

	// TokenCreate makes the token that Key stands for (never the token itself).
	TokenCreate Kind = "token-create"
	// TokenRevoke ends it.
	TokenRevoke Kind = "token-revoke"
	// TokenUse does something that needs it: Output is Allowed or Denied.
	TokenUse Kind = "token-use"
)

// What TokenUse answers.
const (
	Allowed = "allowed"
	Denied  = "denied"
)

// Outcome is what the client knows about what it called.
type Outcome string

// The outcomes. An operation whose client gave up, or was answered that nobody knows, is Unknown: it may take effect at
// any time after its call, or never. One that Failed has certainly not taken effect and never will.
const (
	OK      Outcome = "ok"
	Failed  Outcome = "fail"
	Unknown Outcome = "unknown"
)

// Op is one call of a client. Times are nanoseconds on the recorder's clock.
type Op struct {
	ID uint64 `json:"id"`
	// Client numbers the one who called: one at a time.
	Client int  `json:"client"`
	Kind   Kind `json:"kind"`
	// Node is the name of the node that was asked.
	Node   string `json:"node,omitempty"`
	Mount  string `json:"mount,omitempty"`
	Key    string `json:"key,omitempty"`
	Input  string `json:"input,omitempty"`
	Output string `json:"output,omitempty"`
	Call   int64  `json:"call"`
	Return int64  `json:"return"`

	Outcome Outcome `json:"outcome"`
	// Refused says that a Failed call was refused as it had to be: a 409 for a used id, or a catalog's compare.
	Refused bool `json:"refused,omitempty"`
	// Told says that the call failed because the plugin was told to fail it, or the client gave up of its own accord: nothing
	// is wrong with that. What became of it is still for Outcome to say.
	Told bool `json:"told,omitempty"`
	// Status is the HTTP status, 0 where there was none. Cause is the error in words.
	Status int    `json:"status,omitempty"`
	Cause  string `json:"cause,omitempty"`

	// By is the name of the node that ran it, Generation and Index what the answer says of itself.
	By         string `json:"by,omitempty"`
	Generation uint64 `json:"generation,omitempty"`
	Index      uint64 `json:"index,omitempty"`
}

// EventKind is what a node did.
type EventKind string

// The events. Which fields they carry is said with each.
const (
	// Boot: an incarnation has opened its data directory. NodeID.
	Boot EventKind = "boot"
	// Died: the incarnation was killed or stopped, as whoever did that knows.
	Died EventKind = "died"
	// Leader: it leads Term.
	Leader EventKind = "leader"
	// Digest: Hash of the whole state after the command at Index, in Term.
	Digest EventKind = "digest"
	// Restored: the state was replaced by a snapshot at Index. Cause is OperatorRestore where an operator put it back.
	Restored EventKind = "restored"
	// Applied: the reload has come to Phase, of wave N, with the entry at Index; Generation is what it commits to, Cause why.
	Applied EventKind = "applied"
	// Wanted: with the entry at Index, Mount (UUID) is to run Generation with SHA256, because of Reload. Of names the
	// node by id where that is so for one alone.
	Wanted EventKind = "wanted"
	// Verdict: with the entry at Index, the part of node Of in Reload for MountID has come to Phase.
	Verdict EventKind = "verdict"
	// Exec: a plugin process PID was started from bytes with SHA256.
	Exec EventKind = "exec"
	// Exit: the process PID has ended. Cause says how.
	Exit EventKind = "exit"
	// Swap: Mount (MountID) is served by Generation, for Reload, in process PID. Old is the generation before; Again says
	// that the same generation was started afresh after a crash.
	Swap EventKind = "swap"
	// Relabel: the process that ran before serves under Generation from now on.
	Relabel EventKind = "relabel"
	// Fence and Serve: the node has lost its serving lease, or has it again.
	Fence EventKind = "fence"
	Serve EventKind = "serve"
	// Running: what the node says that it runs after everything is healed: Mount, Generation, SHA256, PID, and in Want
	// the generation that it should.
	Running EventKind = "running"
	// Processes: N plugin processes of the node were counted, and N must not be above Limit.
	Processes EventKind = "processes"
	// Handled: plugin code has begun to handle a write of Input to Key of Mount.
	Handled EventKind = "handled"
)

// OperatorRestore is the Cause of a Restored event by which a state may go back.
const OperatorRestore = "operator's restore"

// Event is one thing that a node did. Times are on the recorder's clock.
type Event struct {
	Node string `json:"node"`
	// Boot is the node's incarnation.
	Boot uint64    `json:"boot,omitempty"`
	Seq  uint64    `json:"seq"`
	At   int64     `json:"at"`
	Kind EventKind `json:"kind"`

	NodeID     string `json:"node_id,omitempty"`
	Of         string `json:"of,omitempty"`
	Term       uint64 `json:"term,omitempty"`
	Index      uint64 `json:"index,omitempty"`
	Hash       string `json:"hash,omitempty"`
	Reload     string `json:"reload,omitempty"`
	Phase      string `json:"phase,omitempty"`
	Mount      string `json:"mount,omitempty"`
	MountID    string `json:"mount_id,omitempty"`
	Generation uint64 `json:"generation,omitempty"`
	Old        uint64 `json:"old,omitempty"`
	Again      bool   `json:"again,omitempty"`
	SHA256     string `json:"sha256,omitempty"`
	PID        int    `json:"pid,omitempty"`
	Key        string `json:"key,omitempty"`
	Input      string `json:"input,omitempty"`
	Want       uint64 `json:"want,omitempty"`
	N          int    `json:"n,omitempty"`
	Limit      int    `json:"limit,omitempty"`
	Cause      string `json:"cause,omitempty"`
}

// Fault is one thing that was broken on purpose, from From to To; To is 0 while it lasts.
type Fault struct {
	// Kind names what was done: "kill", "partition", "disk full".
	Kind   string `json:"kind"`
	Target string `json:"target,omitempty"`
	Detail string `json:"detail,omitempty"`
	From   int64  `json:"from"`
	To     int64  `json:"to,omitempty"`
}

// Run is everything that is known of one run.
type Run struct {
	Meta   Meta
	Ops    []Op
	Events []Event
	Faults []Fault
}

// Meta is what a run says of itself.
type Meta struct {
	// Suite, Seed and Command say how to do it again.
	Suite   string `json:"suite,omitempty"`
	Seed    uint64 `json:"seed,omitempty"`
	Command string `json:"command,omitempty"`
	// Nodes are the names of all nodes.
	Nodes []string `json:"nodes,omitempty"`
	// Grace is how long after a fault has been healed its consequences are forgiven (I10), in nanoseconds. Default 30 s.
	Grace int64 `json:"grace,omitempty"`
	// Settle is how long after the last heal a node may say at the latest that it runs what it should (I8), in nanoseconds.
	// Default 30 s; more where the suite looks at that itself and asks the nodes later.
	Settle int64 `json:"settle,omitempty"`
	// Ended is when the run was over, on the recorder's clock.
	Ended int64 `json:"ended,omitempty"`
}
