package sqldb

import (
	"crypto/x509"
	"errors"
	"strings"

	"github.com/go-sql-driver/mysql"
	sqlite3 "modernc.org/sqlite/lib"
)

// Remedies that several engines share.
const (
	remedyPassword    = "check user and password in -storage-dsn, and that the server lets this user in from this host"
	remedyDatabase    = "create the database, or name another one in -storage-dsn"
	remedyDisk        = "the database server's disk is full: make room there"
	remedyConnections = "raise the server's max_connections, or lower -storage-options max_open_conns"
	remedyReadOnly    = "the server takes no writes, as a replica does, or a primary after a failover: name the primary in -storage-dsn"
	remedyUntrusted   = "name the file of the CA that issued the database server's certificate in -storage-ca"
	remedyHostName    = "name the database server in -storage-dsn as its certificate does"
	remedyPlain       = "the database server speaks no TLS: turn it on there, or leave out -storage-ca and what -storage-dsn says about TLS"
)

// remediedError is an error with what an operator can do about its cause.
type remediedError struct {
	error
	remedy string
}

func (e *remediedError) Error() string { return e.error.Error() + ": " + e.remedy }

func (e *remediedError) Unwrap() error { return e.error }

// withRemedy adds to an error what an operator can do about its cause, if that
// is known and not said yet.
func withRemedy(err error, remedy func(error) string) error {
	var said *remediedError
	if err == nil || remedy == nil || errors.As(err, &said) {
		return err
	}
	text := remedy(err)
	if text == "" {
		return err
	}
	return &remediedError{err, text}
}

// untrusted recognizes a server whose certificate is refused. Waiting does not
// mend that.
func untrusted(err error) bool {
	var (
		authority x509.UnknownAuthorityError
		host      x509.HostnameError
		invalid   x509.CertificateInvalidError
	)
	return errors.As(err, &authority) || errors.As(err, &host) || errors.As(err, &invalid)
}

// certificateRemedy is for a server whose certificate is refused.
func certificateRemedy(err error) string {
	var authority x509.UnknownAuthorityError
	var host x509.HostnameError
	switch {
	case errors.As(err, &authority):
		return remedyUntrusted
	case errors.As(err, &host):
		return remedyHostName
	}
	return ""
}

func mysqlRemedy(err error) string {
	switch mysqlNumber(err) {
	case 1045, 1698, 1130: // ER_ACCESS_DENIED_ERROR, without a password, ER_HOST_NOT_PRIVILEGED
		return remedyPassword
	case 1044, 1142, 1143, 1227: // ER_DBACCESS_DENIED_ERROR, of a table, of a column, of a privilege
		return "grant the user of -storage-dsn all on its database: GRANT ALL ON name.* TO user"
	case 1049: // ER_BAD_DB_ERROR
		return remedyDatabase
	case 3, 1021, 1026, 1114: // EE_WRITE, ER_DISK_FULL, ER_ERROR_ON_WRITE, ER_RECORD_FILE_FULL
		return remedyDisk
	case 1030: // ER_GET_ERRNO
		if strings.Contains(err.Error(), " 28 ") { // ENOSPC
			return remedyDisk
		}
	case 1040, 1203: // ER_CON_COUNT_ERROR, of one user
		return remedyConnections
	case 1129: // ER_HOST_IS_BLOCKED
		return "the server refuses this host after too many failed connections: run FLUSH HOSTS there"
	}
	switch {
	case mysqlReadOnly(err):
		return remedyReadOnly
	case errors.Is(err, mysql.ErrNoTLS):
		return remedyPlain
	}
	return certificateRemedy(err)
}

// mysqlReadOnly recognizes a refused write.
func mysqlReadOnly(err error) bool {
	switch mysqlNumber(err) {
	case 1290: // ER_OPTION_PREVENTS_STATEMENT
		return strings.Contains(err.Error(), "read-only") || strings.Contains(err.Error(), "read_only")
	case 1792, // ER_CANT_EXECUTE_IN_READ_ONLY_TRANSACTION
		1836: // ER_READ_ONLY_MODE
		return true
	}
	return false
}

func pgsqlRemedy(err error) string {
	switch pgCode(err) {
	case "28P01", "28000": // invalid_password, invalid_authorization_specification
		return remedyPassword
	case "3D000": // invalid_catalog_name
		return remedyDatabase
	case "42501": // insufficient_privilege
		return "make the user of -storage-dsn the owner of its database, or GRANT CREATE, USAGE ON SCHEMA public TO it"
	case "53100": // disk_full
		return remedyDisk
	case "53300": // too_many_connections
		return remedyConnections
	case "25006": // read_only_sql_transaction
		return remedyReadOnly
	}
	return certificateRemedy(err)
}

func sqliteRemedy(err error) string {
	switch sqliteCode(err) & 0xff {
	case sqlite3.SQLITE_FULL:
		return "the disk of the database file is full: make room there"
	case sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN:
		return "let this program's user write to the database file and to its folder, which must exist"
	}
	return ""
}
