package audit

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"rollcall/node/fault"
)

// openFile opens an audit file to append to, and makes it where there is none. It refuses whatever could turn an audit file
// into a way to write elsewhere: a link, a second name, somebody else's file, a file that holds something else, and every
// place below a forbidden directory, by whatever name. torn says that the file ends in the middle of a line.
func openFile(path string, forbidden []string) (f *os.File, torn bool, err error) {
	refuse := func(format string, args ...any) error {
		return fault.New(fault.Invalid, "open audit file", path, format, args...)
	}
	if !filepath.IsAbs(path) {
		return nil, false, refuse("it must be an absolute path")
	}
	root, err := openDir(filepath.Dir(path), forbidden)
	if err != nil {
		return nil, false, refuse("%v", err)
	}
	defer root.Close()
	base := filepath.Base(path)
	if info, lerr := root.Lstat(base); lerr == nil && !info.Mode().IsRegular() {
		return nil, false, refuse("it is a %s, and not a file: nothing but a file of its own is written to", kindOf(info.Mode()))
	}
	f, err = root.OpenFile(base, os.O_RDWR|os.O_APPEND|os.O_CREATE|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0o600)
	if err != nil {
		return nil, false, refuse("%v", err)
	}
	if torn, err = inspect(f); err != nil {
		_ = f.Close()
		return nil, false, refuse("%v", err)
	}
	return f, torn, nil
}

// inspect judges a file that is open, so that nobody can put another in its place in between.
func inspect(f *os.File) (torn bool, err error) {
	info, err := f.Stat()
	if err != nil {
		return false, err
	}
	stat, ok := info.Sys().(*syscall.Stat_t)
	switch {
	case !info.Mode().IsRegular():
		return false, errors.New("it is not a file")
	case ok && stat.Nlink != 1:
		return false, errors.New("it has another name (a hard link): what is written here would stand there, too")
	case ok && int(stat.Uid) != os.Geteuid():
		return false, errors.New("it belongs to another user")
	}
	if info.Mode().Perm() != 0o600 {
		if err := f.Chmod(0o600); err != nil {
			return false, err
		}
	}
	if info.Size() == 0 {
		return false, nil
	}
	var first, last [1]byte
	if _, err := f.ReadAt(first[:], 0); err != nil {
		return false, err
	}
	if _, err := f.ReadAt(last[:], info.Size()-1); err != nil {
		return false, err
	}
	if first[0] != '{' && first[0] != '\n' {
		return false, errors.New("it holds something else than audit records")
	}
	return last[0] != '\n', nil
}

// openDir opens the directory of an audit file, unless it is a forbidden one or lies below one. Directories are compared by
// what they are, so neither a link nor a mount nor another spelling leads around it.
func openDir(dir string, forbidden []string) (*os.Root, error) {
	resolved, err := filepath.EvalSymlinks(dir)
	if err != nil {
		return nil, err
	}
	root, err := os.OpenRoot(resolved)
	if err != nil {
		return nil, err
	}
	if err := judgeDir(root, resolved, forbidden); err != nil {
		_ = root.Close()
		return nil, err
	}
	return root, nil
}

func judgeDir(root *os.Root, resolved string, forbidden []string) error {
	own, err := root.Stat(".")
	if err != nil {
		return err
	}
	if own.Mode().Perm()&0o002 != 0 && own.Mode()&fs.ModeSticky == 0 {
		return errors.New("everyone may write its directory, and so put another file in its place")
	}
	now, err := os.Stat(resolved)
	if err != nil || !os.SameFile(own, now) {
		return errors.New("its directory was replaced while it was opened")
	}
	var bad []fs.FileInfo
	for _, f := range forbidden {
		if info, err := os.Stat(f); err == nil {
			bad = append(bad, info)
		}
	}
	for at := resolved; ; at = filepath.Dir(at) {
		info, err := os.Stat(at)
		if err != nil {
			return err
		}
		for _, b := range bad {
			if os.SameFile(info, b) {
				return errors.New("it would lie in a directory that programs are started from or that the node keeps its state in")
			}
		}
		if at == filepath.Dir(at) {
			return nil
		}
	}
}

func kindOf(m fs.FileMode) string {
	switch {
	case m&fs.ModeSymlink != 0:
		return "symbolic link"
	case m.IsDir():
		return "directory"
	case m&fs.ModeNamedPipe != 0:
		return "pipe"
	case m&fs.ModeSocket != 0:
		return "socket"
	default:
		return "device"
	}
}
