#!/usr/bin/env bash
# Real servers on loopback for tests, without containers: Apache Kafka, Redis,
# PostgreSQL and two registries that notify intake. See README.md beside this.
#
#   servers.sh up                     install what is missing, start, wait until all answer
#   servers.sh down                   stop all and wait; the data stay
#   servers.sh status                 what runs, where and since when; exit 3 when something does not
#   servers.sh wipe                   down, and delete the directory
#   servers.sh start NAME [N]         start one server (kafka N: one broker) and wait until it answers
#   servers.sh stop|kill NAME [N]     end it in order, or with -9, and wait until it is gone
#   servers.sh pause|resume NAME [N]  let it hang (SIGSTOP), and go on
#   servers.sh log NAME [N]           print its log
#   servers.sh with COMMAND...        up, run the command, down; without DIR in a directory of its own, wiped after
#   servers.sh env COMMAND...         run the command with the environment of what runs
#   servers.sh psql|redis-cli ...     the client, as administrator
#   servers.sh install                only install and fetch what SERVERS need
#
# NAME is one of: kafka redis postgres docker-registry distribution, and with
# AUTH=1 tokens, which says who may do what in distribution
#
# Environment, remembered by the directory from its first `up`:
#   DIR        where everything is; default: .cache/servers of the repository
#   SERVERS    which of the names; default: all. A later `up` may name more.
#   BROKERS    Kafka brokers, 1 or 3 (three replicas, two in sync); default: 1
#   TLS=1      TLS everywhere, by an authority made for the directory
#   AUTH=1     passwords everywhere: SCRAM-SHA-512, Redis ACL, scram-sha-256, htpasswd (docker-registry),
#              tokens (distribution)
#   MTLS=1     with TLS: registries want a client certificate
#   INTAKE_URL where registries send notifications; default: http://127.0.0.1:<chosen>
#   KAFKA_1_PORT KAFKA_1_CONTROLLER_PORT … REDIS_PORT POSTGRES_PORT DOCKER_REGISTRY_PORT
#   DISTRIBUTION_PORT INTAKE_PORT CATALOG_PORT SWEEPER_PORT MONITOR_PORT; default: free ones
# And: SECONDS_TO_START (90), KAFKA_HEAP (256m), KAFKA_VERSION, KAFKA_JARS
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repository=$(cd "$here/../.." && pwd)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/tidewaiter
seconds=${SECONDS_TO_START:-90}
all_servers="kafka redis postgres docker-registry distribution"
known_servers="$all_servers tokens"

for part in common kafka redis postgres registries; do
  # shellcheck source=/dev/null
  . "$here/lib/$part.sh"
done

usage() {
  sed -n '2,/^# And:/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
  exit 2
}

# Takes the directory's settings; what the environment says must agree with them.
settings() {
  local name wish
  for name in BROKERS TLS AUTH MTLS; do
    wish=${!name:-}
    if [[ -e $dir/settings ]]; then
      declare -g "$name=$(sed -n "s/^$name=//p" "$dir/settings")"
      [[ -z $wish || $wish == "${!name}" ]] ||
        fail "$dir was made with $name=${!name}, and $name=$wish is asked for: choose another DIR, or wipe it"
    fi
  done
  BROKERS=${BROKERS:-1} TLS=${TLS:-0} AUTH=${AUTH:-0} MTLS=${MTLS:-0}
  [[ $BROKERS == [13] ]] || fail "BROKERS is $BROKERS, 1 or 3 is possible"
  [[ $TLS$AUTH$MTLS =~ ^[01]{3}$ ]] || fail "TLS, AUTH and MTLS are 0 or 1"
  ((TLS)) || ((!MTLS)) || fail "MTLS=1 needs TLS=1"
  if [[ -e $dir/settings ]]; then
    SERVERS="$(sed -n 's/^SERVERS=//p' "$dir/settings") ${SERVERS:-}"
    INTAKE_URL=${INTAKE_URL:-$(sed -n 's/^INTAKE_URL=//p' "$dir/settings")}
  fi
  SERVERS=${SERVERS:-$all_servers}
  ((!AUTH)) || [[ " $SERVERS " != *" distribution "* ]] || SERVERS+=" tokens"
  for name in $SERVERS; do
    [[ " $known_servers " == *" $name "* ]] || fail "there is no server $name; known are: $known_servers"
  done
}

# Without `up` there is nothing to speak of.
existing() {
  [[ -e $dir/settings ]] || fail "there are no servers in $dir (servers.sh up makes them; DIR names another place)"
  settings
}

keep_settings() {
  local chosen= name
  for name in $known_servers; do [[ " $SERVERS " != *" $name "* ]] || chosen+=" $name"; done
  SERVERS=${chosen# }
  INTAKE_URL=${INTAKE_URL:-http://127.0.0.1:$(port intake)}
  printf '%s\n' "BROKERS=$BROKERS" "TLS=$TLS" "AUTH=$AUTH" "MTLS=$MTLS" "SERVERS=$SERVERS" "INTAKE_URL=$INTAKE_URL" >"$dir/settings.new"
  mv "$dir/settings.new" "$dir/settings"
}

# Prints the processes that stand behind names, Kafka's brokers one by one.
members() { # NAME...
  local name n
  for name in "$@"; do
    if [[ $name == kafka ]]; then
      for ((n = 1; n <= BROKERS; n++)); do echo "kafka-$n"; done
    else
      echo "$name"
    fi
  done
}

start_one() { # MEMBER
  running "$1" >/dev/null && return
  case $1 in
  kafka-*) kafka_start "${1#kafka-}" ;;
  redis) redis_start ;;
  postgres) postgres_start ;;
  tokens) tokens_start ;;
  *) registry_start "$1" ;;
  esac
}

check_one() { # MEMBER
  case $1 in
  kafka-*) kafka_check "${1#kafka-}" ;;
  redis) redis_check ;;
  postgres) postgres_check ;;
  tokens) tokens_check ;;
  *) registry_check "$1" ;;
  esac
}

install_packages() {
  local name missing=()
  lacks() { command -v "$1" >/dev/null || missing+=("$2"); }
  lacks openssl openssl
  for name in $SERVERS; do
    case $name in
    kafka)
      lacks java default-jre-headless
      [[ -e $kafka_jars/complete ]] || lacks mvn maven
      ;;
    redis) lacks redis-server redis-server ;;
    postgres) compgen -G '/usr/lib/postgresql/*/bin/postgres' >/dev/null || missing+=(postgresql) ;;
    docker-registry)
      lacks docker-registry docker-registry
      lacks curl curl
      ;;
    distribution) lacks curl curl ;;
    esac
    [[ $name != docker-registry ]] || ((!AUTH)) || lacks htpasswd apache2-utils
  done
  ((!${#missing[@]})) || "$here/apt.sh" "${missing[@]}" || fail "packages are missing: ${missing[*]}"
  [[ " $SERVERS " != *" kafka "* ]] || kafka_fetch
  [[ " $SERVERS " != *" distribution "* ]] || distribution_build >/dev/null
}

up() {
  mkdir -p "$dir"
  chmod 755 "$dir"
  settings
  mkdir -p "$dir/secrets"
  chmod 700 "$dir/secrets"
  install_packages
  keep_settings
  ((!TLS)) || certificates
  postgres_passwords
  local member
  for member in $(members $SERVERS); do start_one "$member"; done
  for member in $(members $SERVERS); do ready "$member" check_one "$member"; done
  write_environment
  # The whole pipeline needs these three.
  if [[ " $SERVERS " == *" kafka "* && " $SERVERS " == *" redis "* && " $SERVERS " == *" postgres "* ]]; then
    prepare
    write_configuration
  fi
  status
}

# The key that signs statements and the small built-in set of advisories, which
# make the configuration complete.
prepare() {
  [[ -e $dir/advisories.db ]] && return
  need go golang
  secret attestor >/dev/null
  secret api >/dev/null
  (cd "$repository/e2e" && go run ./servers/prepare "$dir") || fail "the signing key and the advisories could not be made"
}

write_environment() {
  (
    umask 077
    {
      echo "# Written by servers.sh: how its servers are reached. It holds no secret; *_FILE name the files that do."
      echo "SERVERS_DIR=$dir"
      echo "SERVERS_CONFIG=$dir/tidewaiter.yaml"
      echo "SERVERS_TLS=$TLS"
      echo "SERVERS_AUTH=$AUTH"
      echo "SERVERS_INTAKE_URL=$INTAKE_URL"
      echo "SERVERS_HOOK_TOKEN_FILE=$(secret hook)"
      echo "SERVERS_API_TOKEN_FILE=$(secret api)"
      echo "SERVERS_PUBLIC_KEY_FILE=$dir/secrets/attestor.pub"
      echo "SERVERS_ADVISORIES=$dir/advisories.db"
      if ((TLS)); then
        echo "SERVERS_CA_FILE=$dir/secrets/ca.crt"
        echo "SERVERS_CLIENT_CERT_FILE=$dir/secrets/client.crt"
        echo "SERVERS_CLIENT_KEY_FILE=$dir/secrets/client.key"
      fi
      local name
      for name in $SERVERS; do
        case $name in
        kafka)
          echo "SERVERS_KAFKA=$(kafka_brokers)"
          ((!AUTH)) || account KAFKA kafka
          ;;
        redis)
          echo "SERVERS_REDIS_URL=$(redis_url tidewaiter)"
          ((!AUTH)) || account REDIS redis
          ;;
        postgres)
          # The passwords are in the file that the URLs name as passfile.
          echo "SERVERS_POSTGRES_URL='$(postgres_url tidewaiter tidewaiter)'"
          echo "SERVERS_POSTGRES_ADMIN_URL='$(postgres_url admin tidewaiter)'"
          ((!AUTH)) || account POSTGRES postgres
          ;;
        docker-registry) echo "SERVERS_DOCKER_REGISTRY=127.0.0.1:$(port docker-registry)" ;;
        distribution) echo "SERVERS_DISTRIBUTION=127.0.0.1:$(port distribution)" ;;
        esac
      done
      if ((AUTH)); then
        echo "SERVERS_REGISTRY_USERNAME=tidewaiter"
        echo "SERVERS_REGISTRY_PASSWORD_FILE=$(secret registry.tidewaiter)"
        # Where tests add users: htpasswd's file, and that of tokens.
        echo "SERVERS_REGISTRY_HTPASSWD=$dir/secrets/htpasswd"
        echo "SERVERS_REGISTRY_USERS=$dir/secrets/registry.users"
      fi
    } >"$dir/servers.env"
  )
}

account() { # PREFIX SERVER
  echo "SERVERS_$1_USERNAME=tidewaiter"
  echo "SERVERS_$1_PASSWORD_FILE=$(secret "$2.tidewaiter")"
  echo "SERVERS_$1_ADMIN_USERNAME=admin"
  echo "SERVERS_$1_ADMIN_PASSWORD_FILE=$(secret "$2.admin")"
}

write_configuration() {
  local s=$dir/secrets name
  has() { [[ " $SERVERS " == *" $1 "* ]]; }
  (
    umask 077
    {
      echo "# Written by servers.sh, for: tidewaiter run all --config $dir/tidewaiter.yaml"
      echo "http: {listen: 127.0.0.1:$(port monitor)}"
      if has kafka; then
        echo "kafka:"
        echo "  brokers: [$(kafka_brokers)]"
        echo "  replication: $BROKERS"
        ((!AUTH)) || echo "  username: tidewaiter"
        ((!AUTH)) || echo "  passwordFile: $s/kafka.tidewaiter"
        ((!TLS)) || echo "  tls: {caFile: $s/ca.crt}"
      fi
      if has redis; then
        echo "redis:"
        echo "  url: $(redis_url tidewaiter)"
        ((!AUTH)) || echo "  passwordFile: $s/redis.tidewaiter"
        ((!TLS)) || echo "  tls: {caFile: $s/ca.crt}"
      fi
      if has postgres; then
        echo "database:"
        echo "  url: $(postgres_url tidewaiter tidewaiter)"
      fi
      if has docker-registry || has distribution; then
        echo "registries:"
        for name in docker-registry distribution; do
          has "$name" || continue
          echo "  - host: 127.0.0.1:$(port "$name")"
          if ((TLS)); then echo "    caFile: $s/ca.crt"; else echo "    plainHTTP: true"; fi
          ((!MTLS)) || echo "    certFile: $s/client.crt"
          ((!MTLS)) || echo "    keyFile: $s/client.key"
          ((!AUTH)) || echo "    username: tidewaiter"
          ((!AUTH)) || echo "    passwordFile: $s/registry.tidewaiter"
          ((!AUTH)) || [[ $name != distribution ]] || echo "    allowPrivate: true # tokens are issued on this machine"
        done
        echo "sources:"
        for name in docker-registry distribution; do
          has "$name" || continue
          echo "  $name:"
          echo "    kind: distribution"
          echo "    registry: 127.0.0.1:$(port "$name")"
          echo "    auth: {bearer: {tokenFile: $s/hook}}"
          echo "    sweep: {api: distribution}"
        done
      fi
      cat <<YAML
intake:
  listen: 127.0.0.1:$(port intake)
  admin: {tokenFile: $s/api}
catalog:
  listen: 127.0.0.1:$(port catalog)
  tokenFile: $s/api
matcher:
  advisories: $dir/advisories.db
attestor:
  keyFile: $s/attestor.key
  passwordFile: $s/attestor
sweeper:
  listen: 127.0.0.1:$(port sweeper)
  tokenFile: $s/api
  catalog: http://127.0.0.1:$(port catalog)
  catalogTokenFile: $s/api
YAML
    } >"$dir/tidewaiter.yaml"
  )
}

# Ends servers at once: brokers that go one after the other wait for each other.
end_all() { # SIGNAL MEMBER...
  local sig=$1 member waiting=() code=0
  shift
  for member in "$@"; do
    terminate "$member" "$sig" &
    waiting+=($!)
  done
  for member in "${waiting[@]}"; do wait "$member" || code=1; done
  return $code
}

down() {
  end_all TERM $(members $SERVERS)
  echo "stopped"
}

status() {
  local member code=0
  for member in $(members $SERVERS); do
    if ! running "$member" >/dev/null; then
      printf '%-16s does not run\n' "$member"
      code=3
    elif ! check_one "$member" 2>/dev/null; then
      printf '%-16s process %s, port %s, since %s: does not answer\n' "$member" "$(running "$member")" "$(port "$member")" "$(since "$member")"
      code=3
    else
      printf '%-16s process %s, port %s, since %s\n' "$member" "$(running "$member")" "$(port "$member")" "$(since "$member")"
    fi
  done
  return $code
}

wipe() {
  down >/dev/null
  local data
  data=$(readlink "$dir/postgres/data" || true)
  [[ $data != /var/tmp/tidewaiter-postgres.* ]] || rm -rf "$data"
  rm -rf "$dir"
}

# Names one server, or one broker.
chosen() { # NAME [N]
  [[ " $SERVERS " == *" ${1:-} "* ]] || fail "there is no server \"${1:-}\" in $dir; there are: $SERVERS"
  if [[ -n ${2:-} ]]; then
    [[ $1 == kafka && $2 =~ ^[0-9]+$ ]] && (($2 >= 1 && $2 <= BROKERS)) || fail "there is no $1 $2"
    echo "kafka-$2"
  else
    members "$1"
  fi
}

signal() { # SIGNAL MEMBER
  local pid
  pid=$(running "$2") || fail "$2 does not run"
  kill "-$1" "$pid"
}

# What tests look for, beside all that servers.env says.
export_environment() {
  set -a
  # shellcheck source=/dev/null
  . "$dir/servers.env"
  SERVERS_CTL=$here/servers.sh
  DIR=$dir
  TIDEWAITER_KAFKA=${SERVERS_KAFKA:-}
  TIDEWAITER_POSTGRES=${SERVERS_POSTGRES_ADMIN_URL:-}
  TIDEWAITER_REDIS=${SERVERS_REDIS_URL:-}
  ((!AUTH)) || TIDEWAITER_REDIS=${TIDEWAITER_REDIS/tidewaiter@/admin:$(cat "$(secret redis.admin)")@}
  set +a
}

command=${1:-}
(($# == 0)) || shift
own=
if [[ $command == with && -z ${DIR:-} ]]; then
  DIR=$(mktemp -d /tmp/tidewaiter-servers.XXXXXX) own=1
  export DIR
fi
dir=${DIR:-$repository/.cache/servers}
mkdir -p "$(dirname "$dir")"
dir=$(cd "$(dirname "$dir")" && pwd)/$(basename "$dir")

# One at a time on a directory.
lock() {
  mkdir -p "$dir"
  exec 9>"$dir/lock"
  flock 9
}

case $command in
up) lock && up ;;
down) existing && lock && down ;;
status) existing && status ;;
wipe) existing && lock && wipe ;;
start)
  existing && lock
  list=$(chosen "$@")
  for member in $list; do start_one "$member"; done
  for member in $list; do ready "$member" check_one "$member"; done
  ;;
stop | kill)
  existing && lock
  list=$(chosen "$@")
  end_all "$([[ $command == kill ]] && echo KILL || echo TERM)" $list
  ;;
pause | resume)
  existing
  list=$(chosen "$@")
  for member in $list; do signal "$([[ $command == pause ]] && echo STOP || echo CONT)" "$member"; done
  ;;
log)
  existing
  list=$(chosen "$@")
  for member in $list; do cat "$dir/$member/log"; done
  ;;
with)
  (($#)) || usage
  trap 'DIR=$dir "$here/servers.sh" "$([[ $own ]] && echo wipe || echo down)" >&2' EXIT
  "${BASH_SOURCE[0]}" up >&2
  settings
  export_environment
  # In a group of its own, so that nothing of it is left when the servers go.
  setsid "$@" &
  group=$!
  trap 'kill -TERM -- "-$group" 2>/dev/null; exit 143' INT TERM
  wait "$group"
  ;;
env)
  (($#)) || usage
  existing && export_environment && exec "$@"
  ;;
psql) existing && postgres_psql "$@" ;;
redis-cli) existing && redis_cli "$@" ;;
install) mkdir -p "$dir" && settings && install_packages ;;
*) usage ;;
esac
