package node

import "runtime/debug"

// Version of rollcall, a strict semantic version: clients parse it (Terraform's provider turns plugin features on from
// 1.16.0, so the API's compatibility version is told apart from it in APIVersion).
const Version = "0.1.0"

// APIVersion is the version that sys/health and sys/seal-status tell: that of the Vault API whose plugin calls this
// server answers. Clients choose what they send by it.
const APIVersion = "1.21.0"

// Revision is the source revision that the binary was built from, when the build recorded it.
func Revision() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return ""
	}
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" {
			return s.Value
		}
	}
	return ""
}
