#!/usr/bin/env bash
# On a GPU: the tests of operations and kernels, then the operators' small cases under compute-sanitizer (memcheck).
#   bash scripts/test_gpu.sh [tests|memory|all] [WORKERS]
# PYTHON (default: python3) has torch for that GPU and this package with its tests' packages installed. COMPUTE_SANITIZER names the
# program, if it is not on PATH or in /usr/local/cuda/bin.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

part=${1:-all} workers=${2:-8}
export PYTHON=${PYTHON:-python3} OMP_NUM_THREADS=1
export sanitizer=${COMPUTE_SANITIZER:-$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)}
case $part in tests | memory | all) ;; *) echo "error: the first argument is tests, memory or all; got '$part'" >&2 && exit 2 ;; esac
if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "error: $PYTHON has no torch that finds a GPU" >&2
    exit 2
fi
failed=0
export PYTEST_ADDOPTS='-o addopts= --import-mode importlib -m "not slow" -q -p no:cacheprovider'  # of every run below

if [ "$part" != memory ]; then
    "$PYTHON" -m pytest -n "$workers" --timeout 150 tests/ops tests/attention/test_gpu.py tests/benchmarks/test_timing.py || failed=1
fi

check_memory() {
    local log
    log=$("$sanitizer" --tool memcheck --error-exitcode 77 --target-processes all "$PYTHON" -m pytest -k "${2:-registration}" "$1" 2>&1)
    local code=$?
    [ $code -eq 5 ] && echo "$1: no test of this kind" && return 0
    echo "$1: $(grep -E 'passed|failed' <<<"$log" | tail -1) $(grep 'ERROR SUMMARY' <<<"$log" | tail -1)"
    [ $code -eq 0 ] || { tail -40 <<<"$log" && return 1; }
}
export -f check_memory

if [ "$part" != tests ]; then
    if [ ! -x "$sanitizer" ]; then
        echo "error: no compute-sanitizer at '$sanitizer'; it comes with CUDA's toolkit: COMPUTE_SANITIZER=/path/to/it" >&2
        exit 2
    fi
    printf '%s\0' tests/ops/test_triton*.py | xargs -0 -P "$workers" -I{} bash -c 'check_memory {}' || failed=1
    # Layers that are one node of autograd launch kernels that are no operators. Their CUDA graphs are left out: while a backward is
    # captured torch 2.11 has the default stream wait, which CUDA refuses under the sanitizer, and not elsewhere.
    printf '%s\0' tests/ops/test_triton_{stripes,halo,launch}.py | xargs -0 -P "$workers" -I{} bash -c 'check_memory {} "test and not graph"' || failed=1
fi
exit $failed
