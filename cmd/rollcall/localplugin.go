package main

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"path/filepath"
)

// demoCommand is the file name of the demo plugin in a private plugin directory: a copy of this very binary, which
// is a plugin when its first argument says so.
const demoCommand = "rollcall-demo"

// demoArg is that first argument.
const demoArg = "demo-plugin"

// installDemoPlugin copies this binary into dir and returns its sha256 in hexadecimal.
func installDemoPlugin(dir string) (string, error) {
	self, err := os.Executable()
	if err != nil {
		return "", fmt.Errorf("find this binary, of which the demo plugin is a copy: %w", err)
	}
	in, err := os.Open(self)
	if err != nil {
		return "", fmt.Errorf("copy the demo plugin: %w", err)
	}
	defer in.Close()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", fmt.Errorf("make the plugin directory: %w", err)
	}
	out, err := os.OpenFile(filepath.Join(dir, demoCommand), os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o755)
	if err != nil {
		return "", fmt.Errorf("copy the demo plugin: %w", err)
	}
	sum := sha256.New()
	if _, err := io.Copy(io.MultiWriter(out, sum), in); err != nil {
		_ = out.Close()
		return "", fmt.Errorf("copy the demo plugin: %w", err)
	}
	if err := out.Close(); err != nil {
		return "", fmt.Errorf("copy the demo plugin: %w", err)
	}
	return hex.EncodeToString(sum.Sum(nil)), nil
}
