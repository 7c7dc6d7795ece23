//go:build !linux

package transport

import "syscall"

// setUserTimeout does nothing where the kernel has no such option; keepalive alone finds dead peers there.
func setUserTimeout(_, _ string, _ syscall.RawConn) error { return nil }
