package api

import (
	"strings"
	"time"
)

// Phases of a reload (DESIGN 5.2), as they stand in JSON.
const (
	PhaseQueued      = "queued"
	PhasePreparing   = "preparing"
	PhaseCommitted   = "committed"
	PhaseDone        = "done"
	PhaseAborted     = "aborted"
	PhaseRollingBack = "rolling back"
	PhaseRolledBack  = "rolled back"
)

// Outcomes of an ended reload, computed from its verdicts only. Empty while it runs.
const (
	OutcomeSucceeded  = "succeeded"
	OutcomePartial    = "partial" // ended, and a node is pending, unconfirmed or kept the old generation
	OutcomeFailed     = "failed"
	OutcomeAborted    = "aborted"
	OutcomeRolledBack = "rolled back"
	OutcomeNothing    = "nothing to do" // no mount matched: not a success
)

// Verdicts of a participant, per mount.
const (
	VerdictSwitched      = "switched"
	VerdictUnchanged     = "unchanged"
	VerdictRefused       = "refused"
	VerdictFailedSwitch  = "failed (switch)"
	VerdictPutBack       = "put back"
	VerdictUnmounted     = "unmounted"
	VerdictPendingDown   = "pending (down)"
	VerdictUnconfirmed   = "unconfirmed"
	VerdictConvergedLate = "converged late"
)

// States of a node within a reload.
const (
	NodePending   = "pending"   // has not answered yet, or was not asked yet: its wave comes later
	NodePrepared  = "prepared"  // every mount is ready to switch
	NodeSwitching = "switching" // committed, not all mounts serve the new generation yet
	NodeDone      = "done"      // every mount has its verdict
	NodeRefused   = "refused"
	NodeExcluded  = "excluded" // left out while preparing: its lease was over
	NodeDown      = "down"     // owes a verdict and cannot answer the old generation any more
	NodeLeft      = "left"
	NodeReleased  = "released" // had not prepared when the reload was aborted: owes nothing, and runs what it ran
)

// Ended reports whether a reload in this phase will not change any more, but for nodes that converge late.
func Ended(phase string) bool {
	return phase == PhaseDone || phase == PhaseAborted || phase == PhaseRolledBack
}

// ReloadRequest is the body of sys/plugins/reload/backend and sys/plugins/reload/:type/:name. Only Plugin or Mounts and
// Scope are the contract's; the rest is ours and optional. Durations are texts such as "30s".
type ReloadRequest struct {
	// Plugin or Mounts, not both. Plugin stays empty where the path names it.
	Plugin string   `json:"plugin,omitempty"`
	Mounts []string `json:"mounts,omitempty"`
	// Scope is "" (the serving node alone) or "global".
	Scope string `json:"scope,omitempty"`
	// ReloadID makes the call repeatable: the same id and request have the same answer through any node.
	ReloadID string `json:"reload_id,omitempty"`
	// Strategy is all-or-nothing (default), best-effort, rolling or canary.
	Strategy string `json:"strategy,omitempty"`
	// Version to bring the mounts to; with scope global it becomes their configured version.
	Version string `json:"version,omitempty"`
	// Trial is handshake, setup or initialize: how deep a new process is tried before anything is committed.
	Trial string `json:"trial,omitempty"`
	// Prepare, Deadline (of the whole run) and Queue bound the phases.
	Prepare  string `json:"prepare,omitempty"`
	Deadline string `json:"deadline,omitempty"`
	Queue    string `json:"queue,omitempty"`
	// Waves of a canary: counts or percentages ("1", "25%", "100%"). Batch: nodes a wave of a rolling reload.
	Waves          []string `json:"waves,omitempty"`
	Batch          int      `json:"batch,omitempty"`
	MaxUnavailable int      `json:"max_unavailable,omitempty"`
	// Bake is how long a wave is watched before the next. The gate: MaxErrorRate a share (0..1), MaxP99Increase a
	// factor above 1, MinSamples the requests of each kind below which the gate is inconclusive.
	Bake           string  `json:"bake,omitempty"`
	MaxErrorRate   float64 `json:"max_error_rate,omitempty"`
	MaxP99Increase float64 `json:"max_p99_increase,omitempty"`
	MinSamples     int     `json:"min_samples,omitempty"`
	// OnSwitchFailure is retry (default) or rollback.
	OnSwitchFailure string `json:"on_switch_failure,omitempty"`
	// OnDrainTimeout is cancel (default) or fence.
	OnDrainTimeout string `json:"on_drain_timeout,omitempty"`
	// ExcludeFenced false makes a node without a lease block the reload. nil is the default, true.
	ExcludeFenced *bool `json:"exclude_fenced,omitempty"`
	// Wait makes the server answer at the end of the reload, or after this long.
	Wait string `json:"wait,omitempty"`
}

// ReloadResponse is the data of the answer to a reload. State and Outcome are there when the caller waited.
type ReloadResponse struct {
	ReloadID string `json:"reload_id"`
	State    string `json:"state,omitempty"`
	Outcome  string `json:"outcome,omitempty"`
}

// ReloadStatus is the data of sys/plugins/reload/backend/status (CONTRACT 2.3): Results holds the nodes that finished,
// by name, as clients parse it. The rest is ours.
type ReloadStatus struct {
	ReloadID string                `json:"reload_id"`
	Results  map[string]NodeResult `json:"results"`
	State    string                `json:"state"`
	Outcome  string                `json:"outcome,omitempty"`
	Why      string                `json:"why,omitempty"`
	Expected []string              `json:"expected"`
	Answered []string              `json:"answered"`
	Pending  []string              `json:"pending"`
	Index    uint64                `json:"index"`
}

// NodeResult is one finished node of a ReloadStatus. Timestamp is RFC 3339 and never empty; Error is "" for success and
// goes through Cell, for the stock commands put it into a table.
type NodeResult struct {
	Timestamp string        `json:"timestamp"`
	Error     string        `json:"error"`
	State     string        `json:"state"`
	NodeID    string        `json:"node_id"`
	Mounts    []MountResult `json:"mounts"`
}

// MountResult is one mount of a NodeResult.
type MountResult struct {
	Mount   string `json:"mount"`
	Verdict string `json:"verdict"`
	Phase   string `json:"phase,omitempty"`
	Cause   string `json:"cause,omitempty"`
	Version string `json:"version,omitempty"`
	SHA256  string `json:"sha256,omitempty"`
}

// Cell makes a text fit for a cell of the stock commands' tables: no "|", no line breaks, no control characters.
func Cell(text string) string {
	clean := strings.Map(func(r rune) rune {
		switch {
		case r == '|':
			return '/'
		case r < ' ' || r == 0x7f || r == 0x85 || r == 0x2028 || r == 0x2029:
			return ' '
		default:
			return r
		}
	}, text)
	return strings.Join(strings.Fields(clean), " ")
}

// Spec is what a mount ran or is to run, as far as it is shown.
type Spec struct {
	Type    string `json:"type,omitempty"`
	Name    string `json:"name,omitempty"`
	Version string `json:"version"`
	SHA256  string `json:"sha256"`
	Command string `json:"command,omitempty"`
}

// Process is one side of a switch as the node saw it.
type Process struct {
	Version    string `json:"version"`
	SHA256     string `json:"sha256"`
	PID        int64  `json:"pid"`
	Generation uint64 `json:"generation,omitempty"`
}

// Reload is one reload with everything that is known of it: data of sys/reloads/:id, any node gives the same.
type Reload struct {
	ID        string   `json:"id"`
	Aliases   []string `json:"aliases,omitempty"`
	Namespace string   `json:"namespace"`
	Selector  Selector `json:"selector"`
	Scope     string   `json:"scope"` // "global" or "local"
	// ServingNode is the name of the node that was asked.
	ServingNode string        `json:"serving_node,omitempty"`
	Strategy    string        `json:"strategy"`
	Options     ReloadOptions `json:"options"`
	RequestedBy string        `json:"requested_by"`
	// RollsBack and RolledBackBy tie a rollback and what it undoes together.
	RollsBack    string `json:"rolls_back,omitempty"`
	RolledBackBy string `json:"rolled_back_by,omitempty"`

	Phase   string `json:"phase"`
	Outcome string `json:"outcome,omitempty"`
	Why     string `json:"why,omitempty"`
	Paused  bool   `json:"paused,omitempty"`

	// Indexes of the entries that made it, that began its preparing, that decided for the switch (its generation; 0
	// when it was not decided for), and that ended it.
	EntryIndex   uint64 `json:"entry_index"`
	PrepareIndex uint64 `json:"prepare_index,omitempty"`
	DecidedIndex uint64 `json:"decided_index,omitempty"`
	DoneIndex    uint64 `json:"done_index,omitempty"`
	// Index is that of the last entry that changed this record: hand it to a blocking query.
	Index uint64 `json:"index"`

	// Wall clocks of the proposers, RFC 3339 with milliseconds, for people; empty when it has not come to that.
	Started   string `json:"started"`
	Prepared  string `json:"prepared,omitempty"` // when preparing began
	Committed string `json:"committed,omitempty"`
	Ended     string `json:"ended,omitempty"`

	// Names of nodes. Pending owe a verdict.
	Expected    []string `json:"expected"`
	Answered    []string `json:"answered"`
	Pending     []string `json:"pending"`
	Unconfirmed []string `json:"unconfirmed,omitempty"`

	Targets []ReloadTarget `json:"targets"`
	Nodes   []ReloadNode   `json:"nodes"`
	Waves   []ReloadWave   `json:"waves,omitempty"`
	// Wave is the one under way, from 0.
	Wave int `json:"wave,omitempty"`

	// P99 over all nodes and mounts, milliseconds; 0 when nothing was measured.
	P99 P99 `json:"p99"`
}

// Selector is what the caller named.
type Selector struct {
	Type          string   `json:"type,omitempty"`
	Plugin        string   `json:"plugin,omitempty"`
	Mounts        []string `json:"mounts,omitempty"`
	AllNamespaces bool     `json:"all_namespaces,omitempty"`
}

// ReloadOptions are the options that a reload runs with; durations in milliseconds, 0 for the default.
type ReloadOptions struct {
	Version         string   `json:"version,omitempty"`
	Trial           string   `json:"trial,omitempty"`
	PrepareMS       int64    `json:"prepare_ms,omitempty"`
	RunMS           int64    `json:"run_ms,omitempty"`
	QueueMS         int64    `json:"queue_ms,omitempty"`
	Waves           []string `json:"waves,omitempty"`
	MaxUnavailable  int      `json:"max_unavailable,omitempty"`
	BakeMS          int64    `json:"bake_ms,omitempty"`
	MaxErrorRate    float64  `json:"max_error_rate,omitempty"`
	MaxP99Increase  float64  `json:"max_p99_increase,omitempty"`
	MinSamples      int      `json:"min_samples,omitempty"`
	OnSwitchFailure string   `json:"on_switch_failure,omitempty"`
	OnDrainTimeout  string   `json:"on_drain_timeout,omitempty"`
	ExcludeFenced   bool     `json:"exclude_fenced"`
}

// ReloadTarget is one mount of a reload, fixed at its entry.
type ReloadTarget struct {
	Mount      string `json:"mount"` // "kv/", "auth/jwt/"
	Namespace  string `json:"namespace"`
	Accessor   string `json:"accessor"`
	From       Spec   `json:"from"`
	To         Spec   `json:"to"`
	Generation uint64 `json:"generation"` // the one that it had
	Unmounted  bool   `json:"unmounted,omitempty"`
	Trial      string `json:"trial,omitempty"`
	Fencing    string `json:"fencing,omitempty"`
}

// ReloadNode is one participant.
type ReloadNode struct {
	Node         string `json:"node"` // name
	NodeID       string `json:"node_id"`
	Incarnation  uint64 `json:"incarnation"`
	State        string `json:"state"`
	JoinedDuring bool   `json:"joined_during,omitempty"`
	Wave         int    `json:"wave,omitempty"`
	Why          string `json:"why,omitempty"`
	// Safe says why this node can no longer answer with the old generation; empty while it can.
	Safe   string        `json:"safe,omitempty"`
	Mounts []ReloadMount `json:"mounts"`
}

// ReloadMount is one participant's part for one mount.
type ReloadMount struct {
	Mount     string `json:"mount"`
	Namespace string `json:"namespace,omitempty"`
	Verdict   string `json:"verdict"` // empty while there is none
	Prepared  bool   `json:"prepared,omitempty"`
	// Phase and Cause say where and why it did not work.
	Phase string   `json:"phase,omitempty"`
	Cause string   `json:"cause,omitempty"`
	From  *Process `json:"from,omitempty"`
	To    *Process `json:"to,omitempty"`
	// Timings are the sums of Steps by name; Steps are the timeline.
	Timings  Timings  `json:"timings"`
	Steps    []Step   `json:"steps,omitempty"`
	Requests Requests `json:"requests"`
	HoldMS   float64  `json:"hold_ms"`
	P99      P99      `json:"p99"`
	// At is when the node reported this, RFC 3339.
	At string `json:"at,omitempty"`
}

// Timings are the lengths of the stretches of one switch, milliseconds.
type Timings struct {
	Verify    float64 `json:"verify_ms"`
	Start     float64 `json:"start_ms"`
	Handshake float64 `json:"handshake_ms"`
	Trial     float64 `json:"trial_ms"`
	Ready     float64 `json:"ready_ms"`
	Hold      float64 `json:"hold_ms"`
	Switch    float64 `json:"switch_ms"`
	Drain     float64 `json:"drain_ms"`
}

// Step is one stretch of a node's timeline for one mount.
type Step struct {
	Name string  `json:"name"`
	At   string  `json:"at"` // RFC 3339 with microseconds, the node's clock
	MS   float64 `json:"ms"`
}

// StepTime spells the time of a Step.
func StepTime(unixMicros int64) string {
	return time.UnixMicro(unixMicros).UTC().Format("2006-01-02T15:04:05.000000Z")
}

// TimingsOf sums steps by name. "ready" is the whole way to a process that is prepared: where the node did not report
// it as a step of its own, it is the sum of verify, start, handshake and trial.
func TimingsOf(steps []Step) Timings {
	var t Timings
	for _, s := range steps {
		switch s.Name {
		case "verify":
			t.Verify += s.MS
		case "start":
			t.Start += s.MS
		case "handshake":
			t.Handshake += s.MS
		case "trial":
			t.Trial += s.MS
		case "ready":
			t.Ready += s.MS
		case "hold":
			t.Hold += s.MS
		case "switch":
			t.Switch += s.MS
		case "drain":
			t.Drain += s.MS
		}
	}
	if t.Ready == 0 {
		t.Ready = t.Verify + t.Start + t.Handshake + t.Trial
	}
	return t
}

// Requests is what the router counted for one mount around one switch.
type Requests struct {
	Served   uint64 `json:"served"`
	Held     uint64 `json:"held"`
	Failed   uint64 `json:"failed"`
	Drained  uint64 `json:"drained"`
	Canceled uint64 `json:"canceled"`
}

// P99 in milliseconds; 0 when nothing was measured.
type P99 struct {
	Before float64 `json:"before_ms"`
	During float64 `json:"during_ms"`
	After  float64 `json:"after_ms"`
}

// ReloadWave is the progress of one wave.
type ReloadWave struct {
	Number         int      `json:"number"`
	Nodes          []string `json:"nodes"`
	CommittedIndex uint64   `json:"committed_index,omitempty"`
	Baking         bool     `json:"baking,omitempty"`
	Passed         bool     `json:"passed,omitempty"`
	Gate           *Gate    `json:"gate,omitempty"`
}

// Gate is the measured ground of a wave's verdict: "passed", "failed" or "inconclusive".
type Gate struct {
	Verdict   string     `json:"verdict"`
	Why       string     `json:"why,omitempty"`
	ReadsNew  GateSample `json:"reads_new"`
	ReadsOld  GateSample `json:"reads_old"`
	WritesNew GateSample `json:"writes_new"`
	WritesOld GateSample `json:"writes_old"`
}

// GateSample is one side of a gate.
type GateSample struct {
	Requests uint64  `json:"requests"`
	Failed   uint64  `json:"failed"`
	P99MS    float64 `json:"p99_ms"`
}

// ReloadList is the data of sys/reloads, newest first.
type ReloadList struct {
	Keys    []string  `json:"keys"`
	Reloads []*Reload `json:"reloads"`
	Index   uint64    `json:"index"`
}

// ControlRequest is the body of sys/reloads/:id/:action.
type ControlRequest struct {
	Why string `json:"why,omitempty"`
}
