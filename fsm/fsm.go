// Package fsm is the replicated truth and every decision about it. It is a pure function of the log: no clock, no
// randomness, no I/O, no map order, no panic on any bytes. See DESIGN.md beside this file.
package fsm

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/hashicorp/raft"
	"google.golang.org/protobuf/proto"

	"rollcall/node/fault"
	commandv1 "rollcall/proto/command/v1"
)

// MaxElapsed caps what one entry may add to the log's clock, in nanoseconds: a leader that was suspended, or lies, moves
// time by no more than this.
const MaxElapsed = uint64(time.Minute)

// Observer hears of changes as they are applied.
type Observer interface {
	// StorageChanged names the keys of a mount that one entry wrote or deleted. It is called on Apply's goroutine, when the
	// entry is about to be visible: whoever gets a View with it gets it after every observer was told. It must neither block
	// nor ask for a View. keys must not be mutated.
	StorageChanged(mountUUID string, keys []string, index uint64)
	// Restored says that the whole state was replaced by a snapshot with this index. Same goroutine, same rule.
	Restored(index uint64)
}

// FSM is one node's copy of the state. Apply, ApplyBatch, Snapshot and Restore belong to raft's goroutine; all other
// methods may be called from any.
type FSM struct {
	mu      sync.RWMutex
	s       *state
	changed chan struct{}
	// Made when it is first asked for after an entry.
	view *View

	observers []Observer
	witnesses []Witness
}

var (
	_ raft.FSM         = (*FSM)(nil)
	_ raft.BatchingFSM = (*FSM)(nil)
)

// New makes an empty state machine.
func New() *FSM { return &FSM{s: newState()} }

// Observe adds an observer, which may be a Witness too. It must be called before raft starts.
func (f *FSM) Observe(o Observer) {
	f.observers = append(f.observers, o)
	if w, ok := o.(Witness); ok {
		f.witnesses = append(f.witnesses, w)
	}
}

// Apply applies one entry and returns its *commandv1.Result, never nil for a command. raft calls it.
func (f *FSM) Apply(l *raft.Log) any {
	if l == nil || l.Type != raft.LogCommand {
		return nil
	}
	f.mu.Lock()
	res, notes := f.apply(l)
	f.witness(l, res)
	f.publish()
	f.notify(notes)
	f.mu.Unlock()
	return res
}

// ApplyBatch applies entries in order and answers one result for each; entries that are no commands answer nil.
func (f *FSM) ApplyBatch(logs []*raft.Log) []any {
	out := make([]any, len(logs))
	var notes []note
	f.mu.Lock()
	for i, l := range logs {
		if l == nil || l.Type != raft.LogCommand {
			continue
		}
		res, n := f.apply(l)
		f.witness(l, res)
		out[i], notes = res, append(notes, n...)
	}
	f.publish()
	f.notify(notes)
	f.mu.Unlock()
	return out
}

// publish makes what was applied visible and wakes those who wait. It is called with mu held.
func (f *FSM) publish() {
	f.view = nil
	if f.changed != nil {
		close(f.changed)
		f.changed = nil
	}
}

func (f *FSM) notify(notes []note) {
	for _, n := range notes {
		for _, o := range f.observers {
			o.StorageChanged(n.mount, n.keys, n.index)
		}
	}
}

// note is what observers will hear of one entry.
type note struct {
	mount string
	keys  []string
	index uint64
}

// entry is the context of one command while it is applied.
type entry struct {
	*state
	index  uint64
	term   uint64
	wallMS int64
	notes  []note
	res    *commandv1.Result
}

// apply decides one entry. A panic is a defect, yet it must not take every node down at every boot: it becomes a
// recorded rejection, the same on every node, because it is as deterministic as the rest.
func (f *FSM) apply(l *raft.Log) (res *commandv1.Result, notes []note) {
	defer func() {
		if p := recover(); p != nil {
			res = &commandv1.Result{Index: l.Index}
			reject(res, fault.Text(fault.Internal, "apply entry %d: %v", l.Index, p))
			notes = nil
		}
	}()
	s := f.s
	e := &entry{state: s, index: l.Index, term: l.Term, res: &commandv1.Result{Index: l.Index}}
	if l.Index <= s.index {
		reject(e.res, fault.Text(fault.Stale, "entry %d was applied before: the state is at %d", l.Index, s.index))
		return e.res, nil
	}
	s.index, s.term = l.Index, l.Term
	cmd := &commandv1.Command{}
	if err := proto.Unmarshal(l.Data, cmd); err != nil {
		reject(e.res, fault.Text(fault.Invalid, "the entry is not a command"))
		return e.res, nil
	}
	s.clock += min(cmd.GetElapsedNs(), MaxElapsed)
	e.wallMS = cmd.GetWallMs()
	if err := e.dispatch(cmd); err != nil {
		reject(e.res, err)
	}
	return e.res, e.notes
}

func reject(r *commandv1.Result, err error) {
	r.FaultKind, r.FaultText = fault.KindOf(err).String(), err.Error()
}

// dispatch runs the command's decision. An error is a rejection that changed nothing.
func (e *entry) dispatch(cmd *commandv1.Command) error {
	if init, ok := cmd.GetBody().(*commandv1.Command_InitCluster); ok {
		return e.initCluster(init.InitCluster)
	}
	if e.clusterID == "" {
		return fault.Text(fault.Unavailable, "the cluster is not initialised yet")
	}
	if h := cmd.GetByToken(); len(h) > 0 && !e.tokenLives(string(h)) {
		return fault.Text(fault.Denied, "permission denied")
	}
	switch b := cmd.GetBody().(type) {
	case *commandv1.Command_Tick:
		return nil
	case *commandv1.Command_Hello:
		return e.hello(b.Hello)
	case *commandv1.Command_Leave:
		return e.leave(b.Leave)
	case *commandv1.Command_RemoveNode:
		return e.removeNode(b.RemoveNode)
	case *commandv1.Command_Restored:
		return e.restored(b.Restored)
	case *commandv1.Command_SetAuditSalt:
		return e.setAuditSalt(b.SetAuditSalt)
	case *commandv1.Command_RotateKeys:
		return e.rotateKeys()
	case *commandv1.Command_RegisterPlugin:
		return e.registerPlugin(b.RegisterPlugin)
	case *commandv1.Command_DeregisterPlugin:
		return e.deregisterPlugin(b.DeregisterPlugin)
	case *commandv1.Command_SetPin:
		return e.setPin(b.SetPin)
	case *commandv1.Command_DeletePin:
		return e.deletePin(b.DeletePin)
	case *commandv1.Command_EnableMount:
		return e.enableMount(b.EnableMount)
	case *commandv1.Command_DisableMount:
		return e.disableMount(b.DisableMount)
	case *commandv1.Command_TuneMount:
		return e.tuneMount(b.TuneMount)
	case *commandv1.Command_MoveMount:
		return e.moveMount(b.MoveMount)
	case *commandv1.Command_MarkLeaderOnly:
		return e.markLeaderOnly(b.MarkLeaderOnly)
	case *commandv1.Command_PutConnection:
		return e.putConnection(b.PutConnection)
	case *commandv1.Command_DeleteConnection:
		return e.deleteConnection(b.DeleteConnection)
	case *commandv1.Command_TakeOver:
		return e.takeOver(b.TakeOver)
	case *commandv1.Command_WriteStorage:
		return e.writeStorage(b.WriteStorage)
	case *commandv1.Command_StartReload:
		return e.startReload(b.StartReload)
	case *commandv1.Command_ReportBatch:
		return e.reportBatch(b.ReportBatch)
	case *commandv1.Command_ExpireReload:
		return e.expireReload(b.ExpireReload)
	case *commandv1.Command_ControlReload:
		return e.controlReload(b.ControlReload)
	case *commandv1.Command_ExcludeNode:
		return e.excludeNode(b.ExcludeNode)
	case *commandv1.Command_FenceNode:
		return e.fenceNode(b.FenceNode)
	case *commandv1.Command_AdvanceWave:
		return e.advanceWave(b.AdvanceWave)
	case *commandv1.Command_DropReloads:
		return e.dropReloads(b.DropReloads)
	default:
		return e.dispatchAccess(cmd)
	}
}

// Err returns the error of a result: nil when the command took effect, else a *fault.Error of the result's kind.
func Err(r *commandv1.Result) error {
	if r.GetFaultKind() == "" {
		return nil
	}
	return &fault.Error{Kind: fault.ParseKind(r.GetFaultKind()), Text: r.GetFaultText()}
}

// View returns the state after the last applied entry. It is immutable and cheap, whoever asks.
func (f *FSM) View() *View {
	f.mu.RLock()
	v := f.view
	f.mu.RUnlock()
	if v != nil {
		return v
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.view == nil {
		f.view = &View{s: f.s.copy()}
	}
	return f.view
}

// Changed returns a channel that is closed at the next applied entry. Take it, then View, then wait.
func (f *FSM) Changed() <-chan struct{} {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.changed == nil {
		f.changed = make(chan struct{})
	}
	return f.changed
}

// Index is the index of the last applied command.
func (f *FSM) Index() uint64 { return f.View().Index() }

// WaitIndex waits until the command at index, or a later one, is applied here. Its error is ctx's, with both indexes.
func (f *FSM) WaitIndex(ctx context.Context, index uint64) error {
	for {
		changed := f.Changed()
		have := f.Index()
		if have >= index {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return fault.Wrap(ctx.Err(), "wait for index", fmt.Sprintf("%d, applied %d", index, have))
		}
	}
}
