# What all servers share: messages, waiting, ports, secrets and processes.
# Sourced by servers.sh, which sets: dir (absolute), seconds (patience).

fail() {
  echo "servers.sh: $*" >&2
  exit 1
}

need() { # COMMAND PACKAGE
  command -v "$1" >/dev/null || fail "$1 is not installed; run: servers.sh install (Debian package $2)"
}

# Waits until a command succeeds; fails after $seconds.
await() { # COMMAND...
  local end=$((SECONDS + seconds))
  until "$@"; do
    ((SECONDS < end)) || return 1
    sleep 0.1
  done
}

listens() { # PORT
  (: <"/dev/tcp/127.0.0.1/$1") 2>/dev/null
}

# Prints the port of that name: what the environment asks for, what was chosen
# before, or a free one. They lie below the range that Linux gives to clients.
port() { # NAME
  local file=$dir/ports/$1 wish=$1_port
  wish=${wish//-/_}
  wish=${wish^^}
  if [[ ! -e $file ]]; then
    local p=${!wish:-}
    while [[ -z $p ]]; do
      p=$((20000 + RANDOM % 12000))
      if listens "$p" || grep -qxF "$p" "$dir"/ports/* 2>/dev/null; then p=; fi
    done
    mkdir -p "$dir/ports"
    echo "$p" >"$file"
  fi
  cat "$file"
}

# Prints the name of the file that holds a secret, which is made when it is new.
secret() { # NAME
  local file=$dir/secrets/$1
  [[ -e $file ]] || (umask 077 && openssl rand -hex 16 | tr -d '\n' >"$file")
  echo "$file"
}

# A process is known by its id and the moment it started (proc(5), stat, field
# 22): an id alone may be another's by now.
born() { # PID
  local stat
  stat=$(cat "/proc/$1/stat" 2>/dev/null) || return 1
  set -- ${stat##*) }
  [[ $1 != Z ]] && echo "${20}"
}

# Prints the process id of a server, and fails when it does not run.
running() { # NAME
  local pid ticks
  read -r pid ticks _ 2>/dev/null <"$dir/$1/pid" || return 1
  [[ $(born "$pid") == "$ticks" ]] && echo "$pid"
}

gone() { [[ ! -e /proc/$1 ]]; }
ended() { ! running "$1" >/dev/null; }

# Starts a process that outlives this script and its terminal.
launch() { # NAME COMMAND...
  local name=$1 pid begin
  shift
  begin=$(stat -c %s "$dir/$name/log" 2>/dev/null || echo 0)
  setsid "$@" >>"$dir/$name/log" 2>&1 </dev/null 9>&- &
  pid=$!
  echo "$pid $(born "$pid") $(date +%FT%T%z) $begin" >"$dir/$name/pid"
}

# Says whether the log of the present run holds a text.
said() { # NAME TEXT
  # read to its end: with pipefail, a reader that leaves early is a failure
  tail -c "+$(($(cut -d' ' -f4 "$dir/$1/pid") + 1))" "$dir/$1/log" | grep -cF "$2" >/dev/null
}

since() { # NAME
  cut -d' ' -f3 "$dir/$1/pid"
}

# Ends a server and waits for it. A paused one is woken, or it would not hear.
terminate() { # NAME SIGNAL
  local pid child children
  if pid=$(running "$1"); then
    children=$(cat "/proc/$pid/task/$pid/children" 2>/dev/null || true)
    kill "-$2" "$pid"
    kill -CONT "$pid" 2>/dev/null || true
    await ended "$1" || kill -KILL "$pid"
    await ended "$1" || fail "$1 (process $pid) does not end"
    # PostgreSQL does not start again before its orphans have seen that they are,
    # nor while a process has its former id, be it one that only waits to be reaped.
    for child in $pid $children; do
      await gone "$child" || fail "process $child of $1 does not end"
    done
  fi
  rm -f "$dir/$1/pid"
}

# Waits until a server that was launched answers its own check. One that dies
# while it starts says why.
ready() { # NAME CHECK...
  local name=$1 end=$((SECONDS + seconds))
  shift
  until "$@" 2>>"$dir/$name/check.log"; do
    if ended "$name"; then
      show_log "$name"
      fail "$name ended while it started; its log is $dir/$name/log"
    fi
    if ((SECONDS >= end)); then
      show_log "$name"
      fail "$name was not ready after $seconds s; its log is $dir/$name/log"
    fi
    sleep 0.1
  done
  rm -f "$dir/$name/check.log"
}

show_log() { # NAME
  echo "--- the last lines of $dir/$1/log" >&2
  tail -n 30 "$dir/$1/log" >&2
  if [[ -s $dir/$1/check.log ]]; then
    echo "--- what the check said last" >&2
    tail -n 3 "$dir/$1/check.log" >&2
  fi
}

# Makes the authority and what it signs: server (loopback names) and client.
certificates() {
  local s=$dir/secrets
  [[ -e $s/client.crt ]] && return
  (
    umask 077
    exec 2>"$dir/openssl.log"
    key() { openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out "$s/$1.key"; }
    sign() { # NAME SUBJECT EXTENSIONS
      key "$1"
      openssl req -new -key "$s/$1.key" -subj "$2" -out "$s/$1.csr"
      openssl x509 -req -in "$s/$1.csr" -CA "$s/ca.crt" -CAkey "$s/ca.key" -days 30 -out "$s/$1.crt" -extfile <(printf '%b' "$3")
      rm "$s/$1.csr"
    }
    key ca
    openssl req -x509 -new -key "$s/ca.key" -subj "/CN=Tidewaiter test authority" -days 30 -out "$s/ca.crt" \
      -addext "keyUsage=critical,keyCertSign,cRLSign"
    sign server "/CN=localhost" "subjectAltName=IP:127.0.0.1,IP:::1,DNS:localhost\nextendedKeyUsage=serverAuth,clientAuth\nkeyUsage=digitalSignature\n"
    sign client "/CN=tidewaiter" "extendedKeyUsage=clientAuth\nkeyUsage=digitalSignature\n"
  ) || { cat "$dir/openssl.log" >&2; fail "the certificates could not be made"; }
}
