package transport

import (
	"context"
	"log/slog"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"rollcall/node/fault"
	"rollcall/transport/pki"
)

const (
	methodSay    = "/rollcall.test.Echo/Say"
	methodStream = "/rollcall.test.Echo/Stream"
)

// echo is a service with one unary and one streaming method, so that the tests need no room's.
type echo struct {
	mu    sync.Mutex
	calls int
	last  Identity
	say   func(ctx context.Context, in []byte) ([]byte, error)
}

func (e *echo) handle(ctx context.Context, in []byte) ([]byte, error) {
	id, _ := PeerIdentity(ctx)
	e.mu.Lock()
	e.calls++
	e.last = id
	say := e.say
	e.mu.Unlock()
	if say != nil {
		return say(ctx, in)
	}
	return in, nil
}

func (e *echo) seen() (int, Identity) {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.calls, e.last
}

var echoDesc = grpc.ServiceDesc{
	ServiceName: "rollcall.test.Echo",
	HandlerType: (*any)(nil),
	Methods: []grpc.MethodDesc{{
		MethodName: "Say",
		Handler: func(srv any, ctx context.Context, dec func(any) error, ic grpc.UnaryServerInterceptor) (any, error) {
			in := new(wrapperspb.BytesValue)
			if err := dec(in); err != nil {
				return nil, err
			}
			do := func(ctx context.Context, req any) (any, error) {
				out, err := srv.(*echo).handle(ctx, req.(*wrapperspb.BytesValue).GetValue())
				return wrapperspb.Bytes(out), err
			}
			return ic(ctx, in, &grpc.UnaryServerInfo{Server: srv, FullMethod: methodSay}, do)
		},
	}},
	Streams: []grpc.StreamDesc{{
		StreamName: "Stream", ServerStreams: true, ClientStreams: true,
		Handler: func(srv any, ss grpc.ServerStream) error {
			for {
				in := new(wrapperspb.BytesValue)
				if err := ss.RecvMsg(in); err != nil {
					return nil //nolint:nilerr // the caller has finished or gone
				}
				out, err := srv.(*echo).handle(ss.Context(), in.GetValue())
				if err != nil {
					return err
				}
				if err := ss.SendMsg(wrapperspb.Bytes(out)); err != nil {
					return err
				}
			}
		},
	}},
}

func newCA(t testing.TB) *pki.CA {
	t.Helper()
	ca, err := pki.NewCA("test", 48*time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	return ca
}

func issue(t testing.TB, ca *pki.CA, role, name string) *Credentials {
	t.Helper()
	c, err := Issue(ca, pki.Request{Role: role, Name: name, TTL: 24 * time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// node is one Transport with the echo service, closed at the end of the test.
type node struct {
	*Transport
	echo  *echo
	creds *Credentials
	reg   *prometheus.Registry
}

func quietLogger() *slog.Logger { return slog.New(slog.DiscardHandler) }

func newNode(t testing.TB, nw Network, ca *pki.CA, name, listen string, change ...func(*Config)) *node {
	t.Helper()
	n := &node{echo: &echo{}, creds: issue(t, ca, RoleNode, name), reg: prometheus.NewRegistry()}
	cfg := Config{Listen: listen, Network: nw, Credentials: n.creds, Logger: quietLogger(), Registerer: n.reg}
	for _, f := range change {
		f(&cfg)
	}
	tr, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	n.Transport = tr
	tr.Server().RegisterService(&echoDesc, n.echo)
	tr.Start()
	t.Cleanup(func() { closeNode(t, tr) })
	return n
}

func closeNode(t testing.TB, tr *Transport) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := tr.Close(ctx); err != nil {
		t.Errorf("close %s: %v", tr.Addr(), err)
	}
}

// say calls the echo service of addr.
func (n *node) say(ctx context.Context, addr, name, text string) (string, error) {
	cc, err := n.Client(addr, name)
	if err != nil {
		return "", err
	}
	out := new(wrapperspb.BytesValue)
	err = cc.Invoke(ctx, methodSay, wrapperspb.Bytes([]byte(text)), out)
	return string(out.GetValue()), err
}

// eventually waits until f returns nil and reports its last error when that takes longer than most.
func eventually(t testing.TB, most time.Duration, f func() error) {
	t.Helper()
	end := time.Now().Add(most)
	for {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("after %s still: %v", most, err)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func wantKind(t testing.TB, err error, kind fault.Kind) {
	t.Helper()
	if err == nil {
		t.Fatalf("no error; %s was expected", kind)
	}
	if got := fault.KindOf(err); got != kind {
		t.Fatalf("kind %q, want %q: %v", got, kind, err)
	}
}
