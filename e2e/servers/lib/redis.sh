# Redis from the Debian package redis-server. It keeps nothing: what is in it may be lost. Sourced by servers.sh.

redis_start() {
  need redis-server redis-server
  local node=$dir/redis port
  port=$(port redis)
  mkdir -p "$node"
  (
    umask 077
    cat >"$node/redis.conf" <<CONF
bind 127.0.0.1
dir $node
save ""
appendonly no
CONF
    if ((TLS)); then
      cat >>"$node/redis.conf" <<CONF
port 0
tls-port $port
tls-cert-file $dir/secrets/server.crt
tls-key-file $dir/secrets/server.key
tls-ca-cert-file $dir/secrets/ca.crt
tls-auth-clients no
CONF
    else
      echo "port $port" >>"$node/redis.conf"
    fi
    if ((AUTH)); then
      echo "aclfile $node/users.acl" >>"$node/redis.conf"
      # Kept when it is there: others may have added their users.
      [[ -e $node/users.acl ]] || cat >"$node/users.acl" <<ACL
user default off
user admin on #$(sha256sum "$(secret redis.admin)" | cut -d' ' -f1) ~* &* +@all
user tidewaiter on #$(sha256sum "$(secret redis.tidewaiter)" | cut -d' ' -f1) ~* &* +@all -@admin -@dangerous
ACL
    fi
  )
  launch redis redis-server "$node/redis.conf"
}

redis_url() { # USER
  local scheme=redis user=
  ((TLS)) && scheme=rediss
  ((AUTH)) && user=$1@
  echo "$scheme://${user}127.0.0.1:$(port redis)/0"
}

# redis-cli as admin, for instance: servers.sh redis-cli flushall
redis_cli() { # ARGUMENTS...
  local options=(-h 127.0.0.1 -p "$(port redis)")
  ((!TLS)) || options+=(--tls --cacert "$dir/secrets/ca.crt")
  ((!AUTH)) || options+=(--user admin)
  ((!AUTH)) || local -x REDISCLI_AUTH
  ((!AUTH)) || REDISCLI_AUTH=$(cat "$(secret redis.admin)")
  ${limit:+timeout "$limit"} redis-cli "${options[@]}" "$@"
}

redis_check() {
  local limit=5
  [[ $(redis_cli ping) == PONG ]]
}
