"""Where files with passwords and keys lie."""

from __future__ import annotations

import os
from pathlib import Path


def find_secret(path: Path) -> Path:
    """A configured file: a relative name is one of systemd's credentials (``LoadCredential=``) where there are any."""
    folder = os.environ.get("CREDENTIALS_DIRECTORY")
    return Path(folder) / path if folder else path


def is_credential(path: Path) -> bool:
    """Whether a file is one of systemd's credentials, from which it keeps others away itself."""
    folder = os.environ.get("CREDENTIALS_DIRECTORY")
    return folder is not None and path.is_relative_to(folder)
