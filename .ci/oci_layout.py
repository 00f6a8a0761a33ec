"""Write an OCI image layout from layers: ``oci_layout.py FOLDER VERSION ARCH:LAYER.tar.gz[:LAYER.tar.gz ...] ...``.

One image for each architecture behind one index, as https://github.com/opencontainers/image-spec 1.1 has it. Dates
come from ``SOURCE_DATE_EPOCH``, so that the same layers make the same bytes.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

MEDIA: Final = "application/vnd.oci.image"
PROBE: Final = "import urllib.request as r; r.urlopen('http://127.0.0.1:8080/health/live', timeout=4)"
CONFIG: Final[dict[str, Any]] = {
    # By number, since clusters check that it is not 0.
    "User": "65532:65532",
    "Env": [
        "PATH=/usr/bin",
        "STATE_DIRECTORY=/var/lib/qwedge",
        "ORT_DISABLE_TELEMETRY=1",
        "SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt",
    ],
    "Entrypoint": ["/usr/bin/qwedge"],
    "Cmd": ["serve", "--config", "/etc/qwedge/edge.toml"],
    "ExposedPorts": {"8080/tcp": {}},
    "Volumes": {"/var/lib/qwedge": {}},
    "WorkingDir": "/",
    "StopSignal": "SIGTERM",
    # Docker's own, in nanoseconds; who does not know it leaves it alone.
    "Healthcheck": {
        "Test": ["CMD", "/usr/lib/qwedge/bin/python3", "-c", PROBE],
        "Interval": 30_000_000_000,
        "Timeout": 5_000_000_000,
        "StartPeriod": 600_000_000_000,
    },
}


def main(folder: str, version: str, *images: str) -> None:
    """Write the layout."""
    blobs = Path(folder, "blobs/sha256")
    blobs.mkdir(parents=True)
    created = datetime.fromtimestamp(int(os.environ["SOURCE_DATE_EPOCH"]), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    manifests = [_image(blobs, *image.split(":"), version=version, created=created) for image in images]
    index = _blob(blobs, {"schemaVersion": 2, "mediaType": f"{MEDIA}.index.v1+json", "manifests": manifests})
    named = {
        "annotations": {"org.opencontainers.image.ref.name": version, "io.containerd.image.name": f"qwedge:{version}"}
    }
    top = {"schemaVersion": 2, "manifests": [{"mediaType": f"{MEDIA}.index.v1+json", **index, **named}]}
    Path(folder, "index.json").write_bytes(_json(top))
    Path(folder, "oci-layout").write_bytes(_json({"imageLayoutVersion": "1.0.0"}))


def _image(blobs: Path, arch: str, *layers: str, version: str, created: str) -> dict[str, Any]:
    """Config and manifest of one architecture; returns what the index has of it."""
    labels = {
        "org.opencontainers.image.title": "qwedge",
        "org.opencontainers.image.version": version,
        "org.opencontainers.image.licenses": "Apache-2.0",
        "org.opencontainers.image.created": created,
    }
    config = {
        "architecture": arch,
        "os": "linux",
        "created": created,
        "config": CONFIG | {"Labels": labels},
        "rootfs": {"type": "layers", "diff_ids": [_unpacked_digest(Path(layer)) for layer in layers]},
        "history": [{"created": created, "created_by": Path(layer).name} for layer in layers],
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": f"{MEDIA}.manifest.v1+json",
        "config": {"mediaType": f"{MEDIA}.config.v1+json", **_blob(blobs, config)},
        "layers": [{"mediaType": f"{MEDIA}.layer.v1.tar+gzip", **_copy(blobs, Path(layer))} for layer in layers],
        "annotations": labels,
    }
    platform = {"architecture": arch, "os": "linux", **({"variant": "v8"} if arch == "arm64" else {})}
    return {"mediaType": manifest["mediaType"], **_blob(blobs, manifest), "platform": platform}


def _json(content: dict[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


def _blob(blobs: Path, content: dict[str, Any]) -> dict[str, Any]:
    data = _json(content)
    digest = hashlib.sha256(data).hexdigest()
    (blobs / digest).write_bytes(data)
    return {"digest": f"sha256:{digest}", "size": len(data)}


def _copy(blobs: Path, layer: Path) -> dict[str, Any]:
    with layer.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    shutil.copy(layer, blobs / digest)
    return {"digest": f"sha256:{digest}", "size": layer.stat().st_size}


def _unpacked_digest(layer: Path) -> str:
    with gzip.open(layer) as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


if __name__ == "__main__":
    main(*sys.argv[1:])
