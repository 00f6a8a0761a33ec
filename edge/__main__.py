"""The program ``qwedge``: the command line, imported where Ctrl-C is already answered."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; the imports take seconds on a small board."""
    try:
        from edge.cli import main as command_line  # noqa: PLC0415 - inside of the try
    except KeyboardInterrupt:
        sys.exit(130)
    command_line()


if __name__ == "__main__":
    main()
