package check

import (
	"encoding/hex"
	"strings"
	"sync"

	"github.com/hashicorp/raft"
	"google.golang.org/protobuf/proto"

	"rollcall/fsm"
	commandv1 "rollcall/proto/command/v1"
)

// DigestEvery is how many log indexes lie between two digests of a node's state.
const DigestEvery = 64

// Node is where the events of one node go.
type Node struct {
	rec  *Recorder
	name string

	mu   sync.Mutex
	boot uint64
}

// Node returns where the events of the node with this name go: every call for itself, so call it once.
func (r *Recorder) Node(name string) *Node { return &Node{rec: r, name: name} }

// Event records what the node did. Its name and, unless it is given, the incarnation are filled in.
func (n *Node) Event(e Event) {
	n.mu.Lock()
	if e.Boot == 0 {
		e.Boot = n.boot
	}
	n.mu.Unlock()
	e.Node = n.name
	n.rec.Event(e)
}

// Witness records that an incarnation begins, and returns what records the commands that it applies: the field Witness of
// node.Options.
func (n *Node) Witness(nodeID string, incarnation uint64) fsm.Witness {
	n.mu.Lock()
	n.boot = incarnation
	n.mu.Unlock()
	n.Event(Event{Kind: Boot, NodeID: nodeID})
	return &witness{node: n, boot: incarnation, stages: map[string]stage{}, wanted: map[string]uint64{}, verdicts: map[string]commandv1.Verdict{}}
}

// witness turns commands into events. It belongs to Apply's goroutine.
type witness struct {
	node *Node
	boot uint64
	// What was last told, so that only changes are.
	index    uint64
	stages   map[string]stage
	wanted   map[string]uint64
	verdicts map[string]commandv1.Verdict
}

// stage is how far a reload has come.
type stage struct {
	phase commandv1.Phase
	wave  uint32
}

var _ fsm.Witness = (*witness)(nil)

func (w *witness) StorageChanged(string, []string, uint64) {}

func (w *witness) event(e Event) {
	e.Boot = w.boot
	w.node.Event(e)
}

func (w *witness) Restored(uint64) {}

func (w *witness) Replaced(v *fsm.View) {
	w.index = v.Index()
	cause := ""
	if v.Restoring() {
		cause = OperatorRestore
	}
	w.event(Event{Kind: Restored, Index: w.index, Cause: cause})
	w.look(w.index, v)
}

func (w *witness) Applied(l *raft.Log, res *commandv1.Result, view func() *fsm.View) {
	if l.Index <= w.index {
		return // an entry that the snapshot held already
	}
	before := w.index
	w.index = l.Index
	if before/DigestEvery != l.Index/DigestEvery {
		sum, err := view().Digest()
		if err != nil {
			w.event(Event{Kind: Digest, Index: l.Index, Term: l.Term, Cause: err.Error()})
		} else {
			w.event(Event{Kind: Digest, Index: l.Index, Term: l.Term, Hash: hex.EncodeToString(sum[:])})
		}
	}
	cmd := &commandv1.Command{}
	if proto.Unmarshal(l.Data, cmd) != nil || quiet(cmd) {
		return
	}
	w.look(l.Index, view())
}

// quiet says that a command can change neither reloads nor what mounts run.
func quiet(c *commandv1.Command) bool {
	switch c.GetBody().(type) {
	case *commandv1.Command_Tick, *commandv1.Command_WriteStorage, *commandv1.Command_TakeOver:
		return true
	default:
		return false
	}
}

// look tells what has changed of reloads and mounts.
func (w *witness) look(index uint64, v *fsm.View) {
	for _, r := range v.Reloads() {
		if now := (stage{r.GetPhase(), r.GetWave()}); now != w.stages[r.GetId()] {
			w.stages[r.GetId()] = now
			w.event(Event{
				Kind: Applied, Index: index, Reload: r.GetId(), Phase: phaseWord(r.GetPhase()), Generation: r.GetGeneration(),
				N: int(r.GetWave()), Cause: r.GetWhy(),
			})
		}
		for _, p := range r.GetParticipants() {
			for _, m := range p.GetMounts() {
				k := r.GetId() + " " + p.GetNodeId() + " " + m.GetMountUuid()
				if m.GetVerdict() == w.verdicts[k] {
					continue
				}
				w.verdicts[k] = m.GetVerdict()
				w.event(Event{
					Kind: Verdict, Index: index, Reload: r.GetId(), Of: p.GetNodeId(), MountID: m.GetMountUuid(),
					Phase: verdictWord(m.GetVerdict()),
				})
			}
		}
	}
	for _, m := range v.Mounts() {
		w.want(index, m, "", m.GetWanted())
		for _, o := range m.GetOverrides() {
			w.want(index, m, o.GetNodeId(), o.GetWanted())
		}
	}
}

func (w *witness) want(index uint64, m *commandv1.Mount, of string, want *commandv1.Wanted) {
	k := m.GetUuid() + " " + of
	if w.wanted[k] == want.GetGeneration() {
		return
	}
	w.wanted[k] = want.GetGeneration()
	w.event(Event{
		Kind: Wanted, Index: index, Of: of, MountID: m.GetUuid(), Mount: pathOf(m), Generation: want.GetGeneration(),
		SHA256: want.GetSpec().GetSha256(), Reload: want.GetReloadId(),
	})
}

// pathOf is where requests find a mount.
func pathOf(m *commandv1.Mount) string {
	if m.GetTable() == "auth" {
		return m.GetNamespace() + "auth/" + m.GetPath()
	}
	return m.GetNamespace() + m.GetPath()
}

func phaseWord(p commandv1.Phase) string { return word(p.String(), "PHASE_") }

func verdictWord(v commandv1.Verdict) string { return word(v.String(), "VERDICT_") }

func word(name, prefix string) string {
	return strings.ReplaceAll(strings.ToLower(strings.TrimPrefix(name, prefix)), "_", " ")
}
