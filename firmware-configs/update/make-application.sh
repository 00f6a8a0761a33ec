#!/usr/bin/env bash
# The program of a kit as a read-only image for a slot: make-application.sh KIT FOLDER [--python PATH]
# Puts application.img and kit.env into FOLDER. PATH is the device's Python, /usr/bin/python3.11 without it. Nothing is
# compiled or run for the device's processor: wheels are unpacked. The same kit gives the same bytes.
set -euo pipefail

fail() {
    echo "error: $1" >&2
    echo "hint: $2" >&2
    exit 2
}

[ $# -ge 2 ] || fail "a kit and a folder are needed" "make-application.sh KIT FOLDER"
kit=$1 folder=$2
[ -f "$kit/kit.env" ] || fail "$kit is no kit" "make offline-kit BOARD=..."
(cd "$kit" && sha256sum --check --quiet --strict SHA256SUMS >/dev/null) || fail "the kit is damaged" "make it again"
# shellcheck source=/dev/null
. "$kit/kit.env"
python=/usr/bin/python$PYTHON_VERSION
[ "${3:-}" != --python ] || python=$4

root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
site=$root/current/lib/python$PYTHON_VERSION/site-packages
mkdir -p "$root/current/bin" "$site"
for wheel in "$kit"/wheels/*.whl; do
    case $(basename "$wheel") in pip-*) ;; *) python3 -m zipfile -e "$wheel" "$site" ;; esac
done
# A wheel's scripts and other data would have to be moved to where they belong.
[ -z "$(find "$site" -maxdepth 1 -name '*.data')" ] || fail "a wheel has more than modules" "install.sh instead"
# Bytecode of the device's Python, since nothing is written to the image there; each start would else compile anew.
if command -v "python$PYTHON_VERSION" >/dev/null; then
    "python$PYTHON_VERSION" -m compileall -q -j 0 --invalidation-mode unchecked-hash \
        -s "$site" -p "/opt/qwedge/current/lib/python$PYTHON_VERSION/site-packages" "$site"
else
    echo "application: without python$PYTHON_VERSION here, modules are compiled at each start"
fi

# An environment as `python -m venv` makes it.
ln -s "$python" "$root/current/bin/python"
printf 'home = %s\ninclude-system-site-packages = false\nversion = %s\n' "$(dirname "$python")" "$PYTHON_VERSION" \
    >"$root/current/pyvenv.cfg"
printf '#!/opt/qwedge/current/bin/python\nimport sys\nfrom edge.cli import main\nsys.exit(main())\n' >"$root/current/bin/qwedge"
chmod -R u=rwX,go=rX "$root/current"
chmod 755 "$root" "$root/current/bin/qwedge"

mkdir -p "$folder"
{ cat "$kit/kit.env" && echo "PYTHON=$python"; } >"$folder/kit.env"
rm -f "$folder/application.img"
mksquashfs "$root" "$folder/application.img" -comp gzip -all-root -mkfs-time 0 -all-time 0 -no-xattrs -no-progress -quiet
