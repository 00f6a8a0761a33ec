#!/usr/bin/env bash
# An update for SWUpdate, signed: make-image.sh KIT|BUNDLE OUT.swu --cert CERT.pem --key KEY.pem [--python PATH]
# Of a kit (make offline-kit) the program, of an exported bundle the model. PATH: make-application.sh.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
update=$here/../update python=()

fail() {
    echo "error: $1" >&2
    echo "hint: $2" >&2
    exit 2
}

[ $# -ge 2 ] || fail "what to pack and a file are needed" "make-image.sh KIT|BUNDLE OUT.swu --cert CERT --key KEY"
source=$1 out=$(realpath -m "$2") cert='' key=''
shift 2
while [ $# -ge 2 ]; do
    case $1 in
    --cert) cert=$(realpath "$2") ;;
    --key) key=$(realpath "$2") ;;
    --python) python=(--python "$2") ;;
    *) fail "$1 is no option" "--cert CERT --key KEY" ;;
    esac
    shift 2
done
[ -n "$cert" ] || fail "nothing says who signs the image" "--cert CERT --key KEY"
[ -n "$key" ] || fail "the certificate has no key to sign with" "--cert CERT --key KEY"
[ ! -e "$out" ] || fail "$out is there already" "remove it, or name another file"

# fill TEMPLATE NAME=VALUE ...: values, and the sums of files.
fill() {
    local text name
    text=$(<"$here/$1")
    shift
    for name in "$@"; do text=${text//@${name%%=*}@/${name#*=}}; done
    for name in $(grep -o '@sha256:[^@]*@' <<<"$text" | sort -u | cut -d: -f2 | tr -d @); do
        text=${text//@sha256:$name@/$(sha256sum <"$name" | cut -c1-64)}
    done
    echo "$text" >sw-description
}

content=$(mktemp -d)
trap 'rm -rf "$content"' EXIT
touch "$content/kit.env"
if [ -f "$source/kit.env" ]; then
    "$update/make-application.sh" "$source" "$content" "${python[@]}"
    payload=application.img
elif [ -f "$source/manifest.json" ]; then
    "$update/make-model.sh" "$source" "$content"
    payload=model.tar
else
    fail "$source is neither a kit nor a bundle" "make offline-kit, or qwedge export"
fi
cd "$content"
{ cat "$here/hook.sh" && echo "#>>> kit.env" && cat kit.env && echo "#>>> device.sh" && cat "$update/device.sh"; } >hook.sh
# shellcheck source=/dev/null disable=SC2153
if [ "$payload" = application.img ]; then
    . ./kit.env
    fill application.sw-description "BOARD=$BOARD" "VERSION=$QWEDGE_VERSION"
else
    . ./model.env
    fill model.sw-description "NAME=$NAME" "VERSION=$VERSION"
fi
openssl cms -sign -in sw-description -out sw-description.sig -signer "$cert" -inkey "$key" -outform DER -nosmimecap -binary
# In this order: SWUpdate reads the image as it comes in.
printf '%s\n' sw-description sw-description.sig hook.sh "$payload" | cpio --quiet -o -H crc >image.swu
mv image.swu "$out"
