#!/usr/bin/env bash
# Installs moto's server, which plays Amazon SQS and SNS on this machine, into an
# environment of its own, unless it is there, and prints the name of its program:
#   MOTO_SERVER=$(./e2e/servers/moto.sh) go test -run Moto ./services/intake
# Needs python3 with venv.
set -euo pipefail
version=5.2.1
dir=${MOTO_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/tidewaiter/moto-$version}
if [ ! -x "$dir/bin/moto_server" ]; then
  rm -rf "$dir"
  python3 -m venv "$dir" >&2
  "$dir/bin/pip" install --quiet --disable-pip-version-check "moto[server]==$version" >&2
fi
echo "$dir/bin/moto_server"
