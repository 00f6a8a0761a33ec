#!/usr/bin/env bash
# The tests against transformers and optimum (tests/oracle), in an environment of their own. Where its torch cannot be had
# they are skipped with one line; in CI that is a failure.
set -euo pipefail
cd "$(dirname "$0")/.."

log=$(mktemp)
trap 'rm -f "$log"' EXIT
if ! make --no-print-directory oracle 2>"$log"; then
    reason=$(grep -m1 -i error "$log" || echo "no reason given")
    if [ "${CI:-}" = true ]; then
        echo "test: the oracle environment cannot be installed: $reason" >&2
        exit 1
    fi
    echo "test: skipping tests/oracle, its environment cannot be installed: $reason"
    exit 0
fi
.venv-oracle/bin/python -m pytest tests/oracle
