package foreign

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/nanomdm/nanomdm/storage"
	"github.com/nanomdm/nanomdm/storage/sqlstore"
)

// ownSource reads a database of this server.
type ownSource struct {
	cfg  Config
	snap *sqlstore.Snapshot
}

func openOwn(ctx context.Context, cfg Config) (Source, error) {
	snap, err := sqlstore.OpenSnapshot(ctx, sqlstore.Config{Driver: cfg.Kind, DSN: cfg.DSN, Now: cfg.Now, Sealer: cfg.Sealer})
	switch {
	case errors.Is(err, storage.ErrNotSealing):
		return nil, fmt.Errorf("opening the source: %w: give -source-seal-key-file", err)
	case errors.Is(err, sqlstore.ErrSchema):
		return nil, fmt.Errorf("opening the source: %w: use the nano2nano of the release that serves it", err)
	case err != nil:
		return nil, fmt.Errorf("opening the source: %w", err)
	}
	return &ownSource{cfg: cfg, snap: snap}, nil
}

func (s *ownSource) String() string { return "this server's database in " + s.snap.Engine() }
func (s *ownSource) Close() error   { return s.snap.Close() }

func (s *ownSource) Count(ctx context.Context) (c Counts, err error) {
	for _, part := range []struct {
		of   sqlstore.Counted
		into *int64
	}{{sqlstore.CountDevices, &c.Devices}, {sqlstore.CountCommands, &c.Commands}, {sqlstore.CountPushCerts, &c.PushCerts}} {
		if *part.into, err = s.snap.Count(ctx, part.of); err != nil {
			return c, err
		}
	}
	return c, nil
}

func (s *ownSource) PushCerts(ctx context.Context, yield func(storage.PushCert) error) error {
	certs, err := s.snap.ExportPushCerts(ctx)
	if errors.Is(err, sqlstore.ErrUnreadable) {
		s.cfg.problem("push certificate", "all", "%v", err)
		return nil
	}
	if err != nil {
		return err
	}
	for _, c := range certs {
		if err := yield(c); err != nil {
			return err
		}
	}
	return nil
}

func (s *ownSource) Commands(ctx context.Context, after string, yield func(storage.CommandRecord) error) error {
	for {
		list, err := s.snap.ExportCommands(ctx, after, page, func(uuid string, err error) { s.cfg.problem("command", uuid, "%v", err) })
		if err != nil || len(list) == 0 {
			return err
		}
		after = list[len(list)-1].UUID
		used, err := s.used(ctx, list)
		if err != nil {
			return err
		}
		for _, c := range list {
			if c.Raw == nil || used != nil && !used[c.UUID] {
				continue
			}
			if err := yield(c); err != nil {
				return err
			}
		}
	}
}

// used says which commands have a queue row that is moved; nil is all.
func (s *ownSource) used(ctx context.Context, list []storage.CommandRecord) (map[string]bool, error) {
	if s.cfg.History < 0 {
		return nil, nil
	}
	uuids := make([]string, len(list))
	for i, c := range list {
		uuids[i] = c.UUID
	}
	return s.snap.CommandsSince(ctx, uuids, s.cfg.Now().Add(-s.cfg.History))
}

func (s *ownSource) Devices(ctx context.Context, after string, yield func(*storage.DeviceRecord) error) error {
	for {
		ids, err := s.snap.ExportDeviceIDs(ctx, after, page)
		if err != nil || len(ids) == 0 {
			return err
		}
		after = ids[len(ids)-1]
		if !s.cfg.Since.IsZero() {
			if ids, err = s.snap.ChangedDevices(ctx, ids, s.cfg.Since); err != nil {
				return err
			}
		}
		list, err := s.devices(ctx, ids)
		if err != nil {
			return err
		}
		for _, d := range list {
			s.trim(d)
			if err := yield(d); err != nil {
				return err
			}
		}
	}
}

// devices reads devices. One that cannot be read is reported and left out.
func (s *ownSource) devices(ctx context.Context, ids []string) ([]*storage.DeviceRecord, error) {
	list, err := s.snap.ExportDevices(ctx, ids)
	if !errors.Is(err, sqlstore.ErrUnreadable) {
		return list, err
	}
	list = nil
	for _, id := range ids {
		one, err := s.snap.ExportDevices(ctx, []string{id})
		if errors.Is(err, sqlstore.ErrUnreadable) {
			s.cfg.problem("device", id, "%v", err)
			continue
		}
		if err != nil {
			return nil, err
		}
		list = append(list, one...)
	}
	return list, nil
}

// trim leaves out the history that is not moved.
func (s *ownSource) trim(d *storage.DeviceRecord) {
	if s.cfg.History < 0 {
		return
	}
	old := func(item storage.ItemRecord) bool { return item.State.Terminal() && !s.cfg.keeps(item.FinishedAt) }
	d.Channel.Queue = slices.DeleteFunc(d.Channel.Queue, old)
	for i := range d.Users {
		d.Users[i].Channel.Queue = slices.DeleteFunc(d.Users[i].Channel.Queue, old)
	}
}

func (s *ownSource) Left(ctx context.Context) ([]Left, error) {
	var left []Left
	for _, part := range []struct {
		of   sqlstore.Counted
		what string
	}{
		{sqlstore.CountInventories, "inventories of devices"}, {sqlstore.CountEvents, "events"}, {sqlstore.CountEventSinks, "receivers of events"},
		{sqlstore.CountAPIKeys, "API keys"}, {sqlstore.CountAuditRecords, "audit records"},
	} {
		n, err := s.snap.Count(ctx, part.of)
		if err != nil {
			return nil, err
		}
		if n > 0 {
			left = append(left, Left{part.what, n})
		}
	}
	return left, nil
}
