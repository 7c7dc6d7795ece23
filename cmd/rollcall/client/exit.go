package client

// Exit is err with an exit code, for the commands that others add to the root: Execute prints it and returns code. Any
// other error of theirs exits with ExitUsage.
func Exit(code int, err error) error { return &exitError{code: code, err: err} }
