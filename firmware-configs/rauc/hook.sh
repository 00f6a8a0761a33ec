#!/bin/sh
# What RAUC calls in a bundle of qwedge's. A refusal is status 10, and its reason one line on stderr.
set -eu
bundle=$(dirname "$0")

refuse() {
    echo "$1" | paste -sd ' ' >&2
    exit 10
}

case $1 in
install-check)
    case $RAUC_MF_COMPATIBLE in
    "$RAUC_SYSTEM_COMPATIBLE") ;;
    qwedge) case $RAUC_SYSTEM_COMPATIBLE in qwedge-*) ;; *) refuse "this system is not made for qwedge" ;; esac ;;
    *) refuse "this bundle is for $RAUC_MF_COMPATIBLE, this device is $RAUC_SYSTEM_COMPATIBLE" ;;
    esac
    [ ! -f "$bundle/kit.env" ] || reason=$(sh "$bundle/device.sh" check "$bundle/kit.env" 2>&1) || refuse "$reason"
    ;;
slot-post-install) sh "$bundle/device.sh" application "$RAUC_SLOT_DEVICE" ;;
slot-install) sh "$bundle/device.sh" model "$RAUC_IMAGE_NAME" ;;
*) refuse "$1 is no hook of this bundle" ;;
esac
