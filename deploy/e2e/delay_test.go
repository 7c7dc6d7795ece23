//go:build e2e

package e2e

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// The kernel here has no netem. delay holds packets back by NFQUEUE instead: the kernel asks this process about every
// packet, and is told "accept" when the packet's time has come. Packets whose times differ overtake each other. The few
// netlink messages that this takes are written here; linux/netfilter/nfnetlink_queue.h says what they hold.
type delay struct {
	fd   int
	stop sync.WaitGroup

	mu     sync.Mutex
	timers map[uint32]*time.Timer
	closed bool
	seen   int
}

const (
	nfqPacket, nfqVerdict, nfqConfig = 3 << 8, 3<<8 | 1, 3<<8 | 2 // NFNL_SUBSYS_QUEUE and the message
	nfqCfgCmd, nfqCfgParams          = 1, 2                       // attributes of nfqConfig
	nfqHeader, nfqVerdictHeader      = 1, 2                       // attributes of nfqPacket and nfqVerdict
	nfqBind, nfqCopyMeta, nfAccept   = 1, 1, 1
	queueNumber                      = 7
)

// newDelay holds packets that the rules of a node's namespace send to queueNumber for as long as wait says.
func newDelay(n *network, node int, wait func() time.Duration) (*delay, error) {
	fd, err := socketIn(n.namespace(node), func() (int, error) {
		return unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_NETFILTER)
	})
	if err != nil {
		return nil, fmt.Errorf("open a netfilter socket in %s: %w", n.namespace(node), err)
	}
	d := &delay{fd: fd, timers: map[uint32]*time.Timer{}}
	err = unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
	if err == nil {
		err = d.send(nfqConfig, nfqCfgCmd, []byte{nfqBind, 0, 0, unix.AF_INET})
	}
	if err == nil {
		err = d.send(nfqConfig, nfqCfgParams, []byte{0, 0, 0, 64, nfqCopyMeta})
	}
	if err == nil { // so that the reader sees the end
		err = unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 100_000})
	}
	if err != nil {
		_ = unix.Close(fd)
		return nil, fmt.Errorf("set up queue %d: %w", queueNumber, err)
	}
	d.stop.Go(func() { d.read(wait) })
	return d, nil
}

// socketIn opens a socket inside a namespace; where it was opened is where it stays.
func socketIn(namespace string, open func() (int, error)) (fd int, err error) {
	target, err := os.Open("/run/netns/" + namespace)
	if err != nil {
		return -1, err
	}
	defer func() { _ = target.Close() }()
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread()
		home, e := os.Open("/proc/thread-self/ns/net")
		if e != nil {
			err = e
			return // locked: the thread ends with the goroutine
		}
		defer func() { _ = home.Close() }()
		if err = unix.Setns(int(target.Fd()), unix.CLONE_NEWNET); err != nil {
			return
		}
		fd, err = open()
		if e := unix.Setns(int(home.Fd()), unix.CLONE_NEWNET); e == nil {
			runtime.UnlockOSThread()
		}
	}()
	<-done
	return fd, err
}

// send writes one message with one attribute.
func (d *delay) send(kind uint16, attribute uint16, value []byte) error {
	b := make([]byte, 0, 64)
	b = binary.NativeEndian.AppendUint32(b, 0) // its length, below
	b = binary.NativeEndian.AppendUint16(b, kind)
	b = binary.NativeEndian.AppendUint16(b, unix.NLM_F_REQUEST)
	b = append(b, 0, 0, 0, 0, 0, 0, 0, 0) // sequence number, port
	b = append(b, unix.AF_UNSPEC, unix.NFNETLINK_V0)
	b = binary.BigEndian.AppendUint16(b, queueNumber)
	b = binary.NativeEndian.AppendUint16(b, uint16(4+len(value))) //nolint:gosec // a few bytes
	b = binary.NativeEndian.AppendUint16(b, attribute)
	b = append(b, value...)
	for len(b)%4 != 0 {
		b = append(b, 0)
	}
	binary.NativeEndian.PutUint32(b, uint32(len(b))) //nolint:gosec // a few bytes
	return unix.Sendto(d.fd, b, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
}

func (d *delay) read(wait func() time.Duration) {
	buf := make([]byte, 1<<16)
	for {
		n, _, err := unix.Recvfrom(d.fd, buf, 0)
		d.mu.Lock()
		closed := d.closed
		d.mu.Unlock()
		if closed {
			return
		}
		if err != nil { // nothing came in time, or so much came that some of it was dropped: that is loss
			if !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.ENOBUFS) && !errors.Is(err, unix.EINTR) {
				return
			}
			continue
		}
		for _, id := range packets(buf[:n]) {
			d.hold(id, wait())
		}
	}
}

// packets are the ids of the packets that messages tell of.
func packets(b []byte) (ids []uint32) {
	for len(b) >= 20 {
		size := int(binary.NativeEndian.Uint32(b))
		if size < 20 || size > len(b) {
			return ids
		}
		if kind := binary.NativeEndian.Uint16(b[4:]); kind == nfqPacket {
			for a := b[20:size]; len(a) >= 8; {
				n := int(binary.NativeEndian.Uint16(a))
				if binary.NativeEndian.Uint16(a[2:])&0x3fff == nfqHeader {
					ids = append(ids, binary.BigEndian.Uint32(a[4:]))
				}
				if n = (n + 3) &^ 3; n < 4 || n > len(a) {
					break
				}
				a = a[n:]
			}
		}
		b = b[min(len(b), (size+3)&^3):]
	}
	return ids
}

func (d *delay) hold(id uint32, t time.Duration) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.seen++
	d.timers[id] = time.AfterFunc(t, func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		delete(d.timers, id)
		if !d.closed {
			verdict := binary.BigEndian.AppendUint32(nil, nfAccept)
			_ = d.send(nfqVerdict, nfqVerdictHeader, binary.BigEndian.AppendUint32(verdict, id)) // else it is lost, as packets are
		}
	})
}

// end lets go of the queue; what is held back is lost. It returns how many packets came by.
func (d *delay) end() int {
	d.mu.Lock()
	d.closed = true
	for _, t := range d.timers {
		t.Stop()
	}
	seen := d.seen
	d.mu.Unlock()
	d.stop.Wait()
	_ = unix.Close(d.fd)
	return seen
}
