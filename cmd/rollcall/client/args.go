package client

import (
	"regexp"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// Normalize turns flags typed with one dash, as vault and bao have them, into what cobra reads: -scope=global becomes
// --scope=global. One letter stays a shorthand (-h), "-" alone stays an argument, numbers stay numbers, and what follows
// a flag that takes a value, or "--", is left as it is. While a shell completes, the word under the cursor is not touched.
func Normalize(root *cobra.Command, args []string) []string {
	takes, all := flagsOf(root)
	out := slices.Clone(args)
	n := len(out)
	if n > 0 && (out[0] == cobra.ShellCompRequestCmd || out[0] == cobra.ShellCompNoDescRequestCmd) {
		n--
	}
	for i := 0; i < n; i++ {
		a := out[i]
		if a == "--" {
			break
		}
		name, value, hasValue := strings.Cut(strings.TrimLeft(a, "-"), "=")
		switch {
		case !strings.HasPrefix(a, "-") || name == "":
			continue
		case !strings.HasPrefix(a, "--") && len(name) == 1:
			if hasValue || !takes[name] {
				continue
			}
		case !strings.HasPrefix(a, "--") && number.MatchString(a) && !all[name]:
			continue
		default:
			out[i] = "--" + name
			if hasValue {
				out[i] += "=" + value
				continue
			}
		}
		if takes[strings.ReplaceAll(name, "_", "-")] {
			i++
		}
	}
	return out
}

var number = regexp.MustCompile(`^-[0-9.]+[a-z%]*$`)

// flagsOf collects the names of all flags in the tree, and of those that take a value.
func flagsOf(root *cobra.Command) (takes, all map[string]bool) {
	takes, all = map[string]bool{}, map[string]bool{"help": true}
	var walk func(*cobra.Command)
	see := func(f *pflag.Flag) {
		all[f.Name] = true
		if f.NoOptDefVal == "" {
			takes[f.Name] = true
			if f.Shorthand != "" {
				takes[f.Shorthand] = true
			}
		}
	}
	walk = func(c *cobra.Command) {
		c.Flags().VisitAll(see)
		c.PersistentFlags().VisitAll(see)
		for _, sub := range c.Commands() {
			walk(sub)
		}
	}
	walk(root)
	return takes, all
}

var twoDashes = regexp.MustCompile(`(^|[\s"'` + "`" + `(])--([a-z])`)

// oneDash spells flags in a text of cobra's the way that users type them.
func oneDash(text string) string { return twoDashes.ReplaceAllString(text, "$1-$2") }
