#!/usr/bin/env bash
# Make the virtual environment $1 if it is not there, with the first Python >= 3.11 on PATH.
set -euo pipefail
venv=$1

if [ -x "$venv/bin/python" ] && "$venv/bin/python" -m pip --version >/dev/null 2>&1; then exit 0; fi

python=
for name in ${PYTHON:-} python3.11 python3 python3.12 python3.13 python3.14; do
    # A version manager's shim may be on PATH without the version behind it: ask it.
    if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then python=$name && break; fi
done
if [ -z "$python" ]; then
    echo "error: qwedge needs Python 3.11 or newer, and none is on PATH" >&2
    echo "hint: on Debian 12: apt-get install python3 python3-venv" >&2
    exit 1
fi

# Debian ships ensurepip, without which a venv has no pip, in a package of its own.
if ! "$python" -c 'import ensurepip, venv' >/dev/null 2>&1; then
    "$(dirname "$0")/need-package.sh" python3-venv - "the environment in $venv"
fi
echo "setup: making $venv with $("$python" --version)"
rm -rf "$venv"
"$python" -m venv "$venv"
