package mdmtest

import (
	"bytes"
	"fmt"
	"slices"
)

// answer carries out a command, as far as a simulated device can, unless the
// device's Behaviour decides otherwise.
func (c *Channel) answer(command *Command) report {
	var told Answer
	if behaviour := c.device.cfg.Behaviour; behaviour != nil {
		told = behaviour(command)
	}
	r := report{status: told.Status, uuid: command.UUID, chain: told.ErrorChain, extra: told.Payload, command: command}
	if told.Status != "" && told.Status != StatusAcknowledged {
		return r
	}
	r.status = StatusAcknowledged
	if told.Payload != nil {
		return r
	}
	var p Plist
	switch err := c.execute(command, &p).(type) {
	case nil:
		r.extra = p.Content()
	case *refusal:
		r.status, r.chain = StatusError, []ErrorItem{err.item}
	default:
		r.status = StatusCommandFormatError
		r.chain = []ErrorItem{{Code: 12000, Domain: "MCMDMErrorDomain", Description: err.Error()}}
	}
	return r
}

// refusal is a command that was understood and failed.
type refusal struct{ item ErrorItem }

func (r *refusal) Error() string { return r.item.Description }

// execute adds the keys of the reply. Request types without keys of their own
// are acknowledged, known or not: a device of the future knows more of them.
func (c *Channel) execute(command *Command, p *Plist) error {
	switch command.RequestType {
	case "DeviceInformation":
		return c.deviceInformation(command, p)
	case "InstallProfile":
		return c.installProfile(command)
	case "RemoveProfile":
		return c.removeProfile(command)
	case "Settings":
		return c.settings(command, p)
	case "ProfileList":
		c.profileList(p)
	case "InstalledApplicationList":
		c.installedApplicationList(p)
	case "CertificateList":
		c.certificateList(p)
	case "SecurityInfo":
		c.securityInfo(p)
	case "DeviceLock":
		p.String("MessageResult", "Success")
	case "UserList":
		c.userList(p)
	case "ProvisioningProfileList", "AvailableOSUpdates", "OSUpdateStatus":
		p.Array(command.RequestType, func(*Plist) {})
	case "ManagedApplicationList", "Restrictions":
		key := command.RequestType
		if key == "Restrictions" {
			key = "GlobalRestrictions"
		}
		p.Dict(key, func(*Plist) {})
	}
	return nil
}

func (c *Channel) deviceInformation(command *Command, p *Plist) error {
	var query struct {
		Command struct{ Queries []string }
	}
	if err := decodeXML(command.Raw, &query); err != nil {
		return err
	}
	d, m := c.device, c.device.model()
	personal := d.cfg.Kind == UserEnrollment
	known := []struct {
		name string
		add  func(p *Plist, name string)
	}{
		{"UDID", func(p *Plist, name string) {
			if !personal {
				p.String(name, d.cfg.UDID)
			}
		}},
		{"SerialNumber", func(p *Plist, name string) {
			if !personal {
				p.String(name, d.cfg.Serial)
			}
		}},
		{"DeviceName", text(m.deviceName)},
		{"OSVersion", text(m.osVersion)},
		{"BuildVersion", text(m.build)},
		{"ModelName", text(m.modelName)},
		{"Model", text(m.model)},
		{"ProductName", text(m.product)},
		{"IMEI", func(p *Plist, name string) { p.OptionalString(name, m.imei) }},
		{"IsSupervised", truth(!personal)},
		{"IsActivationLockEnabled", truth(false)},
		{"IsMDMLostModeEnabled", truth(false)},
		{"IsMultiUser", truth(d.cfg.Kind == SharedIPad)},
		{"AwaitingConfiguration", truth(false)},
		{"DeviceCapacity", func(p *Plist, name string) { p.Real(name, 494.38) }},
		{"AvailableDeviceCapacity", func(p *Plist, name string) { p.Real(name, 311.25) }},
		{"BatteryLevel", func(p *Plist, name string) { p.Real(name, 0.87) }},
		{"HostName", text("simulated.local")},
		{"LocalHostName", text("simulated")},
		{"WiFiMAC", text("02:00:00:00:00:01")},
		{"BluetoothMAC", text("02:00:00:00:00:02")},
	}
	p.Dict("QueryResponses", func(p *Plist) {
		for _, item := range known {
			if len(query.Command.Queries) == 0 || slices.Contains(query.Command.Queries, item.name) {
				item.add(p, item.name)
			}
		}
	})
	return nil
}

func text(value string) func(*Plist, string) {
	return func(p *Plist, name string) { p.String(name, value) }
}

func truth(value bool) func(*Plist, string) {
	return func(p *Plist, name string) { p.Bool(name, value) }
}

func (c *Channel) installProfile(command *Command) error {
	var install struct {
		Command struct{ Payload []byte }
	}
	if err := decodeXML(command.Raw, &install); err != nil {
		return err
	}
	var content struct{ PayloadIdentifier, PayloadDisplayName, PayloadUUID string }
	if err := decodeXML(unwrapProfile(install.Command.Payload), &content); err != nil || content.PayloadIdentifier == "" {
		return &refusal{ErrorItem{Code: 1000, Domain: "MCProfileErrorDomain", Description: "Invalid profile"}}
	}
	installed := profile{content.PayloadIdentifier, content.PayloadDisplayName, content.PayloadUUID}
	c.mu.Lock()
	defer c.mu.Unlock()
	for i := range c.profiles {
		if c.profiles[i].identifier == installed.identifier {
			c.profiles[i] = installed
			return nil
		}
	}
	c.profiles = append(c.profiles, installed)
	return nil
}

// unwrapProfile finds the property list inside a signed profile. A simulated
// device does not check who signed it.
func unwrapProfile(payload []byte) []byte {
	start, end := bytes.Index(payload, []byte("<?xml")), bytes.LastIndex(payload, []byte("</plist>"))
	if start < 0 || end < start {
		return payload
	}
	return payload[start : end+len("</plist>")]
}

func (c *Channel) removeProfile(command *Command) error {
	var remove struct {
		Command struct{ Identifier string }
	}
	if err := decodeXML(command.Raw, &remove); err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	count := len(c.profiles)
	c.profiles = slices.DeleteFunc(c.profiles, func(p profile) bool {
		return p.identifier == remove.Command.Identifier
	})
	if len(c.profiles) == count {
		return &refusal{ErrorItem{
			Code: 89, Domain: "MDMErrorDomain",
			Description: fmt.Sprintf("Profile with identifier '%s' not found.", remove.Command.Identifier),
		}}
	}
	return nil
}

func (c *Channel) settings(command *Command, p *Plist) error {
	var settings struct {
		Command struct {
			Settings []struct{ Item string }
		}
	}
	if err := decodeXML(command.Raw, &settings); err != nil {
		return err
	}
	p.Array("Settings", func(p *Plist) {
		for _, setting := range settings.Command.Settings {
			p.DictItem(func(p *Plist) {
				p.String("Item", setting.Item)
				p.String("Status", string(StatusAcknowledged))
			})
		}
	})
	return nil
}

func (c *Channel) profileList(p *Plist) {
	c.mu.Lock()
	defer c.mu.Unlock()
	p.Array("ProfileList", func(p *Plist) {
		for _, installed := range c.profiles {
			p.DictItem(func(p *Plist) {
				p.Bool("HasRemovalPasscode", false)
				p.Bool("IsEncrypted", false)
				p.Bool("IsManaged", true)
				p.Array("PayloadContent", func(*Plist) {})
				p.String("PayloadDisplayName", installed.displayName)
				p.String("PayloadIdentifier", installed.identifier)
				p.Bool("PayloadRemovalDisallowed", false)
				p.String("PayloadUUID", installed.uuid)
				p.Int("PayloadVersion", 1)
			})
		}
	})
}

func (c *Channel) installedApplicationList(p *Plist) {
	p.Array("InstalledApplicationList", func(p *Plist) {
		for i := range c.device.cfg.Apps {
			p.DictItem(func(p *Plist) {
				p.Int("BundleSize", int64(1_000_000+i))
				p.String("Identifier", fmt.Sprintf("com.example.app%d", i))
				p.String("Name", fmt.Sprintf("App & Tool %d", i))
				p.String("ShortVersion", "1.0")
				p.String("Version", fmt.Sprintf("1.0.%d", i))
			})
		}
	})
}

func (c *Channel) certificateList(p *Plist) {
	cert := c.device.identity.Cert
	p.Array("CertificateList", func(p *Plist) {
		p.DictItem(func(p *Plist) {
			p.String("CommonName", cert.Subject.CommonName)
			p.Data("Data", cert.Raw)
			p.Bool("IsIdentity", true)
		})
	})
}

func (c *Channel) securityInfo(p *Plist) {
	p.Dict("SecurityInfo", func(p *Plist) {
		switch c.device.cfg.Kind {
		case Mac, UserEnrollment:
			p.Bool("FDE_Enabled", true)
			p.Bool("FDE_HasPersonalRecoveryKey", true)
			p.Bool("SystemIntegrityProtectionEnabled", true)
			p.Dict("FirewallSettings", func(p *Plist) { p.Bool("FirewallEnabled", true) })
		default:
			p.Int("HardwareEncryptionCaps", 3)
			p.Bool("PasscodeCompliant", true)
			p.Bool("PasscodePresent", true)
		}
	})
}

func (c *Channel) userList(p *Plist) {
	d := c.device
	d.mu.Lock()
	var names []string
	for name := range d.users {
		names = append(names, name)
	}
	d.mu.Unlock()
	slices.Sort(names)
	p.Array("Users", func(p *Plist) {
		for _, name := range names {
			p.DictItem(func(p *Plist) {
				p.String("UserName", name)
				p.Bool("HasDataToSync", false)
				p.Bool("IsLoggedIn", true)
			})
		}
	})
}
