// Package pki makes and reads the certificates of a rollcall cluster: one certificate authority, and certificates
// that name a role and a node in a URI SAN. transport uses it to decide who is calling; `rollcall tls` and `dev` use
// it to issue.
package pki

import (
	"crypto/x509"
	"net/url"
	"strings"
	"time"

	"rollcall/node/fault"
)

// The roles that a certificate can name. Any other role is refused everywhere.
const (
	// RoleNode is a member of the cluster: it may speak Raft and call every peer method.
	RoleNode = "node"
	// RoleClient is a program that is no member: it may call only what the transport lists for it.
	RoleClient = "client"
)

// scheme is the URI scheme of the SAN that carries an identity: rollcall://<role>/<name>.
const scheme = "rollcall"

// MaxNameLen bounds a node name, so that it fits a URI, a file name and a log line.
const MaxNameLen = 128

// Identity is who a certificate speaks for. It is a value; two are the same party when Role and Name are equal.
type Identity struct {
	// Role is RoleNode or RoleClient.
	Role string
	// Name is the node's name (or the client's), as the replicated state knows it. It is not the Raft server id:
	// see transport/DESIGN.md.
	Name string
	// Serial is the certificate's serial number in hexadecimal, for logs.
	Serial string
	// NotAfter is when the certificate ends.
	NotAfter time.Time
}

// String returns the identity as its URI.
func (i Identity) String() string { return scheme + "://" + i.Role + "/" + i.Name }

// CheckName says whether name may stand in a certificate: 1 to MaxNameLen letters, digits, '-', '_' or '.', with a
// letter or digit at both ends and no two dots in a row. Such a name is safe in a URI, a file name and a host name.
func CheckName(name string) error {
	switch {
	case name == "":
		return fault.New(fault.Invalid, "check name", "", "the name is empty")
	case len(name) > MaxNameLen:
		return fault.New(fault.Invalid, "check name", name[:16]+"...", "longer than %d bytes", MaxNameLen)
	case !alnum(name[0]) || !alnum(name[len(name)-1]) || strings.Contains(name, ".."):
		return fault.New(fault.Invalid, "check name", quote(name),
			"a name begins and ends with a letter or digit and has no two dots in a row")
	}
	for i := range len(name) {
		if c := name[i]; !alnum(c) && c != '-' && c != '_' && c != '.' {
			return fault.New(fault.Invalid, "check name", quote(name), "only letters, digits, '-', '_' and '.' may be used")
		}
	}
	return nil
}

// CheckRole says whether role is one that a certificate may name.
func CheckRole(role string) error {
	if role != RoleNode && role != RoleClient {
		return fault.New(fault.Invalid, "check role", quote(role), "the role is %q or %q", RoleNode, RoleClient)
	}
	return nil
}

// IdentityOf reads the identity of a certificate that has already been verified against the cluster's authority. It
// is strict: exactly one URI SAN of our scheme, in exactly the form that Issue writes. Everything else is Denied, so
// that no two readers can see two different names in one certificate.
func IdentityOf(cert *x509.Certificate) (Identity, error) {
	var found *url.URL
	for _, u := range cert.URIs {
		if !strings.EqualFold(u.Scheme, scheme) {
			continue
		}
		if found != nil {
			return Identity{}, fault.New(fault.Denied, "read certificate", "", "it names more than one %s:// identity", scheme)
		}
		found = u
	}
	if found == nil {
		return Identity{}, fault.New(fault.Denied, "read certificate", "",
			"it names no %s:// identity; issue one with: rollcall tls cert", scheme)
	}
	id, err := parseURI(found)
	if err != nil {
		return Identity{}, err
	}
	id.Serial, id.NotAfter = cert.SerialNumber.Text(16), cert.NotAfter
	return id, nil
}

// ParseIdentity reads the text form of an identity, rollcall://<role>/<name>.
func ParseIdentity(text string) (Identity, error) {
	u, err := url.Parse(text)
	if err != nil {
		return Identity{}, fault.New(fault.Denied, "read identity", quote(text), "it is not a URI")
	}
	id, err := parseURI(u)
	if err != nil {
		return Identity{}, err
	}
	if id.String() != text {
		return Identity{}, fault.New(fault.Denied, "read identity", quote(text), "it is not in its canonical form")
	}
	return id, nil
}

func parseURI(u *url.URL) (Identity, error) {
	id := Identity{Role: u.Host, Name: strings.TrimPrefix(u.Path, "/")}
	// The URI must be the one that its own identity would write: no user, port, query, fragment or escapes.
	if u.String() != id.String() {
		return Identity{}, fault.New(fault.Denied, "read identity", quote(u.String()), "it is not %s://<role>/<name>", scheme)
	}
	if err := CheckRole(id.Role); err != nil {
		return Identity{}, fault.As(fault.Denied, err, "read identity", quote(u.String()))
	}
	if err := CheckName(id.Name); err != nil {
		return Identity{}, fault.As(fault.Denied, err, "read identity", quote(u.String()))
	}
	return id, nil
}

func alnum(c byte) bool { return c >= '0' && c <= '9' || c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' }

// quote keeps what a stranger sent short and printable in our own texts.
func quote(s string) string {
	const most = 80
	if len(s) > most {
		s = s[:most] + "..."
	}
	return strings.Map(func(r rune) rune {
		if r < ' ' || r > '~' {
			return '?'
		}
		return r
	}, s)
}
