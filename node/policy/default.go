package policy

// DefaultText is the policy "default" until somebody writes another: a token may look after itself.
const DefaultText = `# A token may look after itself.
path "auth/token/lookup-self" {
  capabilities = ["read"]
}
path "auth/token/renew-self" {
  capabilities = ["update"]
}
path "auth/token/revoke-self" {
  capabilities = ["update"]
}
path "sys/capabilities-self" {
  capabilities = ["update"]
}

# A secret that was lent out may be renewed, looked up and given back by who knows its id.
path "sys/renew" {
  capabilities = ["update"]
}
path "sys/leases/renew" {
  capabilities = ["update"]
}
path "sys/leases/lookup" {
  capabilities = ["update"]
}

# Answers may be wrapped and unwrapped.
path "sys/wrapping/wrap" {
  capabilities = ["update"]
}
path "sys/wrapping/lookup" {
  capabilities = ["update"]
}
path "sys/wrapping/unwrap" {
  capabilities = ["update"]
}

# What the command line and user interfaces ask first.
path "sys/internal/ui/mounts" {
  capabilities = ["read"]
}
path "sys/internal/ui/mounts/*" {
  capabilities = ["read"]
}
`

var builtinDefault = mustParse(DefaultText)

func mustParse(text string) *Policy {
	p, err := Parse(text)
	if err != nil {
		panic("policy: " + err.Error()) // a defect of the text above
	}
	return p
}
