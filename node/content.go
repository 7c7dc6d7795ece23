package node

import (
	"context"
	"errors"
	"io"
	"time"

	commandv1 "rollcall/proto/command/v1"
	peerv1 "rollcall/proto/peer/v1"

	"rollcall/fsm"
	"rollcall/node/failpoint"
	"rollcall/node/fault"
	"rollcall/node/supervisor"
)

const (
	contentChunk = 256 << 10
	// fetchTimeout bounds one peer's attempt to send a plugin's bytes.
	fetchTimeout = 60 * time.Second
)

// contentServer gives other nodes plugin bytes by their hash.
type contentServer struct {
	peerv1.UnimplementedContentServer
	store contentStore
	// specs are those that the state knows with a hash: what may be looked for in this node's plugin directory.
	specs func(sha256 string) []*commandv1.Spec
}

// contentStore is the part of a Launcher that keeps bytes.
type contentStore interface {
	OpenContent(sha256 string) (io.ReadCloser, int64, error)
	Hash(ctx context.Context, command string) (string, error)
	Ensure(ctx context.Context, spec *commandv1.Spec) error
}

// open finds bytes in the store, or in a file of the plugin directory that was registered with that hash: this node may
// not have needed it yet. It asks no other node, so that two nodes without the bytes do not ask each other.
func (c *contentServer) open(ctx context.Context, sha256 string) (io.ReadCloser, error) {
	r, _, err := c.store.OpenContent(sha256)
	if !fault.Is(err, fault.NotFound) {
		return r, err
	}
	for _, spec := range c.specs(sha256) {
		if got, herr := c.store.Hash(ctx, spec.GetCommand()); herr != nil || got != sha256 {
			continue
		}
		if eerr := c.store.Ensure(ctx, spec); eerr == nil {
			r, _, err = c.store.OpenContent(sha256)
			return r, err
		}
	}
	return nil, err
}

// specsWith lists the specs of the state that have a hash: of the catalog, and of mounts, whose entry may be gone.
func specsWith(view *fsm.View, sha256 string) []*commandv1.Spec {
	var out []*commandv1.Spec
	for _, p := range view.Plugins() {
		if p.GetSpec().GetSha256() == sha256 {
			out = append(out, p.GetSpec())
		}
	}
	for _, m := range view.Mounts() {
		if m.GetWanted().GetSpec().GetSha256() == sha256 {
			out = append(out, m.GetWanted().GetSpec())
		}
	}
	return out
}

// Fetch streams the bytes of one sha256 in chunks.
func (c *contentServer) Fetch(req *peerv1.FetchRequest, stream peerv1.Content_FetchServer) error {
	r, err := c.open(stream.Context(), req.GetSha256())
	if err != nil {
		return err
	}
	defer func() { _ = r.Close() }()
	buf := make([]byte, contentChunk)
	for {
		k, err := r.Read(buf)
		if k > 0 {
			if serr := stream.Send(&peerv1.FetchResponse{Chunk: buf[:k]}); serr != nil {
				return serr
			}
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return fault.Wrap(err, "read plugin", req.GetSha256())
		}
	}
}

// contentClient asks every other node in turn for bytes that this one lacks.
type contentClient struct{ node *Node }

var _ supervisor.Fetcher = (*contentClient)(nil)

// Fetch writes the bytes to w. A peer that breaks off half way ends the attempt: w cannot be taken back, and the
// supervisor's hash would not match; it asks again.
func (c *contentClient) Fetch(ctx context.Context, sha256 string, w io.Writer) error {
	if err := failpoint.Hit(failpoint.ContentFetch, c.node.ID()); err != nil {
		return err
	}
	last := fault.New(fault.NotFound, "fetch plugin", sha256, "no other node has it")
	var result error = last
	for _, row := range c.node.state.View().Nodes() {
		if row.GetId() == c.node.ID() || row.GetLeft() {
			continue
		}
		conn, err := c.node.transport.BulkClient(row.GetClusterAddress(), row.GetName())
		if err != nil {
			result = err
			continue
		}
		sent, err := fetchFrom(ctx, peerv1.NewContentClient(conn), sha256, w)
		if err == nil {
			return nil
		}
		if sent {
			return fault.Wrap(err, "fetch plugin from", row.GetName())
		}
		if !fault.Is(err, fault.NotFound) {
			result = fault.Wrap(err, "fetch plugin from", row.GetName())
		}
	}
	return result
}

func fetchFrom(ctx context.Context, c peerv1.ContentClient, sha256 string, w io.Writer) (sent bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, fetchTimeout)
	defer cancel()
	stream, err := c.Fetch(ctx, &peerv1.FetchRequest{Sha256: sha256})
	if err != nil {
		return false, err
	}
	for {
		resp, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return sent, nil
		}
		if err != nil {
			return sent, fault.FromGRPC(err)
		}
		sent = true
		if _, err := w.Write(resp.GetChunk()); err != nil {
			return sent, err
		}
	}
}
