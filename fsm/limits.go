package fsm

import "time"

// Limits of the state. They are constants, because every node must decide alike.
const (
	// MaxValue is the size of one storage value, MaxKey of its key.
	MaxValue = 1 << 20
	MaxKey   = 4096
	// MaxOps and MaxOpsBytes bound one WriteStorage or TakeOver.
	MaxOps      = 1000
	MaxOpsBytes = 8 << 20
	// MaxConnections bounds the connections of one database mount.
	MaxConnections = 256

	// MaxQueued bounds the reloads that wait, MaxAliases the ids joined to one of them.
	MaxQueued  = 1024
	MaxAliases = 4096
	// KeepReloadIDs ids, and all younger than KeepReloadIDsFor, are always known; MaxReloadIDs is where new reloads are
	// refused because all are young.
	KeepReloadIDs    = 10_000
	KeepReloadIDsFor = uint64(24 * time.Hour)
	MaxReloadIDs     = 65_536
	// KeepReloads detailed records of a namespace that have ended outlive a DropReloads; its before_clock_ns drops more.
	KeepReloads = 100
	// MeasuredWithin of its end, by the log's clock, a reload's record still takes in what nodes measured after the switch.
	MeasuredWithin = uint64(2 * time.Minute)
	// MaxWaves bounds the waves that a request may name.
	MaxWaves = 100

	maxName   = 512
	maxText   = 4096
	maxList   = 1024
	maxSteps  = 64
	maxHashes = 64
	maxPolicy = 1 << 20
	maxSecret = 1 << 20
)
