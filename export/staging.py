"""Where a bundle is put together: a hidden folder beside its destination, and what the disk may say about it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edge.errors import ConfigError, ExportError


@contextmanager
def staging_folder(destination: Path) -> Iterator[Path]:
    """A hidden folder beside ``destination`` that is gone afterwards, whatever happens.

    Raises:
        ConfigError: ``destination`` holds something, or there is no writing beside it.
    """
    place = destination.resolve()
    try:
        if place.exists() and not (place.is_dir() and not any(place.iterdir())):
            hint = "choose another folder, or remove it first"
            raise ConfigError(f"{destination} exists already", hint=hint, param="output")
        place.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{place.name}.", suffix=".partial", dir=place.parent))
    except OSError as error:
        hint = "choose a folder you may write to"
        raise ConfigError(f"cannot write to {place.parent}: {error.strerror}", hint=hint, param="output") from None
    staging.chmod(0o755)
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def disk_errors() -> Iterator[None]:
    """Translate a full disk into an error with a hint, wherever it shows.

    Raises:
        ExportError: in the place of an OSError.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise ExportError(f"cannot write the model: {reason}", hint="is there enough disk space?") from None
