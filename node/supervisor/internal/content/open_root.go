package content

import (
	"io/fs"
	"os"
	"strings"
	"syscall"
)

// openRoot is openBeneath where the kernel cannot do it alone: os.Root refuses to leave dir, and links inside are
// looked for one by one. Somebody who may write to dir can still race it; the hash decides what runs in any case.
func openRoot(dir, name string) (*os.File, error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	defer root.Close() //nolint:errcheck // opened for reading
	parts := strings.Split(name, "/")
	for i := range parts {
		info, err := root.Lstat(strings.Join(parts[:i+1], "/"))
		if err != nil {
			return nil, err
		}
		if info.Mode()&fs.ModeSymlink != 0 {
			return nil, syscall.ELOOP
		}
	}
	return root.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK, 0)
}
