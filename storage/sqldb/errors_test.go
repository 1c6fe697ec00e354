package sqldb

import (
	"context"
	"database/sql/driver"
	"errors"
	"fmt"
	"io"
	"testing"

	"github.com/go-sql-driver/mysql"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/stretchr/testify/require"
)

// An error that is not known to be the statement's fault is the server's
// state, so that a device is told to come again and not that it is wrong.
func TestErrorClasses(t *testing.T) {
	pg := func(code string) error { return fmt.Errorf("inserting: %w", &pgconn.PgError{Code: code}) }
	my := func(number uint16) error { return fmt.Errorf("inserting: %w", &mysql.MySQLError{Number: number}) }
	domain := errors.New("no such enrollment")
	type class = struct{ err, want error } // without want the error is handed on as it is
	for _, tc := range []struct {
		dialect *Dialect
		classes []class
	}{
		{pgsqlDialect(), []class{
			{pg("53100"), ErrUnavailable}, // disk full
			{pg("53200"), ErrUnavailable}, // out of memory
			{pg("53300"), ErrUnavailable}, // too many connections
			{pg("25P03"), ErrUnavailable}, // idle in transaction for too long
			{pg("57P01"), ErrUnavailable}, // an administrator stops the server
			{pg("57P03"), ErrUnavailable}, // it starts
			{pg("57014"), ErrUnavailable}, // a statement timeout
			{pg("58030"), ErrUnavailable}, // an error of the disk
			{pg("XX001"), ErrUnavailable}, // a damaged page
			{pg("08006"), ErrUnavailable}, // the connection broke
			{pg("ZZ999"), ErrUnavailable}, // a code that nobody knows
			{pg("40001"), ErrBusy},        // serialization failure
			{pg("40P01"), ErrBusy},        // deadlock
			{pg("55P03"), ErrBusy},        // lock timeout
			{pg("25006"), ErrBusy},        // read only: a former primary
			{pg("42P05"), ErrBusy},        // prepared already: a pooler
			{pg("26000"), ErrBusy},        // not prepared: a pooler
			{pg("22001"), nil},            // too long
			{pg("22021"), nil},            // not UTF-8
			{pg("23505"), nil},            // it exists
			{pg("42601"), nil},            // syntax
			{pg("42501"), nil},            // no privilege
		}},
		{mysqlDialect(), mysqlClasses(my)},
		{mariadbDialect(), mysqlClasses(my)},
	} {
		t.Run(tc.dialect.name, func(t *testing.T) {
			db := &DB{dialect: tc.dialect}
			all := append(tc.classes,
				class{driver.ErrBadConn, ErrUnavailable},
				class{fmt.Errorf("reading: %w", io.ErrUnexpectedEOF), ErrUnavailable},
				class{context.DeadlineExceeded, ErrUnavailable},
				class{context.Canceled, nil},
				class{domain, nil},
			)
			for _, c := range all {
				got := db.classify(c.err)
				require.ErrorIs(t, got, c.err)
				if c.want == nil {
					require.NotErrorIs(t, got, ErrUnavailable)
					require.NotErrorIs(t, got, ErrBusy)
					continue
				}
				require.ErrorIs(t, got, c.want, "%v", c.err)
			}
		})
	}
}

// readOnlyError is ER_OPTION_PREVENTS_STATEMENT as a replica returns it. Other
// options have the same number.
func readOnlyError() error {
	return fmt.Errorf("inserting: %w", &mysql.MySQLError{Number: 1290, Message: "The MySQL server is running with the --super-read-only option so it cannot execute this statement"})
}

func mysqlClasses(my func(uint16) error) []struct{ err, want error } {
	return []struct{ err, want error }{
		{my(1021), ErrUnavailable},                                        // disk full
		{my(1114), ErrUnavailable},                                        // the table is full
		{my(1030), ErrUnavailable},                                        // an error of the storage engine
		{my(1180), ErrUnavailable},                                        // an error during commit
		{my(3796), ErrUnavailable},                                        // the group's consistency cannot be had
		{my(1041), ErrUnavailable},                                        // out of memory
		{my(1040), ErrUnavailable},                                        // too many connections
		{my(1047), ErrUnavailable},                                        // the node is not in the cluster
		{my(1053), ErrUnavailable},                                        // shutting down
		{my(9999), ErrUnavailable},                                        // a number that nobody knows
		{fmt.Errorf("sending: %w", mysql.ErrInvalidConn), ErrUnavailable}, // broken
		{fmt.Errorf("sending: %w", errors.New("bad connection")), ErrUnavailable}, // the driver's own
		{my(1213), ErrBusy},        // deadlock, lost certification
		{my(1205), ErrBusy},        // lock timeout
		{readOnlyError(), ErrBusy}, // read only: a former primary
		{my(1062), nil},            // it exists
		{my(1064), nil},            // syntax
		{my(1406), nil},            // too long
		{my(1153), nil},            // larger than a packet
	}
}

// Errors whose cause an operator can remove say how.
func TestRemedies(t *testing.T) {
	pg := func(code string) error { return &pgconn.PgError{Code: code} }
	my := func(number uint16) error { return &mysql.MySQLError{Number: number} }
	for name, tc := range map[string]struct {
		remedy func(error) string
		err    error
		want   string
	}{
		"pgsql disk full":          {pgsqlRemedy, pg("53100"), remedyDisk},
		"pgsql connections":        {pgsqlRemedy, pg("53300"), remedyConnections},
		"pgsql deadlock":           {pgsqlRemedy, pg("40P01"), ""},
		"mysql disk full":          {mysqlRemedy, my(1021), remedyDisk},
		"mysql table full":         {mysqlRemedy, my(1114), remedyDisk},
		"mysql no space for a row": {mysqlRemedy, &mysql.MySQLError{Number: 1030, Message: `Got error 28 "No space left on device" from storage engine InnoDB`}, remedyDisk},
		"mysql engine error":       {mysqlRemedy, &mysql.MySQLError{Number: 1030, Message: "Got error 168 from storage engine"}, ""},
		"mysql connections":        {mysqlRemedy, my(1040), remedyConnections},
		"mysql read-only":          {mysqlRemedy, readOnlyError(), remedyReadOnly},
		"mysql another option":     {mysqlRemedy, &mysql.MySQLError{Number: 1290, Message: "running with the --secure-file-priv option"}, ""},
		"mysql plain text":         {mysqlRemedy, fmt.Errorf("connecting: %w", mysql.ErrNoTLS), remedyPlain},
		"none":                     {mysqlRemedy, io.EOF, ""},
	} {
		t.Run(name, func(t *testing.T) {
			err := withRemedy(withRemedy(tc.err, tc.remedy), tc.remedy)
			require.ErrorIs(t, err, tc.err)
			if tc.want == "" {
				require.Equal(t, tc.err, err)
				return
			}
			require.EqualError(t, err, tc.err.Error()+": "+tc.want, "once")
		})
	}
}
