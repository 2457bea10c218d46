#!/usr/bin/env bash
# Runs Apache Kafka on loopback for tests: one node that is broker and
# controller (KRaft), from the jars of Maven Central. Installs nothing.
#
#   kafka.sh fetch                 download the jars once
#   kafka.sh start DIR [PORT]      format DIR when it is new, start, wait until ready
#   kafka.sh stop DIR              stop; the data stay
#   kafka.sh status DIR            exit 0 when it runs and answers
#
# DIR belongs to one broker. PORT (19092) and the port above it must be free; a
# restart uses the ports of the first start.
#
# Environment:
#   KAFKA_VERSION   default: what pom.xml says
#   KAFKA_JARS      where the jars are kept; default: ~/.cache/tidewaiter/kafka-VERSION
#   KAFKA_HEAP      heap of the broker; default: 256m
#   KAFKA_SECONDS   how long start and stop may take; default: 60
#
# Needs the Debian packages maven (only to fetch) and default-jre-headless.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
version=${KAFKA_VERSION:-$(sed -n 's:.*<kafka\.version>\(.*\)</kafka\.version>.*:\1:p' "$here/pom.xml")}
jars=${KAFKA_JARS:-${XDG_CACHE_HOME:-$HOME/.cache}/tidewaiter/kafka-$version}
heap=${KAFKA_HEAP:-256m}
seconds=${KAFKA_SECONDS:-60}

fail() {
  echo "kafka.sh: $*" >&2
  exit 1
}

need() { # COMMAND PACKAGE
  command -v "$1" >/dev/null || fail "$1 is not installed (Debian: apt-get install $2)"
}

usage() {
  sed -n '2,/^# Needs/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
  exit 2
}

fetch() {
  [[ -e $jars/complete ]] && return
  need mvn maven
  local part
  mkdir -p "$(dirname "$jars")"
  # Beside its final place, so that an interrupted download is never taken for a whole one.
  part=$(mktemp -d "$jars.part.XXXXXX")
  mvn --quiet --batch-mode --file "$here/pom.xml" -Dkafka.version="$version" \
    dependency:copy-dependencies -DincludeScope=runtime -DoutputDirectory="$part" >&2 ||
    { rm -rf "$part"; fail "the jars of Kafka $version could not be fetched"; }
  touch "$part/complete"
  rm -rf "$jars"
  mv "$part" "$jars"
}

java_run() { # HEAP CLASS ARGUMENTS...
  local memory=$1
  shift
  java -Xmx"$memory" -XX:+UseSerialGC -XX:TieredStopAtLevel=1 -Djava.awt.headless=true -cp "$jars/*" "$@"
}

# Prints the process id of DIR's broker; fails when it does not run. The command
# line is looked at, since a number alone may be somebody else's by now.
broker() { # DIR
  local pid
  pid=$(cat "$1/pid" 2>/dev/null) || return 1
  tr '\0' '\n' <"/proc/$pid/cmdline" 2>/dev/null | grep -qxF "$1/server.properties" || return 1
  echo "$pid"
}

answers() { # PORT
  (: <"/dev/tcp/127.0.0.1/$1") 2>/dev/null
}

# Waits until a command succeeds.
await() { # COMMAND...
  local end=$((SECONDS + seconds))
  until "$@"; do
    ((SECONDS < end)) || return 1
    sleep 0.1
  done
}

silent() { ! answers "$1"; }
gone() { ! broker "$1" >/dev/null; }
ready() { # DIR PORT: fails for good when the broker has died
  gone "$1" && { tail -n 30 "$1/server.log" >&2; fail "the broker ended while it started"; }
  grep -q 'Kafka Server started' "$1/server.log" && answers "$2"
}

configure() { # DIR PORT
  cat >"$1/server.properties" <<PROPERTIES
process.roles=broker,controller
node.id=1
controller.quorum.voters=1@127.0.0.1:$(($2 + 1))
controller.listener.names=CONTROLLER
listeners=PLAINTEXT://127.0.0.1:$2,CONTROLLER://127.0.0.1:$(($2 + 1))
advertised.listeners=PLAINTEXT://127.0.0.1:$2
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT
inter.broker.listener.name=PLAINTEXT
log.dirs=$1/log
# Topics are created by those who know their partitions.
auto.create.topics.enable=false
# One node holds one replica of everything.
default.replication.factor=1
min.insync.replicas=1
offsets.topic.replication.factor=1
offsets.topic.num.partitions=4
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
transaction.state.log.num.partitions=1
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
share.coordinator.state.topic.num.partitions=1
# Tests do not wait: the first rebalance is at once, and a broker that comes
# back need not wait long for its former session to end.
group.initial.rebalance.delay.ms=0
broker.session.timeout.ms=3000
broker.heartbeat.interval.ms=500
# Small.
num.network.threads=2
num.io.threads=2
log.segment.bytes=67108864
log.cleaner.dedupe.buffer.size=4194304
PROPERTIES
}

start() { # DIR [PORT]
  need java default-jre-headless
  local dir port
  mkdir -p "$1"
  dir=$(cd "$1" && pwd)
  port=${2:-$(cat "$dir/port" 2>/dev/null || echo 19092)}
  if broker "$dir" >/dev/null; then
    echo "runs already on 127.0.0.1:$(cat "$dir/port")"
    return
  fi
  fetch
  await silent "$port" || fail "port $port is in use"
  await silent $((port + 1)) || fail "port $((port + 1)) is in use"
  configure "$dir" "$port"
  echo "$port" >"$dir/port"
  if [[ ! -e $dir/log/meta.properties ]]; then
    java_run 128m kafka.tools.StorageTool random-uuid >"$dir/cluster" 2>"$dir/format.log" &&
      java_run 128m kafka.tools.StorageTool format --cluster-id "$(tail -n 1 "$dir/cluster")" \
        --config "$dir/server.properties" >>"$dir/format.log" 2>&1 ||
      { cat "$dir/format.log" >&2; fail "$dir could not be formatted"; }
  fi
  : >"$dir/server.log"
  # In a session of its own: the broker outlives this script and its terminal.
  setsid java -Xmx"$heap" -XX:+UseSerialGC -XX:TieredStopAtLevel=1 -XX:MaxDirectMemorySize=128m \
    -XX:+ExitOnOutOfMemoryError -Djava.awt.headless=true -Dlog4j2.level=INFO \
    -cp "$jars/*" kafka.Kafka "$dir/server.properties" >>"$dir/server.log" 2>&1 </dev/null &
  echo $! >"$dir/pid"
  sleep 0.5 # until exec has put the broker's command line in place
  await ready "$dir" "$port" || {
    tail -n 30 "$dir/server.log" >&2
    stop "$dir"
    fail "the broker was not ready after $seconds s"
  }
  echo "ready on 127.0.0.1:$port"
}

stop() { # DIR
  local dir pid
  dir=$(cd "$1" 2>/dev/null && pwd) || fail "$1 does not exist"
  if pid=$(broker "$dir"); then
    kill "$pid"
    await gone "$dir" || kill -9 "$pid"
  fi
  rm -f "$dir/pid"
  echo "stopped"
}

status() { # DIR
  local dir
  dir=$(cd "$1" 2>/dev/null && pwd) || fail "$1 does not exist"
  broker "$dir" >/dev/null && answers "$(cat "$dir/port")" || { echo "does not run"; exit 3; }
  echo "runs on 127.0.0.1:$(cat "$dir/port")"
}

case ${1:-} in
fetch) fetch && echo "$jars" ;;
start | stop | status)
  [[ $# -ge 2 ]] || usage
  "$@"
  ;;
*) usage ;;
esac
