"""The command line: ``qwedge COMMAND``.

Results go to stdout, everything else to stderr. An error is one line ``error: ...`` and, where something can be done,
one line ``hint: ...``; the exit status is the error's (``edge.errors``), 2 for a wrong command line, 130 after Ctrl-C
and 70 for a fault of ours.
"""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Sequence
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Annotated, Any

import typer

from edge import __version__
from edge.commands import (
    bench,
    chat,
    doctor,
    eval,  # noqa: A004 - the name of the command
    generate,
    http,
    keys,
    mqtt,
    plan,
    sbom,
    serve,
    store,
    tls,
    verify,
)
from edge.errors import ConfigError, QwedgeError
from edge.violations import violation

COMMAND_GROUP = "qwedge.commands"
"""Entry points ``name = "module:register"`` that add a command: how `export` joins without `edge` importing it."""
EXIT_USAGE = 2
EXIT_INTERNAL = 70
EXIT_INTERRUPTED = 130

_NOT_OURS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EMFILE, errno.ENFILE})
"""What the machine may refuse to anybody at any time."""
_ANY_ARGUMENTS = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def build_app() -> typer.Typer:
    """The whole command line, with the commands of installed extensions."""
    app = typer.Typer(
        name="qwedge",
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    )
    app.callback()(_root)
    for command in (serve, chat, generate, bench, plan, eval, verify, doctor, mqtt, http, tls, store, keys, sbom):
        command.register(app)
    for entry in sorted(entry_points(group=COMMAND_GROUP), key=lambda entry: entry.name):
        _register_extension(app, entry)
    return app


def run(args: Sequence[str]) -> int:
    """Run one command line and return its exit status; errors are reported on stderr."""
    try:
        status = build_app()(args=list(args) or ["--help"], prog_name="qwedge", standalone_mode=False)
        sys.stdout.flush()
    except QwedgeError as error:
        return _report(error.message, error.hint, error.exit_code)
    except typer.TyperException as error:
        return _report(_usage_message(error), f"see {_command_path(error)} --help", EXIT_USAGE)
    except (KeyboardInterrupt, typer.Abort):
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader (`| head`) has what it wanted. Python would complain again when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:  # noqa: BLE001 - the last line of defence: a user never sees a traceback unasked
        return _report_fault(error, debug="--debug" in args or os.environ.get("QWEDGE_LOG_LEVEL") == "debug")
    return status if isinstance(status, int) else 0


def main() -> None:
    """The program: :mod:`edge.__main__` calls it."""
    _complete_streams()
    sys.exit(run(sys.argv[1:]))


def _complete_streams() -> None:
    """Where a stream was closed for us, files and sockets must not get its number, nor ``sys.stdout`` be None."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115 - until the end


def _show_version(value: bool) -> None:
    if value:
        print(f"qwedge {__version__}")
        raise typer.Exit


def _root(
    *,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_show_version)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback when qwedge itself fails.")] = False,
) -> None:
    """Small Qwen models on devices without internet: export them, serve them over HTTP and MQTT."""
    del version, debug  # _show_version acts on the first; run() looks for the second itself, before anything is parsed


def _register_extension(app: typer.Typer, entry: EntryPoint) -> None:
    try:
        register = entry.load()
    except ModuleNotFoundError as error:
        missing = error.name

        def unavailable() -> None:
            raise ConfigError(
                f"qwedge {entry.name} needs the Python package {missing}, which is not installed",
                hint=f"pip install 'qwedge[{entry.name}]'",
            )

        help_text = f"(needs: pip install 'qwedge[{entry.name}]')"
        app.command(entry.name, help=help_text, context_settings=_ANY_ARGUMENTS)(unavailable)
    else:
        register(app)


def _usage_message(error: typer.TyperException) -> str:
    subject, colon, reason = error.format_message().rstrip(".").partition(": ")
    return f"{subject[:1].lower()}{subject[1:]}{colon}{violation(reason)}"


def _command_path(error: typer.TyperException) -> str:
    context: Any = getattr(error, "ctx", None)
    return context.command_path if context is not None else "qwedge"


def _report(message: str, hint: str, status: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    if hint:
        print(f"hint: {hint}", file=sys.stderr)
    return status


def _report_fault(error: Exception, *, debug: bool) -> int:
    if isinstance(error, ModuleNotFoundError):
        hint = "pip install 'qwedge[export]' brings what the export needs; see the README"
        return _report(f"the Python package {error.name} is not installed", hint, EXIT_USAGE)
    if debug:
        traceback.print_exception(error)
    if isinstance(error, OSError) and error.errno in _NOT_OURS:
        place = f"{error.filename}: " if error.filename else ""
        return _report(f"{place}{error.strerror}", "check disk, device and limits; `qwedge --debug ...` shows more", 1)
    hint = "" if debug else "this is a fault of qwedge; `qwedge --debug ...` shows where it happened"
    text = " ".join(str(error).split())
    print(f"internal error: {type(error).__name__}: {text}", file=sys.stderr)
    if hint:
        print(f"hint: {hint}", file=sys.stderr)
    return EXIT_INTERNAL


if __name__ == "__main__":
    main()
