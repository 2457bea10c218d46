# Two registries that notify intake of pushes: docker-registry (Debian's 2.8) and
# CNCF distribution v3, built from its module. Sourced by servers.sh.

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
  if ((AUTH)) && [[ ! -e $dir/secrets/htpasswd ]]; then
    need htpasswd apache2-utils
    (umask 077 && htpasswd -niBC 5 tidewaiter <"$(secret registry.tidewaiter)" 2>/dev/null | sed '/^$/d' >"$dir/secrets/htpasswd")
  fi
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
      ((AUTH)) && echo "auth: {htpasswd: {realm: tidewaiter, path: $dir/secrets/htpasswd}}"
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

# The API says yes to those who may, and no to all others.
registry_check() { # NAME
  local url options=(--silent --output /dev/null --max-time 5 --write-out '%{http_code}')
  url=$(((TLS)) && echo https || echo http)://127.0.0.1:$(port "$1")/v2/
  ((TLS)) && options+=(--cacert "$dir/secrets/ca.crt")
  ((MTLS)) && options+=(--cert "$dir/secrets/client.crt" --key "$dir/secrets/client.key")
  if ((AUTH)); then
    [[ $(curl "${options[@]}" "$url") == 401 ]] || return 1
    [[ $(curl "${options[@]}" --config - "$url" <<<"user = \"tidewaiter:$(cat "$(secret registry.tidewaiter)")\"") == 200 ]]
  else
    [[ $(curl "${options[@]}" "$url") == 200 ]]
  fi
}
