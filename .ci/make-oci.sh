#!/usr/bin/env bash
# Build a container image without a registry, a daemon or emulation: make-oci.sh FOLDER ARCH...
# Writes FOLDER/qwedge-VERSION.oci.tar, an OCI image layout with an image for each ARCH (amd64, arm64) behind one index, from
# Debian's packages (MIRROR, or mmdebstrap's choice; SUITE bookworm) and from the project's own (DEBS: a folder of them, built
# before). Two layers: what Debian has, without a shell or a package manager, and qwedge. Times are SOURCE_DATE_EPOCH, or those of
# the last commit: the same packages make the same bytes.
set -euo pipefail
cd "$(dirname "$0")/.."
umask 022
python=.venv/bin/python
recipe=firmware-configs/oci
suite=${SUITE:-bookworm}
version=${PYTHON_VERSION:-3.11}

fail() {
    echo "error: $1" >&2
    echo "hint: $2" >&2
    exit 2
}

[ $# -ge 2 ] || fail "a folder and an architecture are needed" "make-oci.sh FOLDER ARCH..."
folder=$1
shift
command -v mmdebstrap >/dev/null || fail "mmdebstrap is missing" "apt-get install mmdebstrap"
# Byte code is the same on all processors, but not for all Pythons.
"$python" -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$version')" ||
    fail "the image has Python $version, $python another" "PYTHON_VERSION= and SUITE= that fit together"
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct)}
export SOURCE_DATE_EPOCH

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# compile ROOT FOLDER: byte code for Python files, since a container cannot keep its own. It is never compared with a source.
compile() {
    "$python" -m compileall -q -j 0 --invalidation-mode unchecked-hash -s "$1" -p / "$1/$2"
}

# pack ROOT LAYER: a folder as a layer. All of it belongs to root, but the state to the user (passwd).
pack() {
    local tar=(tar --sort=name --numeric-owner --mtime "@$SOURCE_DATE_EPOCH" --format=gnu -C "$1")
    "${tar[@]}" --owner=0 --group=0 --exclude=./var/lib/qwedge -cf "$2.tar" .
    [ ! -d "$1/var/lib/qwedge" ] || "${tar[@]}" --owner=65532 --group=65532 -rf "$2.tar" ./var/lib/qwedge
    gzip -n "$2.tar"
}

# base ARCH ROOT: of Debian what Python and the wheels need. Packages are unpacked and their scripts are not run, so any machine does
# it for any architecture.
base() {
    local root=$2
    mmdebstrap --quiet --variant=extract --architectures="$1" --format=tar \
        --include="libc6,libgcc-s1,libstdc++6,zlib1g,python$version-minimal,libpython$version-stdlib,base-files,ca-certificates,netbase,tzdata" \
        "$suite" "$root.tar" ${MIRROR:+"$MIRROR"}
    mkdir "$root" "$root.all"
    tar -xf "$root.tar" -C "$root.all" --no-same-owner
    # The patterns of the list are meant to be words and globs.
    # shellcheck disable=SC2046
    (shopt -s nullglob && cd "$root.all" && cp -a --parents $(cat "$OLDPWD/$recipe/files") "$root")
    cat "$root"/usr/share/ca-certificates/mozilla/*.crt >"$root/etc/ssl/certs/ca-certificates.crt"
    rm -r "$root/usr/share/ca-certificates"
    cp $recipe/{passwd,group,nsswitch.conf} "$root/etc"
    mkdir -p "$root/tmp" "$root/run" "$root/proc" "$root/sys" "$root/dev"
    chmod 1777 "$root/tmp"
    compile "$root" "usr/lib/python$version"
}

# program ARCH ROOT: what the Debian package has, but for what is systemd's.
program() {
    local root=$2 debs=${DEBS:-$work/debs}
    [ -n "${DEBS:-}" ] || DEB_COMPRESSION=none .ci/make-deb.sh "$1" "$debs" >/dev/null
    mkdir -p "$root/etc/qwedge" "$root/usr/bin" "$root/var/lib/qwedge"
    dpkg-deb --fsys-tarfile "$debs"/qwedge_*_"$1".deb | tar -x -C "$root" ./usr/lib/qwedge ./usr/share/doc/qwedge/copyright
    cp $recipe/container.toml "$root/etc/qwedge/edge.toml"
    cp $recipe/qwedge "$root/usr/bin"
    chmod 0755 "$root/usr/bin/qwedge"
    rm "$root/usr/lib/qwedge/bin/qwedge"
    chmod 0700 "$root/var/lib/qwedge"
    compile "$root" usr/lib/qwedge/lib
}

images=()
for arch in "$@"; do
    base "$arch" "$work/base-$arch"
    program "$arch" "$work/qwedge-$arch"
    for part in base qwedge; do pack "$work/$part-$arch" "$work/$arch-$part"; done
    images+=("$arch:$work/$arch-base.tar.gz:$work/$arch-qwedge.tar.gz")
done

mkdir -p "$folder"
release=$("$python" -c 'import tomllib; print(tomllib.load(open("pyproject.toml", "rb"))["project"]["version"])')
"$python" .ci/oci_layout.py "$work/layout" "$release" "${images[@]}"
image=$folder/qwedge-$release.oci.tar
tar --sort=name --numeric-owner --owner=0 --group=0 --mtime "@$SOURCE_DATE_EPOCH" --format=gnu -C "$work/layout" -cf "$image" .
echo "oci: $image: $(du -h "$image" | cut -f1), $*"
