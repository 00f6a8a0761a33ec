#!/usr/bin/env bash
# The tests with the client libraries (tests/clients), in an environment of their own. Where they cannot be had the tests are
# skipped with one line, and those of JavaScript alone where only node or npm's packages are missing; in CI that is a failure.
set -euo pipefail
cd "$(dirname "$0")/.."

log=$(mktemp)
trap 'rm -f "$log"' EXIT

# skip WHAT WHY: say what is left out, or fail where nothing may be.
skip() {
    local reason
    reason=$(grep -m1 -i error "$log" || echo "no reason given")
    if [ "${CI:-}" = true ]; then
        echo "test: $2: $reason" >&2
        exit 1
    fi
    echo "test: skipping $1, $2: $reason"
}

if ! make --no-print-directory clients 2>"$log"; then
    skip tests/clients "the client libraries cannot be installed"
    exit 0
fi

install_javascript() {
    .ci/need-package.sh nodejs node "the tests of JavaScript clients" || return 1
    .ci/need-package.sh npm npm "the tests of JavaScript clients" || return 1
    # The lock says all that is to be known: installed anew only when it has changed.
    [ tests/clients/javascript/node_modules/.package-lock.json -nt tests/clients/javascript/package-lock.json ] ||
        (cd tests/clients/javascript && npm ci --ignore-scripts --no-audit --no-fund --loglevel=error >/dev/null)
}
install_javascript 2>"$log" || skip "the JavaScript clients" "node or its packages cannot be installed"
.venv-clients/bin/python -m pytest tests/clients
