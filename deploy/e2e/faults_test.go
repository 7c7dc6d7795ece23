//go:build e2e

package e2e

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// trouble is one way in which a cluster can suffer.
type trouble struct {
	kind string
	// hold is for how long, between two limits.
	hold [2]time.Duration
	// dies says that the victim's process may end by itself; all, that the fault concerns every node.
	dies, all bool
	// do makes the fault and says how it is undone; nil: it is over.
	do func(x *chaos, v *server) (undo func())
}

func between(from, to int) [2]time.Duration {
	return [2]time.Duration{time.Duration(from) * time.Millisecond, time.Duration(to) * time.Millisecond}
}

// faults are all kinds, in the order in which the seed shuffles them.
func faults() []trouble {
	return append(append(append(processFaults(), networkFaults()...), diskFaults()...), resourceFaults()...)
}

func processFaults() []trouble {
	return []trouble{
		{kind: "kill -9", hold: between(500, 4000), do: func(_ *chaos, v *server) func() { v.kill(); return v.start }},
		{kind: "stop", hold: between(100, 3000), do: func(_ *chaos, v *server) func() { v.stop(); return v.start }},
		{kind: "pause, short", hold: between(300, 2000), do: pause},
		{kind: "pause, past the lease", hold: between(6500, 9000), do: pause},
		{kind: "step down", hold: between(100, 1000), do: func(x *chaos, v *server) func() {
			ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
			defer cancel()
			_ = v.client().StepDown(ctx) // refused where there is no leader at the moment
			return nil
		}},
		{kind: "node lost and replaced by an empty one", hold: between(100, 1000), do: func(_ *chaos, v *server) func() {
			v.kill()
			v.replace()
			return func() { v.born(); v.start() }
		}},
		{kind: "majority killed at once", hold: between(500, 3000), all: true, do: func(x *chaos, _ *server) func() {
			return x.killTogether(len(x.nodes)/2 + 1)
		}},
		{kind: "all killed at once", hold: between(100, 1000), all: true, do: func(x *chaos, _ *server) func() {
			return x.killTogether(len(x.nodes))
		}},
		{kind: "plugin killed", hold: between(300, 2000), do: func(x *chaos, v *server) func() {
			return x.plugins(v, syscall.SIGKILL, 0)
		}},
		{kind: "plugin paused", hold: between(500, 4000), do: func(x *chaos, v *server) func() {
			return x.plugins(v, syscall.SIGSTOP, syscall.SIGCONT)
		}},
		{kind: "rolling upgrade or downgrade", hold: between(0, 1), all: true, do: (*chaos).roll},
	}
}

func pause(_ *chaos, v *server) func() {
	v.signal(syscall.SIGSTOP)
	return func() { v.signal(syscall.SIGCONT) }
}

// killTogether kills so many nodes with nothing in between.
func (x *chaos) killTogether(n int) func() {
	order := x.rng.Perm(len(x.nodes))[:n]
	for _, i := range order {
		x.nodes[i].signal(syscall.SIGKILL)
	}
	for _, i := range order {
		_ = x.nodes[i].gone(10 * time.Second)
	}
	return func() {
		for _, i := range order {
			x.nodes[i].start()
		}
	}
}

// plugins sends a signal to every plugin process of a node, and another one afterwards.
func (x *chaos) plugins(v *server, first, then syscall.Signal) func() {
	pid, hit := v.pid(), 0
	for _, p := range plugins(x.root) {
		if p.host == pid && syscall.Kill(p.pid, first) == nil {
			hit++
		}
	}
	if hit == 0 {
		x.t.Errorf("%s has no plugin process", v.name)
	}
	if then == 0 {
		return nil
	}
	return func() {
		for _, p := range plugins(x.root) {
			if p.host == pid {
				_ = syscall.Kill(p.pid, then) // it may be gone: another took its place
			}
		}
	}
}

// roll puts the other build under every node, one after the other, the leader first or last.
func (x *chaos) roll(_ *server) func() {
	order := x.rng.Perm(len(x.nodes))
	leaderFirst := x.rng.IntN(2) == 0
	leader := x.leader()
	for n, i := range order {
		if x.nodes[i] == leader {
			to := len(order) - 1
			if leaderFirst {
				to = 0
			}
			order[n], order[to] = order[to], order[n]
			break
		}
	}
	x.upgraded = !x.upgraded
	for _, i := range order {
		s := x.nodes[i]
		s.stop()
		s.bin = x.builds[x.upgraded]
		s.start()
		until(x.t, long, s.name+" serves with the other build", func() error { return x.settled(x.nodes...) })
		x.ask()
	}
	return nil
}

// diskFaults are on the node's own small file system, or between the process and its fsync.
func diskFaults() []trouble {
	return []trouble{
		{kind: "disk full", hold: between(1000, 5000), dies: true, do: fillDisk},
		{kind: "fsync fails", hold: between(500, 3000), dies: true, do: func(x *chaos, v *server) func() {
			return x.trace(v, "error=EIO")
		}},
		{kind: "fsync hangs", hold: between(4000, 7000), do: func(x *chaos, v *server) func() {
			return x.trace(v, "delay_enter=6000000")
		}},
		{kind: "fsync slow", hold: between(2000, 5000), do: func(x *chaos, v *server) func() {
			return x.trace(v, "delay_enter=200000")
		}},
	}
}

// fillDisk takes every free byte of the node's file system.
func fillDisk(x *chaos, v *server) func() {
	file := filepath.Join(v.data, "fill")
	f, err := os.Create(file)
	if err != nil {
		x.t.Fatal(err)
	}
	_, err = io.Copy(f, zeros{})
	_ = f.Close()
	if !errors.Is(err, syscall.ENOSPC) {
		x.t.Fatalf("fill %s: %v", v.data, err)
	}
	return func() {
		if err := os.Remove(file); err != nil {
			x.t.Error(err)
		}
	}
}

type zeros struct{}

func (zeros) Read(b []byte) (int, error) { clear(b); return len(b), nil }

// trace changes what fsync does in a running process, by strace.
func (x *chaos) trace(v *server, what string) func() {
	x.t.Helper()
	log := filepath.Join(v.dir, "strace")
	out, err := os.Create(log)
	if err != nil {
		x.t.Fatal(err)
	}
	cmd := exec.Command("strace", "-f", "-o", "/dev/null", "-p", fmt.Sprint(v.pid()),
		"-e", "trace=fsync,fdatasync", "-e", "inject=fsync,fdatasync:"+what)
	cmd.Stderr = out
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	err = cmd.Start()
	_ = out.Close()
	if err != nil {
		x.t.Fatal(err)
	}
	until(x.t, short, "strace is attached to "+v.name, func() error {
		raw, err := os.ReadFile(log)
		if err == nil && !strings.Contains(string(raw), "attached") {
			err = fmt.Errorf("it says %q", raw)
		}
		return err
	})
	return func() {
		_ = cmd.Process.Signal(syscall.SIGINT) // it lets go of the process, and that goes on
		done := make(chan struct{})
		go func() { _ = cmd.Wait(); close(done) }()
		select {
		case <-done:
		case <-time.After(5 * time.Second):
			_ = cmd.Process.Kill()
			<-done
		}
	}
}

// resourceFaults take away memory, CPU, descriptors, the right time, valid certificates.
func resourceFaults() []trouble {
	return []trouble{
		{kind: "memory limit, OOM kills", hold: between(3000, 6000), dies: true, do: func(x *chaos, v *server) func() {
			v.kill()
			g := newGroup(x.t, x.net.janitor, "memory", x.net.tag+v.name)
			g.limitMemory(64 << 20)
			v.group = g
			v.start()
			return func() {
				x.note("%d OOM kills of %s and its plugins", g.oomKills(), v.name)
				if v.ended() {
					_ = v.gone(time.Second)
				} else {
					v.kill()
				}
				v.group = nil
				g.remove()
				v.start()
			}
		}},
		{kind: "CPU starvation, 5 % of one", hold: between(3000, 8000), do: func(x *chaos, v *server) func() {
			g := newGroup(x.t, x.net.janitor, "cpu", x.net.tag+v.name)
			g.limitCPU(5)
			members := []int{v.pid()}
			for _, p := range plugins(x.root) {
				if p.host == v.pid() {
					members = append(members, p.pid)
				}
			}
			g.take(members...)
			return g.remove
		}},
		{kind: "no file descriptors", hold: between(1000, 4000), do: func(x *chaos, v *server) func() {
			open, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", v.pid()))
			if err != nil {
				x.t.Fatal(err)
			}
			var was unix.Rlimit
			few := unix.Rlimit{Cur: uint64(len(open)), Max: 1 << 16} //nolint:gosec // not negative
			if err := unix.Prlimit(v.pid(), unix.RLIMIT_NOFILE, nil, &was); err != nil {
				x.t.Fatal(err)
			}
			few.Max = was.Max
			if err := unix.Prlimit(v.pid(), unix.RLIMIT_NOFILE, &few, nil); err != nil {
				x.t.Fatal(err)
			}
			return func() { _ = unix.Prlimit(v.pid(), unix.RLIMIT_NOFILE, &was, nil) }
		}},
		{kind: "clock jumps", hold: between(1000, 6000), do: func(x *chaos, v *server) func() {
			v.clock([]time.Duration{time.Hour, -time.Hour, 25 * time.Hour, -3 * time.Minute}[x.rng.IntN(4)])
			return func() { v.clock(0) }
		}},
		{kind: "clock strobes", hold: between(0, 1), do: func(x *chaos, v *server) func() {
			for i := range 60 {
				v.clock(time.Duration(i%3-1) * time.Second)
				time.Sleep(50 * time.Millisecond)
			}
			return func() { v.clock(0) }
		}},
		// A node does not start with a certificate that nobody would accept, and says so; who supervises it starts it again.
		{kind: "certificate expires", hold: between(1000, 3000), dies: true, do: func(x *chaos, v *server) func() {
			x.certificate(v, "-ttl", "1s")
			v.kill() // or its connections would outlive the certificate
			time.Sleep(1200 * time.Millisecond)
			v.start()
			return func() { x.certificate(v) }
		}},
		{kind: "certificates rotate", hold: between(10_000, 11_000), all: true, do: func(x *chaos, _ *server) func() {
			for _, s := range x.nodes {
				x.certificate(s)
			}
			return nil
		}},
	}
}

// certificate gives a node another certificate, which it reads within ten seconds.
func (x *chaos) certificate(v *server, more ...string) {
	x.t.Helper()
	args := append([]string{"tls", "cert", "-dir", x.path("tls"), "-name", v.name, "-force"}, more...)
	if r := x.cli(nil, args...); r.code != 0 {
		x.t.Fatalf("rollcall %v: exit code %d\n%s%s", args, r.code, r.out, r.errOut)
	}
}

// pick is a value between two limits.
func pick(rng *rand.Rand, r [2]time.Duration) time.Duration {
	return r[0] + time.Duration(rng.Int64N(int64(r[1]-r[0])))
}
