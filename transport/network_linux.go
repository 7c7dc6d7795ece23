package transport

import (
	"syscall"

	"golang.org/x/sys/unix"
)

// setUserTimeout makes a connection whose data is not acknowledged end after userTimeout (RFC 5482) instead of the
// quarter of an hour that Linux retransmits by default.
func setUserTimeout(_, _ string, c syscall.RawConn) error {
	var serr error
	err := c.Control(func(fd uintptr) {
		serr = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(userTimeout.Milliseconds()))
	})
	if err != nil {
		return err
	}
	return serr
}
