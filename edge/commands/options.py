"""Options and output that several commands share."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from edge.config import Settings, load_settings
from edge.errors import ConfigError
from edge.log_format import JsonFormatter, TextFormatter
from edge.settings.log import LogSettings

Config = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="Settings as TOML; see docs/configuration.md.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Bundle = Annotated[Path | None, typer.Option("--bundle", metavar="DIR", help="The bundle to load.")]
StoreFolder = Annotated[
    Path | None, typer.Option("--store", metavar="DIR", help="The model store [default: in the state folder].")
]
Trust = Annotated[
    Path | None, typer.Option("--trust", metavar="DIR", help="Folder of public keys; one must have signed the bundle.")
]
Threads = Annotated[
    int | None, typer.Option("--threads", metavar="N", help="Engine threads [default: physical cores].")
]
Context = Annotated[
    int | None, typer.Option("--context", metavar="N", help="Tokens of a conversation [default: 4096 at most].")
]

MaxTokens = Annotated[int | None, typer.Option("--max-tokens", metavar="N", help="Most tokens of an answer.")]
Temperature = Annotated[float | None, typer.Option("--temperature", metavar="T", help="0 to 2; 0 is greedy.")]
TopP = Annotated[float | None, typer.Option("--top-p", metavar="P", help="Nucleus sampling: 0 to 1.")]
TopK = Annotated[int | None, typer.Option("--top-k", metavar="K", help="The K likeliest tokens; 0 means all.")]
MinP = Annotated[float | None, typer.Option("--min-p", metavar="P", help="Share of the likeliest token's probability.")]
RepetitionPenalty = Annotated[
    float | None, typer.Option("--repetition-penalty", metavar="R", help="0.1 to 10; 1 is none.")
]
Seed = Annotated[int | None, typer.Option("--seed", metavar="N", help="The same seed gives the same answer.")]
Stop = Annotated[list[str] | None, typer.Option("--stop", metavar="TEXT", help="End the answer here; may be repeated.")]
System = Annotated[str | None, typer.Option("--system", metavar="TEXT", help="The system message.")]


def settings(config: Path | None, **flags: Any) -> Settings:
    """The settings of a command; a flag is named like its setting, with ``__`` for the dot (``server__port``).

    Raises:
        ConfigError: as :func:`edge.config.load_settings`.
    """
    return load_settings(config, os.environ, {key.replace("__", "."): value for key, value in flags.items()})


def messages(system: str | None, text: str) -> list[dict[str, str]]:
    """A conversation of one user message, with a system message where one is given."""
    opening = [{"role": "system", "content": system}] if system else []
    return [*opening, {"role": "user", "content": text}]


def read_stdin() -> str:
    """A prompt that is not given as an argument.

    Raises:
        ConfigError: there is none, or it is no text.
    """
    if sys.stdin.isatty():
        note("reading the prompt from the terminal; end it with Ctrl-D")
    try:
        text = sys.stdin.read()
    except UnicodeDecodeError:
        raise ConfigError("stdin is not UTF-8 text", hint="convert it: iconv -f latin1 -t utf-8") from None
    if not text.strip():
        raise ConfigError("there is no prompt", hint="give it as an argument or on stdin")
    return text


def print_json(value: Any) -> None:
    """Print a result as indented JSON on stdout."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def note(message: str) -> None:
    """Tell the user something beside the result, on stderr."""
    print(message, file=sys.stderr, flush=True)


def log_to_stderr(settings: LogSettings) -> None:
    """Write the log to stderr, one record a line."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if settings.format == "json" else TextFormatter())
    logging.basicConfig(level=settings.level.upper(), handlers=[handler], force=True)


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
