package sim

import (
	"bytes"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"
)

// journal keeps the newest of what the nodes say, with virtual time since the beginning in front.
type journal struct {
	mu  sync.Mutex
	buf bytes.Buffer
	old []byte
}

// half is how much is kept at least.
const half = 16 << 20

func (j *journal) Write(p []byte) (int, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.buf.Len() > half {
		j.old = slices.Clone(j.buf.Bytes())
		j.buf.Reset()
	}
	return j.buf.Write(p)
}

func (j *journal) handler(from time.Time) slog.Handler {
	return slog.NewTextHandler(j, &slog.HandlerOptions{
		Level: slog.LevelInfo,
		ReplaceAttr: func(groups []string, a slog.Attr) slog.Attr {
			if a.Key == slog.TimeKey && len(groups) == 0 && a.Value.Kind() == slog.KindTime {
				return slog.String(slog.TimeKey, fmt.Sprintf("%.6f", a.Value.Time().Sub(from).Seconds()))
			}
			return a
		},
	})
}

func (j *journal) bytes() []byte {
	j.mu.Lock()
	defer j.mu.Unlock()
	return append(slices.Clone(j.old), j.buf.Bytes()...)
}
