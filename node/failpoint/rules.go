//go:build failpoints

package failpoint

import (
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"rollcall/node/fault"
)

// Error makes a hit fail with fault.Unavailable and the text.
func Error(text string) Action {
	return func(e Event) error {
		return fault.New(fault.Unavailable, "failpoint "+string(e.Site), e.Node, "%s", text)
	}
}

// Sleep holds a hit up.
func Sleep(d time.Duration) Action {
	return func(Event) error { time.Sleep(d); return nil }
}

// Pause holds hits up until release is closed.
func Pause(release <-chan struct{}) Action {
	return func(Event) error { <-release; return nil }
}

// Panic panics at a hit.
func Panic() Action {
	return func(e Event) error { panic(fmt.Sprintf("failpoint %s on %s", e.Site, e.Node)) }
}

// Kill ends the process as a power cut would: SIGKILL to itself, and nothing after it runs.
func Kill() Action {
	return func(Event) error {
		if self, err := os.FindProcess(os.Getpid()); err == nil {
			_ = self.Kill()
		}
		select {}
	}
}

// Parse reads rules as EnvRules holds them: SITE[@NODE]=ACTION[,nth=N][,after=SITE], several with ";" between them.
// ACTION is error, error(TEXT), sleep(DURATION), pause (for ever), panic or kill.
func Parse(text string) ([]Rule, error) {
	var rules []Rule
	for part := range strings.SplitSeq(text, ";") {
		if part = strings.TrimSpace(part); part == "" {
			continue
		}
		r, err := parseRule(part)
		if err != nil {
			return nil, fault.As(fault.Invalid, err, "parse failpoint", part)
		}
		rules = append(rules, r)
	}
	return rules, nil
}

func parseRule(text string) (Rule, error) {
	place, rest, ok := strings.Cut(text, "=")
	if !ok {
		return Rule{}, fmt.Errorf("it has no =: a rule is site[@node]=action")
	}
	var r Rule
	site, node, _ := strings.Cut(place, "@")
	r.Site, r.Node = Site(site), node
	if err := known(r.Site); err != nil {
		return r, err
	}
	words := strings.Split(rest, ",")
	for _, w := range words[1:] {
		key, value, _ := strings.Cut(w, "=")
		var err error
		switch key {
		case "nth":
			r.Nth, err = strconv.Atoi(value)
			if err == nil && r.Nth < 1 {
				err = fmt.Errorf("nth counts from 1")
			}
		case "after":
			r.After = Site(value)
			err = known(r.After)
		default:
			err = fmt.Errorf("%q is neither nth= nor after=", w)
		}
		if err != nil {
			return r, err
		}
	}
	var err error
	r.Do, err = parseAction(words[0])
	return r, err
}

func known(s Site) error {
	if !slices.Contains(All(), s) {
		return fmt.Errorf("there is no place %q", s)
	}
	return nil
}

func parseAction(text string) (Action, error) {
	word, rest, _ := strings.Cut(text, "(")
	arg := strings.TrimSuffix(rest, ")")
	switch word {
	case "error":
		if arg == "" {
			arg = "it is to fail here"
		}
		return Error(arg), nil
	case "sleep":
		d, err := time.ParseDuration(arg)
		return Sleep(d), err
	case "pause":
		return Pause(nil), nil
	case "panic":
		return Panic(), nil
	case "kill":
		return Kill(), nil
	default:
		return nil, fmt.Errorf("%q is none of error, sleep, pause, panic, kill", text)
	}
}
