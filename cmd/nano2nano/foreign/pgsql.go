package foreign

import (
	"context"
	"database/sql"
	"fmt"
	"strings"
	"time"
)

// userCursor walks over the user channels of PostgreSQL's tables, which have
// no index by device, in the order in which devices are read. The database
// sorts them once.
type userCursor struct {
	rows []userRow
	end  bool
}

type userRow struct {
	sqlUserRow
	enrollment sqlEnrollment
}

// fetched is how many rows a cursor gives at once.
const fetched = 500

func (s *sqlSource) openUsers(ctx context.Context, after string) (*userCursor, error) {
	changed := ""
	if !s.cfg.Since.IsZero() {
		condition, args := s.changedSince()
		for _, arg := range args {
			condition = strings.Replace(condition, "?", quote(arg.(time.Time).Format("2006-01-02 15:04:05"))+"::timestamp", 1)
		}
		changed = " AND " + condition
	}
	_, err := s.conn.ExecContext(ctx, "DECLARE nano2nano_users NO SCROLL CURSOR FOR SELECT "+userSelect+", "+s.userColumns()+", "+s.enrollmentColumns()+
		" FROM users u JOIN devices d ON d.id = u.device_id LEFT JOIN enrollments e ON e.id = u.id WHERE d.id > "+quote(after)+changed+" ORDER BY d.id, u.id")
	return new(userCursor), err
}

// quote writes a text into a statement that takes no arguments.
func quote(text string) string {
	return "'" + strings.ReplaceAll(text, "'", "''") + "'"
}

func (s *sqlSource) closeUsers(ctx context.Context) {
	// The transaction may have failed, and its end closes the cursor anyway.
	_, _ = s.conn.ExecContext(context.WithoutCancel(ctx), "CLOSE nano2nano_users")
	s.users = nil
}

// usersOf gives the devices of a page their user channels. Devices that are
// not in the page and come before it are those without a change.
func (s *sqlSource) usersOf(ctx context.Context, p *devicePage) error {
	last := p.all[len(p.all)-1].stored
	for {
		if len(s.users.rows) == 0 {
			if s.users.end {
				return nil
			}
			if err := s.fetchUsers(ctx); err != nil {
				return err
			}
			continue
		}
		r := &s.users.rows[0]
		d := p.byID[r.device]
		if d == nil {
			beyond, err := s.beyond(ctx, r.device, last)
			if err != nil || beyond {
				return err
			}
			s.users.rows = s.users.rows[1:]
			continue
		}
		u := s.addUser(d, &r.sqlUserRow)
		if r.enrollment.id.Valid {
			u.enrolled = true
			s.fill(&u.Channel, &r.enrollment, "user", u.TokenUpdate.At)
		}
		s.users.rows = s.users.rows[1:]
	}
}

// beyond says whether a device comes behind another one in the order of the
// database, which depends on its collation.
func (s *sqlSource) beyond(ctx context.Context, device, last string) (beyond bool, err error) {
	err = s.conn.QueryRowContext(ctx, "SELECT d.id > $2 FROM devices d WHERE d.id = $1", device, last).Scan(&beyond)
	return beyond, err
}

func (s *sqlSource) fetchUsers(ctx context.Context) error {
	n := 0
	err := s.each(ctx, func(rows *sql.Rows) error {
		var r userRow
		if err := rows.Scan(append(r.into(), r.enrollment.into()...)...); err != nil {
			return err
		}
		n++
		s.users.rows = append(s.users.rows, r)
		return nil
	}, fmt.Sprintf("FETCH %d FROM nano2nano_users", fetched))
	s.users.end = n < fetched
	return err
}

// ParseZone reads the name of a time zone.
func ParseZone(name string) (*time.Location, error) {
	zone, err := time.LoadLocation(name)
	if err != nil {
		return nil, fmt.Errorf("the time zone %q is not known", name)
	}
	return zone, nil
}
