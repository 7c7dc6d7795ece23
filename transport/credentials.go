package transport

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"sync"
	"sync/atomic"
	"time"

	"rollcall/node/fault"
	"rollcall/transport/pki"
)

// Identity is who is at the other end of a connection; see pki.Identity.
type Identity = pki.Identity

// The roles of an Identity.
const (
	RoleNode   = pki.RoleNode
	RoleClient = pki.RoleClient
)

// Credentials are a certificate with its key and the authorities to trust, replaceable while in use. Every handshake
// reads what is current; established connections are checked again when it changes. Safe for concurrent use.
type Credentials struct {
	cur atomic.Pointer[material]

	mu             sync.Mutex // serialises Reload and Replace
	ca, cert, key  string     // file names; empty when the material was given as bytes
	watch          map[int]func()
	nextWatch      int
	caPEM, certPEM []byte // what cur was made of, to see that nothing has changed
	keyPEM         []byte
}

// material never changes once it is published.
type material struct {
	cert tls.Certificate
	pool *x509.CertPool
	id   Identity
}

// LoadFiles reads the authorities to trust (a PEM bundle), a certificate and its key, and checks that they belong
// together. Reload reads the same files again. Errors are Invalid and name the file.
func LoadFiles(ca, cert, key string) (*Credentials, error) {
	c := &Credentials{ca: ca, cert: cert, key: key, watch: make(map[int]func())}
	if err := c.Reload(); err != nil {
		return nil, err
	}
	return c, nil
}

// FromPEM makes credentials of bytes: `dev` and tests, which keep nothing on disk. Reload does nothing then; Replace
// rotates.
func FromPEM(ca, cert, key []byte) (*Credentials, error) {
	c := &Credentials{watch: make(map[int]func())}
	if err := c.Replace(ca, cert, key); err != nil {
		return nil, err
	}
	return c, nil
}

// Issue makes credentials in memory: a certificate for req, signed by ca, trusting ca alone.
func Issue(ca *pki.CA, req pki.Request) (*Credentials, error) {
	pair, err := ca.Issue(req)
	if err != nil {
		return nil, err
	}
	return FromPEM(ca.CertPEM(), pair.CertPEM, pair.KeyPEM)
}

// Reload reads the files again and, when they hold together, uses them from now on. On an error everything stays as
// it was: half a rotation on disk takes no node down. Called on SIGHUP and by the daemon's timer.
func (c *Credentials) Reload() error {
	if c.ca == "" {
		return nil
	}
	ca, err := pki.ReadCerts(c.ca)
	if err != nil {
		return err
	}
	cert, err := pki.ReadCerts(c.cert)
	if err != nil {
		return err
	}
	key, err := pki.ReadKey(c.key)
	if err != nil {
		return err
	}
	return c.Replace(ca, cert, key)
}

// Replace uses the given PEM from now on, after the same checks as Reload: the certificate belongs to the key, chains
// to one of the authorities, is within its time, and names one identity; and that identity is the one before, because
// a node does not change its name while it runs.
func (c *Credentials) Replace(ca, cert, key []byte) error {
	m, err := newMaterial(ca, cert, key)
	if err != nil {
		return fault.Wrap(err, "load credentials", c.cert)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	old := c.cur.Load()
	if old != nil && (old.id.Role != m.id.Role || old.id.Name != m.id.Name) {
		return fault.New(fault.Invalid, "load credentials", c.cert,
			"the new certificate names %s, the running one %s; restart the node to change its name", m.id, old.id)
	}
	if old != nil && bytes.Equal(ca, c.caPEM) && bytes.Equal(cert, c.certPEM) && bytes.Equal(key, c.keyPEM) {
		return nil
	}
	c.caPEM, c.certPEM, c.keyPEM = bytes.Clone(ca), bytes.Clone(cert), bytes.Clone(key)
	c.cur.Store(m)
	for _, fn := range c.watch {
		fn()
	}
	return nil
}

// Identity returns who these credentials speak for.
func (c *Credentials) Identity() Identity { return c.cur.Load().id }

// ServerTLS returns a configuration for the HTTPS listener: the same certificate, always the current one, no client
// certificate asked for, TLS 1.2 or newer.
func (c *Credentials) ServerTLS() *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS12,
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			return &c.cur.Load().cert, nil
		},
	}
}

// TrustedPEM returns the authorities that are trusted now, as PEM: what an HTTPS client of the node needs.
func (c *Credentials) TrustedPEM() []byte {
	c.mu.Lock()
	defer c.mu.Unlock()
	return bytes.Clone(c.caPEM)
}

// onChange calls fn after every replacement, from the goroutine that replaces, until stop is called. fn must not call
// back into c's Replace or Reload.
func (c *Credentials) onChange(fn func()) (stop func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	n := c.nextWatch
	c.nextWatch++
	c.watch[n] = fn
	return func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		delete(c.watch, n)
	}
}

func newMaterial(ca, cert, key []byte) (*material, error) {
	roots, err := pki.ParseCerts(ca)
	if err != nil {
		return nil, fault.Wrap(err, "read the authorities", "")
	}
	pool := x509.NewCertPool()
	for _, r := range roots {
		if !r.IsCA {
			return nil, fault.New(fault.Invalid, "read the authorities", r.Subject.CommonName, "it is not a certificate authority")
		}
		pool.AddCert(r)
	}
	pair, err := tls.X509KeyPair(cert, key)
	if err != nil {
		return nil, fault.As(fault.Invalid, err, "match certificate and key", "")
	}
	if pair.Leaf == nil {
		return nil, fault.New(fault.Invalid, "read certificate", "", "it has no leaf")
	}
	m := &material{cert: pair, pool: pool}
	if m.id, err = pki.IdentityOf(pair.Leaf); err != nil {
		return nil, fault.As(fault.Invalid, err, "read certificate", "")
	}
	chain, err := pki.ParseCerts(cert)
	if err != nil {
		return nil, err
	}
	usages := []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	if m.id.Role == RoleNode {
		usages = append(usages, x509.ExtKeyUsageServerAuth)
	}
	for _, u := range usages {
		if err := m.verify(chain, u); err != nil {
			return nil, fault.As(fault.Invalid, err, "check certificate", m.id.String())
		}
	}
	return m, nil
}

// verify checks that a peer's chain is of a trusted authority, within its time, and made for the usage.
func (m *material) verify(chain []*x509.Certificate, usage x509.ExtKeyUsage) error {
	if len(chain) == 0 {
		return fault.New(fault.Denied, "verify certificate", "", "the peer sent none")
	}
	inter := x509.NewCertPool()
	for _, c := range chain[1:] {
		inter.AddCert(c)
	}
	_, err := chain[0].Verify(x509.VerifyOptions{
		Roots: m.pool, Intermediates: inter, CurrentTime: time.Now(), KeyUsages: []x509.ExtKeyUsage{usage},
	})
	if err == nil {
		return nil
	}
	if _, ok := errors.AsType[x509.UnknownAuthorityError](err); ok {
		return fault.New(fault.Denied, "verify certificate", "", "it is not of this cluster's authority")
	}
	return fault.As(fault.Denied, err, "verify certificate", "")
}

// server returns the configuration of accepted connections. check verifies the peer's chain and decides about it; its
// error becomes the alert that ends the handshake, before any byte of a protocol is read.
//
// Every step of a handshake takes what is current at that step. With what was current at its first moment, a handshake
// that straddles a rotation would meet a certificate that its trust does not know yet.
func (c *Credentials) server(check func(tls.ConnectionState) error) *tls.Config {
	return &tls.Config{
		MinVersion:     tls.VersionTLS13,
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return &c.cur.Load().cert, nil },
		// check verifies: the standard library would do so against the trust of the first moment.
		ClientAuth: tls.RequireAnyClientCert,
		NextProtos: []string{alpnRaft, alpnGRPC},
		// A resumed session would skip what has changed since: trust, expiry, authorisation.
		SessionTicketsDisabled: true,
		VerifyConnection:       check,
	}
}

// client returns the configuration of one dialled connection; check is as for server.
func (c *Credentials) client(alpn string, check func(tls.ConnectionState) error) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		// Always ours, whatever authorities the server names: a refusal with a reason beats an empty certificate.
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &c.cur.Load().cert, nil },
		NextProtos:           []string{alpn},
		// Peers are known by the identity in their certificate, not by a host name: check verifies the whole chain
		// itself (material.verify), which the standard library would do only together with a host name.
		InsecureSkipVerify:     true,
		SessionTicketsDisabled: true,
		VerifyConnection:       check,
	}
}
