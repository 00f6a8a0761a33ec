#!/usr/bin/env bash
# An update for RAUC, signed: make-bundle.sh KIT|BUNDLE OUT.raucb --cert CERT.pem --key KEY.pem [--python PATH]
# Of a kit (make offline-kit) the program, of an exported bundle the model. KEY may be a PKCS#11 URL. PATH: make-application.sh.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
python=()

fail() {
    echo "error: $1" >&2
    echo "hint: $2" >&2
    exit 2
}

[ $# -ge 2 ] || fail "what to pack and a file are needed" "make-bundle.sh KIT|BUNDLE OUT.raucb --cert CERT --key KEY"
source=$1 out=$2 cert='' key=''
shift 2
while [ $# -ge 2 ]; do
    case $1 in
    --cert) cert=$2 ;;
    --key) key=$2 ;;
    --python) python=(--python "$2") ;;
    *) fail "$1 is no option" "--cert CERT --key KEY" ;;
    esac
    shift 2
done
[ -n "$cert" ] || fail "nothing says who signs the bundle" "--cert CERT --key KEY"
[ -n "$key" ] || fail "the certificate has no key to sign with" "--cert CERT --key KEY"
[ ! -e "$out" ] || fail "$out is there already" "remove it, or name another file"

content=$(mktemp -d)
trap 'rm -rf "$content"' EXIT
if [ -f "$source/kit.env" ]; then
    "$here/../update/make-application.sh" "$source" "$content" "${python[@]}"
    # shellcheck source=/dev/null
    . "$content/kit.env"
    sed "s/@BOARD@/$BOARD/; s/@VERSION@/$QWEDGE_VERSION/" "$here/application.raucm" >"$content/manifest.raucm"
elif [ -f "$source/manifest.json" ]; then
    "$here/../update/make-model.sh" "$source" "$content"
    # shellcheck source=/dev/null
    . "$content/model.env"
    rm "$content/model.env"
    sed "s/@NAME@/$NAME/; s/@VERSION@/$VERSION/" "$here/model.raucm" >"$content/manifest.raucm"
else
    fail "$source is neither a kit nor a bundle" "make offline-kit, or qwedge export"
fi
cp "$here/hook.sh" "$here/../update/device.sh" "$content/"
chmod 755 "$content/hook.sh" "$content/device.sh"
# What is in it is packed already, and weights hardly get smaller.
rauc bundle --cert="$cert" --key="$key" --mksquashfs-args="-noD -noF" "$content" "$out"
