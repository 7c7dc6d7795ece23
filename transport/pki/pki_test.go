package pki

import (
	"crypto/x509"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"rollcall/node/fault"
)

func newTestCA(t testing.TB) *CA {
	t.Helper()
	ca, err := NewCA("test", time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	return ca
}

func leafOf(t testing.TB, p Pair) *x509.Certificate {
	t.Helper()
	certs, err := ParseCerts(p.CertPEM)
	if err != nil {
		t.Fatal(err)
	}
	return certs[0]
}

func TestAnIssuedCertificateServesBothEndsAndNamesItsNode(t *testing.T) {
	ca := newTestCA(t)
	pair, err := ca.Issue(Request{
		Role: RoleNode, Name: "node-1.eu_west", DNSNames: []string{"n1.example"}, IPs: []net.IP{net.IPv4(10, 0, 0, 1)},
	})
	if err != nil {
		t.Fatal(err)
	}
	leaf := leafOf(t, pair)
	id, err := IdentityOf(leaf)
	if err != nil || id.String() != "rollcall://node/node-1.eu_west" || id.Serial == "" || !id.NotAfter.Equal(leaf.NotAfter) {
		t.Errorf("identity %+v, %v", id, err)
	}
	if leaf.NotAfter.After(ca.NotAfter()) {
		t.Error("it outlives its authority")
	}
	if leaf.IsCA {
		t.Error("it could issue")
	}
	roots := x509.NewCertPool()
	roots.AddCert(ca.cert)
	for _, use := range []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth} {
		if _, err := leaf.Verify(x509.VerifyOptions{Roots: roots, KeyUsages: []x509.ExtKeyUsage{use}}); err != nil {
			t.Errorf("usage %v: %v", use, err)
		}
	}
	if err := leaf.VerifyHostname("n1.example"); err != nil {
		t.Error(err)
	}
	if err := leaf.VerifyHostname("10.0.0.1"); err != nil {
		t.Error(err)
	}
}

func TestAClientsCertificateCannotServe(t *testing.T) {
	ca := newTestCA(t)
	pair, err := ca.Issue(Request{Role: RoleClient, Name: "tool"})
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(ca.cert)
	_, err = leafOf(t, pair).Verify(x509.VerifyOptions{Roots: roots, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}})
	if err == nil {
		t.Error("it can serve")
	}
}

func TestTheAuthorityComesBackFromItsFiles(t *testing.T) {
	ca, old := newTestCA(t), newTestCA(t)
	key, err := ca.KeyPEM()
	if err != nil {
		t.Fatal(err)
	}
	bundle := append(old.CertPEM(), ca.CertPEM()...)
	again, err := LoadCA(bundle, key)
	if err != nil {
		t.Fatal(err)
	}
	if !again.cert.Equal(ca.cert) {
		t.Error("another certificate of the bundle was taken")
	}
	if _, err := again.Issue(Request{Role: RoleNode, Name: "n"}); err != nil {
		t.Error(err)
	}
	if _, err := LoadCA(old.CertPEM(), key); !fault.Is(err, fault.Invalid) {
		t.Errorf("a key without its certificate: %v", err)
	}
	pair, err := ca.Issue(Request{Role: RoleNode, Name: "n"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := LoadCA(pair.CertPEM, pair.KeyPEM); !fault.Is(err, fault.Invalid) {
		t.Errorf("a leaf as authority: %v", err)
	}
}

func TestWhatMayNotBeIssuedIsRefused(t *testing.T) {
	ca := newTestCA(t)
	for _, r := range []Request{
		{Role: "gossip", Name: "n"},
		{Role: "", Name: "n"},
		{Role: RoleNode},
		{Role: RoleNode, Name: "a/b"},
		{Role: RoleNode, Name: "../a"},
		{Role: RoleNode, Name: "a..b"},
		{Role: RoleNode, Name: "-a"},
		{Role: RoleNode, Name: "a."},
		{Role: RoleNode, Name: "a b"},
		{Role: RoleNode, Name: "a%2f"},
		{Role: RoleNode, Name: "nöde"},
		{Role: RoleNode, Name: strings.Repeat("a", MaxNameLen+1)},
		{Role: RoleNode, Name: "n", TTL: -time.Second},
	} {
		if _, err := ca.Issue(r); !fault.Is(err, fault.Invalid) {
			t.Errorf("%+v: %v", r, err)
		}
	}
	if _, err := ca.Issue(Request{Role: RoleNode, Name: strings.Repeat("a", MaxNameLen)}); err != nil {
		t.Error(err)
	}
	if _, err := NewCA("x", 0); !fault.Is(err, fault.Invalid) {
		t.Errorf("an authority without a lifetime: %v", err)
	}
}

func TestKeysThatEverybodyCanReadAreRefused(t *testing.T) {
	path := filepath.Join(t.TempDir(), "key.pem")
	if err := WriteNew(path, []byte("x"), 0o600, false); err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Fatalf("mode %v, %v", info.Mode(), err)
	}
	for mode, good := range map[os.FileMode]bool{0o600: true, 0o640: true, 0o644: false, 0o602: false} {
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		if _, err := ReadKey(path); (err == nil) != good {
			t.Errorf("%o: %v", mode, err)
		}
	}
}

func TestWriteNewNeverReplacesUnlessTold(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "f")
	if err := WriteNew(path, []byte("one"), 0o644, false); err != nil {
		t.Fatal(err)
	}
	if err := WriteNew(path, []byte("two"), 0o644, false); !fault.Is(err, fault.Conflict) {
		t.Errorf("a second time: %v", err)
	}
	if b, _ := os.ReadFile(path); string(b) != "one" {
		t.Errorf("it holds %q", b)
	}
	if err := WriteNew(path, []byte("three"), 0o644, true); err != nil {
		t.Fatal(err)
	}
	if b, _ := os.ReadFile(path); string(b) != "three" {
		t.Errorf("it holds %q", b)
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 1 {
		t.Errorf("left behind: %v, %v", entries, err)
	}
}

// FuzzIdentity looks for a URI from which two readers could take two names: whatever is accepted must be exactly what
// Issue would have written for it.
func FuzzIdentity(f *testing.F) {
	for _, s := range []string{
		"rollcall://node/node-1", "rollcall://client/tool", "rollcall://node/", "rollcall://node", "rollcall:node/n",
		"rollcall://node/a/b", "rollcall://node//n", "rollcall://user@node/n", "rollcall://node:1/n", "rollcall://node/n?x",
		"rollcall://node/n#f", "rollcall://node/n%2Fx", "ROLLCALL://node/n", "rollcall://NODE/n", "rollcall://node/n?",
		"rollcall://node/\x00",
		"//node/n", "rollcall://gossip/n", "rollcall://[::1]/n", "rollcall://node/..", "",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		id, err := ParseIdentity(s)
		if err == nil {
			if id.String() != s {
				t.Errorf("%q was read as %q", s, id)
			}
			if CheckName(id.Name) != nil || CheckRole(id.Role) != nil || strings.ContainsAny(id.Name, "/\\%?#@: \x00") {
				t.Errorf("%q gave the name %q", s, id.Name)
			}
		} else if !fault.Is(err, fault.Denied) {
			t.Errorf("%q: %v", s, err)
		}
		u, perr := url.Parse(s)
		if perr != nil {
			return
		}
		got, gerr := IdentityOf(&x509.Certificate{URIs: []*url.URL{u}, SerialNumber: newTestSerial})
		if gerr == nil && (u.Scheme != scheme || got.Name != u.Path[1:] || got.Role != u.Host) {
			t.Errorf("%q in a certificate was read as %q", s, got)
		}
		if err == nil && gerr != nil {
			t.Errorf("%q is good as text and bad in a certificate: %v", s, gerr)
		}
	})
}

var newTestSerial = must(newSerial())

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}
