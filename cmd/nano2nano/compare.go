package main

import (
	"bytes"
	"context"
	"fmt"
	"hash/maphash"
	"slices"

	"github.com/nanomdm/nanomdm/cmd/nano2nano/foreign"
	"github.com/nanomdm/nanomdm/storage"
)

// comparison finds what differs between both sides.
type comparison struct {
	m    *mover
	seed maphash.Seed
	seen map[uint64]bool // hashes of the ids of devices at the source
}

// compareAll reads both sides again. With -check it reads all of them and also
// counts the devices that only the target has.
func (m *mover) compareAll(ctx context.Context, total foreign.Counts) error {
	c := &comparison{m: m, seed: maphash.MakeSeed(), seen: make(map[uint64]bool)}
	m.comparing = true
	m.progress.begin("compared", total.Devices)
	err := pump(ctx, "", m.src.Devices, deviceSize, c.batch)
	if err != nil {
		return fmt.Errorf("comparing: %w", err)
	}
	m.progress.end()
	if m.state.Since.IsZero() {
		if err := c.countSurplus(ctx); err != nil {
			return fmt.Errorf("comparing: %w", err)
		}
	}
	fmt.Fprintf(m.e.out, "Compared %d devices: %d differ, %d are newer here, %d are only here.\n", len(c.seen), m.tally.differ, m.tally.newer, m.tally.surplus)
	return nil
}

func (c *comparison) batch(ctx context.Context, batch []*storage.DeviceRecord) error {
	ids := make([]string, len(batch))
	for i, d := range batch {
		ids[i] = d.Channel.ID
		c.seen[maphash.String(c.seed, d.Channel.ID)] = true
	}
	list, err := c.m.store.ExportDevices(ctx, ids)
	if err != nil {
		return err
	}
	here := make(map[string]*storage.DeviceRecord, len(list))
	for _, d := range list {
		here[d.Channel.ID] = d
	}
	for _, d := range batch {
		c.device(d, here[d.Channel.ID])
	}
	c.m.progress.step(len(batch))
	return nil
}

func (c *comparison) device(source, here *storage.DeviceRecord) {
	if here == nil {
		c.differs(source.Channel.ID, "it is not here")
		return
	}
	if spoke(here) > spoke(source) {
		c.m.tally.newer++
		return
	}
	if what := deviceDiffers(source, here); what != "" {
		c.differs(source.Channel.ID, what)
	}
}

func (c *comparison) differs(key, what string) {
	c.m.tally.differ++
	fmt.Fprintf(c.m.problems, "differs: device %s: %s\n", key, what)
}

// countSurplus counts devices that the source does not have.
func (c *comparison) countSurplus(ctx context.Context) error {
	after := ""
	for {
		ids, err := c.m.store.ExportDeviceIDs(ctx, after, 1000)
		if err != nil || len(ids) == 0 {
			return err
		}
		for _, id := range ids {
			if !c.seen[maphash.String(c.seed, id)] {
				c.m.tally.surplus++
				fmt.Fprintf(c.m.problems, "only here: device %s\n", id)
			}
		}
		after = ids[len(ids)-1]
	}
}

func spoke(d *storage.DeviceRecord) int64 {
	return max(d.Authenticate.At.UnixMicro(), d.TokenUpdate.At.UnixMicro())
}

// deviceDiffers names the first thing that differs.
func deviceDiffers(source, here *storage.DeviceRecord) string {
	for _, part := range []struct {
		what string
		same bool
	}{
		{"serial number", source.SerialNumber == here.SerialNumber},
		{"Authenticate", bytes.Equal(source.Authenticate.Raw, here.Authenticate.Raw)},
		{"TokenUpdate", bytes.Equal(source.TokenUpdate.Raw, here.TokenUpdate.Raw)},
		{"unlock token", bytes.Equal(source.UnlockToken.Value, here.UnlockToken.Value)},
		{"bootstrap token", bytes.Equal(source.BootstrapToken.Value, here.BootstrapToken.Value)},
		{"certificate pins", samePins(source.Pins, here.Pins)},
		{"tags", !slices.ContainsFunc(source.Tags, func(tag string) bool { return !slices.Contains(here.Tags, tag) })},
		{"number of users", len(source.Users) == len(here.Users)},
	} {
		if !part.same {
			return part.what
		}
	}
	if what := channelDiffers(&source.Channel, &here.Channel); what != "" {
		return what
	}
	for i := range source.Users {
		a, b := &source.Users[i], &here.Users[i]
		if !bytes.Equal(a.TokenUpdate.Raw, b.TokenUpdate.Raw) || a.UserShortName != b.UserShortName {
			return "user " + a.Channel.ID
		}
		if what := channelDiffers(&a.Channel, &b.Channel); what != "" {
			return "user " + a.Channel.ID + ": " + what
		}
	}
	return ""
}

func samePins(source, here []storage.PinRecord) bool {
	live := func(pins []storage.PinRecord) (all, live []string) {
		for _, p := range pins {
			all = append(all, p.SHA256)
			if p.RetiredAt.IsZero() {
				live = append(live, p.SHA256)
			}
		}
		slices.Sort(all)
		slices.Sort(live)
		return all, live
	}
	all, current := live(source)
	allHere, currentHere := live(here)
	return slices.Equal(all, allHere) && slices.Equal(current, currentHere)
}

func channelDiffers(source, here *storage.ChannelRecord) string {
	for _, part := range []struct {
		what string
		same bool
	}{
		{"id", source.ID == here.ID},
		{"type", source.Type == here.Type},
		{"topic", source.Topic == here.Topic},
		{"push magic", source.PushMagic == here.PushMagic},
		{"push token", bytes.Equal(source.Token, here.Token)},
		{"enabled", source.Enabled == here.Enabled},
		{"disabled by an operator", source.OperatorDisabled == here.OperatorDisabled},
		{"tally", source.Tally == here.Tally},
		{"last seen", !source.LastSeenAt.Truncate(1000).After(here.LastSeenAt)},
	} {
		if !part.same {
			return part.what
		}
	}
	return queueDiffers(source.Queue, here.Queue)
}

// queueDiffers compares the rows of the source. A row that has since ended in
// the store, or was queued there, is no difference.
func queueDiffers(source, here []storage.ItemRecord) string {
	at := make(map[string]int, len(here))
	for i, item := range here {
		at[item.CommandUUID] = i
	}
	last := -1
	for _, item := range source {
		i, ok := at[item.CommandUUID]
		if !ok {
			return "queue: " + item.CommandUUID + " is not here"
		}
		was := here[i]
		if was.State != item.State && !was.State.Terminal() {
			return fmt.Sprintf("queue: %s is %s and here %s", item.CommandUUID, item.State, was.State)
		}
		if item.Result != nil && (was.Result == nil || !bytes.Equal(item.Result.Raw, was.Result.Raw)) {
			return "queue: the result of " + item.CommandUUID
		}
		if !item.State.Terminal() && !was.State.Terminal() {
			if i < last {
				return "queue: the order of " + item.CommandUUID
			}
			last = i
		}
	}
	return ""
}
