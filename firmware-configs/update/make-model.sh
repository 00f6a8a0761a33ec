#!/usr/bin/env bash
# A bundle as one file for an update: make-model.sh BUNDLE FOLDER
# Puts model.tar, which `qwedge install` takes, and model.env into FOLDER. The same bundle gives the same bytes.
set -euo pipefail
bundle=$1 folder=$2

mkdir -p "$folder"
tar -cf "$folder/model.tar" --format=posix --pax-option=delete=atime,delete=ctime --sort=name --mtime=@0 --owner=0 --group=0 --numeric-owner \
    --mode=u=rwX,go=rX --dereference -C "$bundle" .
# NAME, its version and the digits that it has in the store.
python3 - "$bundle/manifest.json" >"$folder/model.env" <<'PYTHON'
import hashlib, json, pathlib, re, sys

data = pathlib.Path(sys.argv[1]).read_bytes()
manifest = json.loads(data)
for field in ("name", "version"):
    if not re.fullmatch(r"[A-Za-z0-9._+-]+", manifest[field]):
        sys.exit(f"error: the bundle's {field} is {manifest[field]!r}")
print(f"NAME={manifest['name']}\nVERSION={manifest['version']}-{hashlib.sha256(data).hexdigest()[:12]}")
PYTHON
