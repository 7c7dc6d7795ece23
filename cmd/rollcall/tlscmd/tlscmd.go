// Package tlscmd makes the certificates of a cluster for the command line: `rollcall tls ca` and `rollcall tls cert`.
// It writes files and tells the writer it is given what it wrote and what to do next; it reads no flags.
package tlscmd

import (
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"rollcall/node/fault"
	"rollcall/transport/pki"
)

// The files in the directory that both commands share.
const (
	caFile     = "ca.pem"
	caKeyFile  = "ca-key.pem"
	gossipFile = "gossip.key"
)

// gossipKeyLen is the length of memberlist's AES-256 key.
const gossipKeyLen = 32

// CAOptions says what CA is to make.
type CAOptions struct {
	// Dir is where the files go; it is made (0700) when it is not there.
	Dir string
	// TTL is the lifetime of the authority; 0 means pki.DefaultCATTL.
	TTL time.Duration
	// Force replaces what is there. Every certificate of the old authority is refused from then on.
	Force bool
	// Rotate makes a new authority and keeps the old ones trusted, as the first step of a rotation without an outage.
	// The gossip key stays as it is.
	Rotate bool
	// Retire makes no authority: it ends the trust in all but the current one, as the last step of a rotation.
	Retire bool
}

// CA makes ca.pem, ca-key.pem and gossip.key in a directory. It replaces nothing without Force, and leaves nothing
// half made that a second call would not find.
func CA(w io.Writer, o CAOptions) error {
	if o.Force && o.Rotate || o.Retire && (o.Force || o.Rotate) {
		return fault.New(fault.Invalid, "make certificate authority", o.Dir,
			"only one of --force, --rotate and --retire can be meant")
	}
	if o.TTL == 0 {
		o.TTL = pki.DefaultCATTL
	}
	if o.Retire {
		return retire(w, o.Dir)
	}
	if err := os.MkdirAll(o.Dir, 0o700); err != nil {
		return fault.As(fault.Invalid, err, "make directory", o.Dir)
	}
	trusted, err := oldTrust(o)
	if err != nil {
		return err
	}
	ca, err := pki.NewCA("rollcall "+time.Now().UTC().Format("2006-01-02"), o.TTL)
	if err != nil {
		return err
	}
	key, err := ca.KeyPEM()
	if err != nil {
		return err
	}
	replace := o.Force || o.Rotate
	if err := writeGossipKey(w, o, replace); err != nil {
		return err
	}
	// The trust first: with a key that nobody trusts yet nothing can be issued that would be refused.
	if err := pki.WriteNew(filepath.Join(o.Dir, caFile), append(ca.CertPEM(), trusted...), 0o644, replace); err != nil {
		return err
	}
	if err := pki.WriteNew(filepath.Join(o.Dir, caKeyFile), key, 0o600, replace); err != nil {
		return err
	}
	certPath, keyPath := filepath.Join(o.Dir, caFile), filepath.Join(o.Dir, caKeyFile)
	say(w, "certificate authority: %s (until %s)", certPath, ca.NotAfter().Format(time.RFC3339))
	say(w, "its private key:       %s (keep it off the nodes: whoever has it can make members)", keyPath)
	if o.Rotate {
		say(w, "next: copy %s to every node and reload them; then issue each node a new certificate;", caFile)
		say(w, "      then: rollcall tls ca --retire")
		return nil
	}
	say(w, "next: rollcall tls cert --dir %s --name node-1 --host node-1.example,10.0.0.1", o.Dir)
	return nil
}

// oldTrust returns what stays trusted, and refuses early where something would be overwritten.
func oldTrust(o CAOptions) ([]byte, error) {
	if o.Rotate {
		old, err := pki.ReadCerts(filepath.Join(o.Dir, caFile))
		if err != nil {
			return nil, err
		}
		_, err = pki.ParseCerts(old)
		return old, fault.Wrap(err, "read", filepath.Join(o.Dir, caFile))
	}
	if o.Force {
		return nil, nil
	}
	for _, name := range []string{caFile, caKeyFile, gossipFile} {
		path := filepath.Join(o.Dir, name)
		if _, err := os.Lstat(path); err == nil {
			return nil, fault.New(fault.Conflict, "make certificate authority", path,
				"the file exists; --rotate adds a new authority beside the old, --force replaces it and refuses all its certificates")
		} else if !errors.Is(err, fs.ErrNotExist) {
			return nil, fault.As(fault.Invalid, err, "look at", path)
		}
	}
	return nil, nil
}

func writeGossipKey(w io.Writer, o CAOptions, replace bool) error {
	path := filepath.Join(o.Dir, gossipFile)
	if o.Rotate {
		if _, err := os.Lstat(path); err == nil {
			return nil
		}
	}
	raw := make([]byte, gossipKeyLen)
	if _, err := rand.Read(raw); err != nil {
		return fault.Wrap(err, "make gossip key", path)
	}
	if err := pki.WriteNew(path, []byte(base64.StdEncoding.EncodeToString(raw)+"\n"), 0o600, replace); err != nil {
		return err
	}
	say(w, "gossip key:            %s (the same file on every node)", path)
	return nil
}

func retire(w io.Writer, dir string) error {
	ca, err := loadCA(dir)
	if err != nil {
		return err
	}
	if err := pki.WriteNew(filepath.Join(dir, caFile), ca.CertPEM(), 0o644, true); err != nil {
		return err
	}
	say(w, "only the current authority is trusted by %s now", filepath.Join(dir, caFile))
	say(w, "next: copy it to every node and reload them")
	return nil
}

func loadCA(dir string) (*pki.CA, error) {
	cert, err := pki.ReadCerts(filepath.Join(dir, caFile))
	if err != nil {
		return nil, err
	}
	key, err := pki.ReadKey(filepath.Join(dir, caKeyFile))
	if err != nil {
		return nil, err
	}
	return pki.LoadCA(cert, key)
}

// CertOptions says what Cert is to issue.
type CertOptions struct {
	// Dir holds ca.pem and ca-key.pem, and is where the new files go.
	Dir string
	// Name is the node's name, as its configuration says it. The files are called after it.
	Name string
	// Hosts are the names and IP addresses under which HTTPS clients reach the node. localhost and the loopback
	// addresses are always among them.
	Hosts []string
	// TTL is the lifetime; 0 means pki.DefaultCertTTL.
	TTL time.Duration
	// Role is "node" or "client"; "" means node.
	Role string
	// Force replaces a certificate of the same name: the way to renew one.
	Force bool
}

// Cert issues <name>.pem and <name>-key.pem.
func Cert(w io.Writer, o CertOptions) error {
	if o.Role == "" {
		o.Role = pki.RoleNode
	}
	if err := pki.CheckName(o.Name); err != nil {
		return err
	}
	certPath, keyPath := filepath.Join(o.Dir, o.Name+".pem"), filepath.Join(o.Dir, o.Name+"-key.pem")
	if o.Name+".pem" == caFile || o.Name+".pem" == caKeyFile || o.Name+"-key.pem" == caKeyFile {
		return fault.New(fault.Invalid, "issue certificate", o.Name, "the name is the authority's own file name; choose another")
	}
	if !o.Force {
		for _, path := range []string{certPath, keyPath} {
			if _, err := os.Lstat(path); err == nil {
				return fault.New(fault.Conflict, "issue certificate", path, "the file exists; say --force to renew it")
			}
		}
	}
	ca, err := loadCA(o.Dir)
	if err != nil {
		return err
	}
	req := pki.Request{Role: o.Role, Name: o.Name, TTL: o.TTL}
	if o.Role == pki.RoleNode {
		if req.DNSNames, req.IPs, err = hosts(o.Hosts); err != nil {
			return err
		}
	}
	pair, err := ca.Issue(req)
	if err != nil {
		return err
	}
	certs, err := pki.ParseCerts(pair.CertPEM)
	if err != nil {
		return err
	}
	// The key first: a node that reloads between the two keeps what it has, because they do not match.
	if err := pki.WriteNew(keyPath, pair.KeyPEM, 0o600, o.Force); err != nil {
		return err
	}
	if err := pki.WriteNew(certPath, pair.CertPEM, 0o644, o.Force); err != nil {
		return err
	}
	say(w, "certificate: %s (%s, until %s)", certPath, certs[0].URIs[0], certs[0].NotAfter.Format(time.RFC3339))
	say(w, "private key: %s", keyPath)
	return nil
}

// hosts sorts names from addresses and adds what every node is reached by on its own machine.
func hosts(list []string) (names []string, ips []net.IP, err error) {
	names, ips = []string{"localhost"}, []net.IP{net.IPv4(127, 0, 0, 1), net.IPv6loopback}
	for _, h := range list {
		h = strings.TrimSpace(h)
		if ip := net.ParseIP(h); ip != nil {
			ips = append(ips, ip)
			continue
		}
		if err := checkHost(h); err != nil {
			return nil, nil, err
		}
		if h != "localhost" {
			names = append(names, h)
		}
	}
	return names, ips, nil
}

// checkHost accepts what RFC 1123 calls a host name, with '_' (compose service names) and one leading "*.".
func checkHost(h string) error {
	bad := fault.New(fault.Invalid, "issue certificate", h, "it is neither an IP address nor a host name (no port, no scheme)")
	rest := strings.TrimPrefix(h, "*.")
	if rest == "" || len(h) > 253 {
		return bad
	}
	for label := range strings.SplitSeq(rest, ".") {
		if label == "" || len(label) > 63 || label[0] == '-' || label[len(label)-1] == '-' {
			return bad
		}
		for _, r := range label {
			if (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') && r != '-' && r != '_' {
				return bad
			}
		}
	}
	return nil
}

// say writes one line. A terminal that has gone away is no reason to fail what is done already.
func say(w io.Writer, format string, args ...any) { fmt.Fprintf(w, format+"\n", args...) }
