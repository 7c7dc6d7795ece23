package node

import (
	"context"
	"io"
	"time"

	peerv1 "rollcall/proto/peer/v1"

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
	store *supervisor.Supervisor
}

// Fetch streams the bytes of one sha256 in chunks.
func (c *contentServer) Fetch(req *peerv1.FetchRequest, stream peerv1.Content_FetchServer) error {
	r, _, err := c.store.OpenContent(req.GetSha256())
	if err != nil {
		return err
	}
	defer r.Close()
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
		if err == io.EOF {
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
