package sqlstore_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/storage"
	"github.com/nanomdm/nanomdm/storage/storagetest"
)

// filters has each filter alone, with a value that few rows have.
func filters() map[string]storage.EnrollmentFilter {
	return map[string]storage.EnrollmentFilter{
		"type":                       {Type: mdm.SharediPad},
		"enabled=true":               {Enabled: new(true)},
		"enabled=false":              {Enabled: new(false)},
		"topic":                      {Topic: "rare"},
		"serial":                     {Serial: "rare"},
		"user":                       {User: "rare"},
		"tag":                        {Tag: "rare"},
		"model":                      {Model: "rare"},
		"filevault":                  {FileVault: new(true)},
		"supervised":                 {Supervised: new(true)},
		"os_version":                 {OSVersion: "rare"},
		"last_seen_before":           {LastSeenBefore: time.UnixMicro(100)},
		"last_seen_after":            {LastSeenAfter: time.UnixMicro(5_900)},
		"waiting=true":               {Waiting: new(true)},
		"push_status=owed":           {Push: storage.PushOwed},
		"push_status=unanswered":     {Push: storage.PushUnanswered},
		"push_status=refused":        {Push: storage.PushRefused},
		"push_status=token_dead":     {Push: storage.PushTokenDead},
		"certificate_expires_before": {CertificateExpiresBefore: time.UnixMicro(100)},
	}
}

// plantFleet inserts enrollments of which one in a hundred is rare in all that
// can be asked for, with finished and waiting commands.
func plantFleet(t *testing.T, h *storagetest.Harness, n int) {
	t.Helper()
	insert := func(head string, rows [][]any) {
		for chunk := range slices.Chunk(rows, 500) {
			place := "(?" + strings.Repeat(", ?", len(chunk[0])-1) + ")"
			h.Exec(t, "INSERT INTO "+head+" VALUES "+place+strings.Repeat(", "+place, len(chunk)-1), slices.Concat(chunk...)...)
		}
	}
	var devices, answers, tags, users, enrollments, pushes, seen, certs, queue, commands [][]any
	for i := range n {
		id := fmt.Sprintf("D%06d", i)
		rare := i%100 == 7
		word, typ, class, state := fmt.Sprint("usual-", i%5), string(mdm.Device), "accepted", int(storage.Acknowledged)
		finished, pushAt, enabled, on := any(i+1), any(nil), i%3/2, 0
		if rare {
			word, typ, class, state = "rare", string(mdm.SharediPad), "retry_later", int(storage.Queued)
			finished, pushAt, enabled, on = nil, i+1, 0, 1
		}
		devices = append(devices, []any{id, word, word, word, word, word, []byte("raw"), 1, 1, 1})
		answers = append(answers, []any{id, on, on})
		tags = append(tags, []any{id, word, 1})
		users = append(users, []any{id, id, word, word, 1, 1})
		enrollments = append(enrollments, []any{id, id, typ, word, enabled, 1, 1})
		pushes = append(pushes, []any{id, class, pushAt})
		seen = append(seen, []any{id, i + 1})
		certs = append(certs, []any{"live-" + id, id, i + 1, 1, nil}, []any{"dead-" + id, id, 1, 1, 2})
		for c := range 3 {
			queue = append(queue, []any{id, fmt.Sprint("C", c+i%50*3), c, state, 1, finished})
		}
		commands = append(commands, []any{fmt.Sprintf("C%d", i), word, []byte("raw"), i + 1})
	}
	insert("nano_devices (id, serial_number, model, model_name, product_name, os_version, authenticate, authenticate_at, created_at, updated_at)", devices)
	insert("nano_device_inventory (id, supervised, filevault)", answers)
	insert("nano_device_tags (id, tag, created_at)", tags)
	insert("nano_users (id, device_id, user_id, user_short_name, created_at, updated_at)", users)
	insert("nano_enrollments (id, device_id, type, topic, enabled, created_at, updated_at)", enrollments)
	insert("nano_enrollment_push (id, last_push_class, push_at)", pushes)
	insert("nano_enrollment_activity (id, last_seen_at)", seen)
	insert("nano_cert_auth_associations (sha256, id, not_after, created_at, retired_at)", certs)
	insert("nano_enrollment_queue (id, command_uuid, seq, state, created_at, finished_at)", queue)
	insert("nano_commands (command_uuid, request_type, command, created_at)", commands)
	analyze(t, h)
}

// analyze has the engine look at how the tables' values are spread.
func analyze(t *testing.T, h *storagetest.Harness) {
	t.Helper()
	for _, table := range []string{"nano_devices", "nano_device_inventory", "nano_device_tags", "nano_users", "nano_enrollments", "nano_enrollment_push", "nano_enrollment_activity",
		"nano_cert_auth_associations", "nano_enrollment_queue", "nano_commands"} {
		analyze := map[string]string{"sqlite": "ANALYZE ", "pgsql": "VACUUM ANALYZE "}[h.Engine.Name]
		if analyze == "" {
			analyze = "ANALYZE TABLE "
		}
		h.Exec(t, analyze+table)
	}
}

// TestFiltersUseTheirIndexes asks the engines how they would find what a
// filter chooses, and what a list shows.
func TestFiltersUseTheirIndexes(t *testing.T) {
	for _, engine := range storagetest.Engines(t) {
		t.Run(engine.Name, func(t *testing.T) {
			h := storagetest.NewHarness(t, engine)
			plantFleet(t, h, 3000)
			for name, f := range filters() {
				indexes, q, args := h.Store.FilterQueryForTest(storage.Scope{}, f)
				usesIndexes(t, h, name, indexes, q, args)
			}
			indexes, q, args := h.Store.FilterQueryForTest(storage.Scope{Topics: []string{"rare", "none"}}, storage.EnrollmentFilter{})
			usesIndexes(t, h, "scope", indexes, q, args)
			for _, l := range h.Store.ListQueriesForTest() {
				usesIndexes(t, h, l.Name, []string{l.Index}, l.Query, l.Args)
			}
		})
	}
}

// usesIndexes wants each of the indexes, which are regular expressions, in the
// plan, no table read from end to end, and no queue row looked up by itself.
func usesIndexes(t *testing.T, h *storagetest.Harness, name string, indexes []string, q string, args []any) {
	t.Helper()
	plan, err := h.Store.ExplainForTest(t.Context(), q, args...)
	require.NoError(t, err, name)
	for _, index := range indexes {
		require.NotEmpty(t, index, name)
		require.Regexp(t, `\b`+index+`\b`, plan, name)
	}
	require.NotRegexp(t, `Seq Scan|SCAN nano_|"access_type": "ALL".*nano_`, plan, name)
	if !slices.ContainsFunc(indexes, func(index string) bool { return strings.Contains(index, "pkey") }) {
		require.NotContains(t, plan, "nano_enrollment_queue_pkey", name)
	}
}

// Commands in a state are found by the rows of it if it is rare, and among all
// commands if it is not.
func TestCommandsInAState(t *testing.T) {
	for _, engine := range storagetest.Engines(t) {
		t.Run(engine.Name, func(t *testing.T) {
			h := storagetest.NewHarness(t, engine)
			plantFleet(t, h, 3000)
			var queued, failed []string
			for i := range 3000 {
				uuid := fmt.Sprint("C", 2999-i)
				if i >= 2976 && i <= 2978 { // as plantFleet has them
					queued = append(queued, uuid)
				}
				if i%2 == 0 {
					failed = append(failed, uuid)
				}
			}
			for chunk := range slices.Chunk(failed, 500) {
				h.Exec(t, "INSERT INTO nano_enrollment_queue (id, command_uuid, seq, state, created_at, finished_at) VALUES ('X', ?, 1, 11, 1, 1)"+
					strings.Repeat(", ('X', ?, 1, 11, 1, 1)", len(chunk)-1), anys(chunk)...)
			}
			for _, c := range []struct {
				f    storage.CommandFilter
				want []string
			}{
				{storage.CommandFilter{State: storage.Queued}, queued},
				{storage.CommandFilter{State: storage.Queued, CreatedBefore: time.UnixMicro(23)}, queued[2:]},
				{storage.CommandFilter{State: storage.Scheduled}, nil},
				{storage.CommandFilter{State: storage.Failed}, failed},
			} {
				var got []string
				for after := (storage.CommandKey{}); ; {
					list, next, err := h.Store.FindCommands(t.Context(), storage.Scope{}, c.f, after, max(2, len(c.want)/4))
					require.NoError(t, err)
					for _, command := range list {
						got = append(got, command.UUID)
					}
					if after = next; after == (storage.CommandKey{}) {
						break
					}
				}
				require.Equal(t, c.want, got, c.f)
			}
		})
	}
}

func anys(texts []string) (values []any) {
	for _, text := range texts {
		values = append(values, text)
	}
	return values
}
