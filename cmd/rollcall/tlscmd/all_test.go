package tlscmd

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"rollcall/node/fault"
	"rollcall/transport/pki"
)

func names(t *testing.T, dir string) map[string]string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]string{}
	for _, e := range entries {
		out[e.Name()] = string(read(t, filepath.Join(dir, e.Name())))
	}
	return out
}

func TestAllMakesWhatAClusterNeedsAndThenNothingMore(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "tls")
	o := AllOptions{Dir: dir, Nodes: []string{"node-1", "node-2", "node-1"}, Hosts: []string{"10.0.0.9"}}
	var out bytes.Buffer
	mustRun(t, All(&out, o))
	first := names(t, dir)
	for _, name := range []string{"node-1", "node-2"} {
		if _, err := load(dir, name); err != nil {
			t.Error(err)
		}
		certs, err := pki.ParseCerts([]byte(first[name+".pem"]))
		mustRun(t, err)
		for _, host := range []string{name, "10.0.0.9", "127.0.0.1"} {
			mustRun(t, certs[0].VerifyHostname(host))
		}
	}
	if len(first) != 9 || len(strings.TrimSpace(first[tokenFile])) < 20 {
		t.Errorf("files: %v", first)
	}
	if strings.Contains(out.String(), strings.TrimSpace(first[tokenFile])) {
		t.Error("the token was printed without being asked for")
	}
	out.Reset()
	o.ShowToken, o.Token = true, "another"
	mustRun(t, All(&out, o))
	for name, text := range names(t, dir) {
		if first[name] != text {
			t.Errorf("%s changed", name)
		}
	}
	if out.String() != "ROLLCALL_TOKEN="+first[tokenFile] {
		t.Errorf("output of a second run: %q", out.String())
	}
}

// Every way in which the first run may have been cut off: some of the files, in the order in which they are written.
func TestAllEndsWellAfterAnInterruptedRun(t *testing.T) {
	order := []string{gossipFile, caFile, caKeyFile, "node-1-key.pem", "node-1.pem", sealFile, tokenFile}
	for n := range len(order) + 1 {
		dir := t.TempDir()
		o := AllOptions{Dir: dir, Nodes: []string{"node-1"}, Token: "t"}
		var out bytes.Buffer
		mustRun(t, All(&out, o))
		for _, name := range order[n:] {
			mustRun(t, os.Remove(filepath.Join(dir, name)))
		}
		if err := All(&out, o); err != nil {
			t.Errorf("after %v: %v", order[:n], err)
			continue
		}
		if _, err := load(dir, "node-1"); err != nil {
			t.Errorf("after %v: %v", order[:n], err)
		}
		if got := string(read(t, filepath.Join(dir, tokenFile))); got != "t\n" {
			t.Errorf("after %v: token %q", order[:n], got)
		}
	}
}

func TestAllRenewsWhatIsDue(t *testing.T) {
	dir := t.TempDir()
	o := AllOptions{Dir: dir, Nodes: []string{"node-1", "node-2"}}
	var out bytes.Buffer
	mustRun(t, All(&out, o))
	// Certificates begin five minutes back: of this one, less than a third is left.
	mustRun(t, Cert(&out, CertOptions{Dir: dir, Name: "node-1", TTL: 2 * time.Minute, Force: true}))
	before := names(t, dir)
	mustRun(t, All(&out, o))
	after := names(t, dir)
	if before["node-1.pem"] == after["node-1.pem"] || before["node-2.pem"] != after["node-2.pem"] {
		t.Error("the certificate that is due must be renewed, and no other")
	}
}

func TestAllDoesNotReplaceAnAuthorityWhoseKeyWasPutAway(t *testing.T) {
	dir := t.TempDir()
	o := AllOptions{Dir: dir, Nodes: []string{"node-1"}}
	var out bytes.Buffer
	mustRun(t, All(&out, o))
	mustRun(t, os.Remove(filepath.Join(dir, caKeyFile)))
	mustRun(t, All(&out, o)) // nothing to issue
	o.Nodes = append(o.Nodes, "node-4")
	err := All(&out, o)
	if fault.KindOf(err) != fault.NotFound || !strings.Contains(err.Error(), caKeyFile) {
		t.Errorf("err = %v", err)
	}
	if err := All(&out, AllOptions{Dir: dir}); fault.KindOf(err) != fault.Invalid {
		t.Errorf("no nodes: %v", err)
	}
}
