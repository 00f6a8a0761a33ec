"""Options and output that several commands share."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from edge.config import Settings, load_settings

Config = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="Settings as TOML; see docs/configuration.md.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def settings(config: Path | None, **flags: Any) -> Settings:
    """The settings of a command; a flag is named like its setting, with ``__`` for the dot (``server__port``).

    Raises:
        ConfigError: as :func:`edge.config.load_settings`.
    """
    return load_settings(config, os.environ, {key.replace("__", "."): value for key, value in flags.items()})


def print_json(value: Any) -> None:
    """Print a result as indented JSON on stdout."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def note(message: str) -> None:
    """Tell the user something beside the result, on stderr."""
    print(message, file=sys.stderr, flush=True)


@contextmanager
def byte_progress(label: str, total: int) -> Iterator[Callable[[int], None] | None]:
    """A progress bar on stderr, or None where nobody watches; call it with the bytes handled since the last call."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(label, total=total)
        yield lambda count: progress.advance(task, count)
