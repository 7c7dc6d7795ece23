package supervisor

import (
	"bytes"
	"io"
	"log/slog"
	"sync"
	"testing"
)

// FuzzFirstLine: whatever a process writes, in whatever pieces, at most one line of at most maxFirstLine bytes reaches the
// library that reads the handshake, it is the first one, and all that follows goes to the log.
func FuzzFirstLine(f *testing.F) {
	f.Add([]byte("1|5|unix|/tmp/plugin1|grpc|\nhello\n"), uint8(3))
	f.Add([]byte("\n\n1|5|tcp|10.0.0.1:80|grpc\n"), uint8(1))
	f.Add(bytes.Repeat([]byte{0}, 2*maxFirstLine), uint8(200))
	f.Fuzz(func(t *testing.T, said []byte, piece uint8) {
		first := newFirstLine()
		rest := &sink{}
		split := stdoutSplit{first, newOutput(slog.New(slog.NewTextHandler(rest, nil)), "stdout", 1<<20, func(int) {})}
		var got []byte
		var wg sync.WaitGroup
		wg.Go(func() { got, _ = io.ReadAll(io.LimitReader(first, 1<<20)) })
		for left := said; len(left) > 0; {
			n := min(int(piece)+1, len(left))
			if m, err := split.Write(left[:n]); err != nil || m != n {
				t.Fatalf("wrote %d of %d: %v", m, n, err)
			}
			left = left[n:]
		}
		first.end()
		wg.Wait()
		line, _, whole := bytes.Cut(said, []byte("\n"))
		switch {
		case len(got) == 0:
		case !whole || !bytes.Equal(got, append(bytes.Clone(line), '\n')):
			t.Fatalf("the library was given %q, the first line is %q", got, line)
		case len(line) > maxFirstLine:
			t.Fatalf("a line of %d bytes was given", len(line))
		}
		if len(first.text()) > maxFirstLine {
			t.Fatalf("%d bytes are kept", len(first.text()))
		}
	})
}

// sink takes what is logged, and counts it.
type sink struct{ n int }

func (s *sink) Write(p []byte) (int, error) { s.n += len(p); return len(p), nil }
