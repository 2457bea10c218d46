# Two registries that notify intake of pushes: docker-registry (Debian's 2.8) and
# CNCF distribution v3, built from its module. With AUTH=1 the first knows users
# (htpasswd), and the second asks tokens for what each may do. Sourced by servers.sh.

distribution_build() {
  local version out
  need go golang
  version=$(cd "$here/distribution" && GOWORK=off go list -m -f '{{.Version}}' github.com/distribution/distribution/v3)
  out=$cache/distribution-$version/registry
  if [[ ! -x $out ]]; then
    mkdir -p "$(dirname "$out")"
    # Under another name first, so that what has its name is whole.
    (cd "$here/distribution" && GOWORK=off CGO_ENABLED=0 go build -trimpath -ldflags "-s -w" -o "$out.$$" github.com/distribution/distribution/v3/cmd/registry) ||
      fail "distribution $version could not be built"
    mv "$out.$$" "$out"
  fi
  echo "$out"
}

registry_configure() { # NAME
  local node=$dir/$1
  mkdir -p "$node/data"
  if ((AUTH)) && [[ $1 == docker-registry && ! -e $dir/secrets/htpasswd ]]; then
    need htpasswd apache2-utils
    (umask 077 && htpasswd -niBC 5 tidewaiter <"$(secret registry.tidewaiter)" 2>/dev/null | sed '/^$/d' >"$dir/secrets/htpasswd")
  fi
  if ((AUTH)) && [[ $1 == distribution ]]; then tokens_prepare; fi
  (
    umask 077
    {
      cat <<YAML
version: 0.1
log: {level: warn, accesslog: {disabled: true}}
storage:
  filesystem: {rootdirectory: $node/data}
  delete: {enabled: true}
  maintenance: {uploadpurging: {enabled: false}}
http:
  addr: 127.0.0.1:$(port "$1")
  secret: $(cat "$(secret registry.http)")
YAML
      if ((TLS)); then
        echo "  tls:"
        echo "    certificate: $dir/secrets/server.crt"
        echo "    key: $dir/secrets/server.key"
        ((MTLS)) && echo "    clientcas: [$dir/secrets/ca.crt]"
      fi
      if ((AUTH)) && [[ $1 == distribution ]]; then
        echo "auth:"
        echo "  token: {realm: '$(tokens_url)', service: registry, issuer: tokens, rootcertbundle: $dir/secrets/tokens.crt}"
      elif ((AUTH)); then
        echo "auth: {htpasswd: {realm: tidewaiter, path: $dir/secrets/htpasswd}}"
      fi
      cat <<YAML
notifications:
  events: {includereferences: true}
  endpoints:
    - name: intake
      url: $INTAKE_URL/hooks/$1
      headers: {Authorization: ["Bearer $(cat "$(secret hook)")"]}
      timeout: 3s
      threshold: 3
      backoff: 1s
YAML
    } >"$node/config.yml"
  )
}

registry_start() { # NAME
  local program=docker-registry
  if [[ $1 == distribution ]]; then
    program=$(distribution_build)
  else
    need docker-registry docker-registry
  fi
  registry_configure "$1"
  # distribution v3 would send its traces to a collector on this machine
  launch "$1" env OTEL_TRACES_EXPORTER=none "$program" serve "$dir/$1/config.yml"
}

# The key that signs tokens, and the one user who may do all.
tokens_prepare() {
  local s=$dir/secrets
  [[ -e $s/registry.users ]] && return
  (
    umask 077
    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout "$s/tokens.key" -out "$s/tokens.crt" \
      -days 30 -subj "/CN=tokens" 2>"$dir/openssl.log" || fail "the key for tokens could not be made; see $dir/openssl.log"
    printf '{"tidewaiter": {"password": "%s", "scopes": ["repository:*:*", "registry:catalog:*"]}}\n' \
      "$(cat "$(secret registry.tidewaiter)")" >"$s/registry.users.new"
    mv "$s/registry.users.new" "$s/registry.users"
  )
}

tokens_url() { echo "$( ((TLS)) && echo https || echo http)://127.0.0.1:$(port tokens)/token"; }

tokens_start() {
  local options=()
  need go golang
  tokens_prepare
  mkdir -p "$dir/tokens"
  (cd "$repository/e2e" && go build -o "$dir/tokens/tokens" ./servers/tokens) || fail "tokens could not be built"
  ((TLS)) && options+=(-tls-cert "$dir/secrets/server.crt" -tls-key "$dir/secrets/server.key")
  launch tokens "$dir/tokens/tokens" -listen "127.0.0.1:$(port tokens)" -service registry -issuer tokens \
    -users "$dir/secrets/registry.users" -cert "$dir/secrets/tokens.crt" -key "$dir/secrets/tokens.key" "${options[@]}"
}

tokens_check() {
  local options=()
  ((TLS)) && options+=(--cacert "$dir/secrets/ca.crt")
  [[ -n $(tokens_issue "${options[@]}") ]]
}

# Prints a token of the user tidewaiter that is good for nothing but to say so.
tokens_issue() { # OPTIONS...
  curl --silent --fail --max-time 5 "$@" --config - "$(tokens_url)?service=registry" <<<"user = \"tidewaiter:$(cat "$(secret registry.tidewaiter)")\"" |
    sed -n 's/.*"token":"\([^"]*\)".*/\1/p'
}

# The API says yes to those who may, and no to all others.
registry_check() { # NAME
  local url who trust=() options=(--silent --output /dev/null --max-time 5 --write-out '%{http_code}')
  url=$( ((TLS)) && echo https || echo http)://127.0.0.1:$(port "$1")/v2/
  ((TLS)) && trust=(--cacert "$dir/secrets/ca.crt")
  options+=("${trust[@]}")
  ((MTLS)) && options+=(--cert "$dir/secrets/client.crt" --key "$dir/secrets/client.key")
  if ((!AUTH)); then
    [[ $(curl "${options[@]}" "$url") == 200 ]]
    return
  fi
  [[ $(curl "${options[@]}" "$url") == 401 ]] || return 1
  who="user = \"tidewaiter:$(cat "$(secret registry.tidewaiter)")\""
  [[ $1 != distribution ]] || who="header = \"Authorization: Bearer $(tokens_issue "${trust[@]}")\""
  [[ $(curl "${options[@]}" --config - "$url" <<<"$who") == 200 ]]
}
