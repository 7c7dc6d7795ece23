package check

import (
	"strconv"
	"testing"
)

// What is open when the run ends was cut off by its end: no invariant is broken by it. Found by chaos on processes, which counted
// the requests in flight at its own end as failures of the cluster.
func TestWhatIsOpenAtTheEndOfARunBlamesNobody(t *testing.T) {
	r := NewRecorder()
	done := r.Invoke(Op{Kind: Read, Node: "n1", Mount: "kv/", Key: "a"})
	for i := range 20 {
		r.Invoke(Op{Kind: Write, Node: "n1", Mount: "kv/", Key: "a", Input: strconv.Itoa(i)})
	}
	done.Outcome = OK
	r.Complete(done)
	run := r.Run()
	if report := Check(run); report.Err() != nil {
		t.Fatal(report.Err())
	}
	for _, op := range run.Ops {
		if op.ID != done.ID && (op.Outcome != Unknown || op.Return != run.Meta.Ended) {
			t.Errorf("%+v, and the run ended at %d", op, run.Meta.Ended)
		}
	}
}
