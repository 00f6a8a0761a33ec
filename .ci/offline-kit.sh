#!/usr/bin/env bash
# Collect all that a device needs into one folder: offline-kit.sh BOARD BUNDLE FOLDER
# BOARD is a folder of firmware-configs/, BUNDLE an exported bundle (`-`: none), FOLDER a new folder. PYTHON_VERSION (3.11) is the
# device's; DEBS a folder of .deb files for it, such as mosquitto's. Nothing is compiled, on neither machine.
# With `wheels ARCH FOLDER` only the wheels are collected: what CI does for aarch64.
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python
version=${PYTHON_VERSION:-3.11}

fail() {
    echo "error: $1" >&2
    echo "hint: $2" >&2
    exit 2
}

# The wheels of the lock for another architecture. glibc 2.35 is Ubuntu 22.04's, the oldest system of all boards.
collect_wheels() {
    local arch=$1 folder=$2 platforms=() minor
    for minor in $(seq 17 35); do platforms+=(--platform "manylinux_2_${minor}_$arch"); done
    "$python" -m pip --disable-pip-version-check --no-input -qq download --no-deps --only-binary :all: --require-hashes \
        --implementation cp --python-version "$version" --abi "cp${version/./}" --abi abi3 --abi none \
        "${platforms[@]}" --platform "manylinux2014_$arch" -r .locks/runtime.txt -r .locks/installer.txt -d "$folder"
}

if [ "${1:-}" = wheels ]; then
    collect_wheels "$2" "$3"
    # The lock's markers leave out what is for other systems, so the count is pip's; it fails where one has no wheel.
    echo "kit: $(find "$3" -name '*.whl' | wc -l) wheels for $2, Python $version"
    exit 0
fi

[ $# = 3 ] || fail "three things are needed" "offline-kit.sh BOARD BUNDLE FOLDER"
board=$1 bundle=$2 kit=$3
boards=$(find firmware-configs -mindepth 2 -maxdepth 2 -name edge.toml -printf '%P\n' | xargs dirname | sort | paste -sd ' ')
[ -f "firmware-configs/$board/edge.toml" ] || fail "there is no board '$board'" "one of: $boards"
[ "$bundle" = - ] || [ -f "$bundle/manifest.json" ] || fail "$bundle is no bundle" "make model, or qwedge export"
[ ! -e "$kit" ] || fail "$kit is there already" "remove it, or name another folder"
case $board in x86-*) arch=x86_64 ;; *) arch=aarch64 ;; esac

partial=$kit.partial
rm -rf "$partial"
mkdir -p "$partial/wheels"
collect_wheels "$arch" "$partial/wheels"
"$python" -m hatchling build -t wheel -d "$partial/wheels" >/dev/null 2>&1
cp .locks/runtime.txt "$partial/requirements.txt"
cp -r firmware-configs/common "$partial/common"
cp -rL "firmware-configs/$board" "$partial/board"
cp firmware-configs/install.sh "$partial/"
[ "$bundle" = - ] || cp -rL "$bundle" "$partial/bundle"
if [ -n "${DEBS:-}" ]; then
    mkdir "$partial/debs"
    cp "$DEBS"/*.deb "$partial/debs/"
fi

# The newest glibc that a wheel asks for: manylinux_2_31 -> 31.
glibc=$(find "$partial/wheels" -name '*.whl' | grep -oE "manylinux_2_[0-9]+_$arch" | cut -d_ -f3 | sort -n | tail -n1)
wheel=$(basename "$partial"/wheels/qwedge-*.whl)
qwedge=${wheel#qwedge-}
cat >"$partial/kit.env" <<EOF
BOARD=$board
ARCH=$arch
PYTHON_VERSION=$version
GLIBC_MINOR=$glibc
QWEDGE_VERSION=${qwedge%%-*}
EOF
sums=$(cd "$partial" && find . -type f -print0 | sort -z | xargs -0 sha256sum)
echo "$sums" >"$partial/SHA256SUMS"
mv "$partial" "$kit"
echo "kit: $kit for $board: $(du -sh "$kit" | cut -f1), $(find "$kit/wheels" -name '*.whl' | wc -l) wheels"
echo "kit: copy it to the device and run: sudo sh $(basename "$kit")/install.sh"
