package httpd

import (
	"encoding/hex"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/hashicorp/go-version"

	commandv1 "rollcall/proto/command/v1"

	"rollcall/fsm"
	"rollcall/node/fault"
)

func (s *Server) catalogRoutes() []*route {
	all := map[operation]handler{opRead: s.readPlugin, opUpdate: s.registerPlugin, opDelete: s.deregisterPlugin}
	return []*route{
		{
			pattern: "sys/plugins/catalog", ops: map[operation]handler{opRead: s.listCatalog},
			summary: "Every plugin of the catalog.",
		},
		{
			pattern: "sys/plugins/catalog/{type}", access: withSudo,
			ops:     map[operation]handler{opList: s.listCatalogType, opRead: s.legacyRead, opUpdate: s.legacyRegister, opDelete: s.legacyDelete},
			summary: "The names of one type; also the legacy calls without a type.",
		},
		{
			pattern: "sys/plugins/catalog/{type}/{name}", access: withSudo, ops: all,
			summary: "Register, read or deregister one plugin.",
		},
		{pattern: "sys/plugins/pins", ops: map[operation]handler{opRead: s.listPins}, summary: "Every version pin."},
		{
			pattern: "sys/plugins/pins/{type}/{name}",
			ops:     map[operation]handler{opRead: s.readPin, opUpdate: s.setPin, opDelete: s.deletePin},
			summary: "The version that every mount of a plugin runs from its next start.",
		},
	}
}

var pluginTypes = []string{"auth", "database", "secret"}

func isPluginType(t string) bool { return slices.Contains(pluginTypes, t) }

// listCatalog always sends the three arrays: the Go clients treat an absent one as an error.
func (s *Server) listCatalog(q *request) (*reply, error) {
	names := map[string]map[string]bool{}
	for _, t := range pluginTypes {
		names[t] = map[string]bool{}
	}
	detailed := []map[string]any{}
	for _, p := range sortedPlugins(q.view) {
		spec := p.GetSpec()
		names[spec.GetType()][spec.GetName()] = true
		detailed = append(detailed, map[string]any{
			"type": spec.GetType(), "name": spec.GetName(),
			"version": spec.GetVersion(), "builtin": false, "sha256": spec.GetSha256(),
		})
	}
	data := map[string]any{"detailed": detailed, "kms": []string{}} // OpenBao's client knows a type that nothing here has
	for t, set := range names {
		list := slices.Sorted(maps.Keys(set))
		if list == nil {
			list = []string{}
		}
		data[t] = list
	}
	return &reply{data: data}, nil
}

// sortedPlugins orders by type, name and semantic version.
func sortedPlugins(view *fsm.View) []*commandv1.Plugin {
	list := slices.Clone(view.Plugins())
	slices.SortFunc(list, func(a, b *commandv1.Plugin) int {
		x, y := a.GetSpec(), b.GetSpec()
		if c := strings.Compare(x.GetType(), y.GetType()); c != 0 {
			return c
		}
		if c := strings.Compare(x.GetName(), y.GetName()); c != 0 {
			return c
		}
		return compareVersions(x.GetVersion(), y.GetVersion())
	})
	return list
}

func compareVersions(a, b string) int {
	x, xerr := version.NewSemver(a)
	y, yerr := version.NewSemver(b)
	if xerr != nil || yerr != nil {
		return strings.Compare(a, b)
	}
	return x.Compare(y)
}

func (s *Server) listCatalogType(q *request) (*reply, error) {
	t := q.params["type"]
	if !isPluginType(t) {
		return nil, &fault.Error{Kind: fault.UnsupportedPath}
	}
	set := map[string]bool{}
	for _, p := range q.view.Plugins() {
		if p.GetSpec().GetType() == t {
			set[p.GetSpec().GetName()] = true
		}
	}
	if len(set) == 0 {
		return nil, nil
	}
	return &reply{data: map[string]any{"keys": slices.Sorted(maps.Keys(set))}}, nil
}

// legacyRead and legacyDelete answer the calls that name no type: a warning, as the contract has it.
func (s *Server) legacyRead(q *request) (*reply, error) {
	if isPluginType(q.params["type"]) {
		return nil, &fault.Error{Kind: fault.UnsupportedOperation}
	}
	return &reply{warnings: []string{fmt.Sprintf(
		"Deprecated API endpoint, cannot read plugin information from catalog for %q", q.params["type"])}}, nil
}

func (s *Server) legacyDelete(q *request) (*reply, error) {
	return &reply{warnings: []string{fmt.Sprintf(
		"Deprecated API endpoint, cannot deregister plugin from catalog for %q", q.params["type"])}}, nil
}

// legacyRegister takes the type from the body.
func (s *Server) legacyRegister(q *request) (*reply, error) {
	q.params = map[string]string{"name": q.params["type"], "type": typeOf(q.body.str("type"))}
	if q.params["type"] == "" {
		return nil, fault.Text(fault.Invalid, "missing plugin type")
	}
	return s.registerPlugin(q)
}

// typeOf reads a plugin type as a word or as the number that OpenBao's client sends.
func typeOf(t string) string {
	switch t {
	case "1":
		return "auth"
	case "2":
		return "database"
	case "3":
		return "secret"
	default:
		return t
	}
}

func (s *Server) registerPlugin(q *request) (*reply, error) {
	b := q.body
	spec := &commandv1.Spec{
		Type: q.params["type"], Name: q.params["name"], Version: b.str("version"),
		Command: b.str("command"), Args: b.list("args"), Env: b.list("env"), Sha256: b.str("sha256"),
	}
	if spec.Sha256 == "" {
		spec.Sha256 = b.str("sha_256")
	}
	typed := b.has("type")
	image, download := b.str("oci_image") != "" || b.boolean("oci"), b.boolean("download")
	b.has("runtime")
	if b.err != nil {
		return nil, b.err
	}
	if !isPluginType(spec.GetType()) {
		return nil, fault.Text(fault.Invalid, "error parsing %q as a plugin type, must be one of \"auth\", \"secret\", \"database\"", spec.GetType())
	}
	if err := checkRegistration(spec, image, download); err != nil {
		return nil, err
	}
	if err := s.compareFile(q, spec); err != nil {
		return nil, err
	}
	res, err := s.propose(q, &commandv1.Command{Body: &commandv1.Command_RegisterPlugin{
		RegisterPlugin: &commandv1.RegisterPlugin{Spec: spec},
	}})
	if err != nil {
		return nil, err
	}
	if len(res.GetWarnings()) == 0 {
		return nil, nil
	}
	warnings := res.GetWarnings()
	if typed {
		warnings = append(warnings, "Endpoint replaced the value of these parameters with the values captured from the endpoint's path: [type]")
	}
	return &reply{warnings: warnings}, nil
}

// checkRegistration holds a registration against the contract's list, in its order.
func checkRegistration(spec *commandv1.Spec, image, download bool) error {
	if v := spec.GetVersion(); v != "" {
		parsed, err := version.NewSemver(v)
		if err != nil {
			return fault.Text(fault.Invalid, "version %q is not a valid semantic version: malformed version: %s", v, v)
		}
		if strings.Contains(parsed.Metadata(), "builtin") {
			return fault.Text(fault.Invalid, "version %q is not allowed because 'builtin' is a reserved metadata identifier", v)
		}
		spec.Version = "v" + parsed.String()
	}
	switch {
	case download:
		return fault.Text(fault.Invalid, "download is not supported: put the file into the plugin directory of the nodes and register it with its sha256")
	case image:
		return fault.Text(fault.Invalid, "container plugins are not supported: register a binary with command and sha256")
	case spec.GetSha256() == "":
		return fault.Text(fault.Invalid, "must provide at least one of sha256 or version: rollcall runs binaries only, so sha256 is required (version optional)")
	case spec.GetCommand() == "":
		return fault.Text(fault.Invalid, "must provide at least one of command or oci_image")
	}
	raw, err := hex.DecodeString(spec.GetSha256())
	if err != nil || len(raw) != 32 {
		return fault.Text(fault.Invalid, "Could not decode SHA-256 value from Hex: %q is not 64 hexadecimal digits", spec.GetSha256())
	}
	spec.Sha256 = hex.EncodeToString(raw)
	if slices.Contains(strings.FieldsFunc(spec.GetCommand(), func(r rune) bool { return r == '/' || r == ' ' }), "..") {
		return fault.Text(fault.Invalid, "path cannot contain parent references: %q", spec.GetCommand())
	}
	if command, args, ok := strings.Cut(spec.GetCommand(), " "); ok {
		if len(spec.GetArgs()) > 0 {
			return fault.Text(fault.Invalid, "must not specify args in command and args field")
		}
		spec.Command, spec.Args = command, strings.Fields(args)
	}
	return nil
}

// compareFile refuses a registration whose sha256 is not that of the file on this node. A file that is not here is
// no reason to refuse: other nodes may have it.
func (s *Server) compareFile(q *request, spec *commandv1.Spec) error {
	got, err := s.Plugins.Hash(q.ctx, spec.GetCommand())
	switch {
	case fault.Is(err, fault.NotFound):
		return nil
	case fault.Is(err, fault.Invalid):
		return err
	case err != nil:
		s.log.Warn("compare registered plugin with the file here", "plugin", spec.GetName(), "command", spec.GetCommand(), "error", err)
		return nil
	case got != spec.GetSha256():
		return fault.Text(fault.Invalid, "sha256 does not match the file %q in the plugin directory of node %s: registered %s, file %s",
			spec.GetCommand(), s.NodeName, spec.GetSha256(), got)
	}
	return nil
}

func (s *Server) readPlugin(q *request) (*reply, error) {
	v, err := canonicalVersion(q.body.str("version"))
	if err != nil {
		return nil, err
	}
	p := q.view.Plugin(q.params["type"], q.params["name"], v)
	if p == nil {
		return nil, nil
	}
	spec := p.GetSpec()
	args := spec.GetArgs()
	if args == nil {
		args = []string{}
	}
	return &reply{data: map[string]any{
		"name": spec.GetName(), "command": spec.GetCommand(), "args": args,
		"sha256": spec.GetSha256(), "builtin": false, "version": spec.GetVersion(),
	}}, nil
}

func canonicalVersion(v string) (string, error) {
	if v == "" {
		return "", nil
	}
	parsed, err := version.NewSemver(v)
	if err != nil {
		return "", fault.Text(fault.Invalid, "version %q is not a valid semantic version: malformed version: %s", v, v)
	}
	return "v" + parsed.String(), nil
}

func (s *Server) deregisterPlugin(q *request) (*reply, error) {
	v, err := canonicalVersion(q.body.str("version"))
	if err != nil {
		return nil, err
	}
	_, err = s.propose(q, &commandv1.Command{Body: &commandv1.Command_DeregisterPlugin{
		DeregisterPlugin: &commandv1.DeregisterPlugin{Type: q.params["type"], Name: q.params["name"], Version: v},
	}})
	return nil, err
}

func (s *Server) listPins(q *request) (*reply, error) {
	list := []map[string]any{}
	for _, p := range q.view.Pins() {
		list = append(list, map[string]any{"type": p.GetType(), "name": p.GetName(), "version": p.GetVersion()})
	}
	return &reply{data: map[string]any{"pinned_versions": list}}, nil
}

func (s *Server) readPin(q *request) (*reply, error) {
	p := q.view.Pin(q.params["type"], q.params["name"])
	if p == nil {
		return nil, fault.Text(fault.NotFound, "1 error occurred:\n\t* no pinned version for this plugin\n\n")
	}
	return &reply{data: map[string]any{"type": p.GetType(), "name": p.GetName(), "version": p.GetVersion()}}, nil
}

func (s *Server) setPin(q *request) (*reply, error) {
	raw := q.body.str("version")
	if raw == "" {
		return nil, fault.Text(fault.Invalid, "missing plugin version")
	}
	v, err := canonicalVersion(raw)
	if err != nil {
		return nil, err
	}
	if strings.Contains(v, "+builtin") {
		return nil, fault.Text(fault.Invalid, "cannot pin a builtin plugin: %q", v)
	}
	_, err = s.propose(q, &commandv1.Command{Body: &commandv1.Command_SetPin{
		SetPin: &commandv1.SetPin{Type: q.params["type"], Name: q.params["name"], Version: v},
	}})
	return &reply{}, err
}

func (s *Server) deletePin(q *request) (*reply, error) {
	_, err := s.propose(q, &commandv1.Command{Body: &commandv1.Command_DeletePin{
		DeletePin: &commandv1.DeletePin{Type: q.params["type"], Name: q.params["name"]},
	}})
	return &reply{}, err
}

// propose enters a command on behalf of a request. The command dies with the token that authorised it.
func (s *Server) propose(q *request, cmd *commandv1.Command) (*commandv1.Result, error) {
	cmd.WallMs, cmd.RequestId, cmd.ByToken = wall(), q.id, q.by()
	return s.Replica.Propose(q.ctx, cmd)
}
