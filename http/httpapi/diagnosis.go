package httpapi

import (
	"fmt"
	"strings"
	"time"

	"github.com/nanomdm/nanomdm/storage"
)

const (
	// longUnseen is the longest absence of a healthy device.
	longUnseen = 7 * 24 * time.Hour
	// nearEnd and nearExpiry are the remaining times of a certificate and of a
	// command at which the diagnosis mentions their end.
	nearEnd    = 30 * 24 * time.Hour
	nearExpiry = 24 * time.Hour
	// answering is the time that a device may take to answer a push or a command.
	answering = 2 * time.Minute
)

// diagnosis explains in sentences why an enrollment is stuck; it is empty for
// one that is not.
type diagnosis struct {
	now    time.Time
	e      *storage.Enrollment
	device *storage.Enrollment // of a user channel
	head   *storage.QueueItem
	cert   *storage.PushCertInfo // for its topic; nil if there is none
	// refusals are of its requests, the newest first.
	refusals []storage.EnrollmentRefusal
	// expiredServed is Config.ExpiredServed.
	expiredServed bool

	said []string
}

func (d *diagnosis) say(format string, args ...any) {
	d.said = append(d.said, fmt.Sprintf(format, args...))
}

// sentences checks one cause after the other; those that an operator can remedy
// come first.
func (d *diagnosis) sentences() []string {
	d.said = []string{}
	d.enrollment()
	if d.e.Enabled {
		d.pushes()
		d.queue()
	}
	d.identity()
	d.refused()
	d.absence()
	return d.said
}

// stamp formats a time.
func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }

// days is an age in words.
func days(age time.Duration) string {
	if n := int(age / (24 * time.Hour)); n != 1 {
		return fmt.Sprintf("%d days", n)
	}
	return "1 day"
}

func (d *diagnosis) enrollment() {
	e := d.e
	if e.OperatorDisabled {
		d.say("An operator has disabled it: it gets no commands and is not pushed until it is enabled again.")
	}
	switch {
	case e.Enabled && e.AwaitingConfiguration:
		d.say("It waits in Setup Assistant for a DeviceConfigured command.")
	case e.Enabled:
	case d.device != nil && !d.device.Enabled:
		d.say("Its device, %s, is not enrolled.", d.device.ID)
	case d.device != nil:
		d.say("The user has not sent a TokenUpdate since the device enrolled: that comes when the user logs in.")
	case e.EnrolledAt.IsZero():
		d.say("It is not enrolled yet: it sent Authenticate at %s and no TokenUpdate.", stamp(e.BegunAt))
	case e.BegunAt.After(e.EnrolledAt):
		d.say("It began to enroll anew at %s, and has not finished with a TokenUpdate.", stamp(e.BegunAt))
	default:
		d.say("It has checked out: the profile was removed, or the device was erased. It has to enroll again.")
	}
}

func (d *diagnosis) pushes() {
	e, p := d.e, &d.e.Push
	fault := false
	switch {
	case d.cert == nil:
		fault = true
		d.say("There is no push certificate for its topic, %s: it cannot be woken.", e.Topic)
	case !d.cert.NotAfter.After(d.now):
		fault = true
		d.say("The push certificate for its topic expired at %s: it cannot be woken.", stamp(d.cert.NotAfter))
	case d.cert.LastClass == certificateFault:
		fault = true
		d.say("APNs refused the push certificate for its topic at %s: it cannot be woken.", stamp(d.cert.LastAt))
	}
	seenSince := e.LastSeenAt.After(p.LastAt)
	switch {
	case !p.TokenDeadAt.IsZero():
		d.say("APNs says that its push token is dead since %s: it is not pushed until it sends a new one.", stamp(p.TokenDeadAt))
	case p.LastAt.IsZero(), seenSince:
	case p.LastClass != storage.PushAccepted:
		if fault && p.LastClass == certificateFault {
			break
		}
		next := ""
		if p.NextAt.After(d.now) {
			next = "; the next one is planned for " + stamp(p.NextAt)
		}
		d.say("The last push, at %s, was not accepted: %s%s.", stamp(p.LastAt), pushReason(p), next)
	case p.Attempts > 0 && d.now.Sub(p.LastAt) > answering:
		times := "once"
		if p.Attempts > 1 {
			times = fmt.Sprintf("%d times, the last at %s,", p.Attempts, stamp(p.LastAt))
		}
		d.say("It was pushed %s without an answer: it is off, asleep or offline, or is not managed any more.", times)
	}
}

const certificateFault = "certificate_fault"

func pushReason(p *storage.PushState) string {
	switch {
	case p.LastReason != "" && p.LastStatus != 0:
		return fmt.Sprintf("%s (%d, %s)", p.LastReason, p.LastStatus, p.LastClass)
	case p.LastReason != "":
		return fmt.Sprintf("%s (%s)", p.LastReason, p.LastClass)
	case p.LastStatus != 0:
		return fmt.Sprintf("status %d (%s)", p.LastStatus, p.LastClass)
	}
	return p.LastClass
}

func (d *diagnosis) queue() {
	h := d.head
	if h == nil {
		return
	}
	name := h.CommandUUID
	if h.RequestType != "" {
		name = h.RequestType + " " + name
	}
	switch h.State {
	case storage.Scheduled:
		d.say("Its next command, %s, is scheduled for %s.", name, stamp(h.NotBefore))
	case storage.NotNow:
		times := "once"
		if h.NotNowCount > 1 {
			times = fmt.Sprintf("%d times", h.NotNowCount)
		}
		d.say("It has put off the command at the head of its queue, %s, %s, the last time at %s: it is locked or busy.", name, times, stamp(h.NotNowAt))
	case storage.Queued:
		// It came since, so it was offered the command.
		if d.e.LastSeenAt.Sub(h.CreatedAt) > answering && d.now.Sub(d.e.LastSeenAt) > answering {
			offered := ""
			if h.Attempts > 1 {
				offered = fmt.Sprintf(" and was offered %d times", h.Attempts)
			}
			d.say("It came at %s and has not answered the command at the head of its queue, %s, which waits since %s%s: the device may choke on it; cancelling it lets the next one through.",
				stamp(d.e.LastSeenAt), name, stamp(h.CreatedAt), offered)
		}
	}
	if !h.ExpiresAt.IsZero() && h.ExpiresAt.Sub(d.now) < nearExpiry {
		d.say("The command at the head of its queue, %s, expires at %s.", name, stamp(h.ExpiresAt))
	}
}

func (d *diagnosis) identity() {
	c := d.e.Certificate
	switch {
	case c == nil && d.e.Enabled:
		d.say("No identity certificate is pinned to it: what it sends is refused unless the server runs with -retro.")
	case c == nil || c.NotAfter.IsZero():
	case !c.NotAfter.After(d.now) && d.expiredServed:
		d.say("Its identity certificate expired at %s; it is served all the same (-expired-certificates pinned). Renew the certificate.", stamp(c.NotAfter))
	case !c.NotAfter.After(d.now):
		d.say("Its identity certificate expired at %s: what it sends is refused.", stamp(c.NotAfter))
	case c.NotAfter.Sub(d.now) < nearEnd:
		d.say("Its identity certificate expires at %s.", stamp(c.NotAfter))
	}
}

// refused says which of its requests were refused lately.
func (d *diagnosis) refused() {
	for _, r := range d.refusals {
		if d.now.Sub(r.Last) > longUnseen {
			continue
		}
		times := "once, at " + stamp(r.Last)
		if r.Count > 1 {
			times = fmt.Sprintf("%d times since %s, the last at %s", r.Count, stamp(r.First), stamp(r.Last))
		}
		switch {
		case r.Cause == storage.CauseUnreadable:
			d.say("It sent reports that cannot be read, %s: the commands ended as error with the status Unreadable, and the bytes are their results.", times)
		case r.Cause != storage.CauseForeignCertificate:
			d.say("Its requests were refused (%s), %s: %s.", r.Cause, times, strings.TrimSuffix(r.Detail, "."))
		case r.Other != "":
			d.say("One identity was shown for it and for %s, %s: it was copied from one device to the other, as Migration Assistant does. The one that it was not issued to has to enroll again.", r.Other, times)
		default:
			d.say("Its requests were refused, %s: the certificate is not the one that is pinned to it. It has to enroll again, unless a renewal window is opened.", times)
		}
	}
}

func (d *diagnosis) absence() {
	e := d.e
	switch age := d.now.Sub(e.LastSeenAt); {
	case !e.Enabled:
	case e.LastSeenAt.IsZero():
		d.say("It was never seen by this server.")
	case age > longUnseen:
		d.say("It was last seen at %s, %s ago.", stamp(e.LastSeenAt), days(age))
	}
}
