package check

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
)

// The files of a saved run: JSON lines, but for the first.
const (
	metaFile    = "run.json"
	historyFile = "history.jsonl"
	eventsFile  = "events.jsonl"
	faultsFile  = "faults.jsonl"
)

// Save writes the run into dir, which is made.
func (run *Run) Save(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	raw, err := json.MarshalIndent(run.Meta, "", "  ")
	if err != nil {
		return err
	}
	return errors.Join(
		os.WriteFile(filepath.Join(dir, metaFile), append(raw, '\n'), 0o644),
		writeLines(filepath.Join(dir, historyFile), run.Ops),
		writeLines(filepath.Join(dir, eventsFile), run.Events),
		writeLines(filepath.Join(dir, faultsFile), run.Faults),
	)
}

// Load reads a run that Save wrote.
func Load(dir string) (*Run, error) {
	run := &Run{}
	raw, err := os.ReadFile(filepath.Join(dir, metaFile))
	if err != nil {
		return nil, err
	}
	if err := json.Unmarshal(raw, &run.Meta); err != nil {
		return nil, fmt.Errorf("read %s: %w", metaFile, err)
	}
	if run.Ops, err = readLines[Op](filepath.Join(dir, historyFile)); err != nil {
		return nil, err
	}
	if run.Events, err = readLines[Event](filepath.Join(dir, eventsFile)); err != nil {
		return nil, err
	}
	if run.Faults, err = readLines[Fault](filepath.Join(dir, faultsFile)); err != nil {
		return nil, err
	}
	sortRun(run)
	return run, nil
}

func writeLines[T any](path string, rows []T) (err error) {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	w := bufio.NewWriterSize(f, 1<<16)
	enc := json.NewEncoder(w)
	enc.SetEscapeHTML(false)
	for i := range rows {
		if err := enc.Encode(&rows[i]); err != nil {
			return err
		}
	}
	return w.Flush()
}

func readLines[T any](path string) (rows []T, err error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	dec := json.NewDecoder(bufio.NewReaderSize(f, 1<<16))
	for {
		var row T
		switch err := dec.Decode(&row); {
		case errors.Is(err, io.EOF):
			return rows, nil
		case err != nil:
			return rows, fmt.Errorf("read line %d of %s: %w", len(rows)+1, filepath.Base(path), err)
		}
		rows = append(rows, row)
	}
}
