#!/usr/bin/env bash
# All that a GPU machine is for, in one call: build, GPU tests, benchmarks with a record, a short table last.
#
#   benchmarks/gpu_suite.sh [SECONDS]      SECONDS: time for everything, default 540
#
#   PYTHON=...   the interpreter, with torch (default: python3)
#   OUT=...      where the record, its chart and the logs go (default: benchmarks/records)
#
# A part that fails does not stop the others; the exit status is then 1; it is 2 without a GPU.
# Nothing is downloaded: torch, setuptools, pybind11, ninja, pytest, typer and rich must be there.
set -u
cd "$(dirname "$0")/.." || exit 2

total=${1:-540}
case $total in '' | *[!0-9]*) echo "gpu_suite.sh: SECONDS must be a whole number, got '$total'" >&2; exit 2 ;; esac
python=${PYTHON:-python3}
out=${OUT:-benchmarks/records}
mkdir -p "$out" || exit 2
failed=()

left() { echo $((total - SECONDS)); } # SECONDS: bash counts them since the script began

# part NAME LIMIT COMMAND...: runs it for at most LIMIT seconds and no longer than there is time, output to a log.
# SIGINT first: `seqfuse bench` then keeps what it has measured.
part() {
    local name=$1 limit=$2 log="$out/$1.log" status began=$SECONDS
    shift 2
    if [ "$limit" -gt "$(left)" ]; then limit=$(left); fi
    if [ "$limit" -lt 5 ]; then
        echo "== $name: no time left"
        failed+=("$name")
        return
    fi
    timeout -s INT -k 20 "$limit" "$@" >"$log" 2>&1
    status=$?
    if [ $status -eq 0 ]; then
        echo "== $name: passed in $((SECONDS - began)) s"
    else
        echo "== $name: FAILED with status $status after $((SECONDS - began)) s (124: out of time); the end of $log:"
        tail -n 25 "$log"
        failed+=("$name")
    fi
}

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "gpu_suite.sh: $python has no torch that sees a CUDA device" >&2
    exit 2
fi

part build 240 "$python" -m pip install -q --no-build-isolation --no-deps -e .
part tests $((total * 45 / 100)) "$python" -m pytest -q -m gpu tests
# what a step of the cluster kernels waits for; predictions stand in docs/recurrent.md
if command -v nvcc >/dev/null && [ -f benchmarks/cluster_latency.cu ]; then
    part latency_build 60 nvcc -std=c++20 -O3 -arch=sm_90a -Icsrc/include -Icsrc benchmarks/cluster_latency.cu -o "$out/cluster_latency"
    part latency 30 "$out/cluster_latency"
    cat "$out/latency.log" 2>/dev/null
fi
# not --quick: a GPU needs the larger sizes; torch.compile would take the time of everything else
part benchmarks "$(($(left) - 20))" "$python" -m seqfuse.benchmarks --device cuda --no-compile --seconds 0.25 --json "$out"

record=$(find "$out" -maxdepth 1 -name '*.json' -newer "$out/build.log" | head -n 1)
if [ -n "$record" ]; then "$python" -m seqfuse.benchmarks.plot "$record"; fi
echo
grep -E "passed|failed|error" "$out/tests.log" 2>/dev/null | tail -n 3
sed -n '/^geometric mean/,$p' "$out/benchmarks.log" 2>/dev/null
if [ ${#failed[@]} -gt 0 ]; then
    echo "failed: ${failed[*]}"
    exit 1
fi
echo "everything passed in $SECONDS s"
