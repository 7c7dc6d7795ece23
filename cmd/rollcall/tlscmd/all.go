package tlscmd

import (
	"crypto/rand"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"rollcall/node/fault"
	"rollcall/transport/pki"
)

// tokenFile is the token that a cluster is founded with.
const tokenFile = "token"

// AllOptions says what All is to make.
type AllOptions struct {
	// Dir is where the files go; it is made (0700) when it is not there.
	Dir string
	// Nodes are the names of the nodes that get a certificate.
	Nodes []string
	// Hosts are further names and addresses for every certificate, beside the node's name and loopback.
	Hosts []string
	// Token is the first token; "" makes a random one. A token that is there already stays.
	Token string
	// ShowToken says the token to the writer, for a cluster to try things out with.
	ShowToken bool
}

// All makes everything that a cluster needs in one directory: authority, gossip key, seal key, first token and a certificate for
// each node. What is there stays, but for a certificate with less than a third of its life left, which is renewed. It
// may be run at every start, and after it was interrupted anywhere.
func All(w io.Writer, o AllOptions) error {
	if len(o.Nodes) == 0 {
		return fault.New(fault.Invalid, "make certificates", o.Dir, "no node is named")
	}
	want := wanted(o)
	if err := allAuthority(w, o.Dir, want); err != nil {
		return err
	}
	for _, name := range want {
		hosts := append([]string{name}, o.Hosts...)
		if err := Cert(w, CertOptions{Dir: o.Dir, Name: name, Hosts: hosts, Force: true}); err != nil {
			return err
		}
	}
	if _, err := os.Stat(filepath.Join(o.Dir, sealFile)); err != nil {
		if err := SealKey(w, o.Dir); err != nil {
			return err
		}
	}
	return allToken(w, o)
}

// wanted lists the nodes whose certificate is missing, unreadable or due.
func wanted(o AllOptions) []string {
	var names []string
	for _, name := range o.Nodes {
		if !slices.Contains(names, name) && !fresh(o.Dir, name) {
			names = append(names, name)
		}
	}
	return names
}

func fresh(dir, name string) bool {
	data, err := pki.ReadCerts(filepath.Join(dir, name+".pem"))
	if err != nil {
		return false
	}
	certs, err := pki.ParseCerts(data)
	if err != nil || len(certs) == 0 {
		return false
	}
	if _, err := os.Stat(filepath.Join(dir, name+"-key.pem")); err != nil {
		return false
	}
	life := certs[0].NotAfter.Sub(certs[0].NotBefore)
	return time.Until(certs[0].NotAfter) > life/3
}

// allAuthority makes the authority if there is none. Its key is written last, so that without it nothing can have been
// issued: what an interrupted run left is then replaced. It is refused to replace an authority whose key was moved
// away, as it should be.
func allAuthority(w io.Writer, dir string, want []string) error {
	there := func(name string) bool {
		_, err := os.Stat(filepath.Join(dir, name))
		return err == nil
	}
	switch {
	case there(caKeyFile):
		return nil
	case there(caFile) && len(want) == 0:
		return nil // everything was issued, and the key was put away
	case there(caFile) && anyIssued(dir):
		return fault.New(fault.NotFound, "issue certificates", strings.Join(want, ", "),
			"%s is not in %s; put it back to issue these", caKeyFile, dir)
	}
	return CA(w, CAOptions{Dir: dir, Force: true})
}

// anyIssued reports whether the directory holds a node's key.
func anyIssued(dir string) bool {
	keys, err := filepath.Glob(filepath.Join(dir, "*-key.pem"))
	return err != nil || len(keys) > 0
}

func allToken(w io.Writer, o AllOptions) error {
	path := filepath.Join(o.Dir, tokenFile)
	if _, err := os.Stat(path); err != nil {
		token := strings.TrimSpace(o.Token)
		if token == "" {
			token = "rc." + rand.Text()
		}
		if err := pki.WriteNew(path, []byte(token+"\n"), 0o600, false); err != nil {
			return err
		}
		say(w, "first token:           %s (read once, when the cluster is founded)", path)
	}
	if o.ShowToken {
		token, err := pki.ReadKey(path)
		if err != nil {
			return err
		}
		say(w, "ROLLCALL_TOKEN=%s", strings.TrimSpace(string(token)))
	}
	return nil
}
