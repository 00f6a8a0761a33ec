#!/usr/bin/env bash
# Build the Debian package: make-deb.sh ARCH FOLDER
# ARCH is amd64 or arm64; PYTHON_VERSION (3.11) is the device's; WHEELS a folder of wheels that offline-kit.sh has collected
# before; DEB_COMPRESSION (xz) is dpkg-deb's -Z. Nothing is compiled, so any machine builds for both. Times are SOURCE_DATE_EPOCH,
# or those of the last commit: the same sources make the same bytes.
set -euo pipefail
cd "$(dirname "$0")/.."
umask 022
python=.venv/bin/python
debian=firmware-configs/debian
common=firmware-configs/common
version=${PYTHON_VERSION:-3.11}

fail() {
    echo "error: $1" >&2
    echo "hint: $2" >&2
    exit 2
}

[ $# = 2 ] || fail "two things are needed" "make-deb.sh ARCH FOLDER"
arch=$1 folder=$2
case $arch in
amd64) machine=x86_64 ;;
arm64) machine=aarch64 ;;
*) fail "there are no packages for '$arch'" "ARCH=amd64 or ARCH=arm64" ;;
esac
command -v dpkg-deb >/dev/null || fail "dpkg-deb is missing" "apt-get install dpkg, on any Linux"
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct)}
export SOURCE_DATE_EPOCH

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
tree=$work/tree
wheels=${WHEELS:-$work/wheels}
[ -n "${WHEELS:-}" ] || .ci/offline-kit.sh wheels "$machine" "$wheels" >/dev/null
"$python" -m hatchling build -t wheel -d "$work/own" >/dev/null 2>&1
own=$(basename "$work"/own/qwedge-*.whl)
own=${own#qwedge-}

# What a virtual environment is, without its scripts: wheels unpacked beside each other, and a link to the system's Python.
program=$tree/usr/lib/qwedge
site=$program/lib/python$version/site-packages
mkdir -p "$site" "$program/bin"
for wheel in "$wheels"/*.whl "$work"/own/*.whl; do
    case $wheel in */pip-*) continue ;; esac
    "$python" -m zipfile -e "$wheel" "$site"
done
# Files that belong elsewhere: no locked wheel has any.
odd=$(find "$site" -maxdepth 1 -name '*.data')
[ -z "$odd" ] || fail "$odd cannot be unpacked as it is" "lock another version"
ln -s "../../../bin/python$version" "$program/bin/python3"
printf 'home = /usr/bin\ninclude-system-site-packages = false\nversion = %s\n' "$version" >"$program/pyvenv.cfg"
# Without the folder it is called in on Python's path.
printf '#!/bin/sh\nexec /usr/lib/qwedge/bin/python3 -P -m edge.cli "$@"\n' >"$program/bin/qwedge"

# place SOURCE TARGET: a file for the package, where paths of the kit's program become the package's.
place() {
    mkdir -p "$(dirname "$tree$2")"
    sed -e 's|/opt/qwedge/current/share/doc/|/usr/share/doc/qwedge/|' -e 's|/opt/qwedge/current|/usr/lib/qwedge|' \
        -e 's|/opt/qwedge|/usr/lib/qwedge|' "$1" >"$tree$2"
}
place $common/bin/qwedge /usr/bin/qwedge
place $debian/qwedge-board /usr/sbin/qwedge-board
place $common/systemd/qwedge.service /usr/lib/systemd/system/qwedge.service
place $common/systemd/qwedge.service.d/systemd-254.conf /usr/share/qwedge/systemd-254.conf
place $common/sysusers.d/qwedge.conf /usr/lib/sysusers.d/qwedge.conf
place $common/tmpfiles.d/qwedge.conf /usr/lib/tmpfiles.d/qwedge.conf
place $common/sysctl.d/80-qwedge.conf /usr/lib/sysctl.d/80-qwedge.conf
place $common/journald.conf.d/qwedge.conf /usr/lib/systemd/journald.conf.d/qwedge.conf
place $common/zram-generator.conf /usr/lib/systemd/zram-generator.conf.d/qwedge.conf
place $debian/default.toml /etc/qwedge/edge.toml
place $debian/lintian-overrides /usr/share/lintian/overrides/qwedge

# Who reaches the device is decided there: examples.
examples=$tree/usr/share/doc/qwedge/examples
mkdir -p "$examples" "$tree/usr/share/qwedge/boards"
cp $common/nftables.conf $common/logrotate-qwedge $common/credentials.md "$examples"
cp $common/systemd/qwedge.service.d/{lan,cuda}.conf "$examples"
cp -r $common/mosquitto "$examples"
cp docs/{cli,configuration,firmware,http-api,http-security,model-store,mqtt-protocol,mqtt-rules,mqtt-security,operations}.md \
    "$tree/usr/share/doc/qwedge"
for board in firmware-configs/*/board.conf; do cp -rL "$(dirname "$board")" "$tree/usr/share/qwedge/boards"; done

"$python" .ci/debian_pages.py "$site" "$tree/usr/share/doc/qwedge" "$tree/usr/share/man"
mkdir -p "$tree/usr/share/man/man8"
gzip -9n <$debian/qwedge-board.8 >"$tree/usr/share/man/man8/qwedge-board.8.gz"

find "$tree" -type d -exec chmod 0755 {} + -o -type f -exec chmod 0644 {} +
chmod 0755 "$tree"/usr/bin/* "$tree"/usr/sbin/* "$program/bin/qwedge"

# The newest glibc that a wheel asks for: manylinux_2_31 -> 31.
glibc=$(find "$wheels" -name '*.whl' | grep -oE "manylinux_2_[0-9]+_$machine" | cut -d_ -f3 | sort -n | tail -n1)
mkdir "$tree/DEBIAN"
sed -e "s|@VERSION@|${own%%-*}|" -e "s|@ARCH@|$arch|" -e "s|@PYTHON@|$version|" -e "s|@GLIBC_MINOR@|$glibc|" \
    -e "s|@MAINTAINER@|${DEBFULLNAME:-qwedge} <${DEBEMAIL:-qwedge@example.org}>|" \
    -e "s|@SIZE@|$(find "$tree" -printf '%s\n' | awk '{size += int(($1 + 1023) / 1024)} END {print size}')|" \
    $debian/control >"$tree/DEBIAN/control"
install -m 0755 $debian/{postinst,prerm,postrm} "$tree/DEBIAN"
echo /etc/qwedge/edge.toml >"$tree/DEBIAN/conffiles"
(cd "$tree" && find usr -type f -print0 | LC_ALL=C sort -z | xargs -0 md5sum) >"$tree/DEBIAN/md5sums"
find "$tree" -exec touch --no-dereference --date "@$SOURCE_DATE_EPOCH" {} +

mkdir -p "$folder"
name=qwedge_${own%%-*}_$arch.deb
dpkg-deb --root-owner-group -Z"${DEB_COMPRESSION:-xz}" --build "$tree" "$folder/$name" >/dev/null
echo "deb: $folder/$name: $(du -h "$folder/$name" | cut -f1), $(find "$site" -maxdepth 1 -name '*.dist-info' | wc -l) wheels"
