package proc

import (
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

// Cgroup is a cgroup v2 of one process and everything that descends from it, whatever session that is in.
type Cgroup struct {
	path string
	dir  *os.File
}

// CheckCgroup tells whether cgroups can be made in parent.
func CheckCgroup(parent string) error {
	var st unix.Statfs_t
	if err := unix.Statfs(parent, &st); err != nil {
		return err
	}
	if st.Type != unix.CGROUP2_SUPER_MAGIC {
		return errors.New("it is not a directory of a cgroup v2 file system")
	}
	return unix.Access(parent, unix.W_OK)
}

// NewCgroup makes a cgroup with the limits that are positive and whose controllers parent has.
func NewCgroup(parent, name string, memory int64, pids int) (*Cgroup, error) {
	path := filepath.Join(parent, name)
	if err := os.Mkdir(path, 0o755); err != nil { //nolint:gosec // as every cgroup
		return nil, err
	}
	c := &Cgroup{path: path}
	for file, n := range map[string]int64{"memory.max": memory, "pids.max": int64(pids)} {
		if n <= 0 {
			continue
		}
		err := os.WriteFile(filepath.Join(path, file), []byte(strconv.FormatInt(n, 10)), 0)
		if err != nil && !errors.Is(err, os.ErrNotExist) && !errors.Is(err, os.ErrPermission) {
			c.End()
			return nil, fmt.Errorf("set %s: %w", file, err)
		}
	}
	dir, err := os.Open(path)
	if err != nil {
		c.End()
		return nil, err
	}
	c.dir = dir
	return c, nil
}

// Attach makes cmd begin in the cgroup.
func (c *Cgroup) Attach(cmd *exec.Cmd) {
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.UseCgroupFD, cmd.SysProcAttr.CgroupFD = true, int(c.dir.Fd())
}

// End kills what is left in the cgroup and removes it. It gives up after a second: then the next start sweeps.
func (c *Cgroup) End() {
	if c.dir != nil {
		_ = c.dir.Close()
	}
	endCgroup(c.path)
}

func endCgroup(path string) {
	for end := time.Now().Add(time.Second); time.Now().Before(end); time.Sleep(2 * time.Millisecond) {
		_ = os.WriteFile(filepath.Join(path, "cgroup.kill"), []byte("1"), 0)
		Reap()
		if err := unix.Rmdir(path); err == nil || errors.Is(err, unix.ENOENT) {
			return
		}
	}
}

// SweepCgroups ends the cgroups in parent whose names begin so and whose rest orphaned says is ownerless.
func SweepCgroups(parent, prefix string, orphaned func(rest string) bool) {
	entries, err := os.ReadDir(parent)
	if err != nil {
		return
	}
	for _, e := range entries {
		if rest, ok := strings.CutPrefix(e.Name(), prefix); ok && orphaned(rest) {
			endCgroup(filepath.Join(parent, e.Name()))
		}
	}
}
