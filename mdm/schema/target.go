package schema

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
)

// The platforms, as Apple's schemas name them.
const (
	IOS      = "iOS" // and iPadOS
	MacOS    = "macOS"
	TVOS     = "tvOS"
	VisionOS = "visionOS"
	WatchOS  = "watchOS"
)

// Target is the receiver of a command. Empty fields are not known.
type Target struct {
	Platform  string
	OSVersion string
	// User: the user channel, and not the device channel.
	User bool
	// UserEnrollment: the device is its user's own.
	UserEnrollment bool
}

// Platform returns the platform of a device by the first of its names that
// says so, such as the product name MacBookPro18,3; nothing if none does.
func Platform(names ...string) string {
	for _, name := range names {
		for platform, prefixes := range map[string][]string{
			MacOS: {"Mac", "iMac", "VirtualMac", "ADP3"}, IOS: {"iPhone", "iPad", "iPod"}, TVOS: {"AppleTV", "Apple TV"},
			VisionOS: {"RealityDevice"}, WatchOS: {"Watch"},
		} {
			if slices.ContainsFunc(prefixes, func(p string) bool { return strings.HasPrefix(name, p) }) {
				return platform
			}
		}
	}
	return ""
}

// CheckTarget says why a receiver cannot take a request type, and nothing if
// it can or if that is not known.
func CheckTarget(requestType string, t Target) string {
	c := Find(requestType)
	if c == nil {
		return ""
	}
	s, described := c.Platforms[t.Platform]
	if !described {
		return c.checkChannel(t)
	}
	switch {
	case s.Never:
		return t.Platform + " does not have it"
	case older(t.OSVersion, s.Introduced):
		return fmt.Sprintf("%s has it from %s on, and the device has %s", t.Platform, s.Introduced, t.OSVersion)
	case s.Removed != "" && t.OSVersion != "" && !older(t.OSVersion, s.Removed):
		return fmt.Sprintf("%s has it until %s, and the device has %s", t.Platform, s.Removed, t.OSVersion)
	}
	return s.checkChannel(t)
}

func (s *Support) checkChannel(t Target) string {
	switch {
	case t.User && s.NoUserChannel:
		return "it is not for the user channel"
	case !t.User && s.NoDeviceChannel:
		return "it is for the user channel alone"
	case t.UserEnrollment && s.NoUserEnrollment:
		return "User Enrollment does not allow it"
	}
	return ""
}

// checkChannel is for a device whose platform is not known: no platform that
// has the command takes it there.
func (c *Command) checkChannel(t Target) string {
	why := ""
	for platform, s := range c.Platforms {
		hasUsers := platform == MacOS || platform == IOS
		if s.Never || t.User && !hasUsers {
			continue
		}
		if why = s.checkChannel(t); why == "" {
			return ""
		}
	}
	return why
}

// older says whether a version is before another; false if either is not
// known.
func older(version, than string) bool {
	order, ok := CompareVersions(version, than)
	return ok && order < 0
}

// CompareVersions compares two versions by their numbers. It is not ok if one
// of them is no version.
func CompareVersions(a, b string) (order int, ok bool) {
	numbersA, okA := numbers(a)
	numbersB, okB := numbers(b)
	return slices.Compare(numbersA, numbersB), okA && okB
}

// numbers reads a version such as 10.15.7 without zeros at its end.
func numbers(version string) (list []int, ok bool) {
	for part := range strings.SplitSeq(version, ".") {
		n, err := strconv.Atoi(part)
		if err != nil || n < 0 {
			return nil, false
		}
		list = append(list, n)
	}
	for len(list) > 1 && list[len(list)-1] == 0 {
		list = list[:len(list)-1]
	}
	return list, true
}

// TargetCheck gathers the receivers that cannot take a request type.
type TargetCheck struct {
	requestType string
	unable      map[string]*unable // by reason
}

// unable counts receivers that cannot take a command for one reason.
type unable struct {
	count   int
	example string
}

// NewTargetCheck makes a check without receivers.
func NewTargetCheck(requestType string) *TargetCheck {
	return &TargetCheck{requestType: requestType, unable: make(map[string]*unable)}
}

// Add checks one receiver.
func (c *TargetCheck) Add(name string, t Target) {
	why := CheckTarget(c.requestType, t)
	if why == "" {
		return
	}
	if c.unable[why] == nil {
		c.unable[why] = &unable{example: name}
	}
	c.unable[why].count++
}

// Findings returns a sentence for each reason, in order.
func (c *TargetCheck) Findings() []string {
	var list []string
	for _, why := range slices.Sorted(maps.Keys(c.unable)) {
		u := c.unable[why]
		whom := u.example
		if u.count > 1 {
			whom = fmt.Sprintf("%d enrollments, such as %s", u.count, u.example)
		}
		list = append(list, fmt.Sprintf("%s: %s: %s", c.requestType, why, whom))
	}
	return list
}
