//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"time"
)

const (
	// clockOff is how wrong the clocks of replicas are, in turn: behind, ahead,
	// right.
	clockOff = 10 * time.Minute
	// clockBound is the difference that the store may have from the database's
	// clock, which is the reference: below a second it is not corrected.
	clockBound = 2 * time.Second
	// lateBound is how late a device that is awake may be offered a scheduled
	// command while replicas are killed: a lease has to change its holder.
	lateBound = 50 * time.Second
)

// wrongClocks is the environment of replicas whose clocks differ.
func wrongClocks(replica int) []string {
	offset := []time.Duration{-clockOff, clockOff, 0}[replica%3]
	return []string{"MDMCHAOS_CLOCK_OFFSET=" + strconv.Itoa(int(offset.Seconds()))}
}

// timing is what a call says about time, and what has to follow. The reference
// is the clock of this machine, which is the database's, too.
type timing struct {
	notBefore time.Time     // zero: at once
	expires   time.Duration // from notBefore or the call on; zero: never
	unwanted  bool          // its devices sleep until it expired
}

// planTimes makes calls with times: commands for devices that are awake,
// scheduled, some of them with an end that is not reached, and commands that
// expire before their device wakes up.
func planTimes(awake, asleep []string) func(o *operator, c *call) {
	return func(o *operator, c *call) {
		seconds := func(low, high int) time.Duration { return time.Duration(low+o.rng.IntN(high-low)) * time.Second }
		if o.rng.IntN(3) == 0 {
			c.timing = &timing{expires: seconds(5, 20), unwanted: true}
			c.ids = asleep
			return
		}
		c.timing = &timing{notBefore: time.Now().Add(seconds(2, 20)).UTC()}
		if o.rng.IntN(2) == 0 {
			c.timing.expires = clockOff / 2
		}
		c.ids = []string{awake[o.rng.IntN(len(awake))]}
	}
}

// enqueueOptions are the options of the call in the API.
func (t *timing) enqueueOptions() map[string]any {
	options := make(map[string]any)
	if t == nil {
		return options
	}
	if !t.notBefore.IsZero() {
		options["not_before"] = t.notBefore.Format(time.RFC3339Nano)
	}
	if t.expires != 0 {
		options["expires_after"] = t.expires.String()
	}
	return options
}

// end is the latest time at which the command may be offered; zero is any.
func (c *call) end() time.Time {
	switch {
	case c.timing == nil || c.timing.expires == 0:
		return time.Time{}
	case !c.timing.notBefore.IsZero():
		return c.timing.notBefore.Add(c.timing.expires)
	}
	return c.accepted.Add(c.timing.expires)
}

// punctuality are the extremes of all scheduled commands.
type punctuality struct {
	offered, expired int
	early, late      time.Duration
}

func (p *punctuality) String() string {
	return fmt.Sprintf("%d scheduled commands offered, at most %v early and %v late; %d expired",
		p.offered, p.early.Round(time.Millisecond), p.late.Round(time.Millisecond), p.expired)
}

// checkTimes compares the offers to one device with the times of its calls.
func (p *punctuality) checkTimes(found *findings, id string, d *deviceHistory, calls []*call, snap *snapshot) {
	for _, c := range calls {
		if c.timing == nil || !c.acknowledged[id] || cleared(d, c) {
			continue
		}
		first := slices.IndexFunc(d.offers, func(o offer) bool { return o.uuid == c.uuid })
		switch {
		case c.timing.unwanted:
			if first >= 0 {
				found.add("%s: %s was offered, %v after it expired", id, c.marker, d.offers[first].at.Sub(c.end()).Round(time.Millisecond))
			}
			if state := snap.states[c.uuid]; state != "expired" {
				found.add("%s: %s has expired, and is %q", id, c.marker, state)
			} else {
				p.expired++
			}
		case first < 0:
			found.add("%s: %s was due at %v and was never offered: it is %q", id, c.marker, c.timing.notBefore.Format("15:04:05"), snap.states[c.uuid])
		default:
			late := d.offers[first].at.Sub(c.timing.notBefore)
			p.offered, p.early, p.late = p.offered+1, max(p.early, -late), max(p.late, late)
			if late < -clockBound || late > lateBound {
				found.add("%s: %s was offered %v after its time", id, c.marker, late.Round(time.Millisecond))
			}
		}
	}
}

// sleep lets some devices ignore pushes until wakeAll. The others are awake.
func (f *fleet) sleep() (awake, asleep []string) {
	for i, s := range f.devices {
		switch {
		case s.restless: // its queue is cleared
		case i%4 == 1:
			s.asleep = make(chan struct{})
			asleep = append(asleep, s.id)
		default:
			awake = append(awake, s.id)
		}
	}
	return awake, asleep
}

// wakeAll wakes sleeping devices up, and has them poll.
func (f *fleet) wakeAll() {
	for _, s := range f.devices {
		if s.asleep != nil {
			close(s.asleep)
		}
	}
}

// awaitEnds waits until all that had to expire has: the last end has passed, and
// some time for the sweep that notes it.
func (w *world) awaitEnds(ctx context.Context) error {
	return await(ctx, time.Minute+lateBound, "the last command to expire", func() error {
		w.history.mu.Lock()
		defer w.history.mu.Unlock()
		for _, c := range w.history.calls {
			if c.timing != nil && c.timing.unwanted && time.Since(c.end()) < lateBound/2 {
				return errors.New(c.marker + " expires later")
			}
		}
		return nil
	})
}

// killOne kills one replica and lets the others take its leases over.
func killOne(ctx context.Context, w *world) error {
	if err := killReplica(ctx, w); err != nil {
		return err
	}
	return w.between(ctx, 20*time.Second, 25*time.Second)
}
