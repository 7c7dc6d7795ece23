package transport

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/nettest"
)

func TestMemNetworkConnectionsBehaveLikeNetConn(t *testing.T) {
	nettest.TestConn(t, func() (c1, c2 net.Conn, stop func(), err error) {
		a, b, err := pairOf(NewMemNetwork())
		if err != nil {
			return nil, nil, nil, err
		}
		return a, b, func() { a.Close(); b.Close() }, nil
	})
}

// pairOf connects host a to host b.
func pairOf(n *MemNetwork) (a, b net.Conn, err error) {
	ln, err := n.Host("b").Listen(":0")
	if err != nil {
		return nil, nil, err
	}
	defer ln.Close()
	if a, err = n.Host("a").Dial(context.Background(), ln.Addr().String()); err != nil {
		return nil, nil, err
	}
	b, err = ln.Accept()
	return a, b, err
}

func mustPair(t *testing.T, n *MemNetwork) (a, b net.Conn) {
	t.Helper()
	a, b, err := pairOf(n)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close(); b.Close() })
	return a, b
}

// arrives reads want from c and returns how long that took.
func arrives(t *testing.T, c net.Conn, want string) time.Duration {
	t.Helper()
	start := time.Now()
	b := make([]byte, len(want))
	if _, err := io.ReadFull(c, b); err != nil || string(b) != want {
		t.Fatalf("read %q, %v; want %q", b, err, want)
	}
	return time.Since(start)
}

func silent(t *testing.T, c net.Conn, d time.Duration) {
	t.Helper()
	_ = c.SetReadDeadline(time.Now().Add(d))
	if n, err := c.Read(make([]byte, 1)); n > 0 || !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("read %d bytes, %v; nothing should arrive", n, err)
	}
	_ = c.SetReadDeadline(time.Time{})
}

func write(t *testing.T, c net.Conn, text string) {
	t.Helper()
	if _, err := io.WriteString(c, text); err != nil {
		t.Fatal(err)
	}
}

func TestACutStallsAndAHealDelivers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := NewMemNetwork()
		a, b := mustPair(t, n)
		write(t, a, "before")
		n.Cut("a", "b")
		arrives(t, b, "before") // it had arrived
		write(t, a, "during")
		silent(t, b, time.Hour)
		n.Heal("b", "a")
		if d := arrives(t, b, "during"); d != 0 {
			t.Errorf("took %s after the heal", d)
		}
		write(t, b, "back")
		arrives(t, a, "back")
	})
}

func TestAOneWayCutLetsTheOtherWayThrough(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := NewMemNetwork()
		a, b := mustPair(t, n)
		n.CutOneWay("a", "b")
		write(t, a, "lost for now")
		write(t, b, "heard")
		arrives(t, a, "heard")
		silent(t, b, time.Minute)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := n.Host("b").Dial(ctx, "a:1"); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("a dial needs both ways: %v", err)
		}
		n.HealAll()
		arrives(t, b, "lost for now")
	})
}

func TestIsolationHoldsForHostsThatComeLaterAndEndsWithRejoin(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := NewMemNetwork()
		a, b := mustPair(t, n)
		n.Isolate("b")
		n.Heal("a", "b") // ends cuts of pairs only
		write(t, a, "x")
		silent(t, b, time.Minute)
		ln, err := n.Host("b").Listen("b:7")
		if err != nil {
			t.Fatal(err)
		}
		defer ln.Close()
		self, err := n.Host("b").Dial(t.Context(), "b:7")
		if err != nil {
			t.Fatalf("an isolated host reaches itself: %v", err)
		}
		defer self.Close()
		var wg sync.WaitGroup
		wg.Go(func() { // a dial that waits through the isolation succeeds after it
			c, err := n.Host("c").Dial(context.Background(), "b:7")
			if err != nil {
				t.Error(err)
				return
			}
			c.Close()
		})
		time.Sleep(time.Minute)
		n.Rejoin("b")
		wg.Wait()
		arrives(t, b, "x")
	})
}

func TestDelayIsExactAndKeepsOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := NewMemNetwork()
		a, b := mustPair(t, n)
		n.Delay("a", "b", 30*time.Millisecond)
		write(t, a, "one")
		n.Delay("a", "b", 10*time.Millisecond)
		write(t, a, "two") // faster, but behind the first
		if d := arrives(t, b, "onetwo"); d != 30*time.Millisecond {
			t.Errorf("took %s, want 30ms", d)
		}
		write(t, b, "x")
		if d := arrives(t, a, "x"); d != 10*time.Millisecond {
			t.Errorf("took %s, want 10ms", d)
		}
		// What is under way when the link is cut has not arrived.
		write(t, a, "y")
		n.Cut("a", "b")
		silent(t, b, time.Second)
		n.Heal("a", "b")
		if d := arrives(t, b, "y"); d != 10*time.Millisecond {
			t.Errorf("took %s after the heal, want 10ms", d)
		}
		start := time.Now()
		ln, err := n.Host("b").Listen("b:9")
		if err != nil {
			t.Fatal(err)
		}
		defer ln.Close()
		c, err := n.Host("a").Dial(t.Context(), "b:9")
		if err != nil {
			t.Fatal(err)
		}
		c.Close()
		if d := time.Since(start); d != 20*time.Millisecond {
			t.Errorf("a dial took %s, want one round trip of 20ms", d)
		}
	})
}

func TestACloseIsHeardAfterWhatWasSent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := NewMemNetwork()
		a, b := mustPair(t, n)
		write(t, a, "last words")
		n.Cut("a", "b")
		a.Close()
		arrives(t, b, "last words")
		silent(t, b, time.Minute) // a partition hides the close
		write(t, b, "into the void")
		n.HealAll()
		if _, err := b.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
			t.Errorf("read: %v, want EOF", err)
		}
		if _, err := b.Write([]byte("x")); !errors.Is(err, syscall.EPIPE) {
			t.Errorf("write: %v, want EPIPE", err)
		}
		if _, err := a.Write([]byte("x")); !errors.Is(err, net.ErrClosed) {
			t.Errorf("write after close: %v", err)
		}
		if _, err := a.Read(make([]byte, 1)); !errors.Is(err, net.ErrClosed) {
			t.Errorf("read after close: %v", err)
		}
	})
}

func TestDialsFailAsTheyWouldOnTCP(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := NewMemNetwork()
		a := n.Host("a")
		if _, err := a.Dial(t.Context(), "nobody:1"); !isNotFound(err) {
			t.Errorf("unknown host: %v", err)
		}
		n.Host("b")
		if _, err := a.Dial(t.Context(), "b:1"); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("nobody listens: %v", err)
		}
		n.Cut("a", "b")
		start := time.Now()
		if _, err := a.Dial(context.Background(), "b:1"); !isTimeout(err) {
			t.Errorf("cut: %v", err)
		}
		if d := time.Since(start); d != synTimeout {
			t.Errorf("gave up after %s", d)
		}
		for _, addr := range []string{"b:1", "a:99999", "a", "a:x"} {
			if ln, err := a.Listen(addr); err == nil {
				ln.Close()
				t.Errorf("listen on %s succeeded", addr)
			}
		}
		ln, err := a.Listen("a:5")
		if err != nil {
			t.Fatal(err)
		}
		if _, err := a.Listen(":5"); !errors.Is(err, syscall.EADDRINUSE) {
			t.Errorf("port in use: %v", err)
		}
		c, err := a.Dial(t.Context(), "a:5")
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		ln.Close()
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, net.ErrClosed) {
			t.Errorf("a connection nobody accepted: %v", err)
		}
		if ln, err = a.Listen("a:5"); err != nil {
			t.Fatalf("the port is free again: %v", err)
		}
		ln.Close()
		if got := n.Conns("a"); got != 0 {
			t.Errorf("%d connections left", got)
		}
	})
}

func isNotFound(err error) bool {
	e, ok := errors.AsType[*net.DNSError](err)
	return ok && e.IsNotFound
}

func TestAFullWindowHoldsTheWriterUntilItsDeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := NewMemNetwork()
		a, b := mustPair(t, n)
		_ = a.SetWriteDeadline(time.Now().Add(time.Second))
		sent, err := a.Write(make([]byte, memWindow+10))
		if sent != memWindow || !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatalf("sent %d, %v", sent, err)
		}
		_ = a.SetWriteDeadline(time.Time{})
		var wg sync.WaitGroup
		wg.Go(func() {
			if _, err := a.Write([]byte("more")); err != nil {
				t.Error(err)
			}
			a.Close()
		})
		got, err := io.Copy(io.Discard, b)
		if got != memWindow+4 || err != nil {
			t.Errorf("got %d, %v", got, err)
		}
		wg.Wait()
	})
}

func TestALargeTransferSurvivesFlapping(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := NewMemNetwork()
		a, b := mustPair(t, n)
		n.Delay("a", "b", time.Millisecond)
		data := make([]byte, 16<<20)
		for i := range data {
			data[i] = byte(i * i >> 7)
		}
		want := sha256.Sum256(data)
		var wg sync.WaitGroup
		wg.Go(func() {
			if _, err := io.Copy(a, bytes.NewReader(data)); err != nil {
				t.Error(err)
			}
			a.Close()
		})
		stop := make(chan struct{})
		wg.Go(func() {
			for i := range 50 {
				if i%2 == 0 {
					n.Cut("a", "b")
				} else {
					n.CutOneWay("a", "b")
				}
				time.Sleep(500 * time.Microsecond)
				n.HealAll()
				time.Sleep(700 * time.Microsecond)
			}
			<-stop
		})
		h := sha256.New()
		if _, err := io.Copy(h, b); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(h.Sum(nil), want[:]) {
			t.Error("the bytes have changed on the way")
		}
		close(stop)
		wg.Wait()
	})
}
