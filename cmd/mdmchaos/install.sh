#!/usr/bin/env bash
#
# install.sh [PACKAGE...]: installs the programs that mdmchaos runs, from
# Debian's packages, where they are missing: postgresql, haproxy, pgbouncer and
# galera, or those that are named. No server is started or enabled: mdmchaos
# starts its own, on free ports of 127.0.0.1.
set -euo pipefail

(($# > 0)) || set -- postgresql haproxy pgbouncer galera
PATH=$PATH:/usr/sbin
missing=()
for package; do
	case $package in
	postgresql) compgen -G '/usr/lib/postgresql/*/bin/initdb' >/dev/null || missing+=(postgresql) ;;
	haproxy | pgbouncer) command -v "$package" >/dev/null || missing+=("$package") ;;
	galera)
		[[ -x /usr/sbin/mariadbd && -x /usr/bin/wsrep_sst_rsync ]] || missing+=(mariadb-server)
		[[ -e /usr/lib/galera/libgalera_smm.so ]] || missing+=(galera-4)
		command -v rsync >/dev/null || missing+=(rsync)
		command -v lsof >/dev/null || missing+=(lsof) # the state transfer asks it who listens
		;;
	*)
		echo "install.sh: $package is not one of postgresql, haproxy, pgbouncer, galera" >&2
		exit 2
		;;
	esac
done
((${#missing[@]} > 0)) || exit 0

if ((EUID != 0)) || ! command -v apt-get >/dev/null; then
	echo "install.sh: mdmchaos needs Debian, root, and: apt-get install ${missing[*]}" >&2
	exit 1
fi
policy=/usr/sbin/policy-rc.d
if [[ ! -e $policy ]]; then
	trap 'rm -f "$policy"' EXIT
	printf '#!/bin/sh\nexit 101\n' >"$policy"
	chmod 755 "$policy"
fi
echo "install.sh: installing ${missing[*]}" >&2
apt-get -q -o DPkg::Lock::Timeout=300 update >&2
DEBIAN_FRONTEND=noninteractive apt-get -q -y -o DPkg::Lock::Timeout=300 install --no-install-recommends "${missing[@]}" >&2
if [[ -d /run/systemd/system ]]; then
	for unit in postgresql mariadb haproxy pgbouncer; do
		systemctl disable --quiet "$unit" 2>/dev/null || true
	done
fi
