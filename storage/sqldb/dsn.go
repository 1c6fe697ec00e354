package sqldb

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"regexp"
	"slices"
	"strings"

	"github.com/go-sql-driver/mysql"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// Forms of a data source name, for error messages.
const (
	pgsqlForm  = "postgres://user:password@host:5432/name, or host=NAME dbname=NAME"
	mysqlForm  = "user:password@tcp(host:3306)/name?param=value"
	sqliteForm = "the path of a file, or :memory:"
)

// CheckDSN reports why a data source name cannot be one of the driver's, and
// the right form. It connects to nothing. Errors quote no part of the DSN but a
// URL's scheme, since a password can be anywhere else.
func CheckDSN(driver, dsn string) error {
	forms := map[string]string{"pgsql": pgsqlForm, "mysql": mysqlForm, "sqlite": sqliteForm}
	form, known := forms[driver]
	if !known {
		return fmt.Errorf("%q is not sqlite, pgsql or mysql", driver)
	}
	if len(dsn) > 1 && strings.ContainsRune(`"'`, rune(dsn[0])) && dsn[0] == dsn[len(dsn)-1] {
		return errors.New("the data source name is in quotation marks: remove them")
	}
	if strings.HasPrefix(dsn, "jdbc:") {
		return fmt.Errorf("the data source name is a JDBC URL: write %s", form)
	}
	if other := engineOf(dsn); other != "" && other != driver {
		return fmt.Errorf("the data source name is one of %s, and the storage is %s: write %s, or give -storage %s", other, driver, form, other)
	}
	if scheme := urlScheme(dsn); scheme != "" && (driver != "pgsql" || scheme != "postgres" && scheme != "postgresql") && scheme != "file" {
		return fmt.Errorf("the data source name begins with %s://: write %s", scheme, form)
	}
	switch driver {
	case "pgsql":
		_, err := parsePgSQL(dsn)
		return err
	case "mysql":
		_, err := parseMySQL(dsn)
		return err
	}
	return nil
}

var (
	schemePattern  = regexp.MustCompile(`^[A-Za-z][A-Za-z0-9+.-]*://`)
	mysqlPattern   = regexp.MustCompile(`@(tcp|tcp6|unix)\([^)]*\)/`)
	keywordPattern = regexp.MustCompile(`(^|\s)(host|dbname|user)\s*=`)
)

// urlScheme returns the scheme of a URL, in lower case, or "".
func urlScheme(dsn string) string {
	return strings.ToLower(strings.TrimSuffix(schemePattern.FindString(dsn), "://"))
}

// engineOf returns the driver that a data source name is certainly written for,
// or "".
func engineOf(dsn string) string {
	switch scheme := urlScheme(dsn); {
	case scheme == "postgres", scheme == "postgresql":
		return "pgsql"
	case scheme == "mysql", scheme == "mariadb":
		return "mysql"
	case scheme == "sqlite", scheme == "sqlite3":
		return "sqlite"
	case scheme != "":
		return ""
	case mysqlPattern.MatchString(dsn):
		return "mysql"
	case keywordPattern.MatchString(dsn):
		return "pgsql"
	}
	return ""
}

// parsePgSQL reads a data source name of PostgreSQL's.
func parsePgSQL(dsn string) (*pgx.ConnConfig, error) {
	pc, err := pgx.ParseConfig(dsn)
	switch {
	case err == nil:
		return pc, nil
	case strings.Contains(dsn, "sslinline"):
		return nil, errors.New("sslinline is a parameter of another driver: put certificate and key into files, and name those in sslcert and sslkey")
	}
	// pgx's message repeats the DSN, with the password only partly masked for
	// keyword strings.
	return nil, errors.New("the data source name is not a PostgreSQL URL or keyword string: write " + pgsqlForm)
}

// parseMySQL reads a data source name of MySQL's or MariaDB's.
func parseMySQL(dsn string) (*mysql.Config, error) {
	mc, err := mysql.ParseDSN(dsn)
	switch {
	case err == nil:
		return mc, nil
	case strings.Contains(err.Error(), "unknown config name"):
		return nil, errors.New("tls=NAME names a configuration that a program registers, and this one registers none: " +
			"write tls=true, and name the file of a private CA in -storage-ca")
	}
	// Not wrapped: some errors quote what may be a piece of the password.
	return nil, errors.New("the data source name is not " + mysqlForm)
}

// ignoredParams are the parameters of lib/pq, libpq and poolers that have no
// meaning for pgx, which would send them to the server as settings.
var ignoredParams = []string{
	"binary_parameters", "disable_prepared_binary_result", "sslinline", "pgbouncer",
	"gssencmode", "gsslib", "gssdelegation",
	"keepalives", "keepalives_idle", "keepalives_interval", "keepalives_count", "tcp_user_timeout",
	"load_balance_hosts", "sslcompression",
}

// dropParams removes parameters without meaning, and logs their names.
func dropParams(pc *pgx.ConnConfig, log *slog.Logger) {
	if name, ok := pc.RuntimeParams["fallback_application_name"]; ok {
		delete(pc.RuntimeParams, "fallback_application_name")
		if pc.RuntimeParams["application_name"] == "" {
			pc.RuntimeParams["application_name"] = name
		}
	}
	var dropped []string
	for _, name := range ignoredParams {
		if _, ok := pc.RuntimeParams[name]; ok {
			delete(pc.RuntimeParams, name)
			dropped = append(dropped, name)
		}
	}
	if len(dropped) > 0 {
		log.Warn("parameters of the data source name that mean nothing to this driver are ignored: remove them", "parameters", dropped)
	}
}

// trustPgSQL has every connection verify the server by roots, host name
// included unless the DSN says sslmode=verify-ca.
func trustPgSQL(pc *pgx.ConnConfig, roots *x509.CertPool) error {
	if roots == nil {
		return nil
	}
	all := slices.Concat([]*pgconn.FallbackConfig{{Host: pc.Host, Port: pc.Port, TLSConfig: pc.TLSConfig}}, pc.Fallbacks)
	all = slices.DeleteFunc(all, func(f *pgconn.FallbackConfig) bool {
		return f.TLSConfig == nil && !strings.HasPrefix(f.Host, "/") // plain text; a path is a Unix socket
	})
	if len(all) == 0 {
		return errors.New("-storage-ca and sslmode=disable contradict each other: remove one")
	}
	for _, f := range all {
		if f.TLSConfig == nil {
			continue
		}
		f.TLSConfig.RootCAs = roots
		if f.TLSConfig.VerifyPeerCertificate == nil { // verify-ca has its own check
			f.TLSConfig.InsecureSkipVerify = false
			f.TLSConfig.ServerName = f.Host
		}
	}
	pc.Host, pc.Port, pc.TLSConfig, pc.Fallbacks = all[0].Host, all[0].Port, all[0].TLSConfig, all[1:]
	return nil
}

// trustMySQL has every connection verify the server by roots.
func trustMySQL(mc *mysql.Config, roots *x509.CertPool) error {
	switch {
	case roots == nil, mc.Net == "unix":
		return nil
	case mc.TLSConfig != "" && mc.TLSConfig != "true":
		return fmt.Errorf("-storage-ca and tls=%s contradict each other: write tls=true", mc.TLSConfig)
	}
	mc.TLS = &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12}
	return nil
}
