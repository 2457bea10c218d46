#!/usr/bin/env bash
# Installs Debian packages without starting the servers that are in them.
#   apt.sh PACKAGE...
set -euo pipefail
(($#)) || { echo "usage: apt.sh PACKAGE..." >&2; exit 2; }

sudo=()
[[ $(id -u) == 0 ]] || sudo=(sudo)
policy=/usr/sbin/policy-rc.d
# One at a time: the first to end would take the policy away from the second.
exec 8>"${TMPDIR:-/tmp}/tidewaiter-apt.$(id -u).lock"
flock 8

own=
forget() { [[ ! $own ]] || "${sudo[@]}" rm -f "$policy"; }
trap forget EXIT
if [[ ! -e $policy ]]; then
  own=1
  printf '#!/bin/sh\nexit 101\n' | "${sudo[@]}" tee "$policy" >/dev/null
  "${sudo[@]}" chmod 755 "$policy"
fi
# A machine that has just started often updates itself.
patient=(-q -o DPkg::Lock::Timeout=600)
echo "installing $*" >&2
{
  "${sudo[@]}" apt-get "${patient[@]}" update
  "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get "${patient[@]}" install -y --no-install-recommends "$@"
} >&2 8>&- || { echo "apt.sh: could not install $*; install them and try again" >&2; exit 1; }
