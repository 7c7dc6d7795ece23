package proc

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

func prepareThread() {
	// Inherited by what this thread starts: no set-uid program gives a plugin more rights than it has.
	_ = unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
}

func setAttributes(cmd *exec.Cmd) {
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Setsid = true
	cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
}

// Harden takes core dumps from a process that was just started: they would hold secrets.
func Harden(pid int) {
	_ = unix.Prlimit(pid, unix.RLIMIT_CORE, &unix.Rlimit{}, nil)
}

// Subreaper makes orphans of our processes our children, so that they can be found. It stays so for the life of the
// program.
func Subreaper() error {
	return unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
}

// waitEnded returns when the process is a zombie: its pid is still taken. It answers false where it cannot tell.
func waitEnded(pid int) bool {
	for {
		err := unix.Waitid(unix.P_PID, pid, nil, unix.WEXITED|unix.WNOWAIT, nil)
		if !errors.Is(err, unix.EINTR) {
			return err == nil
		}
	}
}

// KillGroup kills the process group that pid leads.
func KillGroup(pid int) { _ = unix.Kill(-pid, unix.SIGKILL) }

// TermGroup asks the process group that pid leads to end.
func TermGroup(pid int) { _ = unix.Kill(-pid, unix.SIGTERM) }

// RSS returns the resident memory of a process in bytes, 0 when it cannot be told.
func RSS(pid int) uint64 {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", pid))
	if err != nil {
		return 0
	}
	fields := strings.Fields(string(raw))
	if len(fields) < 2 {
		return 0
	}
	pages, err := strconv.ParseUint(fields[1], 10, 64)
	if err != nil {
		return 0
	}
	return pages * uint64(os.Getpagesize()) //nolint:gosec // a page size is positive
}

// StartTime identifies a pid's process: ticks since boot, 0 when there is no such process.
func StartTime(pid int) uint64 {
	_, start, _ := stat(pid)
	return start
}

// stat returns the session, the start time and the state of a process.
func stat(pid int) (session int, start uint64, state byte) {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, 0, 0
	}
	// The name may hold anything; the fields after its last ")" are plain.
	i := bytes.LastIndexByte(raw, ')')
	if i < 0 {
		return 0, 0, 0
	}
	f := strings.Fields(string(raw[i+1:]))
	if len(f) < 20 {
		return 0, 0, 0
	}
	session, _ = strconv.Atoi(f[3])
	start, _ = strconv.ParseUint(f[19], 10, 64)
	return session, start, f[0][0]
}

// ownChildren lists our direct children.
func ownChildren() []int {
	files, _ := filepath.Glob("/proc/self/task/*/children")
	var pids []int
	for _, f := range files {
		raw, err := os.ReadFile(f)
		if err != nil {
			continue
		}
		for s := range strings.FieldsSeq(string(raw)) {
			if pid, err := strconv.Atoi(s); err == nil {
				pids = append(pids, pid)
			}
		}
	}
	return pids
}

// Reap collects orphans that have ended: children that nobody in this program started, which is told by a session
// that is not ours. A program that starts processes of its own in new sessions must start them through a Spawner.
func Reap() {
	children.Lock()
	defer children.Unlock()
	own, _, _ := stat(os.Getpid())
	for _, pid := range ownChildren() {
		if children.pids[pid] {
			continue
		}
		if session, _, state := stat(pid); state == 'Z' && session != own {
			_, _ = unix.Wait4(pid, nil, unix.WNOHANG, nil)
		}
	}
}

// KillMarked kills processes that were left by one that has ended, whatever session they are in: those that became
// our children and have the variable in their environment. It returns how many it killed, when there are no more or
// after limit.
func KillMarked(variable string, limit time.Duration) int {
	killed := map[int]bool{}
	mark := []byte(variable)
	for end := time.Now().Add(limit); ; time.Sleep(2 * time.Millisecond) {
		left := 0
		children.Lock()
		for _, pid := range ownChildren() {
			switch {
			case children.pids[pid]:
			case killed[pid]:
				if got, err := unix.Wait4(pid, nil, unix.WNOHANG, nil); got == 0 && err == nil {
					left++
				}
			case hasVariable(pid, mark):
				_ = unix.Kill(pid, unix.SIGKILL)
				killed[pid] = true
				left++
			}
		}
		children.Unlock()
		if left == 0 || time.Now().After(end) {
			return len(killed)
		}
	}
}

func hasVariable(pid int, variable []byte) bool {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid))
	if err != nil {
		return false
	}
	for v := range bytes.SplitSeq(raw, []byte{0}) {
		if bytes.Equal(v, variable) {
			return true
		}
	}
	return false
}

// Sweep kills processes whose environment has a variable with the prefix and whose rest orphaned says is ownerless.
// It is how a host that was killed gets rid of what its plugins left behind when it starts again.
func Sweep(prefix string, orphaned func(rest string) bool) int {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return 0
	}
	// The pids of another namespace (a container seen from outside) say nothing about who is alive there.
	ours, err := os.Readlink("/proc/self/ns/pid")
	if err != nil {
		return 0
	}
	n := 0
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		if ns, err := os.Readlink("/proc/" + e.Name() + "/ns/pid"); err != nil || ns != ours {
			continue
		}
		if v := variableWith(pid, prefix); v == "" || !orphaned(strings.TrimPrefix(v, prefix)) {
			continue
		}
		// The handle is taken first and the look repeated, so that a pid that was given to somebody else is not hit.
		fd, err := unix.PidfdOpen(pid, 0)
		if err != nil {
			continue
		}
		if v := variableWith(pid, prefix); v != "" && orphaned(strings.TrimPrefix(v, prefix)) {
			if unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0) == nil {
				n++
			}
		}
		_ = unix.Close(fd)
	}
	return n
}

func variableWith(pid int, prefix string) string {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid))
	if err != nil {
		return ""
	}
	for v := range bytes.SplitSeq(raw, []byte{0}) {
		if bytes.HasPrefix(v, []byte(prefix)) {
			return string(v)
		}
	}
	return ""
}

// NoExec reports whether the file system of path forbids execution.
func NoExec(path string) bool {
	var st unix.Statfs_t
	return unix.Statfs(path, &st) == nil && st.Flags&unix.ST_NOEXEC != 0
}

// onMainThread reports whether the calling goroutine, which is locked to its thread, runs on the process's first one.
func onMainThread() bool { return unix.Gettid() == unix.Getpid() }
