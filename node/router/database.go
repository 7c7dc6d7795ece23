package router

import (
	"context"
	"crypto/rand"
	"strings"
	"time"

	"github.com/google/uuid"
	"google.golang.org/protobuf/types/known/structpb"

	"rollcall/node/fault"
	"rollcall/node/router/internal/database"
	"rollcall/node/supervisor"
	commandv1 "rollcall/proto/command/v1"
)

// inProcess is a backend that is part of this node: database mounts are. What its errors say of processes is about the
// mounts that it calls.
type inProcess interface{ InProcess() }

// DatabaseMount makes the backend of the built-in database mount with this uuid.
func (r *Router) DatabaseMount(mountUUID string) Backend {
	return database.NewEngine(&databaseHost{r: r, uuid: mountUUID})
}

// NewConnection makes the backend of a connection: an instance in a process of a database plugin.
func NewConnection(d *supervisor.Database) Backend { return database.NewConnection(d) }

// openLimit bounds how long a written connection is waited for until it is open on the leader, and reopenLimit a reload of
// connections until it has ended.
const (
	openLimit   = 15 * time.Second
	reopenLimit = 60 * time.Second
)

// databaseHost lends the node to the engine of one mount.
type databaseHost struct {
	r    *Router
	uuid string
}

func (h *databaseHost) NodeID() string { return h.r.cfg.NodeID }

func (h *databaseHost) view() View { return h.r.cfg.State.View() }

func (h *databaseHost) Connection(name string) *commandv1.Mount {
	return h.view().Connection(h.uuid, name)
}
func (h *databaseHost) Connections() []*commandv1.Mount { return h.view().Connections(h.uuid) }

func (h *databaseHost) Stored(m *commandv1.Mount) []byte {
	return h.view().StorageGet(m.GetUuid(), database.ConfigKey).GetValue()
}

func (h *databaseHost) Moving(m *commandv1.Mount) string {
	return h.view().ActiveReload(m.GetUuid()).GetId()
}

func (h *databaseHost) Resolve(plugin, version string) (*commandv1.Spec, error) {
	return h.view().ResolveConnection(plugin, version)
}

func (h *databaseHost) Resolved(m *commandv1.Mount) error {
	_, err := h.view().ResolveReload(m, "")
	return err
}

func (h *databaseHost) Try(ctx context.Context, spec *commandv1.Spec, details *structpb.Struct, verify bool) (*structpb.Struct, error) {
	if h.r.cfg.Databases == nil {
		return nil, fault.Text(fault.Unavailable, "this node starts no database plugins")
	}
	return h.r.cfg.Databases.Try(ctx, spec, details, verify)
}

// propose enters a command under the right to write that this node's instance of the mount has now.
func (h *databaseHost) propose(ctx context.Context, body func(epoch, term uint64) *commandv1.Command) (*commandv1.Result, error) {
	m := h.view().Mount(h.uuid)
	role := h.r.cfg.Replica.Role()
	if m == nil || !role.Leader || m.GetEpochTerm() != role.Term {
		return nil, fault.Text(fault.NotLeader, "this node does not write the mount any more")
	}
	cmd := body(m.GetEpoch(), role.Term)
	cmd.WallMs = time.Now().UnixMilli()
	return h.r.cfg.Replica.ProposeAsLeader(ctx, role.Term, cmd)
}

// Put enters a connection and waits until its leader's instance has been switched in under the new generation.
func (h *databaseHost) Put(ctx context.Context, c *commandv1.PutConnection) error {
	c.MountUuid, c.Uuid = h.uuid, uuid.NewString()
	res, err := h.propose(ctx, func(epoch, term uint64) *commandv1.Command {
		c.Epoch, c.Term = epoch, term
		return &commandv1.Command{Body: &commandv1.Command_PutConnection{PutConnection: c}}
	})
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, openLimit)
	defer cancel()
	for {
		changed := h.r.cfg.State.Changed()
		m := h.view().Mount(res.GetId())
		if m == nil || m.GetEpochGeneration() >= res.GetIndex() {
			return nil // open, or deleted by somebody else
		}
		select {
		case <-changed:
		case <-ctx.Done():
			why := "its process is still starting"
			if rt := h.r.lookup(res.GetId()); rt != nil {
				if m, _, cause := rt.gate.state(); m == failing && cause != nil {
					why = cause.Error()
				}
			}
			return fault.Text(fault.Deadline, "%s", why)
		}
	}
}

func (h *databaseHost) Delete(ctx context.Context, name string) error {
	_, err := h.propose(ctx, func(epoch, term uint64) *commandv1.Command {
		return &commandv1.Command{Body: &commandv1.Command_DeleteConnection{DeleteConnection: &commandv1.DeleteConnection{
			MountUuid: h.uuid, Epoch: epoch, Term: term, Name: name,
		}}}
	})
	return err
}

func (h *databaseHost) Reload(ctx context.Context, connections []*commandv1.Mount, by string) (*commandv1.Reload, error) {
	var paths []string
	for _, m := range connections {
		paths = append(paths, m.GetPath())
	}
	mount := h.view().Mount(h.uuid)
	start := &commandv1.StartReload{
		Id: "database-" + strings.ToLower(rand.Text()), Selector: &commandv1.Selector{Mounts: paths}, Namespace: mount.GetNamespace(),
		Scope: commandv1.Scope_SCOPE_GLOBAL, ServingNode: h.r.cfg.NodeID, LeaderId: h.r.cfg.NodeID,
		RequestedBy: mount.GetPath() + by, Options: &commandv1.Options{Strategy: commandv1.Strategy_STRATEGY_BEST_EFFORT},
	}
	res, err := h.propose(ctx, func(uint64, uint64) *commandv1.Command {
		return &commandv1.Command{Body: &commandv1.Command_StartReload{StartReload: start}}
	})
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, reopenLimit)
	defer cancel()
	for {
		changed := h.r.cfg.State.Changed()
		rl := h.view().Reload(res.GetId())
		switch rl.GetPhase() {
		case commandv1.Phase_PHASE_DONE, commandv1.Phase_PHASE_ABORTED, commandv1.Phase_PHASE_ROLLED_BACK:
			return rl, nil
		default:
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, fault.Text(fault.Invalid, "the reload %s is still under way: see plugin reload-status %s", res.GetId(), res.GetId())
		}
	}
}

// Call runs one call on a connection: a passage through its gate like any request's, but by no path, and never elsewhere.
func (h *databaseHost) Call(ctx context.Context, m *commandv1.Mount, path string, data []byte) ([]byte, error) {
	if until, ok := ctx.Deadline(); !ok || time.Until(until) > h.r.cfg.RequestTimeout {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, h.r.cfg.RequestTimeout)
		defer cancel()
	}
	p := &passage{
		r: h.r, rt: h.r.route(m.GetUuid()), v: h.view(), m: m, rest: path, from: time.Now(), lane: writeLane,
		req: &Request{
			ID: "connection " + m.GetConnection(), Namespace: m.GetNamespace(), Path: m.GetPath() + path, Operation: opUpdate,
			Data: data, NoForward: true,
		},
	}
	resp, err := p.run(ctx)
	if err != nil {
		return nil, err
	}
	return []byte(resp.Plugin.GetData()), nil
}
