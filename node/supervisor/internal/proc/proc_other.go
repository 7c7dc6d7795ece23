//go:build !linux

package proc

import (
	"errors"
	"os/exec"
	"syscall"
	"time"
)

// Elsewhere than on Linux a plugin is in a session of its own, but outlives a host that is killed.

func prepareThread() {}

func setAttributes(cmd *exec.Cmd) {
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Setsid = true
}

// Harden does nothing here.
func Harden(int) {}

// Subreaper does nothing here.
func Subreaper() error { return nil }

func waitEnded(int) bool { return false }

// KillGroup kills the process group that pid leads.
func KillGroup(pid int) { _ = syscall.Kill(-pid, syscall.SIGKILL) }

// TermGroup asks the process group that pid leads to end.
func TermGroup(pid int) { _ = syscall.Kill(-pid, syscall.SIGTERM) }

// RSS is not known here.
func RSS(int) uint64 { return 0 }

// StartTime is not known here.
func StartTime(int) uint64 { return 0 }

// Reap does nothing here.
func Reap() {}

// KillMarked does nothing here.
func KillMarked(string, time.Duration) int { return 0 }

// Sweep does nothing here.
func Sweep(string, func(string) bool) int { return 0 }

// NoExec is not known here.
func NoExec(string) bool { return false }

// Cgroup is not to be had here.
type Cgroup struct{}

// CheckCgroup always fails here.
func CheckCgroup(string) error { return errors.ErrUnsupported }

// NewCgroup always fails here.
func NewCgroup(string, string, int64, int) (*Cgroup, error) { return nil, errors.ErrUnsupported }

// Attach does nothing here.
func (*Cgroup) Attach(*exec.Cmd) {}

// End does nothing here.
func (*Cgroup) End() {}

// SweepCgroups does nothing here.
func SweepCgroups(string, string, func(string) bool) {}

// onMainThread matters only where the death of a thread is told to children.
func onMainThread() bool { return false }
