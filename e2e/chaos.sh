#!/usr/bin/env bash
# The fault suite: what happens to clusters happens to one, and nothing is lost.
#
#   chaos.sh          everything, about half an hour: in process, then on real servers, one broker and three
#   chaos.sh --short  five faults on real servers with a handful of images, some two minutes
#
# It starts its own Kafka, Redis, PostgreSQL and registry on loopback
# (servers/servers.sh), and prints a table: fault, images, how many reached an
# end, how many were attested, layers analysed ÷ distinct layers, dead letters,
# and the seconds from the end of the fault until everything was attested.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export SERVERS="kafka redis postgres distribution"

said=$(mktemp)
trap 'rm -f "$said"' EXIT

# Runs a command that ends with the flags of go test. What was left out stands
# last, with its reason: it is not proven by a test that passes.
tests() { # COMMAND...
  "$@" -v | tee "$said"
  if grep -q -e '--- SKIP' "$said"; then
    echo "LEFT OUT:"
    grep -B1 -e '--- SKIP' "$said"
  fi
}

chaos() { # PATTERN FLAGS...
  local pattern=$1
  shift
  tests ./e2e/servers/servers.sh with go test -count=1 -timeout 90m -tags real -run "$pattern" ./e2e "$@"
}

case ${1:-} in
--short) chaos 'TestChaos' ;;
'')
  tests go test -count=1 -timeout 60m -run 'TestRegistr|TestDiskFull|TestPoison|TestClockSkew|TestRedisFlushed|TestEveryServiceRestarted|TestUpSurvivesKill|TestLoopSurvivesKill' ./e2e -chaos
  chaos 'TestChaos' -chaos
  BROKERS=3 chaos 'TestChaos/(nothing_happens|Kafka_killed,_one_of_three)' -chaos
  ;;
*)
  sed -n '2,12p' "${BASH_SOURCE[0]}" >&2
  exit 2
  ;;
esac
