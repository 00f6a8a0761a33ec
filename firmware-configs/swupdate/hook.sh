#!/bin/sh
# What SWUpdate calls before and after it writes: hook.sh preinst|postinst application SLOT | model. make-image.sh appends device.sh and
# what it has to know, since scripts come alone.
set -eu
slots=/usr/lib/qwedge/qwedge-slots model=/var/lib/qwedge-slots/model.tar

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
sed '1,/^#>>> kit.env$/d; /^#>>> device.sh$/,$d' "$0" >"$work/kit.env"
sed '1,/^#>>> device.sh$/d' "$0" >"$work/device.sh"

case "$1 $2" in
"preinst application")
    [ "$3" = "$($slots inactive)" ] || { echo "slot $3 is in use: swupdate -e program,$($slots inactive)" && exit 1; }
    sh "$work/device.sh" check "$work/kit.env"
    $slots set-state "$3" bad
    ;;
"postinst application")
    sh "$work/device.sh" application "/run/qwedge-slots/$3"
    $slots set-primary "$3"
    ;;
"postinst model")
    trap 'rm -rf "$work" "$model"' EXIT
    sh "$work/device.sh" model "$model"
    ;;
esac
exit
