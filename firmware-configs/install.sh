#!/bin/sh
# Install qwedge on a device without internet, from the kit that `make offline-kit` has made: sh install.sh [OPTION ...]
#
#   --dry-run      say what would be done, and do nothing
#   --root DIR     install below DIR, without making users or starting anything: for tests
#   --no-bundle    leave the kit's model out
#   --no-start     start nothing
#   --help
#
# May be run again: what is there stays, what the kit has anew is replaced, and a file that somebody has changed is kept,
# with the kit's beside it as FILE.new. The program of before stays in /opt/qwedge until it is removed.
set -eu
umask 022

kit=$(cd "$(dirname "$0")" && pwd)
root='' dry='' with_bundle=yes with_start=yes

say() { echo "install: $*"; }

fail() {
    echo "error: $1" >&2
    echo "hint: $2" >&2
    exit 2
}

# Run a command, or say that it would be run.
act() {
    if [ -n "$dry" ]; then say "would run: $*"; else "$@"; fi
}

read_options() {
    while [ $# -gt 0 ]; do
        case $1 in
        --dry-run) dry=yes ;;
        --root)
            if [ ! -d "${2:-}" ]; then fail "--root names no folder" "--root DIR"; fi
            root=$(cd "$2" && pwd) with_start=''
            shift
            ;;
        --no-bundle) with_bundle='' ;;
        --no-start) with_start='' ;;
        --help | -h)
            sed -n '2,/^set/s/^# \{0,1\}//p' "$0"
            exit 0
            ;;
        *) fail "$1 is no option" "sh install.sh --help" ;;
        esac
        shift
    done
    # The root of everything is no other root.
    [ "$root" != / ] || root=''
}

# --- what must be so before anything is changed --------------------------------------------------------------------------

check_kit() {
    [ -f "$kit/SHA256SUMS" ] || fail "$kit is no kit" "make offline-kit BOARD=... BUNDLE=..."
    damaged=$(cd "$kit" && sha256sum --check --quiet --strict SHA256SUMS 2>/dev/null) ||
        fail "the kit is damaged: $(echo "$damaged" | head -n 1)" "copy it again"
    # shellcheck source=/dev/null
    . "$kit/kit.env"
}

check_device() {
    machine=$(uname -m)
    [ "$machine" = "$ARCH" ] || fail "this kit is for $ARCH ($BOARD), this device is $machine" "make a kit for its board"
    glibc=$(getconf GNU_LIBC_VERSION 2>/dev/null | cut -d. -f2)
    [ "${glibc:-0}" -ge "$GLIBC_MINOR" ] ||
        fail "this system's glibc is older than 2.$GLIBC_MINOR" "Debian 12, Ubuntu 22.04 or newer"
    python=$(command -v "python$PYTHON_VERSION") ||
        fail "there is no python$PYTHON_VERSION" "install it, or make the kit with PYTHON_VERSION= as this device has it"
    "$python" -c 'import venv, sqlite3, ssl' 2>/dev/null ||
        fail "python$PYTHON_VERSION is not complete" "apt-get install python$PYTHON_VERSION"
    if [ -z "$root" ]; then
        [ -n "$dry" ] || [ "$(id -u)" = 0 ] || fail "only root installs a service" "sudo sh install.sh"
        case $("$python" -c 'import sys; print(sys.base_prefix)')/ in
        /root/* | /home/*) fail "$python lies in somebody's home, which the service does not see" "the system's Python" ;;
        esac
        [ -d /run/systemd/system ] || fail "systemd does not run here" "--root DIR installs the files alone"
    fi
    need_room
}

# Wheels take about four times their size when they are unpacked and compiled; a bundle is copied once.
need_room() {
    need_kb=$(($(du -sk "$kit/wheels" | cut -f1) * 4 + 65536))
    [ -z "$with_bundle" ] || [ ! -d "$kit/bundle" ] || need_kb=$((need_kb + $(du -sk "$kit/bundle" | cut -f1)))
    free_kb=$(df -Pk "${root:-/}" | awk 'NR == 2 {print $4}')
    [ "$free_kb" -ge "$need_kb" ] ||
        fail "$((need_kb / 1024)) MiB are needed, $((free_kb / 1024)) are free" "make room on ${root:-/}"
}

# --- the program ---------------------------------------------------------------------------------------------------------

# Each kit's program is a folder of its own, complete once it has its mark; `current` changes at once.
install_program() {
    id=$(grep -E ' \./(wheels/|requirements)' "$kit/SHA256SUMS" | sha256sum | cut -c1-12)
    program=$root/opt/qwedge/$QWEDGE_VERSION-$id
    if [ -e "$program/.complete" ]; then
        say "program $QWEDGE_VERSION-$id is there"
    else
        say "program $QWEDGE_VERSION-$id to $program"
        act rm -rf "$program"
        act mkdir -p "$root/opt/qwedge"
        act "$python" -m venv --without-pip "$program"
        pip install --require-hashes --requirement "$kit/requirements.txt"
        pip install "$kit/wheels/qwedge-$QWEDGE_VERSION-py3-none-any.whl"
        # By all cores: pip would use one, for as long as all the rest takes.
        act "$program/bin/python" -m compileall -q -j 0 "$program/lib"
        act "$program/bin/qwedge" --version
        # A power cut leaves what is complete, or what has no mark and is made anew.
        act sync --file-system "$program"
        act touch "$program/.complete"
    fi
    [ "$(readlink "$root/opt/qwedge/current" 2>/dev/null)" != "$QWEDGE_VERSION-$id" ] || return 0
    act ln -sfn "$QWEDGE_VERSION-$id" "$root/opt/qwedge/.current"
    act mv -T "$root/opt/qwedge/.current" "$root/opt/qwedge/current"
    changed=yes
}

# pip out of its wheel: Debian's Python brings none. Settings of this machine's pip do not count.
pip() {
    act env PIP_CONFIG_FILE=/dev/null "$program/bin/python" "$(echo "$kit"/wheels/pip-*.whl)/pip" --quiet --no-input \
        --disable-pip-version-check --no-cache-dir "$@" --no-compile --no-deps --no-index --find-links "$kit/wheels"
}

# --- files of the system -------------------------------------------------------------------------------------------------

# place SOURCE FILE MODE: a file as the kit has it, unless somebody has changed it since it was placed.
place() {
    source=$1 target=$root$2 sums=$root/opt/qwedge/placed.sha256
    if cmp -s "$source" "$target"; then
        rm_new "$target"
    elif [ -e "$target" ] && ! known "$target" "$2"; then
        say "kept $2, which was changed here; the kit's is $2.new"
        copy "$source" "$target.new" "$3"
        return 0
    else
        say "file $2"
        copy "$source" "$target" "$3"
        rm_new "$target"
        changed=yes
    fi
    [ -n "$dry" ] || remember "$source" "$2"
}

copy() {
    [ -z "$dry" ] || return 0
    mkdir -p "$(dirname "$2")"
    cp "$1" "$2.partial"
    chmod "$3" "$2.partial"
    mv -T "$2.partial" "$2"
}

rm_new() { [ ! -e "$1.new" ] || act rm "$1.new"; }

# Whether a file is as it was placed.
known() { grep -qxF "$(sha256sum <"$1" | cut -c1-64)  $2" "$sums" 2>/dev/null; }

remember() {
    { grep -vF "  $2" "$sums" 2>/dev/null || true; } >"$sums.partial"
    echo "$(sha256sum <"$1" | cut -c1-64)  $2" >>"$sums.partial"
    mv -T "$sums.partial" "$sums"
}

install_files() {
    units=/etc/systemd/system
    place "$kit/board/edge.toml" /etc/qwedge/edge.toml 0644
    place "$kit/common/bin/qwedge" /usr/local/bin/qwedge 0755
    place "$kit/common/systemd/qwedge.service" $units/qwedge.service 0644
    place "$kit/board/board.conf" $units/qwedge.service.d/board.conf 0644
    if [ "$(systemctl --version 2>/dev/null | awk 'NR == 1 {print int($2)}')" -ge 254 ] 2>/dev/null; then
        place "$kit/common/systemd/qwedge.service.d/systemd-254.conf" $units/qwedge.service.d/systemd-254.conf 0644
    fi
    if [ -f "$kit/board/systemd/qwedge-power.service" ]; then
        place "$kit/board/systemd/qwedge-power.service" $units/qwedge-power.service 0644
    fi
    place "$kit/common/sysusers.d/qwedge.conf" /etc/sysusers.d/qwedge.conf 0644
    place "$kit/common/tmpfiles.d/qwedge.conf" /etc/tmpfiles.d/qwedge.conf 0644
    place "$kit/common/journald.conf.d/qwedge.conf" /etc/systemd/journald.conf.d/qwedge.conf 0644
    place "$kit/common/sysctl.d/80-qwedge.conf" /etc/sysctl.d/80-qwedge.conf 0644
    place "$kit/common/zram-generator.conf" /etc/systemd/zram-generator.conf 0644
}

make_users_and_folders() {
    if [ -n "$root" ]; then
        act mkdir -p "$root/var/lib/qwedge" "$root/var/log/qwedge"
        return 0
    fi
    act systemd-sysusers /etc/sysusers.d/qwedge.conf
    act systemd-tmpfiles --create /etc/tmpfiles.d/qwedge.conf
}

# mosquitto for the embedded broker; Debian would start one of its own, on the same port.
install_broker() {
    [ -z "$root" ] && [ -d "$kit/debs" ] || return 0
    ! PATH="$PATH:/usr/sbin" command -v mosquitto >/dev/null || return 0
    say "packages: $(cd "$kit/debs" && echo *.deb)"
    act dpkg --install "$kit"/debs/*.deb
    act systemctl disable --now mosquitto.service
}

# --- the model -----------------------------------------------------------------------------------------------------------

install_bundle() {
    [ -n "$with_bundle" ] && [ -d "$kit/bundle" ] || return 0
    if [ -z "$root" ] && [ -z "$dry" ] && ! runuser -u qwedge -- test -r "$kit/bundle/manifest.json"; then
        fail "the user qwedge cannot read $kit" "copy the kit to /var/tmp and run it there"
    fi
    say "the model; it is checked and tried before it is switched to"
    as_service "$root/opt/qwedge/current/bin/qwedge" install "$kit/bundle" --activate
}

as_service() {
    state=STATE_DIRECTORY=$root/var/lib/qwedge
    if [ -n "$root" ]; then set -- env "$state" ORT_DISABLE_TELEMETRY=1 "$@"; else
        set -- runuser -u qwedge -- env "$state" ORT_DISABLE_TELEMETRY=1 "$@"
    fi
    act "$@"
}

start() {
    act sync --file-system "$root/opt/qwedge"
    if [ -z "$with_start" ]; then
        say "done; nothing was started"
        return 0
    fi
    act systemctl daemon-reload
    act sysctl --quiet --system
    act systemctl try-restart systemd-journald.service
    if [ -f /etc/systemd/system/qwedge-power.service ]; then act systemctl enable --now qwedge-power.service; fi
    act systemctl enable qwedge.service
    if [ -n "$changed" ]; then act systemctl restart qwedge.service; else act systemctl start qwedge.service; fi
    say "done: systemctl status qwedge; curl http://127.0.0.1:8080/health"
}

changed=''
read_options "$@"
check_kit
check_device
install_program
install_files
make_users_and_folders
install_broker
install_bundle
start
