package fsm

import (
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	commandv1 "rollcall/proto/command/v1"
)

// after is a node's report again, with the latency that it measured after its switch.
func after(w *world, node string, change func(*commandv1.MountReport)) *commandv1.Command {
	r := w.f.View().Reload("r1")
	m := proto.CloneOf(findOutcome(findParticipant(r, node), "uuid-of-kv/").GetReport())
	m.Traffic, m.WallMs = &commandv1.Traffic{P99AfterUs: 70}, m.GetWallMs()+5000
	if change != nil {
		change(m)
	}
	return &commandv1.Command{Body: &commandv1.Command_ReportBatch{ReportBatch: &commandv1.ReportBatch{Reports: []*commandv1.Report{{
		ReloadId: "r1", NodeId: node, Incarnation: 1, Mounts: []*commandv1.MountReport{m},
	}}}}}
}

func TestARecordThatHasEndedTakesInWhatWasMeasuredAfterTheSwitchOnceAndNothingElse(t *testing.T) {
	w := newWorld(t)
	w.play("init\nhello n1\nhello n2\nregister kv v1.0.0\nenable kv/\nreload r1 plugin=kv\nprepared r1 n1,n2\nswitched r1 n1,n2")
	measured := func(node string) int64 {
		return findOutcome(findParticipant(w.f.View().Reload("r1"), node), "uuid-of-kv/").GetReport().GetTraffic().GetP99AfterUs()
	}
	for name, change := range map[string]func(*commandv1.MountReport){
		"of another process":    func(m *commandv1.MountReport) { m.To.Pid++ },
		"of another generation": func(m *commandv1.MountReport) { m.To.Generation++ },
		"of nothing":            func(m *commandv1.MountReport) { m.Traffic.P99AfterUs = 0 },
		"of a refusal":          func(m *commandv1.MountReport) { m.Stage = commandv1.MountReport_STAGE_REFUSED },
	} {
		if res := w.apply(after(w, "n1", change)); !res.GetRepeated() || measured("n1") != 0 {
			t.Errorf("a measurement %s was taken in: %v", name, res)
		}
	}
	had := w.f.View().Reload("r1")
	w.apply(after(w, "n1", func(m *commandv1.MountReport) { m.HoldUs = 99 }))
	r := w.f.View().Reload("r1")
	o := findOutcome(findParticipant(r, "n1"), "uuid-of-kv/")
	if measured("n1") != 70 || o.GetReport().GetHoldUs() == 99 || r.GetOutcome() != OutcomeSucceeded || r.GetEndIndex() != had.GetEndIndex() {
		t.Errorf("the record is now %v", r)
	}
	w.apply(after(w, "n1", func(m *commandv1.MountReport) { m.Traffic.P99AfterUs = 80 }))
	if measured("n1") != 70 {
		t.Error("a second measurement took the place of the first")
	}
	w.play("tick after=1m\ntick after=1m\ntick after=1s")
	w.apply(after(w, "n2", nil))
	if measured("n2") != 0 {
		t.Errorf("a measurement was taken in %v after the end", time.Duration(MeasuredWithin))
	}
}
