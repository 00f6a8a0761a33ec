#!/usr/bin/env bash
# Make the emulated ARM64 environment in FOLDER: setup.sh FOLDER
#   emulator       qemu-aarch64, from Debian's backports: Debian 12's own (7.2) crashes when onnxruntime is imported
#   root/          Python 3.11 and the libraries that it needs, unpacked
#   venv/          .locks/runtime.txt and nothing else, as on a device; venv/bin/python runs under the emulator
#   tests/         what the tests import besides: for PYTHONPATH
#   include/       the kernel's headers, of both architectures
# Needs no root and installs nothing: apt runs with a state of its own, over the mirror that this system's apt uses, and there
# is no binfmt_misc: whatever is started through venv/bin/python is started through a script that names the emulator.
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=$1
python=$PWD/.venv/bin/python
keys=/usr/share/keyrings/debian-archive-keyring.gpg

fail() {
    echo "error: $1" >&2
    echo "hint: $2" >&2
    exit 3
}

for tool in apt-get dpkg-deb; do
    command -v "$tool" >/dev/null || fail "$tool is missing" "the ARM64 tests unpack Debian's packages: run them on Debian"
done
[ -f "$keys" ] || fail "$keys is missing" "apt-get install debian-archive-keyring"
# 'https://host/debian/dists/bookworm/InRelease' name size
mirror=$(apt-get --print-uris update 2>/dev/null | sed -nE "s,^'(.*)/dists/bookworm/InRelease'.*,\1,p" | sort -u | sed -n 1p)
[ -n "$mirror" ] || fail "apt has no mirror of Debian 12 (bookworm)" "the ARM64 tests take Python 3.11 from there: add it to apt's sources"

# Another run may have made it while this one waited for its turn.
[ ! -d "$folder" ] || exit 0
partial=$folder.partial
rm -rf "$partial"
mkdir -p "$partial"
# Until it is whole it is not there: a run that was cut off leaves no half of an environment.
trap 'rm -rf "$partial"' EXIT

# debian ARCHITECTURE SUITES WORD...: apt-get with a state of its own.
debian() {
    local architecture=$1 suites=$2 suite state=$partial/apt-$1
    shift 2
    mkdir -p "$state/lists/partial" "$state/archives/partial"
    touch "$state/status"
    for suite in $suites; do
        case $suite in
            *-security) echo "deb [arch=$architecture signed-by=$keys] $mirror-security $suite main" ;;
            *) echo "deb [arch=$architecture signed-by=$keys] $mirror $suite main" ;;
        esac
    done >"$state/sources.list"
    (cd "$state/archives" && apt-get -qq -o Dir::State="$state" -o Dir::State::lists="$state/lists" \
        -o Dir::State::status="$state/status" -o Dir::Cache="$state" -o Dir::Cache::archives="$state/archives" \
        -o Dir::Etc::sourcelist="$state/sources.list" -o Dir::Etc::sourceparts=/nonexistent \
        -o Dir::Etc::preferences=/nonexistent -o Dir::Etc::preferencesparts=/nonexistent -o APT::Architecture="$architecture" \
        -o APT::Architectures="$architecture" -o APT::Sandbox::User=root -o APT::Install-Recommends=false \
        -o Acquire::Languages=none -o Acquire::Retries=3 -o APT::Update::Post-Invoke= "$@") ||
        fail "apt-get $1 failed for $architecture, $suites" "is the mirror whole? it must have $suites for $architecture"
}

debian amd64 bookworm-backports update
debian amd64 bookworm-backports download qemu-user linux-libc-dev
dpkg-deb --fsys-tarfile "$partial"/apt-amd64/archives/qemu-user_*.deb | tar -xO ./usr/bin/qemu-aarch64 >"$partial/emulator"
chmod +x "$partial/emulator"
mkdir "$partial/include"
dpkg-deb --fsys-tarfile "$partial"/apt-amd64/archives/linux-libc-dev_*.deb |
    tar -x -C "$partial/include" --strip-components=5 ./usr/lib/linux/uapi/{x86,arm64}/asm/unistd_64.h

debian arm64 "bookworm bookworm-security" update
# libstdc++6 is onnxruntime's.
debian arm64 "bookworm bookworm-security" --yes --download-only install python3.11 libstdc++6
mkdir "$partial/root"
for package in "$partial"/apt-arm64/archives/*.deb; do dpkg-deb -x "$package" "$partial/root"; done
[ -e "$partial/root/lib" ] || ln -s usr/lib "$partial/root/lib"
rm -rf "$partial"/apt-*

# wheels FOLDER LOCK: install a lock's wheels for ARM64. pip reads the markers for this machine; the locks name none that differ.
wheels() {
    local minor platforms=()
    for minor in $(seq 17 35); do platforms+=(--platform "manylinux_2_${minor}_aarch64"); done
    "$python" -m pip --disable-pip-version-check --no-input -qq install --no-deps --only-binary :all: --require-hashes \
        --implementation cp --python-version 3.11 --abi cp311 --abi abi3 --abi none \
        "${platforms[@]}" --platform manylinux2014_aarch64 --target "$1" -r "$2" ||
        fail "the wheels of $2 cannot be had for ARM64" "make check-wheels"
}
wheels "$partial/venv/lib/python3.11/site-packages" .locks/runtime.txt
# Those of the lock for development that the tests and the exporter import.
awk 'NR == FNR { wanted[$1]; next } /^[a-z]/ { split($1, name, "=="); on = name[1] in wanted } on' \
    .ci/arm64/test-packages.txt .locks/dev.txt >"$partial/tests.txt"
wheels "$partial/tests" "$partial/tests.txt"

mkdir "$partial/venv/bin"
printf 'home = %s/root/usr/bin\n' "$folder" >"$partial/venv/pyvenv.cfg"
# No variable of the environment says where the libraries are: this system's own programs, which tests start too, would read it.
cat >"$partial/venv/bin/python" <<END
#!/bin/sh
exec "$folder/emulator" -L "$folder/root" -0 "\$0" "$folder/root/usr/bin/python3.11" "\$@"
END
chmod +x "$partial/venv/bin/python"
# Under the emulator compiling takes longer than all else at the start of a program. Only the same version's is of use.
! "$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || "$python" -m compileall -q "$partial/root/usr/lib" >/dev/null
mv "$partial" "$folder"
