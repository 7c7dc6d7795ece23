package content

import (
	"errors"
	"os"

	"golang.org/x/sys/unix"
)

// openBeneath opens dir/name for reading. The kernel refuses links, magic links and any way out of dir. O_NONBLOCK
// keeps a FIFO from blocking us.
func openBeneath(dir, name string) (*os.File, error) {
	d, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(d) //nolint:errcheck // opened for reading
	for {
		fd, err := unix.Openat2(d, name, &unix.OpenHow{
			Flags:   unix.O_RDONLY | unix.O_NOFOLLOW | unix.O_CLOEXEC | unix.O_NONBLOCK,
			Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS,
		})
		switch {
		case err == nil:
			return os.NewFile(uintptr(fd), name), nil
		case errors.Is(err, unix.EINTR), errors.Is(err, unix.EAGAIN):
			continue
		case errors.Is(err, unix.ENOSYS), errors.Is(err, unix.EPERM):
			// Kernels before 5.6, and seccomp profiles that do not know the call.
			return openRoot(dir, name)
		default:
			return nil, err
		}
	}
}
