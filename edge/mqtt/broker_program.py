"""The mosquitto that is installed on this device."""

from __future__ import annotations

import re
import shutil
import subprocess
from typing import Final

from edge.errors import UnavailableError

_SEARCH_PATH: Final = "/usr/sbin:/usr/local/sbin"
_MIN_VERSION: Final = (2, 0)


def find_mosquitto() -> str:
    """Path of the mosquitto program, also where it is not on an ordinary user's PATH.

    Raises:
        UnavailableError: it is not installed.
    """
    program = shutil.which("mosquitto") or shutil.which("mosquitto", path=_SEARCH_PATH)
    if program is None:
        hint = "apt-get install mosquitto, name a broker by --broker mqtt://HOST:PORT, or serve with --broker none"
        raise UnavailableError("mosquitto is not installed", hint=hint)
    return program


def mosquitto_version(program: str) -> tuple[int, ...]:
    """The version that ``mosquitto -h`` prints, for example (2, 0, 11).

    Raises:
        UnavailableError: it does not run, or is too old for the generated configuration.
    """
    try:
        output = subprocess.run([program, "-h"], capture_output=True, text=True, timeout=10, check=False).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UnavailableError(f"{program} does not run: {error}", hint="reinstall mosquitto") from None
    match = re.search(r"mosquitto version (\d+)\.(\d+)\.(\d+)", output)
    version = tuple(int(part) for part in match.groups()) if match else ()
    if version < _MIN_VERSION:
        found = ".".join(map(str, version)) or "of unknown version"
        raise UnavailableError(f"mosquitto {found} is too old", hint="install mosquitto 2.0 or newer")
    return version
