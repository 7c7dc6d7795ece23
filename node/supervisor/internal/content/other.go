//go:build !linux

package content

import (
	"errors"
	"os"
)

func openBeneath(dir, name string) (*os.File, error) { return openRoot(dir, name) }

func newMemfd(string) (*os.File, error) { return nil, errors.ErrUnsupported }

func seal(*os.File) error { return errors.ErrUnsupported }
