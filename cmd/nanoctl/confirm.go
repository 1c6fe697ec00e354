package main

import (
	"bufio"
	"errors"
	"fmt"
	"strings"

	"github.com/nanomdm/nanomdm/mdm"
)

// askAbove is how many enrollments a change may touch before nanoctl asks.
const askAbove = 100

var errDeclined = &exitError{exitDeclined, errors.New("not confirmed; nothing was done")}

// risk is how far a command can be undone.
type risk int

const (
	harmless   risk = iota // asked about only if it goes to many
	disruptive             // asked about with yes or no
	dangerous              // asked about with words that have to be typed
)

// riskOf returns the risk of a request type and, if it is dangerous, the word
// that has to be typed.
func riskOf(requestType string) (risk, string) {
	switch requestType {
	case "EraseDevice":
		return dangerous, "erase"
	case "DeviceLock", "EnableLostMode":
		return dangerous, "lock"
	case "ClearPasscode", "ClearRestrictionsPassword":
		return dangerous, "clear"
	case "RemoveProfile": // the profile of the management may be the one
		return dangerous, "remove"
	case "RotateFileVaultKey", "SetFirmwarePassword", "SetRecoveryLock", "SetAutoAdminPassword", "DeleteUser", "LogOutUser",
		"RestartDevice", "ShutDownDevice", "RemoveProvisioningProfile", "RemoveApplication", "RemoveMedia":
		return disruptive, ""
	}
	return harmless, ""
}

// confirmCommand asks before a command that is more than harmless, or that
// goes to many.
func (e *env) confirmCommand(cmd *mdm.Command, chosen []enrollment) error {
	switch r, word := riskOf(cmd.RequestType); r {
	case dangerous:
		return e.confirmTyped(word, cmd.RequestType+" goes to", chosen)
	case disruptive:
		return e.confirm("%s goes to %s.", cmd.RequestType, summarize(chosen))
	}
	return e.confirmMany(len(chosen), cmd.RequestType+" goes to")
}

// confirm asks for yes or no. Without a person at the terminal it declines,
// unless -yes was given.
func (e *env) confirm(format string, args ...any) error {
	if e.yes {
		return nil
	}
	line, err := e.prompt(fmt.Sprintf(format, args...)+" Go on? [y/N] ", "-yes goes on without asking")
	if err != nil {
		return err
	}
	switch strings.ToLower(line) {
	case "y", "yes":
		return nil
	}
	return errDeclined
}

// confirmMany asks if something is done to many.
func (e *env) confirmMany(n int, what string) error {
	if n <= askAbove {
		return nil
	}
	return e.confirm("%s %d enrollments.", what, n)
}

// confirmTyped asks for words that nobody types by habit: the serial number of
// one device, or word and number of several. The flag -confirm answers in a
// script; -yes does not.
func (e *env) confirmTyped(word, what string, chosen []enrollment) error {
	want := fmt.Sprintf("%s %d", word, len(chosen))
	if len(chosen) == 1 {
		want = chosen[0].ID
		if chosen[0].Serial != "" {
			want = chosen[0].Serial
		}
	}
	given := e.confirmation
	if given == "" {
		var err error
		given, err = e.prompt(fmt.Sprintf("%s %s. This cannot be undone.\nType %s to go on: ", what, summarize(chosen), printable(want)),
			fmt.Sprintf("in a script give -confirm %q", printable(want)))
		if err != nil {
			return err
		}
	}
	if given != want {
		return &exitError{exitDeclined, fmt.Errorf("%q was given where %q is needed; nothing was done", printable(given), printable(want))}
	}
	return nil
}

// prompt reads the answer to a question; instead says how a script answers.
func (e *env) prompt(question, instead string) (string, error) {
	fmt.Fprint(e.err, question)
	line, err := bufio.NewReader(e.in).ReadString('\n')
	if err != nil && line == "" {
		fmt.Fprintln(e.err)
		return "", &exitError{exitDeclined, errors.New("nobody answered, and nothing was done; " + instead)}
	}
	return strings.TrimSpace(line), nil
}
