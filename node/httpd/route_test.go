package httpd

import "testing"

func TestTheMostSpecificPatternServesAPath(t *testing.T) {
	patterns := []string{
		"sys/mounts", "sys/mounts/{path...}", "sys/mounts/{path...}/tune", "sys/plugins/reload/backend",
		"sys/plugins/reload/backend/status", "sys/plugins/reload/{type}/{name}", "sys/plugins/catalog/{type}",
		"sys/plugins/catalog/{type}/{name}", "sys/reloads/{id}",
	}
	var routes []*route
	for _, p := range patterns {
		routes = append(routes, &route{pattern: p})
	}
	tab := newTable(routes)
	for path, want := range map[string]string{
		"sys/mounts":                        "sys/mounts",
		"sys/mounts/":                       "sys/mounts",
		"sys/mounts/kv":                     "sys/mounts/{path...}",
		"sys/mounts/team/kv/tune":           "sys/mounts/{path...}/tune",
		"sys/plugins/reload/backend":        "sys/plugins/reload/backend",
		"sys/plugins/reload/backend/status": "sys/plugins/reload/backend/status",
		"sys/plugins/reload/secret/kv":      "sys/plugins/reload/{type}/{name}",
		"sys/plugins/catalog/secret/":       "sys/plugins/catalog/{type}",
		"sys/reloads/1":                     "sys/reloads/{id}",
		"sys/reloads/1/2":                   "",
		"sys/nope":                          "",
	} {
		got := ""
		if r, _ := tab.find(path); r != nil {
			got = r.pattern
		}
		if got != want {
			t.Errorf("%s is served by %q, want %q", path, got, want)
		}
	}
	if _, params := tab.find("sys/mounts/team/kv/tune"); params["path"] != "team/kv" {
		t.Errorf("captured %v", params)
	}
}
