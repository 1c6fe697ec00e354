package sqlstore

import (
	"fmt"
	"strings"

	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/mdm/schema"
	"github.com/nanomdm/nanomdm/storage"
	"github.com/nanomdm/nanomdm/storage/sqldb"
)

// filterRow is a row of the table of filters of enrollments.
type filterRow struct {
	// given says whether the field of the filter is set.
	given func(storage.Scope, storage.EnrollmentFilter) bool
	// source returns the index that finds candidates, false if none helps; nil
	// is never.
	source func(storage.Scope, storage.EnrollmentFilter) (source, bool)
	// condition adds the condition on the enrollments e, and its tables.
	condition func(*conditionBuilder, storage.Scope, storage.EnrollmentFilter)
}

// enrollmentFilters is the table. The index that is usually the most selective
// comes first.
var enrollmentFilters = [...]filterRow{
	{
		given: func(_ storage.Scope, f storage.EnrollmentFilter) bool { return f.Serial != "" },
		source: func(_ storage.Scope, f storage.EnrollmentFilter) (source, bool) {
			return eachOf(true, equalTo("nano_devices", "serial_number", f.Serial)), true
		},
		condition: func(b *conditionBuilder, _ storage.Scope, f storage.EnrollmentFilter) {
			b.device("d.serial_number = ?", f.Serial)
		},
	},
	{
		given: func(_ storage.Scope, f storage.EnrollmentFilter) bool { return f.User != "" },
		source: func(_ storage.Scope, f storage.EnrollmentFilter) (source, bool) {
			return eachOf(false, equalTo("nano_users", "user_short_name", f.User), equalTo("nano_users", "user_id", f.User)), true
		},
		condition: func(b *conditionBuilder, _ storage.Scope, f storage.EnrollmentFilter) {
			b.join("nano_users", "u", "id")
			b.add("(u.user_short_name = ? OR u.user_id = ?)", f.User, f.User)
		},
	},
	{
		given: func(_ storage.Scope, f storage.EnrollmentFilter) bool { return f.Tag != "" },
		source: func(_ storage.Scope, f storage.EnrollmentFilter) (source, bool) {
			return eachOf(true, equalTo("nano_device_tags", "tag", f.Tag)), true
		},
		condition: func(b *conditionBuilder, scope storage.Scope, f storage.EnrollmentFilter) {
			b.add("EXISTS (SELECT 1 FROM nano_device_tags g WHERE g.id = e.device_id AND g.tag = ?"+tagInSight(scope)+")", f.Tag)
		},
	},
	{
		given:  func(_ storage.Scope, f storage.EnrollmentFilter) bool { return f.Push != "" },
		source: pushSource,
		condition: func(b *conditionBuilder, _ storage.Scope, f storage.EnrollmentFilter) {
			b.join("nano_enrollment_push", "p", "id")
			pushCondition(b, f.Push)
		},
	},
	{
		given: func(_ storage.Scope, f storage.EnrollmentFilter) bool { return f.Waiting != nil },
		source: func(_ storage.Scope, f storage.EnrollmentFilter) (source, bool) {
			var parts []part
			for _, state := range waitingStates {
				parts = append(parts, part{table: "nano_enrollment_queue", index: "nano_enrollment_queue_next",
					where: "state = ?", args: []any{int(state)}})
			}
			return eachOf(false, parts...), *f.Waiting
		},
		condition: func(b *conditionBuilder, _ storage.Scope, f storage.EnrollmentFilter) {
			b.add(map[bool]string{true: "EXISTS ", false: "NOT EXISTS "}[*f.Waiting] +
				fmt.Sprintf("(SELECT 1 FROM nano_enrollment_queue q WHERE q.id = e.id AND q.state IN (%d, %d, %d))",
					storage.Scheduled, storage.Queued, storage.NotNow))
		},
	},
	{
		given: func(_ storage.Scope, f storage.EnrollmentFilter) bool { return !f.CertificateExpiresBefore.IsZero() },
		source: func(_ storage.Scope, f storage.EnrollmentFilter) (source, bool) {
			const table = "nano_cert_auth_associations"
			return eachOf(true, part{table: table, index: table + "_not_after", at: "not_after",
				where: "retired_at IS NULL AND not_after < ?", args: []any{micros(f.CertificateExpiresBefore)}, order: "retired_at"}), true
		},
		condition: func(b *conditionBuilder, _ storage.Scope, f storage.EnrollmentFilter) {
			b.add(`EXISTS (SELECT 1 FROM nano_cert_auth_associations c WHERE c.id = e.device_id AND c.retired_at IS NULL AND c.not_after < ?)`,
				micros(f.CertificateExpiresBefore))
		},
	},
	{
		given: func(_ storage.Scope, f storage.EnrollmentFilter) bool {
			return !f.LastSeenBefore.IsZero() || !f.LastSeenAfter.IsZero()
		},
		source: func(_ storage.Scope, f storage.EnrollmentFilter) (source, bool) {
			const table = "nano_enrollment_activity"
			p := part{table: table, index: table + "_last_seen_at", at: "last_seen_at", where: "last_seen_at >= ?", args: []any{micros(f.LastSeenAfter)}}
			if !f.LastSeenBefore.IsZero() {
				p.where += " AND last_seen_at < ?"
				p.args = append(p.args, micros(f.LastSeenBefore))
			}
			return oneOf(p), true
		},
		condition: func(b *conditionBuilder, _ storage.Scope, f storage.EnrollmentFilter) {
			b.join("nano_enrollment_activity", "a", "id")
			if !f.LastSeenBefore.IsZero() {
				b.add("a.last_seen_at < ?", micros(f.LastSeenBefore))
			}
			if !f.LastSeenAfter.IsZero() {
				b.add("a.last_seen_at >= ?", micros(f.LastSeenAfter))
			}
		},
	},
	{
		given: func(_ storage.Scope, f storage.EnrollmentFilter) bool { return f.Model != "" },
		source: func(_ storage.Scope, f storage.EnrollmentFilter) (source, bool) {
			return eachOf(true, equalTo("nano_devices", "model", f.Model), equalTo("nano_devices", "model_name", f.Model),
				equalTo("nano_devices", "product_name", f.Model)), true
		},
		condition: func(b *conditionBuilder, _ storage.Scope, f storage.EnrollmentFilter) {
			b.device("(d.model = ? OR d.model_name = ? OR d.product_name = ?)", f.Model, f.Model, f.Model)
		},
	},
	{
		given: func(_ storage.Scope, f storage.EnrollmentFilter) bool { return f.OSVersion != "" },
		source: func(_ storage.Scope, f storage.EnrollmentFilter) (source, bool) {
			return eachOf(true, equalTo("nano_devices", "os_version", f.OSVersion)), true
		},
		condition: func(b *conditionBuilder, _ storage.Scope, f storage.EnrollmentFilter) {
			b.device("d.os_version = ?", f.OSVersion)
		},
	},
	{
		given: func(_ storage.Scope, f storage.EnrollmentFilter) bool { return f.FileVault != nil },
		source: func(_ storage.Scope, f storage.EnrollmentFilter) (source, bool) {
			return answeredSource("filevault", *f.FileVault)
		},
		condition: func(b *conditionBuilder, scope storage.Scope, f storage.EnrollmentFilter) {
			answeredCondition(b, scope, "filevault", "security_at", *f.FileVault)
		},
	},
	{
		given: func(_ storage.Scope, f storage.EnrollmentFilter) bool { return f.Supervised != nil },
		source: func(_ storage.Scope, f storage.EnrollmentFilter) (source, bool) {
			return answeredSource("supervised", *f.Supervised)
		},
		condition: func(b *conditionBuilder, scope storage.Scope, f storage.EnrollmentFilter) {
			answeredCondition(b, scope, "supervised", "information_at", *f.Supervised)
		},
	},
	{
		given: func(_ storage.Scope, f storage.EnrollmentFilter) bool {
			return f.OSVersionBelow != "" || f.OSVersionFrom != ""
		},
		condition: func(b *conditionBuilder, _ storage.Scope, f storage.EnrollmentFilter) {
			b.join("nano_devices", "d", "device_id")
			b.check("d.os_version", func(version string) bool { return versionWithin(version, f.OSVersionFrom, f.OSVersionBelow) })
		},
	},
	{
		given: func(_ storage.Scope, f storage.EnrollmentFilter) bool { return f.Topic != "" },
		source: func(_ storage.Scope, f storage.EnrollmentFilter) (source, bool) {
			return oneOf(equalTo("nano_enrollments", "topic", f.Topic)), true
		},
		condition: func(b *conditionBuilder, _ storage.Scope, f storage.EnrollmentFilter) {
			b.add("e.topic = ?", f.Topic)
		},
	},
	{
		given: func(scope storage.Scope, _ storage.EnrollmentFilter) bool { return len(scope.Topics) > 0 },
		source: func(scope storage.Scope, _ storage.EnrollmentFilter) (source, bool) {
			if len(scope.Topics) > scopeBranches {
				return source{}, false
			}
			var parts []part
			for _, topic := range scope.Topics {
				parts = append(parts, equalTo("nano_enrollments", "topic", topic))
			}
			return eachOf(false, parts...), true
		},
		condition: func(b *conditionBuilder, scope storage.Scope, _ storage.EnrollmentFilter) { inScope(scope, b.add) },
	},
	{
		given:  func(_ storage.Scope, f storage.EnrollmentFilter) bool { return f.Type != "" || f.Enabled != nil },
		source: typeSource,
		condition: func(b *conditionBuilder, _ storage.Scope, f storage.EnrollmentFilter) {
			if f.Type != "" {
				b.add("e.type = ?", string(f.Type))
			}
			if f.Enabled != nil {
				b.add(map[bool]string{
					true:  "e.enabled = 1 AND e.operator_disabled = 0",
					false: "(e.enabled = 0 OR e.operator_disabled = 1)",
				}[*f.Enabled])
			}
		},
	},
}

// equalTo returns the part of an index where a column has a value.
func equalTo(table, column, value string) part {
	return part{table: table, index: table + "_" + column, where: column + " = ?", args: []any{value}}
}

// answeredSource is the index of a truth value that devices answered.
func answeredSource(column string, value bool) (source, bool) {
	flag := 0
	if value {
		flag = 1
	}
	return eachOf(true, part{table: inventoryTable, index: inventoryTable + "_" + column, where: column + " = ?", args: []any{flag}}), true
}

// answeredCondition is that a device answered a truth value at a time, to the
// tenant that it has now.
func answeredCondition(b *conditionBuilder, scope storage.Scope, column, at string, value bool) {
	b.join(inventoryTable, "i", "device_id")
	b.add("i."+column+" = ?", value)
	if len(scope.Topics) > 0 {
		b.add("NOT EXISTS (SELECT 1 FROM nano_topic_moves v WHERE v.id = i.id AND v.moved_at >= i." + at + ")")
	}
}

// versionWithin says whether a version is from one on and below another, of
// which one may be empty.
func versionWithin(version, from, below string) bool {
	if from != "" {
		if order, ok := schema.CompareVersions(version, from); !ok || order < 0 {
			return false
		}
	}
	if below != "" {
		if order, ok := schema.CompareVersions(version, below); !ok || order >= 0 {
			return false
		}
	}
	return true
}

func pushSource(_ storage.Scope, f storage.EnrollmentFilter) (source, bool) {
	const table = "nano_enrollment_push"
	if f.Push == storage.PushOwed || f.Push == storage.PushUnanswered {
		return oneOf(part{table: table, index: table + "_push_at", at: "push_at", where: "push_at IS NOT NULL"}), true
	}
	var parts []part
	for _, class := range refusedClasses(f.Push) {
		p := equalTo(table, "last_push_class", class)
		p.where += " AND last_push_class <> 'accepted'" // as the index has it
		parts = append(parts, p)
	}
	return eachOf(false, parts...), true
}

func typeSource(_ storage.Scope, f storage.EnrollmentFilter) (source, bool) {
	types := mdm.EnrollTypes()
	if f.Type != "" {
		types = []mdm.EnrollType{f.Type}
	}
	var parts []part
	for _, typ := range types {
		for _, flags := range [][2]int{{1, 0}, {0, 0}, {0, 1}, {1, 1}} {
			if f.Enabled == nil || (flags == [2]int{1, 0}) == *f.Enabled {
				parts = append(parts, part{table: "nano_enrollments", index: "nano_enrollments_type",
					where: "type = ? AND enabled = ? AND operator_disabled = ?", args: []any{string(typ), flags[0], flags[1]}})
			}
		}
	}
	return eachOf(false, parts...), true
}

// sourceOf returns the first index of the table that a filter can use.
func sourceOf(scope storage.Scope, f storage.EnrollmentFilter) source {
	for _, row := range enrollmentFilters {
		if row.source == nil || !row.given(scope, f) {
			continue
		}
		if src, ok := row.source(scope, f); ok {
			return src
		}
	}
	return source{index: "id", parts: []part{{table: "nano_enrollments", where: "1 = 1"}}}
}

// conditions returns the conditions of a filter, with their tables.
func conditions(scope storage.Scope, f storage.EnrollmentFilter) *conditionBuilder {
	b := &conditionBuilder{from: "nano_enrollments e", joined: make(map[string]bool)}
	for _, row := range enrollmentFilters {
		if row.given(scope, f) {
			row.condition(b, scope, f)
		}
	}
	return b
}

// conditionBuilder gathers the tables and conditions of a filter.
type conditionBuilder struct {
	from   string
	where  strings.Builder
	args   []any
	joined map[string]bool // aliases
	// checks are conditions that the engines' SQL does not have in common.
	checks []valueCheck
}

// valueCheck is a condition on the text of a column.
type valueCheck struct {
	column string
	holds  func(string) bool
}

func (b *conditionBuilder) check(column string, holds func(string) bool) {
	b.checks = append(b.checks, valueCheck{column, holds})
}

// join adds a table whose id is a key of the enrollment, once.
func (b *conditionBuilder) join(table, alias, key string) {
	if !b.joined[alias] {
		b.from += " JOIN " + table + " " + alias + " ON " + alias + ".id = e." + key
	}
	b.joined[alias] = true
}

func (b *conditionBuilder) add(condition string, values ...any) {
	b.where.WriteString(" AND " + condition)
	b.args = append(b.args, values...)
}

// device adds a condition on the device d.
func (b *conditionBuilder) device(condition string, values ...any) {
	b.join("nano_devices", "d", "device_id")
	b.add(condition, values...)
}

func pushCondition(b *conditionBuilder, status storage.PushStatus) {
	switch status {
	case storage.PushOwed:
		b.add("p.push_at IS NOT NULL AND p.paid_seq < p.owed_seq")
	case storage.PushUnanswered:
		b.add(`p.push_at IS NOT NULL AND p.last_push_class = 'accepted'
AND NOT EXISTS (SELECT 1 FROM nano_enrollment_activity w WHERE w.id = e.id AND w.last_seen_at > p.last_push_at)`)
	case storage.PushTokenDead:
		b.add("p.token_dead_at IS NOT NULL")
	case storage.PushRefused:
		b.add("p.last_push_class <> 'accepted'")
	default:
		b.add("p.last_push_class = ?", string(status))
	}
}

// inScope adds the condition of a scope on the enrollments e.
func inScope(scope storage.Scope, add func(string, ...any)) {
	if len(scope.Topics) > 0 {
		place, args := sqldb.InList(scope.Topics)
		add("e.topic IN "+place, args...)
	}
}
