package check

import (
	"flag"
	"testing"
)

var (
	dir    = flag.String("dir", "testdata/run", "judge the run that was saved in this directory")
	remake = flag.Bool("remake", false, "write testdata/run again")
)

// TestJudge judges a saved run again: go test ./node/nodetest/check -run Judge -v -dir DIR. Without -dir it is the one that is
// committed, so that what is written today can still be read tomorrow.
func TestJudge(t *testing.T) {
	if *remake {
		if err := valid(1, 40).Save("testdata/run"); err != nil {
			t.Fatal(err)
		}
	}
	run, err := Load(*dir)
	if err != nil {
		t.Fatal(err)
	}
	report := Check(run)
	t.Log(report)
	if err := report.Err(); err != nil {
		t.Error(err)
	}
}
