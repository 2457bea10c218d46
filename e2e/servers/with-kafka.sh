#!/usr/bin/env bash
# Runs a command beside a real Kafka that is started for it and stopped after:
#   with-kafka.sh go test -tags real ./libs/bus/...
# The command finds the broker in TIDEWAITER_KAFKA (host:port), and how to stop
# and start it in TIDEWAITER_KAFKA_CTL. KAFKA_PORT (19092) chooses the port.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
[ $# -gt 0 ] || { sed -n '2,5p' "${BASH_SOURCE[0]}" >&2; exit 2; }

data=$(mktemp -d)
trap '"$here/kafka.sh" stop "$data" >/dev/null 2>&1 || true; rm -rf "$data"' EXIT
"$here/kafka.sh" start "$data" "${KAFKA_PORT:-19092}"
TIDEWAITER_KAFKA=127.0.0.1:${KAFKA_PORT:-19092} TIDEWAITER_KAFKA_CTL="$here/kafka.sh $data" "$@"
