package tlscmd

import (
	"bytes"
	"encoding/base64"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"rollcall/node/fault"
	"rollcall/transport"
	"rollcall/transport/pki"
)

func read(t *testing.T, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func load(dir, name string) (*transport.Credentials, error) {
	return transport.LoadFiles(filepath.Join(dir, caFile), filepath.Join(dir, name+".pem"), filepath.Join(dir, name+"-key.pem"))
}

func mustRun(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestTheFilesAreWhatANodeLoads(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "tls")
	var out bytes.Buffer
	mustRun(t, CA(&out, CAOptions{Dir: dir}))
	mustRun(t, Cert(&out, CertOptions{Dir: dir, Name: "node-1", Hosts: []string{"n1.example", "10.0.0.1", "rollcall_1"}}))
	mustRun(t, Cert(&out, CertOptions{Dir: dir, Name: "tool", Role: pki.RoleClient, TTL: time.Hour}))

	c, err := load(dir, "node-1")
	if err != nil {
		t.Fatal(err)
	}
	if id := c.Identity(); id.Role != pki.RoleNode || id.Name != "node-1" {
		t.Errorf("identity %s", id)
	}
	certs, err := pki.ParseCerts(read(t, filepath.Join(dir, "node-1.pem")))
	if err != nil {
		t.Fatal(err)
	}
	for _, host := range []string{"n1.example", "10.0.0.1", "localhost", "127.0.0.1"} {
		if err := certs[0].VerifyHostname(host); err != nil {
			t.Error(err)
		}
	}
	if c, err = load(dir, "tool"); err != nil || c.Identity().Role != pki.RoleClient {
		t.Errorf("client: %v", err)
	}
	key, err := base64.StdEncoding.DecodeString(strings.TrimSpace(string(read(t, filepath.Join(dir, gossipFile)))))
	if err != nil || len(key) != gossipKeyLen {
		t.Errorf("gossip key of %d bytes, %v", len(key), err)
	}
	for name, mode := range map[string]fs.FileMode{
		".": 0o700, caFile: 0o644, caKeyFile: 0o600, gossipFile: 0o600, "node-1.pem": 0o644, "node-1-key.pem": 0o600,
	} {
		info, err := os.Stat(filepath.Join(dir, name))
		if err != nil || info.Mode().Perm() != mode {
			t.Errorf("%s: mode %v, want %v, %v", name, info.Mode().Perm(), mode, err)
		}
	}
	if strings.Contains(out.String(), "PRIVATE") || strings.Contains(out.String(), base64.StdEncoding.EncodeToString(key)) {
		t.Error("a secret was printed")
	}
	for _, want := range []string{caFile, caKeyFile, gossipFile, "node-1.pem", "rollcall://node/node-1", "next: "} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("the output does not say %q:\n%s", want, out.String())
		}
	}
}

func TestNothingIsOverwrittenWithoutForce(t *testing.T) {
	dir := t.TempDir()
	var out bytes.Buffer
	mustRun(t, CA(&out, CAOptions{Dir: dir}))
	mustRun(t, Cert(&out, CertOptions{Dir: dir, Name: "n"}))
	before := map[string][]byte{}
	for _, f := range []string{caFile, caKeyFile, gossipFile, "n.pem", "n-key.pem"} {
		before[f] = read(t, filepath.Join(dir, f))
	}
	if err := CA(&out, CAOptions{Dir: dir}); !fault.Is(err, fault.Conflict) {
		t.Errorf("ca: %v", err)
	}
	if err := Cert(&out, CertOptions{Dir: dir, Name: "n"}); !fault.Is(err, fault.Conflict) {
		t.Errorf("cert: %v", err)
	}
	for f, b := range before {
		if !bytes.Equal(b, read(t, filepath.Join(dir, f))) {
			t.Errorf("%s has changed", f)
		}
	}
	mustRun(t, Cert(&out, CertOptions{Dir: dir, Name: "n", Force: true}))
	if bytes.Equal(before["n.pem"], read(t, filepath.Join(dir, "n.pem"))) {
		t.Error("--force renewed nothing")
	}
	if _, err := load(dir, "n"); err != nil {
		t.Error(err)
	}
	mustRun(t, CA(&out, CAOptions{Dir: dir, Force: true}))
	if _, err := load(dir, "n"); !fault.Is(err, fault.Invalid) {
		t.Errorf("a certificate of the replaced authority: %v", err)
	}
}

func TestARotationOfTheAuthorityNeverLeavesANodeWithoutTrust(t *testing.T) {
	dir := t.TempDir()
	var out bytes.Buffer
	mustRun(t, CA(&out, CAOptions{Dir: dir}))
	mustRun(t, Cert(&out, CertOptions{Dir: dir, Name: "n"}))
	gossip := read(t, filepath.Join(dir, gossipFile))
	running, err := load(dir, "n")
	if err != nil {
		t.Fatal(err)
	}
	serial := running.Identity().Serial

	mustRun(t, CA(&out, CAOptions{Dir: dir, Rotate: true}))
	mustRun(t, running.Reload())
	if running.Identity().Serial != serial {
		t.Error("the certificate has changed by itself")
	}
	mustRun(t, Cert(&out, CertOptions{Dir: dir, Name: "n", Force: true}))
	mustRun(t, running.Reload())
	if running.Identity().Serial == serial {
		t.Error("the new certificate is not used")
	}
	mustRun(t, CA(&out, CAOptions{Dir: dir, Retire: true}))
	mustRun(t, running.Reload())
	certs, err := pki.ParseCerts(read(t, filepath.Join(dir, caFile)))
	if err != nil || len(certs) != 1 {
		t.Errorf("%d authorities are trusted, %v", len(certs), err)
	}
	if !bytes.Equal(gossip, read(t, filepath.Join(dir, gossipFile))) {
		t.Error("the gossip key has changed")
	}
}

func TestWhatMakesNoSenseIsRefused(t *testing.T) {
	dir := t.TempDir()
	var out bytes.Buffer
	if err := Cert(&out, CertOptions{Dir: dir, Name: "n"}); !fault.Is(err, fault.Invalid) {
		t.Errorf("without an authority: %v", err)
	}
	if err := CA(&out, CAOptions{Dir: dir, Rotate: true}); !fault.Is(err, fault.Invalid) {
		t.Errorf("a rotation of nothing: %v", err)
	}
	mustRun(t, CA(&out, CAOptions{Dir: dir}))
	for _, o := range []CAOptions{
		{Dir: dir, Force: true, Rotate: true}, {Dir: dir, Retire: true, Rotate: true}, {Dir: dir, Force: true, TTL: -1},
	} {
		if err := CA(&out, o); !fault.Is(err, fault.Invalid) {
			t.Errorf("%+v: %v", o, err)
		}
	}
	for _, o := range []CertOptions{
		{Name: ""},
		{Name: "../n"},
		{Name: "ca"},
		{Name: "ca-key"},
		{Name: "n", Role: "root"},
		{Name: "n", Hosts: []string{"https://x"}},
		{Name: "n", Hosts: []string{"x:80"}},
		{Name: "n", Hosts: []string{""}},
		{Name: "n", Hosts: []string{"a..b"}},
		{Name: "n", Hosts: []string{"-a"}},
		{Name: "n", TTL: -1},
	} {
		o.Dir = dir
		if err := Cert(&out, o); !fault.Is(err, fault.Invalid) {
			t.Errorf("%+v: %v", o, err)
		}
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 3 {
		t.Errorf("files: %v, %v", entries, err)
	}
}
