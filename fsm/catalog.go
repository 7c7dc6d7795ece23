package fsm

import (
	"strings"

	"google.golang.org/protobuf/proto"

	"rollcall/node/fault"
	commandv1 "rollcall/proto/command/v1"
)

// The types of plugins. "unknown" stands for any of them where a plugin is named.
const (
	typeAuth     = "auth"
	typeSecret   = "secret"
	typeDatabase = "database"
	typeUnknown  = "unknown"
)

var pluginTypes = []string{typeAuth, typeDatabase, typeSecret}

func checkType(kind string) error {
	switch kind {
	case typeAuth, typeSecret, typeDatabase:
		return nil
	case "":
		return invalid("missing plugin type")
	default:
		return invalid(`error parsing %q as a plugin type, must be one of "auth", "secret", or "database"`, kind)
	}
}

func checkPlugin(kind, name string) error {
	if name == "" {
		return invalid("missing plugin name")
	}
	if len(name) > maxName || !pluginName.MatchString(name) {
		return invalid("plugin name %q must begin and end with a letter, digit or underscore, "+
			"with only those, dots and hyphens between", trim(name, maxName))
	}
	return checkType(kind)
}

// checkSpec returns the spec as it will stand in the catalog.
func checkSpec(in *commandv1.Spec) (*commandv1.Spec, error) {
	if in == nil {
		return nil, invalid("missing plugin name")
	}
	if err := checkPlugin(in.GetType(), in.GetName()); err != nil {
		return nil, err
	}
	if in.GetType() == typeDatabase && in.GetName() == typeDatabase {
		return nil, invalid("%q names the built-in mount: a database plugin needs another name", typeDatabase)
	}
	v, err := canonicalVersion(in.GetVersion())
	if err != nil {
		return nil, err
	}
	sum := strings.ToLower(in.GetSha256())
	switch {
	case sum == "":
		return nil, invalid("missing SHA-256 value")
	case !validSHA256(sum):
		return nil, invalid("Could not decode SHA-256 value from Hex")
	case in.GetCommand() == "":
		return nil, invalid("missing command value")
	case !plain(in.GetCommand(), maxText):
		return nil, invalid("the command holds control characters or is longer than %d bytes", maxText)
	case strings.HasPrefix(in.GetCommand(), "/"):
		return nil, invalid("command %q must be relative to the plugin directory", in.GetCommand())
	case strings.Contains("/"+in.GetCommand()+"/", "/../"):
		return nil, invalid("path cannot contain parent references")
	case len(in.GetArgs()) > maxList || len(in.GetEnv()) > maxList:
		return nil, invalid("at most %d args and %d env values", maxList, maxList)
	}
	size := 0
	for _, a := range in.GetArgs() {
		size += len(a)
		if strings.ContainsRune(a, 0) {
			return nil, invalid("an arg holds a zero byte")
		}
	}
	for _, kv := range in.GetEnv() {
		size += len(kv)
		if k, _, ok := strings.Cut(kv, "="); !ok || k == "" || strings.ContainsRune(kv, 0) {
			return nil, invalid("env values have the form KEY=value")
		}
	}
	if size > maxPolicy {
		return nil, fault.Text(fault.TooLarge, "args and env together hold more than %d bytes", maxPolicy)
	}
	out := clone(in)
	out.Version, out.Sha256 = v, sum
	return out, nil
}

func (e *entry) registerPlugin(c *commandv1.RegisterPlugin) error {
	spec, err := checkSpec(c.GetSpec())
	if err != nil {
		return err
	}
	k := pluginKey(spec.GetType(), spec.GetName(), spec.GetVersion())
	if old := get(&e.plugins, k); old != nil {
		if proto.Equal(old.GetSpec(), spec) {
			e.res.Repeated = true
			return nil
		}
		// Nodes keep bytes by sha256 and mounts by version: a version that meant two files would be no version.
		if spec.GetVersion() != "" && old.GetSpec().GetSha256() != spec.GetSha256() {
			return invalid("plugin %q version %s is registered with sha256 %s, and a version cannot be changed to another: "+
				"register a new version, or deregister this one first",
				spec.GetName(), spec.GetVersion(), old.GetSpec().GetSha256())
		}
	}
	e.plugins.Set(k, &commandv1.Plugin{Spec: spec, Index: e.index, WallMs: e.wallMS})
	return nil
}

func (e *entry) deregisterPlugin(c *commandv1.DeregisterPlugin) error {
	v, err := canonicalVersion(c.GetVersion())
	if err != nil {
		return err
	}
	if pin := get(&e.pins, key(c.GetType(), c.GetName())); pin != nil && pin.GetVersion() == v {
		return invalid("cannot delete a pinned version")
	}
	if _, ok := e.plugins.Delete(pluginKey(c.GetType(), c.GetName(), v)); !ok {
		e.res.Repeated = true
	}
	return nil
}

func (e *entry) setPin(c *commandv1.SetPin) error {
	if err := checkPlugin(c.GetType(), c.GetName()); err != nil {
		return err
	}
	if c.GetVersion() == "" {
		return invalid("missing plugin version")
	}
	v, err := canonicalVersion(c.GetVersion())
	if err != nil {
		return err
	}
	if get(&e.plugins, pluginKey(c.GetType(), c.GetName(), v)) == nil {
		return invalid("plugin not found in the catalog; %s plugin %q version %s does not exist", c.GetType(), c.GetName(), v)
	}
	k := key(c.GetType(), c.GetName())
	if get(&e.pins, k).GetVersion() == v {
		e.res.Repeated = true
		return nil
	}
	e.pins.Set(k, &commandv1.Pin{Type: c.GetType(), Name: c.GetName(), Version: v, Index: e.index})
	return nil
}

func (e *entry) deletePin(c *commandv1.DeletePin) error {
	if _, ok := e.pins.Delete(key(c.GetType(), c.GetName())); !ok {
		e.res.Repeated = true
	}
	return nil
}

// resolution is one question to the catalog: what is to run for a plugin of this type and name.
type resolution struct {
	kind, name string
	// asked is the version that the caller names now; configured what the mount was told before.
	asked, configured string
}

// resolve answers with the spec as it stands: the version asked for (refused where a pin says otherwise), else the pin,
// else the configured version, else the unversioned entry, else the highest version (DESIGN 5.1).
func (s *state) resolve(q resolution) (*commandv1.Spec, error) {
	if q.name == typeDatabase && q.kind == typeDatabase {
		if q.asked != "" {
			return nil, invalid("the mount of type %q is built in and has no versions: its connections have", typeDatabase)
		}
		return builtinDatabase, nil
	}
	asked, err := canonicalVersion(q.asked)
	if err != nil {
		return nil, err
	}
	pin := get(&s.pins, key(q.kind, q.name)).GetVersion()
	want := pin
	switch {
	case asked != "" && pin != "" && asked != pin:
		return nil, invalid("cannot use version %s of %s plugin %q, as it is pinned to version %s", asked, q.kind, q.name, pin)
	case asked != "":
		want = asked
	case pin == "":
		want = q.configured
	}
	if want != "" {
		if p := get(&s.plugins, pluginKey(q.kind, q.name, want)); p != nil {
			return p.GetSpec(), nil
		}
		return nil, invalid("plugin not found in the catalog: %s, version=%s", q.name, want)
	}
	var best *commandv1.Spec
	scanPrefix(&s.plugins, pluginKey(q.kind, q.name, ""), func(_ string, p *commandv1.Plugin) bool {
		spec := p.GetSpec()
		if best == nil || newer(spec.GetVersion(), best.GetVersion()) {
			best = spec
		}
		// The unversioned entry comes first in key order, and wins.
		return spec.GetVersion() != ""
	})
	if best != nil {
		return best, nil
	}
	return nil, invalid("plugin not found in the catalog: %s", q.name)
}

// builtinDatabase is the spec of a mount that is served by the node itself and starts database plugins for its
// connections. It has no bytes.
var builtinDatabase = &commandv1.Spec{Type: typeDatabase, Name: typeDatabase}

// knownPlugin reports whether the catalog has any version of the plugin; kind may be "unknown".
func (s *state) knownPlugin(kind, name string) bool {
	for _, k := range pluginTypes {
		if kind != typeUnknown && kind != k {
			continue
		}
		found := false
		scanPrefix(&s.plugins, pluginKey(k, name, ""), func(string, *commandv1.Plugin) bool {
			found = true
			return false
		})
		if found {
			return true
		}
	}
	return false
}
