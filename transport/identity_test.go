package transport

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"io"
	"math/big"
	"net"
	"net/url"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	peerv1 "rollcall/proto/peer/v1"

	"rollcall/node/fault"
	"rollcall/transport/pki"
)

// stranger is one identity that knocks at the cluster port.
type stranger struct {
	name string
	cert *tls.Certificate // nil: none
	max  uint16           // highest TLS version; 0 is the newest
	alpn []string         // overrides the protocol under test
	raft bool             // admitted on Raft
	grpc bool             // admitted on gRPC
}

// forge makes a certificate with a template of one's own, signed by ca (nil: by itself).
func forge(t *testing.T, ca *pki.CA, change func(*x509.Certificate)) *tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: "forged"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, BasicConstraintsValid: true,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
		URIs:        []*url.URL{{Scheme: "rollcall", Host: "node", Path: "/node-2"}},
	}
	change(tmpl)
	parent, signer := tmpl, any(key)
	if ca != nil {
		keyPEM, err := ca.KeyPEM()
		if err != nil {
			t.Fatal(err)
		}
		pair, err := tls.X509KeyPair(ca.CertPEM(), keyPEM)
		if err != nil {
			t.Fatal(err)
		}
		parent, signer = pair.Leaf, pair.PrivateKey
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, key.Public(), signer)
	if err != nil {
		t.Fatal(err)
	}
	return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

func certOf(c *Credentials) *tls.Certificate { return &c.cur.Load().cert }

// byLeaf is a certificate signed by a member's leaf as if that were an authority.
func byLeaf(t *testing.T, ca *pki.CA) *tls.Certificate {
	t.Helper()
	leaf := certOf(issue(t, ca, RoleNode, "node-2"))
	inner := forge(t, nil, func(*x509.Certificate) {})
	key := inner.PrivateKey.(*ecdsa.PrivateKey)
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(7), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
		URIs:        []*url.URL{{Scheme: "rollcall", Host: "node", Path: "/node-2"}},
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, leaf.Leaf, key.Public(), leaf.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	return &tls.Certificate{Certificate: [][]byte{der, leaf.Certificate[0]}, PrivateKey: key}
}

func strangers(t *testing.T, ca *pki.CA) []stranger {
	uris := func(text ...string) func(*x509.Certificate) {
		return func(c *x509.Certificate) {
			c.URIs = nil
			for _, s := range text {
				u, err := url.Parse(s)
				if err != nil {
					t.Fatal(err)
				}
				c.URIs = append(c.URIs, u)
			}
		}
	}
	other := newCA(t)
	return []stranger{
		{name: "a member", cert: certOf(issue(t, ca, RoleNode, "node-2")), raft: true, grpc: true},
		{name: "a removed member", cert: certOf(issue(t, ca, RoleNode, "removed"))},
		{name: "a client", cert: certOf(issue(t, ca, RoleClient, "tool"))},
		{name: "no certificate"},
		{name: "another authority", cert: certOf(issue(t, other, RoleNode, "node-2"))},
		{name: "self-signed", cert: forge(t, nil, func(*x509.Certificate) {})},
		{name: "expired", cert: forge(t, ca, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) })},
		{name: "not valid yet", cert: forge(t, ca, func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Minute) })},
		{name: "no identity", cert: forge(t, ca, uris())},
		{name: "another scheme", cert: forge(t, ca, uris("spiffe://node/node-2"))},
		{name: "two identities", cert: forge(t, ca, uris("rollcall://node/node-2", "rollcall://node/node-3"))},
		{name: "an unknown role", cert: forge(t, ca, uris("rollcall://gossip/node-2"))},
		{name: "a name with escapes", cert: forge(t, ca, uris("rollcall://node/node%2D2"))},
		{name: "a path in the name", cert: forge(t, ca, uris("rollcall://node/a/../node-2"))},
		{name: "server use only", cert: forge(t, ca, func(c *x509.Certificate) {
			c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
		})},
		{name: "issued by a member", cert: byLeaf(t, ca)},
		{name: "TLS 1.2", cert: certOf(issue(t, ca, RoleNode, "node-2")), max: tls.VersionTLS12},
		{name: "no protocol", cert: certOf(issue(t, ca, RoleNode, "node-2")), alpn: []string{}},
		{name: "an unknown protocol", cert: certOf(issue(t, ca, RoleNode, "node-2")), alpn: []string{"http/1.1"}},
	}
}

func (s stranger) config(alpn string) *tls.Config {
	cfg := &tls.Config{InsecureSkipVerify: true, NextProtos: []string{alpn}, MaxVersion: s.max}
	if s.alpn != nil {
		cfg.NextProtos = s.alpn
	}
	if s.cert != nil {
		cfg.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return s.cert, nil }
	}
	return cfg
}

func authorizeForTest(id Identity) error {
	if id.Name == "removed" {
		return fault.New(fault.Denied, "admit", id.Name, "not a member")
	}
	return nil
}

func TestOnlyMembersGetThroughTheHandshake(t *testing.T) {
	ca := newCA(t)
	n := newNode(t, TCP(), ca, "node-1", "127.0.0.1:0", func(c *Config) { c.Authorize = authorizeForTest })
	var read readCounter
	acceptCounting(t, n, &read)
	for _, s := range strangers(t, ca) {
		t.Run(s.name, func(t *testing.T) {
			if err := knockRaft(n.Addr(), s); (err == nil) != s.raft {
				t.Errorf("raft: admitted %v, want %v: %v", err == nil, s.raft, err)
			}
			before, _ := n.echo.seen()
			err := knockGRPC(n.Addr(), s, methodSay)
			if (err == nil) != s.grpc {
				t.Errorf("grpc: admitted %v, want %v: %v", err == nil, s.grpc, err)
			}
			if after, _ := n.echo.seen(); after != before && !s.grpc {
				t.Error("grpc: the handler ran")
			}
		})
	}
	if got := read.bytes(); got != 5 {
		t.Errorf("raft read %d bytes; only the member's 5 may arrive", got)
	}
}

// knockRaft sends five bytes on a Raft stream and wants them back.
func knockRaft(addr string, s stranger) error {
	conn, err := tls.DialWithDialer(&net.Dialer{Timeout: 5 * time.Second}, "tcp", addr, s.config(alpnRaft))
	if err != nil {
		return err
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(5 * time.Second))
	if _, err := conn.Write([]byte("hello")); err != nil {
		return err
	}
	b := make([]byte, 5)
	_, err = io.ReadFull(conn, b)
	return err
}

func knockGRPC(addr string, s stranger, method string) error {
	cc, err := grpc.NewClient("passthrough:///"+addr, grpc.WithTransportCredentials(strangerCreds{
		TransportCredentials: credentials.NewTLS(s.config(alpnGRPC)), cfg: s.config(alpnGRPC),
	}))
	if err != nil {
		return err
	}
	defer cc.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
	defer cancel()
	out := new(wrapperspb.BytesValue)
	return cc.Invoke(ctx, method, &emptypb.Empty{}, out)
}

// strangerCreds handshakes with exactly the given configuration, which gRPC's own would complete and check.
type strangerCreds struct {
	credentials.TransportCredentials
	cfg *tls.Config
}

func (c strangerCreds) ClientHandshake(ctx context.Context, _ string, raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	conn := tls.Client(raw, c.cfg)
	if err := conn.HandshakeContext(ctx); err != nil {
		return nil, nil, err
	}
	return conn, credentials.TLSInfo{State: conn.ConnectionState(), CommonAuthInfo: credentials.CommonAuthInfo{
		SecurityLevel: credentials.PrivacyAndIntegrity,
	}}, nil
}

func (c strangerCreds) Clone() credentials.TransportCredentials { return c }

var peerServices = []grpc.ServiceDesc{
	peerv1.Content_ServiceDesc, peerv1.Forward_ServiceDesc, peerv1.Reload_ServiceDesc, peerv1.Replica_ServiceDesc,
}

func TestAClientMayCallNothingThatIsNotListed(t *testing.T) {
	ca := newCA(t)
	n := newNode(t, TCP(), ca, "node-1", "127.0.0.1:0", func(c *Config) { c.ClientMethods = []string{methodSay} })
	client := stranger{cert: certOf(issue(t, ca, RoleClient, "tool"))}
	if err := knockGRPC(n.Addr(), client, methodSay); err != nil {
		t.Fatalf("the listed method: %v", err)
	}
	if _, who := n.echo.seen(); who.Role != RoleClient || who.Name != "tool" {
		t.Errorf("the handler was called by %s", who)
	}
	if err := knockRaft(n.Addr(), client); err == nil {
		t.Error("a client got through to Raft")
	}
	var methods []string
	for _, s := range peerServices {
		for _, m := range s.Methods {
			methods = append(methods, "/"+s.ServiceName+"/"+m.MethodName)
		}
		for _, m := range s.Streams {
			methods = append(methods, "/"+s.ServiceName+"/"+m.StreamName)
		}
	}
	methods = append(methods, methodStream, "/no.such.Service/Method",
		"/grpc.reflection.v1.ServerReflection/ServerReflectionInfo")
	if len(methods) < 12 {
		t.Fatalf("only %d methods", len(methods))
	}
	for _, m := range methods {
		err := fault.FromGRPC(knockGRPC(n.Addr(), client, m))
		if !fault.Is(err, fault.Denied) {
			t.Errorf("%s: %v", m, err)
		}
	}
}

func TestTheAnswererMustBeTheExpectedNode(t *testing.T) {
	ca := newCA(t)
	a := newNode(t, TCP(), ca, "node-1", "127.0.0.1:0")
	b := newNode(t, TCP(), ca, "node-2", "127.0.0.1:0")
	acceptCounting(t, b, &readCounter{})
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()

	if got, err := a.say(ctx, b.Addr(), "node-2", "hi"); err != nil || got != "hi" {
		t.Fatalf("the right name: %q, %v", got, err)
	}
	if _, who := b.echo.seen(); who.Name != "node-1" || who.Role != RoleNode {
		t.Errorf("the handler was called by %s", who)
	}
	_, err := a.say(ctx, b.Addr(), "node-3", "hi")
	wantKind(t, err, fault.Unavailable)
	if !strings.Contains(err.Error(), `node node-3 was expected`) {
		t.Errorf("the error does not say who was expected: %v", err)
	}

	name := "node-3"
	a.SetNameOf(func(raftAddr) string { return name })
	_, err = a.Raft().Dial(raftAddr(b.Addr()), time.Second)
	wantKind(t, err, fault.Denied)
	name = "node-2"
	conn, err := a.Raft().Dial(raftAddr(b.Addr()), time.Second)
	if err != nil {
		t.Fatal(err)
	}
	_ = conn.Close()
}

// TestADialledStrangerIsNotTalkedTo is the matrix the other way round: who answers must be a node of the authority.
func TestADialledStrangerIsNotTalkedTo(t *testing.T) {
	ca := newCA(t)
	a := newNode(t, TCP(), ca, "node-1", "127.0.0.1:0")
	for _, s := range strangers(t, ca) {
		if s.cert == nil || s.alpn != nil || s.name == "a removed member" { // whom we dial, we chose
			continue
		}
		t.Run(s.name, func(t *testing.T) {
			ln, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			got := make(chan int, 1)
			go func() {
				defer close(got)
				raw, err := ln.Accept()
				if err != nil {
					return
				}
				defer raw.Close()
				_ = raw.SetDeadline(time.Now().Add(5 * time.Second))
				conn := tls.Server(raw, &tls.Config{
					Certificates: []tls.Certificate{*s.cert}, NextProtos: []string{alpnRaft}, MaxVersion: s.max,
					ClientAuth: tls.RequestClientCert,
				})
				n, _ := conn.Read(make([]byte, 16))
				got <- n
			}()
			conn, err := a.Raft().Dial(raftAddr(ln.Addr().String()), 3*time.Second)
			if err == nil {
				_, _ = conn.Write([]byte("secret"))
				_ = conn.Close()
			}
			_ = ln.Close()
			// What may only serve is a proper answerer; everybody else that must not call must not answer either.
			want := s.raft || s.name == "server use only"
			if n := <-got; (err == nil) != want || (n > 0) != want {
				t.Errorf("talked to %v (%d bytes), want %v: %v", err == nil, n, want, err)
			}
		})
	}
}

func TestPeerIdentityIsFalseOutsideAHandler(t *testing.T) {
	if id, ok := PeerIdentity(context.Background()); ok {
		t.Errorf("got %v", id)
	}
}

func TestConfigSaysWhatIsWrong(t *testing.T) {
	ca := newCA(t)
	good := func() Config {
		return Config{
			Listen: "127.0.0.1:0", Credentials: issue(t, ca, RoleNode, "n"), Logger: quietLogger(), Registerer: newRegistry(),
		}
	}
	for field, spoil := range map[string]func(*Config){
		"Listen":      func(c *Config) { c.Listen = "" },
		"Advertise":   func(c *Config) { c.Listen = "0.0.0.0:7001" },
		"Credentials": func(c *Config) { c.Credentials = issue(t, ca, RoleClient, "tool") },
		"Logger":      func(c *Config) { c.Logger = nil },
		"Registerer":  func(c *Config) { c.Registerer = nil },
		"MaxConns":    func(c *Config) { c.MaxConns = -1 },
	} {
		cfg := good()
		spoil(&cfg)
		_, err := New(cfg)
		wantKind(t, err, fault.Invalid)
		if !strings.Contains(err.Error(), field) {
			t.Errorf("%s: the error does not name the field: %v", field, err)
		}
	}
	cfg := good()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	cfg.Listen = ln.Addr().String()
	if _, err := New(cfg); !fault.Is(err, fault.Unavailable) {
		t.Errorf("a port in use: %v", err)
	}
}
