#!/usr/bin/env bash
# The runtime on ARM64, by emulation on this x86 machine: test.sh [--real BUNDLE | PYTEST ARGUMENT...]
# Without arguments: parity with this machine on each processor of PROCESSORS, and the tests of selected.txt on the first.
# With --real: one answer of a real bundle on each (docs/arm64.md). Where the environment cannot be had the tests are skipped
# with one line; in CI that is a failure.
set -euo pipefail
cd "$(dirname "$0")/../.."

# Their kernels: products of bytes (dotprod), none, and products of matrices of bytes (i8mm). SVE is slow to emulate and unused.
# shellcheck disable=SC2054 # what is between the commas belongs together
PROCESSORS=(cortex-a76 cortex-a72 max,sve=off,sme=off)
home=${QWEDGE_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/qwedge}/arm64
key=$(cat .locks/runtime.txt .locks/dev.txt .ci/arm64/setup.sh .ci/arm64/test-packages.txt | sha256sum | cut -c1-16)
environment=$home/$key

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

if [ ! -d "$environment" ]; then
    echo "arm64: making the emulated environment in $environment"
    mkdir -p "$home"
    # One at a time; what older locks left is of no use any more.
    if ! flock "$home/lock" .ci/arm64/setup.sh "$environment" 2>"$work/log"; then
        reason=$(grep -m1 '^error: ' "$work/log" || tail -n1 "$work/log")
        if [ "${CI:-}" = true ]; then
            cat "$work/log" >&2
            exit 1
        fi
        echo "arm64: skipping the tests of ARM64, their environment cannot be made: ${reason#error: }"
        exit 0
    fi
fi

# The program as it is installed on a device; the tests come from here.
.venv/bin/python -m pip --disable-pip-version-check --no-input -qq install --no-deps --no-build-isolation \
    --target "$work/site" .
python=$environment/venv/bin/python
export ORT_DISABLE_TELEMETRY=1 PYTHONNOUSERSITE=1

# emulated PROCESSOR WORD...: python under the emulator.
emulated() {
    QEMU_CPU=$1 PYTHONPATH=$work/site:$environment/tests ARM64_REFERENCE=$work ARM64_HEADERS=$environment/include \
        "$python" "${@:2}"
}

if [ "${1:-}" = --real ]; then
    bundle=${2:-models/qwen2.5-coder-0.5b-instruct-balanced}
    .venv/bin/python -m tests.arm64.real "$bundle" 12 --cuts | tee "$work/here"
    for processor in "${PROCESSORS[@]}"; do
        # Without products of bytes a token takes minutes.
        case $processor in cortex-a72) options=(3) ;; *) options=(12 --cuts) ;; esac
        emulated "$processor" -m tests.arm64.real "$bundle" "${options[@]}" --expect "$work/here"
    done
    exit 0
fi

.venv/bin/python -m tests.arm64.reference "$work"
pytest=(-m pytest -p no:cacheprovider --basetemp)
if [ $# -gt 0 ]; then
    emulated "${PROCESSORS[0]}" "${pytest[@]}" "$work/pytest" "$@"
    exit 0
fi
mapfile -t selected < <(sed -E 's/ *#.*//; /^$/d' .ci/arm64/selected.txt)
failed=0
emulated "${PROCESSORS[0]}" "${pytest[@]}" "$work/selected" "${selected[@]}" >"$work/selected.log" 2>&1 &
for processor in "${PROCESSORS[@]}"; do
    echo "arm64: $processor"
    emulated "$processor" "${pytest[@]}" "$work/parity" tests/arm64 || failed=1
done
wait $! || failed=1
cat "$work/selected.log"
exit "$failed"
