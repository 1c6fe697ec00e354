package main

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"
)

// Phases of a run, in order.
const (
	phaseCerts    = "push certificates"
	phaseCommands = "commands"
	phaseDevices  = "devices"
)

// overlap is how far back a second run looks behind the begin of the first
// one: the clocks of this machine and of the source may differ.
const overlap = 5 * time.Minute

// state is how far a run came. It holds no secrets.
type state struct {
	// Between names the source and the target by a hash of the flags.
	Between string `json:"between"`
	// Begun is when the current run, or the last one, began.
	Begun time.Time `json:"begun"`
	// Since is what the current run leaves out as older.
	Since time.Time `json:"since"`
	Phase string    `json:"phase"`
	// After is the key of the last device or command that is in the target.
	After string `json:"after"`
	Done  bool   `json:"done"`

	path    string
	savedAt time.Time
}

// loadState reads the state of a run between the same source and target. A
// run that ended gives the time that the next one goes on from.
func loadState(o *options, now time.Time) (*state, error) {
	sum := sha256.Sum256([]byte(fmt.Sprintf("%q", []string{o.source.Kind, o.source.DSN, o.to, o.toDSN, o.url, o.history})))
	s := &state{Between: hex.EncodeToString(sum[:]), Begun: now, Phase: phaseCerts, path: o.state}
	data, err := os.ReadFile(o.state)
	if errors.Is(err, fs.ErrNotExist) || o.full || o.check || o.dryRun {
		return s, nil
	}
	if err != nil {
		return nil, err
	}
	was := state{}
	if err := json.Unmarshal(data, &was); err != nil {
		return nil, fmt.Errorf("%s is no state of a run: %w", o.state, err)
	}
	if was.Between != s.Between {
		return nil, fmt.Errorf("%s is of a run with another source, target or history: name another file with -state, or remove it", o.state)
	}
	if was.Done {
		s.Since = was.Begun.Add(-overlap)
		return s, nil
	}
	was.path = o.state
	return &was, nil
}

// reached notes how far the run came, at most once a second.
func (s *state) reached(phase, after string, now time.Time) error {
	turned := phase != s.Phase
	s.Phase, s.After = phase, after
	if !turned && now.Sub(s.savedAt) < time.Second {
		return nil
	}
	s.savedAt = now
	return s.save()
}

func (s *state) save() error {
	data, err := json.Marshal(s)
	if err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(s.path), ".nano2nano-*")
	if err != nil {
		return fmt.Errorf("writing the state of the run: %w", err)
	}
	defer os.Remove(f.Name())
	_, err = f.Write(data)
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return fmt.Errorf("writing the state of the run: %w", err)
	}
	return os.Rename(f.Name(), s.path)
}
