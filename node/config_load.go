package node

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/hclsyntax"
	"github.com/hashicorp/hcl/v2/json"
	"github.com/zclconf/go-cty/cty"
	"github.com/zclconf/go-cty/cty/convert"
	"github.com/zclconf/go-cty/cty/gocty"

	"rollcall/node/fault"
)

// EnvPrefix begins every environment variable that is ours.
const EnvPrefix = "ROLLCALL_"

// maxConfigFile is far above any configuration that somebody wrote, in bytes.
const maxConfigFile = 1 << 20

// LoadConfig reads the configuration of `rollcall server`: defaults, then the file (".hcl" or ".json"; "" for none),
// then the variables of environ (as from os.Environ) that begin with ROLLCALL_. It validates the result and reports
// every problem at once, each with the place it comes from. The warnings are about variables that were ignored;
// Config.Warnings has those about what is set.
func LoadConfig(path string, environ []string) (cfg Config, warnings []string, err error) {
	cfg = DefaultConfig()
	if host, err := os.Hostname(); err == nil {
		cfg.Name = host
	}
	var errs []error
	if path != "" {
		errs = append(errs, loadFile(path, &cfg))
	}
	warnings, envErr := loadEnv(environ, &cfg)
	errs = append(errs, envErr)
	if err := errors.Join(errs...); err != nil {
		return cfg, warnings, fault.As(fault.Invalid, err, "read configuration", path)
	}
	return cfg, warnings, cfg.Validate()
}

// ConfigKey describes one key of the configuration, for help texts and documentation.
type ConfigKey struct {
	// Path in the file, as in "cluster.listen".
	Path string
	// Env is its environment variable.
	Env string
	// Type is string, bool, number, duration, size or list.
	Type string
	// Default as one would write it; "" where there is none.
	Default string
}

// ConfigKeys lists every key in the order of the documentation.
func ConfigKeys() []ConfigKey {
	cfg := DefaultConfig()
	var out []ConfigKey
	for _, k := range keysOf(&cfg) {
		out = append(out, ConfigKey{Path: k.path, Env: k.env, Type: typeName(k.value.Type()), Default: k.text()})
	}
	return out
}

var (
	durationType = reflect.TypeFor[time.Duration]()
	sizeType     = reflect.TypeFor[Size]()
	listType     = reflect.TypeFor[[]string]()
)

func typeName(t reflect.Type) string {
	switch {
	case t == durationType:
		return "duration"
	case t == sizeType:
		return "size"
	case t == listType:
		return "list"
	case t.Kind() == reflect.Int:
		return "number"
	}
	return t.Kind().String()
}

// key is one settable field of a Config.
type key struct {
	path, env string
	value     reflect.Value
}

// text is the value as one would write it; "" for a zero value, which stands for "none" everywhere but in a bool.
func (k key) text() string {
	if k.value.IsZero() && k.value.Kind() != reflect.Bool {
		return ""
	}
	text := fmt.Sprint(k.value.Interface())
	if list, ok := reflect.TypeAssert[[]string](k.value); ok {
		return strings.Join(list, ",")
	}
	if k.value.Type() == durationType {
		text = strings.TrimSuffix(text, "m0s") + strings.Repeat("m", strings.Count(text, "m0s"))
		text = strings.TrimSuffix(text, "h0m") + strings.Repeat("h", strings.Count(text, "h0m"))
	}
	return text
}

func keysOf(cfg *Config) []key { return appendKeys(nil, "", reflect.ValueOf(cfg).Elem()) }

func appendKeys(out []key, prefix string, v reflect.Value) []key {
	for i := range v.NumField() {
		path := prefix + v.Type().Field(i).Tag.Get("key")
		if v.Field(i).Kind() == reflect.Struct {
			out = appendKeys(out, path+".", v.Field(i))
			continue
		}
		env := EnvPrefix + strings.ToUpper(strings.ReplaceAll(path, ".", "_"))
		out = append(out, key{path: path, env: env, value: v.Field(i)})
	}
	return out
}

// loadFile reads HCL or JSON into cfg. HCL's own decoder (gohcl) is not used because it has no durations and no
// sizes; the schema comes from the same struct tags as the environment.
func loadFile(path string, cfg *Config) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	src, err := io.ReadAll(io.LimitReader(f, maxConfigFile+1))
	if err != nil {
		return err
	}
	if len(src) > maxConfigFile {
		return fmt.Errorf("%s is larger than %s: is this the configuration?", path, Size(maxConfigFile))
	}
	var file *hcl.File
	var diags hcl.Diagnostics
	switch ext := strings.ToLower(filepath.Ext(path)); ext {
	case ".hcl":
		file, diags = hclsyntax.ParseConfig(src, path, hcl.InitialPos)
	case ".json":
		file, diags = json.Parse(src, path)
	default:
		return fmt.Errorf("%s: the name must end in .hcl or .json, which says how to read it", path)
	}
	if !diags.HasErrors() {
		diags = decodeBody(file.Body, reflect.ValueOf(cfg).Elem())
	}
	return diagError(diags)
}

// decodeBody sets the fields of v that the body names. What it does not know, or knows as something else, is an
// error at its line.
func decodeBody(body hcl.Body, v reflect.Value) hcl.Diagnostics {
	schema := &hcl.BodySchema{}
	fields := map[string]reflect.Value{}
	for i := range v.NumField() {
		name := v.Type().Field(i).Tag.Get("key")
		fields[name] = v.Field(i)
		if v.Field(i).Kind() == reflect.Struct {
			schema.Blocks = append(schema.Blocks, hcl.BlockHeaderSchema{Type: name})
		} else {
			schema.Attributes = append(schema.Attributes, hcl.AttributeSchema{Name: name})
		}
	}
	content, diags := body.Content(schema)
	if content == nil {
		return diags
	}
	for name, attr := range content.Attributes {
		diags = append(diags, decodeAttr(attr, fields[name])...)
	}
	seen := map[string]hcl.Range{}
	for _, block := range content.Blocks {
		if first, twice := seen[block.Type]; twice {
			diags = append(diags, &hcl.Diagnostic{
				Severity: hcl.DiagError, Summary: "Block given twice", Subject: &block.DefRange,
				Detail: fmt.Sprintf("There is one %q block, at %s.", block.Type, first),
			})
			continue
		}
		seen[block.Type] = block.DefRange
		diags = append(diags, decodeBody(block.Body, fields[block.Type])...)
	}
	return diags
}

func decodeAttr(attr *hcl.Attribute, field reflect.Value) hcl.Diagnostics {
	value, diags := attr.Expr.Value(nil)
	if diags.HasErrors() || value.IsNull() {
		return diags
	}
	if err := setValue(field, value); err != nil {
		rng := attr.Expr.Range()
		return append(diags, &hcl.Diagnostic{
			Severity: hcl.DiagError, Summary: "Wrong value for " + attr.Name, Detail: err.Error(), Subject: &rng,
		})
	}
	return diags
}

// setValue converts no more than HCL itself would: a string is not taken for a number.
func setValue(field reflect.Value, value cty.Value) error {
	t := field.Type()
	wrong := func() error {
		return fmt.Errorf("a %s is needed, and this is a %s", typeName(t), value.Type().FriendlyName())
	}
	switch {
	case t == durationType, t == sizeType && value.Type() == cty.String:
		if value.Type() != cty.String {
			return errors.New(`a duration is needed, as text with its unit: "300ms", "5s", "24h"`)
		}
		return setText(field, value.AsString())
	case t == listType:
		list, err := convert.Convert(value, cty.List(cty.String))
		if err != nil || !list.IsWhollyKnown() {
			return wrong()
		}
		out := make([]string, 0, list.LengthInt())
		for _, v := range list.AsValueSlice() {
			if v.IsNull() {
				return errors.New("a list of texts is needed, and one of these is null")
			}
			out = append(out, v.AsString())
		}
		field.Set(reflect.ValueOf(out))
		return nil
	case t.Kind() == reflect.String && value.Type() == cty.String,
		t.Kind() == reflect.Bool && value.Type() == cty.Bool,
		field.CanInt() && value.Type() == cty.Number:
		if err := gocty.FromCtyValue(value, field.Addr().Interface()); err != nil {
			return fmt.Errorf("a %s is needed: %w", typeName(t), err)
		}
		return nil
	}
	return wrong()
}

// diagError renders every diagnostic, in the order of the file, one per line.
func diagError(diags hcl.Diagnostics) error {
	slices.SortStableFunc(diags, func(a, b *hcl.Diagnostic) int {
		if a.Subject == nil || b.Subject == nil {
			return 0
		}
		return cmp.Compare(a.Subject.Start.Byte, b.Subject.Start.Byte)
	})
	var errs []error
	for _, d := range diags {
		if d.Severity != hcl.DiagError {
			continue
		}
		where := ""
		if d.Subject != nil {
			where = fmt.Sprintf("%s:%d: ", d.Subject.Filename, d.Subject.Start.Line)
		}
		errs = append(errs, fmt.Errorf("%s%s: %s", where, strings.ToLower(d.Summary[:1])+d.Summary[1:], d.Detail))
	}
	return errors.Join(errs...)
}

// setText sets a field from the text of an environment variable (and a duration or size from the file's).
func setText(field reflect.Value, text string) error {
	switch field.Type() {
	case durationType:
		d, err := time.ParseDuration(text)
		if err != nil {
			return fmt.Errorf(`%q is not a duration; write it with its unit: "300ms", "5s", "24h"`, text)
		}
		field.SetInt(int64(d))
		return nil
	case sizeType:
		size, err := ParseSize(text)
		if err != nil {
			return err
		}
		field.SetInt(int64(size))
		return nil
	case listType:
		var out []string
		for part := range strings.SplitSeq(text, ",") {
			if part = strings.TrimSpace(part); part != "" {
				out = append(out, part)
			}
		}
		field.Set(reflect.ValueOf(out))
		return nil
	}
	switch field.Kind() {
	case reflect.String:
		field.SetString(text)
	case reflect.Bool:
		switch strings.ToLower(text) {
		case "true", "1", "yes", "on":
			field.SetBool(true)
		case "false", "0", "no", "off":
			field.SetBool(false)
		default:
			return fmt.Errorf("%q is neither true nor false", text)
		}
	case reflect.Int:
		var n int
		if _, err := fmt.Sscanf(text+"\n", "%d\n", &n); err != nil || fmt.Sprint(n) != strings.TrimPrefix(text, "+") {
			return fmt.Errorf("%q is not a whole number", text)
		}
		field.SetInt(int64(n))
	default:
		return fmt.Errorf("no way to set a %s", field.Type())
	}
	return nil
}

// clientEnv are the variables of the command line client, which share the prefix.
var clientEnv = []string{
	"ADDR", "TOKEN", "NAMESPACE", "CACERT", "CAPATH", "CLIENT_CERT", "CLIENT_KEY", "CLIENT_TIMEOUT", "TLS_SERVER_NAME",
	"SKIP_VERIFY", "FORMAT", "MAX_RETRIES", "CONFIG",
}

// serviceEnv is what Kubernetes sets in every pod for a Service whose name begins with "rollcall".
var serviceEnv = regexp.MustCompile(`(^|_)(SERVICE_HOST|SERVICE_PORT(_[A-Z0-9_]+)?|PORT(_\d+_(TCP|UDP)(_[A-Z]+)?)?)$`)

// loadEnv applies the ROLLCALL_ variables. One that it does not know is a warning and not an error, because the
// environment is shared with others; a misspelt key is named with the one that was probably meant.
func loadEnv(environ []string, cfg *Config) (warnings []string, err error) {
	keys := keysOf(cfg)
	byEnv := map[string]key{}
	for _, k := range keys {
		byEnv[k.env] = k
	}
	var errs []error
	for _, kv := range environ {
		name, text, _ := strings.Cut(kv, "=")
		rest, ours := strings.CutPrefix(name, EnvPrefix)
		if !ours || text == "" {
			continue
		}
		k, known := byEnv[name]
		switch {
		case known:
			if err := setText(k.value, text); err != nil {
				errs = append(errs, fmt.Errorf("environment variable %s: %w", name, err))
			}
		case slices.Contains(clientEnv, rest) || serviceEnv.MatchString(rest):
		default:
			warnings = append(warnings, unknownEnv(name, keys))
		}
	}
	slices.Sort(warnings)
	return warnings, errors.Join(errs...)
}

func unknownEnv(name string, keys []key) string {
	best, least := "", 4 // more than three letters apart is not a slip of the finger
	for _, k := range keys {
		if d := distance(name, k.env); d < least {
			best, least = k.env, d
		}
	}
	text := "environment variable " + name + " is no key of the configuration and was ignored"
	if best != "" {
		text += "; did you mean " + best + "?"
	}
	return text
}

// distance is the Levenshtein distance of two short ASCII strings.
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			change := diagonal
			if a[i] != b[j] {
				change++
			}
			diagonal = row[j+1]
			row[j+1] = min(change, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}
