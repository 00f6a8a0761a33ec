#!/bin/sh
# What an update does on the device, whoever has brought it: part of RAUC's bundles and of SWUpdate's images.
#
#   device.sh check KIT_ENV         whether this device can run the program that KIT_ENV describes
#   device.sh application DEVICE    the image on DEVICE starts here
#   device.sh model FILE            the bundle in a tar file goes to the store: signature, copy, self-test, switch
set -eu
umask 022

fail() {
    echo "error: $1" >&2
    echo "hint: $2" >&2
    exit 1
}

check() {
    # shellcheck source=/dev/null
    . "$1"
    [ "$(uname -m)" = "$ARCH" ] || fail "this update is for $ARCH, this device is $(uname -m)" "build it for this board"
    glibc=$(getconf GNU_LIBC_VERSION 2>/dev/null | cut -d. -f2)
    [ "${glibc:-0}" -ge "$GLIBC_MINOR" ] || fail "this system's glibc is older than 2.$GLIBC_MINOR" "update the system first"
    [ -x "$PYTHON" ] || fail "there is no $PYTHON" "build the update with --python as this device has it"
    # A second update would go to the slot that has worked, and leave nothing to go back to.
    ! /usr/lib/qwedge/qwedge-slots on-trial ||
        fail "the update before has not shown yet that it works" "try again when qwedge has served for a minute"
}

# In a namespace of its own the image can be where it will be, whatever is there now.
application() {
    # shellcheck disable=SC2016
    unshare --mount -- sh -eu -c '
        mount -t squashfs -o ro,nodev,nosuid "$1" /opt/qwedge
        exec runuser -u qwedge -- /opt/qwedge/current/bin/python -c "import edge.cli, edge.loader, numpy, onnxruntime, tokenizers"
    ' sh "$1" || fail "the program does not start here" "what was used before stays in use"
}

# Updates are unpacked where only root can look; the store is the service's.
model() {
    work=$(mktemp -d)
    trap 'rmdir "$work"' EXIT
    chmod 755 "$work"
    # shellcheck disable=SC2016
    unshare --mount -- sh -eu -c '
        mount --bind "$(dirname "$1")" "$2"
        PATH=$PATH:/usr/local/bin exec runuser -u qwedge -- qwedge install "$2/$(basename "$1")" --activate --config /etc/qwedge/edge.toml
    ' sh "$1" "$work" || fail "the model was not switched to" "what was served before goes on"
}

case ${1:-} in
check | application | model) "$@" ;;
*)
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
esac
