//go:build !failpoints

package failpoint

// Enabled is whether this build has failpoints.
const Enabled = false

// Hit does nothing in this build.
func Hit(Site, string) error { return nil }

// Called makes key another way to say name in this build's Hit; it does nothing either.
func Called(_, _ string) {}
