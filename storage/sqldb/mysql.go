package sqldb

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"maps"
	"strconv"
	"strings"
	"time"

	"github.com/go-sql-driver/mysql"
)

// The oldest servers that are served: both have what the schema and the
// statements use (descending indexes, binary collations without padding).
var (
	mysqlOldest   = [2]int{8, 4}
	mariadbOldest = [2]int{10, 11}
)

// openMySQL asks the server who it is with a first connection, and makes the
// pool's connections accordingly.
func openMySQL(ctx context.Context, cfg Config) (*pools, error) {
	mc, err := parseMySQL(cfg.DSN)
	if err != nil {
		return nil, err
	}
	if err := trustMySQL(mc, cfg.RootCAs); err != nil {
		return nil, err
	}
	mc.Logger = &mysql.NopLogger{} // what it says comes back as errors, too
	mc.ParseTime = false
	mc.ClientFoundRows = true
	mc.InterpolateParams = true // one round trip for each statement
	if mc.Timeout == 0 {
		mc.Timeout = dialTimeout
	}
	server, err := askMySQL(ctx, cfg, mc)
	if err != nil {
		return nil, err
	}
	d := mysqlDialect()
	if server.mariadb {
		d = mariadbDialect()
	} else {
		// Never on MariaDB: when another node of a Galera cluster aborts the
		// transaction between two statements of one text, the rest of the text
		// runs in autocommit and COMMIT is confirmed.
		d.execBatch = mysqlExecBatch(min(maxBatchBytes, server.maxPacket/2))
	}
	mc.MaxAllowedPacket = server.maxPacket
	mc.MultiStatements = !server.mariadb
	mc.Collation = "" // the driver knows neither of ours by name
	if err := mc.Apply(mysql.Charset("utf8mb4", "")); err != nil {
		return nil, err
	}
	mc.Params = server.params(mc.Params)
	connector, err := mysql.NewConnector(mc)
	if err != nil {
		return nil, err
	}
	db := sql.OpenDB(connector)
	if seconds, err := strconv.Atoi(mc.Params["wait_timeout"]); err == nil && seconds > 0 {
		// The pool gives a connection up before the server does.
		cfg.ConnMaxIdleTime = min(cfg.ConnMaxIdleTime, time.Duration(seconds)*time.Second*3/4)
	}
	sizePool(db, cfg)
	if err := db.PingContext(ctx); err != nil {
		db.Close()
		return nil, fmt.Errorf("connecting: %w", err)
	}
	return &pools{dialect: d, write: db, read: db}, nil
}

// mysqlServer is the kind of server at the other end of a connection.
type mysqlServer struct {
	mariadb bool
	galera  bool // a node of a cluster that several nodes write to
	// consistency is the group_replication_consistency that sessions need and do
	// not have; empty if the server's own suffices or is no member of a group.
	consistency string
	maxPacket   int
}

// params returns the system variables of the pool's connections. Variables in
// the DSN take precedence.
func (server mysqlServer) params(ofDSN map[string]string) map[string]string {
	isolation, collation := "transaction_isolation", "utf8mb4_0900_bin"
	if server.mariadb {
		isolation, collation = "tx_isolation", "utf8mb4_nopad_bin"
	}
	params := map[string]string{
		isolation: "'READ-COMMITTED'",
		// Derived tables of arguments compare as the columns do.
		"collation_connection": "'" + collation + "'",
		// Without strictness a value that is too long is cut, silently.
		"sql_mode":                 "'STRICT_ALL_TABLES,NO_ENGINE_SUBSTITUTION'",
		"innodb_lock_wait_timeout": strconv.Itoa(int(lockTimeout.Seconds())),
		// The wait of a statement for a change of its table, a year by default.
		"lock_wait_timeout": "10",
	}
	// A process that was stopped must not keep its transaction and locks for long.
	if server.mariadb {
		params["idle_transaction_timeout"] = "5"
		// A table for each subquery's results by its arguments, which are
		// never the same: more than half of the cost of a poll.
		params["optimizer_switch"] = "'subquery_cache=off'"
	} else {
		params["wait_timeout"] = "8" // MySQL ends idle connections only, in a transaction or not
	}
	if server.galera {
		// Each transaction, and each statement outside of one, first waits for
		// the commits of the other nodes: a device that reaches another replica
		// must not be offered a command that it has answered.
		params["wsrep_sync_wait"] = "7"
	}
	if server.consistency != "" {
		params["group_replication_consistency"] = "'" + server.consistency + "'"
	}
	maps.Copy(params, ofDSN)
	return params
}

func askMySQL(ctx context.Context, cfg Config, mc *mysql.Config) (mysqlServer, error) {
	var server mysqlServer
	connector, err := mysql.NewConnector(mc)
	if err != nil {
		return server, err
	}
	db := sql.OpenDB(connector)
	defer db.Close()
	var version, flush string
	err = db.QueryRowContext(ctx, "SELECT VERSION(), @@max_allowed_packet, @@innodb_flush_log_at_trx_commit").
		Scan(&version, &server.maxPacket, &flush)
	if err != nil {
		return server, fmt.Errorf("connecting: %w", err)
	}
	server.mariadb, err = checkMySQLVersion(version)
	if err != nil {
		return server, err
	}
	if err := checkMySQLWrites(ctx, db, server.mariadb); err != nil {
		return server, err
	}
	if server.mariadb {
		if server.galera, err = isGalera(ctx, db); err != nil {
			return server, fmt.Errorf("connecting: %w", err)
		}
	}
	if !server.mariadb {
		if server.consistency, err = neededConsistency(ctx, db); err != nil {
			return server, err
		}
	}
	if flush != "1" {
		cfg.Logger.WarnContext(ctx, "innodb_flush_log_at_trx_commit is not 1: what was acknowledged to devices can be lost in a crash", "value", flush)
	}
	if server.maxPacket < 16<<20 {
		cfg.Logger.WarnContext(ctx, "the server's max_allowed_packet is small: a device's larger results will be refused", "bytes", server.maxPacket)
	}
	return server, nil
}

// isGalera says whether a MariaDB server is a node of a cluster. Servers that
// are built without Galera do not know the variable.
func isGalera(ctx context.Context, db *sql.DB) (bool, error) {
	var name, value string
	err := db.QueryRowContext(ctx, "SHOW GLOBAL VARIABLES LIKE 'wsrep_on'").Scan(&name, &value)
	if errors.Is(err, sql.ErrNoRows) {
		return false, nil
	}
	return value == "ON", err
}

// neededConsistency returns the group_replication_consistency that sessions on
// a member of a group have to set, empty if none. After a failover the new
// primary must not answer before it has applied the former one's transactions;
// with several primaries each transaction waits for those of the others, as on
// Galera. A server that does not let sessions set it is refused.
func neededConsistency(ctx context.Context, db *sql.DB) (string, error) {
	settings, err := groupSettings(ctx, db)
	if err != nil {
		return "", fmt.Errorf("connecting: %w", err)
	}
	needed := ""
	switch single := settings["group_replication_single_primary_mode"] == "ON"; {
	case settings["group_replication_group_name"] == "":
		return "", nil
	case single && settings["group_replication_consistency"] == "EVENTUAL":
		needed = "BEFORE_ON_PRIMARY_FAILOVER"
	case !single && (settings["group_replication_consistency"] == "EVENTUAL" || settings["group_replication_consistency"] == "BEFORE_ON_PRIMARY_FAILOVER"):
		needed = "BEFORE"
	default:
		return "", nil
	}
	if _, err := db.ExecContext(ctx, "SET SESSION group_replication_consistency = '"+needed+"'"); err != nil {
		return "", fmt.Errorf("group_replication_consistency is %s, with which a device can be offered what it has answered, and sessions cannot change it: run SET PERSIST group_replication_consistency = '%s' on each member: %w",
			settings["group_replication_consistency"], needed, err)
	}
	return needed, nil
}

// groupSettings reads the settings of Group Replication; a server without the
// plugin has none.
func groupSettings(ctx context.Context, db *sql.DB) (map[string]string, error) {
	rows, err := db.QueryContext(ctx, "SHOW GLOBAL VARIABLES WHERE Variable_name IN "+
		"('group_replication_group_name', 'group_replication_single_primary_mode', 'group_replication_consistency')")
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	settings := make(map[string]string)
	for rows.Next() {
		var name, value string
		if err := rows.Scan(&name, &value); err != nil {
			return nil, err
		}
		settings[name] = value
	}
	return settings, rows.Err()
}

// checkMySQLWrites names the settings by which the server refuses writes. With
// read_only alone it takes those of administrators, but a server that has it is
// nevertheless none to write to.
func checkMySQLWrites(ctx context.Context, db *sql.DB, mariadb bool) error {
	settings := []string{"super_read_only", "read_only"}
	if mariadb {
		settings = settings[1:]
	}
	for _, setting := range settings {
		var value string
		if err := db.QueryRowContext(ctx, "SELECT @@global."+setting).Scan(&value); err != nil {
			return fmt.Errorf("connecting: %w", err)
		}
		if value != "0" && value != "OFF" { // newer releases of MariaDB have several words
			return fmt.Errorf("%w: %s is on: %s", ErrUnavailable, setting, remedyReadOnly)
		}
	}
	return nil
}

// checkMySQLVersion reads what SELECT VERSION() says, such as 8.4.3 or
// 10.11.6-MariaDB-0+deb12u1.
func checkMySQLVersion(version string) (mariadb bool, err error) {
	name, oldest := "MySQL", mysqlOldest
	if strings.Contains(strings.ToLower(version), "mariadb") {
		mariadb, name, oldest = true, "MariaDB", mariadbOldest
		// Some servers prefix a version for the sake of old replicas.
		version = strings.TrimPrefix(version, "5.5.5-")
	}
	var major, minor int
	parts := strings.SplitN(version, ".", 3)
	if len(parts) >= 2 {
		major, err = strconv.Atoi(parts[0])
		if err == nil {
			minor, err = strconv.Atoi(parts[1])
		}
	}
	if len(parts) < 2 || err != nil {
		return false, fmt.Errorf("the server's version %q cannot be read", version)
	}
	if major < oldest[0] || major == oldest[0] && minor < oldest[1] {
		return false, fmt.Errorf("%s %s is too old, %d.%d is the oldest that is served", name, version, oldest[0], oldest[1])
	}
	return mariadb, nil
}

func mysqlDialect() *Dialect {
	d := mysqlCommon()
	d.name = "mysql"
	d.snapshot = append([]string{"SET SESSION wait_timeout = 28800"}, d.snapshot...) // see pgsqlDialect
	d.forShare = " FOR SHARE"
	d.values = " AS new"
	d.proposed = func(column string) string { return "new." + column }
	d.conflict = func(columns []string, set string) string {
		if set == "" {
			set = columns[0] + " = new." + columns[0]
		}
		return " ON DUPLICATE KEY UPDATE " + set
	}
	d.words["id"] = "VARCHAR(255) CHARACTER SET utf8mb4 COLLATE utf8mb4_0900_bin"
	d.words["text"] = "LONGTEXT CHARACTER SET utf8mb4 COLLATE utf8mb4_0900_bin"
	d.words["table"] = "ENGINE=InnoDB DEFAULT CHARSET=utf8mb4 COLLATE=utf8mb4_0900_bin"
	d.words["if_not_exists"] = "" // not for indexes; see repeated
	d.pairTable = jsonTable(d.words["id"])
	return d
}

func mariadbDialect() *Dialect {
	d := mysqlCommon()
	d.name = "mariadb"
	d.snapshot = append([]string{"SET SESSION idle_transaction_timeout = 0"}, d.snapshot...) // see pgsqlDialect
	d.forShare = " LOCK IN SHARE MODE"
	d.proposed = func(column string) string { return "VALUES(" + column + ")" }
	d.conflict = func(columns []string, set string) string {
		if set == "" {
			set = columns[0] + " = VALUES(" + columns[0] + ")"
		}
		return " ON DUPLICATE KEY UPDATE " + set
	}
	d.words["id"] = "VARCHAR(255) CHARACTER SET utf8mb4 COLLATE utf8mb4_nopad_bin"
	d.words["text"] = "LONGTEXT CHARACTER SET utf8mb4 COLLATE utf8mb4_nopad_bin"
	d.words["table"] = "ENGINE=InnoDB DEFAULT CHARSET=utf8mb4 COLLATE=utf8mb4_nopad_bin"
	d.words["if_not_exists"] = "IF NOT EXISTS"
	d.pairTable = jsonTable(d.words["id"])
	return d
}

// jsonTable is the pairTable of columns of a type.
func jsonTable(column string) func(id, item string) string {
	return func(id, item string) string {
		return "JSON_TABLE(?, '$[*]' COLUMNS (" + id + " " + column + " PATH '$[0]', " + item + " " + column + " PATH '$[1]')) r"
	}
}

// mysqlCommon is what MySQL and MariaDB share.
func mysqlCommon() *Dialect {
	return &Dialect{
		snapshot: []string{"SET TRANSACTION ISOLATION LEVEL REPEATABLE READ", "START TRANSACTION WITH CONSISTENT SNAPSHOT, READ ONLY"},
		// Parsing is a quarter of the cost of large statements.
		prepare:     prepareNamed,
		prepareFrom: prepareFrom,
		forUpdate:   " FOR UPDATE",
		skipLocked:  " SKIP LOCKED",
		// Of two indexes that begin with the same column the planners may take
		// the one that does not help, and read all rows that have ended.
		forceIndex:     func(index string) string { return " FORCE INDEX (" + index + ")" },
		greatest:       "GREATEST",
		maxArgs:        60000, // interpolated; prepared ones are limited to 65535
		parallelReads:  1,
		parallelWrites: 1,
		parallelBulk:   2,
		intPlaceholder: "?",
		pairArgs:       jsonPairs,
		lookup:         inOrder("STRAIGHT_JOIN"),

		unique:         mysqlUnique,
		readOnly:       mysqlReadOnly,
		remedy:         mysqlRemedy,
		retryable:      mysqlRetryable,
		unavailable:    mysqlUnavailable,
		fromEngine:     func(err error) bool { return mysqlNumber(err) != 0 },
		statementFault: mysqlStatementFault,

		words: map[string]string{"blob": "LONGBLOB", "room": "", "where": "--", "pgsql": "--"}, // it has no such indexes
		// DDL commits by itself, so a step may have been done and not
		// recorded: 1061 duplicate key name, 1060 duplicate column, 1091
		// nothing to drop, 1050 table exists.
		repeated: func(err error) bool {
			switch mysqlNumber(err) {
			case 1050, 1060, 1061, 1091:
				return true
			}
			return false
		},
		clock:  "SELECT CAST(UNIX_TIMESTAMP(SYSDATE(6)) * 1000000 AS SIGNED)",
		tables: "SELECT table_name FROM information_schema.tables WHERE table_schema = DATABASE()",
	}
}

// The classes of errors, by their numbers, which MySQL and MariaDB share.

func mysqlUnique(err error) bool {
	n := mysqlNumber(err)
	return n == 1062 || n == 1586
}

func mysqlRetryable(err error) bool {
	switch mysqlNumber(err) {
	case 1213, // ER_LOCK_DEADLOCK, and a cluster's lost certification
		1205, // ER_LOCK_WAIT_TIMEOUT
		1020, // ER_CHECKREAD: changed since it was read
		3101, // ER_TRANSACTION_ROLLBACK_DURING_COMMIT
		3572: // ER_LOCK_NOWAIT
		return true
	}
	return mysqlReadOnly(err)
}

func mysqlUnavailable(err error) bool {
	switch mysqlNumber(err) {
	case 1040, // ER_CON_COUNT_ERROR
		1047, // ER_UNKNOWN_COM_ERROR: a cluster's node is not ready
		1053, // ER_SERVER_SHUTDOWN
		1927, // ER_CONNECTION_KILLED
		4031: // ER_CLIENT_INTERACTION_TIMEOUT
		return true
	}
	return errors.Is(err, mysql.ErrInvalidConn) || mysqlBadConnection(err) || lostConnection(err)
}

func mysqlStatementFault(err error) bool {
	n := mysqlNumber(err)
	switch {
	case n >= 3140 && n <= 3158: // JSON documents and paths
		return true
	}
	switch n {
	case 1048, // ER_BAD_NULL_ERROR
		1052, 1054, 1060, 1061, 1062, 1064, 1091, // names and syntax
		1050, 1051, 1136, 1146, // tables and counts of columns
		1044, 1142, 1143, 1227, // privileges
		1118, 1366, 1264, 1292, 1406, 1425, // values and their sizes
		1153, 1301, // larger than max_allowed_packet
		1215, 1216, 1217, 1364, 1451, 1452, 1586, 3819, 4025, // constraints
		1241, 1242, 1267, 1305, 1390, // expressions
		4078, 4079, 4037, 4038: // MariaDB: types, JSON
		return true
	}
	return false
}

// maxBatchBytes bounds the size of statements that are joined, in bytes. A
// larger statement is sent alone, and the driver prepares one that is larger
// than a packet.
const maxBatchBytes = 512 << 10

// mysqlExecBatch joins statements into texts of several. The driver reads all
// outcomes and returns the first error.
func mysqlExecBatch(most int) func(ctx context.Context, conn *sql.Conn, deferred []statement) error {
	return func(ctx context.Context, conn *sql.Conn, deferred []statement) error {
		for len(deferred) > 0 {
			n, size := 1, deferred[0].size()
			for n < len(deferred) && size+deferred[n].size() <= most {
				size += deferred[n].size()
				n++
			}
			texts, args := make([]string, n), []any(nil)
			for i, s := range deferred[:n] {
				texts[i] = s.text
				args = append(args, s.args...)
			}
			exec := conn.ExecContext
			if n == 1 && argBytes(args) >= prepareFrom {
				exec = func(ctx context.Context, text string, args ...any) (sql.Result, error) {
					return execPrepared(ctx, conn, text, args)
				}
			}
			if _, err := exec(ctx, strings.Join(texts, "; "), args...); err != nil {
				for i, s := range deferred[:n] {
					texts[i] = s.name()
				}
				return fmt.Errorf("%s: %w", strings.Join(texts, "; "), err) // it does not say which one
			}
			deferred = deferred[n:]
		}
		return nil
	}
}

// prepareFrom is the dialect's.
const prepareFrom = 128 << 10

// size is about how many bytes the statement takes with its arguments inside.
func (s statement) size() int {
	return len(s.text) + 2*argBytes(s.args) + 32*len(s.args)
}

// mysqlBadConnection recognizes the driver's own error for a connection that
// broke before anything was sent. It has no name outside of the driver.
func mysqlBadConnection(err error) bool {
	for ; err != nil; err = errors.Unwrap(err) {
		if err.Error() == "bad connection" {
			return true
		}
	}
	return false
}

func mysqlNumber(err error) uint16 {
	var e *mysql.MySQLError
	if errors.As(err, &e) {
		return e.Number
	}
	return 0
}
