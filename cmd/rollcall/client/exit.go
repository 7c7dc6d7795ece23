package client

// Exit is err with an exit code, for verbs outside this package.
func Exit(code int, err error) error { return &exitError{code: code, err: err} }
