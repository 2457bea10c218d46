# PostgreSQL from the Debian package postgresql. It refuses to run as root: then
# it runs as the package's user postgres. Sourced by servers.sh.

postgres_programs() {
  local found
  found=$(printf '%s\n' /usr/lib/postgresql/*/bin | sort -V | tail -n 1)
  [[ -x $found/postgres ]] || fail "PostgreSQL is not installed; run: servers.sh install (Debian package postgresql)"
  echo "$found"
}

# Where the data are. User postgres must reach them, and a folder of root's may be closed to it.
postgres_data() {
  local node=$dir/postgres
  if [[ ! -e $node/data ]]; then
    if [[ $(id -u) == 0 ]]; then
      id postgres >/dev/null 2>&1 || fail "PostgreSQL does not run as root, and there is no user postgres (Debian package postgresql)"
      mkdir -p "$node/data"
      chown postgres: "$node/data"
      if ! postgres_as test -w "$node/data"; then
        rmdir "$node/data"
        local elsewhere
        elsewhere=$(mktemp -d /var/tmp/tidewaiter-postgres.XXXXXX)
        chown postgres: "$elsewhere"
        ln -s "$elsewhere" "$node/data"
      fi
    else
      mkdir -p "$node/data"
    fi
    chmod 700 "$node/data/"
  fi
  (cd "$node" && readlink -f data)
}

# Runs a command as the user that PostgreSQL runs as, in place of this process
# where it is launched.
postgres_as() { # COMMAND...
  if [[ $(id -u) == 0 ]]; then
    (cd / && exec setpriv --reuid postgres --regid postgres --init-groups -- "$@")
  else
    "$@"
  fi
}

postgres_start() {
  local node=$dir/postgres programs data method=trust kind=host
  mkdir -p "$node"
  programs=$(postgres_programs)
  data=$(postgres_data)
  ((AUTH)) && method=scram-sha-256
  ((TLS)) && kind=hostssl
  if [[ ! -e $data/PG_VERSION ]]; then
    postgres_as "$programs/initdb" --pgdata "$data" --username admin --auth trust --encoding UTF8 --locale C.UTF-8 \
      --data-checksums >"$node/initdb.log" 2>&1 || { cat "$node/initdb.log" >&2; fail "initdb failed"; }
    # Before anybody can connect, and by stdin: user postgres cannot read our secrets.
    echo "ALTER USER admin PASSWORD '$(cat "$(secret postgres.admin)")'" | postgres_as "$programs/postgres" --single -D "$data" postgres \
      >>"$node/initdb.log" 2>&1 || { cat "$node/initdb.log" >&2; fail "the password of PostgreSQL's admin could not be set"; }
  fi
  {
    cat <<CONF
listen_addresses = '127.0.0.1'
port = $(port postgres)
unix_socket_directories = ''
# Two of every service, with ten connections each.
max_connections = 400
shared_buffers = 64MB
password_encryption = 'scram-sha-256'
CONF
    if ((TLS)); then
      cat <<CONF
ssl = on
ssl_cert_file = 'server.crt'
ssl_key_file = 'server.key'
CONF
    fi
  } | postgres_as tee "$data/tidewaiter.conf" >/dev/null
  postgres_as grep -q tidewaiter.conf "$data/postgresql.conf" ||
    echo "include 'tidewaiter.conf'" | postgres_as tee -a "$data/postgresql.conf" >/dev/null
  echo "$kind all all 127.0.0.1/32 $method" | postgres_as tee "$data/pg_hba.conf" >/dev/null
  if ((TLS)); then
    local f
    for f in server.crt server.key; do
      postgres_as sh -c 'umask 077; cat >"$0"' "$data/$f" <"$dir/secrets/$f"
    done
  fi
  if [[ $(id -u) == 0 ]]; then
    launch postgres setpriv --reuid postgres --regid postgres --init-groups -- "$programs/postgres" -D "$data"
  else
    launch postgres "$programs/postgres" -D "$data"
  fi
}

# Prints the URL without a password, which stands in the file that it names.
postgres_url() { # USER DATABASE
  local query=sslmode=disable
  ((TLS)) && query="sslmode=verify-full&sslrootcert=$dir/secrets/ca.crt"
  ((AUTH)) && query+="&passfile=$dir/secrets/pgpass"
  echo "postgres://$1@127.0.0.1:$(port postgres)/$2?$query"
}

# psql as the superuser, for instance: servers.sh psql -c 'select 1'
postgres_psql() { # ARGUMENTS...
  "$(postgres_programs)/psql" --no-psqlrc --quiet --tuples-only --no-align -v ON_ERROR_STOP=1 "$(postgres_url admin "${PGDATABASE:-postgres}")" "$@"
}

postgres_check() {
  [[ $(timeout 5 "$(postgres_programs)/psql" -XAtc 'SELECT 1' "$(postgres_url admin postgres)") == 1 ]] || return 1
  # The role and the database of the services, once.
  [[ -n $(postgres_psql -c "SELECT 1 FROM pg_database WHERE datname = 'tidewaiter'") ]] ||
    postgres_psql >/dev/null <<SQL
CREATE ROLE tidewaiter LOGIN PASSWORD '$(cat "$(secret postgres.tidewaiter)")';
CREATE DATABASE tidewaiter OWNER tidewaiter;
SQL
}

postgres_passwords() {
  (
    umask 077
    local user
    for user in admin tidewaiter; do
      echo "127.0.0.1:$(port postgres):*:$user:$(cat "$(secret "postgres.$user")")"
    done >"$dir/secrets/pgpass"
  )
}
