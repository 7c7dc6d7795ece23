package node

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/proto"

	"rollcall/node/fault"
	commandv1 "rollcall/proto/command/v1"
	peerv1 "rollcall/proto/peer/v1"
)

// asTheyAre sends bytes that are no message of any kind.
type asTheyAre struct{}

func (asTheyAre) Name() string { return "proto" }

func (asTheyAre) Marshal(v any) (mem.BufferSlice, error) {
	return mem.BufferSlice{mem.SliceBuffer(*v.(*[]byte))}, nil
}

func (asTheyAre) Unmarshal(data mem.BufferSlice, v any) error {
	*v.(*[]byte) = data.Materialize()
	return nil
}

// FuzzPeerMessages sends bytes to every method that nodes offer each other, as a member with a good certificate. The node must
// answer each with a status, serve on, and never say that something in it has broken.
func FuzzPeerMessages(f *testing.F) {
	l, err := StartLocal(f.Context(), LocalOptions{Nodes: 1, Dir: f.TempDir(), PluginDir: f.TempDir(), Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(f.Context()), 20*time.Second)
		defer cancel()
		if err := l.Stop(ctx); err != nil {
			f.Error(err)
		}
	})
	n := l.Node(0)
	conn, err := n.transport.Client(n.transport.Addr(), n.Name())
	if err != nil {
		f.Fatal(err)
	}
	methods := peerMethods(n)
	if len(methods) < 8 {
		f.Fatalf("only %d methods: %v", len(methods), methods)
	}
	hello, err := proto.Marshal(&peerv1.ReportRequest{Reports: []*commandv1.Report{{ReloadId: "r", NodeId: n.ID(), Incarnation: 1}}})
	if err != nil {
		f.Fatal(err)
	}
	for i := range methods {
		f.Add(uint8(i), hello)
		f.Add(uint8(i), []byte{})
		f.Add(uint8(i), []byte{0x0a, 0xff, 0xff, 0xff, 0xff, 0x0f})
	}
	f.Fuzz(func(t *testing.T, which uint8, message []byte) {
		method := methods[int(which)%len(methods)]
		if leaves(method, message) {
			return // a member may say that it leaves; then it is gone
		}
		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		defer cancel()
		stream, err := conn.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}, method, grpc.ForceCodecV2(asTheyAre{}))
		if err == nil {
			err = errors.Join(stream.SendMsg(&message), stream.CloseSend())
		}
		for err == nil {
			var answer []byte
			err = stream.RecvMsg(&answer)
		}
		if !errors.Is(err, io.EOF) && broken(err) {
			t.Fatalf("%s answered %v", method, err)
		}
		if n.Replica().Role().LeaderID == "" || n.State().Index() == 0 {
			t.Fatalf("%s: the node no longer leads itself", method)
		}
	})
}

// broken reports whether an answer says that something in the node is wrong. What the method's own code says plainly (not
// found, invalid) and what the library says of bytes that are no message are answers like others.
func broken(err error) bool {
	if !fault.Is(err, fault.Internal) || strings.Contains(err.Error(), "unmarshal") {
		return false
	}
	_, code, plain := strings.Cut(err.Error(), "code = ")
	return !plain || strings.HasPrefix(code, codes.Internal.String()) || strings.HasPrefix(code, codes.Unknown.String())
}

func peerMethods(n *Node) []string {
	var out []string
	for service, info := range n.transport.Server().GetServiceInfo() {
		for _, m := range info.Methods {
			out = append(out, "/"+service+"/"+m.Name)
		}
	}
	slices.Sort(out)
	return out
}

// leaves reports whether a message is a proposal by which this node ends its own membership.
func leaves(method string, message []byte) bool {
	req := &peerv1.ProposeRequest{}
	if !strings.HasSuffix(method, "/Propose") || proto.Unmarshal(message, req) != nil {
		return false
	}
	switch req.GetCommand().GetBody().(type) {
	case *commandv1.Command_Leave, *commandv1.Command_RemoveNode, *commandv1.Command_Hello:
		return true
	default:
		return false
	}
}
