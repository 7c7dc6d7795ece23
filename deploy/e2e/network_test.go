//go:build e2e

package e2e

import (
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// Ports of a node in a namespace of its own; the address tells the nodes apart.
const (
	portHTTP   = 8200
	portPeer   = 8201
	portGossip = 8202
)

// network is a bridge in a namespace of its own, a namespace for each node, and one cable to where the test runs. The
// bridge is not in the test's namespace, so that a firewall of the machine (Docker's, say) sees nothing of it.
//
// Whatever is made is undone by a janitor, a process that outlives the test: also when the test is killed.
type network struct {
	t       testing.TB
	tag     string // begins every name
	prefix  string // "198.18.7."
	janitor *janitor
}

// injectors are the programs that faults are made with, and the Debian package of each.
var injectors = map[string]string{"ip": "iproute2", "tc": "iproute2", "iptables": "iptables", "strace": "strace", "mount": "mount"}

// needInjectors fails the test when something is missing: a fault that is left out in silence proves nothing.
func needInjectors(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("namespaces, firewall rules and mounts need root: run this test as root, in a virtual machine or a privileged container")
	}
	missing := map[string]bool{}
	for name, pkg := range injectors {
		if _, err := exec.LookPath(name); err != nil {
			missing[pkg] = true
		}
	}
	if len(missing) > 0 {
		var list []string
		for pkg := range missing {
			list = append(list, pkg)
		}
		t.Fatalf("faults are made with programs that are not here: apt-get install -y %s", strings.Join(list, " "))
	}
}

// newNetwork makes the namespaces. Addresses are of 198.18.0.0/15, which is for tests and routed nowhere.
func newNetwork(t testing.TB, nodes int) *network {
	t.Helper()
	needInjectors(t)
	n := &network{
		t: t, tag: fmt.Sprintf("e2e%d%c", os.Getpid(), 'a'+networks.Add(1)%26), prefix: freePrefix(t), janitor: newJanitor(t),
	}
	complete := false
	defer func() {
		if !complete { // it has failed, and nobody else knows what is there already
			n.janitor.end()
		}
	}()
	hub := n.tag + "-hub"
	n.janitor.undo("ip netns del " + hub)
	n.must("ip", "netns", "add", hub)
	n.must("ip", "-n", hub, "link", "add", "br0", "type", "bridge")
	n.must("ip", "-n", hub, "link", "set", "br0", "up")
	n.must("ip", "-n", hub, "link", "set", "lo", "up")
	n.cable(n.tag, "", hub, 254)
	for i := range nodes {
		ns := n.namespace(i)
		n.janitor.undo("ip netns del " + ns)
		n.must("ip", "netns", "add", ns)
		n.must("ip", "-n", ns, "link", "set", "lo", "up")
		n.cable(fmt.Sprintf("%s-%d", n.tag, i+1), ns, hub, i+1)
	}
	complete = true
	return n
}

// networks counts those of this process: the kernel takes its time with the names of one that has ended.
var networks atomic.Int32

func (n *network) namespace(i int) string { return fmt.Sprintf("%s-%d", n.tag, i+1) }

func (n *network) address(i int) string { return fmt.Sprintf("%s%d", n.prefix, i+1) }

// cable leads from a namespace, "" for the test's own, to the hub. Inside the namespace it is eth0.
func (n *network) cable(name, ns, hub string, host int) {
	n.t.Helper()
	n.must("ip", "-n", hub, "link", "add", name+"h", "type", "veth", "peer", "name", name+"e")
	n.must("ip", "-n", hub, "link", "set", name+"h", "master", "br0", "up")
	ip, dev := []string{"-n", ns}, "eth0"
	if ns == "" {
		ip, dev = nil, name+"e"
		n.must("ip", "-n", hub, "link", "set", dev, "netns", fmt.Sprint(os.Getpid()))
	} else {
		n.must("ip", "-n", hub, "link", "set", name+"e", "netns", ns, "name", dev)
	}
	n.must("ip", append(ip, "addr", "add", fmt.Sprintf("%s%d/24", n.prefix, host), "dev", dev)...)
	n.must("ip", append(ip, "link", "set", dev, "up")...)
}

// freePrefix is a /24 that no interface of the machine has, and that no other run has taken: binding to an address of it
// is tried first.
func freePrefix(t testing.TB) string {
	t.Helper()
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		t.Fatal(err)
	}
	var taken strings.Builder
	for _, a := range addrs {
		taken.WriteString(a.String() + " ")
	}
	for i := range 256 {
		prefix := fmt.Sprintf("198.18.%d.", (os.Getpid()+i)%256)
		if !strings.Contains(taken.String(), prefix) {
			return prefix
		}
	}
	t.Fatal("no free network in 198.18.0.0/16")
	return ""
}

// must runs a command that has to work.
func (n *network) must(name string, args ...string) string {
	n.t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		n.t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// in runs a command inside a node's namespace.
func (n *network) in(node int, name string, args ...string) string {
	n.t.Helper()
	return n.must("ip", append([]string{"netns", "exec", n.namespace(node), name}, args...)...)
}

// rule adds a firewall rule to a node's namespace.
func (n *network) rule(node int, rule string) {
	n.t.Helper()
	n.in(node, "iptables", append([]string{"-w"}, strings.Fields(rule)...)...)
}

// isolated are the rules that leave a node nothing but the test's own cable: one for what comes, one for what goes.
func (n *network) isolated() []string {
	return []string{
		fmt.Sprintf("-A INPUT -i eth0 ! -s %s254 -j DROP", n.prefix), fmt.Sprintf("-A OUTPUT -o eth0 ! -d %s254 -j DROP", n.prefix),
	}
}

// heal takes every rule and limit of a node's namespace away.
func (n *network) heal(node int) {
	n.t.Helper()
	n.in(node, "iptables", "-w", "-F")
	n.in(node, "iptables", "-w", "-t", "mangle", "-F")
	_ = exec.Command("ip", "netns", "exec", n.namespace(node), "tc", "qdisc", "del", "dev", "eth0", "root").Run() // there may be none
}

// disk mounts a small file system of its own at a directory.
func (n *network) disk(dir string, size string) {
	n.t.Helper()
	n.janitor.undo("umount -l " + dir)
	n.must("mount", "-t", "tmpfs", "-o", "mode=0700,size="+size, n.tag, dir)
}

// end undoes everything, and fails the test if something of it is left.
func (n *network) end() {
	n.janitor.end()
	for i := range 40 {
		if ns, _ := filepath.Glob("/run/netns/" + n.tag + "-*"); len(ns) == 0 {
			break
		} else if i == 39 {
			n.t.Errorf("namespaces are left over: %q", ns)
		}
		time.Sleep(50 * time.Millisecond)
	}
	mounts, err := os.ReadFile("/proc/mounts")
	if err != nil || strings.Contains("\n"+string(mounts), "\n"+n.tag+" ") {
		n.t.Errorf("mounts are left over (%v)", err)
	}
}

// janitor is a shell that waits until its input ends, by the test's word or by the test's death, and then runs what it
// was told, the last first.
type janitor struct {
	t   testing.TB
	in  io.WriteCloser
	cmd *exec.Cmd
	mu  sync.Mutex
}

const janitorScript = `undo=; while read -r line; do undo="$line; $undo"; done; eval "$undo" >/dev/null 2>&1; true`

func newJanitor(t testing.TB) *janitor {
	t.Helper()
	cmd := exec.Command("sh", "-c", janitorScript)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // what ends the test by its process group does not end it
	in, err := cmd.StdinPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	return &janitor{t: t, in: in, cmd: cmd}
}

// undo says how something that is about to be made is undone. The commands hold no user's text.
func (j *janitor) undo(command string) {
	j.t.Helper()
	j.mu.Lock()
	defer j.mu.Unlock()
	if _, err := io.WriteString(j.in, command+"\n"); err != nil {
		j.t.Fatal(err)
	}
}

func (j *janitor) end() {
	_ = j.in.Close()
	if err := j.cmd.Wait(); err != nil {
		j.t.Errorf("undo the faults: %v", err)
	}
}
