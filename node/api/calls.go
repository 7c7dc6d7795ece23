package api

import (
	"context"
	"encoding/json"
	"io"
	"net/http"
	"net/url"
	"strings"

	"rollcall/node/fault"
)

// Read reads a path of a plugin or of sys. nil, nil when there is nothing there.
func (c *Client) Read(ctx context.Context, path string, query url.Values) (*Envelope, error) {
	return c.lookup(ctx, call{path: path, query: query})
}

// List lists a path. nil, nil when there is nothing there.
func (c *Client) List(ctx context.Context, path string) (*Envelope, error) {
	return c.lookup(ctx, call{path: strings.TrimSuffix(path, "/"), query: url.Values{"list": {"true"}}})
}

// lookup takes a 404 that names nothing wrong for absence, and one that carries warnings for an answer (CONTRACT 1.2).
func (c *Client) lookup(ctx context.Context, k call) (*Envelope, error) {
	k.anyStatus = true
	a, err := c.bounded(ctx, k)
	if err != nil {
		return nil, err
	}
	if a.status < 300 {
		return decodeEnvelope(a)
	}
	if a.status == http.StatusNotFound {
		var both struct {
			Envelope
			ErrorBody
		}
		if json.Unmarshal(a.body, &both) == nil && len(both.Errors) == 0 {
			if len(both.Warnings) > 0 || len(both.Data) > 0 && string(both.Data) != "null" {
				return &both.Envelope, nil
			}
			return nil, nil
		}
	}
	u := *c.addresses()[0]
	u.Path += "/v1/" + k.path
	return nil, answerFault(a.status, a.body, http.MethodGet, &u)
}

// Write writes data to a path. nil, nil when the answer has no body.
func (c *Client) Write(ctx context.Context, path string, data any) (*Envelope, error) {
	if data == nil {
		data = struct{}{}
	}
	return c.logical(ctx, call{method: http.MethodPut, path: path, body: data})
}

// Delete deletes a path. nil, nil when the answer has no body.
func (c *Client) Delete(ctx context.Context, path string, query url.Values) (*Envelope, error) {
	return c.logical(ctx, call{method: http.MethodDelete, path: path, query: query})
}

// Catalog lists every plugin of the catalog.
func (c *Client) Catalog(ctx context.Context) (*Catalog, error) {
	out := &Catalog{}
	_, err := c.data(ctx, call{path: "sys/plugins/catalog"}, out)
	return out, err
}

func catalogPath(kind, name string) string { return "sys/plugins/catalog/" + kind + "/" + name }

// Plugin reads one catalog entry; the empty version is the unversioned entry. NotFound when there is none.
func (c *Client) Plugin(ctx context.Context, kind, name, version string) (*Plugin, error) {
	k := call{path: catalogPath(kind, name)}
	if version != "" {
		k.query = url.Values{"version": {version}}
	}
	out := &Plugin{}
	if _, err := c.data(ctx, k, out); err != nil {
		return nil, err
	}
	out.Type = kind
	return out, nil
}

// RegisterPlugin enters a plugin into the catalog. Repeatable: the same registration twice is one.
func (c *Client) RegisterPlugin(ctx context.Context, kind, name string, in RegisterRequest) (Warnings, error) {
	return c.data(ctx, call{method: http.MethodPut, path: catalogPath(kind, name), body: in, repeatable: true}, nil)
}

// DeregisterPlugin removes an entry; the empty version is the unversioned entry only. No error when it is absent.
func (c *Client) DeregisterPlugin(ctx context.Context, kind, name, version string) error {
	_, err := c.data(ctx, call{
		method: http.MethodDelete, path: catalogPath(kind, name),
		query: url.Values{"version": {version}}, repeatable: true,
	}, nil)
	return err
}

// Pins lists the version pins.
func (c *Client) Pins(ctx context.Context) ([]Pin, error) {
	out := &Pins{}
	_, err := c.data(ctx, call{path: "sys/plugins/pins"}, out)
	return out.PinnedVersions, err
}

// SetPin pins a plugin to a version; it takes effect at the next reload.
func (c *Client) SetPin(ctx context.Context, kind, name, version string) error {
	_, err := c.data(ctx, call{
		method: http.MethodPut, path: "sys/plugins/pins/" + kind + "/" + name,
		body: map[string]string{"version": version}, repeatable: true,
	}, nil)
	return err
}

// DeletePin removes a pin.
func (c *Client) DeletePin(ctx context.Context, kind, name string) error {
	_, err := c.data(ctx, call{method: http.MethodDelete, path: "sys/plugins/pins/" + kind + "/" + name, repeatable: true}, nil)
	return err
}

// Versions tells, for every mount, what the state wants and what every node runs.
func (c *Client) Versions(ctx context.Context) (*Versions, error) {
	out := &Versions{}
	_, err := c.data(ctx, call{path: "sys/plugins/versions"}, out)
	return out, err
}

// Plan tries a reload on every node without a switch.
func (c *Client) Plan(ctx context.Context, in PlanRequest) (*Plan, error) {
	out := &Plan{}
	_, err := c.data(ctx, call{method: http.MethodPut, path: "sys/plugins/plan", body: in, repeatable: true}, out)
	return out, err
}

// tablePath is sys/mounts or sys/auth with a mount's path; table is "secret" or "auth".
func tablePath(table, path string) string {
	base := "sys/mounts"
	if table == "auth" {
		base = "sys/auth"
	}
	if path = strings.Trim(path, "/"); path != "" {
		return base + "/" + path
	}
	return base
}

// Mounts lists the mounts of a table ("secret" or "auth") by path.
func (c *Client) Mounts(ctx context.Context, table string) (map[string]*Mount, error) {
	out := map[string]*Mount{}
	_, err := c.data(ctx, call{path: tablePath(table, "")}, &out)
	return out, err
}

// Enable makes a mount and returns when its plugin serves.
func (c *Client) Enable(ctx context.Context, table, path string, in MountInput) error {
	_, err := c.data(ctx, call{method: http.MethodPost, path: tablePath(table, path), body: in}, nil)
	return err
}

// Disable ends a mount and wipes its storage. No error when it is absent.
func (c *Client) Disable(ctx context.Context, table, path string) error {
	_, err := c.data(ctx, call{method: http.MethodDelete, path: tablePath(table, path)}, nil)
	return err
}

// Tune changes a mount's configuration; a new plugin version runs from the next reload.
func (c *Client) Tune(ctx context.Context, table, path string, in TuneInput) (Warnings, error) {
	return c.data(ctx, call{method: http.MethodPost, path: tablePath(table, path) + "/tune", body: in, repeatable: true}, nil)
}

// Remount moves a mount; its plugin keeps running.
func (c *Client) Remount(ctx context.Context, from, to string) (*Remount, error) {
	out := &Remount{}
	_, err := c.data(ctx, call{method: http.MethodPost, path: "sys/remount", body: RemountRequest{From: from, To: to}}, out)
	return out, err
}

// RemountStatus tells how a move went.
func (c *Client) RemountStatus(ctx context.Context, id string) (*RemountStatus, error) {
	out := &RemountStatus{}
	_, err := c.data(ctx, call{path: "sys/remount/status/" + id}, out)
	return out, err
}

// Health asks the first node that answers how it is; the error is about not being answered only.
func (c *Client) Health(ctx context.Context) (*Health, error) {
	out := &Health{}
	query := url.Values{"standbyok": {"true"}, "perfstandbyok": {"true"}}
	err := c.bare(ctx, call{path: "sys/health", query: query, anyStatus: true}, out)
	return out, err
}

// SealStatus tells seal state and version.
func (c *Client) SealStatus(ctx context.Context) (*SealStatus, error) {
	out := &SealStatus{}
	return out, c.bare(ctx, call{path: "sys/seal-status"}, out)
}

// RotateKeys begins a new term of data keys on every node.
func (c *Client) RotateKeys(ctx context.Context) error {
	_, err := c.data(ctx, call{method: http.MethodPut, path: "sys/rotate"}, nil)
	return err
}

// KeyStatus tells the term of data keys, and how the asked node follows.
func (c *Client) KeyStatus(ctx context.Context) (*KeyStatus, error) {
	out := &KeyStatus{}
	_, err := c.data(ctx, call{path: "sys/key-status"}, out)
	return out, err
}

// Leader tells who leads, as the asked node knows it.
func (c *Client) Leader(ctx context.Context) (*Leader, error) {
	out := &Leader{}
	return out, c.bare(ctx, call{path: "sys/leader"}, out)
}

// Members lists the nodes as state, Raft and gossip see them.
func (c *Client) Members(ctx context.Context) ([]Member, error) {
	out := &Members{}
	_, err := c.data(ctx, call{path: "sys/members"}, out)
	return out.Members, err
}

// RaftConfiguration lists the members as Raft has them.
func (c *Client) RaftConfiguration(ctx context.Context) (*RaftConfig, error) {
	out := &RaftConfiguration{}
	_, err := c.data(ctx, call{path: "sys/storage/raft/configuration"}, out)
	return &out.Config, err
}

// AutopilotState tells what autopilot thinks of the servers.
func (c *Client) AutopilotState(ctx context.Context) (*AutopilotState, error) {
	out := &AutopilotState{}
	_, err := c.data(ctx, call{path: "sys/storage/raft/autopilot/state"}, out)
	return out, err
}

// Join asks the node to join the cluster of another.
func (c *Client) Join(ctx context.Context, in RaftJoin) (bool, error) {
	out := &RaftJoined{}
	err := c.bare(ctx, call{method: http.MethodPost, path: "sys/storage/raft/join", body: in}, out)
	return out.Joined, err
}

// RemovePeer takes a node, by id or name, out of the cluster for good.
func (c *Client) RemovePeer(ctx context.Context, id string) error {
	_, err := c.data(ctx, call{method: http.MethodPut, path: "sys/storage/raft/remove-peer", body: RemovePeer{ServerID: id}}, nil)
	return err
}

// StepDown hands leadership to another node.
func (c *Client) StepDown(ctx context.Context) error {
	_, err := c.data(ctx, call{method: http.MethodPut, path: "sys/step-down"}, nil)
	return err
}

// Leave takes the asked node out of the cluster and stops it.
func (c *Client) Leave(ctx context.Context) error {
	_, err := c.data(ctx, call{method: http.MethodPut, path: "sys/leave"}, nil)
	return err
}

// SnapshotSave writes the cluster's state to w. ctx alone bounds it.
func (c *Client) SnapshotSave(ctx context.Context, w io.Writer) (int64, error) {
	a, err := c.do(ctx, call{path: "sys/storage/raft/snapshot", stream: true})
	if err != nil {
		return 0, err
	}
	defer func() { _ = a.stream.Close() }()
	n, err := io.Copy(w, a.stream)
	return n, fault.Wrap(err, "read", "snapshot")
}

// SnapshotRestore replaces the cluster's state with a snapshot. ctx alone bounds it.
func (c *Client) SnapshotRestore(ctx context.Context, r io.Reader) error {
	_, err := c.do(ctx, call{
		method: http.MethodPost, path: "sys/storage/raft/snapshot", raw: r,
		header: http.Header{"Content-Type": {"application/octet-stream"}},
	})
	return err
}

// LookupSelf tells what the client's own token is.
func (c *Client) LookupSelf(ctx context.Context) (*Token, error) {
	out := &Token{}
	_, err := c.data(ctx, call{path: "auth/token/lookup-self"}, out)
	return out, err
}
