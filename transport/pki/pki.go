package pki

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"net/url"
	"time"

	"rollcall/node/fault"
)

// backdate is how long before now a certificate begins, so that a peer whose clock is behind accepts it.
const backdate = 5 * time.Minute

// Default lifetimes, used by `rollcall tls` and by `dev`.
const (
	DefaultCATTL   = 10 * 365 * 24 * time.Hour
	DefaultCertTTL = 365 * 24 * time.Hour
)

// CA is a certificate authority that can issue. It belongs to one cluster and to nothing else: whoever holds a
// certificate of it is a candidate member. Safe for concurrent use; it never changes.
type CA struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

// Pair is one certificate with its private key, both as PEM.
type Pair struct {
	CertPEM []byte
	KeyPEM  []byte
}

// NewCA makes an authority called name that ends ttl from now. Its certificate has a path length of zero: what it
// issues can never issue in turn.
func NewCA(name string, ttl time.Duration) (*CA, error) {
	if ttl <= 0 {
		return nil, fault.New(fault.Invalid, "make certificate authority", name, "the lifetime is %s; it must be positive", ttl)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fault.Wrap(err, "make key of certificate authority", name)
	}
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	now := time.Now()
	tmpl := &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: name, Organization: []string{"rollcall"}},
		NotBefore: now.Add(-backdate), NotAfter: now.Add(ttl),
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		IsCA:     true, BasicConstraintsValid: true, MaxPathLenZero: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		return nil, fault.Wrap(err, "sign certificate authority", name)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fault.Wrap(err, "read back certificate authority", name)
	}
	return &CA{cert: cert, key: key}, nil
}

// LoadCA reads an authority from PEM. certPEM may be a bundle (as it is while authorities are being rotated); the
// certificate that belongs to the key is taken.
func LoadCA(certPEM, keyPEM []byte) (*CA, error) {
	key, err := parseKey(keyPEM)
	if err != nil {
		return nil, fault.Wrap(err, "load certificate authority", "key")
	}
	certs, err := ParseCerts(certPEM)
	if err != nil {
		return nil, fault.Wrap(err, "load certificate authority", "certificate")
	}
	for _, c := range certs {
		if pub, ok := c.PublicKey.(*ecdsa.PublicKey); ok && pub.Equal(key.Public()) {
			if !c.IsCA {
				return nil, fault.New(fault.Invalid, "load certificate authority", "", "the certificate of this key may not issue")
			}
			return &CA{cert: c, key: key}, nil
		}
	}
	return nil, fault.New(fault.Invalid, "load certificate authority", "", "none of the certificates belongs to the key")
}

// CertPEM returns the authority's certificate: what every node and client must trust.
func (ca *CA) CertPEM() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ca.cert.Raw})
}

// KeyPEM returns the authority's private key. Whoever has it can make members.
func (ca *CA) KeyPEM() ([]byte, error) { return encodeKey(ca.key) }

// NotAfter is when the authority ends.
func (ca *CA) NotAfter() time.Time { return ca.cert.NotAfter }

// Request says what Issue is to put into a certificate.
type Request struct {
	// Role is RoleNode or RoleClient. Required.
	Role string
	// Name is the node's (or client's) name. Required; see CheckName.
	Name string
	// DNSNames and IPs are the addresses under which HTTPS clients reach the node. The cluster port ignores them:
	// peers are known by Name. They may be empty.
	DNSNames []string
	IPs      []net.IP
	// TTL is the lifetime from now, DefaultCertTTL when 0. It is cut to the authority's own end.
	TTL time.Duration
}

// Issue makes a key and a certificate for it. Nodes' certificates serve both ends of a connection, on the cluster
// port and on the HTTPS listener; clients' certificates only the calling end.
func (ca *CA) Issue(req Request) (Pair, error) {
	if err := CheckRole(req.Role); err != nil {
		return Pair{}, err
	}
	if err := CheckName(req.Name); err != nil {
		return Pair{}, err
	}
	if req.TTL == 0 {
		req.TTL = DefaultCertTTL
	}
	if req.TTL < 0 {
		return Pair{}, fault.New(fault.Invalid, "issue certificate", req.Name, "the lifetime is %s; it must be positive", req.TTL)
	}
	now := time.Now()
	notAfter := now.Add(req.TTL)
	if notAfter.After(ca.cert.NotAfter) {
		notAfter = ca.cert.NotAfter
	}
	if !notAfter.After(now) {
		return Pair{}, fault.New(fault.Invalid, "issue certificate", req.Name,
			"the authority ended on %s; make a new one with: rollcall tls ca", ca.cert.NotAfter.Format(time.RFC3339))
	}
	serial, err := newSerial()
	if err != nil {
		return Pair{}, err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return Pair{}, fault.Wrap(err, "make key", req.Name)
	}
	usage := []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	if req.Role == RoleNode {
		usage = append(usage, x509.ExtKeyUsageServerAuth)
	}
	tmpl := &x509.Certificate{
		SerialNumber: serial,
		Subject:      pkix.Name{CommonName: commonName(req.Name), Organization: []string{"rollcall"}},
		NotBefore:    now.Add(-backdate), NotAfter: notAfter,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: usage, BasicConstraintsValid: true,
		URIs:     []*url.URL{{Scheme: scheme, Host: req.Role, Path: "/" + req.Name}},
		DNSNames: req.DNSNames, IPAddresses: req.IPs,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, ca.cert, key.Public(), ca.key)
	if err != nil {
		return Pair{}, fault.Wrap(err, "sign certificate", req.Name)
	}
	keyPEM, err := encodeKey(key)
	if err != nil {
		return Pair{}, err
	}
	return Pair{CertPEM: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), KeyPEM: keyPEM}, nil
}

// ParseCerts reads every certificate of a PEM file. At least one must be there.
func ParseCerts(data []byte) ([]*x509.Certificate, error) {
	var out []*x509.Certificate
	for {
		var block *pem.Block
		block, data = pem.Decode(data)
		if block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			continue
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fault.As(fault.Invalid, err, "parse certificate", "")
		}
		out = append(out, c)
	}
	if len(out) == 0 {
		return nil, fault.New(fault.Invalid, "parse certificate", "", "there is no CERTIFICATE block in it")
	}
	return out, nil
}

func parseKey(data []byte) (*ecdsa.PrivateKey, error) {
	block, _ := pem.Decode(data)
	if block == nil || block.Type != "PRIVATE KEY" {
		return nil, fault.New(fault.Invalid, "parse key", "", "there is no PRIVATE KEY block in it")
	}
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, fault.As(fault.Invalid, err, "parse key", "")
	}
	ec, ok := key.(*ecdsa.PrivateKey)
	if !ok {
		return nil, fault.New(fault.Invalid, "parse key", "", "it is not an ECDSA key")
	}
	return ec, nil
}

func encodeKey(key *ecdsa.PrivateKey) ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, fault.Wrap(err, "encode key", "")
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
}

func newSerial() (*big.Int, error) {
	// RFC 5280 4.1.2.2: positive and at most 20 octets; 128 random bits never meet.
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 128))
	if err != nil {
		return nil, fault.Wrap(err, "make serial number", "")
	}
	return serial.Add(serial, big.NewInt(1)), nil
}

// commonName cuts a name to the 64 bytes that X.520 allows. Nobody decides anything by it.
func commonName(name string) string {
	const ub = 64
	return name[:min(len(name), ub)]
}
