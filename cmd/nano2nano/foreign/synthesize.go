package foreign

import (
	"time"

	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/storage"
)

// SynthesizedKey marks a check-in that no device sent: it was made from what
// the source keeps of it.
const SynthesizedKey = "NanoMDMSynthesized"

// synthesize makes the check-ins of a device whose source keeps none.
func (s *microMDM) synthesize(d *storage.DeviceRecord, at time.Time) {
	identity := map[string]any{}
	if d.Channel.Type == mdm.UserEnrollmentDevice {
		identity["EnrollmentID"] = d.Channel.ID
	} else {
		identity["UDID"] = d.Channel.ID
	}
	a := map[string]any{"Topic": d.Channel.Topic, "SerialNumber": d.SerialNumber, "OSVersion": d.OSVersion, "BuildVersion": d.BuildVersion,
		"ProductName": d.ProductName, "DeviceName": d.DeviceName, "Model": d.Model, "ModelName": d.ModelName, "IMEI": d.IMEI, "MEID": d.MEID}
	for k, v := range identity {
		a[k] = v
	}
	d.Authenticate = storage.Checkin{Raw: synthesized("Authenticate", a), At: at}
	if len(d.Channel.Token) == 0 {
		return
	}
	update := tokenUpdateOf(&d.Channel, identity)
	if len(d.UnlockToken.Value) > 0 {
		update["UnlockToken"] = d.UnlockToken.Value
	}
	d.TokenUpdate = storage.Checkin{Raw: synthesized("TokenUpdate", update), At: at}
}

func tokenUpdateOf(c *storage.ChannelRecord, identity map[string]any) map[string]any {
	update := map[string]any{"Topic": c.Topic, "Token": c.Token, "PushMagic": c.PushMagic, "AwaitingConfiguration": c.AwaitingConfiguration}
	for k, v := range identity {
		update[k] = v
	}
	return update
}

// synthesized encodes a check-in without its empty values.
func synthesized(kind string, values map[string]any) []byte {
	m := map[string]any{"MessageType": kind, SynthesizedKey: true}
	for k, v := range values {
		if text, ok := v.(string); ok && text == "" {
			continue
		}
		m[k] = v
	}
	raw, err := mdm.EncodePlist(m)
	if err != nil { // there are no other kinds of values
		panic(err)
	}
	return raw
}
