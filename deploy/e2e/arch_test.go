//go:build e2e

package e2e

import "runtime"

// foreignArch is an architecture that is not this machine's.
var foreignArch = map[bool]string{true: "amd64", false: "arm64"}[runtime.GOARCH == "arm64"]

// foreignMachine is how its programs name it.
var foreignMachine = map[string]string{"amd64": "X86_64", "arm64": "AARCH64"}[foreignArch]
