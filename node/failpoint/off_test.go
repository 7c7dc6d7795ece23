//go:build !failpoints

package failpoint

import "testing"

func TestAReleasedBuildDoesNothingAtAPlace(t *testing.T) {
	t.Setenv("ROLLCALL_FAILPOINTS", "reload/draining=panic")
	Called("id", "name")
	if Enabled || Hit(ReloadDraining, "id") != nil {
		t.Error("a build without the tag has failpoints")
	}
	if n := testing.AllocsPerRun(100, func() { _ = Hit(ReloadDraining, "id") }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
