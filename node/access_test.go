package node

import (
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"rollcall/node/fault"
)

// A leader that ends in the middle of a restore may have restored: "unavailable" would say that it certainly has not.
func TestARestoreThatWasSentAndNotAnsweredHasAnUnknownOutcome(t *testing.T) {
	for want, err := range map[fault.Kind]error{
		fault.OutcomeUnknown: status.Error(codes.Unavailable, "error reading from server: EOF"),
		fault.NotLeader:      fault.ToGRPC(fault.New(fault.NotLeader, "restore backup", "", "the leadership of term 3 is over")),
		fault.Conflict:       fault.ToGRPC(fault.New(fault.Conflict, "restore backup", "", "it is of another cluster")),
	} {
		if got := fault.KindOf(restoreAnswer(err)); got != want {
			t.Errorf("%v is of kind %v; want %v", err, got, want)
		}
	}
}
