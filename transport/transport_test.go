package transport

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"rollcall/node/fault"
)

// metric returns the sum of a metric's samples whose labels contain want ("name=value"); "" takes all.
func metric(t testing.TB, reg *prometheus.Registry, name, want string) float64 {
	t.Helper()
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	sum := 0.0
	for _, f := range families {
		if f.GetName() != name {
			continue
		}
		for _, m := range f.GetMetric() {
			if want == "" || hasLabel(m, want) {
				sum += m.GetCounter().GetValue() + m.GetGauge().GetValue()
			}
		}
	}
	return sum
}

func hasLabel(m *dto.Metric, want string) bool {
	for _, l := range m.GetLabel() {
		if l.GetName()+"="+l.GetValue() == want {
			return true
		}
	}
	return false
}

func TestSilentConnectionsAreDroppedAndMembersStillGetIn(t *testing.T) {
	ca := newCA(t)
	n := newNode(t, TCP(), ca, "node-1", "127.0.0.1:0", func(c *Config) {
		c.HandshakeTimeout = 300 * time.Millisecond
		c.MaxHandshakesPerHost = 40
	})
	member := newNode(t, TCP(), ca, "node-2", "127.0.0.1:0")
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()

	const silent = 30
	conns := make([]net.Conn, silent)
	for i := range conns {
		c, err := net.Dial("tcp", n.Addr())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		conns[i] = c
		switch i % 3 {
		case 1: // half a ClientHello
			_, _ = c.Write([]byte{22, 3, 1, 2, 0, 1})
		case 2: // not TLS at all: refused without waiting
			_, _ = c.Write([]byte("GET / HTTP/1.1\r\n\r\n"))
		}
	}
	if _, err := member.say(ctx, n.Addr(), "node-1", "hi"); err != nil {
		t.Fatalf("a member among the silent ones: %v", err)
	}
	for i, c := range conns {
		_ = c.SetReadDeadline(time.Now().Add(5 * time.Second))
		if _, err := io.Copy(io.Discard, c); errors.Is(err, context.DeadlineExceeded) || isTimeout(err) {
			t.Errorf("connection %d is still open: %v", i, err)
		}
	}
	eventually(t, 5*time.Second, func() error {
		s := metric(t, n.reg, "rollcall_transport_incoming_total", "result=silent")
		r := metric(t, n.reg, "rollcall_transport_incoming_total", "result=refused")
		if s != 20 || r != 10 {
			return fmt.Errorf("silent %v, refused %v; want 20 and 10", s, r)
		}
		return nil
	})
}

func isTimeout(err error) bool {
	e, ok := errors.AsType[net.Error](err)
	return ok && e.Timeout()
}

func TestStrangersCannotFillThePort(t *testing.T) {
	ca := newCA(t)
	mem := NewMemNetwork()
	n := newNode(t, mem.Host("node-1"), ca, "node-1", "node-1:7001", func(c *Config) {
		c.MaxHandshakesPerHost = 8
		c.HandshakeTimeout = time.Minute
	})
	member := newNode(t, mem.Host("node-2"), ca, "node-2", "node-2:7001")
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	bad := mem.Host("bad")
	for range 200 {
		c, err := bad.Dial(ctx, "node-1:7001")
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
	}
	eventually(t, 5*time.Second, func() error {
		if got := metric(t, n.reg, "rollcall_transport_incoming_total", "result=full"); got != 192 {
			return fmt.Errorf("%v closed for the limit, want 192", got)
		}
		return nil
	})
	if _, err := member.say(ctx, n.Addr(), "node-1", "hi"); err != nil {
		t.Errorf("a member is kept out: %v", err)
	}
}

func TestTheNumberOfConnectionsIsBounded(t *testing.T) {
	ca := newCA(t)
	n := newNode(t, TCP(), ca, "node-1", "127.0.0.1:0", func(c *Config) { c.MaxConns = 3 })
	acceptCounting(t, n, &readCounter{})
	member := newNode(t, TCP(), ca, "node-2", "127.0.0.1:0")
	for i := range 3 {
		if err := roundTrip(member, n.Addr()); err != nil {
			t.Fatalf("connection %d: %v", i, err)
		}
	}
	if err := roundTrip(member, n.Addr()); err == nil {
		t.Error("a fourth connection was accepted")
	}
	member.CloseStreams()
	eventually(t, 5*time.Second, func() error { return roundTrip(member, n.Addr()) })
}

// roundTrip opens a Raft stream, which stays open, and sends something there and back.
func roundTrip(n *node, addr string) error {
	c, err := n.Raft().Dial(raftAddr(addr), time.Second)
	if err != nil {
		return err
	}
	_ = c.SetDeadline(time.Now().Add(2 * time.Second))
	if _, err := c.Write([]byte("x")); err != nil {
		return err
	}
	_, err = io.ReadFull(c, make([]byte, 1))
	return err
}

func TestRefusedRaftStreamsStayAwayUntilTheyAreAllowedAgain(t *testing.T) {
	ca := newCA(t)
	a := newNode(t, TCP(), ca, "node-1", "127.0.0.1:0")
	b := newNode(t, TCP(), ca, "node-2", "127.0.0.1:0")
	acceptCounting(t, b, &readCounter{})
	acceptCounting(t, a, &readCounter{})
	c, err := a.Raft().Dial(raftAddr(b.Addr()), time.Second)
	if err != nil {
		t.Fatal(err)
	}
	if peers := a.RaftPeers(); len(peers) != 1 || peers[0].Name != "node-2" {
		t.Errorf("peers %v", peers)
	}
	a.Refuse(true)
	a.CloseStreams()
	if _, err := c.Write([]byte("x")); err == nil {
		t.Error("the stream is still open")
	}
	if _, err := a.Raft().Dial(raftAddr(b.Addr()), time.Second); !fault.Is(err, fault.Unavailable) {
		t.Errorf("a refused dial: %v", err)
	}
	if err := roundTrip(b, a.Addr()); err != nil {
		t.Errorf("peers can no longer reach the node: %v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	if _, err := a.say(ctx, b.Addr(), "", "hi"); err != nil {
		t.Errorf("gRPC is refused as well: %v", err)
	}
	a.Refuse(false)
	if err := roundTrip(a, b.Addr()); err != nil {
		t.Errorf("after the refusal: %v", err)
	}
}

func TestErrorsKeepTheirKindAndSayWhetherTheCallLeft(t *testing.T) {
	ca := newCA(t)
	mem := NewMemNetwork()
	a := newNode(t, mem.Host("a"), ca, "a", "a:1")
	b := newNode(t, mem.Host("b"), ca, "b", "b:1")
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()

	b.echo.say = func(call context.Context, in []byte) ([]byte, error) {
		switch string(in) {
		case "conflict":
			return nil, fault.New(fault.Conflict, "start reload", "r1", "another body")
		case "unavailable":
			return nil, fault.New(fault.Unavailable, "route", "kv/", "restarting")
		case "panic":
			panic("boom")
		case "hang":
			mem.CloseConns("b")
			<-call.Done()
		}
		return in, nil
	}
	_, err := a.say(ctx, b.Addr(), "b", "conflict")
	wantKind(t, err, fault.Conflict)
	if e, _ := errors.AsType[*fault.Error](err); e.Op != "start reload" || e.Subject != "r1" {
		t.Errorf("operation and subject are lost: %+v", e)
	}
	_, err = a.say(ctx, b.Addr(), "b", "unavailable")
	wantKind(t, err, fault.Unavailable) // the peer said so: nothing ran
	_, err = a.say(ctx, b.Addr(), "b", "panic")
	wantKind(t, err, fault.Internal)
	if got := metric(t, b.reg, "rollcall_transport_handler_panics_total", ""); got != 1 {
		t.Errorf("%v panics counted", got)
	}
	_, err = a.say(ctx, b.Addr(), "b", "hang")
	wantKind(t, err, fault.OutcomeUnknown) // it had left when the connection broke

	_, err = a.say(ctx, "b:999", "b", "x")
	wantKind(t, err, fault.Unavailable) // it never left
	_, err = a.say(ctx, "nowhere", "b", "x")
	wantKind(t, err, fault.Invalid)
	_, err = a.say(ctx, b.Addr(), "b", string(make([]byte, MaxMessage+1)))
	wantKind(t, err, fault.TooLarge)

	cc, err := a.BulkClient(b.Addr(), "b")
	if err != nil {
		t.Fatal(err)
	}
	s, err := cc.NewStream(ctx, &echoDesc.Streams[0], methodStream)
	if err != nil {
		t.Fatal(err)
	}
	for _, text := range []string{"one", "conflict"} {
		if err := s.SendMsg(wrapperspb.Bytes([]byte(text))); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.RecvMsg(new(wrapperspb.BytesValue)); err != nil {
		t.Fatal(err)
	}
	wantKind(t, s.RecvMsg(new(wrapperspb.BytesValue)), fault.Conflict)
}

func TestACallToALostPeerEndsWithItsDeadlineAndWorksAfterTheHeal(t *testing.T) {
	ca := newCA(t)
	mem := NewMemNetwork()
	a := newNode(t, mem.Host("a"), ca, "a", "a:1")
	b := newNode(t, mem.Host("b"), ca, "b", "b:1")
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if _, err := a.say(ctx, b.Addr(), "b", "x"); err != nil {
		t.Fatal(err)
	}
	mem.CutOneWay("b", "a") // half open: b hears, a hears nothing
	short, stop := context.WithTimeout(ctx, 200*time.Millisecond)
	_, err := a.say(short, b.Addr(), "b", "x")
	stop()
	wantKind(t, err, fault.Deadline)
	mem.Heal("a", "b")
	if _, err := a.say(ctx, b.Addr(), "b", "y"); err != nil {
		t.Errorf("after the heal: %v", err)
	}
}

func TestCloseLetsRunningCallsFinish(t *testing.T) {
	ca := newCA(t)
	a := newNode(t, TCP(), ca, "a", "127.0.0.1:0")
	b := newNode(t, TCP(), ca, "b", "127.0.0.1:0")
	started, finish := make(chan struct{}), make(chan struct{})
	b.echo.say = func(_ context.Context, in []byte) ([]byte, error) {
		close(started)
		<-finish
		return in, nil
	}
	result := make(chan error, 1)
	go func() {
		_, err := a.say(context.Background(), b.Addr(), "b", "x")
		result <- err
	}()
	<-started
	closed := make(chan error, 1)
	go func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		closed <- b.Close(ctx)
	}()
	eventually(t, 5*time.Second, func() error {
		c, err := net.Dial("tcp", b.Addr())
		if err == nil {
			c.Close()
			return errors.New("the port is still open")
		}
		return nil
	})
	close(finish)
	if err := <-result; err != nil {
		t.Errorf("the running call: %v", err)
	}
	if err := <-closed; err != nil {
		t.Errorf("close: %v", err)
	}
	if _, err := b.Client(a.Addr(), "a"); !fault.Is(err, fault.Unavailable) {
		t.Errorf("a client after Close: %v", err)
	}
}

func TestCloseCutsCallsThatOutlastItsDeadline(t *testing.T) {
	ca := newCA(t)
	a := newNode(t, TCP(), ca, "a", "127.0.0.1:0")
	b := newNode(t, TCP(), ca, "b", "127.0.0.1:0")
	started := make(chan struct{})
	b.echo.say = func(ctx context.Context, in []byte) ([]byte, error) {
		close(started)
		<-ctx.Done()
		return in, nil
	}
	result := make(chan error, 1)
	go func() {
		_, err := a.say(context.Background(), b.Addr(), "b", "x")
		result <- err
	}()
	<-started
	ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
	defer cancel()
	wantKind(t, b.Close(ctx), fault.Deadline)
	wantKind(t, <-result, fault.OutcomeUnknown)
}

func TestThePoolIsBoundedAndReusesConnections(t *testing.T) {
	ca := newCA(t)
	a := newNode(t, TCP(), ca, "a", "127.0.0.1:0", func(c *Config) { c.MaxPeers = 2 })
	b := newNode(t, TCP(), ca, "b", "127.0.0.1:0")
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	one, err := a.Client(b.Addr(), "b")
	if err != nil {
		t.Fatal(err)
	}
	if again, _ := a.Client(b.Addr(), "b"); again != one {
		t.Error("the connection is not reused")
	}
	bulk, err := a.BulkClient(b.Addr(), "b")
	if err != nil || bulk == one {
		t.Fatalf("bulk: %v", err)
	}
	for _, cc := range []*grpc.ClientConn{one, bulk} {
		if err := cc.Invoke(ctx, methodSay, wrapperspb.Bytes(nil), new(wrapperspb.BytesValue)); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := a.Client("127.0.0.1:1", "c"); !fault.Is(err, fault.Exhausted) {
		t.Errorf("a third connection while two are in use: %v", err)
	}
	closeNode(t, b.Transport)
	eventually(t, 5*time.Second, func() error {
		_, err := a.Client("127.0.0.1:1", "c")
		return err
	})
}
