#!/usr/bin/env bash
# Prints the measured figures, each beside the number the design asks for.
# Figures of one line were taken in one run, since machines are noisy.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Prints the figures of benchmarks; one that fails, or is not there, ends this.
bench() { # PACKAGE PATTERN TIME
  local out
  out=$(go test "./$1" -run '^$' -bench "$2" -benchtime "$3" -count 1 2>&1) || { printf '%s\n' "$out" >&2; exit 1; }
  grep -E '^(Benchmark|---)' <<<"$out" || { echo "bench.sh: no benchmark of $1 is called $2" >&2; exit 1; }
}

echo "machine: $(nproc) cores, load $(cut -d' ' -f1 /proc/loadavg), $(go version | cut -d' ' -f3)"
echo
echo "== layer analysis: CPU ÷ CPU of gunzip and both sha256 of the same layer (design: at most 1.3)"
bench services/analyzer/layer 'Analyze' 3x
echo "== the same through a child process, with its peak memory (design: at most 256 MiB)"
bench services/analyzer/worker 'Pool' 3x
echo "== matching, cold (design: 100,000 package versions a second a core) and over a fleet (1,000,000); opening the snapshot (1 s, 300 MiB)"
bench services/matcher/match 'Cold|Fleet|Open' 2s
echo "== intake: events stored with acks=all (design: 1,000 a second, p99 below 100 ms)"
bench services/intake 'Intake' 5s
echo "== statements: sign and verify"
bench services/attestor/statement 'Sign|Verify' 1s
echo "== an advisory that touches a tenth of 100,000 stored images: until all events are there (design: below 60 s)"
bench services/catalog 'Rematch' 1x
echo "== admission: a hit without an outbound call (design: p99 below 5 ms), a miss (below 1 s), many at once"
bench services/gatekeeper 'Hit|Miss|AtOnce' 2s
echo "== the whole pipeline in one process"
go test ./e2e -run 'Measure' -measure -count 1 -v -timeout 30m | grep -E 'design|^(FAIL|panic|---)' | grep -v '^--- PASS'
