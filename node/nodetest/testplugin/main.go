// Command testplugin is the demo plugin as a program of its own: small, and without the race detector, whatever the tests
// that start it are built with.
package main

import (
	"os"

	"rollcall/proto/plugin/demoplugin"
)

// The first argument marks the process as a test's.
func main() { os.Exit(demoplugin.Main(os.Args[2:], os.Stderr)) }
