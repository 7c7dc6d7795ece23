package check

import (
	"flag"
	"testing"
)

var dir = flag.String("dir", "", "judge the run that was saved in this directory")

// TestJudge judges a saved run again: go test ./node/nodetest/check -run Judge -v -dir DIR.
func TestJudge(t *testing.T) {
	if *dir == "" {
		t.Skip("no -dir: nothing to judge")
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
