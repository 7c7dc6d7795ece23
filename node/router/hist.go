package router

import (
	"math/bits"
	"sync/atomic"
	"time"
)

// A histogram of durations with bounded memory and a bounded relative error: every power of two of microseconds is cut
// into 2^subBits buckets, as HDR histograms do. 4 bits give at most 1/16 = 6.25 % above the true value.
const (
	subBits = 4
	subs    = 1 << subBits
	// 2^28 µs = 268 s is beyond every request deadline; longer ones count as that.
	maxBits = 28
	buckets = (maxBits - subBits + 1) * subs
)

// hist may be used from any goroutine. 1.6 KB.
type hist struct {
	n [buckets]atomic.Uint32
}

func bucketOf(d time.Duration) int {
	us := uint64(max(d.Microseconds(), 0))
	if us < subs {
		return int(us)
	}
	exp := bits.Len64(us) - 1
	if exp >= maxBits {
		return buckets - 1
	}
	return (exp-subBits+1)<<subBits | int(us>>(exp-subBits))&(subs-1)
}

// upper is the largest duration that falls into bucket b.
func upper(b int) time.Duration {
	if b < subs {
		return time.Duration(b) * time.Microsecond
	}
	exp := b>>subBits + subBits - 1
	low := uint64(subs|b&(subs-1)) << (exp - subBits)
	return time.Duration(low+1<<(exp-subBits)-1) * time.Microsecond
}

func (h *hist) record(d time.Duration) { h.n[bucketOf(d)].Add(1) }

// quantile answers the duration that the share q of what all hists recorded does not exceed; 0 when nothing was recorded.
func quantile(q float64, hs ...*hist) time.Duration {
	var sum [buckets]uint64
	var total uint64
	for _, h := range hs {
		if h == nil {
			continue
		}
		for i := range h.n {
			c := uint64(h.n[i].Load())
			sum[i] += c
			total += c
		}
	}
	if total == 0 {
		return 0
	}
	rank := max(uint64(q*float64(total)+0.9999999), 1)
	var seen uint64
	for i, c := range sum {
		if seen += c; seen >= rank {
			return upper(i)
		}
	}
	return upper(buckets - 1)
}
