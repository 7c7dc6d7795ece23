package content

import (
	"errors"
	"io/fs"
	"os"
	"syscall"

	"rollcall/node/fault"
)

// openCommand opens a file under the plugin directory with no link on the way, and checks that it is one that only its
// owner, root or we can have written.
func (s *Store) openCommand(command string) (*os.File, error) {
	if err := ValidCommand(command); err != nil {
		return nil, err
	}
	const op = "open plugin file"
	if s.cfg.PluginDir == "" {
		return nil, fault.New(fault.NotFound, op, command, "no plugin directory is configured")
	}
	f, err := openBeneath(s.cfg.PluginDir, command)
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ENOTDIR):
		return nil, fault.New(fault.NotFound, op, command, "there is no such file in the plugin directory %s", s.cfg.PluginDir)
	case errors.Is(err, syscall.ELOOP), errors.Is(err, syscall.EXDEV):
		return nil, fault.New(fault.Invalid, op, command,
			"it is, or goes through, a symbolic link; put the file itself into the plugin directory")
	case errors.Is(err, fs.ErrPermission):
		return nil, fault.New(fault.Invalid, op, command, "this process (uid %d) may not read it; give it mode 0755", os.Geteuid())
	case errors.Is(err, syscall.ENXIO):
		return nil, fault.New(fault.Invalid, op, command, "it is not a regular file")
	case err != nil:
		return nil, fault.As(fault.Internal, err, op, command)
	}
	if err := s.checkFile(f, command); err != nil {
		_ = f.Close()
		return nil, err
	}
	return f, nil
}

func (s *Store) checkFile(f *os.File, command string) error {
	bad := func(format string, args ...any) error {
		return fault.New(fault.Invalid, "check plugin file", command, format, args...)
	}
	info, err := f.Stat()
	if err != nil {
		return fault.As(fault.Internal, err, "check plugin file", command)
	}
	mode := info.Mode()
	switch {
	case !mode.IsRegular():
		return bad("it is not a regular file (%s)", mode.Type())
	case mode&(fs.ModeSetuid|fs.ModeSetgid) != 0:
		return bad("it is set-uid or set-gid; plugins run as the server or as the uid configured for them")
	case mode.Perm()&0o002 != 0:
		return bad("everybody may write to it (mode %s); give it mode 0755", mode.Perm())
	case info.Size() > s.cfg.MaxSize:
		return fault.New(fault.TooLarge, "check plugin file", command, "it has %d bytes, the limit is %d", info.Size(), s.cfg.MaxSize)
	}
	dir, err := os.Lstat(s.cfg.PluginDir)
	if err != nil {
		return fault.As(fault.Internal, err, "check plugin directory", s.cfg.PluginDir)
	}
	owner, ok := ownerOf(info)
	dirOwner, _ := ownerOf(dir)
	if ok && owner != 0 && int(owner) != os.Geteuid() && owner != dirOwner {
		return bad("it belongs to uid %d, neither to root, nor to this process, nor to the owner of the plugin directory", owner)
	}
	return nil
}

func ownerOf(info fs.FileInfo) (uint32, bool) {
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return 0, false
	}
	return st.Uid, true
}
