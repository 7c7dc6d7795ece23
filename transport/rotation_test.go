package transport

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"rollcall/node/fault"
	"rollcall/transport/pki"
)

// TestRotationOfCertificatesAndAuthorityFailsNoCall replaces leaf and authority of two nodes under load, several times.
func TestRotationOfCertificatesAndAuthorityFailsNoCall(t *testing.T) {
	ca := newCA(t)
	slow := func(c *Config) { c.MaxConnAge = 300 * time.Millisecond } // so that gRPC connections are renewed too
	a := newNode(t, TCP(), ca, "a", "127.0.0.1:0", slow)
	b := newNode(t, TCP(), ca, "b", "127.0.0.1:0", slow)
	old := issue(t, ca, RoleNode, "b")

	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var calls, failed atomic.Int64
	var wg sync.WaitGroup
	for _, pair := range [][2]*node{{a, b}, {b, a}} {
		for range 2 {
			wg.Go(func() {
				for ctx.Err() == nil {
					call, stop := context.WithTimeout(context.Background(), 10*time.Second)
					if _, err := pair[0].say(call, pair[1].Addr(), "", "x"); err != nil {
						failed.Add(1)
						t.Error(err)
					}
					stop()
					calls.Add(1)
				}
			})
		}
	}
	for range 3 {
		next := newCA(t)
		both := append(ca.CertPEM(), next.CertPEM()...)
		for _, n := range []*node{a, b} { // trust old and new everywhere
			replace(t, n, both, ca)
		}
		for _, n := range []*node{a, b} { // then switch the leaves
			replace(t, n, both, next)
		}
		seen := calls.Load()
		eventually(t, 10*time.Second, func() error { // connections of the old leaves reach their age
			for _, n := range []*node{a, b} {
				if m := stale(n, next); m > 0 {
					return fmt.Errorf("%d connections of %s still use the old authority", m, n.Identity().Name)
				}
			}
			if calls.Load() < seen+200 {
				return errors.New("too few calls")
			}
			return nil
		})
		for _, n := range []*node{a, b} { // then drop the old authority
			replace(t, n, next.CertPEM(), next)
		}
		ca = next
	}
	cancel()
	wg.Wait()
	if failed.Load() > 0 || calls.Load() < 600 {
		t.Errorf("%d of %d calls failed", failed.Load(), calls.Load())
	}
	t.Logf("%d calls during 3 rotations of leaf and authority, %d failed", calls.Load(), failed.Load())
	err := knockGRPC(a.Addr(), stranger{cert: certOf(old)}, methodSay)
	if err == nil {
		t.Error("a certificate of the retired authority gets in")
	}
}

func replace(t testing.TB, n *node, trust []byte, issuer *pki.CA) {
	t.Helper()
	pair, err := issuer.Issue(pki.Request{Role: RoleNode, Name: n.Identity().Name, TTL: time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	if err := n.creds.Replace(trust, pair.CertPEM, pair.KeyPEM); err != nil {
		t.Fatal(err)
	}
}

// stale counts the connections of n whose peer's certificate is not of the issuer.
func stale(n *node, issuer *pki.CA) int {
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(issuer.CertPEM())
	m := &material{pool: pool}
	return len(n.snapshot(func(c *secureConn) bool {
		return m.verify(c.ConnectionState().PeerCertificates, x509.ExtKeyUsageClientAuth) != nil
	}))
}

func TestEstablishedConnectionsEndWhenTheirPeerIsNoLongerAccepted(t *testing.T) {
	ca := newCA(t)
	var removed atomic.Bool
	a := newNode(t, TCP(), ca, "a", "127.0.0.1:0", func(c *Config) {
		c.Authorize = func(Identity) error {
			if removed.Load() {
				return fault.New(fault.Denied, "admit", "b", "removed")
			}
			return nil
		}
	})
	b := newNode(t, TCP(), ca, "b", "127.0.0.1:0")
	acceptCounting(t, a, &readCounter{})
	dial := func() net.Conn {
		t.Helper()
		c, err := b.Raft().Dial(raftAddr(a.Addr()), time.Second)
		if err != nil {
			t.Fatal(err)
		}
		_ = c.SetDeadline(time.Now().Add(5 * time.Second))
		if _, err := c.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		return c
	}
	closed := func(c net.Conn, why string) {
		t.Helper()
		if _, err := c.Read(make([]byte, 1)); err == nil || isTimeout(err) {
			t.Errorf("%s: the stream is still open: %v", why, err)
		}
	}
	c := dial()
	a.Recheck()
	if _, err := c.Write([]byte("x")); err != nil {
		t.Fatalf("a recheck of a good peer: %v", err)
	}
	if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
		t.Fatalf("a recheck of a good peer: %v", err)
	}
	removed.Store(true)
	a.Recheck()
	closed(c, "removed by Authorize")

	removed.Store(false)
	c = dial()
	next := newCA(t)
	replace(t, a, next.CertPEM(), next) // b's authority is no longer trusted
	closed(c, "the authority was dropped")
}

func TestAnExpiredCertificateEndsItsConnections(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca, mem := newCA(t), NewMemNetwork()
		short, err := Issue(ca, pki.Request{Role: RoleNode, Name: "b", TTL: time.Hour})
		if err != nil {
			t.Fatal(err)
		}
		a := newNode(t, mem.Host("a"), ca, "a", "a:1")
		acceptCounting(t, a, &readCounter{})
		b := newNode(t, mem.Host("b"), ca, "b", "b:1", func(c *Config) { c.Credentials = short })
		acceptCounting(t, b, &readCounter{})
		time.Sleep(59 * time.Minute)
		for _, pair := range [][2]*node{{a, b}, {b, a}} {
			if err := roundTrip(pair[0], pair[1].Addr()); err != nil {
				t.Fatalf("before the end: %v", err)
			}
		}
		time.Sleep(2*time.Minute + time.Second) // the end, and one recheck
		if got := len(a.RaftPeers()); got != 0 {
			t.Errorf("%d streams are still open", got)
		}
		for _, pair := range [][2]*node{{a, b}, {b, a}} {
			if err := roundTrip(pair[0], pair[1].Addr()); err == nil {
				t.Errorf("%s reaches %s with an expired certificate", pair[0].Addr(), pair[1].Addr())
			}
		}
	})
}

func TestABadReloadChangesNothing(t *testing.T) {
	ca, other := newCA(t), newCA(t)
	c := issue(t, ca, RoleNode, "a")
	before := c.Identity()
	pair, err := ca.Issue(pki.Request{Role: RoleNode, Name: "a"})
	if err != nil {
		t.Fatal(err)
	}
	pair2, err := ca.Issue(pki.Request{Role: RoleNode, Name: "renamed"})
	if err != nil {
		t.Fatal(err)
	}
	client, err := ca.Issue(pki.Request{Role: RoleClient, Name: "a"})
	if err != nil {
		t.Fatal(err)
	}
	for why, pem := range map[string][3][]byte{
		"key of another":    {ca.CertPEM(), pair.CertPEM, pair2.KeyPEM},
		"other authority":   {other.CertPEM(), pair.CertPEM, pair.KeyPEM},
		"other name":        {ca.CertPEM(), pair2.CertPEM, pair2.KeyPEM},
		"other role":        {ca.CertPEM(), client.CertPEM, client.KeyPEM},
		"leaf as authority": {pair.CertPEM, pair.CertPEM, pair.KeyPEM},
		"no authority":      {nil, pair.CertPEM, pair.KeyPEM},
		"no certificate":    {ca.CertPEM(), nil, pair.KeyPEM},
	} {
		err := c.Replace(pem[0], pem[1], pem[2])
		if !fault.Is(err, fault.Invalid) {
			t.Errorf("%s: %v", why, err)
		}
		if c.Identity() != before {
			t.Fatalf("%s: the credentials have changed", why)
		}
	}
	if err := c.Replace(ca.CertPEM(), pair.CertPEM, pair.KeyPEM); err != nil {
		t.Fatal(err)
	}
	if c.Identity().Serial == before.Serial {
		t.Error("a good replacement did not act")
	}
}

func TestTheHTTPSListenerServesTheCurrentCertificate(t *testing.T) {
	ca := newCA(t)
	c, err := Issue(ca, pki.Request{Role: RoleNode, Name: "a", DNSNames: []string{"a.example"}})
	if err != nil {
		t.Fatal(err)
	}
	ln, err := tls.Listen("tcp", "127.0.0.1:0", c.ServerTLS())
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() {
		conn, err := ln.Accept()
		if err != nil {
			return
		}
		_ = conn.(*tls.Conn).Handshake()
		conn.Close()
	})
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(c.TrustedPEM())
	conn, err := tls.Dial("tcp", ln.Addr().String(), &tls.Config{RootCAs: pool, ServerName: "a.example"})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if got := conn.ConnectionState().PeerCertificates[0].SerialNumber.Text(16); got != c.Identity().Serial {
		t.Errorf("serial %s, want %s", got, c.Identity().Serial)
	}
}

// TestAHandshakeThatStraddlesARotationSucceeds renews both leaves while the two ends are greeting each other.
func TestAHandshakeThatStraddlesARotationSucceeds(t *testing.T) {
	const hop = 100 * time.Millisecond
	// In hops: 0 to 2 the dial, 3 the answerer sends its certificate, 4 the caller verifies it and sends its own, 5 the
	// answerer verifies that.
	for _, at := range []time.Duration{2*hop + hop/2, 3*hop + hop/2, 4*hop + hop/2} {
		synctest.Test(t, func(t *testing.T) {
			ca, next, mem := newCA(t), newCA(t), NewMemNetwork()
			a := newNode(t, mem.Host("a"), ca, "a", "a:1")
			b := newNode(t, mem.Host("b"), ca, "b", "b:1")
			mem.Delay("a", "b", hop)
			var wg sync.WaitGroup
			wg.Go(func() {
				ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
				defer cancel()
				if _, err := b.say(ctx, a.Addr(), "a", "x"); err != nil {
					t.Errorf("rotated after %s: %v", at, err)
				}
			})
			time.Sleep(at)
			both := append(ca.CertPEM(), next.CertPEM()...)
			for _, n := range []*node{a, b} {
				replace(t, n, both, ca)
			}
			for _, n := range []*node{a, b} {
				replace(t, n, both, next)
			}
			wg.Wait()
		})
	}
}
