package failpoint

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// declared reads the constants of sites.go: name to site.
func declared(t *testing.T) map[string]Site {
	t.Helper()
	file, err := parser.ParseFile(token.NewFileSet(), "sites.go", nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]Site{}
	for _, d := range file.Decls {
		g, ok := d.(*ast.GenDecl)
		if !ok || g.Tok != token.CONST {
			continue
		}
		for _, s := range g.Specs {
			v := s.(*ast.ValueSpec)
			text, err := strconv.Unquote(v.Values[0].(*ast.BasicLit).Value)
			if err != nil {
				t.Fatal(err)
			}
			out[v.Names[0].Name] = Site(text)
		}
	}
	return out
}

func TestEveryPlaceIsListedOnce(t *testing.T) {
	names, seen := declared(t), map[Site]bool{}
	for name, site := range names {
		if seen[site] {
			t.Errorf("two places are called %s", site)
		}
		seen[site] = true
		if !slices.Contains(All(), site) {
			t.Errorf("%s is not in All: nobody would miss it", name)
		}
		if area, what, ok := strings.Cut(string(site), "/"); !ok || area == "" || what == "" {
			t.Errorf("%s is called %q, not area/what", name, site)
		}
	}
	if len(All()) != len(names) || len(names) < 25 {
		t.Errorf("%d places are listed and %d declared", len(All()), len(names))
	}
}

// A place that no code passes cannot be hit, and one that stands in many places is not one.
func TestEveryPlaceStandsInTheCodeOnce(t *testing.T) {
	count := map[string]int{}
	err := filepath.WalkDir("../..", func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && (d.Name() == "failpoint" || d.Name() == "nodetest" || d.Name() == "deploy" || d.Name() != ".." && strings.HasPrefix(d.Name(), ".") && path != "../.."):
			return filepath.SkipDir
		case !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go"):
			return nil
		}
		raw, err := os.ReadFile(path)
		for name := range declared(t) {
			for _, after := range []string{",", "\n", ")"} {
				count[name] += strings.Count(string(raw), "failpoint."+name+after)
			}
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	for name := range declared(t) {
		if count[name] != 1 {
			t.Errorf("%s stands in %d places of the product", name, count[name])
		}
	}
}
