#!/usr/bin/env bash
#
# with-engines.sh COMMAND [ARGUMENT...]
#
# Brings up PostgreSQL, MariaDB and MySQL, runs COMMAND with their addresses in
# the environment, stops and deletes everything it started, and exits as
# COMMAND did. The servers listen on free ports of 127.0.0.1 only.
#
#   NANOMDM_PGSQL_STORAGE_TEST_DSN    a postgres:// URL
#   NANOMDM_MARIADB_STORAGE_TEST_DSN  a go-sql-driver data source name
#   NANOMDM_MYSQL_STORAGE_TEST_DSN    a go-sql-driver data source name
#
# An engine whose variable is already set is yours: it is used, never started
# or stopped. The user these name may create databases: each test makes its own.
#
# Where a Docker engine answers, the servers are those of docker-compose.yml.
# Elsewhere they are Debian's, installed if need be (as root): PostgreSQL and
# MariaDB of the running release; MySQL, which no Debian release holds, from
# unstable in a folder of its own, kept in ${XDG_CACHE_HOME:-~/.cache}.
# Delete that folder to get a newer MySQL. The proxies that tests run (nginx,
# HAProxy, Apache, Caddy) and Prometheus' promtool are installed, too.
#
#   ENGINES_DURABLE=1           keep the engines' default durability. Without it
#                               they skip fsync: right for tests, wrong for
#                               benchmarks.
#   ENGINES_TLS=FOLDER          they also speak TLS, with server.pem and
#                               server.key of that folder. Always Debian's.
#   NANOMDM_ENGINES_OPTIONAL=1  go on, with a warning, without an engine that
#                               cannot be had. Ignored when CI=true.

set -uo pipefail

readonly ready_seconds=180
readonly user=fleet password=insecure database=fleet
readonly cache=${XDG_CACHE_HOME:-${HOME:-/root}/.cache}/nanomdm-engines
readonly mysql_tree=$cache/mysql
readonly compose_file=${BASH_SOURCE[0]%/*}/../../docker-compose.yml

declare -A label=([pgsql]=PostgreSQL [mariadb]=MariaDB [mysql]=MySQL)
declare -A variable=(
	[pgsql]=NANOMDM_PGSQL_STORAGE_TEST_DSN
	[mariadb]=NANOMDM_MARIADB_STORAGE_TEST_DSN
	[mysql]=NANOMDM_MYSQL_STORAGE_TEST_DSN
)
declare -A stop_signal=([pgsql]=INT [mariadb]=TERM [mysql]=TERM)
declare -A port=() server=() initializer=()
engines=()      # what is ours to start
work=           # data of PostgreSQL and MariaDB, logs of all
mysql_work=     # data of MySQL, inside its tree
mysql_building= # a tree in the making
policy=         # set while our policy-rc.d is in place
compose_project=
command_pid=

say() { printf 'with-engines: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

durable() { [[ ${ENGINES_DURABLE:-} == 1 ]]; }
tls() { [[ -n ${ENGINES_TLS:-} ]]; }
root() { ((EUID == 0)); }

# without ENGINE REASON: the engine is not available. Ends the run, unless the
# caller allows runs without it.
without() {
	if [[ ${NANOMDM_ENGINES_OPTIONAL:-} != 1 || ${CI:-} == true ]]; then
		die "no ${label[$1]}: $2"
	fi
	say "WARNING: going on without ${label[$1]}: $2"
	local left=() e
	for e in "${engines[@]}"; do
		[[ $e == "$1" ]] || left+=("$e")
	done
	engines=("${left[@]+"${left[@]}"}")
	stop_servers "$1"
}

show_log() {
	[[ -s $work/$1.log ]] || return 0
	say "the end of ${label[$1]}'s log:"
	tail -n 25 "$work/$1.log" >&2
}

# --- ending ---

stop_servers() {
	local e pids=()
	for e in "$@"; do
		if [[ -n ${initializer[$e]:-} ]]; then
			# With its children: what it was making is thrown away.
			kill -KILL -- "-${initializer[$e]}" "${initializer[$e]}" 2>/dev/null
			wait "${initializer[$e]}" 2>/dev/null
			unset "initializer[$e]"
		fi
		[[ -n ${server[$e]:-} ]] || continue
		kill -"${stop_signal[$e]}" "${server[$e]}" 2>/dev/null && pids+=("${server[$e]}")
		unset "server[$e]"
	done
	local deadline=$((SECONDS + 30)) pid
	for pid in "${pids[@]+"${pids[@]}"}"; do
		while kill -0 "$pid" 2>/dev/null && ((SECONDS < deadline)); do
			sleep 0.1
		done
		kill -KILL "$pid" 2>/dev/null
		wait "$pid" 2>/dev/null
	done
}

end_building() {
	[[ -n $mysql_building ]] || return 0
	umount "$mysql_building/tree/proc" "$mysql_building/tree/sys" 2>/dev/null
	rm -rf --one-file-system "$mysql_building"
	mysql_building=
}

end_policy() {
	[[ -n $policy ]] || return 0
	rm -f "$policy"
	policy=
}

cleanup() {
	local code=$?
	trap - EXIT
	trap '' INT TERM HUP # a second Ctrl-C must not leave half of it behind
	if [[ -n $compose_project ]]; then
		compose down --volumes --timeout 5 >/dev/null 2>&1
	fi
	stop_servers pgsql mariadb mysql
	end_policy
	end_building
	[[ -n $work ]] && rm -rf "$work"
	[[ -n $mysql_work ]] && rm -rf "$mysql_work"
	exit "$code"
}

# interrupted SIGNAL NUMBER: passes the signal to COMMAND if it runs (its exit
# then ends us, in run), else ends at once.
interrupted() {
	if [[ -n $command_pid ]]; then
		kill -"$1" "$command_pid" 2>/dev/null
	else
		exit $((128 + $2))
	fi
}

# --- ports, users, readiness ---

# pick_port ENGINE: ports below the range that outgoing connections and tests'
# listeners on port 0 are given.
pick_port() {
	local candidate other taken
	while :; do
		candidate=$((20000 + RANDOM % 12000))
		(exec 3<>"/dev/tcp/127.0.0.1/$candidate") 2>/dev/null && continue
		taken=
		for other in "${port[@]+"${port[@]}"}"; do
			[[ $other == "$candidate" ]] && taken=1
		done
		[[ -z $taken ]] && break
	done
	port[$1]=$candidate
}

# as USER SIGNAL COMMAND...: replaces this process. The servers refuse to run as
# root. They get a session of their own, so that Ctrl-C ends COMMAND and leaves
# the stopping to us; the kernel sends them SIGNAL should we be killed outright.
as() {
	local name=$1 signal=$2
	shift 2
	cd / || exit 1
	if root; then
		exec setsid setpriv --reuid="$name" --regid="$name" --init-groups --pdeathsig="$signal" -- "$@"
	fi
	exec setsid setpriv --pdeathsig="$signal" -- "$@"
}

in_mysql_tree() {
	exec setsid chroot "$mysql_tree" \
		setpriv --reuid=mysql --regid=mysql --init-groups --pdeathsig="${stop_signal[mysql]}" -- "$@"
}

# answers ENGINE: whether the server takes connections. The MySQL family
# greets first, and only after its init file ran.
answers() {
	case $1 in
	pgsql) "$pgsql_bin/pg_isready" -q -h 127.0.0.1 -p "${port[pgsql]}" ;;
	*) (
		exec 3<>"/dev/tcp/127.0.0.1/${port[$1]}" && read -r -n 1 -t 5 -u 3 _
	) 2>/dev/null ;;
	esac
}

wait_ready() {
	local deadline=$((SECONDS + ready_seconds))
	until answers "$1"; do
		kill -0 "${server[$1]}" 2>/dev/null || return 1
		((SECONDS < deadline)) || return 1
		sleep 0.2
	done
	# A stranger on the same port would answer too.
	kill -0 "${server[$1]}" 2>/dev/null
}

export_dsn() {
	case $1 in
	pgsql) export "${variable[$1]}=postgres://$user:$password@127.0.0.1:${port[$1]}/$database?sslmode=disable" ;;
	*) export "${variable[$1]}=$user:$password@tcp(127.0.0.1:${port[$1]})/$database" ;;
	esac
}

# --- installing ---

updated=
apt_install() {
	if ! root; then
		say "to install what is missing: apt-get install $* (as root)"
		return 1
	fi
	if ! command -v apt-get >/dev/null; then
		say "no apt-get here: start a Docker engine, or set the ..._STORAGE_TEST_DSN variables"
		return 1
	fi
	# Packages must not start servers of their own.
	if [[ ! -e /usr/sbin/policy-rc.d ]]; then
		policy=/usr/sbin/policy-rc.d
		printf '#!/bin/sh\nexit 101\n' >"$policy" && chmod 755 "$policy"
	fi
	local code=0
	if [[ -z $updated ]]; then
		apt-get -q -o DPkg::Lock::Timeout=300 update >>"$work/apt.log" 2>&1 || code=$?
		updated=1
	fi
	say "installing $*"
	if ((code == 0)); then
		DEBIAN_FRONTEND=noninteractive apt-get -q -y -o DPkg::Lock::Timeout=300 \
			install --no-install-recommends "$@" >>"$work/apt.log" 2>&1 </dev/null || code=$?
	fi
	end_policy
	((code == 0)) || tail -n 25 "$work/apt.log" >&2
	return "$code"
}

find_pgsql() {
	pgsql_bin=$(printf '%s\n' /usr/lib/postgresql/*/bin/initdb | sort -V | tail -n 1)
	pgsql_bin=${pgsql_bin%/initdb}
	[[ -x $pgsql_bin/initdb ]]
}

find_mariadb() {
	mariadb_server=$(PATH=$PATH:/usr/sbin command -v mariadbd) &&
		mariadb_install=$(command -v mariadb-install-db) &&
		command -v my_print_defaults >/dev/null
}

# debian_mirror: the first mirror of Debian itself in the machine's own apt
# sources, as apt reads them in either form.
debian_mirror() {
	# shellcheck disable=SC2016 # the $(...) are apt's own
	apt-get indextargets --format '$(ORIGIN)/$(LABEL) $(REPO_URI)' 'Identifier: Packages' |
		awk '$1 == "Debian/Debian" && $2 ~ /^https?:/ { print $2; exit }'
}

# prepare_tools: nginx, HAProxy, Apache and Caddy run in tests with the examples of
# docs/proxies, Prometheus' promtool reads the alert rules, Python a consumer of
# webhooks, and systemd-analyze the unit. A test that
# misses its tool is skipped, and fails if CI=true.
prepare_tools() {
	local missing=() p
	for p in nginx haproxy apache2 caddy; do
		command -v "$p" >/dev/null || missing+=("$p")
	done
	command -v promtool >/dev/null || missing+=(prometheus)
	command -v python3 >/dev/null || missing+=(python3)
	[[ -x /usr/sbin/pgbouncer ]] || missing+=(pgbouncer)
	# For systemd-analyze, by itself: where it cannot be installed, the rest can.
	command -v systemd-analyze >/dev/null || apt_install systemd || say "WARNING: going on without systemd-analyze"
	((${#missing[@]} == 0)) && return
	if ! apt_install "${missing[@]}"; then
		say "WARNING: going on without ${missing[*]}"
		return
	fi
	# Installed for tests: not to be started at the next boot either.
	[[ -d /run/systemd/system ]] && systemctl disable --quiet "${missing[@]}" 2>/dev/null
	return 0
}

prepare_pgsql() {
	find_pgsql && return
	apt_install postgresql || return
	# Installed for tests: not to be started at the next boot either.
	[[ -d /run/systemd/system ]] && systemctl disable --quiet postgresql 2>/dev/null
	find_pgsql
}

prepare_mariadb() {
	if ! find_mariadb; then
		# The packages without the service; the client's hold a part of the server's setup.
		apt_install mariadb-server-core mariadb-client-core && find_mariadb || return
	fi
	root || return 0
	id -u mysql >/dev/null 2>&1 ||
		useradd --system --user-group --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin mysql
}

prepare_mysql() {
	if ! root; then
		say "MySQL runs from a folder of Debian unstable, under chroot, which takes root:" \
			"run this as root, start a Docker engine, or set ${variable[mysql]}"
		return 1
	fi
	[[ -d $mysql_tree ]] && return
	command -v debootstrap >/dev/null || apt_install debootstrap || return
	local mirror
	mirror=$(debian_mirror)
	if [[ -z $mirror ]]; then
		apt-get -q update >>"$work/apt.log" 2>&1
		mirror=$(debian_mirror)
	fi
	if [[ -z $mirror ]]; then
		say "the apt sources of this machine name no mirror of Debian"
		return 1
	fi
	say "fetching MySQL from Debian unstable into $mysql_tree (once, about 560 MB)"
	mkdir -p "$cache" && mysql_building=$(mktemp -d "$cache/building.XXXXXX") || return
	local tree=$mysql_building/tree
	if ! debootstrap --variant=minbase --include=mysql-server-core sid "$tree" "$mirror" \
		>"$work/mysql.log" 2>&1 </dev/null; then
		return 1
	fi
	{
		chroot "$tree" id -u mysql ||
			chroot "$tree" useradd --system --user-group --no-create-home --shell /usr/sbin/nologin mysql
		install -d "$tree/run/mysqld" && chroot "$tree" chown mysql:mysql /run/mysqld &&
			rm -rf "$tree"/var/cache/apt/archives/*.deb "$tree"/var/lib/apt/lists/* &&
			chroot "$tree" mysqld --no-defaults --version
	} >>"$work/mysql.log" 2>&1 || return
	# Only a whole tree ever has this name. If another run was first, theirs is as good.
	mv -T "$tree" "$mysql_tree" 2>>"$work/mysql.log" || [[ -d $mysql_tree ]] || return
	end_building
}

# --- PostgreSQL ---

init_pgsql() {
	local locale=(--locale=C.UTF-8)
	# Servers in the field sort by language; tests should meet that too.
	if "$pgsql_bin/initdb" --help | grep -q icu-locale; then
		locale+=(--locale-provider=icu --icu-locale=en-US)
	fi
	printf '%s\n' "$password" >"$work/pgsql/password" && chmod 644 "$work/pgsql/password" || exit
	as postgres "${stop_signal[pgsql]}" "$pgsql_bin/initdb" -D "$work/pgsql/data" -U "$user" --pwfile="$work/pgsql/password" \
		--auth=scram-sha-256 --encoding=UTF8 --no-sync "${locale[@]}"
}

start_pgsql() {
	local relaxed=(-c fsync=off -c synchronous_commit=off -c full_page_writes=off)
	durable && relaxed=()
	tls && relaxed+=(-c ssl=on -c ssl_cert_file="$work/pgsql/server.pem" -c ssl_key_file="$work/pgsql/server.key")
	as postgres "${stop_signal[pgsql]}" "$pgsql_bin/postgres" -D "$work/pgsql/data" -p "${port[pgsql]}" \
		-c listen_addresses=127.0.0.1 -c unix_socket_directories= -c max_connections=400 \
		"${relaxed[@]+"${relaxed[@]}"}"
}

finish_pgsql() {
	PGPASSWORD=$password "$pgsql_bin/psql" -X -q -h 127.0.0.1 -p "${port[pgsql]}" -U "$user" -d postgres \
		-c "CREATE DATABASE $database" >>"$work/pgsql.log" 2>&1
}

version_pgsql() { "$pgsql_bin/postgres" --version | grep -oE '[0-9]+\.[0-9]+' | head -n 1; }

# --- MariaDB and MySQL ---

accounts() {
	printf '%s\n' \
		"CREATE DATABASE $database;" \
		"CREATE USER '$user'@'%' IDENTIFIED BY '$password';" \
		"GRANT ALL ON *.* TO '$user'@'%' WITH GRANT OPTION;"
}

init_mariadb() {
	accounts >"$work/mariadb/accounts.sql" && chmod 644 "$work/mariadb/accounts.sql" || exit
	as mysql "${stop_signal[mariadb]}" "$mariadb_install" --no-defaults --datadir="$work/mariadb/data" \
		--auth-root-authentication-method=normal --skip-test-db --skip-name-resolve
}

start_mariadb() {
	local relaxed=(--innodb-flush-log-at-trx-commit=0 --innodb-doublewrite=0 --innodb-flush-method=nosync)
	durable && relaxed=()
	tls && relaxed+=(--ssl-cert="$work/mariadb/server.pem" --ssl-key="$work/mariadb/server.key")
	# The character set is what Debian's own configuration sets.
	as mysql "${stop_signal[mariadb]}" "$mariadb_server" --no-defaults --datadir="$work/mariadb/data" \
		--bind-address=127.0.0.1 --port="${port[mariadb]}" --skip-name-resolve \
		--socket="$work/mariadb/socket" --pid-file="$work/mariadb/data/pid" \
		--init-file="$work/mariadb/accounts.sql" --max-connections=400 \
		--character-set-server=utf8mb4 "${relaxed[@]+"${relaxed[@]}"}"
}

version_mariadb() { "$mariadb_server" --no-defaults --version | grep -oE '[0-9]+\.[0-9]+\.[0-9]+' | head -n 1; }

init_mysql() {
	accounts >"$mysql_work/accounts.sql" && chmod 644 "$mysql_work/accounts.sql" || exit
	local inside=${mysql_work#"$mysql_tree"}
	in_mysql_tree mysqld --no-defaults --initialize-insecure --datadir="$inside/data" \
		--innodb-flush-method=nosync --innodb-doublewrite=OFF
}

start_mysql() {
	local relaxed=(--skip-log-bin --innodb-flush-log-at-trx-commit=0 --innodb-doublewrite=OFF --innodb-flush-method=nosync)
	durable && relaxed=()
	local inside=${mysql_work#"$mysql_tree"}
	tls && relaxed+=(--ssl-cert="$inside/server.pem" --ssl-key="$inside/server.key")
	in_mysql_tree mysqld --no-defaults --datadir="$inside/data" \
		--bind-address=127.0.0.1 --port="${port[mysql]}" --skip-name-resolve \
		--socket="$inside/socket" --pid-file="$inside/data/pid" \
		--init-file="$inside/accounts.sql" --max-connections=400 \
		--mysqlx=OFF --secure-file-priv= "${relaxed[@]+"${relaxed[@]}"}"
}

version_mysql() { chroot "$mysql_tree" mysqld --no-defaults --version | grep -oE '[0-9]+\.[0-9]+\.[0-9]+' | head -n 1; }

# --- the two ways to have servers ---

make_folders() {
	local e
	for e in pgsql mariadb; do
		mkdir "$work/$e" || return
	done
	if root; then
		id -u postgres >/dev/null 2>&1 && chown postgres:postgres "$work/pgsql"
		id -u mysql >/dev/null 2>&1 && chown mysql:mysql "$work/mariadb"
	fi
	copy_certificate "$work/pgsql" postgres && copy_certificate "$work/mariadb" mysql || return
	if [[ " ${engines[*]} " == *" mysql "* ]]; then
		make_mysql_folder && copy_certificate "$mysql_work" "$(stat -c %u:%g "$mysql_work")"
	fi
}

# copy_certificate FOLDER OWNER: the servers insist that the key is their own.
copy_certificate() {
	tls || return 0
	install -m 600 "$ENGINES_TLS/server.pem" "$ENGINES_TLS/server.key" "$1" || return
	root || return 0
	chown "$2" "$1/server.pem" "$1/server.key"
}

# MySQL's data lies in the kept tree, where nobody else tidies up: what runs that
# were killed left there goes first. A folder in use is locked, by its server too.
make_mysql_folder() {
	local tidying folder
	exec {tidying}<"$mysql_tree/srv" && flock "$tidying" || return
	for folder in "$mysql_tree"/srv/nanomdm.*; do
		[[ -d $folder ]] && flock --nonblock "$folder" rm -rf "$folder"
	done
	mysql_work=$(mktemp -d "$mysql_tree/srv/nanomdm.XXXXXX") || return
	exec {mysql_work_lock}<"$mysql_work" && flock "$mysql_work_lock" || return
	exec {tidying}<&-
	chroot "$mysql_tree" chown mysql:mysql "${mysql_work#"$mysql_tree"}"
}

start_packages() {
	local e
	for e in "${engines[@]}"; do
		"prepare_$e" || { show_log "$e"; without "$e" "it could not be installed"; }
	done
	make_folders || die "cannot make the data folders"
	# Each engine spends its first seconds on files of its own: side by side.
	for e in "${engines[@]}"; do
		"init_$e" >"$work/$e.log" 2>&1 </dev/null &
		initializer[$e]=$!
	done
	for e in "${engines[@]}"; do
		wait "${initializer[$e]}" || { show_log "$e"; without "$e" "it could not make its data folder"; }
		unset "initializer[$e]"
	done
	for e in "${engines[@]}"; do
		pick_port "$e"
		say "starting ${label[$e]} $("version_$e") on port ${port[$e]}"
		"start_$e" >>"$work/$e.log" 2>&1 </dev/null &
		server[$e]=$!
	done
	for e in "${engines[@]}"; do
		if wait_ready "$e" && { [[ $e != pgsql ]] || finish_pgsql; }; then
			export_dsn "$e"
		else
			show_log "$e"
			without "$e" "it did not start"
		fi
	done
}

compose() { docker compose --project-name "$compose_project" --file "$compose_file" "$@"; }

start_containers() {
	local e services=()
	for e in "${engines[@]}"; do
		pick_port "$e"
		case $e in
		pgsql) services+=(postgres) ;;
		*) services+=("$e") ;;
		esac
		say "starting ${label[$e]} in a container on port ${port[$e]}"
	done
	export NANOMDM_PGSQL_PORT=${port[pgsql]:-} NANOMDM_MARIADB_PORT=${port[mariadb]:-} NANOMDM_MYSQL_PORT=${port[mysql]:-}
	# Memory forgets what a disk keeps; a benchmark must pay for the disk.
	durable && export NANOMDM_ENGINES_DATA=volume
	compose_project=nanomdm-engines-$$
	if ! compose up --detach --wait --wait-timeout "$ready_seconds" "${services[@]}" >&2 </dev/null; then
		compose logs --tail 25 >&2
		die "docker compose did not bring up: ${services[*]}"
	fi
	for e in "${engines[@]}"; do
		export_dsn "$e"
	done
}

docker_answers() { docker info >/dev/null 2>&1 && docker compose version >/dev/null 2>&1; }

run() {
	# In the background, so that a signal reaches us at once; with the terminal
	# and the signals a foreground command has.
	env --default-signal=INT,QUIT -- "$@" <&0 &
	command_pid=$!
	local code
	while :; do
		wait "$command_pid"
		code=$?
		# wait also returns when a trap ran: then the command is still there.
		kill -0 "$command_pid" 2>/dev/null || break
	done
	# A trap may have eaten the status the first time; the shell remembers it.
	wait "$command_pid" 2>/dev/null
	local remembered=$?
	((remembered == 127)) || code=$remembered
	command_pid=
	exit "$code"
}

(($# > 0)) || { echo "usage: ${0##*/} COMMAND [ARGUMENT...]" >&2; exit 2; }

for engine in pgsql mariadb mysql; do
	name=${variable[$engine]}
	[[ -n ${!name:-} ]] || engines+=("$engine")
done

trap cleanup EXIT
trap 'interrupted INT 2' INT
trap 'interrupted TERM 15' TERM
trap 'interrupted HUP 1' HUP

if ((${#engines[@]} > 0)); then
	work=$(mktemp -d "${TMPDIR:-/tmp}/nanomdm-engines.XXXXXX") || exit 1
	chmod 711 "$work"
	prepare_tools
	if ! tls && docker_answers; then
		start_containers
	else
		start_packages
	fi
fi
run "$@"
