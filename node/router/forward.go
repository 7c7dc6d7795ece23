package router

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"rollcall/node/failpoint"
	"rollcall/node/fault"
	peerv1 "rollcall/proto/peer/v1"
	pluginpb "rollcall/proto/plugin"
)

// chunk is the largest piece of a body in one message between nodes: small enough that one body does not hold up the
// others on the connection.
const chunk = 256 << 10

// errHere says that this node leads now, so that the request is for it.
var errHere = errors.New("this node leads now")

// away gives the request to the leader. It tries again, bounded, only what certainly did not run there: while an election
// is under way, or when the connection broke before the request was complete. Reads are also tried again when it broke
// after.
func (p *passage) away(ctx context.Context) (*Response, error) {
	if !p.mayLeave() {
		return nil, fault.Text(fault.NotLeader, "this node does not lead, and the request may not be forwarded")
	}
	p.forwarded = true
	f := p.rt.forwarding()
	defer f.Add(-1)
	end := time.Now().Add(p.r.cfg.ForwardWait)
	for try := 0; ; try++ {
		if err := p.lease(); err != nil {
			return nil, err
		}
		roles := p.r.cfg.Replica.RoleChanged()
		if p.r.cfg.Replica.Role().Leader {
			p.forwarded = false
			return nil, errHere
		}
		resp, err, more := p.send(ctx)
		p.r.metrics.forwards.WithLabelValues(outcomeOf(err)).Inc()
		if resp != nil && !more && !fault.Is(err, fault.OutcomeUnknown) {
			// An error is an answer too.
			if old, retry := p.fresh(resp); old != nil {
				err, more = old, retry
			}
		}
		switch {
		case err == nil:
			p.told(ctx, resp)
			if err := p.released(); err != nil {
				return resp.facts(), err
			}
			return resp, nil
		case !more || ctx.Err() != nil || !time.Now().Before(end): // at its end exactly, too: the pause is cut to it
			if lost := p.released(); lost != nil && !unrun(err) {
				return resp.facts(), lost
			}
			return resp.facts(), err
		}
		pause := time.NewTimer(min(10*time.Millisecond<<min(try, 5), 200*time.Millisecond, time.Until(end)))
		select {
		case <-roles:
		case <-pause.C:
		case <-ctx.Done():
		}
		pause.Stop()
	}
}

// facts are who answered, without what.
func (r *Response) facts() *Response {
	if r == nil {
		return nil
	}
	return &Response{Generation: r.Generation, Node: r.Node, Index: r.Index}
}

// fresh refuses an answer that was long on its way while the leader's instance moved on. A read is asked again. A write
// has happened; its answer is withheld only once this node, or the cluster, has promised that nothing older is answered.
func (p *passage) fresh(resp *Response) (err error, more bool) {
	v := p.r.cfg.State.View()
	m := v.Mount(p.rt.uuid)
	if m == nil || resp.Generation == 0 || resp.Generation >= m.GetEpochGeneration() {
		return nil, false
	}
	if !p.writes() {
		return fault.Text(fault.Unavailable, "the leader's answer was overtaken by a reload"), true
	}
	if resp.Generation < p.rt.floor.Load() || v.ActiveReload(p.rt.uuid) == nil {
		return fault.Text(fault.OutcomeUnknown,
			"the answer was overtaken by a reload: the request has probably taken effect, under the generation before"), false
	}
	return nil, false
}

// told waits, bounded, until this node's own instance knows of what the request wrote, so that a client that stays here
// reads its own writes. Where it does not, because the node is behind, reads go to the leader until it does. A read that
// was answered by the leader is not held up: what its client has seen is owed to whoever reads here next.
func (p *passage) told(ctx context.Context, resp *Response) {
	switch {
	case resp.wrote == 0:
	case !p.writes():
		raise(&p.rt.owed, resp.wrote)
	case p.rt.gate.lane[readLane].Load() == nil:
		raise(&p.rt.owed, resp.wrote) // what is set up next may be set up on an older state
	case !p.rt.inval.wait(ctx, resp.wrote, p.r.cfg.ToldWait):
		raise(&p.rt.owed, resp.wrote)
		p.r.metrics.untold.Inc()
	}
}

// The read of a client that may know more than this node's instance waits a moment for it. Where that was in vain the node
// is behind, and for a while such reads go to the leader at once; one that went there always would raise what is owed each
// time, and a node that is only a little behind would never be asked again.
const (
	owedWait    = 50 * time.Millisecond
	behindAgain = time.Second
)

// current says whether the instance here knows what clients of this node may know already.
func (rt *route) current() bool { return rt.inval.told.Load() >= rt.owed.Load() }

// awaitOwed waits until it does, or says that the node is too far behind for that.
func (rt *route) awaitOwed(ctx context.Context) bool {
	if t := rt.behind.Load(); t != nil && time.Since(*t) < behindAgain {
		return false
	}
	ctx, cancel := context.WithTimeout(ctx, owedWait)
	defer cancel()
	owed := rt.owed.Load()
	// The queue hears of an entry before a view has it: what of the mount is not in it by then is not in the log up to there.
	if rt.r.applied(ctx, owed) && rt.inval.wait(ctx, rt.inval.seen.Load(), owedWait) {
		rt.inval.knows(owed)
		return true
	}
	now := time.Now()
	rt.behind.Store(&now)
	return false
}

// applied waits until this node's state has an entry; false when ctx ends first.
func (r *Router) applied(ctx context.Context, index uint64) bool {
	for {
		changed := r.cfg.State.Changed()
		if r.cfg.State.View().Index() >= index {
			return true
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return false
		}
	}
}

// send runs one attempt. more says that the request certainly did not take effect and that another attempt may do better.
func (p *passage) send(ctx context.Context) (resp *Response, err error, more bool) {
	conn, _, err := p.r.cfg.Peers.Leader(ctx)
	if err != nil {
		return nil, fault.As(fault.Unavailable, err, "forward to", "the leader"), true
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := peerv1.NewForwardClient(conn).Handle(ctx, grpc.WaitForReady(false))
	if err != nil {
		return nil, fault.As(fault.Unavailable, fault.FromGRPC(err), "forward to", "the leader"), true
	}
	complete, err := p.sendBody(stream)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, fault.As(fault.Unavailable, err, "forward to", "the leader"), true
	}
	if err := failpoint.Hit(failpoint.ForwardSent, p.r.cfg.NodeID); err != nil {
		err = status.Error(codes.Unavailable, err.Error()) // as a connection that breaks
		return nil, p.sent(err, complete), p.again(err, complete)
	}
	resp, err = p.receive(stream)
	if err == nil {
		return resp, nil, false
	}
	return resp, p.sent(err, complete), p.again(err, complete)
}

// sendBody sends the request whole. An io.EOF means that the other side has ended the stream: its status says why.
func (p *passage) sendBody(stream grpc.BidiStreamingClient[peerv1.HandleRequest, peerv1.HandleResponse],
) (complete bool, err error) {
	head, rest := p.head(stream.Context()), []byte(p.req.Data)
	for first := true; first || len(rest) > 0; first = false {
		n := min(len(rest), chunk)
		msg := &peerv1.HandleRequest{Body: rest[:n]}
		if first {
			msg.Head = head
		}
		if err := stream.Send(msg); err != nil {
			return false, err
		}
		rest = rest[n:]
	}
	if err := stream.CloseSend(); err != nil {
		return false, err
	}
	return true, nil
}

func (p *passage) head(ctx context.Context) *peerv1.RequestHead {
	q := p.req
	h := &peerv1.RequestHead{
		RequestId: q.ID, Namespace: q.Namespace, Path: q.Path, Operation: q.Operation, RemoteAddress: q.RemoteAddr,
		TokenDisplayName: q.DisplayName, TokenAccessor: q.TokenAccessor, EntityId: q.EntityID, ClientToken: q.ClientToken,
		Unauthenticated: q.Unauthenticated, TokenTtlNs: uint64(max(q.TokenTTL, 0)), Policies: q.Policies,
		Headers: map[string]*peerv1.HeaderValues{},
	}
	for k, v := range p.headers() {
		h.Headers[k] = &peerv1.HeaderValues{Values: v}
	}
	if q.Secret != nil {
		h.Secret, _ = proto.Marshal(q.Secret) // a message that was made here always encodes
	}
	if q.Auth != nil {
		h.Auth, _ = proto.Marshal(q.Auth)
	}
	if until, ok := ctx.Deadline(); ok {
		h.DeadlineNs = uint64(max(time.Until(until), time.Millisecond))
	}
	return h
}

func (p *passage) receive(stream grpc.BidiStreamingClient[peerv1.HandleRequest, peerv1.HandleResponse]) (*Response, error) {
	var resp *Response
	var body []byte
	for {
		msg, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return resp, err
		}
		if h := msg.GetHead(); h != nil {
			resp = &Response{Generation: h.GetGeneration(), Node: h.GetNode(), Index: h.GetIndex(), wrote: h.GetIndex()}
		}
		if len(body)+len(msg.GetBody()) > p.r.cfg.MaxBody+1<<20 {
			return resp, fault.Text(fault.TooLarge, "the answer is larger than %d bytes", p.r.cfg.MaxBody)
		}
		body = append(body, msg.GetBody()...)
	}
	if resp == nil {
		return nil, fault.Text(fault.Internal, "the leader's answer has no head")
	}
	if resp.Index == 0 {
		resp.Index = p.v.Index()
	}
	if len(body) == 0 {
		return resp, nil
	}
	return resp, p.decode(resp, body)
}

// decode reads the answer: the plugin's response, or that of an existence check. A byte stands before it, so that an empty
// response is not taken for none.
func (p *passage) decode(resp *Response, body []byte) error {
	out := &pluginpb.Response{}
	if err := proto.Unmarshal(body[1:], out); err != nil {
		return fault.New(fault.Internal, "read", "the leader's answer", "%w", err)
	}
	if p.req.Operation != opExists {
		resp.Plugin = out
		return nil
	}
	var a existence
	if err := json.Unmarshal([]byte(out.GetData()), &a); err != nil {
		return fault.New(fault.Internal, "read", "the leader's answer", "%w", err)
	}
	resp.hasCheck, resp.found = a.HasCheck, a.Found
	return nil
}

// existence is an existence check's answer between nodes.
type existence struct {
	HasCheck bool `json:"has_check"`
	Found    bool `json:"found"`
}

// sent is what an attempt's error means to the client.
func (p *passage) sent(err error, complete bool) error {
	said := fault.FromGRPC(err)
	switch {
	case fault.Said(said):
		return said
	case !complete:
		return fault.As(fault.Unavailable, said, "forward to", "the leader")
	case p.writes():
		return fault.New(fault.OutcomeUnknown, "", "",
			"the connection to the leader broke while the request ran there: it may or may not have taken effect (%w)", said)
	case fault.Is(said, fault.Deadline), fault.Is(said, fault.Canceled):
		return said
	default:
		return fault.As(fault.Unavailable, said, "forward to", "the leader")
	}
}

// again says whether the request may be sent once more.
func (p *passage) again(err error, complete bool) bool {
	said := fault.FromGRPC(err)
	if fault.Said(said) {
		switch fault.KindOf(said) {
		case fault.NotLeader, fault.Unavailable, fault.Fenced:
			return true
		default:
			return false
		}
	}
	return !complete || !p.writes()
}

// Handle implements peerv1.ForwardServer: it runs a request that another node has authorised and forwarded. Errors are
// faults, which the server's interceptor (fault.StreamServer) puts on the wire.
func (s forwardServer) Handle(stream grpc.BidiStreamingServer[peerv1.HandleRequest, peerv1.HandleResponse]) error {
	req, deadline, err := s.r.readForwarded(stream)
	if err != nil {
		return err
	}
	ctx := stream.Context()
	if deadline > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, deadline)
		defer cancel()
	}
	if !known(req.Operation) {
		return fault.Text(fault.UnsupportedOperation, "unsupported operation %q", req.Operation)
	}
	resp, err := s.r.handle(ctx, req)
	if lost := failpoint.Hit(failpoint.ForwardAnswered, s.r.cfg.NodeID); lost != nil {
		return status.Error(codes.Unavailable, lost.Error()) // as a connection that breaks
	}
	if err != nil && resp == nil {
		return err
	}
	head := &peerv1.ResponseHead{Index: resp.wrote, Generation: resp.Generation, Node: resp.Node}
	var body []byte
	if err == nil {
		if body, err = encode(req, resp); err == nil && len(body) > s.r.cfg.MaxBody+1<<20 {
			err = fault.Text(fault.TooLarge, "the plugin's answer is larger than %d bytes", s.r.cfg.MaxBody)
		}
		if err != nil && writes(req.Operation) {
			err = fault.As(fault.OutcomeUnknown, err, "answer", "a request that has run")
		}
	}
	if err != nil {
		body = nil
	}
	for first := true; first || len(body) > 0; first = false {
		n := min(len(body), chunk)
		msg := &peerv1.HandleResponse{Body: body[:n]}
		if first {
			msg.Head = head
		}
		if serr := stream.Send(msg); serr != nil {
			return serr
		}
		body = body[n:]
	}
	return err
}

func encode(req *Request, resp *Response) ([]byte, error) {
	out := resp.Plugin
	if req.Operation == opExists {
		data, err := json.Marshal(existence{resp.hasCheck, resp.found})
		if err != nil {
			return nil, fault.Wrap(err, "encode", "an existence check")
		}
		out = &pluginpb.Response{Data: string(data)}
	}
	if out == nil {
		return nil, nil
	}
	body, err := proto.MarshalOptions{}.MarshalAppend([]byte{1}, out)
	return body, fault.Wrap(err, "encode", "the plugin's answer")
}

// forwardServer serves peerv1.Forward for a router, whose own Handle is for this node's callers.
type forwardServer struct {
	peerv1.UnimplementedForwardServer
	r *Router
}

// ForwardServer is what the node registers on its cluster port.
func (r *Router) ForwardServer() peerv1.ForwardServer { return forwardServer{r: r} }

// readForwarded gathers a request from its chunks.
func (r *Router) readForwarded(stream grpc.BidiStreamingServer[peerv1.HandleRequest, peerv1.HandleResponse],
) (*Request, time.Duration, error) {
	var head *peerv1.RequestHead
	var body []byte
	for {
		msg, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, 0, fault.As(fault.Unavailable, err, "receive", "a forwarded request")
		}
		if head == nil {
			if head = msg.GetHead(); head == nil {
				return nil, 0, fault.Text(fault.Invalid, "a forwarded request begins with its head")
			}
		}
		if len(body)+len(msg.GetBody()) > r.cfg.MaxBody {
			return nil, 0, fault.Text(fault.TooLarge, "the request is larger than %d bytes", r.cfg.MaxBody)
		}
		body = append(body, msg.GetBody()...)
	}
	if head == nil {
		return nil, 0, fault.Text(fault.Invalid, "a forwarded request begins with its head")
	}
	q := &Request{
		ID: head.GetRequestId(), Namespace: head.GetNamespace(), Path: head.GetPath(), Operation: head.GetOperation(),
		Data: body, RemoteAddr: head.GetRemoteAddress(), ClientToken: head.GetClientToken(),
		TokenAccessor: head.GetTokenAccessor(), DisplayName: head.GetTokenDisplayName(), EntityID: head.GetEntityId(),
		Policies: head.GetPolicies(), TokenTTL: time.Duration(head.GetTokenTtlNs()), Unauthenticated: head.GetUnauthenticated(),
		NoForward: true, fromPeer: true, Headers: make(map[string][]string, len(head.GetHeaders())),
	}
	for k, v := range head.GetHeaders() {
		q.Headers[k] = v.GetValues()
	}
	if b := head.GetSecret(); len(b) > 0 {
		q.Secret = &pluginpb.Secret{}
		if err := proto.Unmarshal(b, q.Secret); err != nil {
			return nil, 0, fault.Text(fault.Invalid, "a forwarded request's secret cannot be read")
		}
	}
	if b := head.GetAuth(); len(b) > 0 {
		q.Auth = &pluginpb.Auth{}
		if err := proto.Unmarshal(b, q.Auth); err != nil {
			return nil, 0, fault.Text(fault.Invalid, "a forwarded request's auth cannot be read")
		}
	}
	return q, time.Duration(head.GetDeadlineNs()), nil
}
