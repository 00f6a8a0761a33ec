#!/usr/bin/env bash
# Make sure that a Debian package is there: need-package.sh PACKAGE COMMAND PURPOSE
# COMMAND is what the package brings (`-`: none to look for). Installs with apt where that is possible without asking;
# else says in one line what to install, and fails.
set -euo pipefail
package=$1 command=$2 purpose=$3

# mosquitto lives in /usr/sbin, which is not on every user's PATH.
if PATH="$PATH:/usr/sbin:/usr/local/sbin" command -v "$command" >/dev/null; then exit 0; fi

if [ "$(id -u)" = 0 ]; then
    as_root=()
elif command -v sudo >/dev/null && sudo -n true 2>/dev/null; then
    as_root=(sudo -n)
else
    echo "setup: $package is missing, needed for $purpose: apt-get install $package" >&2
    exit 1
fi
if ! command -v apt-get >/dev/null; then
    echo "setup: $package is missing, needed for $purpose: install it with this system's package manager" >&2
    exit 1
fi

# Debian starts a packaged service as it is installed. Ours must not: qwedge starts a broker of its own, on the same port.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    printf '#!/bin/sh\nexit 101\n' | "${as_root[@]}" tee "$policy" >/dev/null
    "${as_root[@]}" chmod +x "$policy"
    trap '"${as_root[@]}" rm -f "$policy"' EXIT
fi

echo "setup: installing the Debian package $package"
log=$(mktemp)
# Not again for each of many packages. An update can fail for one of many sources; whether the package is to be had, the
# installation itself tells.
updated=$(dirname "$0")/../.cache/apt-updated
if [ -z "$(find "$updated" -mmin -60 2>/dev/null)" ]; then
    "${as_root[@]}" apt-get -q update >"$log" 2>&1 </dev/null || true
    mkdir -p "$(dirname "$updated")"
    touch "$updated"
fi
if ! "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -q install -y --no-install-recommends "$package" \
    >>"$log" 2>&1 </dev/null; then
    echo "setup: $package could not be installed, needed for $purpose: $(grep -m1 '^E:' "$log" || echo "see $log")" >&2
    exit 1
fi
rm -f "$log"
if [ "$package" = mosquitto ] && [ -d /run/systemd/system ]; then
    "${as_root[@]}" systemctl disable --quiet mosquitto.service || true
fi
