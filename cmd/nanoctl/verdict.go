package main

import (
	"fmt"
	"time"
)

// answerTime is how long a device may take to answer a push before it is said
// to be silent; the server has the same.
const answerTime = 2 * time.Minute

// awaiting says whether APNs took the last push and the device has not come
// since.
func (x *enrollment) awaiting() bool {
	p := x.Push
	return p != nil && p.LastClass == "accepted" && p.LastAt != nil && (x.LastSeenAt == nil || p.LastAt.After(*x.LastSeenAt))
}

// verdict says in a line how an enrollment is.
func (x *enrollment) verdict() (string, tone) {
	last := "last answered " + ago(x.LastSeenAt)
	waits := fmt.Sprintf("%d commands wait", x.waiting())
	if x.waiting() == 1 {
		waits = "1 command waits"
	}
	switch p := x.Push; {
	case x.OperatorDisabled:
		return "disabled by an operator: no commands, no pushes", bad
	case !x.Enabled:
		return "not enrolled; " + last, bad
	case p != nil && p.TokenDeadAt != nil:
		return "cannot be woken: its push token is dead; " + last, bad
	case x.awaiting() && time.Since(*p.LastAt) < answerTime:
		return "woken " + ago(p.LastAt) + ", no answer yet; " + last, notice
	case x.awaiting() && x.waiting() > 0:
		return "silent: woken " + ago(p.LastAt) + ", no answer; " + waits + "; " + last, bad
	case p != nil && p.LastClass != "" && p.LastClass != "accepted":
		return "cannot be woken: " + x.pushed() + "; " + last, bad
	case x.waiting() > 0 && x.Queue.NotNow > 0:
		return waits + fmt.Sprintf(", %d put off (NotNow); ", x.Queue.NotNow) + last, notice
	case x.waiting() > 0:
		return waits + "; " + last, notice
	case len(x.Diagnosis) > 0:
		return "nothing waits; see below; " + last, notice
	}
	return "well: nothing waits; " + last, good
}

// pushed is what became of the last push: the device answered it, APNs alone
// accepted it, or not even that.
func (x *enrollment) pushed() string {
	p := x.Push
	switch {
	case p == nil:
		return ""
	case p.TokenDeadAt != nil:
		return "token dead"
	case p.LastClass == "" && p.Owed:
		return "owed"
	case x.awaiting():
		return "accepted"
	case p.LastClass == "accepted":
		return "answered"
	case p.LastReason != "":
		return p.LastClass + ": " + p.LastReason
	}
	return p.LastClass
}
