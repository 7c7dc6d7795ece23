// Command hits reads the reports that processes with failpoints have left in a directory and says which places were
// reached, and by how many processes. It fails when one of them was never hit.
package main

import (
	"bufio"
	"fmt"
	"os"
	"path/filepath"

	"rollcall/node/failpoint"
)

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: hits DIRECTORY")
		os.Exit(2)
	}
	counts, files, err := read(os.Args[1])
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	missing := 0
	for _, site := range failpoint.All() {
		note := ""
		if counts[site] == 0 {
			missing++
			note = "  NEVER HIT"
		}
		fmt.Printf("%6d  %s%s\n", counts[site], site, note)
	}
	fmt.Printf("%d places, %d processes, %d places never hit\n", len(failpoint.All()), files, missing)
	if missing > 0 {
		os.Exit(1)
	}
}

// read counts in how many files of dir each place stands.
func read(dir string) (counts map[failpoint.Site]int, files int, err error) {
	names, err := filepath.Glob(filepath.Join(dir, "*"))
	if err != nil {
		return nil, 0, err
	}
	counts = map[failpoint.Site]int{}
	for _, name := range names {
		if err := readFile(name, counts); err != nil {
			return nil, 0, err
		}
	}
	return counts, len(names), nil
}

func readFile(name string, counts map[failpoint.Site]int) error {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer f.Close() //nolint:errcheck // opened for reading
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		counts[failpoint.Site(lines.Text())]++
	}
	return lines.Err()
}
