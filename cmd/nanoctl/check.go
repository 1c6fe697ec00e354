package main

import (
	"bytes"
	"errors"
	"fmt"
	"strings"

	"github.com/smallstep/pkcs7"

	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/mdm/schema"
)

// checkCommand refuses a command that its devices are likely to refuse: it
// differs from Apple's schemas, or its profile is none.
func checkCommand(cmd *mdm.Command, chosen []enrollment) error {
	found := schema.Check(cmd)
	targets := schema.NewTargetCheck(cmd.RequestType)
	for i := range chosen {
		targets.Add(chosen[i].label(), chosen[i].target())
	}
	found = append(found, targets.Findings()...)
	if cmd.RequestType == "InstallProfile" {
		if plist, err := mdm.DecodePlist(cmd.Raw); err == nil {
			keys, _ := plist["Command"].(map[string]any)
			if payload, ok := keys["Payload"].([]byte); ok {
				if err := checkProfile(payload); err != nil {
					found = append(found, "Payload: "+err.Error())
				}
			}
		}
	}
	if len(found) == 0 {
		return nil
	}
	for i := range found {
		found[i] = printable(found[i])
	}
	return usage("%s\nNothing was queued. -force queues it all the same.", strings.Join(found, "\n"))
}

func (x *enrollment) target() schema.Target {
	return schema.Target{
		Platform: schema.Platform(x.ProductName, x.Model, x.ModelName), OSVersion: x.OSVersion,
		User:           x.DeviceID != "" && x.DeviceID != x.ID,
		UserEnrollment: strings.HasPrefix(x.Type, "User Enrollment"),
	}
}

// checkProfile says why bytes are no configuration profile. A profile is a
// property list with PayloadContent, as it is or signed.
func checkProfile(content []byte) error {
	trimmed := bytes.TrimSpace(content)
	switch {
	case len(trimmed) == 0:
		return errors.New("the profile is empty")
	case bytes.HasPrefix(trimmed, []byte("-----BEGIN")):
		return errors.New("the profile is PEM, and devices take DER: openssl pkcs7 -outform DER")
	case bytes.HasPrefix(trimmed, []byte("bplist")):
		return errors.New("the profile is a binary property list: plutil -convert xml1")
	case content[0] == 0x30:
		return checkSigned(content)
	}
	return checkProfilePlist(content)
}

// checkSigned looks at a profile in a CMS envelope; one that is encrypted for
// its device cannot be looked at.
func checkSigned(content []byte) error {
	envelope, err := pkcs7.Parse(content)
	if err != nil {
		return fmt.Errorf("the profile is neither a property list nor signed (CMS): %w", err)
	}
	if len(envelope.Content) == 0 {
		return nil
	}
	return checkProfilePlist(envelope.Content)
}

func checkProfilePlist(content []byte) error {
	profile, err := mdm.DecodePlist(content)
	if err != nil {
		return fmt.Errorf("the profile is neither a property list nor signed (CMS): %w", err)
	}
	_, plain := profile["PayloadContent"]
	_, encrypted := profile["EncryptedPayloadContent"]
	if !plain && !encrypted {
		return errors.New("the profile has no PayloadContent: it is some other property list")
	}
	return nil
}
