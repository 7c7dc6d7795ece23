package replica

import "testing"

// The check that every plugin request pays twice.
func BenchmarkServing(b *testing.B) {
	r := &Replica{cfg: Config{Now: Boottime}}
	r.lease.Store(1 << 62)
	for b.Loop() {
		if err := r.Serving(); err != nil {
			b.Fatal(err)
		}
	}
}
