//go:build !exact

package sim

// exactly does nothing without the overlay of the runtime that the script exact builds with.
func exactly() (stop func()) { return func() {} }

const watched = true
