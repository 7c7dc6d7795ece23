// Package exact builds test binaries in which a bubble of virtual time repeats to the last step. The order in which
// goroutines run, select chooses, maps are walked and timers fire together is the Go runtime's to decide, by chance and
// by the clock. `go build -overlay` compiles changed copies of a few of its files instead, in which a seed decides. See
// "Exactness" in node/nodetest/DESIGN.md.
//
// The copies are made from the sources of the Go that runs: each change replaces a text that must be there exactly once,
// and Build says which one is not, on a Go that it does not know.
package exact

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"rollcall/node/nodetest/overlay"
)

// Variable is what the environment of a process holds that is to be exact: a seed.
const Variable = "ROLLCALL_EXACT"

// TraceVariable names a file that takes the steps of a process, to find out where two part: 512 MiB of zeros, into which
// each step goes as two words. See DESIGN.md.
const TraceVariable = "ROLLCALL_EXACT_TRACE"

// Env is the environment in which a binary of Build repeats itself. Nothing else should be in it.
//
// One processor, so that the order of goroutines is a queue's. No collection, which would move what is in the queue and
// free memory: ten virtual minutes of five nodes take 1.2 GB. The limit is there for long runs and for the machine's
// sake; past it the world stands still while it is collected, and what follows may be another run. No samples of what is
// allocated: taking one needs room on the stack, and when it is taken is drawn.
func Env(seed uint64) []string {
	return []string{
		fmt.Sprintf("%s=%d", Variable, seed), "GOMAXPROCS=1", "GOGC=off", "GOMEMLIMIT=3GiB",
		"GODEBUG=" + strings.TrimPrefix(os.Getenv("GODEBUG")+",gcstoptheworld=2,asyncpreemptoff=1,memprofilerate=0", ","),
		TraceVariable + "=" + os.Getenv(TraceVariable),
	}
}

// On says whether this process was started to be exact.
func On() bool { return os.Getenv(Variable) != "" }

// Known begins the versions of Go whose runtime the changes were written for.
const Known = "go1.26"

// ErrUnknown says that the sources of this Go are not those that the changes were written for.
var ErrUnknown = errors.New("exactness is not known for this version of Go")

//go:embed runtime.go.txt
var added string

// change is one replacement in a file below GOROOT/src.
type change struct{ file, from, to string }

var changes = []change{
	// What is drawn at the start, heap addresses and the keys of hashes, is the same for every process.
	{"runtime/rand.go", "\tglobalRand.state.Init(*seed)\n", "\texactStart(seed)\n\tglobalRand.state.Init(*seed)\n"},
	// The environment is known from here on.
	{"runtime/proc.go", "\tgoenvs()\n\tsecure()\n", "\tgoenvs()\n\texactInit()\n\tsecure()\n"},
	// Maps, math/rand/v2 and maphash in the bubble draw from the seed's stream.
	{"runtime/rand.go", "\tmp := getg().m\n\tc := &mp.chacha8\n", "\tif exactly() {\n\t\treturn exactNext(getg().goid, sys.GetCallerPC())\n\t}\n\tmp := getg().m\n\tc := &mp.chacha8\n"},
	{"runtime/rand.go", "\t\"internal/runtime/math\"\n", "\t\"internal/runtime/math\"\n\t\"internal/runtime/sys\"\n"},
	// So do select, and timers that fire at the same time.
	{"runtime/select.go", "j := cheaprandn(uint32(norder + 1))", "j := exactRandn(uint32(norder + 1))"},
	{"runtime/time.go", "t.rand = cheaprand()", "t.rand = exactRand()"},
	// No thread watches from outside: it would stop a goroutine after 10 ms, and take the processor from a system call.
	{"runtime/proc.go", "\tif haveSysmon {\n\t\tsystemstack(", "\tif haveSysmon && !exact.on {\n\t\tsystemstack("},
	// Nor does main hold on to its thread while packages are initialized: how many threads there are would be a matter of luck.
	{"runtime/proc.go", "\tlockOSThread()\n\n\tif mp != &m0 {\n", "\tif !exact.on {\n\t\tlockOSThread()\n\t}\n\n\tif mp != &m0 {\n"},
	{"runtime/proc.go", "\tneedUnlock = false\n\tunlockOSThread()\n", "\tneedUnlock = false\n\tif !exact.on {\n\t\tunlockOSThread()\n\t}\n"},
	// The queue of the processor is the bubble's, and has room for all.
	{"runtime/proc.go", "\tif !haveSysmon && next {\n", "\tif exactPut(pp, gp, &next) {\n\t\treturn\n\t}\n\tif !haveSysmon && next {\n"},
	{"runtime/runtime2.go", "runq     [256]guintptr", "runq     [8192]guintptr"},
	{"runtime/proc.go", "func runqgrab(pp *p, batch *[256]guintptr,", "func runqgrab(pp *p, batch *[8192]guintptr,"},
	// The trace, where one is asked for.
	{"runtime/proc.go", "\t// Assign gp.m before entering _Grunning so running Gs have an M.\n", "\texactRuns(gp)\n"},
	// What the bubble allocates lies where it lay the last time.
	{"runtime/synctest.go", "\tbubble := &synctestBubble{\n\t\tid: ", "\texactSettle()\n\tbubble := &synctestBubble{\n\t\tid: "},
	// A type assertion builds a cache one time in a thousand; here never: it would take a place in the heap by chance.
	{"runtime/iface.go", "if cheaprand()&1023 != 0 {\n\t\t// Only bother updating the cache ~1 in 1000 times.\n\t\treturn tab", "if exact.on || cheaprand()&1023 != 0 {\n\t\treturn tab"},
	{"runtime/iface.go", "if cheaprand()&1023 != 0 {\n\t\t// Only bother updating the cache ~1 in 1000 times.\n\t\t// This", "if exact.on || cheaprand()&1023 != 0 {\n\t\t// This"},
	// Who yields stays in it.
	{
		"runtime/proc.go", "\t\trunqput(pp, gp, true)\n\t} else {\n\t\tlock(&sched.lock)\n\t\tglobrunqput(gp)\n",
		"\t\trunqput(pp, gp, true)\n\t} else if exact.on && gp.bubble != nil {\n\t\trunqput(pp, gp, false)\n\t} else {\n\t\tlock(&sched.lock)\n\t\tglobrunqput(gp)\n",
	},
	// A mutex that was waited for during a millisecond of the wall goes over to handing itself on; here it never does.
	{
		"internal/sync/mutex.go", "starving = starving || runtime_nanotime()-waitStartTime > starvationThresholdNs",
		"starving = false",
	},
}

// Overlay is what the changes make of the standard library in std.
func Overlay(std string) (overlay.Files, error) {
	files := overlay.Files{filepath.Join(std, "runtime", "rollcall_exact.go"): added}
	for _, c := range changes {
		if err := files.Replace(filepath.Join(std, filepath.FromSlash(c.file)), c.from, c.to); err != nil {
			return nil, fmt.Errorf("%w: %w", ErrUnknown, err)
		}
	}
	return files, nil
}

// Build makes the test binary of a package as dir/exact.test, with the changed runtime. The go command keeps what it
// compiled: the first build takes as long as one of the standard library, later ones are a link.
func Build(ctx context.Context, pkg, dir string) (binary string, err error) {
	std, err := overlay.Std(ctx)
	if err != nil {
		return "", err
	}
	files, err := Overlay(std)
	if err != nil {
		return "", err
	}
	flag, err := files.Flag(dir)
	if err != nil {
		return "", err
	}
	binary = filepath.Join(dir, "exact.test")
	cmd := exec.CommandContext(ctx, "go", "test", "-c", flag, "-o", binary, pkg)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build %s with the changed runtime: %w\n%s", pkg, err, out)
	}
	return binary, nil
}
