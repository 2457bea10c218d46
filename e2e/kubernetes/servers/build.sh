#!/usr/bin/env bash
# Builds etcd and kube-apiserver from their Go modules, once, and prints the
# directory that holds them. It is below $XDG_CACHE_HOME (~/.cache), named after
# the versions. The first build takes some minutes and about 1 GB of modules.
# With --cached nothing is built: exit code 1 says that it would have to be.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export GOWORK=off GOFLAGS=-mod=readonly CGO_ENABLED=0

version() { (cd "$here/$1" && go list -m -f '{{.Version}}' "$2"); }
kube=$(version kube k8s.io/kubernetes)
etcd=$(version etcd go.etcd.io/etcd/server/v3)
minor=${kube#v1.}
minor=${minor%%.*}
out=${XDG_CACHE_HOME:-$HOME/.cache}/tidewaiter/kubernetes/$kube-etcd-$etcd
if [ "${1:-}" = --cached ]; then
  [ -x "$out/etcd" ] && [ -x "$out/kube-apiserver" ] && echo "$out"
  exit
fi
mkdir -p "$out"

# build FOLDER NAME PACKAGE LDFLAGS: under another name first, so that what has
# its name is whole.
build() {
  [ -x "$out/$2" ] && return
  echo "building $2" >&2
  (cd "$here/$1" && nice -n 10 go build -trimpath -ldflags "-s -w $4" -o "$out/$2.$$" "$3")
  mv "$out/$2.$$" "$out/$2"
}
stamp=k8s.io/component-base/version
build etcd etcd go.etcd.io/etcd/server/v3 ""
build kube kube-apiserver k8s.io/kubernetes/cmd/kube-apiserver \
  "-X $stamp.gitVersion=$kube -X $stamp.gitMajor=1 -X $stamp.gitMinor=$minor -X $stamp.gitTreeState=clean"
echo "$out"
